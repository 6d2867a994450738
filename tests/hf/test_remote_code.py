"""`moe export --to remote-code`: the model runs from its folder alone, where moe is not."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from invoke import moe
from native_folders import export, load, refused, same_tensors, write
from safetensors.torch import load_file
from tiny import MOE, MOH, TWO_STAGE

import moe.hf.remote_probe as probe
from moe.hf import remote_code

READER = """
import sys
sys.path.insert(0, {probe!r})
from remote_probe import Absent
sys.path.pop(0)
sys.meta_path.insert(0, Absent())
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

def run(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    ids = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)(
        "Some text", return_tensors="pt")["input_ids"]
    options = dict(max_new_tokens=12, do_sample=False)
    logits = model(ids).logits
    return model, ids, logits, model.generate(ids, **options), model.generate(
        ids, use_cache=False, **options)

with torch.no_grad():
    model, ids, logits, cached, whole = run("{folder}")
    config = AutoConfig.from_pretrained("{folder}", trust_remote_code=True)
    assert type(config) is type(model.config)
    base = AutoModel.from_pretrained("{folder}", trust_remote_code=True)
    assert type(base).__name__ == "RoutedLlamaModel"
    model.save_pretrained("{again}")
    AutoTokenizer.from_pretrained("{folder}", trust_remote_code=True).save_pretrained("{again}")
    second = run("{again}")
    assert type(second[0]) is not type(model)        # two copies of the code in one process,
    assert torch.equal(second[2], logits)
    assert torch.equal(model(ids).logits, logits)    # and the first one's operations still work
model.train()(ids, labels=ids).loss.backward()
assert "moe" not in sys.modules
save_file(dict(ids=ids, logits=logits, cached=cached, whole=whole), "{result}")
"""


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    return remote_code.generate([c.__module__ for c in remote_code.CLASSES.values()])


@pytest.mark.slow
def test_a_process_without_moe_computes_the_same(tmp_path):
    experts = {**MOE, "shared_intermediate_size": 24, "num_groups": 2, "top_groups": 1}
    original = write(tmp_path / "routed", "llama", MOH, [experts, {"kind": "dense"}, experts])
    tiny.tokenizer().save_pretrained(tmp_path / "routed")
    receipt = export(tmp_path / "routed", "remote-code", tmp_path / "out")
    assert receipt["verification"]["relative_difference"] == 0
    assert moe("verify", tmp_path / "out").code == 0
    places = {"folder": tmp_path / "out", "again": tmp_path / "again",
              "result": tmp_path / "result.safetensors"}  # fmt: skip
    program = tmp_path / "reader.py"
    program.write_text(READER.format(probe=str(Path(probe.__file__).parent), **places))
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, program], check=True, env=environment, cwd=tmp_path)
    result = load_file(places["result"])
    with torch.no_grad():
        assert torch.equal(result["logits"], original(result["ids"]).logits)
        ours = original.generate(result["ids"], max_new_tokens=12, do_sample=False)
    assert torch.equal(result["cached"], ours) and torch.equal(result["whole"], ours)
    assert load(tmp_path / "out").config.mlp_spec(1).kind == "dense"  # ours still, with moe
    export(tmp_path / "out", "hf", tmp_path / "back")
    assert same_tensors(tmp_path / "back", tmp_path / "routed")
    assert "auto_map" not in json.loads((tmp_path / "back/config.json").read_text())


@pytest.mark.slow
def test_code_that_needs_moe_is_not_published(tmp_path, monkeypatch):
    """Negative control: copies as they are would run here, and nowhere else."""
    write(tmp_path / "routed", "qwen3", TWO_STAGE, None)
    rewrite = remote_code.rewrite

    def forgetful(source, module):
        return source, rewrite(source, module)[1]

    monkeypatch.setattr(remote_code, "rewrite", forgetful)
    assert "No module named 'moe" in refused(3, tmp_path / "routed", "remote-code")


def test_every_file_stands_alone_beside_the_others(files):
    assert {"moe_model_llama.py", "moe_kernels_ops.py", "moe_errors.py"} <= files.keys()
    for name, text in files.items():
        assert text.startswith("# moe-stack ") and "Apache-2.0" in text[:200], name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                assert node.level or node.module.split(".")[0] != "moe", name
                beside = [node.module] if node.module else [a.name for a in node.names]
                assert not node.level or all(f"{b}.py" in files for b in beside), name
        assert '"moe::' not in text, name


def test_transformers_finds_every_file_by_its_own_search(files, tmp_path):
    from transformers.dynamic_module_utils import get_relative_import_files

    remote_code.write_code(tmp_path)
    found = get_relative_import_files(tmp_path / f"{remote_code.ENTRY}.py")
    assert {Path(f).name for f in found} == files.keys()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("from moe.model.config import A, B as C", "from .moe_model_config import A, B as C"),
        ("from moe.kernels import ops", "from . import moe_kernels_ops as ops"),
        ("from moe.model import llama as l", "from . import moe_model_llama as l"),
        ("import torch  # moe.model", "import torch  # moe.model"),
        ('op = "moe::thing"', 'op = _NAMESPACE + "::thing"'),
        ('text = "é", "moe::a b"', 'text = "é", "moe::a b"'),
    ],
)
def test_what_names_the_package_is_rewritten(line, expected):
    source = f'"""Of é and moe.model."""\n\nif True:\n    {line}\n'
    text, imported = remote_code.rewrite(source, "moe.model.some")
    compile(text, "some", "exec")
    assert f"    {expected}\n" in text and "Of é and moe.model." in text
    assert all(module.startswith("moe.") for module in imported)


@pytest.mark.parametrize("line", ["import moe.model.config", "from . import config",
                                  "y = torch.ops.moe.routed_mlp(x)"])  # fmt: skip
def test_what_cannot_be_rewritten_stops_the_export(line):
    """Negative controls: each would reach for the package at run time."""
    with pytest.raises(AssertionError, match=r"moe\.model\.some:1"):
        remote_code.rewrite(line, "moe.model.some")
