"""How is a report one HTML page that needs nothing else: no network, no script, no font, light and dark?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from ttrouting.evaluation.report.colours import ON_DARK
from ttrouting.evaluation.report.markdown import COLUMNS, LEFT, notes, rows

# where long names may break
BREAKS = {"task": "_", "metric": ","}
SIGNS = {"helps": "▲", "hurts": "▼", "cannot tell": "○"}
CSS = """
:root { color-scheme: light dark; LIGHT --panel: #f6f8fa; --good: #00704f; --bad: #b03a00 }
@media (prefers-color-scheme: dark) { :root { DARK --panel: #161b22; --good: #3ddc9e; --bad: #ff9a66 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.55 system-ui, sans-serif }
main { max-width: 76rem; margin: 0 auto; padding: 2rem 1.25rem 4rem }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem }
h2 { font-size: 1.25rem; margin: 3rem 0 .6rem; padding-top: 1rem; border-top: 1px solid var(--grid) }
h3 { font-size: 1rem; margin: 2rem 0 .5rem }
p { max-width: 48rem }
.faint, figcaption, dt { color: var(--faint) }
.verdicts { list-style: none; padding: 0; display: grid; gap: .6rem }
.verdicts li { background: var(--panel); border-left: 4px solid; border-radius: 4px; padding: .6rem .9rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; font-size: .9rem; margin: .8rem 0 }
dd { margin: 0; overflow-wrap: anywhere }
.notes { font-size: .84rem; max-width: none }
.wide { overflow-x: auto; margin-top: 1.4rem; border: 1px solid var(--grid); border-radius: 6px }
.wide:focus-visible { outline: 2px solid var(--v1); outline-offset: 2px }
table { border-collapse: collapse; width: 100%; font-size: .84rem; font-variant-numeric: tabular-nums }
caption { text-align: left; padding: .6rem; font-weight: 600 }
th, td { padding: .35rem .6rem; white-space: nowrap; text-align: right; vertical-align: top; font-weight: 400 }
thead th { background: var(--panel); border-bottom: 1px solid var(--grid); font-weight: 600 }
th.left, td.left { text-align: left }
tbody tr:first-child > * { border-top: 1px solid var(--grid) }
tbody th[scope=rowgroup], td.left { white-space: normal }
tbody th[scope=rowgroup] { font-weight: 600; min-width: 9rem }
td.helps, td.hurts, td.cannot, th[scope=row] { white-space: nowrap }
.helps { color: var(--good); font-weight: 600 }
.hurts { color: var(--bad); font-weight: 600 }
figure { margin: 1.6rem 0 0 }
figure svg { display: block; width: 100%; height: auto }
figcaption { font-size: .88rem; max-width: 48rem; margin-top: .3rem }
details { margin: 1.2rem 0; font-size: .9rem }
pre { background: var(--panel); border-radius: 6px; padding: .8rem; overflow-x: auto; font-size: .8rem }
@media print { .wide { overflow: visible } body { font-size: 11px } }
"""


class Picture(NamedTuple):
    """One picture of the page: its element, how wide it may be in pixels, and what it shows."""

    element: str
    width: float
    caption: str


SCORES = COLUMNS[3 : COLUMNS.index("detectable") + 1]
COSTS = COLUMNS[COLUMNS.index("detectable") + 1 :]


def page(
    title: str,
    runs: Mapping[str, Mapping[str, Any]],
    together: Sequence[Picture],
    own: Mapping[str, Sequence[Picture]],
) -> str:
    """The whole page.

    Args:
        runs: comparisons by name. together: pictures over all runs. own: of each run, by name.
    """
    several = len(runs) > 1
    sections = [
        _section(name, comparison, [*([] if several else together), *own[name]], several)
        for name, comparison in runs.items()
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{stylesheet()}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n"
        '<p class="faint">Base and adapted routing on the same documents and prompts, document by document.</p>\n'
        f"{_pictures(together) if several else ''}{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def stylesheet() -> str:
    """The style of our pages, light and dark."""
    light = " ".join(f"--{name}: {colour};" for colour, (name, _) in ON_DARK.items())
    dark = " ".join(f"--{name}: {colour};" for name, colour in ON_DARK.values())
    return CSS.replace("LIGHT", light).replace("DARK", dark)


def _section(name: str, comparison: Mapping[str, Any], pictures: Sequence[Picture], named: bool) -> str:
    run = comparison["run"]
    lines = "".join(
        f'<li style="border-color: var(--v{1 + number % 7})">{escape(line)}</li>\n'
        for number, line in enumerate(comparison["summary"].values())
    )
    made = {key: run[key] for key in ("variants", "recipes", "versions", "hardware") if key in run}
    return (
        f"<section>\n{f'<h2>{escape(name)}</h2>' if named else ''}\n"
        + (f'<ul class="verdicts">\n{lines}</ul>\n' if lines else "<p>Base alone: nothing is compared.</p>\n")
        + _pictures(pictures)
        + _table(comparison, SCORES, "Scores")
        + _table(comparison, COSTS, "Costs")
        + f'<p class="notes faint">{escape(notes(comparison))}</p>\n'
        + f"<h3>The run</h3>\n{_facts(run)}<details><summary>Strategies, versions and hardware</summary>"
        + f"<pre>{escape(json.dumps(made, indent=1))}</pre></details>\n</section>\n"
    )


def _facts(run: Mapping[str, Any]) -> str:
    model = run.get("model") or {}
    told = {
        "model": ", ".join(str(model[key]) for key in ("name", "dtype", "fingerprint") if model.get(key)),
        "split": run.get("split"),
        "limit": run.get("limit"),
        "solved examples": run.get("num_fewshot"),
        "batch size": run.get("batch_size"),
        "seed": run.get("seed"),
        "no harm": {True: "on", False: "off"}.get(run.get("no_harm", "")),
        "self-consistency": f"majority of {run['samples']} samples" if run.get("samples", 1) > 1 else None,
        "started": run.get("started"),
        "ttrouting": run.get("ttrouting"),
    }
    shown = "".join(
        f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>\n"
        for key, value in told.items()
        if value not in (None, "")
    )
    return f"<dl>\n{shown}</dl>\n"


def _table(comparison: Mapping[str, Any], columns: Sequence[str], title: str) -> str:
    shown = ("task", *(("metric",) if columns is SCORES else ()), "variant", *columns)
    heads = "".join(f'<th scope="col"{_left(column)}>{escape(column)}</th>' for column in shown)
    body = "".join(f"<tbody>\n{_rows(task, shown)}</tbody>\n" for task in rows(comparison))
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{title}">\n<table>\n<caption>{title}</caption>\n'
        f"<thead>\n<tr>{heads}</tr>\n</thead>\n{body}</table>\n</div>\n"
    )


def _rows(task: Sequence[Sequence[str]], shown: Sequence[str]) -> str:
    found = ""
    for i, row in enumerate(task):
        texts = dict(zip(COLUMNS, row, strict=True))
        own = shown if i == 0 else [column for column in shown if column not in ("task", "metric")]
        found += f"<tr>{''.join(_cell(column, texts[column], len(task)) for column in own)}</tr>\n"
    return found


def _cell(column: str, text: str, members: int) -> str:
    told = escape(text)
    for sign in BREAKS.get(column, ""):
        told = told.replace(sign, f"{sign}<wbr>")
    if column == "task":
        return f'<th scope="rowgroup" class="left" rowspan="{members}">{told}</th>'
    if column == "metric":
        return f'<td class="left" rowspan="{members}">{told}</td>'
    if column == "variant":
        return f'<th scope="row" class="left">{told}</th>'
    if column == "verdict" and text:
        return f'<td class="left {text.split()[0]}">{SIGNS[text]} {told}</td>'
    return f"<td{_left(column)}>{told}</td>"


def _left(column: str) -> str:
    return ' class="left"' if column in LEFT else ""


def _pictures(pictures: Sequence[Picture]) -> str:
    return "".join(
        f'<figure style="max-width: {picture.width:.0f}px">\n{picture.element}\n'
        f"<figcaption>{escape(picture.caption)}</figcaption>\n</figure>\n"
        for picture in pictures
    )
