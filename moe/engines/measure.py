"""What a rank holds, by class, and what it sends in a step: measured on an engine that runs.

The same functions measure real ranks and imagined ones (`imagine`), which is what `moe plan` does.
"""

import contextlib
import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe.model.experts import Experts, RoutedMLP
from moe.parallel.traffic import Collective, Wire

Forward = Callable[[], Tensor]
"""One micro-batch through the engine, to the loss that is to be differentiated."""


@dataclass(frozen=True, slots=True)
class Share:
    """Bytes, and how many of them are the experts'."""

    total: int
    experts: int


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of one rank; nothing is counted twice within a class.

    Each class is the storage its tensors lie in, padding included. Activations are what autograd
    keeps of a micro-batch, parameters left out. Dispatch is what one layer's exchange allocates on
    its way to the experts and back: one layer's at a time, and in part kept as activations.
    """

    weights: Share  # parameters and buffers
    gradients: Share  # after the last backward pass of a step
    moments: Share  # and Adam's counters
    activations: Share
    dispatch: int
    accumulated: int  # gradients that wait for the step's last micro-batch, whole; 0 where none do
    peak: int  # the most of all of this, and of what comes and goes, that there is at once
    first: Counter[Collective] = field(repr=False)  # of a micro-batch that is not the step's last
    last: Counter[Collective] = field(repr=False)  # and of the last
    host: int = 0  # in the host's memory, where an engine offloads to it


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages that tensors lie in, each once."""
    storages = (local(t).untyped_storage() for t in tensors)
    return sum({s._cdata: s.nbytes() for s in storages}.values())


def measure(engine: Any, forward: Forward, accumulates: bool) -> Footprint:
    """Run a step of two micro-batches, or of one, and look at what there is.

    The engine is one of torch's parameters and optimiser: `engine.model`, `engine.optimizer`.
    """
    model, optimizer = engine.model, engine.optimizer
    engine.prepare_moments()
    state = {p: list(held.values()) for p, held in optimizer.state.items()}
    weights = [*model.named_parameters(), *model.named_buffers()]
    moments = [(n, t) for n, p in model.named_parameters() for t in state.get(p, [])]
    accumulated, first, last, kept = 0, Wire(), Wire(), Kept(model)
    with LiveBytes() as live:
        live.count(t for _, t in (*weights, *moments))
        if accumulates:
            with first:
                engine.backward(forward(), False)
            accumulated = storage_bytes(_waiting(model))
        with last, kept:
            loss = forward()
        activations = kept.share()
        with last:
            engine.backward(loss, True)
    gradients = [(n, p.grad) for n, p in model.named_parameters() if p.grad is not None]
    routed = [m.dispatcher for m in model.modules() if isinstance(m, RoutedMLP)]
    exchanges = [getattr(dispatcher, "inner", dispatcher) for dispatcher in routed]
    return Footprint(
        weights=_share(weights),
        gradients=_share(gradients),
        moments=_share(moments),
        activations=activations,
        dispatch=max((getattr(exchange, "buffers", 0) for exchange in exchanges), default=0),
        accumulated=accumulated,
        peak=live.peak,
        first=Counter(first.calls),
        last=Counter(last.calls),
    )


def _share(named: list[tuple[str, Tensor]]) -> Share:
    """FSDP2 reduces several gradients into one storage: an expert's part of it is its own size."""
    experts = [local(t) for n, t in named if ".experts." in n]
    others = {local(t).untyped_storage()._cdata for n, t in named if ".experts." not in n}
    shared = [t for t in experts if t.untyped_storage()._cdata in others]
    alone = [t for t in experts if t.untyped_storage()._cdata not in others]
    return Share(storage_bytes(t for _, t in named), storage_bytes(alone) + sum(map(_size, shared)))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _waiting(model: nn.Module) -> Iterator[Tensor]:
    """Gradients that were not reduced yet, which FSDP2 keeps whole and in the reduction's dtype."""
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        group = module._get_fsdp_state()._fsdp_param_group
        for parameter in group.fsdp_params if group else ():
            gradient = parameter.unsharded_accumulated_grad
            if gradient is None and hasattr(parameter, "_unsharded_param"):
                gradient = parameter._unsharded_param.grad
            if gradient is not None:
                yield gradient
    if not isinstance(model, FSDPModule):
        yield from (p.grad for p in model.parameters() if p.grad is not None)


class Kept:
    """What autograd keeps of what ran while this was on, parameters left out: each storage once."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # weak: what a part of the graph kept that nothing needs is gone by the end
        self._all: dict[int, tuple[StorageWeakRef, int, bool]] = {}
        self._parameters: set[int] = set()
        self._depth = 0
        self._stack = contextlib.ExitStack()

    def share(self) -> Share:
        """Of what is still there."""
        found = [(size, ours) for key, (storage, size, ours) in self._all.items()
                 if key not in self._parameters and not storage.expired()]  # fmt: skip
        return Share(sum(size for size, _ in found), sum(size for size, ours in found if ours))

    def __enter__(self) -> "Kept":
        for module in self.model.modules():
            # what a module holds while it runs: FSDP2 has gathered it by then
            hook = module.register_forward_pre_hook(self._look)
            self._stack.callback(hook.remove)
            if isinstance(module, Experts):
                for handle in (
                    module.register_forward_pre_hook(self._enter),
                    module.register_forward_hook(self._leave, always_call=True),
                ):
                    self._stack.callback(handle.remove)
        self._stack.enter_context(
            torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _look(self, module: nn.Module, _: object) -> None:
        for parameter in module.parameters():  # some take their children's without calling them
            held = getattr(parameter, "_local_tensor", parameter)
            self._parameters.add(held.untyped_storage()._cdata)

    def _enter(self, *_: object) -> None:
        self._depth += 1

    def _leave(self, *_: object) -> None:
        self._depth -= 1

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
        _, _, ours = self._all.get(storage._cdata, (None, 0, False))
        reference = StorageWeakRef(storage)
        self._all[storage._cdata] = reference, storage.nbytes(), ours or self._depth > 0
        return tensor


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operations under it made and that are still alive; the most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref] = {}

    def __enter__(self) -> "LiveBytes":
        resize = torch.UntypedStorage.resize_
        self._resize = resize

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            found = resize(storage, size)
            if storage._cdata in self._sizes:  # FSDP2 frees what it gathered without a word
                self._set(storage._cdata, size)
            return found

        torch.UntypedStorage.resize_ = resized  # type: ignore
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore
        super().__exit__(*error)

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = operation(*args, **(kwargs or {}))
        self.count(t for t in tree_leaves(found) if isinstance(t, Tensor))
        return found

    def count(self, tensors: Iterable[Tensor]) -> None:
        """Take these into account."""
        for tensor in tensors:
            storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
            key = storage._cdata
            if key not in self._sizes:
                gone = functools.partial(self._drop, key)
                self._references[key] = weakref.ref(storage, gone)
                self._set(key, storage.nbytes())

    def _set(self, key: int, size: int) -> None:
        self.now += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.peak = max(self.peak, self.now)

    def _drop(self, key: int, _: object) -> None:
        self.now -= self._sizes.pop(key, 0)
        self._references.pop(key, None)
