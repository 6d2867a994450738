"""Documents survive preparation bit for bit; what cannot be prepared is refused whole."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pandas
import pytest
from corpora import problems, train_tokenizer
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from moe.data import tokenise
from moe.data.command import app
from moe.data.manifest import path_of, read_manifest, verify_files
from moe.data.prepare import prepare
from moe.data.sources import SourceOptions
from moe.errors import Corrupt, UserError
from moe.model import RoutedLlamaConfig

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = SourceOptions(text_fields=("question",))


def documents(prefix: Path) -> list[numpy.ndarray]:
    from moe.data.indexed import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    return [numpy.array(dataset[index]) for index in range(len(dataset))]


def texts(prefix: Path, tokenizer: str) -> list[str]:
    """The documents' text, after checking that EOS ends each and stands nowhere else."""
    decoder = AutoTokenizer.from_pretrained(tokenizer)
    found = []
    for tokens in documents(prefix):
        assert tokens[-1] == decoder.eos_token_id
        found.append(decoder.decode(tokens[:-1].tolist(), clean_up_tokenization_spaces=False))
    return found


def files(prefix: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in prefix.parent.iterdir() if path.is_file()}


def test_records_come_back_bit_for_bit(maths, maths_prefix, tokenizer) -> None:
    assert texts(maths_prefix, tokenizer) == problems(maths)


def test_source_files_come_back_bit_for_bit_in_path_order(code, code_prefix, tokenizer) -> None:
    paths = [*sorted(code.glob("*.py")), *sorted((code / "nested").glob("*.py"))]
    assert texts(code_prefix, tokenizer) == [path.read_bytes().decode() for path in paths]


def test_manifest_says_what_was_written(maths, maths_prefix, tokenizer) -> None:
    manifest = verify_files(maths_prefix)
    found = documents(maths_prefix)
    assert (manifest.documents, manifest.tokens) == (len(found), sum(map(len, found)))
    assert manifest.dtype == found[0].dtype.name == "uint16"
    assert manifest.sources == (str(maths),)
    assert manifest.tokenizer.eos_id == AutoTokenizer.from_pretrained(tokenizer).eos_token_id


def test_a_flipped_bit_is_found(maths_prefix, tmp_path) -> None:
    for extension in ("bin", "idx", "json"):
        path_of(tmp_path / "m", extension).write_bytes(
            path_of(maths_prefix, extension).read_bytes()
        )
    verify_files(tmp_path / "m")
    damaged = bytearray((tmp_path / "m.bin").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "m.bin").write_bytes(damaged)
    with pytest.raises(Corrupt, match=r"m\.bin: xxh3"):
        verify_files(tmp_path / "m")


@pytest.mark.slow
def test_output_does_not_depend_on_workers(code, tokenizer, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tokenise, "BATCH_CHARACTERS", 20_000)
    written = []
    for workers in (1, 2):
        prefix = tmp_path / str(workers) / "code"
        prepare([str(code)], tokenizer, prefix, workers=workers, validation=0.2, quiet=True)
        written.append(files(prefix))
    assert len(written[0]) == 6
    assert written[0] == written[1]


def test_every_format_gives_the_same_documents(maths, tokenizer, tmp_path) -> None:
    expected = problems(maths)[:50]
    frame = pandas.DataFrame({"question": expected, "number": range(50)})
    frame.to_parquet(tmp_path / "m.parquet")
    frame.to_csv(tmp_path / "m.csv", index=False)
    frame.to_csv(tmp_path / "m.tsv", index=False, sep="\t")
    frame.to_json(tmp_path / "m.json", orient="records")
    with gzip.open(tmp_path / "m.jsonl.gz", "wt") as file:
        frame.to_json(file, orient="records", lines=True)
    (tmp_path / "lines.txt").write_text("\n".join(expected))
    names = ["m.parquet", "m.csv", "m.tsv", "m.json", "m.jsonl.gz", "lines.txt"]
    sources = [str(tmp_path / name) for name in names]
    options = SourceOptions(text_fields=("question",), sample_by="line")
    prepare(sources, tokenizer, tmp_path / "out", options=options, quiet=True)
    assert texts(tmp_path / "out", tokenizer) == expected * len(names)


def test_fields_are_joined_and_a_text_file_is_one_document(maths, tokenizer, tmp_path) -> None:
    (tmp_path / "prose.txt").write_text("One.\n\nTwo.\n")
    options = SourceOptions(text_fields=("question", "answer"))
    sources = [str(maths), str(tmp_path / "prose.txt")]
    prepare(sources, tokenizer, tmp_path / "out", options=options, quiet=True)
    found = texts(tmp_path / "out", tokenizer)
    first = json.loads(maths.read_text().splitlines()[0])
    assert found[0] == f"{first['question']}\n{first['answer']}"
    assert found[-1] == "One.\n\nTwo.\n"


def test_validation_takes_whole_documents_by_their_content(maths, tokenizer, tmp_path) -> None:
    lines = maths.read_text().splitlines(keepends=True)
    (tmp_path / "reversed.jsonl").write_text("".join(reversed(lines)))
    held_out = []
    for name, source in (("a", maths), ("b", tmp_path / "reversed.jsonl")):
        prefix = tmp_path / name
        prepare([str(source)], tokenizer, prefix, options=QUESTIONS, validation=0.1, quiet=True)
        validation = texts(prefix.with_name(f"{name}-validation"), tokenizer)
        assert sorted(texts(prefix, tokenizer) + validation) == sorted(problems(maths))
        held_out.append(sorted(validation))
    assert held_out[0] == held_out[1]
    assert 15 <= len(held_out[0]) <= 45  # 10 % of 300, three deviations


def test_limit_reads_no_further(maths, tokenizer, tmp_path) -> None:
    prepared = prepare(
        [str(maths)], tokenizer, tmp_path / "m", options=QUESTIONS, limit_documents=7, quiet=True
    )
    assert prepared.train.documents == 7


def test_empty_and_undecodable_documents_are_left_out_and_told(tokenizer, tmp_path) -> None:
    folder = tmp_path / "src"
    (folder / ".hidden").mkdir(parents=True)
    (folder / ".hidden" / "x.py").write_text("hidden")
    (folder / "empty.py").write_text(" \n")
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    (folder / "real.md").write_text("# café")
    (folder / "skipped.bin").write_bytes(b"\0")
    prepared = prepare([str(folder)], tokenizer, tmp_path / "out", quiet=True)
    assert texts(tmp_path / "out", tokenizer) == ["# café"]
    assert prepared.empty == 1
    assert prepared.undecodable == (str(folder / "latin.txt"),)


def test_large_vocabularies_are_stored_in_32_bits(tmp_path) -> None:
    vocabulary = {f"w{index}": index for index in range(70_000)} | {"</s>": 70_000}
    model = models.WordLevel(vocabulary, unk_token="w0")
    folder = tmp_path / "tokenizer"
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token="</s>")
    fast.save_pretrained(folder)
    (tmp_path / "a.txt").write_text("w69999")
    prepared = prepare([str(tmp_path / "a.txt")], str(folder), tmp_path / "out", quiet=True)
    assert prepared.train.dtype == "int32"
    assert documents(tmp_path / "out")[0].tolist() == [69_999, 70_000]


def test_beginning_of_sequence_is_kept_where_the_tokenizer_adds_it(tmp_path) -> None:
    from tokenizers.processors import TemplateProcessing

    folder = train_tokenizer(tmp_path / "tokenizer", eos_token="</s>")
    fast = PreTrainedTokenizerFast.from_pretrained(folder)
    fast.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    fast.save_pretrained(folder)
    (tmp_path / "a.txt").write_text("def f():")
    prepare([str(tmp_path / "a.txt")], str(folder), tmp_path / "out", quiet=True)
    tokens = documents(tmp_path / "out")[0]
    assert tokens[0] == 0
    assert tokens[-1] == 1
    assert tokens.tolist().count(1) == 1


@pytest.fixture
def bad(tmp_path) -> Path:
    (tmp_path / "numbers.jsonl").write_text('{"text": "a", "n": 1}\n{"text": "b", "n": 2}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.txt").write_text("\n\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "data.parquet").write_bytes(b"")
    (tmp_path / "exists.idx").write_bytes(b"kept")
    return tmp_path


@pytest.mark.parametrize(
    ("source", "out", "options", "message"),
    [
        (
            "numbers.jsonl",
            "o",
            {"text_fields": ("body",)},
            "no field 'body'.*text, n: .*--text-field",
        ),
        ("numbers.jsonl", "o", {"text_fields": ("n",)}, "'n' of record 0 is int, not text"),
        ("broken.jsonl", "o", {}, r"broken\.jsonl cannot be read"),
        ("broken.parquet", "o", {}, r"broken\.parquet cannot be read"),
        ("empty.jsonl", "o", {}, "no document to write: 0 empty"),
        ("blank.txt", "o", {}, "no document to write: 1 empty"),
        ("folder", "o", {}, r"no file matches --pattern .*\.parquet"),
        ("missing.jsonl", "o", {}, "no such file or folder"),
        ("numbers.jsonl", "exists", {}, r"exists\.idx exists.*another --out"),
    ],
)
def test_bad_sources_end_in_one_clear_error(bad, tokenizer, source, out, options, message) -> None:
    before = files(bad / "o")
    with pytest.raises(UserError, match=message):
        prepare(
            [str(bad / source)], tokenizer, bad / out, options=SourceOptions(**options), quiet=True
        )
    assert files(bad / "o") == before


def test_unreachable_hub_dataset_is_an_error(tokenizer, tmp_path) -> None:
    with pytest.raises(UserError, match="nobody/nothing cannot be read"):
        prepare(["nobody/nothing"], tokenizer, tmp_path / "o", quiet=True)


def test_too_few_documents_for_validation_are_refused(tokenizer, tmp_path) -> None:
    (tmp_path / "a.txt").write_text("alone")
    with pytest.raises(UserError, match="none of the 1 documents fell to validation"):
        prepare([str(tmp_path / "a.txt")], tokenizer, tmp_path / "o", validation=0.01, quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt"]


def test_tokenizer_without_eos_is_refused(maths, tmp_path) -> None:
    folder = train_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(UserError, match=r'no EOS token.*Set "eos_token" in'):
        prepare([str(maths)], str(folder), tmp_path / "o", options=QUESTIONS, quiet=True)


def test_tokenizer_code_is_never_run(maths, tmp_path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"is code of its own .*, which is never run"):
        prepare([str(maths)], str(folder), tmp_path / "o", options=QUESTIONS, quiet=True)
    assert not (tmp_path / "ran").exists()


def moe_data_prepare(*arguments: str, **popen) -> subprocess.Popen:
    command = [sys.executable, "-m", "moe.cli", "data", "prepare", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen
    )


def test_full_disk_is_told_and_leaves_nothing(maths, tokenizer, tmp_path) -> None:
    (tmp_path / "m.bin.partial").symlink_to("/dev/full")
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        prepare([str(maths)], tokenizer, tmp_path / "m", options=QUESTIONS, quiet=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_command_reports_and_its_errors_end_in_one_line(maths, tokenizer, tmp_path) -> None:
    arguments = [str(maths), "--tokenizer", tokenizer, "--out", str(tmp_path / "m")]
    process = moe_data_prepare(*arguments)
    output, errors = process.communicate()
    assert (process.returncode, output) == (2, "")
    assert errors.startswith("error: ")
    assert "Its fields are question, answer" in errors
    assert errors.count("\n") == 1
    output, progress = moe_data_prepare(*arguments, "--text-field", "question").communicate()
    assert f"{tmp_path}/m: 300 documents" in output
    assert "prepare: 300 documents" in progress
    assert "MB/s, took" in progress


def test_json_report(maths, tokenizer, tmp_path) -> None:
    arguments = [str(maths), "--tokenizer", tokenizer, "--out", str(tmp_path / "m")]
    result = CliRunner().invoke(app, ["prepare", *arguments, "--text-field", "answer", "--json"])
    assert json.loads(result.stdout)["train"]["documents"] == 300


@pytest.mark.slow
def test_killed_in_the_middle_nothing_is_there_and_the_next_run_succeeds(
    tokenizer, tmp_path
) -> None:
    source = tmp_path / "many.jsonl"
    with source.open("w") as file:
        for index in range(30_000):
            file.write(json.dumps({"text": f"{index} is a number among others " * 10}) + "\n")
    arguments = [str(source), "--tokenizer", tokenizer, "--out", str(tmp_path / "m")]
    process = moe_data_prepare(*arguments, "--workers", "1", start_new_session=True)
    partial = tmp_path / "m.bin.partial"
    while process.poll() is None and not (partial.exists() and partial.stat().st_size > 1e5):
        time.sleep(0.02)
    assert process.poll() is None, "it ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    with pytest.raises(UserError, match="not prepared data"):
        read_manifest(tmp_path / "m")
    prepare([str(source)], tokenizer, tmp_path / "m", limit_documents=100, quiet=True)
    assert verify_files(tmp_path / "m").documents == 100


def test_the_tokenizer_of_a_mixture_with_scaled_positions_loads(tokenizer, tmp_path):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    folder = tmp_path / "mixture"
    shutil.copytree(tokenizer, folder)
    RoutedLlamaConfig(rope_parameters=rope, mlp={"kind": "dense"}).save_pretrained(folder)
    (tmp_path / "a.txt").write_text("some text\n" * 50)
    result = prepare([str(tmp_path / "a.txt")], str(folder), tmp_path / "out", quiet=True)
    assert result.train.tokens > 50
