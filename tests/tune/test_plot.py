"""Pictures: their cells, axes and lines, not only that there are files."""

import re

import matplotlib.image
import numpy as np
import pytest
import traces
from matplotlib.collections import PatchCollection, PathCollection, QuadMesh
from matplotlib.colors import to_rgb

from moe.tune.families import Site, columns
from moe.tune.plot import GREY, KINDS, dose_curve, heatmap

A4 = 11.7, 8.3


def routers(*places):
    """Sites of (layer, part, experts)."""
    return [
        Site(layer=layer, part=part, experts=experts, top_k=1, kind="softmax", module="m")
        for layer, part, experts in places
    ]


def panels(figure):
    return [ax for ax in figure.axes if ax.get_xlabel() in ("expert", "head or attention expert")]


def outlined(ax):
    """Cells (row, expert) at the middle of each outline."""
    found = [c for c in ax.collections if isinstance(c, PatchCollection)]
    assert len(found) == 1
    boxes = [path.get_extents() for path in found[0].get_paths()]
    return sorted((round((b.y0 + b.y1) / 2), round((b.x0 + b.x1) / 2)) for b in boxes)


def colour(picture, ax, row, expert):
    """What the file shows a quarter into a cell, where neither outline nor hatch is."""
    x, y = ax.transData.transform((expert - 0.2, row - 0.2)) * 200 / ax.figure.dpi
    return picture[round(picture.shape[0] - y), round(x), :3]


def test_the_file_shows_signs_as_colours_and_zero_as_white(tmp_path):
    sites = routers((0, "mlp", 4), (1, "mlp", 4))
    scores = np.array([1.0, -1.0, 0.0, 0.5, -0.5, 0.1, np.nan, 1.0])
    path = tmp_path / "x.png"
    figure = heatmap(sites, scores, [0], path, title="t", label="s")
    picture = matplotlib.image.imread(path)
    (ax,) = panels(figure)
    shown = {
        (row, expert): colour(picture, ax, row, expert) for row in (0, 1) for expert in range(4)
    }
    for cell, score in zip(shown, scores, strict=True):
        red, _, blue = shown[cell]
        if np.isnan(score):
            np.testing.assert_allclose(shown[cell], to_rgb(GREY), atol=0.02)
        elif score == 0:
            assert min(shown[cell]) > 0.95
        else:
            assert np.sign(red - blue) == np.sign(score), cell
    assert shown[0, 0][1] < shown[0, 3][1] < shown[0, 2][1]  # more is darker
    assert not np.allclose(shown[0, 0], shown[0, 1])


def test_colour_is_symmetric_about_zero_and_one_outlier_does_not_pale_the_rest(tmp_path):
    sites = routers(*((layer, "mlp", 64) for layer in range(10)))
    scores = np.random.default_rng(0).normal(0, 1, 640)
    scores[7] = 1000.0
    figure = heatmap(sites, scores, [7], tmp_path / "x.png", title="t", label="s")
    (mesh,) = [
        c for c in panels(figure)[0].collections
        if isinstance(c, QuadMesh) and np.ma.count(c.get_array()) == 640
    ]  # fmt: skip
    low, high = mesh.get_clim()
    assert low == -high and 2 < high < 12
    assert any(
        re.search(rf"colour ends at ±{high:.3g}, 1 beyond", ax.get_xlabel()) for ax in figure.axes
    )


@pytest.mark.parametrize(
    ("layers", "experts", "dense"), [(58, 256, 3), (99, 384, 1), (4, 8, 0), (1, 2, 0)]
)
def test_the_chosen_are_outlined_and_layers_are_counted_from_the_first(
    layers, experts, dense, tmp_path
):
    sites = traces.sites(layers, experts, 1, dense=dense)
    scores = np.random.default_rng(0).normal(0, 1, layers * experts)
    chosen = np.random.default_rng(1).permutation(layers * experts)[: min(10, layers)]
    figure = heatmap(sites, scores, list(chosen), tmp_path / "x.png", title="T of 9", label="s")
    (ax,) = panels(figure)
    assert outlined(ax) == sorted((int(c // experts) + dense, int(c % experts)) for c in chosen)
    assert ax.get_ylim() == (layers + dense - 0.5, -0.5) and ax.get_xlim() == (-0.5, experts - 0.5)
    assert len([p for p in ax.patches if p.get_hatch()]) == dense
    (mesh,) = [c for c in ax.collections if isinstance(c, QuadMesh) and c.get_clim()[0] < 0]
    np.testing.assert_allclose(mesh.get_array()[dense:].ravel(), scores)
    assert figure.get_suptitle() == "T of 9"
    bars = next(a for a in figure.axes if a.get_xlabel() == "max |score|")
    widths = [bar.get_width() for bar in bars.patches]
    np.testing.assert_allclose(widths[dense:], np.abs(scores).reshape(layers, -1).max(1))
    assert widths[:dense] == [0.0] * dense
    assert all(size <= page for size, page in zip(figure.get_size_inches(), A4, strict=True))


def test_a_tick_is_on_every_few_layers_and_whole(tmp_path):
    for layers, experts in ((58, 256), (4, 8)):
        sites = traces.sites(layers, experts, 1)
        figure = heatmap(sites, np.ones(layers * experts), [], tmp_path / "x.png",
                         title="", label="")  # fmt: skip
        for ticks, most in ((panels(figure)[0].get_yticks(), layers),
                            (panels(figure)[0].get_xticks(), experts)):  # fmt: skip
            inside = [tick for tick in ticks if 0 <= tick < most]
            assert 4 <= len(inside) <= 18 and all(tick == int(tick) for tick in inside)


def test_mlp_and_attention_are_panels_of_their_own_widths(tmp_path):
    sites = routers((0, "mlp", 4), (0, "attention", 9), (1, "attention", 6), (2, "mlp", 4))
    scores = np.arange(1.0, 24.0)
    scores[columns(sites)[1]] = np.nan
    chosen = [0, columns(sites)[1] + 8, columns(sites)[2] + 5]
    figure = heatmap(sites, scores, chosen, tmp_path / "x.png", title="t", label="s")
    mlp, attention = panels(figure)
    assert (outlined(mlp), outlined(attention)) == ([(0, 0)], [(0, 8), (1, 5)])
    assert mlp.get_xlim()[1] == 3.5 and attention.get_xlim()[1] == 8.5
    hatched = [sorted(round(p.get_y() + 0.5) for p in ax.patches if p.get_hatch())
               for ax in (mlp, attention)]  # fmt: skip
    assert hatched == [[1], [2]]
    grey = next(c for c in attention.collections if isinstance(c, QuadMesh)).get_array()
    # one not compared, and three heads that layer 1 does not have
    assert {(int(r), int(e)) for r, e in np.argwhere(~np.ma.getmaskarray(grey))} == {
        (0, 0), (1, 6), (1, 7), (1, 8)
    }  # fmt: skip


def test_an_svg_of_all_of_r1_is_small_and_the_same_each_time(tmp_path):
    sites = traces.sites(58, 256, 8, dense=3)
    scores = np.random.default_rng(0).normal(0, 1, 58 * 256)
    texts = []
    for name in ("a.svg", "b.svg"):
        heatmap(sites, scores, [5], tmp_path / name, title="t", label="s")
        texts.append((tmp_path / name).read_bytes())
    assert texts[0] == texts[1] and len(texts[0]) < 1_000_000
    assert 1 <= texts[0].count(b"<image") <= 4  # cells are pixels, the rest is lines and text
    heatmap(sites, -scores, [5], tmp_path / "c.svg", title="t", label="s")
    assert (tmp_path / "c.svg").read_bytes() != texts[0]


def doses(experts=(1, 3, 10), scales=(1.0,), labels=("REFUSED",)):
    rng = np.random.default_rng(0)
    points = []
    for label in labels:
        points.append({"kind": "plain", "experts": 0, "scale": 0.0, "seed": None, "label": label,
                       "value": 0.9})  # fmt: skip
        for number in experts:
            for scale in scales:
                at = {"experts": number, "scale": scale, "label": label}
                points.append({"kind": "tuned", **at, "seed": None, "value": 0.9 - number * 0.05})
                for kind in list(KINDS)[1:]:
                    values = rng.normal(0.9, 0.05, 4)
                    points += [{"kind": kind, **at, "seed": seed, "value": value}
                               for seed, value in enumerate(values)]  # fmt: skip
    return points


def named(ax, name):
    return next(line for line in ax.lines if line.get_label() == name)


def test_dose_curves_show_the_tuning_the_means_of_controls_and_every_seed(tmp_path):
    points = doses()
    figure = dose_curve(points, tmp_path / "d.png", "share", "title")
    (ax,) = figure.axes
    np.testing.assert_allclose(named(ax, "tuned").get_xdata(), [1, 3, 10])
    np.testing.assert_allclose(named(ax, "tuned").get_ydata(), [0.85, 0.75, 0.4])
    assert set(named(ax, "plain").get_ydata()) == {0.9}
    for kind in list(KINDS)[1:]:
        by_dose = [[p["value"] for p in points if (p["kind"], p["experts"]) == (kind, n)]
                   for n in (1, 3, 10)]  # fmt: skip
        line = named(ax, KINDS[kind][3])
        np.testing.assert_allclose(line.get_ydata(), np.mean(by_dose, 1))
    dots = [c for c in ax.collections if type(c) is PathCollection]
    assert [len(c.get_offsets()) for c in dots] == [12, 12, 12]
    bands = [c for c in ax.collections if c not in dots]
    extent = bands[-1].get_paths()[0].get_extents()
    last = np.mean(by_dose, 1), np.std(by_dose, 1, ddof=1)
    assert extent.y0 == pytest.approx((last[0] - last[1]).min())
    assert extent.y1 == pytest.approx((last[0] + last[1]).max())
    assert (ax.get_ylabel(), figure.get_suptitle()) == ("share", "title")
    # told apart without colour too
    assert len({(line, marker) for _, line, marker, _ in KINDS.values()}) == len(KINDS)


def test_a_panel_per_label_and_a_row_per_thing_that_varies(tmp_path):
    points = doses(scales=(0.5, 1.0), labels=("REFUSED", "perplexity"))
    axes = dose_curve(points, tmp_path / "d.svg", "y", "t").axes
    assert [ax.get_xlabel() for ax in axes] == ["experts (scale 1)"] * 2 + [
        "scale (experts 10)"
    ] * 2
    assert [ax.get_title() for ax in axes] == ["REFUSED", "perplexity", "", ""]
    np.testing.assert_allclose(named(axes[2], "tuned").get_xdata(), [0.5, 1.0])


def test_one_dose_shows_kinds_side_by_side(tmp_path):
    (ax,) = dose_curve(doses(experts=(10,)), tmp_path / "d.png", "y", "t").axes
    places = [named(ax, KINDS[kind][3]).get_xdata()[0] for kind in KINDS]
    assert places[0] == 10 and len(set(places)) == 4 and max(places) < 11


def test_an_unknown_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"kinds \['other'\] are unknown: plain, tuned, random"):
        dose_curve([{**doses()[1], "kind": "other"}], tmp_path / "d.png", "y", "t")
    assert not (tmp_path / "d.png").exists()
