"""What a check has found."""

from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["fine", "doubtful", "fails"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `advice` says what to do where it is not fine; `values` are
    the figures, for machines. Something that `fails` will end a run.
    """

    subject: str
    verdict: Verdict
    said: str
    advice: str = ""
    values: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        mark = {"fine": "ok", "doubtful": "??", "fails": "NO"}[self.verdict]
        lines = [f"{mark}  {self.subject:<14} {self.said}"]
        lines += [f"    {'':<14} -> {line}" for line in self.advice.splitlines()]
        return "\n".join(lines)
