"""Progress of long work: a live line on a terminal, a plain line now and then in a log.

with Progress("write", total=size, unit="B") as progress:
    progress.advance(len(block))
"""

import sys
import time
from types import TracebackType
from typing import Self

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_REDRAWS = 0.1


class Progress:
    """Amount done, rate and time left, on stderr. `unit` B is shown in GB, others in thousands."""

    def __init__(self, label: str, total: float | None, unit: str, quiet: bool = False) -> None:
        self.label, self.total, self.unit, self.quiet = label, total, unit, quiet
        self.done = 0.0
        self._live = sys.stderr.isatty()
        self._begin = self._shown = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._show(final=True)
        elif self._live and not self.quiet:
            print(file=sys.stderr)

    def advance(self, amount: float) -> None:
        """Count `amount` more units as done."""
        self.done += amount
        pause = SECONDS_BETWEEN_REDRAWS if self._live else SECONDS_BETWEEN_LINES
        if time.monotonic() - self._shown >= pause:
            self._show(final=False)

    def _show(self, final: bool) -> None:
        if self.quiet:
            return
        self._shown = time.monotonic()
        line = self.line(self._shown - self._begin, final)
        end = "\n" if final or not self._live else ""
        print(f"\r\x1b[K{line}" if self._live else line, end=end, file=sys.stderr, flush=True)

    def line(self, seconds: float, final: bool) -> str:
        """The line to show after `seconds`."""
        rate = self.done / max(seconds, 1e-9)
        text = f"{self.label}: {self._amount(self.done)}"
        if self.total:
            text += f" of {self._amount(self.total)} ({min(1.0, self.done / self.total):.0%})"
        text += f", {self._amount(rate)}/s"
        if final:
            return f"{text}, took {duration(seconds)}"
        if self.total and rate:
            text += f", {duration((self.total - self.done) / rate)} left"
        return text

    def _amount(self, value: float) -> str:
        if self.unit == "B":
            return f"{value / 1e9:.2f} GB"
        return f"{value:,.0f} {self.unit}"


def quiet_libraries() -> None:
    """Keep transformers' own bars out of a log; on a terminal they stay."""
    import transformers

    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()


def duration(seconds: float) -> str:
    """1:02:03, 4:05 or 6.7 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
