"""Which files is a report, and how are they made from the folders of runs?

index.html         the page, with everything in it
report.md          a table for each run, ready to paste
accuracy-cost.png  all runs
differences.png, experts.png   of a run, with its name before where there are several
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ttrouting.errors import ArtefactError
from ttrouting.evaluation.compare import COMPARISON, comparison_of
from ttrouting.evaluation.journal import FOLDER
from ttrouting.evaluation.report.canvas import need_matplotlib, styled, svg, write_png
from ttrouting.evaluation.report.markdown import markdown
from ttrouting.evaluation.report.page import Picture, page
from ttrouting.evaluation.report.pictures import Cost, accuracy_against_cost, differences, experts_per_layer

WIDEST = 1150  # pixels of a picture in the page
DENSITY = 100  # pixels an inch
CAPTIONS = {
    "accuracy-cost": "Accuracy against cost. Bars: 95 % interval of the paired difference to base; where one crosses "
    "the dotted line, base may be as good. On the Pareto front nothing else is as accurate for less.",
    "differences": "Difference to base by task, with the number of documents; 95 % intervals, not adjusted for "
    "several comparisons. Filled: helps or hurts, by Holm over the run. Hollow: cannot tell. The mean weighs all "
    "tasks alike.",
    "experts": "Experts that ran for a token, by MoE layer, mean over tasks. Bars: base. Line: the variant.",
}


def read_comparison(folder: Path, metric: str | None = None) -> dict[str, Any]:
    """The comparison of a run, from its journals; where only `comparison.json` was kept, that.

    Raises:
        ArtefactError, ConfigError: as `comparison_of`.
    """
    file = folder / COMPARISON
    if metric or (folder / FOLDER).is_dir() or not file.is_file():
        return comparison_of(folder, metric)
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ArtefactError(f"Cannot read {file}: {error}. Run 'ttrouting eval' with --resume.") from None
    if not isinstance(found, dict) or not {"run", "tasks", "summary", "family"} <= found.keys():
        raise ArtefactError(f"{file} is no comparison. Give a folder that 'ttrouting eval --output-path' wrote.")
    return found


def write_report(
    folders: Sequence[Path], out: Path, cost: Cost = Cost.FLOPS, metric: str | None = None
) -> tuple[dict[str, dict[str, Any]], list[Path]]:
    """Read runs, write their report into `out`, and return their comparisons by name and the files.

    Args:
        metric: what is compared, in every task that has it; default: the main metric of each task.

    Raises:
        ConfigError: no matplotlib; no task has the metric. ArtefactError: no run, a damaged one, no place to write.
    """
    need_matplotlib("ttrouting report", "eval")
    runs = _named({folder: read_comparison(folder, metric) for folder in folders})
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtefactError(f"Cannot make {out}: {error.strerror}. Give another --out.") from None
    files: list[Path] = []

    def add(figure: Any, kind: str, stem: str) -> list[Picture]:
        """Write a picture and make it a part of the page, if there is one."""
        if figure is None:
            return []
        files.append(out / f"{stem}.png")
        write_png(figure, files[-1])
        element = svg(figure, f"p{len(files)}", escape(CAPTIONS[kind], quote=True))
        return [Picture(element, min(WIDEST, DENSITY * figure.get_figwidth()), CAPTIONS[kind])]

    with styled():
        together = add(accuracy_against_cost(runs, cost), "accuracy-cost", "accuracy-cost")
        own = {}
        for name, one in runs.items():
            lead = f"{name}-" if len(runs) > 1 else ""
            own[name] = add(differences(one), "differences", f"{lead}differences")
            own[name] += add(experts_per_layer(one), "experts", f"{lead}experts")
    title = f"ttrouting: {', '.join(runs)}"
    texts = {"index.html": page(title, runs, together, own), "report.md": report_text(runs)}
    for name, text in texts.items():
        files.append(out / name)
        try:
            files[-1].write_text(text, encoding="utf-8")
        except OSError as error:
            raise ArtefactError(f"Cannot write {files[-1]}: {error.strerror}. Give another --out.") from None
    return runs, files


def report_text(runs: dict[str, dict[str, Any]]) -> str:
    """Markdown of all runs, with headings where there are several."""
    parts = [f"## {name}\n\n{markdown(one)}" if len(runs) > 1 else markdown(one) for name, one in runs.items()]
    return "\n".join(parts)


def _named(runs: dict[Path, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By the names of their folders, with a number where two are alike."""
    found: dict[str, dict[str, Any]] = {}
    for folder, one in runs.items():
        name, number = folder.resolve().name, 1
        while (label := name if number == 1 else f"{name}-{number}") in found:
            number += 1
        found[label] = one
    return found
