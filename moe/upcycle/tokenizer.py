"""A result's tokenizer: of the class that its parent's has.

transformers picks that class by the model's type where `tokenizer_config.json` names none, and for
some families against what it names. A RoutedLlama's type decides nothing, so it goes by name.
"""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

NAME = "tokenizer_config.json"


def load_tokenizer(folder: Path, config: Path | None = None) -> Any:
    """The tokenizer of `folder`; `config` is the folder of the model's config if it is another.

    Raises whatever transformers raises where there is none.
    """
    described = AutoConfig.from_pretrained(config or folder, trust_remote_code=False)
    return AutoTokenizer.from_pretrained(folder, config=described, trust_remote_code=False)


def keep_class(parent: Path, target: Path, config: Path) -> None:
    """Name the parent's class in the target's tokenizer config, where it would get another."""
    try:
        wanted = type(load_tokenizer(parent)).__name__
    except Exception:  # no tokenizer, or none that can be read: nothing to keep
        return
    if type(load_tokenizer(target, config)).__name__ == wanted:
        return
    path = target / NAME
    settings = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**settings, "tokenizer_class": wanted}, indent=2) + "\n")
