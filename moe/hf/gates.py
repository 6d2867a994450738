"""The gates of soft routers over a text: their mean, and models in which they are nothing else.

    ids = calibration_tokens(folder, Path("text.txt"), config.vocab_size)
    gates = mean_gates(reference(config, plan), ids)
    gates[3, "attention"]        # (0.48, 0.52): of two attention experts in layer 3
    freeze(model, gates)

T tokens, E experts, K chosen, N query heads of all experts.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe.errors import Corrupt, UserError
from moe.model import RoutedLlamaConfig
from moe.model.losses import RoutingLoad
from moe.model.router import ExpertRouter, SoftRouter
from moe.progress import Progress, quiet_libraries
from moe.upcycle.tokenizer import load_tokenizer, refusal
from moe.upcycle.verify import windows

Part = tuple[int, str]  # a layer, and attention or mlp
Gates = dict[Part, tuple[float, ...]]


def frozen_parts(config: RoutedLlamaConfig) -> list[Part]:
    """The parts of a model whose gates depend on the token and can be frozen to a mean."""
    parts: list[Part] = []
    for layer in range(config.num_hidden_layers):
        if config.attention_spec(layer).kind == "bam":
            parts.append((layer, "attention"))
        if config.mlp_spec(layer).kind == "moe":
            parts.append((layer, "mlp"))
    return parts


def calibration_tokens(folder: Path, text: Path, vocab_size: int) -> Tensor:
    """Token ids [windows, length] of a text. Raises UserError where there are none to be had."""
    quiet_libraries()
    try:
        text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--calibrate {text} cannot be read: {error}") from error
    try:
        load_tokenizer(folder)
    except Exception as error:  # transformers raises what it likes where there is none
        missing = f"--calibrate {text}: {folder} has no tokenizer to read it with. Add its files."
        raise UserError(refusal(folder, error, missing)) from error
    return windows(folder, text, vocab_size)[0]


@torch.no_grad()
def mean_gates(model: PreTrainedModel, ids: Tensor, quiet: bool = False) -> Gates:
    """Mean over tokens of every soft gate; of an expert, 0 where it was not chosen.

    `ids` [windows, length]. Raises Corrupt where gates are not finite.
    """
    sums: dict[Part, Tensor] = {}

    def add(part: Part) -> Callable[..., None]:
        def hook(router: torch.nn.Module, inputs: Any, output: Any) -> None:
            total_E = _total(router, output)
            sums[part] = sums[part] + total_E if part in sums else total_E

        return hook

    assert isinstance(model.config, RoutedLlamaConfig)
    routers = {part: router_of(model, part) for part in frozen_parts(model.config)}
    hooks = [router.register_forward_hook(add(part)) for part, router in routers.items()]
    with Progress("calibrate", ids.numel(), "tokens", quiet) as progress:
        for window in ids:
            model(window[None], use_cache=False)
            progress.advance(window.numel())
    for handle in hooks:
        handle.remove()
    for (layer, part), total_E in sums.items():
        if not total_E.isfinite().all():
            raise Corrupt(f"gates of layer {layer}, {part}, are not finite on the text.")
    return {part: tuple((total_E / ids.numel()).tolist()) for part, total_E in sums.items()}


def router_of(model: PreTrainedModel, part: Part) -> torch.nn.Module:
    """The router of a layer's attention or mlp."""
    layer, name = part
    block: Any = model.model.layers[layer]
    router: torch.nn.Module = (block.self_attn if name == "attention" else block.mlp).router
    return router


def _total(router: torch.nn.Module, output: Any) -> Tensor:
    """Each expert's gate [E] summed over the tokens of a pass, in float64."""
    if isinstance(router, SoftRouter):
        load: RoutingLoad = output[1]
        return load.probability.double()
    assert isinstance(router, ExpertRouter)
    indices_TK, weights_TK, load = output[:3]
    total_E = torch.zeros_like(load.counts, dtype=torch.float64)
    return total_E.index_add_(0, indices_TK.flatten(), weights_TK.flatten().double())


def freeze(model: PreTrainedModel, gates: Gates) -> None:
    """Replace what the routers of these parts decide: every token gets every expert, by its gate.

    What they report of their load stays what they would have done.
    """
    for part, gate in gates.items():
        router = router_of(model, part)
        freeze_one = _frozen_heads if isinstance(router, SoftRouter) else _frozen_experts
        router.forward = freeze_one(router, torch.tensor(gate))


def _frozen_heads(router: Any, gate_E: Tensor) -> Callable[..., Any]:
    decide = router.forward
    gate_N = gate_E.repeat_interleave(router.heads_in_a_row).repeat(router.repeats)

    def forward(*inputs: Any) -> tuple[Tensor, RoutingLoad]:
        gate_TN, load = decide(*inputs)
        return gate_N.to(gate_TN).expand_as(gate_TN), load

    return forward


def _frozen_experts(router: Any, gate_E: Tensor) -> Callable[..., Any]:
    decide = router.forward
    every_E = torch.arange(len(gate_E))

    def forward(*inputs: Any) -> tuple[Tensor, Tensor, RoutingLoad]:
        indices_TK, weights_TK, load = decide(*inputs)[:3]
        shape = len(indices_TK), len(gate_E)
        every_TE = every_E.to(indices_TK).expand(shape).contiguous()
        return every_TE, gate_E.to(weights_TK).expand(shape).contiguous(), load

    return forward
