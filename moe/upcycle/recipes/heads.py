"""Mixture of attention heads (MoH)."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from moe.errors import raise_all
from moe.model import RoutedLlamaConfig
from moe.model.spec import MoHAttention, to_dict
from moe.upcycle.calibrate.parts import Budget, Measure, Part
from moe.upcycle.recipes.fitted import refit_statement
from moe.upcycle.recipes.seam import Purpose, Target, balance

SHARE = 0.75  # of the heads that are on, by default


@dataclass(frozen=True, kw_only=True, slots=True)
class MoH:
    """Attention heads that compete: `shared_heads` always on, `top_k` of the others per token.

    Router `calibrated` is fitted to text, and so are the shared heads where `shared` says so. Its
    `budget` threshold has `mean_heads` on per token on average and none shared; `layer` spends that
    mean unevenly over layers, each of which has its own number.
    """

    name: ClassVar[str] = "moh"
    parts: ClassVar[tuple[str, ...]] = ("attention",)

    router: Literal["qnorm", "two_stage", "calibrated"] | None = None  # None: qnorm
    shared_heads: int | None = None  # None: half of them, a quarter where the router is calibrated
    top_k: int | None = None  # None: so that three quarters are active
    shared: Literal["first", "calibrated"] | None = None  # None: as the router is
    budget: Budget | None = None  # of a calibrated router; None: threshold
    mean_heads: float | None = None  # of budgets threshold and layer; None: three quarters
    target: Measure | None = None  # of a calibrated router; None: loss
    refit: bool = False  # fit the output projection to the heads that are on
    granularity: Literal["head", "kv_group"] = "head"
    purpose: Purpose = "train"

    def fitted(self) -> Self:
        """What is meant where there is a text to fit to and no router was named."""
        return dataclasses.replace(self, router="calibrated")

    def resolved(self, config: RoutedLlamaConfig, sources: int) -> Self:
        """With every default spelled out. Raises UserError where the numbers do not fit."""
        recipe = self._with_defaults(self._units(config))
        problems = recipe._option_problems(self) or recipe._number_problems(self, config)
        raise_all(problems)
        return recipe

    def _with_defaults(self, units: int) -> Self:
        router = self.router or "qnorm"
        fitted = router == "calibrated"
        budget = (self.budget or "threshold") if fitted else None
        shared: int | None = self.shared_heads
        if shared is None:
            default = round(units / 4) if fitted else units // 2
            shared = 0 if budget == "threshold" else default
        mean, top_k = self.mean_heads, self.top_k
        if budget in ("threshold", "layer"):
            mean = float(round(SHARE * units)) if mean is None else mean
        elif top_k is None:
            top_k = max(1, round(SHARE * units) - shared)
        chosen: Literal["first", "calibrated"] = "first"
        if fitted and budget != "threshold":
            chosen = "calibrated"
        return dataclasses.replace(
            self,
            router=router,
            budget=budget,
            shared=self.shared or chosen,
            shared_heads=shared,
            mean_heads=mean,
            top_k=top_k,
            target=self.target or ("loss" if fitted or self.shared == "calibrated" else None),
        )

    def _option_problems(self, given: "MoH") -> list[str]:
        """Options that say nothing together."""
        found = []
        if self.router != "calibrated":
            wrong: dict[str, Any] = {"--budget": given.budget, "--mean-heads": given.mean_heads}
            wrong |= {"--refit": given.refit or None}
            if self.shared != "calibrated":
                wrong |= {"--target": given.target}
            found += [
                f"{option} {value if value is not True else ''}".strip()
                + f" is for --router calibrated, and the router is {self.router}. Leave it out, "
                "or give --router calibrated and --calibrate FILE."
                for option, value in wrong.items()
                if value is not None
            ]
        elif self.budget == "topk" and given.mean_heads is not None:
            found.append(
                f"--mean-heads {given.mean_heads:g} is for --budget threshold and layer: with topk "
                "give --shared-heads and --top-k."
            )
        elif self.budget != "topk" and given.top_k is not None:
            found.append(
                f"--top-k {given.top_k} is for --budget topk: with {self.budget} the mean is given,"
                " --mean-heads."
            )
        if self.budget == "threshold" and (given.shared == "calibrated" or given.shared_heads):
            option = f"--shared-heads {given.shared_heads}" if given.shared_heads else "--shared"
            found.append(
                f"{option} is not for --budget threshold, which needs no shared heads: one that "
                "always matters is always above it. Give --budget topk or layer."
            )
        return found

    def _number_problems(self, given: "MoH", config: RoutedLlamaConfig) -> list[str]:
        units, shared = self._units(config), self.shared_heads
        assert shared is not None
        if not 0 <= shared < units:
            found = [
                f"--shared-heads {shared}: of {units} {self._noun}, 0 to {units - 1} can be shared."
            ]
            if given.top_k is not None and not 1 <= given.top_k <= units:
                found.append(f"--top-k {given.top_k} must be between 1 and {units}.")
            return found
        if self.mean_heads is not None:
            least = shared + 1 if self.budget == "layer" else 0
            ok = least <= self.mean_heads <= units and self.mean_heads > 0
            if not ok:
                low = f"at least {least}" if least else "more than 0"
                return [
                    f"--mean-heads {self.mean_heads:g} must be {low} and at most {units}, the "
                    f"{self._noun} of a layer."
                ]
        kv_heads = config.num_key_value_heads
        assert kv_heads is not None
        found = self.spec().problems(config.num_attention_heads, kv_heads)
        return [text.replace("attention.top_k=", "--top-k ") for text in found]

    @property
    def reads_text(self) -> bool:
        """Whether the recipe is fitted to `--calibrate` text."""
        return self.router == "calibrated" or self.shared == "calibrated"

    def spec(self) -> MoHAttention:
        """The attention of a converted layer, of a resolved recipe; of a fitted one the provisional
        one, with numbers that are a layer's own still to come.
        """
        assert self.shared_heads is not None and self.router is not None
        threshold = self.budget == "threshold"
        top_k = self.top_k
        if self.budget == "layer":
            assert self.mean_heads is not None
            top_k = max(1, round(self.mean_heads) - self.shared_heads)
        return MoHAttention(
            router=self.router,
            shared_heads=tuple(range(self.shared_heads)),
            top_k=top_k or 0,
            budget="threshold" if threshold else "topk",
            mean_heads=(self.mean_heads or 0.0) if threshold else 0.0,
            granularity=self.granularity,
            balance_coef=balance(self.purpose),
        )

    def apply(self, target: Target) -> str:
        """Route the heads; returns the statement, empty where inexact."""
        spec, units = self.spec(), self._units(target.config)
        routed = units - len(spec.shared_heads)
        every = spec.budget == "topk" and spec.top_k == routed
        target.set_parts("attention", to_dict(spec))
        if self.reads_text:
            target.fit(self._part(units))
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
        return "every head is on with weight 1" if every and not self.refit else ""

    def _part(self, units: int) -> Part:
        assert self.shared_heads is not None and self.target is not None
        budget: Budget = self.budget or "topk"
        keep = float(self.shared_heads + self.top_k) if self.top_k else self.mean_heads
        assert keep is not None
        return Part(
            name="attention",
            units=units,
            keep=keep,
            measure=self.target,
            budget=budget,
            shared=self.shared_heads,
            first=self.shared == "first",
            routes=self.router == "calibrated",
            refit=self.refit,
            noun=self._noun,
        )

    def inexact(self, config: RoutedLlamaConfig) -> str:
        spec, units = self.spec(), self._units(config)
        shared = len(spec.shared_heads)
        if self.budget in ("threshold", "layer"):
            how = {
                "threshold": "those above one threshold for all layers",
                "layer": "a number of each layer's own",
            }[self.budget]
            text = f"{self.mean_heads:g} of {units} {self._noun} are on per token on average, {how}"
        else:
            text = (
                f"{shared + spec.top_k} of {units} {self._noun} are on per token ({shared} always, "
                f"{spec.top_k} of {units - shared} chosen)"
            )
        text += ", the rest are left out"
        return refit_statement(self, text)

    @property
    def _noun(self) -> str:
        return "KV groups" if self.granularity == "kv_group" else "heads"

    def _units(self, config: RoutedLlamaConfig) -> int:
        """How many heads, or KV groups, there are to choose from."""
        grouped = config.num_key_value_heads if self.granularity == "kv_group" else None
        return grouped or config.num_attention_heads

    def warnings(self) -> tuple[str, ...]:
        return ()
