"""The chat in a terminal: reading lines with history, completion and a toolbar, and what Ctrl-C does there."""

from __future__ import annotations

import os
import sys
import termios
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.styles import Style
from rich.cells import cell_len

from ttrouting.cli.chat.commands import completions
from ttrouting.cli.chat.interrupts import Leave
from ttrouting.cli.chat.screen import counted
from ttrouting.cli.chat.talk import Chat

MARK = "> "


def converse(chat: Chat) -> None:
    """Read and answer lines until the user leaves."""
    chat.screen.note(f"{chat.engine.about}. /help lists the commands, Ctrl-D leaves.")
    if chat.engine.advice:
        chat.screen.note(chat.engine.advice)
    with suppress(EOFError, KeyboardInterrupt):  # a second Ctrl-C may come while the first is being told
        _answer_lines(chat, _session(chat))


def _answer_lines(chat: Chat, session: PromptSession[str]) -> None:
    """Until Ctrl-D, /exit or a second Ctrl-C, which raise."""
    leaving = False  # Ctrl-C was just pressed
    while True:
        before = len(chat.answers)
        asking = True
        try:
            line = session.prompt([("bold", MARK)])
            asking = leaving = False
            chat.handle(line)
            leaving = len(chat.answers) > before and chat.answers[-1][1].ended == "stopped"
        except Leave:
            raise
        except KeyboardInterrupt:
            if leaving:
                raise
            leaving = True
            chat.screen.note("Ctrl-C again leaves." if asking else "Stopped. Ctrl-C again leaves.")


def _session(chat: Chat) -> PromptSession[str]:
    return PromptSession(
        history=_history(chat),
        completer=_Completer(chat),
        complete_while_typing=False,
        multiline=True,
        key_bindings=_keys(),
        prompt_continuation=lambda width, line, wrapped: " " * width,
        bottom_toolbar=lambda: toolbar(chat, get_app().output.get_size().columns),
        style=Style.from_dict({"bottom-toolbar.on": "bold"}),
        enable_suspend=True,
        reserve_space_for_menu=6,
    )


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.complete_state is not None and buffer.complete_state.current_completion is not None:
            buffer.complete_state = None  # what was chosen stays
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:  # what was typed is dropped
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt())

    return keys


class _Completer(Completer):
    """Commands and what may follow them."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """For the text before the cursor."""
        found = completions(self._chat, document.text_before_cursor)
        if found is None:
            typed = document.text_before_cursor.partition(" ")[2].lstrip()
            yield from self._paths.get_completions(Document(typed), complete_event)
            return
        words, typed = found
        for word in words:
            yield Completion(word, start_position=-len(typed))


def toolbar(chat: Chat, width: int) -> StyleAndTextTuples:
    """The model, what is on, how turns adapt; as much of it as fits into a line."""
    on = ", ".join(chat.switches.names)
    name = Path(chat.engine.name).name[-(width // 3) :]  # what is on matters more than a long path
    parts = [("", name), ("class:bottom-toolbar.on", on or "nothing on")]
    parts += [("", f"adaptation: {chat.settings.adaptation}")] if chat.engine.keeps_state else []
    parts += [] if chat.settings.no_harm else [("", "no-harm off")]
    parts += [("", counted(len(chat.turns), "turn")), ("", "/help")]
    shown: StyleAndTextTuples = []
    room = width - 2
    for style, text in parts:
        size = cell_len(text) + (3 if shown else 0)
        if size > room:
            break
        if shown:
            shown.append(("", " | "))
        shown.append((style, text))
        room -= size
    return [("", " "), *shown]


def _history(chat: Chat) -> History:
    """Lines of earlier chats, readable for their owner only."""
    home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = home / "ttrouting" / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        with path.open("ab"):
            pass
    except OSError as error:
        chat.screen.note(f"Lines are not remembered for later chats: {path}: {error.strerror}.")
        return InMemoryHistory()
    return FileHistory(str(path))


@contextmanager
def keys_unseen() -> Iterator[None]:
    """Keys pressed while the model is loaded or answers do not show up there, but at the next prompt."""
    try:
        before = termios.tcgetattr(sys.stdin)
    except termios.error:
        yield
        return
    quiet = list(before)
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
