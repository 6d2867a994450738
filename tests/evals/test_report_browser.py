"""The report in a real browser: its numbers, its pictures' sizes, its console, its print."""

import json
import re
from pathlib import Path

import browser
import pytest
import toy_run
from browser import Browser
from invoke import moe
from report_folders import row, write_results

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.CHROMIUM is None, reason="chromium is not installed"),
]
EVIL = "run <img src=x onerror=document.title='broken'>"


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> tuple[Path, Path]:
    """The page of a toy run with all it can have and of an evaluation; the run's folder."""
    folder = tmp_path_factory.mktemp("report")
    toys = toy_run.make(folder)
    out = folder / "runs" / EVIL
    out.parent.mkdir()
    options = ("train.steps=6", "eval.every=2", "checkpoint.every=2", toys.validation)
    file = toys.write(folder / "run")
    config = toy_run.load(file, [*options, f"out={json.dumps(str(out))}"])
    toy_run.run(config)
    rows = [row("easy", [0.75, 0.5], 0.06, 0.01), row("hard", [0.5, 0.45], 0.06, 0.2)]
    results = write_results(folder / "evaluation", rows, [toys.model, "gone"])
    result = moe("report", out, results, toys.model, "--out", folder / "report.html")
    assert result.code == 0, result.err
    return folder / "report.html", out


@pytest.fixture(scope="module")
def opened(page):
    with Browser() as found:
        found.open(page[0].as_uri())
        yield found


def test_the_numbers_that_a_reader_sees_are_the_runs(page, opened):
    lines = toy_run.metrics(page[1])
    last = "document.querySelector('#verdict [data-loss]')"
    assert float(opened.evaluate(f"{last}.dataset.loss")) == lines[-1]["loss"]
    assert opened.evaluate(f"{last}.innerText") == f"{lines[-1]['loss']:.4f}"
    validation = "document.querySelector('#verdict [data-validation]').dataset.validation"
    assert float(opened.evaluate(validation)) == toy_run.validation(page[1])
    assert opened.evaluate("document.querySelector('#verdict [data-best]').innerText") == "step-6"
    losses = "[...document.querySelectorAll('.course [data-loss]')].map(x => +x.dataset.loss)"
    assert opened.evaluate(losses) == [line["loss"] for line in lines]
    assert opened.evaluate("document.querySelectorAll('.evaluation [data-p]').length") == 2
    assert opened.evaluate("document.querySelectorAll('.layers tbody tr').length") == 4


def test_every_picture_has_a_size_and_stays_inside_the_page(opened):
    sizes = opened.evaluate(
        "[...document.querySelectorAll('figure svg')].map(x => [x, x.getBoundingClientRect()])"
        ".map(([x, r]) => [x.dataset.figure, r.width, r.height, r.right])"
    )
    names = {name for name, *_ in sizes}
    assert {"losses", "rates", "quality", "units-0-heads", "balance-0-experts"} <= names
    width = opened.evaluate("document.documentElement.clientWidth")
    for name, wide, high, right in sizes:
        assert wide > 300 and high > 80 and right <= width, (name, wide, high, right)
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    texts = opened.evaluate(
        "[...document.querySelectorAll('figure svg text')].filter(x => x.textContent.trim() && "
        "x.getBoundingClientRect().height < 9).length"
    )
    assert texts == 0, "every word in a picture is at least nine pixels high"


def test_pictures_hold_what_they_are_of(opened):
    curves = "document.querySelector('[data-figure=losses]')"
    assert opened.evaluate(f"{curves}.querySelectorAll('path').length") > 10
    assert "step" in opened.evaluate(f"{curves}.textContent")
    cells = "document.querySelector('[data-figure=units-0-experts] image')"
    assert opened.evaluate(f"{cells}.getBoundingClientRect().width") > 100


def test_nothing_is_asked_for_run_or_broken(page, opened):
    assert opened.errors == []
    other = [url for url in opened.requested if not url.startswith("data:")]
    assert other == [page[0].as_uri()], "the page alone"
    assert opened.evaluate("document.scripts.length + document.images.length") == 0
    assert opened.evaluate("document.title").startswith("Report: "), "no name has become markup"
    assert "<img" in opened.evaluate("document.title")


def test_it_prints(opened):
    printed = opened.pdf()
    assert printed.startswith(b"%PDF")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 12


def test_a_page_that_breaks_is_found(tmp_path):
    """The control."""
    (tmp_path / "bad.html").write_text(
        "<title>bad</title><script>console.error('no')</script><script>nothing()</script>"
        "<img src='missing.png'><figure><svg width=0 height=0></svg></figure>"
    )
    with Browser() as found:
        found.open((tmp_path / "bad.html").as_uri())
        assert len(found.errors) >= 3
        assert (tmp_path / "missing.png").as_uri() in found.requested
        size = "document.querySelector('figure svg').getBoundingClientRect().width"
        assert found.evaluate(size) == 0
