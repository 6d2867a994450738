"""A tuning at work in a model, and eyes on its routers: both leave no trace when they end.

    with tuned(model, tuning, scale=0.5):
        model.generate(…)
    with watching(model, found, see):   # see(site's number, indices, weights, chosen)
        model(ids)

What torch.compile made without them is made again. T tokens, E experts, K chosen.
"""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe.errors import UserError
from moe.model.router import CalibratedRouter, ExpertRouter, NormRouter, SoftRouter
from moe.model.steering import ALWAYS, Steering
from moe.model.union import Choice
from moe.tune.families import FAMILIES, OURS, Site, model_type, sites
from moe.tune.foreign import check, override
from moe.tune.tuning import Edit, Semantics, Tuning

See = Callable[[int, Tensor, Tensor, Tensor | None], None]


@contextlib.contextmanager
def tuned(model: nn.Module, tuning: Tuning | None, scale: float | None = None) -> Iterator[None]:
    """The model with a tuning, at its own scale unless another is given; without one as it is.

    A copy of the model that is made inside keeps the tuning.

    Raises UserError where the tuning does not fit the model, or another one is at work in it.
    """
    if tuning is None:
        yield
        return
    scale = tuning.scale if scale is None else scale
    if not 0 <= scale <= 1:
        raise UserError(f"scale={scale} must be between 0 and 1.")
    found = sites(model)
    tuning.check(found)
    with contextlib.ExitStack() as stack:
        stack.callback(_recompile)  # last of all
        for site, steering in steerings(tuning, found, scale):
            stack.enter_context(_steered(model, site, steering))
        _recompile()
        yield


def steerings(
    tuning: Tuning, found: Sequence[Site], scale: float
) -> Iterator[tuple[Site, Steering]]:
    """What each site with an edit is told; nothing at scale 0."""
    for site in found:
        edits = [e for e in tuning.experts if (e.layer, e.part) == (site.layer, site.part)]
        if edits and scale > 0:
            yield site, steering_of(edits, site, tuning.semantics, scale)


def steering_of(edits: Sequence[Edit], site: Site, semantics: Semantics, scale: float) -> Steering:
    """The vectors of one router. Scales act as `Tuning` says."""
    first, second = torch.zeros(site.experts), torch.zeros(site.experts)
    gain_E = torch.ones(site.experts)
    apart = site.selection_bias
    for edit in edits:
        gain = edit.amount if edit.kind == "gain" else 0.0
        gain_E[edit.expert] = 1 + scale * (gain - 1)
        # what is forced keeps the weight of its own score
        place = second if edit.kind == "force" or apart else first
        place[edit.expert] = addend(edit, scale)
    if semantics.startswith("post_"):
        return Steering(gain_E=gain_E, renormalise=semantics == "post_renorm")
    if semantics == "pre_topk":
        return Steering(top_k_E=first + second)
    return Steering(
        logits_E=first if bool(first.any()) else None,
        select_E=second if bool(second.any()) else None,
    )


def addend(edit: Edit, scale: float) -> float:
    """What an edit adds to an expert's logit, or to what it is chosen by."""
    if edit.kind == "bias":
        return scale * edit.amount
    off = -ALWAYS if scale == 1 else max(math.log1p(-scale), -ALWAYS)
    return -off if edit.kind == "force" else off


@contextlib.contextmanager
def _steered(model: nn.Module, site: Site, steering: Steering) -> Iterator[None]:
    router: Any = model.get_submodule(site.module)
    if any(isinstance(key, _Mark) for key in router._forward_hooks.values()) or (
        isinstance(router, OURS) and router.steering is not None
    ):
        raise UserError(
            f"another tuning is at work in {site.module}: end it first, or put the experts of both "
            "into one."
        )
    device = next(router.parameters(), torch.empty(0)).device
    moved: Any = (t.to(device) if isinstance(t, Tensor) else t for t in steering)
    steering = Steering(*moved)
    if isinstance(router, OURS):
        router.steering = steering
        try:
            yield
        finally:
            del router.steering  # the class says None
        return
    family = FAMILIES[model_type(model)]
    places = check(router, family, site.module)
    hook = _Mark(override(router, family, places, steering))
    handle = router.register_forward_hook(hook, prepend=True)  # before eyes that were there
    block: Any = model.get_submodule(site.module.rpartition(".")[0])
    beside = block.register_forward_hook(hook.passed)
    try:
        yield
    finally:
        handle.remove()
        beside.remove()
    if hook.passed_by and not hook.called:
        raise UserError(
            f"{site.module} was never called while its block ran: something computes "
            f"{type(block).__name__} without its router, so the tuning did nothing. Load the model "
            "without kernels that replace whole blocks."
        )


class _Mark:
    """A hook that can be told from others."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook = hook
        self.called = self.passed_by = False  # no counts: compiled code would be made for each

    def __call__(self, *given: Any) -> Any:
        self.called = True
        return self.hook(*given)

    def passed(self, *given: Any) -> None:
        """The block around the router has run."""
        self.passed_by = True


@contextlib.contextmanager
def watching(model: nn.Module, found: Sequence[Site], see: See) -> Iterator[None]:
    """Call `see` after every router's call, with what its layer goes on with.

    It gets the site's number in `found`, indices [T, K], weights [T, K], and which of them are on
    (bool [T, K], None for all): a gate per head comes with every head's index.
    """
    family = FAMILIES.get(model_type(model))
    with contextlib.ExitStack() as stack:
        stack.callback(_recompile)
        for number, site in enumerate(found):
            router: Any = model.get_submodule(site.module)
            if isinstance(router, OURS):
                read = _reader(router)
            else:
                assert family is not None
                places = check(router, family, site.module)
                read = _foreign_reader(places.weights, places.indices)
            hook = _watcher(number, read, see)
            stack.callback(router.register_forward_hook(hook).remove)
        _recompile()
        yield


Reading = tuple[Tensor, Tensor, Tensor | None]


def _watcher(number: int, read: Callable[[Any], Reading], see: See) -> Callable[..., None]:
    @torch.compiler.disable
    @torch.no_grad()
    def hook(module: nn.Module, arguments: Any, output: Any) -> None:
        indices, weights, chosen = read(output)
        see(number, indices, weights.detach(), chosen)

    return hook


def _foreign_reader(weights: int, indices: int) -> Callable[[Any], Reading]:
    return lambda output: (output[indices], output[weights], None)


def _reader(router: nn.Module) -> Callable[[Any], Reading]:
    """How to read the output of one of our routers."""

    def read(output: Any) -> Reading:
        if isinstance(output, Choice):
            return _all(output.weights_TE, output.mask_TE)
        if isinstance(router, ExpertRouter):
            return output[0], output[1], None
        gate = output[0]
        if isinstance(router, SoftRouter):
            repeats = router.heads_in_a_row
            return _all(gate[:, : len(router.weight) * repeats : repeats], None)
        if isinstance(router, NormRouter | CalibratedRouter):
            gate = gate[:, :: router.group_size]
        return _all(gate, gate != 0)

    return read


def _all(weights_TE: Tensor, chosen_TE: Tensor | None) -> Reading:
    indices_E = torch.arange(weights_TE.shape[1], device=weights_TE.device)
    return indices_E.expand_as(weights_TE), weights_TE, chosen_TE


def _recompile() -> None:
    """Forget what was compiled: hooks are not among the things that are looked at again."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
