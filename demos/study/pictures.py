"""Which pictures does the results page have? Cost, differences and room by set, the loss of the worked example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path
from typing import Any

from demos.study.arithmetic import Comparison, Results, only, scored
from demos.study.plan import SHIFTED, TRAINED
from ttrouting.evaluation.report.canvas import panels_of, styled, write_png
from ttrouting.evaluation.report.colours import FAINT, GREY, GROUND, INK, style
from ttrouting.evaluation.report.pictures import Cost, accuracy_against_cost

ORACLES = {"base": GREY, "transfer": style(0)[0], "own_label": style(2)[0], "wrong_label": style(1)[0]}
DEEPEST = 50  # points that have the deepest colour


def write(results: Results, comparisons: Mapping[int, Comparison], folder: Path) -> dict[str, Path]:
    """Draw what there is to draw, and return the files by what they show."""
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, Path] = {}

    def keep(name: str, figure: Any) -> None:
        if figure is not None:
            files[name] = folder / f"results_{name}.png"
            write_png(figure, files[name])

    with styled():
        for shots, comparison in comparisons.items():
            part = only(comparison, SHIFTED)
            keep(f"front_{shots}", front(part) if part["tasks"] else None)
            keep(f"room_{shots}", room(results["oracles"].get(str(shots), {})))
            keep(f"shifted_{shots}", differences(comparison, SHIFTED))
            keep(f"trained_{shots}", differences(comparison, TRAINED))
        keep("example", curve(results["example"]["report"]))
    return files


def front(comparison: Comparison) -> Any:
    """Mean accuracy over shifted sets against FLOPs, of base and of variants that were scored on all of them."""
    return accuracy_against_cost({"shifted sets": comparison}, Cost.FLOPS)


def differences(comparison: Comparison, sets: Sequence[str]) -> Any:
    """Points over base by variant and set; bold where that is no luck, empty where nothing was scored."""
    part = {name: one for name, one in comparison["tasks"].items() if name in sets}
    names, tasks = scored(part), {name: one["variants"] for name, one in part.items()}
    if not names:
        return None
    size = 0.64 * len(tasks), 0.26 * len(names) + 0.8
    figure, (axis,), _ = panels_of(1, *size, across=1, extra=2.3)
    points = [[100 * one[name]["difference"] if name in one else nan for one in tasks.values()] for name in names]
    axis.imshow(points, cmap="RdBu", vmin=-DEEPEST, vmax=DEEPEST, aspect="auto")
    for row, name in enumerate(names):
        for column, one in enumerate(tasks.values()):
            if name in one:
                sure = one[name]["verdict"] != "cannot tell"
                colour = GROUND if abs(points[row][column]) > 0.6 * DEEPEST else INK
                told = f"{round(points[row][column]):+d}".replace("-", "−").replace("+0", "0")
                weight = "bold" if sure else "normal"
                axis.text(column, row, told, ha="center", va="center", fontsize=8, color=colour, weight=weight)
    axis.set_xticks(range(len(tasks)), [name.replace("_", "\n") for name in tasks], fontsize=7.5)
    axis.set_yticks(range(len(names)), names, fontsize=8.5)
    axis.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axis.spines[:].set_visible(False)
    return figure


def room(oracles: Mapping[str, Any]) -> Any:
    """Accuracy of base and under each oracle, by shifted set; how often a wrong answer was forced as a mark."""
    sets = [name for name in SHIFTED if name in oracles]
    if not sets:
        return None
    figure, (axis,), _ = panels_of(1, 1.2 + 1.15 * len(sets), 3.2, across=1)
    width = 0.8 / len(ORACLES)
    for number, (kind, colour) in enumerate(ORACLES.items()):
        at = [i + (number - 1.5) * width for i in range(len(sets))]
        shares = [_percent(oracles[name]["right"][kind]) for name in sets]
        axis.bar(at, shares, width, color=colour, label=kind.replace("_", " "))
        if kind == "wrong_label":
            forced = [_percent(oracles[name]["forced"][kind]) for name in sets]
            axis.plot(at, forced, ls="", marker="v", color=FAINT, label="wrong answer forced")
    axis.set_xticks(range(len(sets)), [name.removesuffix("_letters") for name in sets])
    axis.set_ylabel("questions (%)")
    axis.set_ylim(0, 100)
    axis.grid(axis="y")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=5, fontsize=8.5)
    return figure


def _percent(right: str) -> float:
    return 100 * right.count("1") / len(right)


def curve(report: Mapping[str, Any]) -> Any:
    """The loss that the worked example's adaptation went down, step by step."""
    losses = report.get("curve") or []
    if not losses:
        return None
    figure, (axis,), _ = panels_of(1, 4.2, 2.6, across=1)
    colour, marker = style(0)
    axis.plot(range(len(losses)), losses, color=colour, marker=marker, markersize=4, label="tokens that are fitted")
    held = [report.get("held_back_before"), report.get("held_back_after")]
    if None not in held:
        axis.plot([0, len(losses)], held, color=style(1)[0], marker=style(1)[1], ls=":", label="tokens held back")
    axis.set_xlabel("step")
    axis.set_ylabel("loss (nats)")
    axis.grid(axis="y")
    axis.legend(fontsize=8.5)
    return figure
