"""`moe upcycle btx` and `bam` with routers fitted to text: tokens go to the branch for them."""

import math
from pathlib import Path

import calibrating
import pytest
import tiny
import torch
from harness import run_ranks
from planted_branches import NAMES, TOKENS, build, calibration, letters, sources
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from moe.model import RoutedLlamaForCausalLM
from moe.upcycle.calibrate import branches
from moe.upcycle.calibrate.branches import SHARPEST, Aim, temperature
from moe.upcycle.receipt import Receipt

PARTS = {"btx": ("mlp",), "bam": ("attention", "mlp")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build(tmp_path_factory.mktemp("planted"))


@pytest.fixture
def mix(moe_upcycle, folder, tmp_path):
    """`mix("btx", …)`: the folder of a mixture of the three."""
    count = iter(range(100))

    def call(recipe, *options, text="labelled"):
        out = tmp_path / f"out{next(count)}"
        given = () if text is None else ("--calibrate", folder / f"{text}.jsonl")
        given += () if text is None else ("--calibration-tokens", TOKENS)
        result = moe_upcycle(
            recipe, *sources(folder), *options, *given, "--out", out, "--no-verify"
        )
        assert result.code == 0, result.err
        return out

    return call


def step_of(out: Path) -> dict:
    return Receipt.read(out).steps[-1]["calibration"]


@torch.no_grad()
def inputs(out: Path, part: str, ids: list[torch.Tensor]) -> list[torch.Tensor]:
    """What each layer's router of a part sees [T, H], float64."""
    model = RoutedLlamaForCausalLM.from_pretrained(out).eval()
    seen: list[list[torch.Tensor]] = []
    for layer in model.model.layers:
        own: list[torch.Tensor] = []
        router = getattr(layer, {"attention": "self_attn", "mlp": "mlp"}[part]).router
        router.register_forward_pre_hook(lambda module, given, own=own: own.append(given[0]))
        seen.append(own)
    for window in ids:
        model(window[None], use_cache=False)
    return [torch.cat(own).double() for own in seen]


def router(out: Path, part: str, layer: int) -> torch.Tensor:
    at = {"attention": "self_attn", "mlp": "mlp"}[part]
    return load_file(out / "model.safetensors")[f"model.layers.{layer}.{at}.router.weight"]


def right(out: Path, part: str) -> list[float]:
    """Of each layer the share of fresh tokens whose best expert is the one for them."""
    ids = [torch.tensor(tiny.tokenizer()(letters(i, 50, 150))["input_ids"]) for i in range(3)]
    wanted = torch.arange(3).repeat_interleave(150)
    seen = inputs(out, part, ids)
    return [
        ((x @ router(out, part, layer).double().T).argmax(1) == wanted).double().mean().item()
        for layer, x in enumerate(seen)
    ]


@pytest.mark.parametrize("target", ["label", "loss"])
@pytest.mark.parametrize("recipe", PARTS)
def test_tokens_go_to_their_branch(recipe, target, mix):
    out = mix(recipe, "--top-k", 1, "--target", target, text="labelled")
    for part in PARTS[recipe]:
        assert min(right(out, part)) > 0.95, right(out, part)
    step = step_of(out)
    assert step["target"] == target and set(step["parts"]) == set(PARTS[recipe])
    assert all(part["right"] > 0.95 and part["r2"] > 0.3 for part in step["parts"].values())
    own = [source["perplexity"] for source in step["sources"]]
    assert len(own) == 3 and all(p < 97 for p in own)


@pytest.mark.parametrize("recipe", PARTS)
def test_a_drawn_router_sends_them_anywhere(recipe, mix):
    """Negative control of the test above."""
    out = mix(recipe, "--top-k", 1, text=None)
    assert all(max(right(out, part)) < 0.7 for part in PARTS[recipe])
    assert Receipt.read(out).steps[-1]["calibration"] is None


def test_lines_without_labels_are_fitted_to_the_loss(mix):
    out = mix("btx", "--top-k", 1, text="unlabelled")
    assert step_of(out)["target"] == "loss" and min(right(out, "mlp")) > 0.95


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("btx", ("--layers", 1)),
        ("btx", ("--dtype", "bfloat16")),
        ("bam", ("--kv", "shared")),
        ("bam", ("--block", "parallel", "--convert-block")),
    ],
    ids=str,
)
def test_every_kind_of_mixture_is_fitted(recipe, options, mix):
    out = mix(recipe, *options)
    step, whole = step_of(out), load_file(out / "model.safetensors")
    layers = {part: {int(layer) for layer in own["layers"]} for part, own in step["parts"].items()}
    wanted = {1} if "--layers" in options else {0, 1, 2}
    assert layers == dict.fromkeys(PARTS[recipe], wanted)
    assert all(own["right"] > 0.9 for own in step["parts"].values())
    routers = [name for name in whole if ".router." in name]
    assert len(routers) == len(wanted) * len(PARTS[recipe])
    assert all(whole[name].any() for name in routers)
    assert {t.dtype for t in whole.values()} == {
        torch.bfloat16 if "bfloat16" in options else torch.float32
    }


def by_hand(x: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """(XᵀX + λ)⁻¹ Xᵀ Y, λ a hundredth of the mean diagonal."""
    gram = x.T @ x
    return torch.linalg.solve(gram + 0.01 * gram.diagonal().mean() * torch.eye(72), x.T @ wanted).T


@pytest.mark.parametrize("recipe", PARTS)
def test_each_router_is_the_ridge_of_what_comes_out_of_those_before(recipe, folder, mix):
    """The finished mixture's own hidden states give its routers again, layer by layer."""
    out, drawn = mix(recipe, "--target", "label"), mix(recipe, text=None)
    ids, labels = calibration(folder, "label")
    one_hot = F.one_hot(labels, 3).double()
    wanted = one_hot - one_hot.mean(0)
    for part in PARTS[recipe]:
        scales = step_of(out)["parts"][part]["layers"]
        others = inputs(drawn, part, ids)
        for layer, x in enumerate(inputs(out, part, ids)):
            hand = by_hand(x, wanted)
            own = router(out, part, layer).double()
            scale = scales[str(layer)]["scale"]
            torch.testing.assert_close(own / scale, hand, rtol=2e-3, atol=2e-5)
            logits, cost = x @ own.T, Aim([], labels, None).cost
            sharpest = logits.std() > 0.999 * SHARPEST  # there is no error to be found here
            assert cost(logits) < cost(0.9 * logits) and (
                sharpest or cost(logits) < cost(1.1 * logits)
            )
            if layer:  # negative control: not of a mixture whose routers are still drawn
                assert (by_hand(others[layer], wanted) - hand).norm() > 0.02 * hand.norm()


@torch.no_grad()
def test_losses_belong_to_the_token_that_is_read(folder, mix):
    """What sources lose on the next token, by hand, predicted from this one; the last has none."""
    out = mix("btx", "--target", "loss")
    ids, labels = calibration(folder, "loss")
    assert not len(labels)
    lost = []
    for name in NAMES:
        model = AutoModelForCausalLM.from_pretrained(folder / name).eval()
        lost.append([F.cross_entropy(model(w[None]).logits[0, :-1], w[1:], reduction="none")
                     for w in ids])  # fmt: skip
    loss = torch.stack([torch.cat(own).double() for own in lost], 1)
    wanted = loss.mean(1, keepdim=True) - loss
    record = step_of(out)
    scale = record["parts"]["mlp"]["layers"]["0"]["scale"]
    for source, row in enumerate(record["sources"]):
        assert row["perplexity"] == pytest.approx(loss[:, source].mean().exp().item(), rel=1e-3)
    seen = inputs(out, "mlp", ids)[0].split([len(w) for w in ids])
    own = router(out, "mlp", 0).double() / scale
    hand = by_hand(torch.cat([x[:-1] for x in seen]), wanted)
    torch.testing.assert_close(own, hand, rtol=5e-3, atol=1e-4)
    late = by_hand(torch.cat([x[1:] for x in seen]), wanted)  # negative control
    assert (own - late).norm() > 10 * (own - hand).norm()


def test_the_temperature_of_labels_is_the_one_that_logistic_regression_finds():
    """Scores ±½ that are right for three tokens of four: sigmoid(s) = ¾."""
    scores = torch.tensor([[0.5, -0.5]] * 4, dtype=torch.float64)
    aim = Aim([], torch.tensor([0, 0, 0, 1]), None)
    assert temperature(scores, aim.cost) == pytest.approx(math.log(3), rel=1e-4)
    wrong = Aim([], torch.tensor([1, 1, 1, 0]), None)  # negative control: nothing to be trusted
    assert temperature(scores, wrong.cost) < 0.01
    assert temperature(torch.zeros(4, 2, dtype=torch.float64), aim.cost) == 1.0


def test_the_temperature_of_losses_expects_the_least():
    """A little right about many tokens, very wrong about a few: there is a best in between."""
    scores = torch.tensor([[0.5, -0.5]] * 3 + [[2.0, -2.0]], dtype=torch.float64)
    loss = torch.tensor([[0.0, 1.0]] * 3 + [[2.0, 0.0]], dtype=torch.float64)
    aim = Aim([], loss.argmin(1), loss)
    found = temperature(scores, aim.cost)
    grid = [aim.cost(s * scores) for s in torch.linspace(0.01, SHARPEST / 1.1, 4000).tolist()]
    assert aim.cost(found * scores) <= min(grid) + 1e-9
    always = Aim([], torch.zeros(4, dtype=torch.long), torch.tensor([[0.0, 1.0]] * 4))
    deviation = scores.std(correction=0).item()
    assert temperature(scores, always.cost) == pytest.approx(SHARPEST / deviation, rel=1e-3)


@pytest.mark.parametrize("target", ["label", "loss"])
def test_the_same_command_gives_the_same_bytes(target, mix):
    outs = [mix("bam", "--target", target) for _ in range(2)]
    assert len({(out / "model.safetensors").read_bytes() for out in outs}) == 1
    other = mix("bam", "--target", "loss" if target == "label" else "label")  # negative control
    assert (other / "model.safetensors").read_bytes() != (
        outs[0] / "model.safetensors"
    ).read_bytes()
    records = [step_of(out) for out in outs]
    for record in records:
        del record["seconds"], record["peak_memory_bytes"]
    assert records[0] == records[1]


def test_one_model_with_itself_stays_that_model(folder, moe_upcycle, tmp_path):
    """Nothing tells the copies apart: routers of zeros, and the function is kept."""
    same = [word for _ in range(3) for word in ("--source", folder / NAMES[0])]
    result = moe_upcycle(
        "btx", *same, "--calibrate", folder / "unlabelled.jsonl", "--calibration-tokens", TOKENS,
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert Receipt.read(tmp_path / "out").verification["status"] == "pass"
    assert not router(tmp_path / "out", "mlp", 0).any()


def test_what_sources_lose_is_kept_where_the_walk_is_cut_short(
    folder, moe_upcycle, mix, tmp_path, monkeypatch
):
    whole = mix("btx", "--target", "loss")
    given = (
        "btx", *sources(folder), "--target", "loss", "--calibrate", folder / "labelled.jsonl",
        "--calibration-tokens", TOKENS, "--no-verify", "--out", tmp_path / "out",
    )  # fmt: skip
    read: list[str] = []

    class Counted(branches.Model):
        def __init__(self, *given):
            super().__init__(*given)
            read.append(self.name)

    def stop(self, aim):
        raise OSError("cut short")

    monkeypatch.setattr(branches, "Model", Counted)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="cut short"):
        patch.setattr(branches.BranchCalibration, "walk", stop)
        moe_upcycle(*given)
    assert len(read) == 4  # the mixture, and three sources
    result = moe_upcycle(*given)
    assert result.code == 0 and len(read) == 5, read
    ours, theirs = (p / "model.safetensors" for p in (tmp_path / "out", whole))
    assert ours.read_bytes() == theirs.read_bytes()


def share(folder: Path, out: Path) -> None:
    """In a rank of its own."""
    given = ("--calibrate", folder / "labelled.jsonl", "--calibration-tokens", TOKENS)
    calibrating.upcycle(
        "bam", *sources(folder), "--target", "loss", *given, "--no-verify", "--out", out
    )


@pytest.mark.slow
def test_two_ranks_share_the_text(folder, mix, tmp_path):
    alone = mix("bam", "--target", "loss")
    run_ranks(share, 2, folder, tmp_path / "shared")
    assert step_of(tmp_path / "shared")["ranks"] == 2
    for part in PARTS["bam"]:
        for layer in range(3):
            ours, theirs = (router(p, part, layer) for p in (alone, tmp_path / "shared"))
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
