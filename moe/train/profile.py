"""A trace of some steps: what the host and the device did, in named ranges.

tracer = Tracer(config, ranks, model)
tracer.at(step)       # before each step; the trace is written when the last one is over
tracer.close()

The loop names its own ranges, which cost a microsecond each; those inside the model are hooks that
exist while a trace is taken alone.
"""

import contextlib
import os
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from moe.config import RunConfig
from moe.parallel.world import Ranks

FOLDER = "profile"  # in the run folder
NAMES = {  # of what a model's modules do, by what their parents call them
    "self_attn": "attention",
    "mlp": "mlp",
    "router": "route",
    "experts": "experts",
    "shared_expert": "shared expert",
}


class Tracer:
    """Traces `profile.steps` on one rank, into `OUT/profile/step-A-B.rank-N.json.gz`, where A and B
    are the steps that it holds: of a run that ended between them and goes on there are two.
    """

    def __init__(self, config: RunConfig, ranks: Ranks, model: nn.Module) -> None:
        self.steps, self.device, self._model = config.profile.steps, ranks.device, model
        # hooks would have to be compiled into the layers
        self._inside = not config.train.compile
        self._folder, self._rank = config.out / FOLDER, ranks.rank
        self._trace: profile | None = None
        self._held: list[int] = []  # steps
        self._open = contextlib.ExitStack()  # of the step
        self._hooks = contextlib.ExitStack()

    def at(self, step: int) -> None:
        """Name what comes from here to the next call `step N`, if it is to be traced."""
        if self.steps is None:
            return
        self._open.close()
        first, last = self.steps
        if step > last:
            self.close()
        elif step >= first:
            if self._trace is None:
                self._start()
            self._held.append(step)
            self._open.enter_context(record_function(f"step {step}"))

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        if self._inside:
            for name, module in self._model.named_modules():
                self._watch(module, NAMES.get(name.rpartition(".")[2]))
        self._trace = profile(activities=activities)
        self._trace.start()

    def _watch(self, module: Any, name: str | None) -> None:
        """Name what a module does, and the way of tokens to experts and back."""
        if name is not None:
            ranges: list[record_function] = []

            def enter(*_: Any) -> None:
                ranges.append(record_function(name))
                ranges[-1].__enter__()

            def leave(*_: Any) -> None:
                if ranges:
                    ranges.pop().__exit__(None, None, None)

            self._hooks.callback(module.register_forward_pre_hook(enter).remove)
            self._hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
        if "dispatcher" in vars(module):  # an engine's: tokens travel
            inner = module.dispatcher
            self._hooks.callback(setattr, module, "dispatcher", inner)

            def dispatch(*given: Any, **named: Any) -> torch.Tensor:
                with record_function("dispatch"):
                    return inner(*given, **named)

            module.dispatcher = dispatch

    def close(self) -> None:
        """Write what there is of the trace, also where the run ends before its last step."""
        self._open.close()
        self._hooks.close()
        trace, self._trace = self._trace, None
        if trace is None:
            return
        trace.stop()
        name = whole = f"step-{self._held[0]}-{self._held[-1]}.rank-{self._rank}"
        again = 1
        while (self._folder / f"{name}.json.gz").exists():  # the same steps, taken before
            again += 1
            name = f"{whole}.{again}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            partial = self._folder / f"{name}.partial.json.gz"  # torch packs by the name's end
            trace.export_chrome_trace(str(partial))
            os.replace(partial, self._folder / f"{name}.json.gz")
        except OSError as error:  # no reason to end a run
            print(f"the trace {name} in {self._folder} is lost: {error.strerror or error}")
