"""A GGUF file as a dense model and its tokenizer, through transformers' reader.

    model, tokenizer = read_gguf(Path("SmolLM2-135M-Instruct.Q4_1.gguf"), torch.float32)

That reader drops without a word what it does not know, and draws what it does not find: both are
refused here.
"""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moe.errors import Corrupt, UserError
from moe.hf.families import require_family
from moe.progress import quiet_libraries

ROPE_FACTORS = "rope_freqs.weight"
# what Llama 3.1, 3.2 and 3.3 have in common; only the factor differs (8, 32, 8)
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read_gguf(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
    """The model, dequantised to `dtype`, and its tokenizer.

    Raises UserError where it is no LLaMA-like model or holds what the result could not, Corrupt
    where the file is damaged.
    """
    reader = _open(path)
    architecture = _field(reader, "general.architecture")
    require_family("general.architecture", architecture)
    scaling = _field(reader, f"{architecture}.rope.scaling.type")
    if scaling not in (None, "none"):
        raise UserError(
            f"{path}: {architecture}.rope.scaling.type={scaling!r} is not read from GGUF files. "
            "Import the model's folder of safetensors, where the scaling is in config.json."
        )
    quiet_libraries()
    try:
        with _parsed_once(reader):
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=dtype, trust_remote_code=False
            )
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # the GGUF readers raise what they like over a bad file
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path} cannot be read as a GGUF model: {reason}") from error
    _recover_scaling(reader, model.config)
    _check_tensors(path, reader, model)
    # the tensors are plain by now, but the config still says they are quantised
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None  # type: ignore[assignment]
    _shorten_floats(model.config)
    return model, tokenizer


def _open(path: Path) -> gguf.GGUFReader:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file: it does not begin with GGUF.")
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # numpy's, over bytes that are not there
        raise Corrupt(
            f"{path} is truncated or damaged: its {path.stat().st_size} bytes do not hold what its "
            "header says. Download it again."
        ) from error


@contextlib.contextmanager
def _parsed_once(reader: gguf.GGUFReader) -> Iterator[None]:
    """Give transformers `reader` each of the three times it would parse the file.

    Parsing a vocabulary of 50 thousand takes some eight seconds.
    """
    original = gguf.GGUFReader
    vars(gguf)["GGUFReader"] = lambda *_, **__: reader
    try:
        yield
    finally:
        vars(gguf)["GGUFReader"] = original


def _field(reader: gguf.GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()


def _recover_scaling(reader: gguf.GGUFReader, config: PreTrainedConfig) -> None:
    """Put Llama 3's rope scaling back into the config: a GGUF file keeps its effect alone, one
    factor per frequency. Where the factors are none of Llama 3's, the config is left as it is.
    """
    stored = [t for t in reader.tensors if t.name == ROPE_FACTORS]
    if not stored:
        return
    factors = torch.tensor(stored[0].data, dtype=torch.float32)
    scaled = copy.deepcopy(config)
    scaled.rope_parameters = {
        **config.rope_parameters,
        **LLAMA3_SCALING,
        "factor": float(factors.max()),
    }
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](scaled)
    exponent = torch.arange(len(wanted), dtype=torch.float32) / len(wanted)
    plain = scaled.rope_parameters["rope_theta"] ** -exponent
    if factors.shape == wanted.shape and torch.allclose(plain / factors, wanted, rtol=1e-4, atol=0):
        config.rope_parameters = scaled.rope_parameters


def _check_tensors(path: Path, reader: gguf.GGUFReader, model: PreTrainedModel) -> None:
    """The file must hold exactly the model's tensors, all of them finite."""
    config = model.config
    (kind,) = (k for k, name in gguf.MODEL_ARCH_NAMES.items()
               if name == _field(reader, "general.architecture"))  # fmt: skip
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    wanted = {str(names.get_name(n, (".weight", ".bias"))) for n in model.state_dict()}
    if config.tie_word_embeddings:
        wanted.discard("output.weight")
    stored = {tensor.name for tensor in reader.tensors}
    if config.rope_parameters.get("rope_type") == "llama3":
        stored.discard(ROPE_FACTORS)  # it is in the config
    if strange := sorted(stored - wanted):
        raise UserError(
            f"{path}: {len(strange)} tensors have no place in a {config.model_type} model, first "
            f"{strange[0]}: the result would not be the same model. Import its folder of "
            "safetensors instead."
        )
    if missing := sorted(wanted - stored):
        raise Corrupt(f"{path}: {len(missing)} tensors are missing, first {missing[0]}.")
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise Corrupt(f"{path}: {name} holds values that are not finite.")


def _shorten_floats(config: PreTrainedConfig) -> None:
    """GGUF stores float32: write 1e-05 again instead of 9.999999747378752e-06."""
    for name, value in config.to_dict().items():
        if isinstance(value, float):
            setattr(config, name, float(str(numpy.float32(value))))
