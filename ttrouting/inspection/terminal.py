"""How does an inspection look in a terminal: loads, the text by top expert, what changed where?

Legend: `L` layers, `E` experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil

from rich.columns import Columns
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ttrouting.inspection.compare import Difference, LayerChange
from ttrouting.inspection.record import Inspection
from ttrouting.trace import NO_EXPERT, RoutingTrace

BARS, PLAIN_BARS = "·▁▂▃▄▅▆▇█", " .:-=+*#%@"
GAINED, LOST = "bright_blue", "dark_orange"
# backgrounds for black letters, apart from each other also for people who see colours differently
TOP_EXPERT = ("#56b4e9", "#e69f00", "#b7e3d0", "#f0e442", "#cc79a7", "#ffb38a", "#a6a6ff", "#d9d9d9", "#8dd35f")
SHIFT = 0.02  # share of tokens from which a change of load is coloured
MOST_TOKENS, MOST_LAYERS, MOST_EXPERTS, MOST_NEXT = 240, 8, 2, 6


class TerminalView:
    """An inspection as a rich renderable; as wide as the terminal, without colour where there is none."""

    def __init__(self, inspection: Inspection) -> None:
        self.inspection = inspection

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        base, adapted, difference = (getattr(self.inspection, n) for n in ("base", "adapted", "difference"))
        changes = difference.layers() if difference is not None else []
        layer = changes[0].index if changes else len(base.layers) // 2
        bars = BARS if options.encoding.startswith("utf") else PLAIN_BARS
        yield Text(self.inspection.title, "bold")
        yield Text(summary(self.inspection), "dim")
        yield from _loads(base, adapted, bars, options.max_width)
        yield Text()
        yield from _strips(
            base, adapted, difference, layer, console.color_system is not None and not console.no_color
        )
        if difference is not None:
            some = f", {MOST_LAYERS} of {len(changes)}" if len(changes) > MOST_LAYERS else ""
            heading = Text(f"Layers most changed{some}", "bold")
            yield Text()
            yield heading.append("  tokens with other experts; experts a token gained and lost", "not bold dim")
            yield _layers(changes)
        if self.inspection.next_tokens:
            yield Text()
            yield Text("Next token after the prompt", "bold")
            yield _next(self.inspection)
        if self.inspection.report.sequences:
            yield Text()
            yield self.inspection.report


def summary(inspection: Inspection) -> str:
    """The sizes of what was inspected, in one line."""
    base, adapted = inspection.base, inspection.adapted
    new = len(base.tokens) - base.prompt_tokens
    text = f"{base.prompt_tokens} prompt tokens{f', {new} written' if new else ''}, {len(base.layers)} MoE layers, "
    text += f"{base.num_experts} experts, {float(base.k.float().mean()):.2f} a token"
    return text if adapted is None else f"{text}; adapted {float(adapted.k.float().mean()):.2f}"


# --- load -------------------------------------------------------------------------------------------------


def _loads(base: RoutingTrace, adapted: RoutingTrace | None, bars: str, width: int) -> Iterator[RenderableType]:
    names = [_short(name) for name in base.layers]
    label = max(map(len, names)) + 1
    fold = ceil(base.num_experts / max(8, width - label))
    most = max(float(t.load.max()) for t in (base, adapted) if t is not None)
    each = f", each column the busiest of {fold}" if fold > 1 else ""
    text = f"Load: share of tokens by layer (down) and expert (across){each}; full bar {100 * most:.0f} %"
    yield Text()
    yield Text(text, "bold")
    blocks = [_block("base" if adapted is not None else "", names, _folded(base.load, fold), None, most, bars)]
    if adapted is not None:
        blocks.append(_block("adapted", names, _folded(adapted.load, fold), _folded(base.load, fold), most, bars))
    yield Columns(blocks, padding=(0, 3))


def _folded(load: Tensor, fold: int) -> list[list[float]]:
    """`[L, E / fold]`, of each group of experts the largest."""
    groups = load.split(fold, 1)
    return list(map(list, zip(*(group.amax(1).tolist() for group in groups), strict=True)))


def _block(
    title: str,
    names: Sequence[str],
    load: list[list[float]],
    before: list[list[float]] | None,
    most: float,
    bars: str,
) -> Text:
    """One line a layer; where there is a load before, what rose and fell has its colour."""
    label = max(map(len, names)) + 1
    text = Text(f"{'':{label}}{title}\n" if title else "", "dim", no_wrap=True)
    for i, (name, row) in enumerate(zip(names, load, strict=True)):
        text.append(f"{name:{label}}", "dim")
        for e, share in enumerate(row):
            bar = bars[ceil(share / most * (len(bars) - 1))] if most else bars[0]
            shift = 0.0 if before is None else share - before[i][e]
            style = GAINED if shift > SHIFT else LOST if shift < -SHIFT else "default"
            text.append(bar, f"not dim {style}")
        text.append("\n" if i + 1 < len(names) else "")
    return text


def _short(name: str) -> str:
    """`model.layers.3.mlp` is `3` in a margin."""
    numbers = [part for part in name.split(".") if part.isdigit()]
    return numbers[-1] if numbers else name[-12:]


# --- text -------------------------------------------------------------------------------------------------


def _strips(
    base: RoutingTrace, adapted: RoutingTrace | None, difference: Difference | None, layer: int, colour: bool
) -> Iterator[RenderableType]:
    shown = min(MOST_TOKENS, len(base.tokens))
    which = f"the last {shown} of {len(base.tokens)} tokens" if shown < len(base.tokens) else "the text"
    how = "coloured by" if colour else "each token followed by"
    most = "the most changed, " if adapted is not None else ""
    yield Text(f"Tokens: {which}, {how} the top expert of layer {_short(base.layers[layer])} ({most}", "bold").append(
        f"{base.layers[layer]})"
    )
    changed = None if difference is None else difference.changed[:, layer].tolist()
    if adapted is not None:
        yield Text("base", "dim")
    yield _strip(base, layer, shown, None, colour)
    if adapted is not None:
        marked = "; underlined: other experts than in base" if colour else "; *: other experts than in base"
        yield Text(f"adapted{marked}", "dim")
        yield _strip(adapted, layer, shown, changed, colour)


def _strip(trace: RoutingTrace, layer: int, shown: int, changed: list[bool] | None, colour: bool) -> Text:
    text = Text(overflow="fold")
    top = trace.top[:, layer].tolist()
    for i in range(len(trace.tokens) - shown, len(trace.tokens)):
        piece = trace.tokens[i].replace("\r", "").replace("\t", " ")
        marked = changed is not None and changed[i]
        if colour:
            hue = "default" if top[i] == NO_EXPERT else f"black on {TOP_EXPERT[top[i] % len(TOP_EXPERT)]}"
            visible, ending = (piece.removesuffix("\n"), "\n") if piece.endswith("\n") else (piece, "")
            text.append(visible or " ", f"underline bold {hue}" if marked else hue).append(ending)
        else:
            text.append(f"{piece.rstrip()}[{top[i]}{'*' if marked else ''}]{piece[len(piece.rstrip()) :]}")
    text.rstrip()
    return text


# --- tables -----------------------------------------------------------------------------------------------


def _layers(changes: Sequence[LayerChange]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("layer", "changed", "gained", "lost", "k", "entropy", "gained most", "lost most"):
        table.add_column(name, justify="left" if name.endswith("most") else "right", no_wrap=True)
    for change in changes[:MOST_LAYERS]:
        table.add_row(
            _short(change.name),
            f"{100 * change.changed:.0f} %",
            f"{change.gained:.2f}",
            f"{change.lost:.2f}",
            _pair(change.k),
            "" if change.entropy is None else _pair(change.entropy),
            Text(_experts(change.experts_gained, "+"), GAINED),
            Text(_experts(change.experts_lost, "-"), LOST),
        )
    return table


def _pair(values: tuple[float, float]) -> str:
    before, after = (f"{value:.2f}" for value in values)
    return before if before == after else f"{before} -> {after}"


def _experts(found: Sequence[tuple[int, float]], sign: str) -> str:
    return "  ".join(f"{expert} {sign}{100 * share:.0f} %" for expert, share in found[:MOST_EXPERTS])


def _next(inspection: Inspection) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    compared = inspection.adapted is not None
    for name in ("token", "base", *(("adapted",) if compared else ())):
        table.add_column(name, justify="left" if name == "token" else "right")
    for one in inspection.next_tokens[:MOST_NEXT]:
        after = [] if one.after is None else [f"{100 * one.after:.1f} %"]
        table.add_row(repr(one.text), f"{100 * one.before:.1f} %", *after)
    return table
