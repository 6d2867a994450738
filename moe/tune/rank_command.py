"""`moe tune rank`."""

import csv
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from moe.errors import UserError, problem, raise_all

if TYPE_CHECKING:
    from moe.tune.families import Part
    from moe.tune.rank import Ranking
    from moe.tune.trace import Trace
    from moe.tune.tuning import Edit, Tuning

PICTURES = (".png", ".svg")


def rank(
    trace: Annotated[Path, typer.Argument(help="What `moe tune record` wrote.")],
    target: Annotated[str, typer.Option(help="Label whose experts are wanted.")],
    out: Annotated[Path, typer.Option(help="tuning.json to create.")],
    vs: Annotated[
        str | None, typer.Option(help="Label to compare with; default all others.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Experts to choose.")] = 10,
    score: Annotated[
        str, typer.Option(help="rate_diff, gate_mass_diff, log_ratio, npmi or risk_diff.")
    ] = "rate_diff",
    least: Annotated[
        bool, typer.Option("--least", help="Choose the lowest scores, not the highest.")
    ] = False,
    part: Annotated[
        str | None, typer.Option(help="mlp or attention; default both, ranked together.")
    ] = None,
    action: Annotated[
        str, typer.Option(help="What the tuning does to them: off, force, gain:G or bias:B.")
    ] = "off",
    semantics: Annotated[
        str, typer.Option(help="Where: post_zero, post_renorm, pre_topk or pre_select.")
    ] = "post_renorm",
    held_out: Annotated[
        float | None,
        typer.Option(help="Share of prompts not to choose by; default 0.3 from 10 a class on."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the split, intervals and p.")] = 0,
    heatmap: Annotated[
        list[Path] | None, typer.Option(help="Picture to write, .png or .svg; repeat for more.")
    ] = None,
    table: Annotated[Path | None, typer.Option(help="CSV of all experts to write.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Rank experts by how they go with a label, and write a tuning of the first of them."""
    from moe.tune import rank as ranks
    from moe.tune.trace import Trace, hash_trace

    pictures = heatmap or []
    wrong = _words(score, part, action, semantics, held_out)
    raise_all(wrong + problem(_check_files, out, pictures, table))
    recorded = Trace.read(trace)
    _check_action(recorded, action, semantics)
    among = cast("Part | None", part)
    ranking = ranks.rank(
        recorded, target, vs, score=score, part=among, held_out=held_out, seed=seed
    )
    chosen = _choose(ranking, top, least)
    tuning = _tuning(recorded, ranking, chosen, action, semantics)
    tuning.check(recorded.sites)
    odd = tuning.cautions(recorded.sites)
    notes = [*_findings(ranking, chosen, least), *odd, *ranking.notes]
    tuning.created_from = hash_trace(trace)
    tuning.method = _method(recorded, ranking, vs, part, least, seed)
    tuning.method |= {"top": top, "notes": notes}
    _draw(recorded, ranking, chosen, pictures)
    if table is not None:
        _write_table(ranking, chosen, table)
    tuning.write(out)
    typer.echo(_json(out, tuning) if as_json else _report(ranking, tuning, notes, out))


def _json(out: Path, tuning: "Tuning") -> str:
    experts = [asdict(edit) for edit in tuning.experts]
    return json.dumps({"tuning": str(out), "experts": experts, "method": tuning.method})


def _report(ranking: "Ranking", tuning: "Tuning", notes: list[str], out: Path) -> str:
    return "\n".join(
        [_table(ranking, tuning.experts), *(f"note: {note}" for note in notes), str(out)]
    )


def _words(
    score: str, part: str | None, action: str, semantics: str, held_out: float | None
) -> list[str]:
    """What is wrong with the options by themselves."""
    from moe.tune.families import PARTS
    from moe.tune.legality import ACTION, SEMANTICS
    from moe.tune.scores import SCORES

    found = []
    for name, value, known in (
        ("score", score, tuple(SCORES)),
        ("part", part or PARTS[0], PARTS),
        ("semantics", semantics, SEMANTICS),
    ):
        if value not in known:
            found.append(f"{name}={value!r} is unknown. Use one of {', '.join(known)}.")
    if ACTION.fullmatch(action) is None:
        found.append(f"action={action!r} is unknown. Use off, force, gain:G or bias:B.")
    if held_out is not None and not 0 <= held_out < 1:
        found.append(f"held_out={held_out} must be from 0 to below 1.")
    return found


def _check_files(out: Path, pictures: list[Path], table: Path | None) -> None:
    found = []
    if out.exists():
        found.append(f"{out} exists. Choose another --out, or remove it.")
    for path in pictures:
        if path.suffix not in PICTURES:
            found.append(f"--heatmap {path} must end in {' or '.join(PICTURES)}.")
    wanted = [out, *pictures, *([table] if table else [])]
    for path in wanted:
        if not (path.absolute().parent.is_dir() and os.access(path.absolute().parent, os.W_OK)):
            found.append(
                f"{path}: {path.absolute().parent} is not a folder that can be written to."
            )
    if len({path.absolute() for path in wanted}) < len(wanted):
        found.append("two of --out, --heatmap and --table name one file.")
    raise_all(found)


def _check_action(trace: "Trace", action: str, semantics: str) -> None:
    """Say once, and before any work, that an action has no meaning with these semantics."""
    from moe.tune.tuning import Edit, Tuning

    routed = [(site, set(range(site.experts)) - set(site.always)) for site in trace.sites]
    lines = []
    for site, experts in routed:
        edit = Edit(layer=site.layer, part=site.part, expert=min(experts, default=0), action=action)
        lines.append(problem(Tuning(semantics=semantics, experts=[edit]).check, trace.sites))  # type: ignore[arg-type]
    if lines and all(lines):  # of some sites only, the choice decides
        raise_all([line.replace(str(edit), f"action {action!r}") for line in lines[-1]])


def _choose(ranking: "Ranking", top: int, least: bool) -> list[int]:
    if top > ranking.compared:
        raise UserError(f"top={top}: only {ranking.compared:,} experts were compared.")
    return [int(column) for column in ranking.order(least)[:top]]


def _findings(ranking: "Ranking", chosen: list[int], least: bool) -> list[str]:
    """What to know of the chosen."""
    sign = -1 if least else 1
    scores = sign * ranking.scores[chosen]
    found = []
    if wrong := int((scores <= 0).sum()):
        side = "0 or more" if least else "0 or less"
        found.append(f"{wrong} of the {len(chosen)} chosen have a score of {side}.")
    if ranking.held_out is not None:
        out = sign * ranking.held_out[chosen]
        numbers = ranking.prompts["held_out"]
        found.append(
            f"on {numbers[0]} + {numbers[1]} prompts held out, {int((out > 0).sum())} of "
            f"{len(chosen)} chosen keep their sign: mean score {sign * out.mean():.4g}, "
            f"{sign * scores.mean():.4g} where they were chosen."
        )
    return found


def _tuning(
    trace: "Trace", ranking: "Ranking", chosen: list[int], action: str, semantics: str
) -> "Tuning":
    from moe.tune.tuning import Edit, Tuning, shape_of

    edits = []
    for column in chosen:
        layer, part, expert = ranking.places[column]
        found = _found(ranking, column)
        edits.append(Edit(layer=layer, part=part, expert=expert, action=action, found=found))
    return Tuning(
        semantics=semantics,  # type: ignore[arg-type]
        experts=edits,
        model=trace.settings.get("model", {}),
        shape=shape_of(trace.sites),
    )


def _found(ranking: "Ranking", column: int) -> dict[str, Any]:
    found = {
        "score": _short(ranking.scores[column]),
        "interval": [_short(ranking.low[column]), _short(ranking.high[column])],
        "p": _short(ranking.p[column]),
        **{key: _short(values[column]) for key, values in ranking.rates.items()},
    }
    if ranking.held_out is not None:
        found["held_out"] = _short(ranking.held_out[column])
    return found


def _short(value: Any) -> float:
    """As many digits as two machines agree on."""
    return float(f"{value:.6g}") + 0.0


def _method(
    trace: "Trace", ranking: "Ranking", vs: str | None, part: str | None, least: bool, seed: int
) -> dict[str, Any]:
    """Everything it takes to rank again."""
    import numpy

    from moe.tune.rank import RESAMPLES
    from moe.tune.scores import CONFIDENCE, SCORES

    return {
        "command": "moe tune rank",
        "target": ranking.target,
        "vs": vs,
        "score": ranking.score,
        "formula": SCORES[ranking.score].text,
        "part": part,
        "least": least,
        "held_out": ranking.share,
        "seed": seed,
        "interval": f"percentile bootstrap over prompts within classes, {CONFIDENCE:.0%}",
        "p": "family-wise, permutations of the labels, largest |score|",
        "resamples": RESAMPLES,
        "experts_compared": ranking.compared,
        "prompts": {key: dict(zip(("target", "rest"), counts, strict=True))
                    for key, counts in ranking.prompts.items()},
        "ids": ranking.ids,
        "tokens": trace.settings.get("tokens"),
        "versions": {"numpy": numpy.__version__},
    }  # fmt: skip


def _draw(trace: "Trace", ranking: "Ranking", chosen: list[int], paths: list[Path]) -> None:
    if not paths:
        return  # without pictures, no wait for their library
    from moe.tune.plot import heatmap

    of_target, of_rest = ranking.prompts["ranked"]
    title = (
        f"{ranking.score} of {ranking.target} ({of_target:,} prompts) against {ranking.rest} "
        f"({of_rest:,})"
    )
    for path in paths:
        heatmap(trace.sites, ranking.scores, chosen, path, title=title, label=ranking.score)


def _table(ranking: "Ranking", edits: "list[Edit]") -> str:
    """The chosen experts, as columns."""
    kind = "mass" if "mass_target" in ranking.rates else "rate"
    rows = [["layer", "part", "expert", "score", "95 % interval", "p", f"{kind} target", "rest",
             "held out"]]  # fmt: skip
    for edit in edits:
        found = edit.found
        low, high = found["interval"]
        rows.append(
            [
                str(edit.layer), edit.part, str(edit.expert), f"{found['score']:.4g}",
                f"{low:.4g} to {high:.4g}", f"{found['p']:.3g}", f"{found[f'{kind}_target']:.4g}",
                f"{found[f'{kind}_rest']:.4g}",
                f"{found['held_out']:.4g}" if "held_out" in found else "-",
            ]
        )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def _write_table(ranking: "Ranking", chosen: list[int], path: Path) -> None:
    """Every expert, those not compared with empty cells."""
    import math

    columns = {"score": ranking.scores, "low": ranking.low, "high": ranking.high, "p": ranking.p}
    columns |= ranking.rates
    if ranking.held_out is not None:
        columns["held_out"] = ranking.held_out
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["layer", "part", "expert", *columns, "chosen"])
        for column, place in enumerate(ranking.places):
            values = (array[column] for array in columns.values())
            cells = ["" if math.isnan(value) else f"{value:.6g}" for value in values]
            writer.writerow([*place, *cells, int(column in chosen)])
