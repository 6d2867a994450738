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
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moe.errors import UserError, raise_all
from moe.hf.loading import identity
from moe.jsonfile import read_json
from moe.tune import legality
from moe.tune.families import Part, Site
from moe.tune.legality import Semantics

FORMAT = "moe-tuning/1"


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
    choice is a bias of log(1 - s) or -log(1 - s): nothing at 0, all of it at 1. A bias is added to
    logits, or with a selection bias to scores, which lie in 0 to 1 where they are sigmoids: there
    ½ is most of it already, and an expert of another group is forced at 1 alone.

    The first tokens of a sequence (`sink_tokens`) visit every expert of a union's attention, those
    off before the choice too.
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
            body = read_json(path)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not text"
            raise UserError(f"{path}: {reason}.") from error
        except ValueError as error:
            raise UserError(f"{path} is not JSON ({error}).") from error
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise UserError(f"{path} is not a tuning: its format is not {FORMAT!r}.")
        if body.get("layer_index") != "absolute":
            raise UserError(
                f"{path}: layer_index={body.get('layer_index')!r} is unknown. Use 'absolute'."
            )
        raise_all([f"{path}: {text}" for text in legality.problems(body)])
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
        raise_all(legality.problems(asdict(self)))
        shape = shape_of(sites)
        if self.shape and self.shape != shape:
            raise UserError(
                f"this tuning is for another shape of model: {_describe(self.shape)}, not "
                f"{_describe(shape)}."
            )
        raise_all(legality.misfits(self, sites))

    def cautions(self, sites: Sequence[Site]) -> list[str]:
        """What it does to these routers that its words do not say, a sentence each."""
        return legality.cautions(self, sites)

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
    if scale is not None and not 0 <= scale <= 1:
        raise UserError(f"--scale {scale:g} must be between 0 and 1.")
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
