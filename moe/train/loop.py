"""Training: batches in their order, one loss, one engine, checkpoints, validation, metrics.

train(config)        # in one process, or in every process that torchrun starts
"""

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe import engines
from moe.checkpoint import store
from moe.config import RunConfig
from moe.data.dataset import build_dataset
from moe.data.manifest import read_manifest
from moe.data.sampler import Batches, validation_batches
from moe.engines.base import Engine
from moe.errors import MoeError, UserError, problem, raise_all
from moe.hf.families import routed_config
from moe.hf.loading import load_model as load_trained
from moe.model import LayerLoad, RoutedLlamaConfig, RoutedLlamaForCausalLM
from moe.model.accounting import flops_per_token
from moe.model.losses import update_selection_bias
from moe.model.spec import DenseMLP
from moe.model.union import UnionRouter
from moe.parallel.loss import cross_entropy
from moe.parallel.world import Ranks, world
from moe.progress import quiet_libraries
from moe.train.configurations import check_same, differences, say_once
from moe.train.loads import LoadMeter, StepLoads
from moe.train.metrics import Reporter, peak_flops
from moe.train.schedule import annealed, learning_rate
from moe.train.starting import BUFFERS, data_step, history, open_model, starting_point
from moe.upcycle.receipt import versions
from moe.upcycle.source import Source, require_finite
from moe.upcycle.writer import copy_side_files


def train(config: RunConfig) -> None:
    """Run a configuration to its last step, from its newest checkpoint if there is one."""
    quiet_libraries()
    with world(config.parallel.timeout) as ranks:
        check_same(config, ranks)
        say_once(ranks, config.check_world, ranks.size)
        Run(config, ranks).go()


def load_model(source: Source) -> RoutedLlamaForCausalLM:
    """The model in float32. A dense folder trains as a RoutedLlama with nothing routed.

    Raises UserError where the folder is not a whole model, or none of LLaMA's kind, Corrupt where
    its values are not finite.
    """
    if store.is_checkpoint(source.folder):  # weights alone: moments, schedule and data are new
        return load_trained(source.folder).float()
    config = source.config
    if not isinstance(config, RoutedLlamaConfig):
        config = routed_config(config)  # of the same tensors under the same names
    loaded: Any = RoutedLlamaForCausalLM.from_pretrained(
        source.folder, config=config, dtype=torch.float32, output_loading_info=True
    )
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"model={source.folder} lacks {len(missing)} tensors such as {missing[0]}.")
    require_finite(source.folder, model.named_parameters())
    return model


def check_files(config: RunConfig) -> Source:
    """The model's headers, after a look at all that the run will read.

    Raises UserError with everything that is missing or does not fit, before anything is loaded.
    """
    found: list[Source] = []
    problems = problem(lambda: found.append(open_model(config)))
    for part in (*config.data.train, *config.data.validation):
        problems += problem(read_manifest, part.path)
    raise_all(problems)
    return found[0]


class Run:
    """One training run on one rank."""

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks.split(config.parallel.tensor)
        ranks = self.ranks
        torch.manual_seed(config.seed + ranks.rank)  # dropout differs by rank, nothing else draws
        if config.train.resume == "never" and store.latest(config.out) is not None:
            raise UserError(
                f"out={config.out} holds checkpoints and train.resume=never. Choose another out, "
                "or train.resume=auto to go on from them."
            )
        source = check_files(config)
        data, cache = config.data, config.out / "cache"
        shared: dict[str, Any] = {
            "sequence_length": data.sequence_length,
            "seed": config.seed,
            "cache": cache,
            "document_boundaries": data.document_boundaries,
            "tokenizer": str(config.model),
        }
        samples = config.train.steps * config.train.global_batch_size
        train_sources = [(s.path, s.weight) for s in data.train]
        self.dataset = build_dataset(train_sources, num_samples=samples, **shared)
        self.validation = None
        if data.validation:
            sources = [(s.path, s.weight) for s in data.validation]
            self.validation = build_dataset(sources, num_samples=None, **shared)
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
        self.step = self._resume()

    def go(self) -> None:
        """Train until the last step."""
        config, reporter = self.config, None
        if self.ranks.rank == 0:
            (config.out / "config.yaml").write_text(config.to_yaml())
            reporter = Reporter(config.out, config.to_yaml(), self.step, config.train.steps)
            print(self._headline(), flush=True)
        batches = Batches(
            self.dataset,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            rank=self.ranks.data_rank,
            world_size=self.ranks.data_size,
            consumed_samples=self.consumed_samples,
        )
        mark = time.monotonic(), self.step
        try:
            while self.step < config.train.steps:
                loss, norm, lr, loads = self.train_step(batches)
                if self.step % config.train.log_every == 0 or self.step == config.train.steps:
                    metrics = self._metrics(loss, norm, lr, loads, mark)
                    mark = time.monotonic(), self.step
                    if reporter:
                        reporter.report(metrics, loads)
                begin = time.monotonic()
                last = self.step == config.train.steps
                if self.validation is not None and (self.step % config.eval.every == 0 or last):
                    value = self.validate()
                    if reporter:
                        reporter.validation(self.step, value)
                if self.step % config.checkpoint.every == 0 or last:
                    self.save()
                mark = mark[0] + time.monotonic() - begin, mark[1]  # tokens/s is of training alone
            self.finish_saving()
        finally:
            self.saver.close()
            batches.close()
            if reporter:
                reporter.close()

    def train_step(self, batches: Batches) -> tuple[Tensor, Tensor, float, StepLoads]:
        """One optimiser step: mean loss per token of the global batch, gradient norm, lr, loads.

        Raises MoeError where the loss or the gradient is not finite: nothing is updated then.
        """
        settings, device = self.config.train, self.ranks.device
        for router in self.unions:
            experts, top_k = router.spec.num_experts, router.spec.top_k
            router.use(annealed(experts, top_k, self.step, settings.anneal_steps))
        micro = [next(batches) for _ in range(batches.micro_batches_per_step)]
        micro = [{k: v.to(device, non_blocking=True) for k, v in b.items()} for b in micro]
        labelled = self.ranks.sum(torch.stack([b["loss_mask"].sum() for b in micro]).sum())
        total = settings.global_batch_size * self.config.data.sequence_length
        self.engine.train(True)
        summed = torch.zeros((), device=device)
        for index, batch in enumerate(micro):
            output = self._forward(batch)
            loss = token_losses(output.logits, batch).sum() / labelled
            share = batch["tokens"].numel() / total
            self.engine.backward(loss + share * output.router_loss, index == len(micro) - 1)
            summed += loss.detach()
            self.meter.add(output.routing)
        trouble = summed.new_tensor(self.saver.trouble)
        summed, trouble = self.ranks.sum(torch.stack([summed, trouble]), every=1)
        norm = self.engine.grad_norm()
        if not math.isfinite(norm.item() + summed.item()):
            first = self.step * settings.global_batch_size
            raise MoeError(
                f"step {self.step + 1}: gradient norm {norm.item()}, loss {summed.item():.4g}, on "
                f"samples {first} to {first + settings.global_batch_size - 1}. Nothing was "
                f"updated; the newest checkpoint: {store.latest(self.config.out) or 'none yet'}. "
                "Lower optimizer.lr, or train.clip."
            )
        if trouble.item():
            self.saver.learn()
        lr = learning_rate(
            self.step, self.config.schedule, self.config.optimizer.lr, settings.steps
        )
        limit = torch.tensor(settings.clip or math.inf, device=norm.device, dtype=norm.dtype)
        self.engine.step(lr, (limit / (norm + 1e-6)).clamp(max=1.0))
        loads = self.meter.total(self.ranks.sum)
        self.reference = loads.reference()
        self._move_biases(loads)
        self.step += 1
        return summed, norm, lr, loads

    def _move_biases(self, loads: StepLoads) -> None:
        """Selection biases against the load of the step just taken."""
        counts, targets = [], []
        for layer, load in loads.of("mlp").items():
            spec = self.model_config.mlp_spec(layer)
            if not isinstance(spec, DenseMLP) and spec.selection_bias:
                counts.append(load.counts)
                targets.append(load.tokens * spec.top_k / spec.num_experts)
        rate = self.config.train.selection_bias_rate
        update_selection_bias(self.biases, counts, targets, rate)

    def _forward(self, batch: dict[str, Tensor]) -> Any:
        return self.engine.forward(
            input_ids=batch["tokens"],
            position_ids=batch["position_ids"],
            attention_mask=batch.get("attention_mask"),
            reference_load=self.reference,
        )

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss per token over the same validation sequences every time, on any ranks.

        Of the model as it would be saved: unions with their own number of experts, annealed or not.
        """
        assert self.validation is not None
        self.engine.train(False)
        for router in self.unions:
            router.use(router.spec.top_k)
        size = self.config.train.micro_batch_size
        limit = self.config.eval.sequences
        place = {"rank": self.ranks.data_rank, "world_size": self.ranks.data_size}
        sums = torch.zeros(2, device=self.ranks.device)
        for batch in validation_batches(self.validation, size, limit=limit, **place):
            batch = {k: v.to(self.ranks.device) for k, v in batch.items()}
            logits = self._forward(batch).logits
            sums += torch.stack([token_losses(logits, batch).sum(), batch["loss_mask"].sum()])
        loss, count = self.ranks.sum(sums).tolist()
        return loss / max(count, 1.0)

    def _metrics(
        self, loss: Tensor, norm: Tensor, lr: float, loads: StepLoads, mark: tuple[float, int]
    ) -> dict[str, Any]:
        elapsed, steps = time.monotonic() - mark[0], self.step - mark[1]
        length = self.config.data.sequence_length
        per_step = self.config.train.global_batch_size * length
        rate = steps * per_step / elapsed
        peak = peak_flops(self.ranks.device)
        flops = flops_per_token(self.model_config, length)
        return {
            "step": self.step,
            "loss": loss.item(),
            "grad_norm": norm.item(),
            "lr": lr,
            "tokens": self.step * per_step,
            "tokens_per_second": rate,
            "mfu": rate * flops / (peak * self.ranks.size) if peak else None,
            **loads.summary(),
        }

    def _headline(self) -> str:
        config = self.config
        return (
            f"{config.model} on {self.ranks.size} rank(s) of {self.ranks.device.type}, "
            f"{config.train.dtype}: steps {self.step} to {config.train.steps}, "
            f"{config.train.global_batch_size} × {config.data.sequence_length} tokens each, "
            f"into {config.out}"
        )

    @property
    def consumed_samples(self) -> int:
        """How many samples of its data the run has seen."""
        return (self.step - self.data_step) * self.config.train.global_batch_size

    def save(self) -> None:
        """Begin to save a checkpoint, of this very moment; `checkpoint.asynchronous: false` ends it
        too. A save that fails is said, and training goes on.
        """
        progress = {
            "step": self.step,
            "data_step": self.data_step,
            "consumed_samples": self.consumed_samples,
            "updates": self.engine.updates,
            "origin": self.origin,
            "versions": versions(),
            "reference": _plain(self.reference),
            "config": self.config.model_dump(mode="json"),
        }
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
            if progress["updates"]:
                self.engine.prepare_moments()
            checkpoint.load(self.engine.state())
            self.engine.updates = progress["updates"]
            state = checkpoint.random_state(self.ranks.rank)
            if state is not None:
                torch.set_rng_state(state)
            if self.ranks.device.type == "cuda":
                state = checkpoint.random_state(self.ranks.rank, "cuda")
                if state is not None:
                    torch.cuda.set_rng_state(state)
        if progress["reference"] is not None:
            self.reference = _tensors(progress["reference"], self.ranks.device)
        if self.ranks.rank == 0:
            print(f"going on from {folder}", flush=True)
            if self.data_step == progress["step"] and self.data_step:
                print("  with the first sample of its data (data.restart)", flush=True)
            for line in differences(progress["config"], self.config.model_dump(mode="json")):
                print(f"  changed since then: {line}", flush=True)
        return int(progress["step"])


def token_losses(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Cross entropy of every label in float32, 0 where it does not count: [B·S]."""
    return cross_entropy(logits, batch["labels"]) * batch["loss_mask"].flatten()


def _plain(reference: list[LayerLoad] | None) -> list[list[list[float] | None]] | None:
    """Loads as JSON: float32 survives the way through Python's floats."""
    if reference is None:
        return None
    return [[None if f is None else f.tolist() for f in layer] for layer in reference]


def _tensors(plain: list[list[list[float] | None]], device: torch.device) -> list[LayerLoad]:
    return [
        LayerLoad(*(None if f is None else torch.tensor(f, device=device) for f in layer))
        for layer in plain
    ]
