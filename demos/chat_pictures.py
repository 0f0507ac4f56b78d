"""The pictures in docs/chat.md: a chat with the pocket model in a real terminal, light and dark, 80 and 140 columns.

    python demos/chat_pictures.py --out docs/pictures

tmux is the terminal: lines are typed into it, and what it shows then, colours included, becomes an SVG file. Without
tmux nothing is written, and that is said.
"""

from __future__ import annotations

import argparse
import io
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.ansi import AnsiDecoder
from rich.console import Console
from rich.terminal_theme import TerminalTheme

PATIENCE = 120.0  # seconds
ROWS = 34

# What is typed, and what is there when the answer is complete.
TALK = [
    ("12+30", r"\| 1 turn "),
    ("/on task_delta rerouting", r"On: task_delta, rerouting\."),
    ("REVERSE j f i e a", r"\| 2 turns"),
    ("/diff", r"base +adapted[\s\S]*\n>"),
    ("/set scmoe.beta abc", r"must be a number"),
    ("/routing", r"Entropy\s+in\s+nats[\s\S]*\n>"),
]


def _colours(*codes: str) -> list[tuple[int, int, int]]:
    return [(int(c[:2], 16), int(c[2:4], 16), int(c[4:], 16)) for c in codes]


# Background, foreground, then black, red, green, yellow, blue, magenta, cyan, white.
PALETTES = {
    "light": _colours(
        "ffffff", "1f2328", "24292f", "cf222e", "116329", "7d4e00", "0969da", "8250df", "1b7c83", "6e7781"
    ),
    "dark": _colours(
        "0d1117", "e6edf3", "484f58", "ff7b72", "3fb950", "d29922", "58a6ff", "bc8cff", "39c5cf", "b1bac4"
    ),
}


class Terminal:
    """A tmux of its own, with one window that runs a command."""

    def __init__(self, command: str, columns: int, rows: int, folder: Path) -> None:
        self._tmux = ["tmux", "-S", str(folder / "socket"), "-f", "/dev/null"]
        self._run("new-session", "-d", "-x", str(columns), "-y", str(rows), command)

    def _run(self, *arguments: str) -> str:
        return subprocess.run([*self._tmux, *arguments], check=True, capture_output=True, text=True).stdout

    def type(self, line: str) -> None:
        """A line, and Enter."""
        self._run("send-keys", "-l", line)
        self._run("send-keys", "Enter")

    def shown(self, colours: bool = False) -> str:
        """What is on the screen now."""
        return self._run("capture-pane", "-p", *(("-e", "-N") if colours else ()))

    def until(self, pattern: str) -> None:
        """Wait until the screen matches."""
        deadline = time.monotonic() + PATIENCE
        while not re.search(pattern, self.shown()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {pattern!r} on the screen:\n{self.shown()}")
            time.sleep(0.1)

    def close(self) -> None:
        """End the command and the tmux that holds it."""
        self._run("kill-server")


def screen(columns: int) -> str:
    """What a terminal of this width shows after the talk, with its colour sequences."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chat = f"env XDG_STATE_HOME={shlex.quote(name)} {shlex.quote(sys.executable)} -m ttrouting chat"
        terminal = Terminal(chat, columns, ROWS, folder)
        try:
            terminal.until(r"\| 0 turns")
            for line, pattern in TALK:
                terminal.type(line)
                terminal.until(pattern)
            time.sleep(0.5)  # the toolbar is drawn last
            return terminal.shown(colours=True)
        finally:
            terminal.close()


def picture(text: str, columns: int, palette: str) -> str:
    """An SVG that loads nothing: no web font, whatever monospace font there is."""
    background, foreground, *eight = PALETTES[palette]
    theme = TerminalTheme(background, foreground, eight)
    console = Console(width=columns, record=True, file=io.StringIO(), force_terminal=True, legacy_windows=False)
    for line in AnsiDecoder().decode(text.rstrip("\n")):  # one decoder: a style may last over several lines
        console.print(line, soft_wrap=True)
    template = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    template = re.sub(r"font-family: [^;]*;", "font-family: ui-monospace, monospace;", template)
    title = f"ttrouting chat, {columns} columns, {palette}"
    return console.export_svg(title=title, theme=theme, code_format=template, unique_id=f"chat-{palette}-{columns}")


def main() -> None:
    """Write the four pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    out: Path = parser.parse_args().out
    if shutil.which("tmux") is None:
        print("No picture was made: the terminal is tmux, which is not installed here.", file=sys.stderr)
        return
    for columns in (80, 140):
        text = screen(columns)
        for palette in PALETTES:
            file = out / f"chat_{palette}_{columns}.svg"
            file.write_text(picture(text, columns, palette))
            print(f"{file}: {file.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main()
