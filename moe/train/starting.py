"""Where a run starts: its newest sound checkpoint, another one by name, or a model."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from moe.checkpoint import store
from moe.checkpoint.manifest import Manifest
from moe.checkpoint.pieces import random_key
from moe.checkpoint.progress import Progress
from moe.config import RunConfig
from moe.data.dataset import Sample, build_dataset
from moe.data.manifest import read_manifest
from moe.engines.base import check_patterns
from moe.errors import Corrupt, UserError, problem, raise_all
from moe.hf.families import routed_config
from moe.hf.inspect import checkpoint_steps
from moe.hf.loading import load_model as load_trained
from moe.hf.loading import load_tokenizer
from moe.model import RoutedLlamaConfig, RoutedLlamaForCausalLM
from moe.parallel.world import Ranks
from moe.train.guard import Generators
from moe.upcycle.receipt import Receipt
from moe.upcycle.source import Source, read_config, require_finite

if TYPE_CHECKING:
    from moe.evals.live import Suite

BUFFERS = ".selection_bias"
READ_AS = ("train", "sequence_length", "document_boundaries")  # what decides a run's samples


def open_model(config: RunConfig) -> Source:
    """The headers of the model to start from, a folder or a checkpoint.

    Raises UserError where it is neither, of another family, or has nothing of what is to be
    trained; Corrupt where it is damaged.
    """
    if store.is_checkpoint(config.model):
        records = Manifest.read(config.model).tensors.items()
        names = [key.split("/", 1)[1] for key, r in records if r.kind in ("parameter", "buffer")]
        source = Source(config.model, read_config(config.model), {})
    else:
        source = Source.open(config.model)  # refuses pickles and damaged files
        names = list(source.tensors)
    routed_config(source.config)  # refuses families that are not LLaMA's
    check_patterns([n for n in names if not n.endswith(BUFFERS)], config.train.trainable)
    return source


def open_data(config: RunConfig) -> tuple[Dataset[Sample], Dataset[Sample] | None]:
    """The samples to train on and, where there are any, to validate with."""
    data = config.data
    shared: dict[str, Any] = {
        "sequence_length": data.sequence_length,
        "seed": config.seed,
        "cache": config.out / "cache",
        "document_boundaries": data.document_boundaries,
        "tokenizer": str(config.model),
    }
    samples = config.train.steps * config.train.global_batch_size
    train = build_dataset([(s.path, s.weight) for s in data.train], num_samples=samples, **shared)
    if not data.validation:
        return train, None
    sources = [(s.path, s.weight) for s in data.validation]
    return train, build_dataset(sources, num_samples=None, **shared)


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
        source.folder, config=config, dtype=torch.float32, output_loading_info=True,
        use_safetensors=True,
    )  # fmt: skip
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


def load_suite(config: RunConfig, source: Source, device: torch.device) -> "Suite | None":
    """The suite that the run is to evaluate with, if any; random states stay as they are.

    Raises UserError with what keeps its tasks from being answered, before the model is loaded.
    """
    if config.eval.suite is None:
        return None
    from moe.evals.live import Suite  # the harness takes seconds

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tokenizer = load_tokenizer(config.model)
    given = config.eval.data, source.config, tokenizer, f"model={config.model}"
    generators = Generators(device)  # loading data sets draws
    found = Suite(config.eval.suite, *given)
    generators.restore()
    return found


def history(model: Path) -> list[dict[str, Any]]:
    """What the model to start from was made by, oldest first."""
    if store.is_checkpoint(model):
        return checkpoint_steps(Manifest.read(model))
    receipt = Receipt.read(model)
    return receipt.steps if receipt else []


def starting_point(config: RunConfig, ranks: Ranks) -> tuple[Path | None, list[Path]]:
    """The checkpoint to go on from, if any, and the newer ones that are damaged.

    The newest sound one of `out`; where there is none, the one that train.resume names. Ranks look
    at every byte once between them. Raises Corrupt where none is sound, or the named one is not.
    """
    own = ranks.gather([path for _, path in reversed(store.numbered(config.out))])[0]
    named = config.train.resume
    if named in ("auto", "never"):
        return _newest_sound(own, ranks)
    start = Path(named)
    if not start.is_dir():
        raise UserError(f"train.resume={named} is not a checkpoint folder, auto or never.")
    if not own or own[0].resolve() == start.resolve():
        if damage := store.check_together(start, ranks.rank, ranks.size, ranks.gather):
            raise Corrupt("\n".join([*map(str, damage), *_instead(start, ranks)]))
        return start, []
    if start.resolve().parent == own[0].resolve().parent:
        raise UserError(
            f"train.resume={named} is not the newest checkpoint of out={config.out}, "
            f"{own[0].name} is. Choose another out to branch off, or remove the newer ones."
        )
    return _newest_sound(own, ranks)


def _newest_sound(folders: list[Path], ranks: Ranks) -> tuple[Path | None, list[Path]]:
    """The first sound one, and those before it; rank 0 says what is wrong with them."""
    said: list[str] = []
    for place, folder in enumerate(folders):
        damage = store.check_together(folder, ranks.rank, ranks.size, ranks.gather)
        if not damage:
            if place and ranks.rank == 0:
                names = ", ".join(f.name for f in folders[:place])
                print("\n".join(said))
                print(f"damaged: {names}; the newest sound checkpoint is {folder.name}. The next "
                      "save sets what is damaged aside, as step-N.damaged", flush=True)  # fmt: skip
            return folder, folders[:place]
        said += map(str, damage)
    if folders:
        raise Corrupt(
            "\n".join([*said, f"None of the {len(folders)} checkpoints is sound. Restore one from "
                       "a copy, or move them away to start over."])
        )  # fmt: skip
    return None, []


def _instead(damaged: Path, ranks: Ranks) -> list[str]:
    """One line with the newest sound checkpoint beside a damaged one."""
    sound = None
    if ranks.rank == 0 and damaged.resolve().parent.name == store.FOLDER:
        sound = store.newest_sound(damaged.resolve().parents[1], damaged)
    sound = ranks.gather(sound)[0]
    if sound is None:
        return [f"train.resume={damaged} is damaged, and no sound checkpoint lies beside it."]
    return [f"train.resume={damaged} is damaged. The newest sound one is {sound}: name that."]


def restore_generators(checkpoint: store.Reader, ranks: Ranks) -> None:
    """The random state that this rank has saved, if it has. Raises Corrupt where it is none."""
    put = {"cpu": torch.set_rng_state, "cuda": torch.cuda.set_rng_state}
    for device in dict.fromkeys(("cpu", ranks.device.type)):
        state = checkpoint.random_state(ranks.rank, device)
        if state is None:
            continue
        try:
            put[device](state)
        except (RuntimeError, TypeError) as error:
            name = random_key(ranks.rank, device)
            raise Corrupt(f"{checkpoint.folder}: {name}: {error}".splitlines()[0]) from error


def data_step(config: RunConfig, folder: Path, progress: Progress) -> int:
    """The step at which the data's first sample is, or was, due. 0: the run's first.

    With data.restart other data than the checkpoint has seen begin now. Raises UserError where
    samples that were seen would be counted wrong.
    """
    step, begun = progress.step, progress.data_step
    then, now = progress.config["data"], config.model_dump(mode="json")["data"]
    if config.data.restart and any(then.get(key) != now[key] for key in READ_AS):
        return step
    batch, seen = config.train.global_batch_size, progress.consumed_samples
    if seen != (step - begun) * batch:
        raise UserError(
            f"{folder} was trained with train.global_batch_size="
            f"{seen // max(1, step - begun)}, not {batch}: the samples it has seen would be "
            "counted wrong. Keep the old value."
        )
    return begun
