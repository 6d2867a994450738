"""Every configuration that ships, as the launches would call it on each architecture."""

import itertools
from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from moe.kernels import tiling
from moe.kernels.exchange import triton as exchange
from moe.kernels.heads import attention, decoding, gating, listing
from moe.kernels.route import triton as route
from moe.kernels.routed_mlp import gemm, gradients

POINTERS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
HIDDEN, INNER, K = 2048, 768, 8
STEP, INTS, FLOATS = "i32:16", "*i32", "*fp32"

Configuration = tuple[str, Any, dict[str, Any], dict[str, int]]


def configurations(arch: str, dtype: str) -> Iterator[Configuration]:
    """Name, kernel, arguments and launch options."""
    yield from tiled(arch, dtype)
    if dtype == "float32":
        for experts, k in itertools.product((8, 128, 512), (2, 8)):
            yield from routing(experts, k)
    values = POINTERS[dtype]
    for kernel, arguments in itertools.chain(small(values), around(values), exchanged(values)):
        size = f" {arguments['D']}" if "D" in arguments else ""
        options = {"num_warps": 4, "num_stages": 3}
        yield f"{kernel.fn.__name__} {dtype}{size}", kernel, arguments, options


def tiled(arch: str, dtype: str) -> Iterator[Configuration]:
    """The kernels whose tiles come from the table."""
    for kernel, by_rows in tiling.table(str(tiling.SHIPPED))[arch][dtype].items():
        if kernel.startswith("attend"):
            yield from heads(kernel, dtype, by_rows)
            continue
        for rows, by_size in by_rows.items():
            for size, cut in by_size.items():
                found = tiling.Tiling(**cut)
                fn, arguments = routed_mlp(kernel, POINTERS[dtype])
                arguments |= {
                    "BM": found.block_m or int(rows), "BN": found.block_n, "BK": found.block_k,
                    "GROUP": found.group, "PARTS": found.parts, "UPCAST": False,
                    "PRECISION": "tf32", "ACC": tl.float32,
                }  # fmt: skip
                options = found.options()
                yield f"{kernel} {dtype} {rows} {size}", fn, arguments, options


def heads(kernel: str, dtype: str, by_size: dict[str, Any]) -> Iterator[Configuration]:
    """A kernel of attention, over all rows and over some."""
    values = POINTERS[dtype]
    strides = {f"{t}_{s}": STEP for t in "qkv" for s in "bsnlg"}
    tensors = dict.fromkeys(("q", "k", "v", "out", "raw", "draw", "dout", "dq", "dk", "dv"), values)
    floats = dict.fromkeys(("gate", "sums", "dgate", "deltas"), FLOATS)
    numbers = {"S": "i32", "L": "i32", "scale": "fp32", "scale_e": "fp32"}
    numbers |= {"first": INTS, "latest": INTS, "until": INTS}
    for size, sparse in itertools.product(("64", "128"), (False, True)):
        found = tiling.Tiling(**(by_size.get(size) or by_size["*"])["*"])
        arguments = strides | tensors | floats | numbers | {
            "rows": INTS if sparse else None, "segments": INTS if sparse else None,
            "starts": INTS if sparse else None, "N": 32, "G": 8, "D": int(size), "DP": int(size),
            "SPARSE": sparse, "GATED": True, "BM": found.block_m, "BN": found.block_n,
            "INDEX": tl.int32, "UPCAST": False, "PRECISION": "tf32", "ACC": tl.float32,
        }  # fmt: skip
        name = f"{kernel} {dtype} {size} {'some' if sparse else 'all'}"
        options = found.options()
        yield name, getattr(attention, kernel), arguments, options


def routed_mlp(kernel: str, values: str) -> tuple[Any, dict[str, Any]]:
    """A kernel of the routed MLP and its arguments for a model of HIDDEN and INNER."""
    rows = {"pairs": INTS, "offsets": INTS, "tiles": INTS, "U": "i32"}
    rows["depth"] = "i32"
    layout = {"h_gate": 1, "h_up": STEP}
    if kernel == "up_swiglu":
        return gemm.up_swiglu, rows | layout | {
            "x": values, "w1": values, "bias": values, "weights": FLOATS, "h": values,
            "a": values, "BIASED": False, "LIMIT": 0.0, "ALPHA": 1.0,
            "x_step": STEP, "w_expert": STEP, "gate_step": STEP, "up_offset": STEP, "w_step": 1,
            "H": HIDDEN, "I": INNER, "K": K, "SAVE_H": True, "WEIGH": True,
        }  # fmt: skip
    if kernel in ("down", "dx"):
        down = kernel == "down"
        return gemm.grouped_gemm, rows | {
            "a": values, "w": values, "y": values, "w_expert": STEP,
            "k_step": 1 if down else STEP, "n_step": STEP if down else 1,
            "K": INNER if down else 2 * INNER, "N": HIDDEN,
        }  # fmt: skip
    if kernel == "down_dgrad":
        return gradients.down_dgrad, rows | layout | {
            "dy": values, "w2": values, "h": values, "weights": FLOATS, "dh": values, "a": values,
            "parts": FLOATS, "dy_step": STEP, "w_expert": STEP, "w_step": STEP, "i_step": 1,
            "H": HIDDEN, "I": INNER, "K": K, "LIMIT": 0.0, "ALPHA": 1.0,
        }  # fmt: skip
    return gradients.weight_gradient, {
        "left": values, "right": values, "pairs": INTS, "offsets": INTS, "order": INTS,
        "dw": values, "left_step": STEP, "right_step": STEP, "dw_expert": STEP, "m_step": STEP,
        "n_step": 1, "E": "i32", "M": 2 * INNER, "N": HIDDEN, "K": K, "GATHER_LEFT": False,
        "ADD": False,
    }  # fmt: skip


def small(values: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The routed MLP's kernels that only move and add."""
    yield gemm.combine, {
        "y": values, "places": INTS, "out": values, "N": HIDDEN, "K": K, "BN": 1024,
        "UPCAST": False, "ACC": tl.float32,
    }  # fmt: skip
    yield gradients.bias_gradient, {
        "dh": values, "offsets": INTS, "dbias": values, "N": 2 * INNER, "BM": 32, "BN": 128,
        "UPCAST": False, "ACC": tl.float32,
    }  # fmt: skip
    yield gradients.gather_sum, {
        "parts": FLOATS, "places": INTS, "dweights": FLOATS, "P": "i32", "N": 6, "NP": 8, "B": 256,
    }  # fmt: skip


def around(values: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """What goes with attention: decoding, a gate apart, the list of heads that are on."""
    if values == "*fp32":  # they do not depend on it
        sizes = {"on": "*i1", "S": "i32", "N": 32, "G": 8, "PART": 4096, "BLOCK": 1024}
        yield listing.count_on, sizes | {"counts": INTS}
        yield listing.place_on, sizes | {
            "counts": INTS, "rows": INTS, "ends": INTS, "starts": INTS, "most": "i32",
            "segments": "i32", "BC": 4096,
        }  # fmt: skip
        return
    how = {"UPCAST": False, "PRECISION": "tf32", "ACC": tl.float32}
    strides = {f"{t}_{s}": STEP for t in "qkv" for s in "bnlg"}
    tensors = dict.fromkeys(("q", "k", "v", "out", "heads", "dout", "dheads"), values)
    floats = dict.fromkeys(("gate", "dgate", "largest", "total", "parts"), FLOATS)
    for size in (64, 128):
        wide = {"D": size, "DP": size, "BR": 4096 // size, "R": "i32"}
        given = how | strides | tensors | floats | wide | {
            "on": "*i1", "first": INTS, "L": "i32", "span": "i32", "scale": "fp32", "J": "i32",
            "N": 32, "G": 8, "MP": 16, "SPARSE": True, "GATED": True, "BN": decoding.BLOCK,
        }  # fmt: skip
        yield decoding.decode_parts, given
        yield decoding.merge_parts, given
        yield gating.gate_rows, given
        yield gating.ungate_rows, given


def exchanged(values: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The kernels of expert parallelism: 128 experts on 8 ranks."""
    ints = ("pairs", "offsets", "row_of")
    given = dict.fromkeys(ints, INTS) | {
        "x": values, "rows": values, "drows": values, "dy": values, "weights": FLOATS,
        "row_weights": FLOATS, "values": FLOATS, "out": FLOATS, "indices": "*i64",
        "ranks_of": "*i64", "row_indices": "*i64", "x_step": STEP, "dy_step": STEP, "T": "i32",
        "P": "i32", "E": 128, "W": 8, "K": K, "KP": 8, "H": HIDDEN, "BH": 1024, "BT": 128, "B": 256,
    }  # fmt: skip
    yield exchange.pack_rows, given
    yield exchange.spread_rows, given
    if values == "*fp32":  # they do not depend on it
        yield exchange.destine, given
        yield exchange.pull, given


def routing(experts: int, k: int) -> Iterator[Configuration]:
    """The four kernels of routing, with everything that they can be asked for."""
    wide = max(16, triton.next_power_of_2(experts))
    tile = max(1, min(32, route.TILE // wide))
    sizes = {"E": experts, "EP": wide, "K": k, "BT": tile}
    how = {"SIGMOID": True, "RENORMALISE": True, "PADDED": True}
    tokens = {"T": "i32", "span": "i32", "scale": "fp32"}
    plan = dict.fromkeys(("places", "pairs", "offsets", "tiles", "order"), INTS)
    for kernel, arguments in (
        (route.choose, sizes | how | tokens | {
            "logits": FLOATS, "bias": FLOATS, "valid": "*i1", "weights": FLOATS, "indices": "*i64",
            "ranks": INTS, "counts": INTS, "sums": FLOATS,
            "BIASED": True,
        }),
        (route.differentiate, sizes | how | tokens | {
            "logits": FLOATS, "valid": "*i1", "indices": "*i64", "dweights": FLOATS,
            "dsums": FLOATS, "dlogits": FLOATS,
        }),
        (route.count, sizes | {
            "indices": "*i64", "ranks": INTS, "counts": INTS, "T": "i32", "span": "i32",
        }),
        (route.place, plan | {
            "indices": "*i64", "ranks": INTS, "counts": INTS, "sums": FLOATS, "loads": FLOATS,
            "P": "i32", "run_pairs": "i32", "R": "i32", "share": "i32", "U": "i32",
            "E": experts, "EP": wide, "BR": 4096 // wide, "BP": 1024, "BM": 128,
            "BU": 4096 // wide, "BO": 4096 // wide, "SUMS": True,
        }),
    ):  # fmt: skip
        warps = 8 if kernel in (route.place, route.count) else route.WARPS
        yield f"{kernel.fn.__name__} {experts} {k}", kernel, arguments, {"num_warps": warps}
