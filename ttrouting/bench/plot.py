"""How is a benchmark drawn? One panel for each quantity: ratio to the other version against the size that varies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ttrouting.bench.expected import DECODE, FIRST, MEMORY
from ttrouting.bench.run import Comparison, Result
from ttrouting.bench.versions import BARE, STRAIGHTFORWARD
from ttrouting.errors import ConfigError

FORMATS = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Find out before anything is measured whether a plot can be written there.

    Raises:
        ConfigError: no matplotlib, a format that is not known, or no such folder.
    """
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"--plot {path}: write one of {', '.join(FORMATS)}.")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no folder {path.absolute().parent}. Make it first.")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("--plot needs matplotlib. Install it: pip install 'ttrouting[viz]'.") from None


def plot(results: Sequence[Result], path: Path) -> None:
    """Write the plot: rows are what is compared with, columns the quantities, lines the contenders.

    Points are medians with quartiles; a bound is a dashed line of the same colour.

    Raises:
        ConfigError: as `check_plot`.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    axis, label = _axis(results)
    figure = Figure(figsize=(12, 7), layout="constrained")
    panels = figure.subplots(2, 3, squeeze=False)
    for row, against in zip(panels, (BARE, STRAIGHTFORWARD), strict=True):
        for panel, quantity in zip(row, (FIRST, DECODE, MEMORY), strict=True):
            _draw(panel, results, quantity, against, axis)
            panel.set_title(f"{quantity}, ratio to {against}", fontsize=10)
            panel.set_xlabel(label)
            panel.axhline(1, color="0.8", linewidth=1, zorder=0)
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=9)
    try:
        figure.savefig(path)
    except OSError as error:
        raise ConfigError(f"--plot {path}: {error.strerror}. Give another place.") from None


def _axis(results: Sequence[Result]) -> tuple[str, str]:
    """The size that takes most values, and what it is called; the other ones name the lines."""
    if len({r.batch for r in results}) > len({r.prompt for r in results}):
        return "batch", "sequences in the batch"
    return "prompt", "prompt tokens"


def _draw(panel: Any, results: Sequence[Result], quantity: str, against: str, axis: str) -> None:
    lines: dict[str, list[tuple[int, Comparison]]] = {}
    other = "batch" if axis == "prompt" else "prompt"
    for result in results:
        shown = [result.contender]
        if len({getattr(r, other) for r in results}) > 1:
            shown.append(f"{other} {getattr(result, other)}")
        if len({r.model for r in results}) > 1:
            shown.append(result.model)
        for comparison in result.comparisons:
            if (comparison.quantity, comparison.against) == (quantity, against):
                lines.setdefault(", ".join(shown), []).append((getattr(result, axis), comparison))
    for number, (name, points) in enumerate(sorted(lines.items())):
        points.sort(key=lambda point: point[0])
        x = [place for place, _ in points]
        ratios = [c.ratio for _, c in points]
        low, high = [r.median - r.low for r in ratios], [r.high - r.median for r in ratios]
        colour = f"C{number}"
        panel.errorbar(x, [r.median for r in ratios], (low, high), marker="o", capsize=3, color=colour, label=name)
        if all(c.bound is not None for _, c in points):
            panel.plot(x, [c.bound for _, c in points], linestyle="--", marker="_", color=colour)
    panel.set_xscale("log", base=2)
    panel.set_xticks(sorted({getattr(r, axis) for r in results}))
    panel.xaxis.set_major_formatter("{x:.0f}")
    panel.set_ylim(bottom=0)
