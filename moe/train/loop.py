"""Training: batches in their order, one loss, one engine, checkpoints, validation, metrics.

train(config)        # in one process, or in every process that torchrun starts
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from moe import engines
from moe.checkpoint import store
from moe.config import RunConfig
from moe.data.sampler import Batches, step_indices, validation_batches
from moe.engines.base import Engine
from moe.errors import UserError
from moe.hf.inspect import describe_model, inspect
from moe.model import LayerLoad, RoutedLlamaConfig
from moe.model.losses import update_selection_bias
from moe.model.union import UnionRouter
from moe.parallel.loss import cross_entropy
from moe.parallel.world import Ranks, by_first, say_once, world
from moe.progress import quiet_libraries
from moe.train import lock
from moe.train.configurations import check_same, differences
from moe.train.guard import Generators, Guard, Skipped, suspects
from moe.train.loads import LoadMeter, StepLoads, plain, tensors
from moe.train.metrics import Pace, Reporter, headline
from moe.train.preempt import Preemption
from moe.train.profile import Tracer
from moe.train.schedule import annealed, learning_rate
from moe.train.starting import (
    BUFFERS,
    check_files,
    data_step,
    history,
    load_model,
    load_suite,
    open_data,
    restore_generators,
    starting_point,
)
from moe.upcycle.receipt import versions
from moe.upcycle.writer import copy_side_files

AGAIN = (
    "start the run again, and it goes on from its newest checkpoint (parallel.timeout: how long a "
    "rank may be silent)"
)


def train(config: RunConfig) -> None:
    """Run a configuration to its last step, from its newest checkpoint if there is one."""
    quiet_libraries()
    with world(config.parallel.timeout, AGAIN) as ranks:
        check_same(config, ranks)
        say_once(ranks, config.check_world, ranks.size)
        say_once(ranks, check_files, config)  # what is refused leaves no folder
        with say_once(ranks, lock.take, config.out, ranks):
            Run(config, ranks).go()


class Run:
    """One training run on one rank."""

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks.split(config.parallel.tensor)
        ranks = self.ranks
        self.preemption = Preemption(config.out, self.ranks, config.train.time_limit)
        self.leaving = False  # as all ranks have agreed
        saved = say_once(ranks, store.steps, config.out)
        self._leave_if_asked(max((step for step, _ in saved), default=0))
        torch.manual_seed(config.seed + ranks.rank)  # dropout differs by rank, nothing else draws
        if config.train.resume == "never" and store.latest(config.out) is not None:
            raise UserError(
                f"out={config.out} holds checkpoints and train.resume=never. Choose another out, "
                "or train.resume=auto to go on from them."
            )
        source = check_files(config)
        self.suite = say_once(ranks, load_suite, config, source, ranks.device)
        self.dataset, self.validation = open_data(config)
        model = load_model(source)
        self.model_config: RoutedLlamaConfig = model.config
        if self.validation is not None and not self.model_config.causal:
            raise UserError(
                f"model={config.model} is not causal (mlp.mode expert_choice or sequence): its "
                "loss on whole sequences is no validation. Remove data.validation."
            )
        self.origin = history(config.model)
        self.unions = [m for m in model.modules() if isinstance(m, UnionRouter)]
        if config.train.anneal_steps and not self.unions:
            raise UserError(
                f"train.anneal_steps={config.train.anneal_steps}: model={config.model} has no "
                "union of experts to anneal."
            )
        self.tracer = Tracer(config, ranks, model)
        self.engine: Engine = say_once(ranks, engines.build, model, config, ranks)
        self.biases = [e.tensor for e in self.engine.state() if e.name.endswith(BUFFERS)]
        self.meter = LoadMeter(self.model_config)
        self.reference: list[LayerLoad] | None = None
        checkpoint = config.checkpoint
        self.saver = store.Saver(
            config.out, ranks.rank, ranks.gather,
            keep=checkpoint.keep, keep_every=checkpoint.keep_every,
            asynchronous=checkpoint.asynchronous, timeout=config.parallel.timeout,
        )  # fmt: skip
        self.data_step = 0  # at which the data's first sample was due
        self.guard = Guard(config.guard)
        self.reporter: Reporter | None = None  # rank 0's
        self.unvalidated = self.unevaluated = False  # of a step that is to be
        self.step = self._resume()
        self.begun = self.step  # nothing is lost by leaving at this step

    def go(self) -> None:
        """Train until the last step."""
        config = self.config
        self._leave_if_asked(self.step)
        words = ""
        if self.ranks.rank == 0:
            words = "\n".join(describe_model(config.model, inspect(config.model)))
        given = config.out, config.to_yaml(), self.step, config.train.steps, words
        self.reporter = by_first(self.ranks, Reporter, *given)
        if self.reporter:
            print(headline(config, self.ranks, self.step), flush=True)
        batches = Batches(
            self.dataset,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            rank=self.ranks.data_rank,
            world_size=self.ranks.data_size,
            consumed_samples=self.consumed_samples,
        )
        try:
            self._between_steps()
            pace = Pace(config, self.model_config, self.ranks, self.step)
            while self.step < config.train.steps:
                self.tracer.at(self.step + 1)
                loss, norm, lr, loads = self.train_step(batches)
                last = self.step == config.train.steps
                if loads is not None and (last or self.step % config.train.log_every == 0):
                    found = {"loss": loss.item(), "grad_norm": norm.item(), "lr": lr}
                    metrics = {"step": self.step, **found, **pace.take(self.step)}
                    if self.reporter:
                        here = loads.cpu()
                        self.reporter.report(metrics | here.summary(), here)
                due = last or self.step % config.eval.every == 0
                self.unvalidated = due and self.validation is not None
                due = last or self.step % (config.eval.suite_every or config.eval.every) == 0
                self.unevaluated = due and self.suite is not None
                with pace.stopped():
                    self._between_steps(save=last or self.step % config.checkpoint.every == 0)
            self.finish_saving()
        finally:
            self.saver.close()
            batches.close()
            self.tracer.close()
            if self.reporter:
                self.reporter.close()

    def _between_steps(self, save: bool = False) -> None:
        """Validate, evaluate and save where it is due, and leave where ranks were asked to."""
        if self.unvalidated and not self.leaving:
            value = self.validate()
            if self.reporter and value is not None:
                self.reporter.validation(self.step, value)
            self.unvalidated = value is None
        if self.unevaluated and not self.leaving:
            found = self.evaluate()
            if self.reporter and found is not None:
                self.reporter.evaluation(self.step, found)
            self.unevaluated = found is None
        if save and not self.leaving:
            self.save()
            if self.step < self.config.train.steps:
                self.leaving = self.ranks.any(self.preemption.asked)
        if self.leaving:
            self._leave()

    def _leave_if_asked(self, step: int) -> None:
        """Where nothing has been trained that is not saved."""
        if self.ranks.any(self.preemption.asked):
            self.preemption.leave(step)

    def _leave(self) -> None:
        """End the run at this step, saved."""
        if self.step != self.begun:
            self.save()  # unless this step is saved already
        self.finish_saving()
        self.preemption.leave(self.step)

    def train_step(self, batches: Batches) -> tuple[Tensor, Tensor, float, StepLoads | None]:
        """One optimiser step: mean loss per token of the global batch, gradient norm, lr, loads.

        There are no loads where the guard has the step skipped: nothing is updated then. Raises
        MoeError where too many are skipped in a row.
        """
        generators = Generators(self.ranks.device)
        settings, device = self.config.train, self.ranks.device
        for router in self.unions:
            experts, top_k = router.spec.num_experts, router.spec.top_k
            router.use(annealed(experts, top_k, self.step, settings.anneal_steps))
        with record_function("data"):
            micro = [next(batches) for _ in range(batches.micro_batches_per_step)]
            micro = [{k: v.to(device, non_blocking=True) for k, v in b.items()} for b in micro]
        labelled = self.ranks.sum(torch.stack([b["loss_mask"].sum() for b in micro]).sum())
        total = settings.global_batch_size * self.config.data.sequence_length
        self.engine.train(True)
        losses = []
        for index, batch in enumerate(micro):
            with record_function("forward"):
                output = self._forward(batch)
                loss = token_losses(output.logits, batch).sum() / labelled
            share = batch["tokens"].numel() / total
            with record_function("backward"):
                self.engine.backward(loss + share * output.router_loss, index == len(micro) - 1)
            losses.append(loss.detach())
            self.meter.add(output.routing)
        summed = torch.stack(losses).sum()
        self.preemption.stepped = True
        flags = self.saver.trouble, float(self.preemption.asked)  # travel along
        parts = torch.cat([summed[None], summed.new_tensor(flags)])
        summed, *said = self.ranks.sum(parts, every=len(flags))
        trouble, asked = torch.stack(said).tolist()
        self.leaving = bool(asked)
        with record_function("grad_norm"):
            norm = self.engine.grad_norm()
        if trouble:
            self.saver.learn()
        lr = learning_rate(
            self.step, self.config.schedule, self.config.optimizer.lr, settings.steps
        )
        if reason := self.guard.judge(summed.item(), norm.item()):
            generators.restore()
            self._skip(reason, batches, losses)
            return summed, norm, lr, None
        limit = torch.tensor(settings.clip or math.inf, device=norm.device, dtype=norm.dtype)
        with record_function("optimizer"):
            self.engine.step(lr, (limit / (norm + 1e-6)).clamp(max=1.0))
        loads = self.meter.total(self.ranks.sum)
        self.reference = loads.reference()
        counts, targets = loads.selections(self.model_config)
        update_selection_bias(self.biases, counts, targets, settings.selection_bias_rate)
        self.step += 1
        return summed, norm, lr, loads

    def _skip(self, reason: str, batches: Batches, losses: list[Tensor]) -> None:
        """Leave everything as it was before the step but the step itself."""
        self.engine.skip()
        self.meter = LoadMeter(self.model_config)
        self.step += 1
        size, ranks = self.config.train.global_batch_size, self.ranks
        first = batches.consumed_samples - size
        micro = step_indices(
            first, global_batch_size=size, micro_batch_size=self.config.train.micro_batch_size,
            rank=ranks.data_rank, world_size=ranks.data_size,
        )  # fmt: skip
        bad = sorted({i for found in ranks.gather(suspects(losses, micro)) for i in found})
        samples = range(first, first + size)
        self.guard.skip(self.step, samples)
        if self.reporter:
            origin = getattr(self.dataset, "origin", None)
            origins = [{"sample": i, **origin(i)} for i in samples] if origin else []
            self.reporter.skipped(Skipped(self.step, reason, samples, bad, origins))
        say_once(self.ranks, self.guard.check, store.latest(self.config.out))

    def _forward(self, batch: dict[str, Tensor]) -> Any:
        return self.engine.forward(
            input_ids=batch["tokens"],
            position_ids=batch["position_ids"],
            attention_mask=batch.get("attention_mask"),
            reference_load=self.reference,
        )

    @record_function("validate")
    @torch.no_grad()
    def validate(self) -> float | None:
        """Mean loss per token over the same validation sequences every time, on any ranks; None
        where ranks are asked to leave meanwhile.

        Of the model as it would be saved: unions with their own number of experts, annealed or not.
        """
        assert self.validation is not None
        self._as_saved()
        size = self.config.train.micro_batch_size
        limit = self.config.eval.sequences
        place = {"rank": self.ranks.data_rank, "world_size": self.ranks.data_size}
        sums = torch.zeros(2, device=self.ranks.device)
        for batch in validation_batches(self.validation, size, limit=limit, **place):
            batch = {k: v.to(self.ranks.device) for k, v in batch.items()}
            logits = self._forward(batch).logits
            sums += torch.stack([token_losses(logits, batch).sum(), batch["loss_mask"].sum()])
            if self._asked():
                return None
        loss, count = self.ranks.sum(sums).tolist()
        return loss / max(count, 1.0)

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any] | None:
        """The suite's metrics, of the model as it would be saved; None where ranks are asked to
        leave meanwhile. The run goes on as if nothing had been: the harness sets random states.
        """
        assert self.suite is not None
        self._as_saved()
        generators = Generators(self.ranks.device)
        tokens = self.config.train.micro_batch_size * self.config.data.sequence_length
        given = self.engine.forward, self.model_config, self.ranks, tokens, self._asked
        try:
            # prompts have any length: nothing is compiled for each, nor training's own pushed out
            with torch.compiler.set_stance("force_eager"):
                return self.suite.measure(*given)
        finally:
            generators.restore()

    def _as_saved(self) -> None:
        """The mode for looking at the model."""
        self.engine.train(False)
        for router in self.unions:
            router.use(router.spec.top_k)

    def _asked(self) -> bool:
        self.leaving = self.ranks.any(self.preemption.asked)
        return self.leaving

    @property
    def consumed_samples(self) -> int:
        """How many samples of its data the run has seen."""
        return (self.step - self.data_step) * self.config.train.global_batch_size

    @record_function("save")
    def save(self) -> None:
        """Begin to save a checkpoint, of this very moment; `checkpoint.asynchronous: false` ends it
        too. A save that fails is said, and training goes on.
        """
        progress = store.Progress(
            step=self.step,
            data_step=self.data_step,
            consumed_samples=self.consumed_samples,
            updates=self.engine.updates,
            origin=self.origin,
            versions=versions(),
            reference=plain(self.reference),
            guard=self.guard.state(),
            unvalidated=self.unvalidated,
            unevaluated=self.unevaluated,
            ranks=self.ranks.size,
            config=self.config.model_dump(mode="json"),
        )
        self.saver.save(self.step, self.engine.state(), progress, self._side_files)

    def finish_saving(self) -> None:
        """Wait for the last save. Raises UserError where it failed."""
        say_once(self.ranks, self.saver.finish)

    def _side_files(self, folder: Path) -> None:
        copy_side_files(self.config.model, folder)
        self.model_config.save_pretrained(folder)

    def _resume(self) -> int:
        """Load the checkpoint to go on from, if any; returns the step it stands at."""
        folder, self.saver.damaged = say_once(self.ranks, starting_point, self.config, self.ranks)
        if self.ranks.rank == 0:
            store.clean(self.config.out)  # what killed runs have left
        if folder is None:
            return 0
        with store.Reader(folder, checked=True) as checkpoint:
            progress = checkpoint.manifest.progress
            self.data_step = data_step(self.config, folder, progress)
            if progress.updates:
                self.engine.prepare_moments()
            checkpoint.load(self.engine.state())
            self.engine.updates = progress.updates
            restore_generators(checkpoint, self.ranks)
        if progress.reference is not None:
            self.reference = tensors(progress.reference, self.model_config, self.ranks.device)
        self.unvalidated = self.validation is not None and progress.unvalidated
        self.unevaluated = self.suite is not None and progress.unevaluated
        self.guard.restore(progress.guard)
        if self.ranks.rank == 0:
            print(f"going on from {folder}", flush=True)
            if self.data_step == progress.step and self.data_step:
                print("  with the first sample of its data (data.restart)", flush=True)
            then = progress.ranks or self.ranks.size
            if self.model_config.attention_dropout and then != self.ranks.size:
                print(f"  dropout masks differ from those of the {then} ranks that wrote it")
            for line in differences(progress.config, self.config.model_dump(mode="json")):
                print(f"  changed since then: {line}", flush=True)
        return progress.step


def token_losses(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Cross entropy of every label in float32, 0 where it does not count: [B·S]."""
    return cross_entropy(logits, batch["labels"]) * batch["loss_mask"].flatten()
