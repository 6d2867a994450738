"""What each layer gave, on disk beside the result: a killed calibration goes on where it was.

The folder lies in the one that the result is built in, which knows whose it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe.upcycle.calibrate.parts import Name

FOLDER = "calibration"


@dataclass(slots=True)
class LayerFit:
    """What was found in one part of one layer. T tokens, U units, H hidden, F neurons."""

    solution: Tensor  # [H + 1, U] of the ridge regression, float64
    scores: Tensor  # [T, U] what it predicts, float32
    worth: Tensor  # [T / SAMPLED, U] what units of some tokens really add, float32
    mean: Tensor  # [U] contribution, float64
    explained: Tensor  # [] R²
    order: Tensor  # [F] of neurons; empty where the units lie as they are
    seconds: Tensor  # []


class Journal:
    """The folder of one calibration. Of several ranks only the first has one."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        if folder is not None:
            folder.mkdir(exist_ok=True)

    def save_fit(self, part: Name, layer: int, fit: LayerFit) -> None:
        names = LayerFit.__dataclass_fields__
        self._save(f"fit-{part}-{layer}", {name: getattr(fit, name) for name in names})

    def fits(
        self, parts: Sequence[Name], layers: Sequence[int]
    ) -> dict[tuple[Name, int], LayerFit]:
        """All that are there of these."""
        found = {}
        for part in parts:
            for layer in layers:
                if (tensors := self._load(f"fit-{part}-{layer}")) is not None:
                    found[part, layer] = LayerFit(**tensors)
        return found

    def save_output(self, part: Name, layer: int, weight: Tensor) -> None:
        """An output projection that was fitted again."""
        self._save(f"output-{part}-{layer}", {"weight": weight})

    def output(self, part: Name, layer: int) -> Tensor | None:
        tensors = self._load(f"output-{part}-{layer}")
        return None if tensors is None else tensors["weight"]

    def save_fisher(self, part: Name, layer: int, moment: Tensor) -> None:
        self._save(f"fisher-{part}-{layer}", {"moment": moment})

    def fisher(self, part: Name, layer: int) -> Tensor | None:
        tensors = self._load(f"fisher-{part}-{layer}")
        return None if tensors is None else tensors["moment"]

    def save_losses(self, name: str, losses_T: Tensor) -> None:
        """What a source of a mixture loses on each token."""
        self._save(f"losses-{name}", {"losses": losses_T})

    def losses(self, name: str) -> Tensor | None:
        tensors = self._load(f"losses-{name}")
        return None if tensors is None else tensors["losses"]

    def note(self, name: str, value: float) -> None:
        """A number to be remembered."""
        self._save(name, {"value": torch.tensor(value, dtype=torch.float64)})

    def noted(self, name: str) -> float | None:
        tensors = self._load(name)
        return None if tensors is None else tensors["value"].item()

    def _save(self, name: str, tensors: dict[str, Tensor]) -> None:
        if self.folder is None:
            return
        path = self.folder / f"{name}.safetensors"
        whole = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(whole, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)  # all of it or nothing

    def _load(self, name: str) -> dict[str, Tensor] | None:
        if self.folder is None:
            return None
        path = self.folder / f"{name}.safetensors"
        try:
            return load_file(path) if path.is_file() else None
        except SafetensorError:  # the machine went down, not the process
            return None


def empty_order() -> Tensor:
    return torch.empty(0, dtype=torch.long)
