"""A tiny LLaMA as a GGUF file, laid out as llama.cpp's converter does, tokenizer and all.

    weights = write_toy_gguf(tmp_path / "toy.gguf", layers=2)

Values are rounded to 4 or 8 bits, query and key rows permuted, and the tokenizer is a byte-level
BPE of Python's own sources, so text costs about as few tokens as with a real one.
"""

import functools
import json
import sysconfig
from pathlib import Path

import gguf
import numpy
from gguf import GGMLQuantizationType as Quantization
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

ROPE_THETA = 100_000.0
EPS = 1e-5
CONTEXT = 2048
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

Arrays = dict[str, numpy.ndarray]


def write_toy_gguf(
    path: Path,
    layers: int = 2,
    hidden: int = 288,
    heads: int = 9,
    kv_heads: int = 3,
    intermediate: int = 384,
    vocab_size: int = 768,
    quantization: str = "Q4_1",
    tied: bool = True,
    seed: int = 0,
) -> Arrays:
    """Write the file; returns the weights before rounding under transformers' names.

    `hidden` and `intermediate` are multiples of 32, the size of a quantised block.
    """
    weights = toy_weights(layers, hidden, heads, kv_heads, intermediate, vocab_size, tied, seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Toy")
    writer.add_block_count(layers)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(intermediate)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_layer_norm_rms_eps(EPS)
    writer.add_vocab_size(vocab_size)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_tokenizer(writer, vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    for name, value in weights.items():
        if "q_proj" in name:
            value = permute(value, heads)
        elif "k_proj" in name:
            value = permute(value, kv_heads)
        kind = Quantization[quantization]
        if value.ndim == 1:
            kind = Quantization.F32
        elif "embed_tokens" in name:  # as llama.cpp: too few bits there cost the most
            kind = Quantization.Q8_0
        stored = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(stored, gguf.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def permute(rows: numpy.ndarray, heads: int) -> numpy.ndarray:
    """Rows of each head from halves (transformers' rotary pairs) to neighbours (llama.cpp's)."""
    return rows.reshape(heads, 2, -1, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def unpermute(rows: numpy.ndarray, heads: int) -> numpy.ndarray:
    """The inverse of `permute`."""
    return rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def toy_weights(
    layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int, vocab_size: int,
    tied: bool, seed: int,
) -> Arrays:  # fmt: skip
    """Weights at O(1) scale under transformers' names, float32."""
    numbers = numpy.random.default_rng(seed)
    kv = hidden // heads * kv_heads

    def matrix(rows: int, columns: int) -> numpy.ndarray:
        return numbers.normal(0, columns**-0.5, (rows, columns)).astype(numpy.float32)

    def norm() -> numpy.ndarray:
        return (1 + 0.1 * numbers.normal(size=hidden)).astype(numpy.float32)

    weights = {"model.embed_tokens.weight": matrix(vocab_size, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        weights[f"{at}.input_layernorm.weight"] = norm()
        for name, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            weights[f"{at}.self_attn.{name}_proj.weight"] = matrix(rows, hidden)
        weights[f"{at}.post_attention_layernorm.weight"] = norm()
        for name in ("gate", "up"):
            weights[f"{at}.mlp.{name}_proj.weight"] = matrix(intermediate, hidden)
        weights[f"{at}.mlp.down_proj.weight"] = matrix(hidden, intermediate)
    weights["model.norm.weight"] = norm()
    if not tied:
        weights["lm_head.weight"] = matrix(vocab_size, hidden)
    return weights


@functools.cache
def toy_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of Python's own sources."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library = Path(sysconfig.get_path("stdlib"))
    texts = [(library / f"{name}.py").read_text() for name in ("argparse", "inspect", "typing")]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _add_tokenizer(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    model = json.loads(toy_tokenizer(vocab_size).to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    kinds = [gguf.TokenType.CONTROL if t in SPECIAL else gguf.TokenType.NORMAL for t in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(SPECIAL.index("<|im_start|>"))
    writer.add_eos_token_id(SPECIAL.index("<|im_end|>"))
    writer.add_unk_token_id(SPECIAL.index("<|endoftext|>"))
    writer.add_pad_token_id(SPECIAL.index("<|im_end|>"))
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(CHAT_TEMPLATE)
