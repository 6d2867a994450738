"""Loads a folder with its own code where `moe` cannot be imported, and saves its logits.

    python -P remote_probe.py FOLDER IDS.safetensors LOGITS.safetensors

A program of its own: it imports nothing of this package, or it would prove nothing.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

PACKAGE = "moe"


class Absent(MetaPathFinder):
    """Makes a package impossible to import, wherever it is installed."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname.split(".")[0] == PACKAGE:
            raise ModuleNotFoundError(f"No module named {fullname!r}: it is hidden", name=fullname)
        return None


def main(folder: str, ids_file: str, logits_file: str) -> None:
    """Logits [windows, length, vocabulary] in float32 of every window of ids."""
    sys.meta_path.insert(0, Absent())
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    model: Any
    info: dict[str, Any]
    model, info = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
        folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    wrong = {k: v for k, v in info.items() if v and k.endswith("_keys")}
    assert not wrong, wrong
    assert PACKAGE not in sys.modules
    with torch.no_grad():
        logits = [
            model.eval()(window[None], use_cache=False).logits[0]
            for window in load_file(ids_file)["ids"]
        ]
    save_file({"logits": torch.stack(logits)}, logits_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
