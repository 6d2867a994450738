"""Other experts to do the same to: what a tuning's effect is held against.

    edits = draw("rate_matched", tuning, sites, rate_C, seed=0)

C experts of all sites in a row.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from moe.errors import UserError
from moe.tune.families import Site, columns
from moe.tune.tuning import Edit, Tuning

Kind = Literal["random", "rate_matched", "layer_matched"]
KINDS: tuple[Kind, ...] = get_args(Kind)
NEAREST = 8  # a rate-matched expert is drawn among so many of the nearest rate
ATTEMPTS = 200


def draw(
    kind: Kind, tuning: Tuning, found: Sequence[Site], rate_C: np.ndarray, seed: int
) -> list[Edit]:
    """As many experts as the tuning has, none of them its own, with its actions one by one.

    random: any of the same part (MLPs or attentions). rate_matched: of the nearest rate of being
    on (`rate_C`: share of tokens). layer_matched: of the same router. Raises UserError where there
    are not so many others, or where any such set asks too much of a router.
    """
    places = [(site, expert) for site in found for expert in range(site.experts)]
    starts = dict(zip(((s.layer, s.part) for s in found), columns(list(found)), strict=False))
    own = [starts[edit.layer, edit.part] + edit.expert for edit in tuning.experts]
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    reason = None
    for _ in range(ATTEMPTS):
        edits: list[Edit] = []
        taken = set(own)
        # the fewest others first would need a matching; in any order, some draw succeeds
        for place in rng.permutation(len(own)):
            edit = tuning.experts[place]
            others = _others(kind, own[place], places, rate_C, taken)
            if not others:
                raise UserError(
                    f"{kind} controls: {edit} has no other expert to stand for it "
                    f"({len(own)} of {len(places)} are tuned). Tune fewer, or leave out --kind "
                    f"{kind}."
                )
            column = int(rng.choice(others))
            taken.add(column)
            site, expert = places[column]
            edits.append(Edit(layer=site.layer, part=site.part, expert=expert, action=edit.action))
        edits.sort(key=lambda e: (e.layer, e.part, e.expert))
        try:
            with_edits(tuning, edits).check(found)
        except UserError as error:
            reason = error
            continue
        return edits
    raise UserError(f"{kind} controls: none of {ATTEMPTS} draws fits the routers ({reason}).")


def with_edits(tuning: Tuning, edits: Sequence[Edit], scale: float | None = None) -> Tuning:
    """The tuning with other experts, or another dial."""
    return Tuning(
        semantics=tuning.semantics,
        experts=list(edits),
        scale=tuning.scale if scale is None else scale,
        model=tuning.model,
        shape=tuning.shape,
    )


def _others(
    kind: Kind, own: int, places: Sequence[tuple[Site, int]], rate_C: np.ndarray, taken: set[int]
) -> list[int]:
    """Columns that may stand for a tuned expert."""
    site, expert = places[own]
    # an expert that is always on can stand for such a one alone: no choice concerns it
    always = expert in site.always
    same = [
        column
        for column, (other, number) in enumerate(places)
        if column not in taken
        and other.part == site.part
        and other.kind == site.kind
        and (number in other.always) == always
        and (kind != "layer_matched" or other.layer == site.layer)
    ]
    if kind == "rate_matched":
        same.sort(key=lambda column: (abs(rate_C[column] - rate_C[own]), column))
        return same[:NEAREST]
    return same
