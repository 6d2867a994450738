"""What decoding keeps: transformers' cache under its installed name, and layers of our own.

Our forward passes take both names of the cache's keyword, `past_key_values` (transformers to 5.23)
and `cache`; what they hand on and return bears the installed version's, since `generate` passes and
reads back no other.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import create_causal_mask

_KNOWN = inspect.signature(create_causal_mask).parameters
CACHE = "cache" if "cache" in _KNOWN else "past_key_values"


def kept(cache: Cache, layer: int) -> dict[str, Tensor]:
    """Tensors [B, …] kept beside a layer's keys; they follow its rows through beams and batches."""
    held = _layer(cache, layer)
    if not hasattr(held, "kept"):
        held.kept = {}

        def along(change: Callable, on_rows: Callable[[Tensor, Any], Tensor]) -> Callable:
            def both(argument: Any) -> None:
                change(argument)
                held.kept = {name: on_rows(t, argument) for name, t in held.kept.items()}

            return both

        hooks: dict[str, Callable[[Tensor, Any], Tensor]] = {
            "reorder_cache": _select_rows,
            "batch_select_indices": _select_rows,
            "batch_repeat_interleave": _repeat_rows,
        }
        for name, on_rows in hooks.items():
            if hasattr(held, name):  # a static layer cannot be cut
                setattr(held, name, along(getattr(held, name), on_rows))
    return held.kept


def ragged(cache: Cache, layer: int) -> "RaggedLayer":
    """The layer's ragged store, put in place of the one that the cache came with."""
    held = _layer(cache, layer)
    if not isinstance(held, RaggedLayer):
        if held.get_seq_length():
            raise ValueError(f"layer {layer} of this cache was filled by another attention.")
        held = cache.layers[layer] = RaggedLayer()
    return held


def _layer(cache: Cache, layer: int) -> Any:
    while len(cache.layers) <= layer:  # a cache made without a config grows as it is used
        assert cache.layer_class_to_replicate is not None
        cache.layers.append(cache.layer_class_to_replicate())
    return cache.layers[layer]


def _select_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    return tensor.index_select(0, rows.to(tensor.device))


def _repeat_rows(tensor: Tensor, times: int) -> Tensor:
    return tensor.repeat_interleave(times, dim=0)


def pack(rows_P: Tensor, batch_P: Tensor, place_P: Tensor, batch: int, length: int) -> Tensor:
    """Rows [P, …] side by side per sequence: [B, length, …], zeros where a sequence has fewer."""
    packed = rows_P.new_zeros(batch, length, *rows_P.shape[1:])
    return packed.index_put((batch_P, place_P), rows_P)


def places(batch_P: Tensor, count_B: Tensor) -> Tensor:
    """Each row's number within its sequence, of rows in order of their sequences."""
    first_B = count_B.cumsum(0) - count_B
    return torch.arange(len(batch_P), device=batch_P.device) - first_B[batch_P]


class RaggedLayer(CacheLayerMixin):
    """Keys and values of an attention in which each expert keeps those of its own tokens alone.

    Per expert: keys and values [B, L, G, d] and slots [B, L], the place of each in its sequence, -1
    where a sequence has fewer than the longest. L is what that expert has seen at most.
    """

    is_sliding = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.experts: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.seen = 0  # tokens, chosen or not

    def append(
        self, expert: int, batch: int, batch_P: Tensor, rows: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Add rows (keys [P, G, d], values, slots [P]) to an expert's; returns all that it has."""
        count_B = batch_P.bincount(minlength=batch)
        earlier = self.experts.get(expert)
        before_B = torch.zeros_like(count_B)
        if earlier is not None:
            before_B = (earlier[2] >= 0).sum(1)
        length = int((before_B + count_B).max())
        place_P = places(batch_P, count_B) + before_B[batch_P]
        keys, values, slots = (pack(r, batch_P, place_P, batch, length) for r in rows)
        there = pack(torch.ones_like(batch_P), batch_P, place_P, batch, length)
        slots = slots.masked_fill(there == 0, -1)
        if earlier is not None:
            had = min(earlier[2].shape[1], length)  # beams may have dropped the longest row
            old = earlier[2][:, :had] >= 0
            for now, then in zip((keys, values, slots), earlier, strict=True):
                now[:, :had][old] = then[:, :had][old]
        self.experts[expert] = keys, values, slots
        self.is_initialized = True
        return self.experts[expert]

    def nbytes(self) -> int:
        """Bytes of keys and values held."""
        return sum(k.nbytes + v.nbytes for k, v, _ in self.experts.values())

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a ragged layer is filled by `append`, expert by expert.")

    def get_seq_length(self, *args: Any) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.seen + new, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        self.experts, self.seen = {}, 0

    def _on_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.experts = {
            e: (change(k), change(v), change(s)) for e, (k, v, s) in self.experts.items()
        }

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._on_rows(lambda t: _select_rows(t, beam_idx))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._on_rows(lambda t: _repeat_rows(t, repeats))

    def offload(self) -> None:
        raise NotImplementedError("a ragged cache is not offloaded.")
