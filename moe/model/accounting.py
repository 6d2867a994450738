"""Parameters, FLOPs and cache of a RoutedLlama, from its config alone."""

from typing import NamedTuple

from moe.model.attention import widened
from moe.model.config import RoutedLlamaConfig
from moe.model.spec import (
    AttentionSpec,
    BAMAttention,
    DenseMLP,
    MLPSpec,
    MoHAttention,
    UoEAttention,
    routed_on,
)


class ParameterCounts(NamedTuple):
    """`active` is what one token uses, on average where budgets are means: its experts, its heads'
    rows of the output projection.
    """

    total: int
    active: int


def parameter_counts(config: RoutedLlamaConfig) -> ParameterCounts:
    """Parameters of the model, tied embeddings counted once."""
    hidden, vocabulary = config.hidden_size, config.vocab_size
    outside = vocabulary * hidden * (1 if config.tie_word_embeddings else 2) + hidden
    norms = hidden * (2 if config.block == "sequential" else 1)
    total = active = outside
    for layer in range(config.num_hidden_layers):
        for part in (
            attention_parameters(config, config.attention_spec(layer)),
            mlp_parameters(config, config.mlp_spec(layer)),
        ):
            total, active = total + part.total, active + part.active
        total, active = total + norms, active + norms
    return ParameterCounts(total, active)


def attention_parameters(config: RoutedLlamaConfig, spec: AttentionSpec) -> ParameterCounts:
    """Of one attention. MoH needs every key and value projection, o_proj only in part, and so the
    queries' where the router is calibrated, for it reads none; of a union of experts a token uses
    its experts' parts of all four; BAM uses everything.
    """
    wide = widened(config, spec)
    hidden, head_dim = config.hidden_size, config.head_dim
    heads, kv_heads = wide.num_attention_heads, wide.num_key_value_heads
    assert head_dim is not None and kv_heads is not None
    qkv = (heads + 2 * kv_heads) * head_dim * (hidden + bool(config.attention_bias))
    rows = heads * head_dim * hidden
    norms = 2 * head_dim * config.qk_norm
    if isinstance(spec, BAMAttention):
        norms = (heads + kv_heads) * head_dim * config.qk_norm
    always = bool(config.attention_output_bias) * hidden + norms
    if isinstance(spec, MoHAttention) and spec.router == "two_stage":
        shared = len(spec.shared_heads)
        always += hidden * (heads - shared + (shared + 2 if shared else 0))
    if isinstance(spec, MoHAttention) and spec.router == "calibrated":
        units = kv_heads if spec.granularity == "kv_group" else heads
        always += len(spec.routed_heads(units)) * (hidden + 1)
    if isinstance(spec, BAMAttention | UoEAttention):
        always += spec.num_experts * (hidden + getattr(spec, "router_bias", False))
    total = always + qkv + rows
    if isinstance(spec, UoEAttention):
        return ParameterCounts(total, always + (qkv + rows) * spec.top_k // spec.num_experts)
    on = active_heads(config, spec)
    used = on * head_dim * hidden
    if isinstance(spec, MoHAttention) and spec.router == "calibrated":
        used -= (heads - on) * head_dim * (hidden + bool(config.attention_bias))
    return ParameterCounts(total, always + qkv + round(used))


def active_heads(config: RoutedLlamaConfig, spec: AttentionSpec) -> float:
    """Query heads whose output a token uses, on average where a budget is a mean."""
    wide = widened(config, spec)
    heads, kv_heads = wide.num_attention_heads, wide.num_key_value_heads
    assert kv_heads is not None
    if isinstance(spec, UoEAttention):
        return heads * spec.top_k // spec.num_experts
    if isinstance(spec, MoHAttention):
        group = heads // kv_heads if spec.granularity == "kv_group" else 1
        return group * (len(spec.shared_heads) + routed_on(spec))
    return heads


def mlp_parameters(config: RoutedLlamaConfig, spec: MLPSpec) -> ParameterCounts:
    """Of one MLP; the selection bias is a buffer and not counted."""
    hidden = config.hidden_size
    if isinstance(spec, DenseMLP):
        inner = config.intermediate_size
        size = 3 * hidden * inner + bool(config.mlp_bias) * (2 * inner + hidden)
        return ParameterCounts(size, size)
    assert spec.intermediate_size is not None
    expert = 3 * hidden * spec.intermediate_size
    always = spec.num_experts * hidden + 3 * hidden * spec.shared_intermediate_size
    always += getattr(spec, "router_bias", False) * spec.num_experts
    used = round(min(routed_on(spec), spec.num_experts) * expert)
    return ParameterCounts(always + spec.num_experts * expert, always + used)


def flops_per_token(config: RoutedLlamaConfig, sequence_length: int) -> float:
    """Forward and backward FLOPs of one token in training: 6 per active weight in a matmul, 12 per
    head element and position in the attention core (no discount for causality, as is customary).

    A union's head sees the tokens that chose its expert, top_k / num_experts of them on average.
    """
    hidden, head_dim = config.hidden_size, config.head_dim
    assert head_dim is not None
    embeddings = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    weights = parameter_counts(config).active - embeddings + config.vocab_size * hidden
    scores = 0.0
    for layer in range(config.num_hidden_layers):
        spec = config.attention_spec(layer)
        seen = spec.top_k / spec.num_experts if isinstance(spec, UoEAttention) else 1.0
        scores += active_heads(config, spec) * seen
    return 6.0 * weights + 12.0 * scores * head_dim * sequence_length


def cache_bytes(config: RoutedLlamaConfig, length: int, itemsize: int) -> float:
    """Bytes of the keys and values that are kept of a sequence of so many tokens.

    BAM keeps those of each expert; a union's expert the sinks and its own tokens, top_k /
    num_experts of the others on average; a sliding window no more than it reaches back.
    """
    total = 0.0
    assert config.head_dim is not None and config.layer_types is not None
    for layer in range(config.num_hidden_layers):
        spec = config.attention_spec(layer)
        kv_heads = widened(config, spec).num_key_value_heads
        assert kv_heads is not None
        rows = float(length)
        if isinstance(spec, UoEAttention):
            sinks = min(length, spec.sink_tokens)
            rows = sinks + (length - sinks) * spec.top_k / spec.num_experts
        elif config.layer_types[layer] == "sliding_attention":
            assert config.sliding_window is not None
            rows = min(rows, config.sliding_window - 1)
        total += 2 * rows * kv_heads * config.head_dim * itemsize
    return total
