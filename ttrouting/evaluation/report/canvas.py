"""What do all pictures share: their style, their panels, and how they become files or parts of a page?"""

from __future__ import annotations

import io
import re
from math import ceil
from pathlib import Path
from typing import Any

from ttrouting.errors import ArtefactError, ConfigError
from ttrouting.evaluation.report.colours import FAINT, GRID, GROUND, INK, ON_DARK

DPI = 160
LONGEST = 38  # letters of a name in a picture
STYLE: Any = {
    "font.size": 9.5,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.hashsalt": "ttrouting",  # the same picture is the same file
    "text.color": INK,
    "xtick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.color": FAINT,
    "ytick.labelcolor": INK,
}


def need_matplotlib(asker: str, extra: str) -> None:
    """Find out before anything is read whether pictures can be drawn.

    Args:
        asker: what needs them. extra: of this package, that brings them.

    Raises:
        ConfigError: no matplotlib.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(f'{asker} needs matplotlib. Install it: pip install "ttrouting[{extra}]".') from None


def styled() -> Any:
    """While this is entered, matplotlib draws in our style."""
    import matplotlib

    return matplotlib.rc_context(STYLE)


def panels_of(
    panels: int, width: float, height: float, *, across: int, extra: float = 0, sharex: bool = False
) -> Any:
    """A figure, its panels, each so large in inches, and their columns; `extra` is for what stands at the left."""
    from matplotlib.figure import Figure

    down = ceil(panels / across)
    columns = ceil(panels / down)  # 3 + 2 and not 4 + 1
    figure = Figure(figsize=(extra + columns * width, 0.3 + down * height), layout="constrained")
    grid = figure.subplots(down, columns, squeeze=False, sharex=sharex)
    axes = list(grid.flat)
    for unused in axes[panels:]:
        unused.remove()
    for axis in axes[:panels] if sharex else ():
        axis.tick_params(labelbottom=True)  # the panel under it may be one of the unused
    return figure, axes[:panels], columns


def short(name: str, longest: int = LONGEST) -> str:
    """A name that fits: its middle goes, since tasks of a family differ at their ends."""
    kept = longest - 1
    return name if len(name) <= longest else f"{name[: kept - kept // 2]}…{name[-(kept // 2) :]}"


def write_png(figure: Any, file: Path, option: str = "--out") -> None:
    """Write a picture, on white. `option` is what names the file.

    Raises:
        ArtefactError: it cannot be written there.
    """
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI, facecolor=GROUND)
    figure.set_layout_engine("none")  # it stays as it now is, and another format need not be laid out again
    try:
        file.write_bytes(drawn.getvalue())
    except OSError as error:
        raise ArtefactError(f"Cannot write {file}: {error.strerror}. Give another {option}.") from None


def svg(figure: Any, name: str, words: str) -> str:
    """A picture as an element of a page: its colours are the page's, `words` tell it to who cannot see it."""
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    text = drawn.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(
        r'<metadata>.*?</metadata>|\sxmlns(:xlink)?="[^"]*"', "", text, flags=re.DOTALL
    )  # no page needs them
    # every picture of the page needs names of its own
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for colour, (variable, _) in ON_DARK.items():
        text = text.replace(colour, f"var(--{variable})")
    head = f'<svg role="img" aria-label="{words}"'
    return re.sub(r'\s(width|height)="[\d.]+pt"', "", text.replace("<svg", head, 1), count=2)
