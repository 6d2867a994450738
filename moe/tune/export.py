"""`moe tune export`: a model folder that does without being told what a tuning tells a model.

    export_tuned(Path("model"), Path("tuned"), tuning)

What the tuning leaves alone is linked, the rest is written block by block. The result is loaded and
held against the model with the tuning at work, and appears under its name only if it is that.
"""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from moe.checkpoint import store
from moe.errors import Corrupt, UserError
from moe.hf import proof
from moe.hf.export import publish
from moe.hf.loading import identity
from moe.hf.origin import Origin
from moe.tune.families import Site, sites
from moe.tune.intervene import tuned
from moe.tune.permanent import COUNTS, Change, permanent
from moe.tune.tuning import Tuning, shape_of
from moe.upcycle import writer
from moe.upcycle.receipt import Receipt, versions
from moe.upcycle.tokenizer import keep_class
from moe.upcycle.verify import assembled, load

NAME = "tuning.json"
UNVERIFIED = "unverified"  # holds the config until then: a folder without one loads nowhere


def export_tuned(
    model: Path,
    out: Path,
    tuning: Tuning,
    remove: bool = False,
    text: Path | None = None,
    verify: bool = True,
    other: bool = False,
    quiet: bool = False,
) -> Receipt:
    """Write `model` with `tuning` in its weights to `out`, with tokenizer, receipt and the tuning.

    Raises UserError where the tuning is another model's (unless `other`), or says what weights
    cannot; Corrupt where the result does not compute what the tuning does.
    """
    if store.is_checkpoint(model):
        raise UserError(
            f"{model} is a training checkpoint. Use moe export {model} --to hf --out DIR first, "
            "and --other-model with a tuning of the checkpoint: it holds the same weights."
        )
    if out.resolve().is_relative_to(model.resolve()):
        raise UserError(f"--out {out} lies in the model's folder. Choose another.")
    origin = Origin.open(model)
    found = _sites(origin.config)
    known = identity(model)
    tuning.check(found)
    if not other:
        tuning.check_model(known)
    defaults = {n: v for n, v in origin.config.to_dict().items() if n in COUNTS}
    fields = defaults | json.loads((model / "config.json").read_text())
    change = permanent(fields, origin.plan, found, tuning, remove)
    change.fields.pop("auto_map", None)  # names files that are not copied
    applied = replace(
        tuning, model=known, shape=shape_of(found), method={**tuning.method, "applied": True}
    )
    sample = proof.choose(model, text, origin.config) if verify else None
    return _write(origin, change, out, applied, sample, quiet)


def _sites(config: PreTrainedConfig) -> list[Site]:
    """Those of a model of this config, without any weights."""
    with torch.device("meta"):
        return sites(AutoModelForCausalLM.from_config(config))


def _write(
    origin: Origin,
    change: Change,
    out: Path,
    tuning: Tuning,
    sample: proof.Sample | None,
    quiet: bool,
) -> Receipt:
    step: dict[str, Any] = {
        "recipe": "tune export",
        "options": {
            "semantics": tuning.semantics,
            "scale": tuning.scale,
            "experts": [str(edit) for edit in tuning.experts],
        },
        "versions": versions(),
        "sources": [
            {"path": str(origin.path), "files": {n: {"xxh3": h} for n, h in origin.files.items()}}
        ],
        "exact": False,
        "statement": "; ".join(change.notes),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    fields = {**step, "created": None, "config": change.fields}
    staging = writer.Staging(out, writer.fingerprint(fields))
    staging.open()
    written = writer.write_weights(change.plan, origin.sources, staging, quiet)
    receipt = Receipt(steps=[*origin.steps, step], files=written.files, tensors=written.tensors)
    with writer.building(staging):
        writer.copy_side_files(origin.path, staging.folder)
        tuning.write(staging.folder / NAME)
        aside = staging.folder / UNVERIFIED
        aside.mkdir(exist_ok=True)
        (aside / "config.json").write_text(json.dumps(change.fields, indent=2) + "\n")
        with assembled(staging.folder, aside) as whole:
            keep_class(origin.path, whole, staging.folder)
        if sample is not None:
            receipt.verification = _verify(origin.path, staging.folder, tuning, sample, quiet)
        publish(staging, aside, receipt)
    return receipt


def _verify(
    model: Path, folder: Path, tuning: Tuning, sample: proof.Sample, quiet: bool
) -> dict[str, Any]:
    """Hold what was written against the model with the tuning at work, both in float32.

    Raises Corrupt where they are not one.
    """
    original = load(model)
    with assembled(folder, folder / UNVERIFIED) as whole:
        try:
            written = load(whole)
        except UserError as error:  # keys differ: ours to answer for, not the user's
            raise Corrupt(f"{error}. Not published.") from error
    with tuned(original, tuning):
        record = proof.prove(original, written, sample, quiet)
    if record["status"] == "fail":
        raise Corrupt(
            f"what was written should compute what {model} does with its tuning and does not: "
            f"relative difference {record['relative_difference']:.1e} on {record['text']} (bound "
            f"{record['bound']:g}), {record['long']['relative_difference']:.1e} over the whole "
            "context. Not published."
        )
    with torch.no_grad():
        plain, now = (m(sample.ids[:1], use_cache=False).logits for m in (original, written))
    record["without_tuning"] = float((now - plain).norm() / plain.norm())
    return record
