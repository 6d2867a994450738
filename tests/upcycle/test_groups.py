"""`--groups` and `--top-groups`: experts of which a token uses those of few groups."""

import json

import pytest
from invoke import moe

from moe.upcycle.receipt import Receipt

RECIPES = {
    "copy": ("--num-experts", 4, "--top-k", 2, "--groups", 2),
    "granular": ("--num-experts", 4, "--granularity", 2, "--top-k", 4, "--groups", 2),
    "btx": ("--top-k", 1, "--groups", 3),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_groups_keep_the_function_and_are_shown(recipe, dense, moe_upcycle, tmp_path):
    source = dense("llama")
    sources = ["--source", source] * (3 if recipe == "btx" else 1)
    options = *RECIPES[recipe], "--top-groups", 1
    result = moe_upcycle(recipe, *sources, *options, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    receipt = Receipt.read(tmp_path / "out")
    assert receipt.verification["status"] == "pass"
    groups = 3 if recipe == "btx" else 2
    told = receipt.steps[0]["options"]
    assert (told["groups"], told["top_groups"]) == (groups, 1)
    shown = json.loads(moe("inspect", tmp_path / "out", "--json").out)["layers"][0]["mlp"]
    assert (shown["groups"], shown["top_groups"]) == (groups, 1)
    assert f"experts in 1 of {groups} groups" in moe("inspect", tmp_path / "out").out


@pytest.mark.parametrize(("arguments", "said"), [
    (("copy", "--num-experts", 4, "--top-k", 2, "--groups", 3),
     "--groups 3 does not divide the 4 experts. Use one of 1, 2, 4."),
    (("copy", "--num-experts", 4, "--top-k", 3, "--groups", 2, "--top-groups", 1),
     "--top-k 3: --top-groups 1 of 2 experts each leave 2 to choose from. Use at least "
     "--top-groups 2."),
    (("copy", "--num-experts", 4, "--top-k", 2, "--top-groups", 2),
     "--top-groups 2 must be between 1 and --groups 1."),
    # whole copies alone are the function: a group of half a copy would not be
    (("granular", "--num-experts", 2, "--granularity", 2, "--top-k", 2, "--groups", 4),
     "--groups 4 does not divide the 2 copies. Use one of 1, 2."),
    (("granular", "--num-experts", 4, "--granularity", 2, "--top-k", 6, "--groups", 2,
      "--top-groups", 1),
     "--top-k 6: --top-groups 1 of 4 experts each leave 4 to choose from. Use at least "
     "--top-groups 2."),
])  # fmt: skip
def test_impossible_groups_are_refused(arguments, said, dense, refused):
    recipe, *options = arguments
    assert said in refused(2, recipe, "--source", dense("llama"), *options)
