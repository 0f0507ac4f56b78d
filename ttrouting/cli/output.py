"""What goes to stdout and what to stderr? Results to the one, progress, notes and errors to the other."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Lock, Timer
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text

from ttrouting.errors import ArtefactError, CompositionError, ConfigError, TTRoutingError

PATIENCE = 2.0  # seconds without a word
PIPE_WIDTH = 120  # columns of a table that no terminal limits


class Output:
    """Where a subcommand writes. No colour where the stream is no terminal or `NO_COLOR` is set.

    Args:
        as_json: results are one JSON object, and tables and texts are left out.
    """

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        self._results = _console(stderr=False)
        self._notes = _console(stderr=True)

    @property
    def notes(self) -> Console:
        """Where words beside the result go, for what draws there itself."""
        return self._notes

    @property
    def results(self) -> Console:
        """Where results go, for what draws there itself."""
        return self._results

    @property
    def marks(self) -> tuple[str, str]:
        """Signs for right and wrong that the terminal can show."""
        return ("✓", "✗") if self._results.encoding.lower().startswith("utf") else ("+", "-")

    def text(self, text: str) -> None:
        """A result as it is, ended by one line end: no wrapping, no markup."""
        if not self.as_json:
            self._results.out(text.removesuffix("\n"), highlight=False)

    def show(self, *what: RenderableType) -> None:
        """Results for people: tables, headings."""
        if not self.as_json:
            self._results.print(*what)

    def data(self, result: Mapping[str, Any]) -> None:
        """The whole result for machines. NaN and infinity, which JSON has no word for, become null."""
        if self.as_json:
            sys.stdout.write(json.dumps(plain(result), indent=2) + "\n")

    def note(self, what: RenderableType) -> None:
        """A word beside the result."""
        if isinstance(what, str):
            self._notes.print(Text(what, style="dim"), soft_wrap=True)
        else:
            self._notes.print(what)

    def error(self, message: str) -> None:
        """One line that says what was wrong."""
        line = Text("ttrouting: ", style="bold red")
        self._notes.print(line.append(" ".join(message.split()), style="default"), soft_wrap=True)

    @contextmanager
    def waiting(self, label: str, own_bars: bool = False) -> Iterator[Callable[[str], None]]:
        """Say what is going on if it takes more than two seconds; the value sets another label.

        Args:
            own_bars: the work draws progress bars itself, so lines are written at once and nothing spins.
        """
        if own_bars:
            self.note(f"{label} ...")
            yield lambda text: self.note(f"{text} ...")
            return
        status = self._notes.status(Text(label))
        lock, started, ended, said = Lock(), False, False, label

        def begin() -> None:
            nonlocal started
            with lock:
                if ended:  # it was over just when patience was
                    return
                started = True
                status.start() if self._notes.is_terminal else self.note(f"{said} ...")

        def say(text: str) -> None:
            nonlocal said
            with lock:
                said = text
                status.update(Text(text))
                if started and not self._notes.is_terminal:
                    self.note(f"{text} ...")

        timer = Timer(PATIENCE, begin)
        timer.daemon = True
        timer.start()
        try:
            yield say
        finally:
            timer.cancel()
            with lock:
                ended = True
                status.stop()


def exit_code(error: TTRoutingError) -> int:
    """2 where what was asked for is wrong, 1 where the model or the call cannot be adapted."""
    return 2 if isinstance(error, (ConfigError, CompositionError, ArtefactError)) else 1


def _console(stderr: bool) -> Console:
    # what a model writes is text: `[bold]` or `:smile:` in it mean nothing
    console = Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = max(console.width, PIPE_WIDTH)
    return console


def encode_anything() -> None:
    """Let no character that a model writes stop the command on a terminal that lacks it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def plain(value: Any) -> Any:
    """`value` with containers as dicts and lists and every float finite or None."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
