"""Other experts to do the same to: what a tuning's effect is held against.

    edits = draw("rate_matched", tuning, sites, rate_C, seed=0)

C experts of all sites in a row.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from moe.errors import UserError
from moe.tune.families import Part, Site, columns
from moe.tune.legality import emptied
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
    on (`rate_C`: share of tokens). layer_matched: of the same router. None leaves tokens of more
    layers without any expert than the tuning does. Raises UserError where there are not so many
    others, or where any such set asks too much of a router.
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
            left_out = taken | _last_ones(edits, edit, tuning, found, starts)
            others = _others(kind, own[place], places, rate_C, left_out)
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
        drawn = with_edits(tuning, edits)
        try:
            drawn.check(found)
        except UserError as error:
            reason = error
            continue
        # a layer that is off altogether is another experiment, and often the end of a model
        if len(emptied(drawn, found)) > len(emptied(tuning, found)):
            reason = UserError("they would leave tokens of more layers without any expert")
            continue
        return edits
    raise UserError(f"{kind} controls: none of {ATTEMPTS} draws fits the routers ({reason}).")


def _last_ones(
    edits: Sequence[Edit], edit: Edit, tuning: Tuning, found: Sequence[Site],
    starts: dict[tuple[int, Part], int],
) -> set[int]:  # fmt: skip
    """Columns of the routers that one more edit would leave tokens without any expert of."""
    if emptied(tuning, found):  # it does so itself: what is drawn is counted at the end
        return set()
    columns_of: set[int] = set()
    for site in found:
        here = [e for e in edits if (e.layer, e.part) == (site.layer, site.part)]
        more = Edit(layer=site.layer, part=site.part, expert=0, action=edit.action)
        if emptied(with_edits(tuning, [*here, more]), [site]):
            first = starts[site.layer, site.part]
            columns_of |= set(range(first, first + site.experts))
    return columns_of


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
