"""What is to be done to which experts of which model: `tuning.json`.

    tuning = Tuning.read(Path("tuning.json"))
    tuning.check(sites(model))              # raises UserError where it does not fit
    tuning.check_model(identity(folder))    # or is another model's

Semantics say where in a router an action takes place; four that differ, so a tuning names one:
  post_zero    weights of the chosen experts, as they are: an expert that is off adds nothing
  post_renorm  the same, and the rest of a token's experts make up for it
  pre_topk     the choice, after groups were limited: the next best expert comes in its place
  pre_select   the choice from its start, scores included where no selection bias is apart from them
"""

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from moe.errors import UserError, raise_all
from moe.hf.loading import identity
from moe.model.steering import ALWAYS
from moe.tune.families import PARTS, Part, Site

FORMAT = "moe-tuning/1"
Semantics = Literal["post_zero", "post_renorm", "pre_topk", "pre_select"]
SEMANTICS: tuple[Semantics, ...] = get_args(Semantics)
ACTION = re.compile(r"off|force|(gain|bias):([-+]?\d*\.?\d+(?:[eE][-+]?\d+)?)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Edit:
    """What happens to one expert. `found` is what a ranking knew of it; nothing acts on it."""

    layer: int
    expert: int
    part: Part = "mlp"
    action: str = "off"  # off, force, gain:G (of its weight), bias:B (on the choice)
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return self.action.partition(":")[0]

    @property
    def amount(self) -> float:
        """G or B; 0 where the action has none."""
        return float(self.action.partition(":")[2] or 0)

    def __str__(self) -> str:
        return f"layer {self.layer} {self.part} expert {self.expert} {self.action}"


@dataclass(kw_only=True, slots=True)
class Tuning:
    """Edits, where in the router they take place, and how much of them (`scale`, 0 to 1).

    At scale s a gain g is 1 + s (g - 1) (off: g = 0), a bias b is s b, and off or force before the
    choice is a bias of log(1 - s) or -log(1 - s): nothing at 0, all of it at 1.
    """

    semantics: Semantics
    experts: list[Edit]
    scale: float = 1.0
    model: dict[str, Any] = field(default_factory=dict)  # identity(): name, config, weights
    shape: list[list[Any]] = field(default_factory=list)  # [layer, part, experts, top_k] of sites
    method: dict[str, Any] = field(default_factory=dict)
    created_from: str | None = None  # hash of the trace

    def write(self, path: Path) -> None:
        body = {"format": FORMAT, "layer_index": "absolute", **asdict(self)}
        path.write_text(json.dumps(body, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Tuning":
        """Raises UserError with everything that is wrong in the file."""
        try:
            body = json.loads(path.read_text())
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not text"
            raise UserError(f"{path}: {reason}.") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not JSON ({error}).") from error
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise UserError(f"{path} is not a tuning: its format is not {FORMAT!r}.")
        if body.get("layer_index") != "absolute":
            raise UserError(
                f"{path}: layer_index={body.get('layer_index')!r} is unknown. Use 'absolute'."
            )
        raise_all([f"{path}: {text}" for text in _problems(body)])
        edits = [Edit(**entry) for entry in body["experts"]]
        known = ("semantics", "scale", "model", "shape", "method", "created_from")
        return cls(experts=edits, **{key: body[key] for key in known if key in body})

    def summary(self, scale: float | None = None) -> str:
        """In one line: `3 experts off, 1 expert gain:0.5 (post_zero), scale 0.5`."""
        kinds = Counter((edit.part, edit.action) for edit in self.experts)
        parts = ", ".join(
            f"{count} {'expert' if part == 'mlp' else 'attention part'}{'s' * (count > 1)} {action}"
            for (part, action), count in kinds.items()
        )
        return f"{parts} ({self.semantics}), scale {self.scale if scale is None else scale:g}"

    def check(self, sites: Sequence[Site]) -> None:
        """Raise UserError where the tuning does not fit a model's routers, all reasons at once."""
        shape = shape_of(sites)
        if self.shape and self.shape != shape:
            raise UserError(
                f"this tuning is for another shape of model: {_describe(self.shape)}, not "
                f"{_describe(shape)}."
            )
        raise_all(_misfits(self, sites))

    def check_model(self, model: dict[str, str]) -> None:
        """Raise UserError where the model's identity is another than that it was made for."""
        differ = [key for key in ("config", "weights") if self.model.get(key) != model.get(key)]
        if self.model and differ:
            raise UserError(
                f"this tuning was made for {self.model.get('name')}: {' and '.join(differ)} of "
                f"{model.get('name')} have another hash. Rank its own experts, or pass "
                "--other-model if you know that they mean the same."
            )


def read_for(path: Path, model: Path, scale: float | None, other: bool) -> Tuning:
    """The tuning in a file, at the scale asked for, if it is the model folder's own.

    Whether it fits the model's routers is seen where it is applied.
    """
    tuning = Tuning.read(path)
    if scale is not None:
        tuning.scale = scale
    if not other:
        tuning.check_model(identity(model))
    return tuning


def shape_of(sites: Sequence[Site]) -> list[list[Any]]:
    return [[site.layer, site.part, site.experts, site.top_k] for site in sites]


def _describe(shape: list[list[Any]]) -> str:
    sizes = sorted({(part, experts, top_k) for _, part, experts, top_k in shape})
    kinds = ", ".join(f"{part} {top_k} of {experts}" for part, experts, top_k in sizes)
    return f"{len(shape)} routers ({kinds})"


def _problems(body: dict[str, Any]) -> list[str]:
    """What a tuning's JSON has wrong before any model is looked at."""
    found = []
    if body.get("semantics") not in SEMANTICS:
        found.append(
            f"semantics={body.get('semantics')!r} is unknown. Use one of {', '.join(SEMANTICS)}."
        )
    scale = body.get("scale", 1.0)
    if not _number(scale) or not 0 <= scale <= 1:
        found.append(f"scale={scale!r} must be between 0 and 1.")
    for key, kind in (("model", dict), ("shape", list), ("method", dict)):
        if not isinstance(body.get(key, kind()), kind):
            found.append(f"{key} is not a {kind.__name__}.")
    for entry in body["shape"] if isinstance(body.get("shape"), list) else ():
        whole = isinstance(entry, list) and len(entry) == 4 and entry[1] in PARTS
        if not whole or not all(_whole(n) for n in (entry[0], entry[2], entry[3])):
            found.append(f"shape has {entry!r}, not [layer, part, experts, top_k].")
            break
    entries = body.get("experts")
    if not isinstance(entries, list) or not entries:
        return [*found, "experts is not a list with at least one entry."]
    for entry in entries:
        found += _entry_problems(entry)
    return found


def _entry_problems(entry: Any) -> list[str]:
    if not isinstance(entry, dict):
        return [f"experts has {entry!r}, not an object."]
    found = []
    unknown = sorted(set(map(str, entry)) - {"layer", "expert", "part", "action", "found"})
    if unknown:
        found.append(f"experts: {', '.join(unknown)} is not a field of an entry.")
    for key in ("layer", "expert"):
        if not _whole(entry.get(key)):
            found.append(f"experts: {key}={entry.get(key)!r} is not a whole number from 0 on.")
    if entry.get("part", "mlp") not in PARTS:
        found.append(f"experts: part={entry['part']!r} is unknown. Use one of {', '.join(PARTS)}.")
    action = entry.get("action", "off")
    match = ACTION.fullmatch(action) if isinstance(action, str) else None
    if match is None:
        found.append(f"experts: action={action!r} is unknown. Use off, force, gain:G or bias:B.")
    elif match[2] and not abs(float(match[2])) < ALWAYS:
        found.append(
            f"experts: action={action!r}: use a number between -{ALWAYS:g} and {ALWAYS:g}."
        )
    if not isinstance(entry.get("found", {}), dict):
        found.append("experts: found is not an object.")
    return found


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _misfits(tuning: Tuning, sites: Sequence[Site]) -> list[str]:
    """Every edit that no site has room for, and every site asked for more than it can do."""
    found = []
    by_place = {(site.layer, site.part): site for site in sites}
    edits: dict[tuple[int, Part], list[Edit]] = {}
    for edit in tuning.experts:
        site = by_place.get((edit.layer, edit.part))
        if site is None:
            layers = sorted({s.layer for s in sites if s.part == edit.part})
            there = f"{layers[0]} to {layers[-1]}" if layers else "none"
            found.append(f"{edit}: no router there; layers with one in the {edit.part}: {there}.")
        elif edit.expert >= site.experts:
            found.append(f"{edit}: experts there are 0 to {site.experts - 1}.")
        else:
            found += [f"{edit}: {reason}" for reason in _unfit(edit, tuning.semantics, site)]
            edits.setdefault((edit.layer, edit.part), []).append(edit)
    for place, some in edits.items():
        found += _overdone(by_place[place], some, tuning)
    return found


def _unfit(edit: Edit, semantics: Semantics, site: Site) -> list[str]:
    """Why an action has no meaning at a site."""
    before = semantics.startswith("pre_")
    if edit.kind == "gain" and before:
        return [f"{semantics} acts on the choice, a gain on weights. Use post_zero or post_renorm."]
    if edit.kind in ("force", "bias") and not before:
        return [f"{semantics} acts after the choice. Use pre_topk or pre_select."]
    if before and edit.expert in site.always:
        return ["it is on for every token, so no choice concerns it. Use post_zero or post_renorm."]
    if site.kind == "bam":
        if semantics == "pre_topk":
            return ["every attention expert is on, there is no top-k. Use pre_select or post_…."]
        if edit.kind == "force":
            return ["every attention expert is on already. Use bias:B."]
    if site.mode in ("expert_choice", "sequence") and before:
        return [f"mode {site.mode} does not choose token by token. Use post_zero or post_renorm."]
    return []


def _overdone(site: Site, edits: list[Edit], tuning: Tuning) -> list[str]:
    """More forced than a token has places, or fewer left than it takes."""
    experts = [edit.expert for edit in edits]
    if twice := sorted({e for e in experts if experts.count(e) > 1}):
        return [f"{site.name}: experts {twice} have more than one entry."]
    if tuning.semantics.startswith("post_"):
        return []
    places = site.top_k - len(site.always)
    forced = sum(edit.kind == "force" for edit in edits)
    if forced > places:
        return [f"{site.name}: {forced} experts are forced, a token has {places} places."]
    off = {edit.expert for edit in edits if edit.kind == "off"}
    size = site.experts // site.groups
    left = [
        sum(e not in off for e in range(g * size, (g + 1) * size))
        - (len(site.always) if g == 0 else 0)
        for g in range(site.groups)
    ]
    if tuning.semantics == "pre_select" and site.top_groups < site.groups:
        reachable = [n for n in left if n >= min(2, size)]  # others come last of all groups
        left = reachable if len(reachable) >= site.top_groups else left
    least = sum(sorted(left)[: site.top_groups])
    needed = 1 if site.kind == "bam" else places
    if least < needed:
        return [
            f"{site.name}: {len(off)} of {site.experts} experts off leave {least} to choose from, "
            f"and a token takes {needed}. Use post_zero or post_renorm, or fewer experts."
        ]
    return []
