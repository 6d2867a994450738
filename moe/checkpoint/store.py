"""Checkpoints of a run: safetensors pieces, published by rename, never pickled.

    saver = store.Saver(out, rank, gather)           # moe.checkpoint.saver: saves in the background
    with store.Reader(store.latest(out)) as checkpoint: checkpoint.load(entries)
    for name, tensor in store.weights(folder): ...   # no process group needed

Each rank writes the blocks it holds into one safetensors file. A tensor can be read back in any
other division, so ranks may come and go between runs. Nothing is used whose hash is not what the
manifest says. (torch's own distributed checkpoint keeps its metadata in a pickle, which is never
loaded here.)
"""

from moe.checkpoint.damage import Damage, check, check_together, newest_sound, unknown
from moe.checkpoint.folders import FOLDER, clean, latest, numbered, retain, stale, steps
from moe.checkpoint.manifest import is_complete as is_checkpoint
from moe.checkpoint.progress import Progress
from moe.checkpoint.reader import Reader, progress_of, weights
from moe.checkpoint.saver import Saver, save

__all__ = [
    "FOLDER",
    "Damage",
    "Progress",
    "Reader",
    "Saver",
    "check",
    "check_together",
    "clean",
    "is_checkpoint",
    "latest",
    "newest_sound",
    "numbered",
    "progress_of",
    "retain",
    "save",
    "stale",
    "steps",
    "unknown",
    "weights",
]
