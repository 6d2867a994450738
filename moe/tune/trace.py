"""What every expert did for every prompt: `trace.npz`.

    trace = Trace.read(Path("trace.npz"))
    trace.counts, trace.mass                 # [prompts, experts of all sites in a row]

Counts (tokens that an expert was on for) and gate mass (its weights, summed) are kept apart, prompt
by prompt: a ranking needs both, and intervals and other labels need prompts, not sums.
"""

import json
import zipfile
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from moe.errors import Corrupt, UserError
from moe.tune.families import Site, columns

FORMAT = "moe-trace/1"


@dataclass(kw_only=True, slots=True)
class Trace:
    """P prompts; C experts, those of all sites one after the other (families.columns)."""

    sites: list[Site]
    counts: np.ndarray  # uint32 [P, C]
    mass: np.ndarray  # float32 [P, C]
    tokens: np.ndarray  # uint32 [P]: tokens that were watched
    rows: list[dict[str, Any]]  # per prompt: prompt, label (or None), response (or None)
    settings: dict[str, Any]  # model (identity), family, tokens, seed, generation, versions

    @property
    def labels(self) -> list[str | None]:
        return [row.get("label") for row in self.rows]

    def write(self, path: Path) -> None:
        """As one file that appears whole."""
        about = {"format": FORMAT, "sites": [asdict(site) for site in self.sites]}
        texts = {"about": about | {"settings": self.settings}, "rows": self.rows}
        packed: dict[str, Any] = {
            k: np.frombuffer(json.dumps(v).encode(), np.uint8) for k, v in texts.items()
        }
        beside = path.with_name(path.name + ".new")
        with beside.open("wb") as file:
            np.savez(file, counts=self.counts, mass=self.mass, tokens=self.tokens, **packed)
        beside.rename(path)

    @classmethod
    def read(cls, path: Path) -> "Trace":
        """Raises UserError where there is no trace, Corrupt where it is damaged."""
        if not path.is_file():
            raise UserError(f"{path} is not a file. `moe tune record` writes one.")
        try:
            with np.load(path, allow_pickle=False) as file:
                about, rows = (json.loads(file[k].tobytes()) for k in ("about", "rows"))
                arrays = {k: file[k] for k in ("counts", "mass", "tokens")}
            if about.get("format") != FORMAT:
                raise ValueError(f"its format is {about.get('format')!r}, not {FORMAT!r}")
            sites = [_site(entry) for entry in about["sites"]]
            trace = cls(sites=sites, rows=rows, settings=about["settings"], **arrays)
            _check(trace)
        except (ValueError, KeyError, TypeError, AttributeError, OSError, EOFError,
                zipfile.BadZipFile, zlib.error, RuntimeError) as error:  # fmt: skip
            reason = "not an npz file" if "pickle" in str(error) else error
            raise Corrupt(f"{path} is not a trace ({reason}). Record it again.") from error
        return trace


def hash_trace(path: Path) -> str:
    """xxh3-128 of the file, what a tuning says it was made from."""
    return xxhash.xxh3_128(path.read_bytes()).hexdigest()


def _site(entry: dict[str, Any]) -> Site:
    known = {f.name for f in fields(Site)}
    values: Any = {}
    for key in known & entry.keys():
        values[key] = tuple(entry[key]) if isinstance(entry[key], list) else entry[key]
    return Site(**values)


def _check(trace: Trace) -> None:
    """Raise ValueError where arrays, sites and rows do not belong together."""
    prompts, experts = len(trace.rows), columns(trace.sites)[-1]
    for name in ("counts", "mass"):
        array = getattr(trace, name)
        if array.shape != (prompts, experts) or not np.isfinite(array).all():
            raise ValueError(f"{name} is {array.shape}, for {prompts} prompts, {experts} experts")
    if trace.tokens.shape != (prompts,):
        raise ValueError(f"tokens is {trace.tokens.shape}, for {prompts} prompts")
    if not all(isinstance(row, dict) for row in trace.rows):
        raise ValueError("rows are not objects")
