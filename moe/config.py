"""The run configuration: one YAML file, any key overridden as `a.b=value`, all mistakes at once.

config = load(Path("configs/train/demo.yaml"), ["train.steps=20", "optimizer.lr=1e-4"])
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from moe.errors import UserError, problem, raise_all

MOST_VALUES = 100_000  # in a file
MOST_TRACED = 100  # steps


class Section(BaseModel):
    """A part of the file: frozen, unknown keys refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Weighted(Section):
    path: Path
    """Prefix written by `moe data prepare`."""
    weight: float = Field(1.0, gt=0)
    """Share of the samples, relative to the other sources."""


class Data(Section):
    train: list[Weighted] = Field(min_length=1)
    validation: list[Weighted] = []
    sequence_length: int = Field(1024, gt=0)
    document_boundaries: Literal["none", "positions", "attention"] = "none"
    """positions restart at each document; attention does not cross documents either."""
    restart: bool = False
    """Where a checkpoint has seen other data, these begin with their first sample."""


class Train(Section):
    steps: int = Field(1000, gt=0)
    global_batch_size: int = Field(64, gt=0)
    """Sequences per optimiser step, over all ranks."""
    micro_batch_size: int = Field(4, gt=0)
    """Sequences per rank and forward pass."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the computation; weights and moments are kept in float32."""
    clip: float | None = Field(1.0, gt=0)
    """Largest global gradient norm; null for none."""
    resume: str = "auto"
    """auto: the newest checkpoint of `out`, if any; never; or a checkpoint folder to start from
    where `out` has none yet."""
    activation_checkpointing: Literal["none", "experts", "full"] = "none"
    """What the backward pass computes again: nothing, the experts' first layer, or every layer."""
    compile: bool = False
    """torch.compile each layer."""
    trainable: list[str] = Field(["*"], min_length=1)
    """Parameters to train, as patterns: ["*.router.*"], ["*.experts.*"]; the rest is frozen."""
    anneal_steps: int = Field(0, ge=0)
    """Steps over which a union of experts comes down from all of them to its top_k."""
    selection_bias_rate: float = Field(1e-3, ge=0)
    """Step of the selection biases, for models that have them."""
    log_every: int = Field(10, gt=0)
    time_limit: float | None = Field(None, gt=0)
    """Seconds after which the run saves and ends with exit code 85, as on SIGTERM; null: none."""


Beta = Annotated[float, Field(ge=0, lt=1)]
Steps = Annotated[int, Field(gt=0)]


class Optimizer(Section):
    lr: float = Field(2e-5, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    """On matrices only: norms and biases are not decayed."""


class Schedule(Section):
    kind: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    warmup_steps: int = Field(50, ge=0)
    decay_steps: int | None = Field(None, gt=0)
    """Length of wsd's final decay; null: a fifth of the steps."""
    final_ratio: float = Field(0.05, ge=0, le=1)
    """Last learning rate over the largest."""


class Parallel(Section):
    replicate: int = Field(1, gt=0)
    """Copies of the sharded model (HSDP)."""
    shard: int = Field(-1, ge=-1)
    """Ranks that share one copy; -1: all that are left."""
    expert: int = Field(1, gt=0)
    """Ranks among which the experts of a layer are divided; tokens travel to them."""
    tensor: int = Field(1, gt=0)
    """Ranks that compute a part each of attention, MLP and vocabulary, for the same tokens."""
    timeout: float = Field(1800.0, gt=0)
    """Seconds that a rank waits for another, before all of them end."""
    capacity: float | None = Field(None, gt=0)
    """Most of a rank's tokens that one expert takes in training, over the mean of all experts: what
    is beyond is dropped. null: nothing ever is."""


class DeepSpeed(Section):
    """What engine deepspeed needs to know besides; its JSON is made from all sections."""

    stage: Literal[0, 1, 2, 3] = 1
    """ZeRO: what is divided among ranks. 1: moments; 2: gradients too; 3: weights too."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What lies in the host's memory: moments and their step, or the weights as well."""
    overlay: Path | None = None
    """A DeepSpeed JSON with further settings; keys that this file decides are refused."""


class Guard(Section):
    """Which steps are skipped: weights and moments stay, data and schedule go on."""

    consecutive: int = Field(5, gt=0)
    """So many skipped steps in a row end the run."""
    spike: float | None = Field(None, gt=0)
    """Deviations above its recent mean from which on a loss or gradient norm is not trusted; null:
    only what is not finite."""
    window: int = Field(128, ge=16)
    """Clean steps that the mean and the deviation are of."""


class Checkpoint(Section):
    every: int = Field(500, gt=0)
    keep: int = Field(3, gt=0)
    """Newest checkpoints to keep."""
    keep_every: int | None = Field(None, gt=0)
    """Checkpoints of multiples of so many steps are kept for good."""
    asynchronous: bool = True
    """Train on while a checkpoint is written, from a copy in the host's memory."""


class Evaluation(Section):
    every: int = Field(500, gt=0)
    """Steps between validation losses, where data.validation is given."""
    sequences: int = Field(64, gt=0)
    """Of the validation data, the same every time."""
    suite: str | None = None
    """Tasks for the model as it is at that step: a suite of `moe eval`, or a file like one; null:
    none."""
    suite_every: int | None = Field(None, gt=0)
    """Steps between suites; null: as many as between validation losses."""
    data: Path | None = None
    """Folder that the suite's local tasks read."""


class Profile(Section):
    steps: tuple[Steps, Steps] | None = None
    """First and last step to be traced, as a list or as 10-12, into OUT/profile; null: none."""

    @field_validator("steps", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", str(value))
        return (int(found[1]), int(found[2] or found[1])) if found else value

    @field_validator("steps")
    @classmethod
    def _in_order(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value and not value[0] <= value[1] < value[0] + MOST_TRACED:
            raise ValueError(
                f"must be at least one step and at most {MOST_TRACED} of them, such as 10-12: "
                "traces grow by megabytes a step"
            )
        return value


class RunConfig(Section):
    """Everything a training run depends on besides the files it names."""

    model: Path
    out: Path
    seed: int = Field(0, ge=0, lt=2**32)
    engine: Literal["native", "deepspeed"] = "native"
    data: Data
    train: Train = Train()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    parallel: Parallel = Parallel()
    deepspeed: DeepSpeed = DeepSpeed()
    guard: Guard = Guard()
    checkpoint: Checkpoint = Checkpoint()
    eval: Evaluation = Evaluation()
    profile: Profile = Profile()

    @model_validator(mode="after")
    def _fits_together(self) -> "RunConfig":
        train, schedule, problems = self.train, self.schedule, []
        if train.global_batch_size % train.micro_batch_size:
            problems.append(
                f"train.micro_batch_size={train.micro_batch_size} does not divide "
                f"train.global_batch_size={train.global_batch_size}."
            )
        if schedule.warmup_steps > train.steps:
            problems.append(
                f"schedule.warmup_steps={schedule.warmup_steps} exceeds train.steps={train.steps}: "
                "the run would end while warming up."
            )
        if train.anneal_steps > train.steps:
            problems.append(
                f"train.anneal_steps={train.anneal_steps} exceeds train.steps={train.steps}: the "
                "run would end with more experts than the model is to have."
            )
        if self.profile.steps and self.profile.steps[1] > train.steps:
            problems.append(
                f"profile.steps={'-'.join(map(str, self.profile.steps))} exceeds train.steps="
                f"{train.steps}: the run would end before."
            )
        if schedule.decay_steps and schedule.kind != "wsd":
            problems.append(f"schedule.decay_steps is for kind wsd, not {schedule.kind}.")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def check_world(self, world_size: int) -> None:
        """Raise UserError where the batch or the mesh does not fit `world_size` ranks."""
        problems = []
        for axis in ("expert", "tensor"):
            if world_size % getattr(self.parallel, axis):
                legal = [n for n in range(1, world_size + 1) if world_size % n == 0]
                problems.append(
                    f"parallel.{axis}={getattr(self.parallel, axis)} does not divide the "
                    f"{world_size} ranks there are. Use one of {', '.join(map(str, legal))}."
                )
        tensor = self.parallel.tensor
        ranks = max(1, world_size // tensor)  # each with batches of its own
        shared = f" (of {tensor} each, parallel.tensor)" if tensor > 1 else ""
        per_pass = self.train.micro_batch_size * ranks
        if self.train.global_batch_size % per_pass:
            legal = [
                m
                for m in range(1, self.train.global_batch_size + 1)
                if self.train.global_batch_size % (m * ranks) == 0
            ]
            problems.append(
                f"train.global_batch_size={self.train.global_batch_size} is not a multiple of "
                f"train.micro_batch_size={self.train.micro_batch_size} × {ranks} ranks{shared}. "
                + (f"Legal micro batch sizes: {', '.join(map(str, legal))}." if legal else
                   f"Use a multiple of {ranks}.")
            )  # fmt: skip
        replicate, shard = self.parallel.replicate, self.parallel.shard
        if ranks % replicate or (shard > 0 and replicate * shard != ranks) or shard == 0:
            problems.append(
                f"parallel.replicate={replicate} × shard={shard} is not the {ranks} ranks{shared} "
                "there are. Use shard -1, and a replicate that divides the ranks."
            )
        if problems:
            raise UserError("\n".join(problems))

    def to_yaml(self) -> str:
        """The resolved configuration, every default spelled out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply `a.b=value` overrides (values in YAML), check everything.

    Raises UserError with every problem found, one line each.
    """
    try:
        values = plain(path.read_text()) or {}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds {type(values).__name__}, not keys with values.")
    mistaken = [line for o in overrides for line in problem(_override, values, o)]
    mistaken += problem(parse, values, str(path)) if mistaken else []
    raise_all(mistaken)
    return parse(values, str(path))


def plain(text: str) -> Any:
    """YAML as plain values. Raises YAMLError; aliases that multiply are refused before anything
    goes through them.
    """
    try:
        values = yaml.safe_load(text)
    except (RecursionError, ValueError, TypeError) as error:  # of a date that is none, of a key
        raise yaml.YAMLError(f"it cannot be read ({error})") from error
    waiting, seen = [values], 0
    while waiting:
        node = waiting.pop()
        seen += 1
        if seen > MOST_VALUES:
            raise yaml.YAMLError(f"more than {MOST_VALUES} values, with aliases written out")
        if isinstance(node, dict | list):
            waiting += node.values() if isinstance(node, dict) else node
    return values


def _override(values: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"{text!r} is not an override. Write key.path=value.")
    *parents, last = key.split(".")
    place: Any = values
    for parent in parents:
        if isinstance(place, dict):
            place.setdefault(parent, {})
        place = place[_index(text, place, parent)]
        if not isinstance(place, dict | list):
            raise UserError(f"{text!r}: {parent} holds a value, not keys.")
    try:
        place[_index(text, place, last)] = _number(plain(value))
    except yaml.YAMLError as error:
        raise UserError(f"{text!r}: the value is not YAML.") from error


def _index(text: str, place: dict | list, key: str) -> Any:
    """A key of a dict, or the number of an item that a list has."""
    if isinstance(place, dict):
        return key
    if not key.isdigit() or int(key) >= len(place):
        raise UserError(f"{text!r}: {key} is no item of a list of {len(place)}.")
    return int(key)


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as text, because it lacks the dot: nobody means text by it."""
    if isinstance(value, dict):
        return {k: _number(v) for k, v in value.items()}
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def parse(values: dict[str, Any], name: str) -> RunConfig:
    """A checked configuration from plain values; `name` is where they came from."""
    values = _number(values)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        problems = error.errors()
    lines = [line for e in problems for line in _explain(e).split("\n")]
    lines += [line for line in _between(values, [e["loc"] for e in problems]) if line not in lines]
    raise UserError(f"{name}: {len(lines)} problem(s)\n  " + "\n  ".join(lines))


def _between(values: dict[str, Any], wrong: Sequence[Sequence[int | str]]) -> list[str]:
    """Problems between keys, which pydantic looks for only where every key is right by itself:
    those at `wrong` are put aside, and what is said about them too.
    """
    places = {".".join(map(str, place)) for place in wrong}
    placeholders: dict[str, Any] = {"model": ".", "out": ".", "data": {"train": [{"path": "."}]}}
    rest = dict(placeholders)
    for section, given in values.items():
        if isinstance(given, dict) and section != "data":
            rest[section] = {k: v for k, v in given.items() if f"{section}.{k}" not in places}
    try:
        RunConfig.model_validate(placeholders | {k: v for k, v in rest.items() if k not in places})
    except ValidationError as error:
        found = [line for e in error.errors() if not e["loc"] for line in _explain(e).split("\n")]
        return [line for line in found if not any(place and place in line for place in places)]
    return []


def _explain(problem: Any) -> str:
    place = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        known = _keys_beside(problem["loc"])
        close = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        hint = f"Did you mean `{close[0]}`?" if close else f"Known: {', '.join(known)}."
        return f"{place} is not a key. {hint}"
    if problem["type"] == "missing":
        return f"{place} is missing."
    message = problem["msg"].removeprefix("Value error, ")
    if not place:
        return message
    return f"{place}={problem['input']!r}: {message[0].lower()}{message[1:]}."


def _keys_beside(place: Sequence[int | str]) -> list[str]:
    """The keys of the section that `place` lies in."""
    section: Any = RunConfig
    for part in place[:-1]:
        if isinstance(part, str):
            annotation = section.model_fields[part].annotation
            section = next(
                (a for a in getattr(annotation, "__args__", ()) if isinstance(a, type)), annotation
            )
    return list(section.model_fields)
