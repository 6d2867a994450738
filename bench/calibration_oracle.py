"""What the best choice there is would keep: units chosen by what they really are worth.

    oracle = Oracle(folder, part, windows)
    with oracle.masking(model): …

No router can know this: a unit's worth is known once it has been computed.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from moe.upcycle.calibrate.compare import Known, Masks, masking
from moe.upcycle.calibrate.fitting import calibrate
from moe.upcycle.calibrate.parts import Fits, Part
from moe.upcycle.calibrate.ranks import Alone
from moe.upcycle.source import Source


class Oracle:
    """Units, what they are worth and the threshold, found on windows of text as a router's are."""

    def __init__(self, folder: Path, part: Part, windows: Sequence[Tensor]) -> None:
        self.part, ranks, source = part, Alone(), Source.open(folder)
        self.layers = range(source.config.num_hidden_layers)
        fits = Fits(parts=[part])
        with tempfile.TemporaryDirectory() as kept:
            given = source, self.layers, fits, windows, folder, "0", Path(kept), ranks
            calibrate(*given, quiet=True)
        known = {
            key: Known(k.units.to(ranks.device), k.metric_Uss.to(ranks.device), k.choice)
            for key, k in fits.known.items()
        }
        self.masks = Masks([part], known, fits.bars, "oracle")

    @property
    def kept(self) -> float:
        """Units on per token, on average over what was run."""
        return sum(self.masks.kept) / len(self.masks.kept)

    @contextlib.contextmanager
    def masking(self, model: Any) -> Iterator[None]:
        """The dense model without what the oracle leaves out."""
        with masking(model, [self.part], self.layers, self.masks.of):
            yield
