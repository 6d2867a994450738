"""Where a run stands when it saves: what a resumed run goes on from, and nobody has to trust.

progress = read_progress(values)      # ValueError where they are not what a run writes
"""

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moe.upcycle.receipt import check_steps

Count = Annotated[int, Field(strict=True, ge=0, lt=2**53)]  # JSON readers agree on these
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Share = Annotated[list[Number], Field(strict=True, min_length=1)]  # of tokens, by head or expert


class Judged(BaseModel):
    """What the guard needs to judge alike.

    clean: (loss, gradient norm) of the last steps. row: (step, first sample, the one after the
    last) of those that were skipped in a row.
    """

    model_config = ConfigDict(frozen=True)

    skipped: Count
    clean: list[Annotated[list[Number], Field(min_length=2, max_length=2)]]
    row: list[Annotated[list[Count], Field(min_length=3, max_length=3)]]

    @model_validator(mode="after")
    def _rows_hold_samples(self) -> Self:
        if any(first >= end for _, first, end in self.row):
            raise ValueError("a skipped step without samples")
        return self


class Progress(BaseModel):
    """data_step: at which the data's first sample was due. updates: steps that were taken, not
    skipped. origin: history of the model that the run began with. reference: per layer the shares
    of tokens by head and by expert. unvalidated, unevaluated: the step is to be yet. ranks: those
    that wrote it, each with its random state.
    """

    model_config = ConfigDict(frozen=True)

    step: Count
    consumed_samples: Count
    updates: Count
    config: dict[str, Any]
    data_step: Count = 0
    origin: list[dict[str, Any]] = []
    versions: dict[str, str] | None = None
    reference: list[Annotated[list[Share | None], Field(min_length=2, max_length=2)]] | None
    guard: Judged = Judged(skipped=0, clean=[], row=[])
    unvalidated: Annotated[bool, Field(strict=True)] = False
    unevaluated: Annotated[bool, Field(strict=True)] = False
    ranks: Annotated[Count, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.data_step > self.step or self.updates > self.step:
            raise ValueError("more steps of its data, or updates, than steps")
        if not isinstance(self.config.get("data"), dict):
            raise ValueError("config has no data")
        check_steps(self.origin)
        return self


def read_progress(values: Any) -> Progress:
    """From what JSON says. Raises ValueError naming the first value that no run writes."""
    try:
        return Progress.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, ("progress", *first["loc"])))
        raise ValueError(f"{place}={first['input']!r:.60}: {first['msg']}") from error
