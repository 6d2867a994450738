"""A tuning as weights: which tensors become what, and why some tunings are none.

    change = permanent(origin.config, origin.plan, found, tuning, remove=False)
    change.plan, change.config, change.notes

post_zero is a gain of what an expert gives: of its down_proj, or of its heads' columns of o_proj.
pre_select is a selection bias where a router has one, or a learned one where scores do nothing but
choose (calibrated heads, a union's hard weights), and elsewhere can only be the expert's absence.
Nothing else of a tuning can be said in weights: what makes up for an expert that is off, or comes
in its place, depends on the token.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe.errors import UserError, raise_all
from moe.hf.native import exact_factor
from moe.tune.families import Site
from moe.tune.intervene import steerings
from moe.tune.tuning import Edit, Tuning
from moe.upcycle.expression import Concat, Expression, Mapped, Stack, num_columns, num_rows
from moe.upcycle.rearrange import Rows, scaled

Plan = dict[str, Expression]

# Tensors on disk, after a layer's number: those of one expert, and those of all in a row.
ONE_DOWN = r"(?:mlp|block_sparse_moe)\.experts\.{expert}\.(?:w2|down_proj)\.weight"
ALL_DOWN = r"(?:mlp\.experts\.down_proj(?:_bias)?|block_sparse_moe\.output_linear\.weight)"
BIAS = r"mlp\.(?:gate\.e_score_correction_bias|router\.selection_bias)"
O_PROJ = r"self_attn\.o_proj\.weight"
NUMBERED = r"(?:mlp|block_sparse_moe)\.experts\.(\d+)\..+"
STACKED = (
    r"(?:mlp|block_sparse_moe)\.(?:experts\.(?:gate_up|down)_proj(?:_bias)?|gate\.weight|"
    r"(?:in|out)put_linear\.weight|router\.(?:weight|bias|layer\.weight))"
)
COUNTS = ("n_routed_experts", "num_local_experts", "num_experts")  # a config's name for E


@dataclass(frozen=True, slots=True)
class Gained(Mapped):
    """Rows (axis 0) or columns (axis 1) of a matrix, in equal runs, times a factor per run."""

    factors: tuple[float, ...]
    axis: int

    def rows(self, start: int, stop: int) -> Tensor:
        block = self.base.rows(start, stop)
        factors = torch.tensor(self.factors, dtype=block.dtype)
        if self.axis == 1:
            return block * factors.repeat_interleave(block.shape[1] // len(factors))
        run = num_rows(self.shape) // len(factors)
        return block * factors[torch.arange(start, stop) // run, None]

    def __str__(self) -> str:
        what = ("rows", "columns")[self.axis]
        return f"{sum(f != 1 for f in self.factors)} of {len(self.factors)} {what} of {self.base}"


@dataclass(frozen=True, slots=True)
class Added(Mapped):
    """A vector plus another."""

    addend: tuple[float, ...]

    def rows(self, start: int, stop: int) -> Tensor:
        added = torch.tensor(self.addend[start:stop])[:, None]
        block = self.base.rows(start, stop)
        return (block.to(added) + added).to(self.dtype)

    def __str__(self) -> str:
        return f"{self.base} + selection of {sum(a != 0 for a in self.addend)} experts"


@dataclass(slots=True)
class Change:
    """A plan and a config's fields with a tuning in them, and what is to be said of it."""

    plan: Plan
    fields: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def permanent(
    fields: dict[str, Any], plan: Plan, found: Sequence[Site], tuning: Tuning, remove: bool
) -> Change:
    """The plan with the tuning, at the tuning's own scale; `fields` are config.json's.

    Raises UserError with everything that weights cannot say, and what is nearest to it.
    """
    if tuning.scale == 0:
        raise UserError("scale=0 does nothing, so there is nothing to export. Use more than 0.")
    raise_all(_obstacles(fields, found, tuning, remove))
    change = Change(dict(plan), copy.deepcopy(fields))
    if remove:
        _remove(change, found, tuning)
        return change
    for site, steering in steerings(tuning, found, tuning.scale):
        if steering.gain_E is not None:
            _gain(change, site, steering.gain_E.tolist())
            continue
        # these are one where no group is limited, or there would have been an obstacle
        addend_E = sum(t for t in steering[:3] if t is not None)
        assert isinstance(addend_E, Tensor)
        routed = [addend_E[e].item() for e in range(site.experts) if e not in site.always]
        (name,) = _names(plan, site, BIAS if site.selection_bias else _learned(site))
        change.plan[name] = Added(plan[name], tuple(routed))
    where = "the weights of what experts give" if _after(tuning) else "the selection biases"
    change.notes.append(f"{tuning.semantics} of {len(tuning.experts)} experts in {where}")
    if tuning.semantics == "pre_topk":
        change.notes.append("pre_topk is pre_select here, where no group of experts is limited")
    rounded = _inexact(change.plan)
    more = [f"and {len(rounded) - 3} more tensors like these."] if len(rounded) > 3 else []
    raise_all([*rounded[:3], *more])
    return change


def _after(tuning: Tuning) -> bool:
    return tuning.semantics.startswith("post_")


def _edits(tuning: Tuning, site: Site) -> list[Edit]:
    return [e for e in tuning.experts if (e.layer, e.part) == (site.layer, site.part)]


def _learned(site: Site) -> str:
    return rf"{'mlp' if site.part == 'mlp' else 'self_attn'}\.router\.bias"


def _names(plan: Plan, site: Site, pattern: str) -> list[str]:
    """Tensors of a site's layer. Raises UserError where there is none: an unknown layout."""
    whole = re.compile(rf"(?:.+\.)?layers\.{site.layer}\.{pattern}")
    if found := [name for name in plan if whole.fullmatch(name)]:
        return found
    raise UserError(
        f"{site.name}: the file has no tensor that ends in {pattern}: its layout is not known here."
    )


def _obstacles(
    fields: dict[str, Any], found: Sequence[Site], tuning: Tuning, remove: bool
) -> list[str]:
    """Everything that keeps a tuning out of weights, each reason once with its places."""
    reasons: dict[str, list[str]] = {}
    for site in found:
        if not (edits := _edits(tuning, site)):
            continue
        reason = _irremovable(site, edits, tuning) if remove else _unsayable(site, edits, tuning)
        if reason:
            reasons.setdefault(reason, []).append(site.name)
    problems = [
        f"{places[0]}{f' and {len(places) - 1} more' if places[1:] else ''}: {reason}"
        for reason, places in reasons.items()
    ]
    if fields.get("quantization_config"):
        problems.append("quantization_config: the weights are quantised. Save them dequantised.")
    if remove and fields.get("model_type") != "routed_llama":
        taken = {site.layer: len(_edits(tuning, site)) for site in found}
        if len(set(taken.values())) > 1:
            some = ", ".join(f"layer {layer}: {count}" for layer, count in taken.items())
            name = next(name for name in COUNTS if name in fields)
            problems.append(
                f"--remove takes the same number from every layer, for {name} is one for all: "
                f"{some}. Edit the tuning, or use --semantics post_zero."
            )
    return problems


def _unsayable(site: Site, edits: Sequence[Edit], tuning: Tuning) -> str | None:
    """Why a semantics is not in weights, and what is nearest; None where it is."""
    semantics = tuning.semantics
    nearest = "The nearest is --semantics post_zero"
    runtime = "the tuning itself works at run time, with --tuning."
    if any(edit.kind in ("force", "bias") for edit in edits):
        nearest = "Nothing in weights is near"
    if semantics == "post_zero":
        return None
    if semantics == "post_renorm":
        return (
            "post_renorm: what makes up for an expert depends on the token, no weight says it. "
            f"{nearest}; {runtime}"
        )
    if semantics == "pre_topk" and site.selection_bias and site.top_groups < site.groups:
        return (
            "pre_topk: a selection bias is felt when groups are chosen, before pre_topk. The "
            f"nearest is --semantics pre_select; {runtime}"
        )
    if site.selection_bias or site.bias:
        return None
    if _irremovable(site, edits, tuning) is None:
        return (
            f"{semantics}: this router has no selection bias, so an expert is not chosen only "
            f"where it is gone. Use --remove for exactly that. {nearest}; {runtime}"
        )
    what = " and ".join(sorted({edit.kind for edit in edits}))
    return f"{semantics} of {what}: this router has no bias to hold it. {nearest}; {runtime}"


def _irremovable(site: Site, edits: Sequence[Edit], tuning: Tuning) -> str | None:
    """Why taking a site's experts away is not what its tuning says."""
    if site.kind not in ("softmax", "sigmoid", "chosen"):
        return (
            f"--remove takes experts of an MoE, not of kind {site.kind}. Use --semantics post_zero."
        )
    if site.selection_bias:
        return "--remove is not needed: the selection bias holds it. Leave --remove out."
    if site.top_groups < site.groups:
        return "--remove: groups of experts are equally large. Use --semantics post_zero."
    if _after(tuning) or (tuning.semantics == "pre_topk" and not site.renormalises):
        return f"--remove is not {tuning.semantics}, it is pre_select. Use --semantics pre_select."
    if tuning.scale < 1 or any(edit.kind != "off" for edit in edits):
        return "--remove is off at scale 1, not force, bias or less of it. Use off and --scale 1."
    return None


def _gain(change: Change, site: Site, gains: list[float]) -> None:
    """Multiply what a site's experts give."""
    plan = change.plan
    if site.part == "attention":
        (name,) = _names(plan, site, O_PROJ)
        times = 1
        if site.kind == "bam" and _shares_keys(change.fields, site.layer):
            times = change.fields["num_key_value_heads"]  # experts alternate, KV head by KV head
        plan[name] = Gained(plan[name], tuple(gains * times), axis=1)
        return
    try:
        together = _names(plan, site, ALL_DOWN)
    except UserError:
        for expert, gain in enumerate(gains):
            if gain != 1:
                for name in _names(plan, site, ONE_DOWN.format(expert=expert)):
                    plan[name] = scaled(plan[name], gain)
        return
    for name in together:
        plan[name] = Gained(plan[name], tuple(gains), axis=0)


def _shares_keys(fields: dict[str, Any], layer: int) -> bool:
    """Whether a BAM's attention experts have one set of keys and values."""
    attention = fields["attention"]
    attention = attention[layer] if isinstance(attention, list) else attention
    return attention.get("kv") == "shared"


def _inexact(plan: Plan) -> list[str]:
    """Factors and biases that a tensor's dtype would round."""
    found = []
    for name, expression in plan.items():
        factors = getattr(expression, "factors", ()) or (getattr(expression, "factor", 1.0),)
        kind = str(expression.dtype).removeprefix("torch.")
        rounded = sorted({f for f in factors if f != 0 and not exact_factor(f, expression.dtype)})
        if rounded:
            found.append(
                f"{name}: a gain of {rounded[0]:g} would be rounded to {kind}. Use off, a power of "
                "two, or a copy of the model in float32: moe export --to hf --dtype float32."
            )
        added = getattr(expression, "addend", ())
        if expression.dtype != torch.float32 and any(0 < abs(a) < 1e3 for a in added):
            found.append(f"{name}: a bias would be rounded to {kind}. Use off or force at scale 1.")
    return found


def _remove(change: Change, found: Sequence[Site], tuning: Tuning) -> None:
    """Take experts out: their rows of the router, and their weights; others move up."""
    fields, counts = change.fields, {}
    for site in found:
        gone = {edit.expert for edit in _edits(tuning, site)}
        kept = [expert for expert in range(site.experts) if expert not in gone]
        counts[site.layer] = len(kept)
        if gone:
            _keep(change, site, kept)
    if fields["model_type"] != "routed_llama":
        fields |= {name: min(counts.values()) for name in COUNTS if name in fields}
    else:
        mlp, layers = fields["mlp"], fields["num_hidden_layers"]
        every = mlp if isinstance(mlp, list) else [mlp] * layers
        fields["mlp"] = [
            {**spec, "num_experts": counts[i], "num_groups": 1, "top_groups": None}
            if spec.get("kind") == "moe" else spec
            for i, spec in enumerate(every)
        ]  # fmt: skip
    change.notes.append(
        f"{len(tuning.experts)} experts are gone from the weights, which is "
        f"{tuning.semantics} of off for this router"
    )


def _keep(change: Change, site: Site, kept: list[int]) -> None:
    """A layer with these experts alone, from 0 on."""
    inside = re.compile(rf"(?:.+\.)?layers\.{site.layer}\.(?:{STACKED})")
    plan: Plan = {}
    number = re.compile(rf"((?:.+\.)?layers\.{site.layer}\.)({NUMBERED})")
    for name, expression in change.plan.items():
        if inside.fullmatch(name):
            plan[name] = _taken(expression, kept)
        elif match := number.fullmatch(name):
            expert = int(match[3])
            if expert in kept:
                place = match.start(3), match.end(3)
                moved = name[: place[0]] + str(kept.index(expert)) + name[place[1] :]
                plan[moved] = expression
        else:
            plan[name] = expression
    change.plan = plan


def _taken(base: Expression, kept: Sequence[int]) -> Expression:
    """Some of the first dimension of a tensor."""
    if len(base.shape) < 3:
        return Concat(tuple(Rows(base, expert, expert + 1) for expert in kept))
    run = num_rows(base.shape) // base.shape[0]
    assert base.shape[1:] == (run, num_columns(base.shape))
    return Stack(tuple(Rows(base, expert * run, (expert + 1) * run) for expert in kept))
