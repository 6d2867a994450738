"""The source walked layer by layer: the hidden states of all windows in memory, and one layer.

S tokens of a window, H hidden, D inputs of an output projection.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from moe.errors import Corrupt
from moe.model import RoutedLlamaConfig, RoutedLlamaForCausalLM
from moe.model.llama import RoutedDecoderLayer
from moe.progress import Progress
from moe.upcycle.calibrate.parts import MODULES, OUTPUTS, Name
from moe.upcycle.calibrate.ranks import Ranks, together
from moe.upcycle.expression import Expression, num_columns, num_rows
from moe.upcycle.recipes.conversion import config_of, unchanged
from moe.upcycle.source import Source, blocks

LOGITS = 2**24  # of these at a time


class Seen(NamedTuple):
    """One window in one part of a layer."""

    x_SH: Tensor  # the part's input, normed
    z_SD: Tensor  # the input of its output projection
    norm_S1: Tensor  # length of the residual stream before the norm


class Model:
    """A source's modules, each with its weights, in float32, only while it is used; with a config
    and a plan those of what is made of it.
    """

    def __init__(
        self,
        source: Source,
        device: torch.device,
        config: RoutedLlamaConfig | None = None,
        plan: Mapping[str, Expression] | None = None,
    ) -> None:
        self.name = str(source.folder) if plan is None else f"the mixture with {source.folder}"
        self.device = device
        self.config = config or config_of(source)
        self.plan = plan or unchanged(source)
        with torch.device("meta"):
            self.empty = RoutedLlamaForCausalLM(self.config).eval().requires_grad_(False)
        self.rotary = LlamaRotaryEmbedding(self.config).to(device)
        self._arguments: dict[tuple[int, str], dict[str, Any]] = {}

    def weight(self, name: str) -> Tensor:
        """A tensor of the plan in float32."""
        expression = self.plan[name]
        whole = expression.rows(0, num_rows(expression.shape)).view(expression.shape)
        return whole.to(self.device, torch.float32)

    @contextlib.contextmanager
    def layer(self, index: int) -> Iterator[RoutedDecoderLayer]:
        """A layer with its weights."""
        layer: Any = self.empty.model.layers[index]
        at = f"model.layers.{index}."
        names = [name for name in self.plan if name.startswith(at)]
        weights = {name.removeprefix(at): self.weight(name) for name in names}
        layer.load_state_dict(weights, assign=True)
        try:
            yield layer.requires_grad_(False)
        finally:
            layer.to("meta")

    def run(self, layer: RoutedDecoderLayer, index: int, x_SH: Tensor) -> Tensor:
        """What a layer makes of a window's hidden states [S, H]."""
        assert self.config.layer_types is not None
        arguments = self._layer_arguments(x_SH, self.config.layer_types[index])
        with _one_kind_of_attention(self.device):
            return layer(x_SH[None], **arguments)[0][0]

    def _layer_arguments(self, x_SH: Tensor, kind: str) -> dict[str, Any]:
        key = len(x_SH), kind
        if key not in self._arguments:
            x_BSH = x_SH.detach()[None]
            positions = torch.arange(len(x_SH), device=self.device)[None]
            masks = self.empty.model._masks(x_BSH, None, None, positions)
            self._arguments[key] = {
                "attention_mask": masks[kind],
                "position_embeddings": self.rotary(x_BSH, positions),
                "position_ids": positions,
                "places_BS": positions,
                "use_cache": False,
            }
        return self._arguments[key]

    def embed(self, ids_S: Tensor) -> Tensor:
        """Hidden states [S, H] before the first layer; only blocks of the matrix are read."""
        table: Expression = self.plan["model.embed_tokens.weight"]
        out_SH = torch.empty(len(ids_S), self.config.hidden_size)
        for start, stop in blocks(num_rows(table.shape), num_columns(table.shape), table.dtype):
            here_S = (ids_S >= start) & (ids_S < stop)
            if here_S.any():
                out_SH[here_S] = table.rows(start, stop)[ids_S[here_S] - start].float()
        return out_SH.to(self.device)

    def head(self) -> nn.Module:
        """The last norm and the language-model head, with weights."""
        tied = "lm_head.weight" not in self.plan or self.config.tie_word_embeddings
        weight = self.weight("model.embed_tokens.weight" if tied else "lm_head.weight")
        head = nn.Linear(1, 1, bias=False, device="meta")
        head.weight = nn.Parameter(weight, requires_grad=False)
        norm: Any = self.empty.model.norm
        norm.load_state_dict({"weight": self.weight("model.norm.weight")}, assign=True)
        return nn.Sequential(norm, head)


@contextlib.contextmanager
def _one_kind_of_attention(device: torch.device) -> Iterator[None]:
    """On a GPU torch's plain attention: the others' gradients are not the same bits every time."""
    if device.type != "cuda":
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield


def losses(
    head: nn.Module, x_SH: Tensor, ids_S: Tensor, reduction: str = "sum"
) -> Iterator[Tensor]:
    """Cross entropy of the next tokens, some of them at a time: summed over those, or of each."""
    vocabulary = head[1].weight.shape[0]  # type: ignore[index]
    step = max(1, LOGITS // vocabulary)
    for start in range(0, len(ids_S) - 1, step):
        stop = min(start + step, len(ids_S) - 1)
        logits = head(x_SH[start:stop])
        yield F.cross_entropy(
            logits, ids_S[start + 1 : stop + 1].to(logits.device), reduction=reduction
        )


@contextlib.contextmanager
def tapped(layer: RoutedDecoderLayer, parts: Sequence[Name]) -> Iterator[dict[Name, list[Seen]]]:
    """What goes into each of these parts of a layer, a window a call."""
    seen: dict[Name, list[Seen]] = {part: [] for part in parts}
    now: dict[str, Tensor] = {}
    handles = []

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            now[name] = inputs[0][0]

        return hook

    def finish(part: Name, norm: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            length_S1 = now[norm].norm(dim=-1, keepdim=True)
            seen[part].append(Seen(now[part], inputs[0].reshape(len(length_S1), -1), length_S1))

        return hook

    second = layer.post_attention_layernorm
    handles.append(layer.input_layernorm.register_forward_pre_hook(keep("first norm")))
    if second is not None:
        handles.append(second.register_forward_pre_hook(keep("second norm")))
    norms: dict[Name, str] = {
        "attention": "first norm",
        "mlp": "first norm" if second is None else "second norm",
    }
    for part in parts:
        module = getattr(layer, MODULES[part])
        handles.append(module.register_forward_pre_hook(keep(part)))
        output = getattr(module, OUTPUTS[part])
        handles.append(output.register_forward_pre_hook(finish(part, norms[part])))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class Stream:
    """Hidden states of all windows, moved on from layer to layer in place."""

    def __init__(
        self, model: Model, windows: Sequence[Tensor], ranks: Ranks, progress: Progress
    ) -> None:
        self.model, self.ranks, self.progress = model, ranks, progress
        self.states = [model.embed(ids) for ids in windows]

    @torch.no_grad()
    def advance(
        self, layer: RoutedDecoderLayer, index: int, parts: Sequence[Name]
    ) -> dict[Name, list[Seen]]:
        """Run a layer; returns what each of these parts of it saw. Raises Corrupt, on all ranks,
        where values are not finite.
        """
        return together(self.ranks, lambda: self._advance(layer, index, parts))

    def _advance(
        self, layer: RoutedDecoderLayer, index: int, parts: Sequence[Name]
    ) -> dict[Name, list[Seen]]:
        with tapped(layer, parts) as seen:
            for place, x_SH in enumerate(self.states):
                self.states[place] = self.model.run(layer, index, x_SH)
                require_finite(self.model, index, self.states[place])
                self.progress.advance(len(x_SH))
        return seen


def require_finite(model: Model, index: int, x_SH: Tensor) -> None:
    """Raise Corrupt naming the layer whose output is not finite."""
    if not x_SH.isfinite().all():
        raise Corrupt(
            f"{model.name}: layer {index} gives values that are not finite on the "
            "calibration text, computed in float32. Its weights are damaged: nothing is fitted."
        )
