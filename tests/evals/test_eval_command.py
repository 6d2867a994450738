"""`moe eval`: the real harness on toy models, its numbers held against logits by hand."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data import shared
from invoke import moe
from lm_eval.api.instance import Instance
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from toy_gguf import write_toy_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe.checkpoint import store
from moe.engines.base import Entry
from moe.errors import UserError
from moe.evals.adapter import MoeLM
from moe.upcycle.writer import copy_side_files

CAUSATIVE = "local_blimp_causative"
TEXT = "def add(left, right):\n    return left + right\n\n\nclass Router:\n    pass\n"
PAIRS = [("Aaron breaks the glass.", "Aaron appeared the glass."),
         ("Donald opened the doors.", "Donald vanished the doors."),
         ("A car stopped.", "A car the stopped."),
         ("Tara burnt every cup.", "Tara smiled every cup."),
         ("She sank it.", "She slept it.")]  # fmt: skip


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Callable[[str], Path]:
    """`toys("dense")`: a model folder; `other` has other weights, `routed` is its MoE."""
    root = tmp_path_factory.mktemp("toys")
    for seed, name in enumerate(("dense", "other")):
        write_toy_gguf(root / f"{name}.gguf", layers=1, hidden=96, heads=6, kv_heads=2, seed=seed)
        assert moe("import", root / f"{name}.gguf", "--out", root / name).code == 0
    options = ("--num-experts", 4, "--top-k", 2, "--diversify", "noise:0.1", "--no-verify")
    made = moe("upcycle", "copy", "--source", root / "dense", "--out", root / "routed", *options)
    assert made.code == 0, made.err
    return lambda name: root / name


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A data folder of our own: a text, and pairs for one task."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("text", "blimp"):
        (folder / name).mkdir()
    (folder / "text" / "code.py").write_text(TEXT)
    (folder / "text" / "not_read.bin").write_bytes(b"\xff")
    rows = [json.dumps({"sentence_good": good, "sentence_bad": bad}) for good, bad in PAIRS]
    (folder / "blimp" / "causative.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def evaluate(tmp_path, written) -> Callable[..., dict[str, Any]]:
    """Run the command; the results.json it wrote."""

    def call(model: Path, *arguments: object, data: Path = written) -> dict[str, Any]:
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        result = moe("eval", model, "--data", data, "--out", out, *arguments)
        assert result.code == 0, result.err
        assert "requests:" not in result.err, "bars in a log"
        assert (out / "results.md").read_text().split("\n\n")[1].strip() in result.out
        return json.loads((out / "results.json").read_text())

    return call


def values(report: dict[str, Any]) -> dict[tuple[str, str], list[float]]:
    return {(row["task"], row["metric"]): row["values"] for row in report["rows"]}


@torch.no_grad()
def likelihood(folder: Path, context: str, text: str) -> tuple[float, bool]:
    """Log-probability of `text` after `context`, and whether it is the likeliest, from logits."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    before = tokenizer(context)["input_ids"] or [tokenizer.bos_token_id]
    after = tokenizer(context + text)["input_ids"][len(before) if context else 0 :]
    logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
    chosen = F.log_softmax(logits.double(), -1).gather(1, torch.tensor(after)[:, None])
    return chosen.sum().item(), bool((logits.argmax(-1) == torch.tensor(after)).all())


def choices(folder: Path) -> list[float]:
    """1 for each pair whose first sentence is the likelier; the harness puts a space before."""
    likelihoods = [[likelihood(folder, "", f" {s}")[0] for s in pair] for pair in PAIRS]
    return [float(good > bad) for good, bad in likelihoods]


def requests(kind: Any, pairs: list[tuple[str, ...]]) -> list[Instance]:
    return [Instance(kind, {}, arguments, i) for i, arguments in enumerate(pairs)]


@pytest.mark.parametrize("name", ["dense", "routed"])
def test_the_adapters_likelihoods_are_those_of_the_logits(name, toys):
    pairs = [
        ("def add(left,", " right):"),
        ("import", " json"),
        ("x = 1", "\ny = 2"),
        ("", "class"),
    ]
    lm = MoeLM(toys(name), batch_size=3)
    found = lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    for pair, (value, greedy) in zip(pairs, found, strict=True):
        expected, likeliest = likelihood(toys(name), *pair)
        assert math.isclose(value, expected, rel_tol=1e-4), pair
        assert greedy == likeliest
    rolling = requests("loglikelihood_rolling", [(TEXT,)])
    (value,) = lm.loglikelihood_rolling(rolling, disable_tqdm=True)
    assert math.isclose(value, likelihood(toys(name), "", TEXT)[0], rel_tol=1e-4)


def test_folders_of_text_are_domains(toys, evaluate, tmp_path):
    for name, text in (("code", TEXT), ("prose", "A car stopped.\nTara burnt every cup.\n")):
        (tmp_path / "data" / "text" / name).mkdir(parents=True)
        (tmp_path / "data" / "text" / name / "a.txt").write_text(text)
    options = ("--tasks", "local_perplexity", "--baseline", toys("other"))
    report = evaluate(toys("dense"), *options, data=tmp_path / "data")
    found = values(report)
    assert {task for task, _ in found} == {"local_perplexity_code", "local_perplexity_prose"}
    total, _ = likelihood(toys("dense"), "", TEXT)
    bits, _ = found["local_perplexity_code", "bits_per_byte"]
    assert math.isclose(bits, -total / len(TEXT.encode()) / math.log(2), rel_tol=1e-4)


def test_what_looks_ahead_is_not_scored(toys, tmp_path):
    options = ("--mlp-experts", 4, "--mode", "expert_choice", "--no-verify")
    assert (
        moe("upcycle", "uoe", "--source", toys("dense"), "--out", tmp_path / "m", *options).code
        == 0
    )
    lm = MoeLM(tmp_path / "m")
    with pytest.raises(UserError, match=r"not causal.*token_choice"):
        lm.loglikelihood(requests("loglikelihood", [("import", " json")]), disable_tqdm=True)
    with pytest.raises(UserError, match="not causal"):
        lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(TEXT,)]), disable_tqdm=True)


def test_generation_is_the_models_own(toys):
    lm = MoeLM(toys("routed"))
    options = {"until": ["\n\n\n"], "max_gen_toks": 5, "do_sample": False}
    (text,) = lm.generate_until(requests("generate_until", [("import", options)]), True)
    tokenizer = AutoTokenizer.from_pretrained(toys("routed"))
    ids: Tensor = tokenizer("import", return_tensors="pt")["input_ids"]
    made = lm.model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    assert text == tokenizer.decode(made, skip_special_tokens=True)


def test_perplexity_and_accuracy_by_hand(toys, evaluate):
    report = evaluate(toys("dense"), "--tasks", f"local_perplexity, {CAUSATIVE}")
    found = values(report)
    total, _ = likelihood(toys("dense"), "", TEXT)
    (bits,) = found["local_perplexity", "bits_per_byte"]
    (words,) = found["local_perplexity", "word_perplexity"]
    assert math.isclose(bits, -total / len(TEXT.encode()) / math.log(2), rel_tol=1e-4)
    assert math.isclose(words, math.exp(-total / len(TEXT.split())), rel_tol=1e-3)
    right = choices(toys("dense"))
    assert found[CAUSATIVE, "acc"] == [sum(right) / len(PAIRS)]


def test_differences_and_their_errors_by_hand(toys, evaluate, tmp_path):
    dense, other = toys("dense"), toys("other")
    report = evaluate(dense, "--tasks", f"{CAUSATIVE},local_perplexity", "--baseline", other)
    correct = [choices(m) for m in (dense, other)]
    differences = [a - b for a, b in zip(*correct, strict=True)]
    mean = sum(differences) / len(PAIRS)
    error = math.sqrt(sum((d - mean) ** 2 for d in differences) / (len(PAIRS) - 1) / len(PAIRS))
    assert error > 0, "the toy models answer alike: nothing is tested"
    row = next(r for r in report["rows"] if r["task"] == CAUSATIVE)
    assert row["values"] == [sum(c) / len(PAIRS) for c in correct]
    assert math.isclose(row["differences"][0]["value"], mean, abs_tol=1e-12)
    assert math.isclose(row["differences"][0]["error"], error)
    for value, own in zip(row["errors"], row["values"], strict=True):
        assert math.isclose(value, math.sqrt(own * (1 - own) / (len(PAIRS) - 1)))
    bits = next(r for r in report["rows"] if r["metric"] == "bits_per_byte")
    assert bits["differences"][0]["value"] == bits["values"][0] - bits["values"][1]
    assert bits["differences"][0]["error"] is None  # of one document there is no spread
    text = next(tmp_path.glob("*/results.md")).read_text()
    assert "| dense - other" in text and f"{mean:+.4f} ± {error:.4f}" in text
    assert [m["path"] for m in report["models"]] == [str(dense), str(other)]
    assert report["models"][0]["receipt"] != report["models"][1]["receipt"]
    assert report["versions"].keys() == {"lm_eval", "torch", "transformers", "python"}


def save(folder: Path, out: Path) -> Path:
    """The weights of a model folder as a training checkpoint of one rank."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    entries = [Entry(n, "parameter", p.detach()) for n, p in model.named_parameters()]
    progress = store.Progress(
        step=3, consumed_samples=24, updates=3, config={"data": {}}, reference=None
    )

    def side_files(target: Path) -> None:
        copy_side_files(folder, target)
        model.config.save_pretrained(target)

    return store.save(out, 3, entries, progress, 0, lambda value: [value], side_files)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "routed"])
def test_a_checkpoint_gives_the_numbers_of_its_weights(name, toys, evaluate, tmp_path):
    step = save(toys(name), tmp_path / "run")
    tasks = ("--tasks", f"{CAUSATIVE},local_perplexity")
    report = evaluate(step, *tasks, "--baseline", toys(name))
    for row in report["rows"]:
        assert row["values"][0] == row["values"][1], row
        assert row["differences"][0]["value"] == 0
    sizes = {"total_parameters", "active_parameters", "flops_per_token"}
    assert report["models"][0].keys() == {"path", "config", "manifest"} | sizes
    assert {report["models"][0][name] == report["models"][1][name] for name in sizes} == {True}
    # negative control: other weights, other numbers
    other = values(evaluate(save(toys("other"), tmp_path / "another"), *tasks))
    bits = ("local_perplexity", "bits_per_byte")
    assert other[bits][0] != values(report)[bits][0]


@pytest.mark.slow
def test_a_damaged_model_scores_otherwise(toys, evaluate, tmp_path):
    """Negative control, and the receipt knows of it."""
    damaged = Path(shutil.copytree(toys("dense"), tmp_path / "damaged"))
    weights = load_file(damaged / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][:, ::7] *= -4
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    report = evaluate(damaged, "--tasks", "local_perplexity", "--baseline", toys("dense"))
    row = next(r for r in report["rows"] if r["metric"] == "bits_per_byte")
    assert abs(row["differences"][0]["value"]) > 1e-3
    assert moe("verify", damaged).code == 3


def test_limit_takes_the_first_items(toys, evaluate, tmp_path):
    report = evaluate(toys("dense"), "--tasks", CAUSATIVE, "--limit", 2)
    assert report["results"][0]["n-samples"][CAUSATIVE]["effective"] == 2
    right = [likelihood(toys("dense"), "", g)[0] > likelihood(toys("dense"), "", b)[0]
             for g, b in PAIRS[:2]]  # fmt: skip
    assert values(report)[CAUSATIVE, "acc"] == [sum(right) / 2]
    assert "2 items per task" in next(tmp_path.glob("*/results.md")).read_text()


def test_tasks_of_the_users_own(toys, evaluate, written, tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = tmp_path / "rows.json"
    rows.write_text("\n".join(json.dumps({"q": q, "a": a}) for q, a in (("1+1=", 2), ("2+2=", 4))))
    (folder / "sums.yaml").write_text(f"""
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{['2', '3', '4'].index(a|string)}}}}"
doc_to_choice: ["2", "3", "4"]
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""")
    report = evaluate(toys("dense"), "--tasks", f"sums,{CAUSATIVE}", "--include-path", folder)
    assert report["results"][0]["n-samples"]["sums"]["original"] == 2
    best = [max("234", key=lambda c: likelihood(toys("dense"), q, f" {c}")[0])
            for q in ("1+1=", "2+2=")]  # fmt: skip
    assert values(report)["sums", "acc"] == [((best[0] == "2") + (best[1] == "4")) / 2]
    assert (CAUSATIVE, "acc") in values(report)
    wrong = (folder / "sums.yaml").read_text().replace("a|string", "nothing.a")
    (folder / "sums.yaml").write_text(wrong)
    options = ("--tasks", "sums", "--include-path", folder, "--out", tmp_path / "none")
    result = moe("eval", toys("dense"), *options)
    assert result.code == 2 and "a template of sums fails" in result.err


@pytest.mark.slow
def test_real_tasks_read_the_shared_data(toys, evaluate):
    data = shared("piqa/valid.jsonl").parents[1]
    shared("gsm8k/test.jsonl")
    tasks = ("--tasks", "local_piqa,local_gsm8k", "--limit", 2)
    found = values(evaluate(toys("routed"), *tasks, data=data))
    sums = ("exact_match (strict-match)", "exact_match (flexible-extract)")
    piqa = {("local_piqa", "acc"), ("local_piqa", "acc_norm")}
    assert found.keys() == piqa | {("local_gsm8k", metric) for metric in sums}
    question = json.loads((data / "piqa/valid.jsonl").read_text().splitlines()[0])
    assert {"goal", "sol1", "sol2"} <= question.keys()


@pytest.mark.slow
def test_the_smoke_suite(toys, evaluate):
    for name in ("blimp/causative.jsonl", "piqa/valid.jsonl", "wikitext2/test.txt"):
        data = shared(name).parents[1]
    report = evaluate(toys("routed"), "--suite", "smoke", "--limit", 3, data=data)
    counts = report["results"][0]["n-samples"]
    assert len(counts) == 10 and all(c["effective"] == 3 for c in counts.values())
    found = values(report)
    accuracies = [v for (t, _), (v,) in found.items() if t.startswith("local_blimp_")]
    assert math.isclose(found["local_blimp", "acc"][0], sum(accuracies) / 8)
    assert found["local_wikitext2", "bits_per_byte"][0] > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--suite", "smok"), "There is bam, moh14, smoke, uoe"),
        (("--suite", "smoke", "--tasks", "local_piqa"), "either --tasks or --suite"),
        ((), "either --tasks or --suite"),
        (("--tasks", ","), "either --tasks or --suite"),
        (("--tasks", CAUSATIVE, "--limit", 0), "--limit"),
        (("--tasks", CAUSATIVE, "--limit", -1), "--limit"),
        (("--tasks", CAUSATIVE, "--batch-size", 0), "--batch-size"),
        (("--tasks", CAUSATIVE, "--include-path", "no/such"), "no/such is not a folder"),
        (("--tasks", CAUSATIVE, "--baseline", "no/such"), "no/such is not a folder"),
        (("--tasks", CAUSATIVE), "with --data"),
        (("--tasks", CAUSATIVE, "--data", "."), "causative.jsonl does not exist"),
        (("--tasks", "local_perplexity", "--data", "no/such"), "--data no/such is not a folder"),
        (("--tasks", "local_perplexity", "--data", str(Path(__file__).parent)), "(*.txt, "),
    ],
)
def test_impossible_requests_are_refused(arguments, message, toys, tmp_path):
    result = moe("eval", toys("dense"), "--out", tmp_path / "out", *arguments)
    assert result.code == 2 and message in result.err, result.err
    assert not (tmp_path / "out").exists()


def test_problems_come_together_before_anything_is_evaluated(toys, tmp_path):
    (tmp_path / "pickled").mkdir()
    shutil.copy(toys("dense") / "config.json", tmp_path / "pickled")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80")
    baselines = ("--baseline", tmp_path / "pickled", "--baseline", "none")
    result = moe("eval", toys("dense"), *baselines, "--data", "no/such", "--out", tmp_path / "out")
    assert result.code == 2 and "evaluating" not in result.err
    for part in ("pickled weights", "none is not a folder", "no/such", "--tasks or --suite"):
        assert part in result.err


@pytest.mark.slow
def test_unknown_tasks_name_the_closest(toys, tmp_path):
    names = "local_pica,hellaswagg,local_piqa"
    result = moe("eval", toys("dense"), "--tasks", names, "--out", tmp_path / "out")
    first, second = result.err.splitlines()
    assert result.code == 2
    assert "'local_pica'" in first and "local_piqa" in first.partition("Closest:")[2]
    assert "'hellaswagg'" in second and "hellaswag," in second.partition("Closest:")[2]


def test_an_output_that_is_in_the_way_is_left_alone(toys, written, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "file").write_text("")
    for out, message in ((tmp_path / "out", "exists"), (tmp_path / "file" / "out", "written to")):
        arguments = ("--tasks", CAUSATIVE, "--data", written, "--out", out)
        result = moe("eval", toys("dense"), *arguments)
        assert result.code == 2 and message in result.err
    assert not list((tmp_path / "out").iterdir())


def test_models_that_cannot_be_trusted_are_refused(toys, written, tmp_path):
    """Missing weights would be drawn, pickles run code, half a file gives half a model."""
    model = tmp_path / "model"
    shutil.copytree(toys("dense"), model)
    file = model / "model.safetensors"
    sound, weights = file.read_bytes(), load_file(file)

    def refused(code: int) -> str:
        arguments = ("--tasks", CAUSATIVE, "--data", written, "--out", tmp_path / "out")
        result = moe("eval", model, *arguments)
        assert result.code == code and not (tmp_path / "out").exists(), result
        return result.err

    lost = "model.layers.0.mlp.up_proj.weight"
    save_file({n: t for n, t in weights.items() if n != lost}, file, {"format": "pt"})
    assert lost in refused(2)
    save_file({**weights, lost: weights[lost] / 0}, file, {"format": "pt"})
    assert f"{lost} holds values that are not finite" in refused(3)
    file.write_bytes(sound[:-100])
    assert str(model) in refused(3)
    file.rename(model / "pytorch_model.bin")
    assert "pickled weights" in refused(2)
    (model / "pytorch_model.bin").unlink()
    assert "holds no weights" in refused(2)
    file.write_bytes(sound)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    assert "tokenizer" in refused(2)
    (model / "config.json").write_text("{oops")
    assert "config.json" in refused(2)


def test_a_damaged_checkpoint_is_refused(toys, written, tmp_path):
    step = save(toys("dense"), tmp_path / "run")
    file = step / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1  # the end is a generator, not read
    file.write_bytes(data)
    arguments = ("--tasks", CAUSATIVE, "--data", written, "--out", tmp_path / "out")
    result = moe("eval", step, *arguments)
    assert result.code == 3 and file.name in result.err
    assert moe("verify", step).code == 3
