"""The same scores on any number of ranks: models whole on each, or their experts among them."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import toy_run
import toy_tasks
from harness import run_ranks

from moe.errors import UserError
from moe.evals.adapter import MoeLM, alone
from moe.evals.harness import Prompting, ask, load
from moe.evals.rounds import Batch, Rounds
from moe.evals.run import find_tasks
from moe.parallel.world import Ranks, world

pytestmark = pytest.mark.slow
CASES = [(1, 1), (3, 1), ("auto", 1), (1, 2), (3, 2)]  # sequences a batch, ranks that share experts


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A model with experts in every layer, and a folder of tasks."""
    root = tmp_path_factory.mktemp("ranks")
    toys = toy_run.make(root, tiny.TWO_STAGE, [tiny.MOE] * 3)
    return toys.model, toy_tasks.write(root / "suite").parent


def answers(model: Path, tasks: Path, case: tuple[Any, int], ranks: Ranks) -> Any:
    """What the model said to every request, and the scores."""
    batch_size, expert = case
    loaded = load(toy_tasks.TASKS, find_tasks(toy_tasks.TASKS, tasks, None))
    lm = MoeLM(model, batch_size, ranks=ranks, expert=min(expert, ranks.size))
    result = ask(lm, loaded, None, Prompting())
    said = {
        (task, sample["doc_id"]): sample["resps"]
        for task, samples in result["samples"].items()
        for sample in samples
    }
    return said, {task: dict(r) for task, r in result["results"].items()}


def on_rank(model: Path, tasks: Path, cases: list[tuple[Any, int]]) -> list[Any]:
    """The answers of each case, and what is said to experts that cannot be shared out."""
    with world() as ranks:
        found = [answers(model, tasks, case, ranks) for case in cases]
        with pytest.raises(UserError) as refused:
            MoeLM(model, ranks=ranks, expert=3)
        return [*found, str(refused.value)]


def near(found: dict[Any, Any], expected: dict[Any, Any]) -> None:
    """Texts are the same, likelihoods as far apart as sums in another order."""
    assert found.keys() == expected.keys()
    for key, value in found.items():
        if key[0] == "toy_say":
            assert value == expected[key], key
        else:
            numbers = [torch.tensor(x, dtype=torch.float64) for x in (value, expected[key])]
            torch.testing.assert_close(*numbers, rtol=1e-6, atol=1e-5, msg=str(key))


@pytest.fixture(scope="module")
def one(folders) -> list[Any]:
    return [answers(*folders, case, alone()) for case in CASES]


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.full)])
def test_ranks_say_what_one_process_says(size, folders, one) -> None:
    """To the last bit, whatever stands in a batch; to float order where experts are on other ranks,
    for tokens of several ranks meet in one product there.
    """
    found = run_ranks(on_rank, size, *folders, CASES, timeout=240)
    legal = "1, 2" if size == 2 else "1, 2, 4"
    for refusal in (answered.pop() for answered in found):
        assert refusal == (
            f"--expert-parallel 3 does not divide both the {size} ranks and the experts of every "
            f"layer (4). Use one of {legal}."
        )
    for case, (said, scores), *others in zip(CASES, one, *found, strict=True):
        assert len(said) == len(toy_tasks.TASKS) * toy_tasks.ITEMS
        for rank, (theirs, _) in enumerate(others):
            assert theirs == others[0][0], (case, rank)
            if case[1] == 1:
                assert theirs == said, (case, rank)
            else:
                near(theirs, said)
        if case[1] == 1:
            assert others[0][1] == scores, case
    with pytest.raises(AssertionError):  # negative control: answers to other items
        near(dict(zip(said, list(said.values())[::-1], strict=True)), said)


def test_what_is_in_a_batch_does_show(one) -> None:
    """Negative control: batches that depended on ranks would be found by the test above."""
    (first, scores), (second, others) = one[:2]
    assert first != second
    assert scores["toy_choice"] == others["toy_choice"]


def pooled(size: int, rank: int, count: int) -> tuple[list[Any], list[int]]:
    """What one of so many threads of rounds is asked to compute."""
    asked: list[int] = []

    class Pretended(Ranks):
        def gather(self, value: Any) -> list[Any]:
            return [value] * self.size

    rounds = Rounds(Pretended(rank, size, torch.device("cpu")), together=True)
    batches = [Batch(str(i), [i]) for i in range(count)]

    def compute(batch: Batch) -> list[int]:
        asked.append(batch.places[0])
        return [batch.places[0]]

    try:
        found = rounds.answer(batches, compute)
    except KeyError:  # nobody but us has answered
        found = {}
    return list(found.values()), asked


@pytest.mark.parametrize("count", [0, 1, 5, 8])
def test_every_rank_computes_as_often(count) -> None:
    """Forward passes that take all ranks would wait for ever otherwise."""
    lengths = {len(pooled(4, rank, count)[1]) for rank in range(4)}
    assert lengths == {-(-count // 4)}
    assert pooled(1, 0, count) == (list(range(count)), list(range(count)))
