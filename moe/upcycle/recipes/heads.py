"""Mixture of attention heads (MoH)."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from moe.errors import UserError, raise_all
from moe.model import RoutedLlamaConfig
from moe.model.spec import MoHAttention, to_dict
from moe.upcycle.recipes.seam import Purpose, Target, balance


@dataclass(frozen=True, kw_only=True, slots=True)
class MoH:
    """Attention heads that compete: `shared_heads` always on, `top_k` of the others per token."""

    name: ClassVar[str] = "moh"
    parts: ClassVar[tuple[str, ...]] = ("attention",)

    router: Literal["qnorm", "two_stage"] = "qnorm"
    shared_heads: int | None = None  # None: half of them
    top_k: int | None = None  # None: so that three quarters are active
    granularity: Literal["head", "kv_group"] = "head"
    purpose: Purpose = "train"

    def resolved(self, config: RoutedLlamaConfig, sources: int) -> Self:
        """With every default spelled out. Raises UserError where the numbers do not fit."""
        units = self._units(config)
        shared = units // 2 if self.shared_heads is None else self.shared_heads
        if not 0 <= shared < units:
            found = [
                f"--shared-heads {shared}: of {units} {self._noun}, 0 to {units - 1} can be shared."
            ]
            if self.top_k is not None and not 1 <= self.top_k <= units:
                found.append(f"--top-k {self.top_k} must be between 1 and {units}.")
            raise_all(found)
        top_k = max(1, round(0.75 * units) - shared) if self.top_k is None else self.top_k
        recipe = dataclasses.replace(self, shared_heads=shared, top_k=top_k)
        kv_heads = config.num_key_value_heads
        assert kv_heads is not None
        if problems := recipe.spec().problems(config.num_attention_heads, kv_heads):
            raise UserError("\n".join(problems))
        return recipe

    def spec(self) -> MoHAttention:
        """The attention of a converted layer, of a resolved recipe."""
        assert self.shared_heads is not None and self.top_k is not None
        return MoHAttention(
            router=self.router,
            shared_heads=tuple(range(self.shared_heads)),
            top_k=self.top_k,
            granularity=self.granularity,
            balance_coef=balance(self.purpose),
        )

    def apply(self, target: Target) -> str:
        """Route the heads; returns the statement, empty where inexact."""
        spec = self.spec()
        routed = self._units(target.config) - len(spec.shared_heads)
        every = spec.top_k == routed
        target.set_parts("attention", to_dict(spec))
        if spec.router == "two_stage":
            sizes = {"routed": routed}
            if spec.shared_heads:
                sizes |= {"shared": len(spec.shared_heads), "mix": 2}
            # zero rows make every weight exactly 1, but below k = R all heads would tie
            std = 0.0 if every else 1e-2 * target.config.hidden_size**-0.5
            for layer in target.layers:
                for name, size in sizes.items():
                    key = f"model.layers.{layer}.self_attn.router.{name}.weight"
                    target.draw_router(key, size, std)
        return "every head is on with weight 1" if every else ""

    def inexact(self, config: RoutedLlamaConfig) -> str:
        spec, units = self.spec(), self._units(config)
        shared = len(spec.shared_heads)
        return (
            f"{shared + spec.top_k} of {units} {self._noun} are on per token ({shared} always, "
            f"{spec.top_k} of {units - shared} chosen), the rest are left out"
        )

    @property
    def _noun(self) -> str:
        return "KV groups" if self.granularity == "kv_group" else "heads"

    def _units(self, config: RoutedLlamaConfig) -> int:
        """How many heads, or KV groups, there are to choose from."""
        grouped = config.num_key_value_heads if self.granularity == "kv_group" else None
        return grouped or config.num_attention_heads

    def warnings(self) -> tuple[str, ...]:
        return ()
