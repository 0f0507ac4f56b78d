"""Which commands are there, and what does each do? `/help` and completion are made from this table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from ttrouting.cli.chat import conversation
from ttrouting.cli.chat.interrupts import Leave
from ttrouting.cli.chat.screen import counted
from ttrouting.cli.chat.switches import Settings, changed_options, option_names, split_setting
from ttrouting.errors import ConfigError, UnsupportedCallError, did_you_mean
from ttrouting.registry import get_strategy, list_strategies

if TYPE_CHECKING:
    from ttrouting.cli.chat.talk import Chat

FILE = "FILE"  # an argument that is completed with names of files


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: without the slash. arguments: as `/help` shows them; empty if it takes none. summary: one line.
        run: what it does with the text after its name. words: what may stand there, for completion.
    """

    name: str
    arguments: str
    summary: str
    run: Callable[[Chat, str], None]
    words: Callable[[Chat], Iterable[str]] = lambda _: ()


def run(chat: Chat, line: str) -> None:
    """Run a line that begins with a slash.

    Raises:
        ConfigError: no such command, or arguments that it does not take. Leave: the user wants to go.
        Whatever the command raises.
    """
    name, _, rest = line[1:].strip().partition(" ")
    found = {command.name: command for command in COMMANDS}.get(name.lower())
    if found is None:
        hint = did_you_mean(name.lower(), [c.name for c in COMMANDS])
        raise ConfigError(f"There is no command /{name}.{hint} Nothing was sent; a message that begins so: //{name}.")
    rest = rest.strip()
    if rest and not found.arguments:
        raise ConfigError(f"/{found.name} takes nothing after it, got {rest!r}.")
    if not rest and found.arguments and not found.arguments.startswith("["):
        raise ConfigError(f"/{found.name} needs {found.arguments}. {found.summary}")
    found.run(chat, rest)


# --- strategies ---------------------------------------------------------------------------------------


def _on(chat: Chat, text: str) -> None:
    switches = chat.switches
    for name in _names(text):
        switches = switches.turned_on(name)
    chat.set(switches, chat.settings)
    chat.screen.note(_standing(chat))


def _off(chat: Chat, text: str) -> None:
    switches = chat.switches
    for name in switches.names if text == "all" else _names(text):
        switches = switches.turned_off(name)
    chat.set(switches, chat.settings)
    chat.screen.note(_standing(chat))


def _set(chat: Chat, text: str) -> None:
    option, strategy, value = split_setting(text)
    if strategy is None:
        chat.set(chat.switches, chat.settings.changed(option, value))
        chat.screen.note(f"{option} is {getattr(chat.settings, option)}.")
        return
    name = get_strategy(strategy).name
    chat.set(chat.switches.changed(name, option, value), chat.settings)
    off = "" if name in chat.switches.names else f" {name} is off: /on {name}"
    chat.screen.note(f"{name}.{option} is {value}.{off}")


def _names(text: str) -> list[str]:
    return [name for name in text.replace(",", " ").split() if name]


def _standing(chat: Chat) -> str:
    named = [f"{s.name} ({changed})" if (changed := changed_options(s)) else s.name for s in chat.switches.on]
    return f"On: {', '.join(named)}." if named else "Nothing is on: the model answers as it is."


def _methods(chat: Chat, _: str) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "name", "what it does, and its cost"):
        table.add_column(column, no_wrap=column != "what it does, and its cost")
    for info in list_strategies():
        on = info.name in chat.switches.names
        table.add_row("on" if on else "", Text(info.name, "bold" if on else ""), info.summary)
    chat.screen.show(table)
    chat.screen.note("Options of one: /set NAME. and the Tab key, or 'ttrouting strategies NAME'.")


def _status(chat: Chat, _: str) -> None:
    rows = {"model": chat.engine.about}
    length, limit = chat.engine.length(chat.turns), chat.engine.limit
    of = "" if limit is None else f" of {limit}"
    rows["conversation"] = counted(len(chat.turns), "turn") + ("" if length is None else f", {length}{of} tokens")
    rows["strategies"] = _standing(chat)
    for field in dataclasses.fields(Settings):
        value = getattr(chat.settings, field.name)
        rows[field.name] = "the model's own" if value is None else str(value)
    if chat.settings.greedy:
        rows["temperature"] = "greedy"
    if not chat.engine.keeps_state:
        rows["adaptation"] = "fresh (a server keeps nothing)"
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    chat.screen.show(table)


# --- answers ------------------------------------------------------------------------------------------


def _diff(chat: Chat, _: str) -> None:
    base, adapted = chat.compare()
    chat.screen.difference(base, adapted, chat.switches.names)


def _routing(chat: Chat, _: str) -> None:
    look: Any = getattr(chat.engine, "routing", None)
    if look is None:
        raise UnsupportedCallError("A server does not tell how it routed. Run the model here: leave out --server.")
    chat.screen.routing(look())


def _regen(chat: Chat, _: str) -> None:
    chat.regenerate()


# --- the conversation ---------------------------------------------------------------------------------


def _save(chat: Chat, text: str) -> None:
    if not chat.turns:
        raise ConfigError("There is no turn to save yet. Ask something first.")
    path = Path(text).expanduser()
    conversation.save(path, chat.turns, chat.engine.name)
    chat.screen.note(f"Written to {path}: {counted(len(chat.turns), 'turn')}. What strategies learned is not in it.")


def _load(chat: Chat, text: str) -> None:
    path = Path(text).expanduser()
    turns, model = conversation.load(path)
    replaced = f" instead of the {len(chat.turns)} before" if chat.turns else ""
    chat.clear(turns)
    other = "" if model == chat.engine.name else f" It was held with {model}."
    chat.screen.note(f"{counted(len(turns), 'turn')} from {path}{replaced}; strategies stay as they are.{other}")
    if turns:
        chat.screen.note(f"The last: {_short(turns[-1].user)} / {_short(turns[-1].answer)}")


def _short(text: str, most: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 3]}..."


def _clear(chat: Chat, _: str) -> None:
    chat.clear()
    chat.screen.note("The conversation and what was learned in it are forgotten.")


def _help(chat: Chat, _: str) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for command in COMMANDS:
        table.add_row(Text(f"/{command.name} {command.arguments}".rstrip()), command.summary)
    chat.screen.show(table)
    chat.screen.note(
        "Enter sends, Alt-Enter or Ctrl-J begins a new line, Tab completes, arrows find earlier lines. Ctrl-C stops "
        "an answer, a second one leaves. A message that begins with a slash: write two."
    )
    if chat.engine.advice:
        chat.screen.note(chat.engine.advice)


def _exit(chat: Chat, _: str) -> None:
    raise Leave


# --- completion ---------------------------------------------------------------------------------------


def _known(_: Chat) -> list[str]:
    return [info.name for info in list_strategies()]


def _active(chat: Chat) -> list[str]:
    return [*chat.switches.names, "all"]


def _options(_: Chat) -> list[str]:
    named = [f"{info.name}.{option}" for info in list_strategies() for option in option_names(info.cls)]
    return [*option_names(Settings), *named]


def _files(_: Chat) -> list[str]:
    return [FILE]


COMMANDS = (
    Command("on", "NAME ...", "Turn strategies on.", _on, _known),
    Command("off", "NAME ... | all", "Turn strategies off; they keep their options.", _off, _active),
    Command(
        "set", "NAME VALUE", "Change an option: scmoe.beta 0.3, temperature 0.7, adaptation fresh", _set, _options
    ),
    Command("methods", "", "List the strategies.", _methods),
    Command("status", "", "Show the model, the settings, and how full the context is.", _status),
    Command("diff", "", "Answer the last message again, without strategies and with them, side by side.", _diff),
    Command("routing", "", "Show what changed in the routing of the last answer, layer by layer.", _routing),
    Command("regen", "", "Answer the last message again, instead of the last answer.", _regen),
    Command("save", "FILE", "Write the conversation.", _save, _files),
    Command("load", "FILE", "Go on with a written conversation.", _load, _files),
    Command("clear", "", "Forget the conversation, and what was learned in it.", _clear),
    Command("help", "", "Show this.", _help),
    Command("exit", "", "Leave; so does Ctrl-D.", _exit),
)


def completions(chat: Chat, line: str) -> tuple[list[str], str] | None:
    """What may stand at the end of a line, and what of it is there already; None where files are meant.

    Messages are not completed.
    """
    if not line.startswith("/") or line.startswith("//"):
        return [], ""
    name, space, rest = line[1:].partition(" ")
    if not space:
        return [f"/{c.name}" for c in COMMANDS if c.name.startswith(name.lower())], line
    command = {c.name: c for c in COMMANDS}.get(name.lower())
    words = list(command.words(chat)) if command is not None else []
    if words == [FILE]:
        return None
    typed = rest.replace(",", " ").rpartition(" ")[2]
    if command is not None and command.name == "set" and " " in rest.lstrip():
        words = _values(rest.split()[0])
    return [word for word in words if word.startswith(typed)], typed


def _values(option: str) -> list[str]:
    """Values that can be listed."""
    return {"adaptation": ["continue", "fresh"], "no_harm": ["true", "false"]}.get(option, [])
