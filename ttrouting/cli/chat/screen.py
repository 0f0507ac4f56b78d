"""What does the chat look like: answers as they come, one dim line on what they cost, tables that fit the width?

Colours are the terminal's own sixteen, and marks are underlined too: it reads on dark, on light and without colour.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import IO, Any

from rich.cells import cell_len
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ttrouting.cli.chat.answers import Answer
from ttrouting.cli.chat.routing import LayerChange, RoutingChange
from ttrouting.cli.output import Output

# A model's control characters would move the cursor or change the terminal: they are shown as pictures.
_CONTROL: dict[int, int | str] = {c: 0x2400 + c for c in range(32) if c != ord("\n")}
_CONTROL.update({ord("\t"): "    ", 0x7F: 0x2421})
_CONTROL.update(dict.fromkeys(range(0x80, 0xA0), 0xFFFD))
ONLY_BASE, ONLY_ADAPTED = "red underline", "green underline"


def printable(text: str) -> str:
    """Text that cannot do anything to a terminal."""
    return text.replace("\r\n", "\n").translate(_CONTROL)


def counted(number: int, word: str) -> str:
    """`1 turn`, `2 turns`."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


class Screen:
    """Where the chat writes.

    Args:
        live: answers go to a terminal as they come, wrapped at words; otherwise as they are, when they are finished.
    """

    def __init__(self, output: Output, live: bool) -> None:
        self._output = output
        self._live = live

    @property
    def width(self) -> int:
        """Columns of the terminal."""
        return self._output.results.width

    def waiting(self, label: str) -> AbstractContextManager[Any]:
        """Say what is going on if it takes more than two seconds."""
        return self._output.waiting(label)

    def writer(self) -> Writer | None:
        """Where the pieces of an answer go; None where it is shown in one."""
        return Writer(self._output.results.file, lambda: self.width) if self._live else None

    def answer(self, text: str) -> None:
        """A whole answer, if it was not shown in pieces."""
        if not self._live:
            self._output.text(text)

    def note(self, text: str) -> None:
        """A word beside the conversation."""
        self._say(Text(printable(text), style="dim"))

    def error(self, message: str) -> None:
        """What was wrong, in one paragraph."""
        if not self._output.notes.is_terminal:
            self._output.error(message)
            return
        self._say(Text.assemble(("! ", "bold red"), " ".join(printable(message).split())))

    def _say(self, what: Text) -> None:
        self._output.notes.print(what, soft_wrap=not self._output.notes.is_terminal)

    def show(self, *what: RenderableType) -> None:
        """Tables and texts that were asked for."""
        self._output.show(*what)

    def footer(self, answer: Answer) -> None:
        """What an answer cost and what strategies did; warnings stand out."""
        notes = self._output.notes
        width = notes.width if notes.is_terminal else 10_000
        for line in lines(footer(answer), width):
            notes.print(line, soft_wrap=True)
        if notes.is_terminal:
            notes.print()  # a turn ends here

    def difference(self, base: Answer, adapted: Answer, names: Sequence[str]) -> None:
        """Two answers side by side, with the tokens that differ marked; without a terminal as a word diff."""
        title = f"adapted: {' + '.join(names)}"
        left, right = marked(base.pieces, adapted.pieces, plain=not self._live)
        table = Table(box=None, expand=self._live, padding=(0, 2, 0, 0), header_style="bold")
        for name in ("base", title):
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(left, right)
        room = self.width // 2 - 2
        costs = ([Text(fact, "dim") for fact in _facts(one)] for one in (base, adapted))
        table.add_row(*(Text("\n").join(lines(cost, room)) for cost in costs))
        self.show(table)
        if base.pieces == adapted.pieces:
            self.note("Both answers are the same.")

    def routing(self, change: RoutingChange) -> None:
        """What changed in each layer."""
        if not any(layer.gained or layer.lost for layer in change.layers):
            self.note(f"{_read(change)} No token met another expert.")
            return
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("layer", "mean k", "entropy"):
            table.add_column(name, justify="right", no_wrap=True)
        for name in ("gained", "lost"):
            table.add_column(f"{name}, %", overflow="fold")
        for number, layer in enumerate(change.layers):
            k, entropy = _pair(layer.mean_k), _pair(layer.entropy)
            table.add_row(str(number), k, entropy, _experts(layer.gained), _experts(layer.lost))
        self.show(table)
        self.note(
            f"{_read(change)} Gained, lost: expert, and by how much the share of tokens that chose it "
            "changed; the three largest. Entropy in nats."
        )


class Writer:
    """Writes text as it comes so that no word is broken at the right edge.

    Args:
        file: where to. width: tells the columns of the terminal, which may be resized while an answer is written.
    """

    def __init__(self, file: IO[str], width: Callable[[], int]) -> None:
        self._file = file
        self._width = width
        self._column = 0
        self._space = ""
        self._word = ""

    def feed(self, text: str) -> None:
        """The next piece; its last word is shown when it is finished."""
        width = self._width()
        for c in printable(text):
            if c == "\n":
                self._flush()
                self._put("\n")
                self._column, self._space = 0, ""
            elif c.isspace():
                self._flush()
                self._space += c
            elif cell_len(c) > 1:  # scripts without spaces break anywhere
                self._flush()
                self._word = c
                self._flush()
            else:
                self._word += c
                if cell_len(self._word) >= width:
                    self._flush()
        self._file.flush()

    def end(self) -> None:
        """No more is to come."""
        self._flush()
        if self._column:
            self._put("\n")
        self._column = 0
        self._file.flush()

    def _flush(self) -> None:
        if not self._word:
            return
        size = cell_len(self._space) + cell_len(self._word)
        if self._column + size > self._width():
            if self._column:
                self._put("\n")
            self._column, self._space, size = 0, "", cell_len(self._word)
        self._put(self._space + self._word)
        self._column, self._space, self._word = self._column + size, "", ""

    def _put(self, text: str) -> None:
        self._file.write(text)


# --- the footer ---------------------------------------------------------------------------------------


def footer(answer: Answer) -> list[Text]:
    """Facts of an answer in the order of interest; roll-backs and skipped adaptations stand out."""
    facts = [Text(fact, "dim") for fact in _facts(answer)]
    for name, done in answer.outcomes.items():
        outcome = str(done.get("outcome", "applied"))
        fine = outcome in ("applied", "accepted")
        if "loss_before" in done and "loss_after" in done and outcome.startswith("accepted"):
            outcome += f", loss {done['loss_before']:.2f} -> {done['loss_after']:.2f}"
        facts.append(Text(f"{name} {outcome}", "dim" if fine else "magenta"))
    facts += [Text(f"{name} changes nothing with these options", "magenta") for name in answer.idle]
    ended = {
        "stopped": "stopped",
        "length": "cut off by max_new_tokens: /set max_new_tokens N",
        "context": "cut off: the model's context is full, /clear starts anew",
    }
    if answer.ended != "end":
        facts.append(Text(ended.get(answer.ended, f"ended: {answer.ended}"), "magenta"))
    return facts


def _facts(answer: Answer) -> list[str]:
    found = []
    if answer.tokens is not None:
        found.append(counted(answer.tokens, "token"))
    if answer.per_second is not None:
        found.append(f"{answer.per_second:.1f} tokens/s")
    if answer.first_seconds is not None:
        found.append(f"first token {_time(answer.first_seconds)}")
    times = answer.report.milliseconds
    if times:
        found.append(f"adaptation {_time((times.get('adapt', 0.0) + times.get('readapt', 0.0)) / 1000)}")
    if answer.experts is not None:
        found.append(f"{answer.experts:.2f} experts/token")
    return found


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 10 else f"{1000 * seconds:.0f} ms"


def lines(facts: Sequence[Text], width: int) -> list[Text]:
    """Facts side by side, never broken where a new line keeps one whole."""
    found: list[Text] = []
    for fact in facts:
        if found and cell_len(found[-1].plain) + 3 + cell_len(fact.plain) <= width:
            found[-1] = Text.assemble(found[-1], (" · ", "dim"), fact)
        else:
            found += [Text.assemble(part) for part in _folded(fact, width)]
    return found


def _folded(fact: Text, width: int) -> list[Text]:
    if cell_len(fact.plain) <= width:
        return [fact]
    rows, row = [], ""
    for word in fact.plain.split(" "):
        if row and cell_len(row) + 1 + cell_len(word) > width:
            rows.append(row)
            row = word
        else:
            row = f"{row} {word}" if row else word
    return [Text(one, fact.style) for one in [*rows, row]]


# --- two answers ----------------------------------------------------------------------------------------


def marked(base: Sequence[str], adapted: Sequence[str], plain: bool) -> tuple[Text, Text]:
    """Both texts with the tokens that only one of them has marked; `plain` with signs instead of styles."""
    left, right = Text(), Text()
    matcher = difflib.SequenceMatcher(None, base, adapted, autojunk=False)
    for kind, a, b, c, d in matcher.get_opcodes():
        same = kind == "equal"
        _append(left, base[a:b], same, ONLY_BASE, ("[-", "-]") if plain else ("", ""))
        _append(right, adapted[c:d], same, ONLY_ADAPTED, ("{+", "+}") if plain else ("", ""))
    return left, right


def _append(text: Text, pieces: Iterable[str], same: bool, style: str, signs: tuple[str, str]) -> None:
    found = printable("".join(pieces))
    if same or not found:
        text.append(found)
        return
    shown = re.sub(r"\n", "↵\n", found)  # a line end has no width to be marked
    text.append(f"{signs[0]}{shown}{signs[1]}", style=style)


# --- routing --------------------------------------------------------------------------------------------


def _pair(values: tuple[float, float]) -> str:
    before, after = (f"{value:.2f}" for value in values)
    return before if before == after else f"{before} -> {after}"


def _experts(shifts: Sequence[tuple[int, float]]) -> str:
    # no space inside: a narrow terminal breaks between experts only
    return "  ".join(f"{expert}:{100 * share:+.0f}" for expert, share in shifts)


def _read(change: RoutingChange) -> str:
    """What was compared, and the means over layers."""
    compared = f"read with {' + '.join(change.strategies)} and without"
    return f"{change.tokens} tokens of the last prompt and answer, {compared}. {_means(change.layers)}"


def _means(layers: Sequence[LayerChange]) -> str:
    def mean(name: str) -> tuple[float, float]:
        pairs = [getattr(layer, name) for layer in layers]
        return sum(a for a, _ in pairs) / len(pairs), sum(b for _, b in pairs) / len(pairs)

    return f"Mean k {_pair(mean('mean_k'))}, entropy {_pair(mean('entropy'))}."
