"""What is wrong with a tuning, by itself or for a model's routers, and what is legal but odd."""

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from moe.model.steering import ALWAYS
from moe.tune.families import PARTS, Part, Site

if TYPE_CHECKING:
    from moe.tune.tuning import Edit, Tuning

Semantics = Literal["post_zero", "post_renorm", "pre_topk", "pre_select"]
SEMANTICS: tuple[Semantics, ...] = get_args(Semantics)
ACTION = re.compile(r"off|force|(gain|bias):([-+]?\d*\.?\d+(?:[eE][-+]?\d+)?)")


def problems(body: dict[str, Any]) -> list[str]:
    """What a tuning's JSON has wrong before any model is looked at."""
    found = []
    if body.get("semantics") not in SEMANTICS:
        found.append(
            f"semantics={body.get('semantics')!r} is unknown. Use one of {', '.join(SEMANTICS)}."
        )
    scale = body.get("scale", 1.0)
    if not _number(scale) or not 0 <= scale <= 1:
        found.append(f"scale={scale!r} must be between 0 and 1.")
    method = body.get("method")
    ids = method.get("ids", {}) if isinstance(method, dict) else {}
    if not isinstance(ids, dict) or not all(isinstance(some, list) for some in ids.values()):
        found.append("method.ids is not an object of lists.")
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
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, int) or math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def misfits(tuning: "Tuning", sites: Sequence[Site]) -> list[str]:
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


def _unfit(edit: "Edit", semantics: Semantics, site: Site) -> list[str]:
    """Why an action has no meaning at a site."""
    before = semantics.startswith("pre_")
    if edit.kind == "gain" and before:
        return [f"{semantics} acts on the choice, a gain on weights. Use post_zero or post_renorm."]
    if semantics == "post_renorm" and edit.amount < 0:
        return ["weights that add up to nothing cannot be renormalised. Use post_zero."]
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


def _overdone(site: Site, edits: list["Edit"], tuning: "Tuning") -> list[str]:
    """More forced than a token has places, or fewer left than it takes."""
    experts = [edit.expert for edit in edits]
    if twice := sorted({e for e in experts if experts.count(e) > 1}):
        return [f"{site.name}: experts {twice} have more than one entry."]
    if tuning.semantics.startswith("post_"):
        return []
    if site.mode == "budget":
        return []  # each expert for itself: any number may be on, or off
    places = site.top_k - len(site.always)
    forced = sum(edit.kind == "force" for edit in edits)
    if forced > places:
        return [f"{site.name}: {forced} experts are forced, a token has {places} places."]
    off = {edit.expert for edit in edits if edit.kind == "off"}
    size = site.experts // site.groups
    limited = tuning.semantics == "pre_select" and site.top_groups < site.groups
    if limited and (found := _unreached(site, edits, off, size)):
        return found
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


def _unreached(site: Site, edits: list["Edit"], off: set[int], size: int) -> list[str]:
    """Why what is forced would not be on: a token's groups are chosen by their two best scores."""
    groups = sorted({edit.expert // size for edit in edits if edit.kind == "force"})
    if len(groups) > site.top_groups:
        return [
            f"{site.name}: experts of {len(groups)} groups are forced, and a token chooses from "
            f"{site.top_groups} of {site.groups}. Use pre_topk, which does not ask for groups."
        ]
    for group in groups:
        if sum(e not in off for e in range(group * size, (group + 1) * size)) < min(2, size):
            return [
                f"{site.name}: group {group} has an expert that is forced and all others off, so "
                "its score says nothing. Use pre_topk, or leave one more of them on."
            ]
    return []


def emptied(tuning: "Tuning", sites: Sequence[Site]) -> list[Site]:
    """Routers of which a token may get nothing: as many experts are off as it has."""
    found = []
    for site in sites:
        edits = [e for e in tuning.experts if (e.layer, e.part) == (site.layer, site.part)]
        off = sum(edit.kind in ("off", "gain") and edit.amount == 0 for edit in edits)
        if tuning.semantics.startswith("post_") and off >= site.top_k:
            found.append(site)
    return found


def cautions(tuning: "Tuning", sites: Sequence[Site]) -> list[str]:
    """What a legal tuning does that its words do not say, a sentence each."""
    found, empty = [], emptied(tuning, sites)
    for site in sites:
        edits = [e for e in tuning.experts if (e.layer, e.part) == (site.layer, site.part)]
        if tuning.semantics != "post_renorm" or not edits:
            continue
        if site in empty:
            found.append(
                f"{site.name}: as many experts are off as a token has ({site.top_k}): at scale 1 "
                "one whose experts are all off gets nothing from them, for there is nothing to "
                "renormalise (pre_topk takes the next best instead)"
            )
        elif site.top_k == 1 and site.renormalises:
            found.append(
                f"{site.name}: a token has one expert, whose weight post_renorm keeps: a gain does "
                "nothing (use post_zero)"
            )
    if len(found) > 3:
        found = [*found[:2], f"and {len(found) - 2} more layers like these"]
    return found
