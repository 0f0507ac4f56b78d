"""How does an inspection look as a picture: loads of base and adapted, their difference, and where experts changed?

Legend: `T` tokens, `L` layers, `E` experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ttrouting.evaluation.report.canvas import panels_of, short, styled, write_png
from ttrouting.evaluation.report.colours import GROUND, VARIANTS
from ttrouting.inspection.record import Inspection

WIDTH, HEIGHT = 5.2, 3.0  # inches of a panel
SHARE, GAINED = "share of tokens", "experts gained"


def write_picture(found: Inspection, file: Path) -> Path:
    """Write a PNG.

    Raises:
        ArtefactError: it cannot be written there.
    """
    with styled():
        write_png(picture(found), file, "--png")
    return file


def picture(found: Inspection) -> Any:
    """The figure."""
    from matplotlib.colors import LinearSegmentedColormap

    rising = LinearSegmentedColormap.from_list("rising", (GROUND, VARIANTS[0]))
    both = LinearSegmentedColormap.from_list("both", (VARIANTS[1], GROUND, VARIANTS[0]))
    base, adapted, difference = found.base.load, found.adapted, found.difference
    if adapted is None or difference is None:
        figure, (axis,), _ = panels_of(1, WIDTH, HEIGHT, across=1)
        _map(figure, axis, base, "Load", SHARE, "expert", rising, (0, float(base.max())))
    else:
        figure, axes, _ = panels_of(4, WIDTH, HEIGHT, across=2)
        shift = adapted.load - base
        gained = difference.gained.sum(-1).T  # [L, T]
        most, far = float(max(base.max(), adapted.load.max())), float(shift.abs().max()) or 1.0
        top = int(gained.max()) or 1
        _map(figure, axes[0], base, "Load, base", SHARE, "expert", rising, (0, most))
        _map(figure, axes[1], adapted.load, "Load, adapted", SHARE, "expert", rising, (0, most))
        _map(figure, axes[2], shift, "Load, adapted - base", SHARE, "expert", both, (-far, far))
        _map(figure, axes[3], gained, "Experts gained, by token", GAINED, "token", rising, (0, top))
    figure.suptitle(short(found.title, 90))
    return figure


def _map(
    figure: Any,
    axis: Any,
    values: Tensor,
    title: str,
    unit: str,
    across: str,
    colours: Any,
    limits: tuple[float, float],
) -> None:
    """`values [L, columns]` as one panel with its scale."""
    from matplotlib.ticker import MaxNLocator

    drawn = axis.imshow(
        values.numpy(), aspect="auto", interpolation="nearest", cmap=colours, vmin=limits[0], vmax=limits[1]
    )
    axis.set(title=title, xlabel=across, ylabel="MoE layer")
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(drawn, ax=axis, label=unit, ticks=MaxNLocator(6, integer=unit == GAINED))
