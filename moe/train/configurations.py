"""Configurations beside each other: of ranks, and of a run then and now."""

import json
from typing import Any

import xxhash

from moe.config import RunConfig
from moe.errors import UserError
from moe.parallel.world import Ranks, leave_it_to_the_first
from moe.upcycle.receipt import versions


def check_same(config: RunConfig, ranks: Ranks) -> None:
    """Raise UserError on rank 0 where ranks were started with different configurations or versions:
    they would wait for one another, or train a model that no file describes.
    """
    given = config.model_dump(mode="json") | {"versions": versions()}
    text = json.dumps(given, sort_keys=True)
    hashes = ranks.gather(xxhash.xxh3_128_hexdigest(text.encode()))
    odd = [rank for rank, found in enumerate(hashes) if found != hashes[0]]
    if not odd:
        return
    other = ranks.gather(given if ranks.rank == odd[0] else None)[odd[0]]
    leave_it_to_the_first(ranks, UserError.exit_code)
    raise UserError(
        f"{len(odd)} of {ranks.size} ranks were started with another configuration than rank 0. "
        f"Rank {odd[0]} has:\n  "
        + "\n  ".join(differences(given, other, all_keys=True))
        + "\nStart all with one file and one command."
    )


def differences(
    then: dict[str, Any], now: dict[str, Any], at: str = "", *, all_keys: bool = False
) -> list[str]:
    """Keys of two configurations that differ, with both values; where the run lies too if
    `all_keys`.
    """
    lines = []
    for key in sorted(then.keys() | now.keys()):
        old, new, place = then.get(key), now.get(key), f"{at}{key}"
        if isinstance(old, dict) and isinstance(new, dict):
            lines += differences(old, new, f"{place}.", all_keys=all_keys)
        elif old != new and (all_keys or place not in ("out", "model", "train.resume")):
            lines.append(f"{place} {old} -> {new}")
    return lines
