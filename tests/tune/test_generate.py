"""`moe generate`: what it prints, sampling that no batch changes, and a tuning at work."""

import json
from pathlib import Path

import pytest
import recordings
import torch
from invoke import moe
from recordings import CAUSAL, TEXTS, folder_of, subject

from moe.errors import UserError
from moe.tune import generation
from moe.tune.generation import Sampling, respond
from moe.tune.intervene import tuned
from moe.tune.prompts import encode, places
from moe.tune.tuning import Edit, Tuning


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return folder_of("mixtral", tmp_path_factory.mktemp("models") / "mixtral")


def responses(of, texts, sampling, size: int, ends=(2,)) -> list[list[int]]:
    given = recordings.prompts(texts)
    rows, names = [e.prompt for e in encode(given, of.tokenizer, False, None)], places(given)
    return [
        response
        for i in range(0, len(rows), size)
        for response in respond(of.model, rows[i : i + size], sampling, names[i : i + size], ends)
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", CAUSAL)
def test_a_response_does_not_depend_on_its_batch(name, temperature):
    of = subject(name)
    sampling = Sampling(max_new_tokens=6, temperature=temperature, seed=5)
    texts = TEXTS[:5]
    together = responses(of, texts, sampling, 5)
    assert together == responses(of, texts, sampling, 1)
    assert together == responses(of, texts[:3], sampling, 3) + responses(of, texts[3:], sampling, 2)


def test_one_generator_for_a_whole_batch_is_noticed(monkeypatch):
    """Negative control."""

    class Shared(generation.Noise):
        def __init__(self, *given):
            super().__init__(*given)
            self.generators = [self.generators[0]] * len(self.generators)

    monkeypatch.setattr(generation, "Noise", Shared)
    of, sampling = subject("moe"), Sampling(max_new_tokens=6, temperature=1.0)
    assert responses(of, TEXTS, sampling, 7) != responses(of, TEXTS, sampling, 1)


def test_noise_samples_the_softmax():
    """Shares of 20 000 draws of four words; a temperature of 2 flattens them."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    for temperature in (1.0, 2.0):
        sampling = Sampling(max_new_tokens=1, temperature=temperature)
        noise = generation.Noise(sampling, ["a", "b"], torch.device("cpu"))
        drawn = [noise(torch.empty(0), logits.expand(2, 4)).argmax(-1) for _ in range(10_000)]
        shares = torch.stack(drawn).flatten().bincount(minlength=4) / 20_000
        torch.testing.assert_close(shares, (logits / temperature).softmax(-1), atol=0.015, rtol=0)


def test_seeds_repetitions_and_temperature_zero():
    of = subject("moe")
    draw = {seed: Sampling(max_new_tokens=8, temperature=1.5, seed=seed) for seed in (0, 1)}
    assert responses(of, TEXTS, draw[0], 4) == responses(of, TEXTS, draw[0], 4)
    assert responses(of, TEXTS, draw[0], 4) != responses(of, TEXTS, draw[1], 4)
    twice = responses(of, ["same", "same"], draw[0], 2)
    assert twice[0] != twice[1]
    greedy = responses(of, ["same", "same"], Sampling(max_new_tokens=8), 2)
    assert greedy[0] == greedy[1]


def test_what_ends_a_response_is_not_part_of_it_and_pads_do_not_follow():
    of, sampling = subject("moe"), Sampling(max_new_tokens=8)
    free = responses(of, TEXTS, sampling, 7, ends=())
    assert all(len(r) == 8 for r in free)
    end = free[0][3]
    cut = responses(of, TEXTS, sampling, 7, ends=(end,))
    expected = [r[: r.index(end)] if end in r else r for r in free]
    assert cut == expected and len(cut[0]) <= 3


def test_a_checkpoints_own_wishes_do_not_matter():
    of, sampling = subject("moe"), Sampling(max_new_tokens=8)
    plain = responses(of, TEXTS, sampling, 7)
    wishes = of.model.generation_config
    wishes.repetition_penalty, wishes.num_beams, wishes.do_sample = 5.0, 3, True
    assert responses(of, TEXTS, sampling, 7) == plain
    assert of.model.generation_config is wishes and wishes.num_beams == 3


def test_the_command_prints_responses_and_names_the_tuning(model, tmp_path):
    of = subject("mixtral")
    sampling = Sampling(max_new_tokens=6)
    edits = [Edit(layer=n, expert=e) for n in range(3) for e in (0, 1, 2, 3)]
    tuning = Tuning(semantics="pre_topk", experts=edits, scale=0.5)
    tuning.write(tmp_path / "t.json")

    def text(scale: float | None) -> list[str]:
        with tuned(of.model, tuning, scale):
            found = responses(of, ["abc", "The"], sampling, 2)
        return [of.tokenizer.decode(ids, skip_special_tokens=True) for ids in found]

    base = ("generate", model, "--prompt", "abc", "--prompt", "The", "--max-new-tokens", 6)
    plain = moe(*base)
    assert plain.code == 0 and plain.err == ""
    first, second = text(0.0)
    assert plain.out == f"> abc\n{first}\n\n> The\n{second}\n"
    full = moe(*base, "--tuning", tmp_path / "t.json", "--scale", 1, "--json")
    assert [r["response"] for r in json.loads(full.out)["responses"]] == text(1.0) != text(0.0)
    own = moe(*base, "--tuning", tmp_path / "t.json")
    assert own.err == "12 experts off (pre_topk), scale 0.5\n"
    assert text(0.5)[0] in own.out
    alone = moe("generate", model, "--prompt", "abc", "--max-new-tokens", 6)
    assert alone.out == f"{first}\n"


def test_a_dense_model_generates_too(tmp_path):
    recordings.tiny.dense_model().save_pretrained(tmp_path / "dense")
    recordings.tokenizer().save_pretrained(tmp_path / "dense")
    result = moe("generate", tmp_path / "dense", "--prompt", "a", "--max-new-tokens", 2, "--chat")
    assert result.code == 0, result.err


def test_what_cannot_be_generated_is_said(model, tmp_path):
    Tuning(semantics="post_zero", experts=[Edit(layer=9, expert=0)]).write(tmp_path / "t.json")
    for options, said in (
        (["--scale", 0.5], "give --tuning too"),
        (["--tuning", tmp_path / "t.json"], "layers with one in the mlp: 0 to 2"),
        (["--tuning", tmp_path / "no.json"], "No such file"),
        (["--max-new-tokens", 600], "prompt 1: longer than the model's 512 positions"),
        (["--prompt", ""], "a --prompt is empty"),
    ):
        result = moe("generate", model, "--prompt", "abc", *options)
        assert result.code == 2 and said in result.err, result.err
        assert result.err.count("\n") == 1 and not result.out
    with pytest.raises(UserError, match="expert_choice is not causal"):
        responses(subject("expert_choice"), ["abc"], Sampling(max_new_tokens=2), 1)
