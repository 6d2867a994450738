"""A result's tokenizer: of the class that its parent's has.

transformers picks that class by the model's type where `tokenizer_config.json` names none, and for
some families against what it names. A RoutedLlama's type decides nothing, so it goes by name.
"""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

NAME = "tokenizer_config.json"


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder.

    Raises OSError where it has no files of one, or whatever transformers raises over what there is.
    """
    if not has_tokenizer(folder):  # some families' classes load from nothing at all
        raise OSError(f"{folder} has no files of a tokenizer")
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def refusal(folder: Path | str, error: Exception, otherwise: str) -> str:
    """What to say where transformers cannot load a tokenizer: that it is code, or `otherwise`."""
    if "trust_remote_code" not in str(error):
        return otherwise
    return (
        f"the tokenizer of {folder} is code of its own (auto_map in {NAME}), which is never run. "
        "Where you trust it, load it with transformers and save it as a tokenizer.json here."
    )


def has_tokenizer(folder: Path) -> bool:
    return any(folder.glob("tokenizer*")) or (folder / "vocab.json").is_file()


def keep_class(parent: Path, whole: Path, target: Path) -> None:
    """Name the parent's class in the target's tokenizer config, where it would get another.

    `whole` is the target with its config in place, of links where it is not there yet.
    """
    try:
        wanted = type(load_tokenizer(parent)).__name__
    except Exception:  # no tokenizer, or none that can be read: nothing to keep
        return
    if type(load_tokenizer(whole)).__name__ == wanted:
        return
    path = target / NAME
    settings = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**settings, "tokenizer_class": wanted}, indent=2) + "\n")
