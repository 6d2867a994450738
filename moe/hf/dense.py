"""A RoutedLlama whose routers leave nothing out, as a plain model of the family it came from.

config, plan, notes = dense_model(routed_config, plan)
"""

from transformers import CONFIG_MAPPING, PreTrainedConfig

from moe.errors import UserError
from moe.hf.families import FAMILIES, carried, computes_differently, routed_config
from moe.model import RoutedLlamaConfig
from moe.upcycle.expression import Expression

Plan = dict[str, Expression]


def dense_model(
    config: RoutedLlamaConfig, plan: Plan
) -> tuple[PreTrainedConfig, Plan, list[str]]:  # fmt: skip
    """Config and tensors of the dense model, and notes for the receipt.

    Raises UserError with all that stands in the way.
    """
    rest, notes, found = dict(plan), list[str](), list[str]()
    for layer in range(config.num_hidden_layers):
        for dissolve in (dissolve_attention, dissolve_mlp):
            problem, note = dissolve(config, layer, rest)
            found += [problem] if problem else []
            notes += [note] if note else []
    if config.tie_word_embeddings:
        rest.pop("lm_head.weight", None)
    family, misfits = _family(config)
    found += [f"{misfit} has no place in a {family} model." for misfit in misfits]
    if found:
        raise UserError(
            "this model is not a dense one in another form:\n"
            + "\n".join(f"  {problem}" for problem in dict.fromkeys(found))
            + "\n--to hf and --to remote-code hold every RoutedLlama."
        )
    return _build(config, family), rest, list(dict.fromkeys(notes))


def dissolve_attention(config: RoutedLlamaConfig, layer: int, plan: Plan) -> tuple[str, str]:
    """Make one layer's attention dense, its tensors in `plan` with it.

    Returns what stands in the way and what is to be said of it, each empty where there is nothing.
    """
    spec = config.attention_spec(layer)
    if spec.kind == "dense":
        return "", ""
    if spec.kind != "moh":
        return f"attention of kind {spec.kind} has no dense form.", ""
    if spec.router == "two_stage":
        return "attention.router=two_stage gives heads weights that depend on the token.", ""
    grouped = spec.granularity == "kv_group"
    units = config.num_key_value_heads if grouped else config.num_attention_heads
    assert units is not None
    routed = len(spec.routed_heads(units))
    if spec.top_k < routed:
        return f"attention.top_k={spec.top_k} leaves out {routed - spec.top_k} of {units}.", ""
    if spec.routed_scale != 1:
        return f"attention.routed_scale={spec.routed_scale:g} weighs heads differently.", ""
    return "", "every head is on with weight 1, so the router is left out"


def dissolve_mlp(config: RoutedLlamaConfig, layer: int, plan: Plan) -> tuple[str, str]:
    """As dissolve_attention, of a layer's MLP."""
    spec = config.mlp_spec(layer)
    if spec.kind != "dense":
        return f"MLPs of kind {spec.kind} have no dense form.", ""
    return "", ""


def _family(config: RoutedLlamaConfig) -> tuple[str, list[str]]:
    """The family to write, and what of the config it cannot say: its own, or the first that can."""
    own = config.source_model_type
    families = [own] if own in FAMILIES else list(FAMILIES)
    misfits = {str(family): _misfits(config, str(family)) for family in families}
    best = min(misfits, key=lambda family: len(misfits[family]))
    return best, misfits[best]


def _misfits(config: RoutedLlamaConfig, family: str) -> list[str]:
    try:
        back = routed_config(_build(config, family))
    except Exception as error:  # transformers raises what it likes over a field it does not like
        return [str(error).strip().split("\n")[-1].strip()]
    return computes_differently(config, back)


def _build(config: RoutedLlamaConfig, family: str) -> PreTrainedConfig:
    fields = {**carried(config, CONFIG_MAPPING[family]), "head_dim": config.head_dim}
    if "qwen" in family:
        fields["use_sliding_window"] = "sliding_attention" in (config.layer_types or ())
    return CONFIG_MAPPING[family](**fields)
