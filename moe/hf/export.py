"""A training checkpoint, or a RoutedLlama folder, in the form that others read.

    export(Path("runs/a/checkpoints/step-500"), Path("tuned"), dtype=torch.bfloat16)
    export(Path("tuned"), Path("mixtral"), to="mixtral", text=Path("held-out.txt"))

`hf` keeps everything as it is. The other forms must compute the same: what they have no room for is
refused, and what was written is loaded and compared before it appears under its name. Only gates
that a text to calibrate on freezes change the function; how far is measured and said.
"""

import json
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moe.checkpoint.manifest import NAME
from moe.errors import Corrupt, UserError
from moe.hf import proof, remote_code
from moe.hf.dense import dense_model
from moe.hf.gates import Gates, calibration_tokens, mean_gates
from moe.hf.importing import write_both_ropes
from moe.hf.layouts import native_plan
from moe.hf.native import native_config
from moe.hf.origin import Origin, Plan
from moe.model import RoutedLlamaConfig
from moe.upcycle import writer
from moe.upcycle.receipt import Receipt, seal, versions
from moe.upcycle.source import hash_file
from moe.upcycle.tokenizer import keep_class
from moe.upcycle.verify import assembled, load, require_other_text

Form = Literal[
    "hf", "mixtral", "granitemoe", "granitemoeshared", "qwen2_moe", "dense", "remote-code"
]
UNVERIFIED = "unverified"  # holds the config until then: a folder without one loads nowhere
PROBED = (2, 64)  # windows and tokens of the comparison in another process


@dataclass(frozen=True, slots=True)
class Target:
    """Config and tensors to be written, and what is to be said of them."""

    config: PreTrainedConfig
    plan: Plan
    notes: list[str]
    gates: Gates = field(default_factory=dict)  # frozen to these: not the same function any more
    calibration: Path | None = None  # the text that they are the mean over


def export(
    path: Path,
    out: Path,
    dtype: torch.dtype | None = None,
    to: Form = "hf",
    text: Path | None = None,
    verify: bool = True,
    quiet: bool = False,
    calibrate: Path | None = None,
) -> Receipt:
    """Write `path` to `out` as `to`, in its own dtype unless told otherwise.

    `calibrate` is a text over which `dense` freezes gates that depend on the token to their mean.
    Raises UserError where `path` is neither a checkpoint nor a model folder, `out` exists or the
    model does not fit; Corrupt where a file is damaged or missing, or the result computes something
    else.
    """
    if calibrate is not None and to != "dense":
        raise UserError(f"--calibrate: --to {to} freezes no gates, --to dense does. Leave it out.")
    require_other_text(calibrate, text)
    origin = Origin.open(path)
    # before anything else is done to them: a factor of a weight is not to be rounded twice
    origin = replace(origin, plan=writer.cast(origin.plan, dtype))
    if to == "hf":
        if text is not None:
            raise UserError(
                "--text: --to hf keeps every tensor as it is, so nothing is compared. Leave it out."
            )
        return _write(origin, Target(origin.config, origin.plan, []), out, to, dtype, None, quiet)
    # what would make it fail at the end is said now, not after a pass of the model over a text
    sample = proof.choose(path, text, origin.config) if verify else None
    target = prepare(origin, to, calibrate, quiet)
    return _write(origin, target, out, to, dtype, sample, quiet)


def prepare(
    origin: Origin, to: Form, calibrate: Path | None = None, quiet: bool = False
) -> Target:  # fmt: skip
    """What is to be written. Raises UserError with all that the form has no room for."""
    config = origin.config
    if not isinstance(config, RoutedLlamaConfig):
        raise UserError(
            f"{origin.path} is a {config.model_type}: --to {to} takes RoutedLlama folders and "
            "checkpoints of their training. Use --to hf."
        )
    if to == "remote-code":
        return Target(config, origin.plan, ["the model's own code beside its weights"])
    try:
        if to == "dense":
            measure = None if calibrate is None else partial(_measure, origin, calibrate, quiet)
            dense = dense_model(config, origin.plan, measure)
            return Target(dense.config, dense.plan, dense.notes, dense.gates, calibrate)
        stored = next(e.dtype for n, e in origin.plan.items() if n.endswith(".weight"))
        native, notes = native_config(config, to, stored)
    except UserError as error:
        raise UserError(f"{origin.path}: {error}") from None
    return Target(native, native_plan(origin.plan, config, to), notes)


def _measure(origin: Origin, calibrate: Path, quiet: bool) -> Gates:
    """The model's mean gates, in float32 over a text."""
    assert isinstance(origin.config, RoutedLlamaConfig)
    ids = calibration_tokens(origin.path, calibrate, origin.config.vocab_size)
    return mean_gates(proof.reference(origin.config, origin.plan), ids, quiet)


def _write(
    origin: Origin,
    target: Target,
    out: Path,
    to: Form,
    dtype: torch.dtype | None,
    sample: proof.Sample | None,
    quiet: bool,
) -> Receipt:
    step = _step(origin, target, to, dtype)
    staging = writer.Staging(out, writer.fingerprint({**step, "created": None}))
    staging.open()
    written = writer.write_weights(target.plan, origin.sources, staging, quiet)
    receipt = Receipt(steps=[*origin.steps, step], files=written.files, tensors=written.tensors)
    with writer.building(staging):
        writer.copy_side_files(origin.path, staging.folder)
        (staging.folder / NAME).unlink(missing_ok=True)  # the checkpoint's, which this is not
        aside = staging.folder / UNVERIFIED
        _write_config(target, to, staging.folder, aside)
        with assembled(staging.folder, aside) as whole:
            keep_class(origin.path, whole, staging.folder)
        if sample is not None:
            receipt.verification = _verify(origin, target, to, sample, staging.folder, quiet)
        publish(staging, aside, receipt)
    return receipt


def publish(staging: writer.Staging, aside: Path, receipt: Receipt) -> None:
    """Put what was kept aside until now into its place, hash everything, and let it appear."""
    for file in aside.iterdir():
        file.rename(staging.folder / file.name)
    aside.rmdir()
    seal(staging.folder, receipt)
    staging.publish()


def _step(
    origin: Origin, target: Target, to: Form, dtype: torch.dtype | None
) -> dict[str, Any]:  # fmt: skip
    step: dict[str, Any] = {
        "recipe": "export",
        "options": {"to": to, "dtype": str(dtype).removeprefix("torch.") if dtype else None},
        "versions": versions(),
        "sources": [
            {"path": str(origin.path), "files": {n: {"xxh3": h} for n, h in origin.files.items()}}
        ],
    }
    if to != "hf":
        what = "the same function in another form"
        if target.calibration is not None:
            what = f"not the same function: gates frozen to their mean on {target.calibration.name}"
            step |= {
                "calibration": {
                    "path": str(target.calibration),
                    "xxh3": hash_file(target.calibration),
                },
                "gates": [
                    {"layer": layer, "part": part, "mean": list(mean)}
                    for (layer, part), mean in target.gates.items()
                ],
            }
        step |= {"exact": not target.gates, "statement": "; ".join([what, *target.notes])}
    return step | {"created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def _write_config(target: Target, to: Form, folder: Path, aside: Path) -> None:
    """Write config.json to `aside`, and the code that it names to `folder`."""
    config = target.config
    config.dtype = next(e.dtype for e in target.plan.values() if e.dtype.is_floating_point)
    if isinstance(architecture := MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type), str):
        config.architectures = [architecture]
    config.save_pretrained(aside)
    file = aside / "config.json"
    fields = json.loads(file.read_text())
    fields.pop("auto_map", None)  # names files that are not copied
    if to == "remote-code":
        fields["auto_map"] = remote_code.write_code(folder)
    if to == "qwen2_moe" and not fields["sliding_window"]:
        fields["sliding_window"] = None  # transformers' 0 means none, and it reads None as well
    file.write_text(json.dumps(fields, indent=2) + "\n")
    write_both_ropes(file)


def _verify(
    origin: Origin, target: Target, to: Form, sample: proof.Sample, folder: Path, quiet: bool
) -> dict[str, Any]:
    """Compare what was written with the model; Corrupt where it is not the same."""
    assert isinstance(origin.config, RoutedLlamaConfig)
    original = proof.reference(origin.config, origin.plan)
    with assembled(folder, folder / UNVERIFIED) as whole:
        proof.require_same_tokens(sample, whole, origin.config.vocab_size)
        written: proof.Logits
        if to == "remote-code":
            windows, length = PROBED
            sample = replace(sample, ids=sample.ids[:windows, :length])
            written = _Recorded(remote_code.probe(whole, sample.ids))
        else:
            try:
                written = load(whole)
            except UserError as error:  # keys differ: ours to answer for, not the user's
                raise Corrupt(f"{error}. Not published.") from error
    if not target.gates:
        record = proof.prove(original, written, sample, quiet)
        found = {f"on {record['text']}": record, "over the whole context": record["long"]}
        what = "computes"
    else:
        assert isinstance(written, PreTrainedModel)
        rounded = any(e.dtype in (torch.bfloat16, torch.float16) for e in target.plan.values())
        record = proof.measure(original, written, sample, target.gates, rounded, quiet)
        found = {
            f"on {record['text']}": record["frozen"],
            "over the whole context": record["long"],
        }
        what = "computes with its gates frozen"
    if record["status"] == "fail":
        raise Corrupt(
            f"what was written should compute what {origin.path} {what} and does not: "
            + ", ".join(
                f"relative difference {r['relative_difference']:.1e} {where} (bound {r['bound']:g})"
                for where, r in found.items()
                if r is not None
            )
            + ". Not published."
        )
    return record


class _Recorded:
    """Stands for a model whose logits another process computed, window by window."""

    def __init__(self, logits: Tensor) -> None:
        self.windows = iter(logits)

    def __call__(self, input_ids: Tensor, **kwargs: Any) -> Any:
        return SimpleNamespace(logits=next(self.windows)[None])
