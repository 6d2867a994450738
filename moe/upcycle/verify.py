"""Proof of a conversion: the written folder, reloaded, against its parent on real text, in fp32.

Where the method preserves the function the result is pass or fail at a relative logit difference
of 1e-5; where it does not, the numbers are stated and nothing is claimed.
"""

import contextlib
import filecmp
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

import moe.model  # noqa: F401  (registers RoutedLlama)
from moe.errors import Corrupt, UserError
from moe.model import LayerRouting, RoutedLlamaForCausalLM
from moe.model.cache import CACHE
from moe.model.spec import MoHAttention
from moe.progress import Progress, quiet_libraries
from moe.upcycle.tokenizer import load_tokenizer, refusal

WINDOWS = 8
WINDOW = 256
EXACT = 1e-5
DECODED = 12

RoutingSums = dict[tuple[int, str], list[Tensor]]  # (layer, part): counts, entropy, tokens


def verify(
    parent: Path,
    target: Path,
    text: Path | None = None,
    exact: bool = False,
    quiet: bool = False,
    others: Sequence[Path] = (),
) -> dict[str, Any]:
    """Compare `target` with `parent` and measure its routers; a JSON-ready record.

    Both models are held in memory in float32. `text` is a text file that neither was fitted on;
    without one, the Python documentation serves. `others` are what else was mixed in: their
    perplexity is measured too. Raises Corrupt where logits are not finite.
    """
    quiet_libraries()
    dense, routed = load(parent), load(target)
    ids, name = windows(parent, text, dense.config.vocab_size)
    converted, _ = windows(target, text, routed.config.vocab_size)
    if not torch.equal(ids, converted):
        raise Corrupt(f"the tokenizer of {parent} splits {name} differently than the result's own.")
    record: dict[str, Any] = {"text": name, "windows": list(ids.shape), "dtype": "float32"}
    with Progress("verify", ids.numel(), "tokens", quiet) as progress:
        record |= compare(dense, routed, ids, progress)
    if not math.isfinite(record["relative_difference"]):
        raise Corrupt(f"logits of {parent} or of what was made of it are not finite.")
    record |= {"long": _long_window(dense, routed, ids)}
    if getattr(routed.config, "causal", True):
        record |= {"decoding": decoding_difference(routed, ids[:1, :64])}
    else:  # what follows a token has a say in it: such a number would flatter
        record |= {"decoding": None}
        record["perplexity"]["converted"] = None
    del dense
    if others:
        record["sources"] = {str(f): perplexity(load(f), ids) for f in dict.fromkeys(others)}
    record["gradients"] = router_gradients(routed, ids[:1])
    if exact:
        passes = record["relative_difference"] <= EXACT
        record |= {"status": "pass" if passes else "fail", "bound": EXACT}
    else:
        record["status"] = "measured"
    return record


def load(folder: Path) -> PreTrainedModel:
    """A model folder in float32. Raises UserError where its keys and the model's differ."""
    model: PreTrainedModel
    info: dict[str, Any]
    model, info = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False,
        use_safetensors=True,
    )  # fmt: skip
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise UserError(
                f"{folder}: {kind.replace('_', ' ')}: {sorted(map(str, info[kind]))[:5]}"
            )
    return model.eval()


def windows(folder: Path, text: Path | None, vocab_size: int) -> tuple[Tensor, str]:
    """Token ids [windows, length] spread over the text, and what the text was."""
    content, name = default_text() if text is None else (_read(text), text.name)
    try:
        tokenizer = load_tokenizer(folder)
    except Exception as error:  # transformers raises what it likes over a bad tokenizer
        reason = str(error).strip().split("\n")[0].rstrip(".:")
        missing = (
            f"{folder} has no tokenizer to verify with ({reason}). Add its files, or --no-verify."
        )
        raise UserError(refusal(folder, error, missing)) from error
    ids = tokenizer(content[: 16 * WINDOWS * WINDOW], add_special_tokens=False)["input_ids"]
    length = min(WINDOW, len(ids) // WINDOWS)
    if length < 16:
        raise UserError(f"{name} gives {len(ids)} tokens; at least {16 * WINDOWS} are needed.")
    tensor = torch.tensor(ids[: WINDOWS * length]).view(WINDOWS, length)
    if int(tensor.max()) >= vocab_size:
        raise UserError(
            f"the tokenizer of {folder} gives token {int(tensor.max())}, the model has "
            f"{vocab_size}: they do not belong together."
        )
    return tensor, name


def require_other_text(calibrate: Path | None, text: Path | None) -> None:
    """Raises UserError where a model would be verified on the text that it was fitted on."""
    if calibrate is None or text is None:
        return
    same = calibrate == text
    with contextlib.suppress(OSError):  # said when they are read
        same = same or filecmp.cmp(calibrate, text, shallow=False)
    if same:
        raise UserError(
            f"--calibrate {calibrate} and --text {text} are the same: what was fitted on a text "
            "cannot be verified on it. Give two."
        )


def default_text() -> tuple[str, str]:
    """The reference documentation that every Python carries."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError(
            "this Python has no documentation to verify on. Give a text file with --text, or "
            "--no-verify."
        ) from None
    return "\n\n".join(topics[key] for key in sorted(topics)), "Python documentation"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {path} cannot be read: {error}") from error


@contextlib.contextmanager
def assembled(folder: Path, config: Path) -> Iterator[Path]:
    """A folder of links that is as `folder` will be, with what still lies aside in `config`.

    In a temporary place: what is half made must load nowhere that a user looks.
    """
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary) / "model"
        whole.mkdir()
        # a run that was killed late has left a config in place: the one aside counts
        files = {file.name: file for file in [*folder.iterdir(), *config.iterdir()]}
        for name, file in files.items():
            (whole / name).symlink_to(file.resolve())
        yield whole


@torch.no_grad()
def compare(
    dense: PreTrainedModel, routed: PreTrainedModel, ids: Tensor, progress: Progress
) -> dict[str, Any]:
    """Differences of logits, agreement of the most likely token, perplexity of both, and loads."""
    difference = norm = largest = agree = 0.0
    losses = {"parent": 0.0, "converted": 0.0}
    sums: RoutingSums = {}
    for window in ids:
        outputs = [m(window[None], use_cache=False) for m in (dense, routed)]
        expected, actual = (output.logits[0] for output in outputs)
        _add_routing(sums, getattr(outputs[1], "routing", ()))
        progress.advance(window.numel())
        difference += (actual - expected).double().square().sum().item()
        norm += expected.double().square().sum().item()
        largest = max(largest, (actual - expected).abs().max().item())
        agree += (actual.argmax(-1) == expected.argmax(-1)).float().mean().item()
        for key, logits in (("parent", expected), ("converted", actual)):
            losses[key] += F.cross_entropy(logits[:-1], window[1:]).item()
    count = len(ids)
    return {
        "maximum_difference": largest,
        "relative_difference": math.sqrt(difference / norm),
        "argmax_agreement": agree / count,
        "perplexity": {key: math.exp(loss / count) for key, loss in losses.items()},
        "loads": _loads(sums),
    }


@torch.no_grad()
def perplexity(model: PreTrainedModel, ids: Tensor) -> float:
    """Of windows [N, S], each scored by itself."""
    losses = []
    for window in ids:
        logits = model(window[None], use_cache=False).logits[0]
        losses.append(F.cross_entropy(logits[:-1], window[1:]).item())
    return math.exp(sum(losses) / len(losses))


@torch.no_grad()
def _long_window(
    dense: PreTrainedModel, routed: PreTrainedModel, ids: Tensor
) -> dict[str, Any] | None:
    """The same comparison at positions past the original context, where a lost rope scaling shows.

    None for models without rope scaling; positions are shifted, so the cost stays that of a window.
    """
    rope = dense.config.rope_parameters
    if rope.get("rope_type", "default") == "default":
        return None
    original = rope.get("original_max_position_embeddings") or dense.config.max_position_embeddings
    positions = torch.arange(ids.shape[1])[None] * max(1, 2 * original // ids.shape[1])
    expected, actual = (
        m(ids[:1], position_ids=positions, attention_mask=torch.ones_like(ids[:1])).logits
        for m in (dense, routed)
    )
    relative = ((actual - expected).norm() / expected.norm()).item()
    return {"last_position": int(positions.max()), "relative_difference": relative}


@torch.no_grad()
def decoding_difference(routed: PreTrainedModel, ids: Tensor) -> dict[str, Any]:
    """Relative difference of the last logits between decoding with a cache and one pass."""
    whole = routed(ids, use_cache=False).logits[:, -DECODED:]
    step = routed(ids[:, :-DECODED], use_cache=True)
    pieces = []
    for token in ids[:, -DECODED:].T:
        step = routed(token[:, None], use_cache=True, **{CACHE: step[CACHE]})
        pieces.append(step.logits)
    relative = ((torch.cat(pieces, 1) - whole).norm() / whole.norm()).item()
    return {"tokens": DECODED, "relative_difference": relative}


def _add_routing(sums: RoutingSums, routing: Sequence[LayerRouting]) -> None:
    for layer, parts in enumerate(routing):
        for part, load in zip(parts._fields, parts, strict=True):
            if load is not None:
                values = [load.counts, load.entropy, load.tokens]
                earlier = sums.get((layer, part), [torch.zeros_like(v) for v in values])
                sums[layer, part] = [a + b for a, b in zip(earlier, values, strict=True)]


def _loads(sums: RoutingSums) -> list[dict[str, Any]]:
    """Load of every router: largest over mean, dead share, entropy as a share of its maximum."""
    loads = []
    for (layer, part), (counts, entropy, tokens) in sorted(sums.items()):
        even = math.log(len(counts)) if len(counts) > 1 else 1.0
        loads.append(
            {
                "layer": layer,
                "part": part,
                "max_over_mean": (counts.max() / counts.mean().clamp(min=1e-9)).item(),
                "dead_share": (counts == 0).float().mean().item(),
                "entropy_share": (entropy / tokens).item() / even,
            }
        )
    return loads


def router_gradients(routed: PreTrainedModel, ids: Tensor) -> list[dict[str, Any]]:
    """Norm of each router's gradient, from the language loss and from the routers' own losses.

    A parameter-free router acts through q_proj: its share is what is left of that gradient when
    the gradient without the gate is taken away. Identical experts give the language loss nothing
    to choose by, so there the balance loss alone must reach the router.
    """
    if not isinstance(routed, RoutedLlamaForCausalLM):
        return []
    names = [n for n, _ in routed.named_parameters() if ".router." in n]
    specs = map(routed.config.attention_spec, range(routed.config.num_hidden_layers))
    quiet = [
        f"model.layers.{i}.self_attn.q_proj.weight"
        for i, spec in enumerate(specs)
        if isinstance(spec, MoHAttention) and spec.router == "qnorm"
    ]
    language, own = (_gradients(routed, ids, names + quiet, kind) for kind in ("language", "own"))
    detached = _gradients(routed, ids, quiet, "language", detach=True) if quiet else {}
    records = []
    for name in names + quiet:
        reach = language[name] - detached[name] if name in detached else language[name]
        records.append(
            {"parameter": name, "language": reach.norm().item(), "own": own[name].norm().item()}
        )
    return records


def _gradients(
    routed: RoutedLlamaForCausalLM, ids: Tensor, names: list[str], loss: str, detach: bool = False
) -> dict[str, Tensor]:
    from moe.model import router

    parameters = [routed.get_parameter(n) for n in names]
    through = router.straight_through
    if detach:
        router.straight_through = lambda mask, probability: mask
    try:
        output = routed(ids, labels=ids, use_cache=False)
        # without coefficients: a zero coefficient must not hide a router that works
        unweighted = [load.balance for r in output.routing for load in r if load is not None]
        total = output.loss if loss == "language" else torch.stack(unweighted).sum()
        found: Sequence[Tensor | None] = [None] * len(parameters)
        if total.requires_grad:  # soft attention has no loss of its own
            found = torch.autograd.grad(total, parameters, allow_unused=True)
    finally:
        router.straight_through = through
    return {
        n: torch.zeros(()) if g is None else g.detach() for n, g in zip(names, found, strict=True)
    }


def summary(record: dict[str, Any]) -> str:
    """A verification in a few lines for people."""
    parent, converted = record["perplexity"]["parent"], record["perplexity"]["converted"]
    status = {"pass": "preserved", "fail": "NOT preserved", "measured": "measured, nothing claimed"}
    lines = [
        f"verified on {record['text']}, {record['windows'][0]} × {record['windows'][1]} tokens: "
        f"{status[record['status']]}",
        f"  relative logit difference {record['relative_difference']:.2e}, largest "
        f"{record['maximum_difference']:.2e}, argmax agrees {record['argmax_agreement']:.1%}",
        f"  perplexity: parent {parent:.3f}, converted "
        + (f"{converted:.3f}" if converted is not None else "not measured, it looks ahead"),
    ]
    for source, value in record.get("sources", {}).items():
        lines.append(f"  perplexity of {source}: {value:.3f}")
    for part, noun in (("attention", "heads"), ("mlp", "experts")):
        loads = [x for x in record.get("loads", []) if x["part"] == part]
        if loads:
            worst = max(x["max_over_mean"] for x in loads)
            dead = sum(x["dead_share"] for x in loads) / len(loads)
            lines.append(f"  {noun}: load max/mean at most {worst:.2f}, dead {dead:.1%}")
    for row in record.get("choices", []):
        found = ", ".join(f"{how} {v:.3f}" for how, v in row.items() if how != "text" and v)
        lines.append(f"  perplexity of choices on {row['text']}: {found}")
    if gradients := record["gradients"]:
        reached = sum(g["language"] > 0 or g["own"] > 0 for g in gradients)
        lines.append(f"  a gradient reaches {reached} of {len(gradients)} router parameters")
    return "\n".join(lines)
