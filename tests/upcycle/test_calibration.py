"""What is fitted before training: which neurons go together, and how much their slices count."""

from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from moe.upcycle.partition import balanced_clusters
from moe.upcycle.receipt import Receipt
from moe.upcycle.verify import windows

GROUPS, EACH, HIDDEN = 4, 16, 72


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("def route(x):\n    return top_k(softmax(x @ w), k)\n" * 200)
    return path


@pytest.fixture
def grouped(tmp_path):
    """`grouped("up")`: a model of which only that matrix says that its neurons are of four kinds.

    Returns its folder and the kind of each neuron; they lie in mixed order.
    """

    def make(matrix: str) -> tuple[Path, list[int]]:
        model, folder = tiny.dense_model(), tmp_path / f"by-{matrix}"
        kinds = (torch.randperm(GROUPS * EACH) % GROUPS).tolist()
        for layer in model.model.layers:
            centres = torch.randn(GROUPS, HIDDEN)
            rows = centres[kinds] + 0.1 * torch.randn(len(kinds), HIDDEN)
            alike = torch.randn(1, HIDDEN).expand_as(rows)
            by = {"gate": (rows, alike), "up": (alike, rows)}[matrix]
            layer.mlp.gate_proj.weight.data, layer.mlp.up_proj.weight.data = (m.clone() for m in by)
        model.save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
        return folder, kinds

    return make


@pytest.mark.parametrize(("partition", "matrix"), [("kmeans", "gate"), ("activation", "up")])
def test_neurons_of_a_kind_go_together(
    partition, matrix, grouped, text, moe_upcycle, weights, tmp_path
):
    """By equal gates, or by firing together on a text where no gate tells them apart."""
    source, kinds = grouped(matrix)

    def mixed(partition: str) -> int:
        """How many experts hold neurons of several kinds, over all layers."""
        out = tmp_path / partition
        calibrate = ("--calibrate", text) if partition == "activation" else ()
        cut = ("split", "--num-experts", GROUPS, "--top-k", 2, "--partition", partition)
        result = moe_upcycle(*cut, *calibrate, "--source", source, "--out", out, "--no-verify")
        assert result.code == 0, result.err
        own, parent, count = weights(out), weights(source), 0
        for layer in range(3):
            at = f"model.layers.{layer}.mlp"
            rows = parent[f"{at}.{matrix}_proj.weight"]
            half = slice(EACH, None) if matrix == "up" else slice(EACH)
            for expert in own[f"{at}.experts.gate_up_proj"][:, half]:
                neurons = [(rows == row).all(1).nonzero().item() for row in expert]
                count += len({kinds[i] for i in neurons}) > 1
        return count

    assert mixed(partition) == 0
    for other in {"random", "kmeans"} - {partition}:  # negative controls
        # k-means reads gates, which are all alike where only `up` tells
        assert mixed(other) > 6, other


def test_groups_are_of_one_size_however_many_points_lie_together():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 16, generator=generator)
    points = torch.cat([c + 0.1 * torch.randn(6, 16, generator=generator) for c in centres])
    shuffle = torch.randperm(24, generator=generator)
    groups = balanced_clusters(points[shuffle], 4, "key")
    assert [len(g) for g in groups] == [6] * 4
    assert all(len({int(shuffle[i]) // 6 for i in group}) == 1 for group in groups)
    lonely = torch.cat([points[:1].expand(18, -1), points[18:]])  # one centre has three times more
    assert [len(g) for g in balanced_clusters(lonely, 4, "key")] == [6] * 4


@torch.no_grad()
def test_scales_fitted_to_text_are_the_least_squares(dense, text, moe_upcycle, tmp_path):
    """Of each union over the text as it passed through the model before any scale was there."""
    source, out = dense("llama"), tmp_path / "fitted"
    options = ("uoe", "--mlp-experts", 4, "--source", source, "--output-scale", "calibrated")
    result = moe_upcycle(*options, "--calibrate", text, "--out", out, "--no-verify")
    assert result.code == 0, result.err
    model = AutoModelForCausalLM.from_pretrained(out)
    parent = AutoModelForCausalLM.from_pretrained(source)
    scales = [model.config.mlp_spec(i).output_scale for i in range(3)]
    assert len(set(scales)) == 3 and all(0.5 < s < 4 and abs(s - 1) > 0.01 for s in scales)
    assert list(Receipt.read(out).steps[-1]["output_scales"].values()) == scales
    unions = [layer.mlp for layer in model.model.layers]
    seen: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in unions]
    for union, pairs in zip(unions, seen, strict=True):
        union.router.output_scale = 1.0
        union.register_forward_hook(lambda m, x, y, pairs=pairs: pairs.append((x[0], y[0])))
    ids, _ = windows(source, text, parent.config.vocab_size)
    for window in ids:
        model(window[None])
    for layer, scale, pairs in zip(parent.model.layers, scales, seen, strict=True):
        given, union = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
        wanted = layer.mlp(given).double().reshape(-1, 1)
        nearest = torch.linalg.lstsq(union.double().reshape(-1, 1), wanted).solution.item()
        assert scale == pytest.approx(nearest, abs=1e-4)  # written with four decimals
    message = moe_upcycle(*options, "--out", tmp_path / "none").err
    assert "need --calibrate" in message
