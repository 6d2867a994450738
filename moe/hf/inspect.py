"""What a model folder is, from its config and receipt alone: no weights are read."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from moe.checkpoint.manifest import Manifest, is_complete
from moe.hf.families import routed_config
from moe.hf.native import HOMES, from_native
from moe.model import AttentionSpec, RoutedLlamaConfig
from moe.model.accounting import flops_per_token, parameter_counts
from moe.model.spec import (
    BAMAttention,
    DenseMLP,
    MoEMLP,
    MoHAttention,
    UoEAttention,
    UoEMLP,
    routed_on,
)
from moe.upcycle.receipt import Receipt
from moe.upcycle.source import read_config

CONTEXT = 1024  # tokens of a sequence, for the FLOPs of its attention


def inspect(folder: Path) -> dict[str, Any]:
    """Architecture, parameters, the routing of each layer, and the receipt, ready for JSON."""
    source = read_config(folder)
    config = routed(source)
    receipt = Receipt.read(folder)
    if is_complete(folder):  # a training checkpoint carries its model's history along
        receipt = Receipt(steps=checkpoint_steps(Manifest.read(folder)))
    return {
        "model_type": source.model_type,
        **sizes(config),
        "layers": [_layer(config, i) for i in range(config.num_hidden_layers)],
        "receipt": asdict(receipt) if receipt else None,
    }


def routed(config: PreTrainedConfig) -> RoutedLlamaConfig:
    """The config as the accounting reads it. Raises UserError of an architecture that we do not
    know.
    """
    return from_native(config) if config.model_type in HOMES else routed_config(config)


def sizes(config: RoutedLlamaConfig) -> dict[str, float]:
    """Parameters, and FLOPs to train on a token of a sequence of CONTEXT."""
    total, active = parameter_counts(config)
    return {
        "total_parameters": total,
        "active_parameters": active,
        "flops_per_token": flops_per_token(config, CONTEXT),
    }


def checkpoint_steps(manifest: Manifest) -> list[dict[str, Any]]:
    """The history of a checkpoint as steps of a receipt: its model's, then the training."""
    progress = manifest.progress
    trained = {
        "recipe": "train",
        "options": {"steps": progress.step, "consumed_samples": progress.consumed_samples},
        "config": progress.config,
        "versions": progress.versions,
    }
    return [*progress.origin, trained]


def _layer(config: RoutedLlamaConfig, index: int) -> dict[str, Any]:
    mlp = config.mlp_spec(index)
    experts, top_k = (1, 1) if isinstance(mlp, DenseMLP) else (mlp.num_experts, mlp.top_k)
    found: dict[str, Any] = {"kind": mlp.kind, "experts": experts, "top_k": top_k}
    if isinstance(mlp, MoEMLP) and mlp.limited:
        found |= {"groups": mlp.num_groups, "top_groups": mlp.top_groups}
    if isinstance(mlp, UoEMLP) and mlp.mode == "budget":
        found["mean"] = mlp.mean_experts
    return {"attention": _attention(config, config.attention_spec(index)), "mlp": found}


def _attention(config: RoutedLlamaConfig, spec: AttentionSpec) -> dict[str, Any]:
    """What competes in an attention: heads, KV groups, or whole attentions."""
    experts = top_k = config.num_attention_heads
    shared, mean = 0, {}
    if isinstance(spec, MoHAttention):
        if spec.granularity == "kv_group":
            assert config.num_key_value_heads is not None
            experts = config.num_key_value_heads
        top_k, shared = spec.top_k, len(spec.shared_heads)
        if spec.budget == "threshold":
            mean = {"mean": routed_on(spec)}
    elif isinstance(spec, BAMAttention):
        experts = top_k = spec.num_experts
    elif isinstance(spec, UoEAttention):
        experts, top_k = spec.num_experts, spec.top_k
    return {"kind": spec.kind, "experts": experts, "top_k": top_k, "shared": shared, **mean}


def describe(folder: Path, found: dict[str, Any]) -> str:
    """The same for people: equal layers on one line, the receipt's steps in order."""
    lines, receipt = describe_model(folder, found), found["receipt"]
    if receipt is None:
        return "\n".join([*lines, "  no receipt"])
    for number, step in enumerate(receipt["steps"], 1):
        options = ", ".join(f"{k}={v}" for k, v in step.get("options", {}).items() if v is not None)
        lines.append(f"  step {number}: {step['recipe']} ({options})")
    if verified := receipt["verification"]:
        difference = verified["relative_difference"]
        lines.append(f"  verification: {verified['status']}, relative difference {difference:.1e}")
    return "\n".join(lines)


def describe_model(folder: Path, found: dict[str, Any]) -> list[str]:
    """Its size, then its layers, on one line those that differ in means at most."""
    total, active = found["total_parameters"], found["active_parameters"]
    lines = [
        f"{folder}: {found['model_type']}, {total / 1e6:.1f} M parameters, "
        f"{active / 1e6:.1f} M active per token ({active / total:.0%}), "
        f"{found['flops_per_token'] / 1e6:.0f} MFLOPs to train on a token of {CONTEXT}"
    ]
    start = 0
    layers = found["layers"]
    for index in range(1, len(layers) + 1):
        if index == len(layers) or _but_means(layers[index]) != _but_means(layers[start]):
            span = f"{start}" if index == start + 1 else f"{start}-{index - 1}"
            lines.append(f"  layers {span:>7}: {_describe_layers(layers[start:index])}")
            start = index
    return lines


def _but_means(layer: dict[str, Any]) -> dict[str, Any]:
    """A layer, its means left out: each layer has its own, where one threshold is for all."""
    return {
        name: {k: v is not None if k == "mean" else v for k, v in part.items()}
        for name, part in layer.items()
    }


def _describe_layers(layers: list[dict[str, Any]]) -> str:
    attention, mlp = (
        {**layers[0][name], "means": [layer[name].get("mean") for layer in layers]}
        for name in ("attention", "mlp")
    )
    heads = f"dense attention, {attention['experts']} heads"
    if attention["kind"] == "moh":
        heads = (
            f"moh, {attention['shared']} shared + {_number(attention)} routed of "
            f"{attention['experts']}"
        )
    elif attention["kind"] != "dense":
        heads = f"{attention['kind']}, {attention['top_k']} of {attention['experts']} attentions"
    experts = "dense MLP"
    if mlp["kind"] != "dense":
        experts = f"{mlp['kind']}, {_number(mlp)} of {mlp['experts']} experts"
        if "groups" in mlp:
            experts += f" in {mlp['top_groups']} of {mlp['groups']} groups"
    return f"{heads}; {experts}"


def _number(part: dict[str, Any]) -> str:
    """How many of a part's units are on per token, where no number is fixed their mean."""
    if "mean" not in part:
        return str(part["top_k"])
    low, high = (f"{bound:.3g}" for bound in (min(part["means"]), max(part["means"])))
    mean = f"a mean of {sum(part['means']) / len(part['means']):.3g}"
    return mean if low == high else f"{mean} ({low} to {high})"
