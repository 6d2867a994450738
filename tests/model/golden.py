"""The layer of the golden numbers: weights and inputs by formula, no random generator.

layer = attention(kind="moh", shared_heads=[0, 1], top_k=2); output, load = attend(layer)
"""

from typing import Any

import torch

from moe.model import RoutedLlamaConfig
from moe.model.attention import RoutedAttention
from moe.model.llama import LlamaRotaryEmbedding, RoutedDecoderLayer

HIDDEN, HEADS, GROUPS, HEAD_DIM, TOKENS = 8, 6, 2, 2, 5


def weight(seed: int, rows: int, columns: int) -> torch.Tensor:
    """0.5·sin(1 + 0.7r + 1.3c + 2.1a + 1.7rc)."""
    r = torch.arange(rows, dtype=torch.float64)[:, None]
    c = torch.arange(columns, dtype=torch.float64)
    return 0.5 * torch.sin(1 + 0.7 * r + 1.3 * c + 2.1 * seed + 1.7 * r * c)


def inputs() -> torch.Tensor:
    t = torch.arange(TOKENS, dtype=torch.float64)[:, None]
    j = torch.arange(HIDDEN, dtype=torch.float64)
    return torch.cos(0.5 + 1.9 * (t + 1) * (j + 1) + 0.3 * t * t)[None]


def config(**fields: Any) -> RoutedLlamaConfig:
    return RoutedLlamaConfig(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=HEAD_DIM,
        num_hidden_layers=1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        attn_implementation="eager",
        **fields,
    )


def attention(**spec: Any) -> RoutedAttention:
    layer: Any = RoutedDecoderLayer(config(attention=spec or None), 0).self_attn.double()
    for seed, projection in enumerate((layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj)):
        projection.weight.data = weight(seed, *projection.weight.shape)
    return layer


def attend(layer: RoutedAttention, cache: Any = None, steps: slice = slice(None)) -> Any:
    """Output [S, H] and load of the layer on the inputs, or on some of them after a cache."""
    x = inputs()[:, steps]
    positions = torch.arange(TOKENS)[None, steps]
    embeddings = LlamaRotaryEmbedding(layer.config)(x, positions)
    total = TOKENS if steps.stop is None else steps.stop
    causal = torch.full((total, total), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    causal = causal[:, :, steps]
    output, _, load = layer(x, embeddings, causal, places_BS=positions, cache=cache)
    return output[0], load


def close(actual: torch.Tensor, expected: list[float], tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(
        actual.double(), torch.tensor(expected, dtype=torch.float64), atol=tolerance, rtol=0
    )
