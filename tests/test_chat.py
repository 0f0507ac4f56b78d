"""The parts of the chat without a model: commands and hints, completion, files, what is shown and how it wraps."""

import io
import json
import logging
import re
import runpy
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console

import ttrouting as ttr
from ttrouting.cli import models
from ttrouting.cli.chat import conversation
from ttrouting.cli.chat.answers import Answer
from ttrouting.cli.chat.commands import COMMANDS, completions
from ttrouting.cli.chat.conversation import Turn
from ttrouting.cli.chat.interrupts import Leave
from ttrouting.cli.chat.prompts import STOP, plain, visible
from ttrouting.cli.chat.routing import LayerChange, RoutingChange
from ttrouting.cli.chat.screen import Screen, Writer, footer, lines, marked, printable
from ttrouting.cli.chat.switches import Settings, Switches, split_setting
from ttrouting.cli.chat.talk import Chat
from ttrouting.cli.chat.terminal import toolbar
from ttrouting.cli.output import Output
from ttrouting.report import Report, SequenceReport

ROOT = Path(__file__).parent.parent


class Parrot:
    """An engine that says a message back; it refuses static routing, as a model may."""

    name, about, advice, limit, keeps_state = "parrot", "a parrot", "", None, True

    def __init__(self):
        self.asked, self.used = [], []

    def use(self, strategies, no_harm):
        if any(s.name == "static_routing" for s in strategies):
            raise ttr.UnsupportedModelError("no static routing here")
        self.used.append((tuple(strategies), no_harm))

    def ask(self, request):
        self.asked.append(request)
        request.show(request.text)
        return Answer(request.text, (request.text,), 1.0, 0.5, 1, 3, None, "end", experts=2.0)

    def length(self, turns):
        return 7 * len(turns)

    def close(self):
        pass


@pytest.fixture
def chat():
    return Chat(Parrot(), Screen(Output(), live=False), Settings(), Switches())


def said(chat, capsys, *lines):
    """What stdout and stderr say to these lines, each with single spaces."""
    capsys.readouterr()
    for line in lines:
        chat.handle(line)
    return tuple(" ".join(text.split()) for text in capsys.readouterr())


# --- commands ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/diif", "There is no command /diif. Did you mean 'diff'? Known: clear, diff,"),
        ("  /HELPP me", "Did you mean 'help'?"),
        ("/", "There is no command /. Known:"),
        ("/help me", "/help takes nothing after it, got 'me'."),
        ("/on", "/on needs NAME"),
        ("/on reruting", "No strategy 'reruting'. Did you mean 'rerouting'?"),
        ("/off scmoe", "scmoe is not on. Nothing is on."),
        ("/set scmoe.beta", "/set takes a name and a value"),
        ("/set scmoe.beta much", "scmoe.beta must be a number, got 'much'."),
        ("/set scmoe.bet 1", "Did you mean 'beta'?"),
        ("/set temprature 1", "There is no setting 'temprature'. Did you mean 'temperature'?"),
        ("/set temperature -1", "chat.temperature must be in [0, inf), got -1."),
        ("/set adaptation maybe", "chat.adaptation cannot be 'maybe'."),
        ("/set max_new_tokens 1.5", "max_new_tokens must be a whole number"),
        ("/diff", "There is no turn yet."),
        ("/regen", "There is no turn yet."),
        ("/routing", "A server does not tell how it routed."),
        ("/save x", "There is no turn to save yet."),
        ("/load /nowhere/x", "Cannot read /nowhere/x: No such file"),
    ],
)
def test_a_bad_command_is_told_and_never_sent(chat, capsys, line, words):
    out, err = said(chat, capsys, line)
    assert out == ""
    assert words in err
    assert "Traceback" not in err
    assert chat.engine.asked == []
    assert isinstance(chat.refused, ttr.TTRoutingError)


def test_two_slashes_are_a_message_that_begins_with_one(chat, capsys):
    out, _ = said(chat, capsys, "//help is a command", "", "   ")
    assert out == "/help is a command"
    assert [r.text for r in chat.engine.asked] == ["/help is a command"]


def test_help_lists_every_command(chat, capsys):
    out, err = said(chat, capsys, "/help")
    assert all(f"/{command.name}" in out and command.summary in out for command in COMMANDS)
    assert "Ctrl-C" in err


def test_exit_leaves(chat):
    with pytest.raises(Leave):
        chat.handle("/exit")


def test_strategies_are_turned_on_and_off_and_keep_their_options(chat, capsys):
    _, err = said(chat, capsys, "/set scmoe.beta 0.3")
    assert err == "scmoe.beta is 0.3. scmoe is off: /on scmoe"
    assert chat.engine.used == []
    _, err = said(chat, capsys, "/on rerouting, scmoe")
    assert err == "On: rerouting, scmoe (beta=0.3)."
    said(chat, capsys, "/set rerouting.steps=7", "/off scmoe", "/set no_harm false", "/on scmoe")
    assert chat.switches.on == (ttr.Rerouting(steps=7), ttr.SCMoE(beta=0.3))
    assert chat.engine.used[-1] == (chat.switches.on, False)
    _, err = said(chat, capsys, "/on scmoe")
    assert "scmoe is on already" in err
    _, err = said(chat, capsys, "/off all")
    assert err == "Nothing is on: the model answers as it is."
    assert chat.engine.used[-1] == ((), False)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("scmoe.beta 0.3", ("beta", "scmoe", "0.3")),
        ("scmoe.beta=0.3 ", ("beta", "scmoe", "0.3")),
        (r"rerouting.loss-on a=(b )c", ("loss_on", "rerouting", "a=(b )c")),
        ("max-new-tokens = 5", ("max_new_tokens", None, "5")),
    ],
)
def test_settings_are_split_at_the_first_sign(text, parts):
    assert split_setting(text) == parts


def test_what_the_engine_refuses_changes_nothing(chat, capsys):
    loaded = Switches((), {"static_routing": (ttr.StaticRouting(delta=torch.zeros(4, 8)),)})
    chat.switches = loaded
    _, err = said(chat, capsys, "/on scmoe static_routing")
    assert "no static routing here" in err
    assert chat.switches is loaded


def test_status_and_methods(chat, capsys):
    out, _ = said(chat, capsys, "hello", "/on scmoe", "/status")
    assert "conversation 1 turn, 7 tokens" in out
    assert "strategies On: scmoe." in out
    assert "temperature greedy" in out
    out, _ = said(chat, capsys, "/methods")
    assert "on scmoe" in out
    assert all(info.name in out for info in ttr.list_strategies())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/o", ["/on", "/off"]),
        ("/on re", ["rerouting"]),
        ("/on rerouting,sc", ["scmoe"]),
        ("/off ", ["scmoe", "all"]),
        ("/set temp", ["temperature"]),
        ("/set scmoe.be", ["scmoe.beta"]),
        ("/set adaptation ", ["continue", "fresh"]),
        ("/set scmoe.beta ", []),
        ("/nothing x", []),
        ("hello /o", []),
        ("//o", []),
    ],
)
def test_completion(chat, line, words):
    chat.handle("/on scmoe")
    found, typed = completions(chat, line)
    assert found == words
    assert line.endswith(typed)


def test_files_are_completed_as_files(chat):
    assert completions(chat, "/load some") is None


# --- turns ------------------------------------------------------------------------------------------


def test_turns_are_sent_along_and_answered_again(chat, capsys):
    said(chat, capsys, "one", "two")
    assert [(t.user, t.answer) for t in chat.turns] == [("one", "one"), ("two", "two")]
    chat.handle("/regen")
    last = chat.engine.asked[-1]
    assert (last.text, [t.user for t in last.turns], last.settings.seed) == ("two", ["one"], 1)
    assert len(chat.turns) == 2
    assert "greedy decoding has one only" in capsys.readouterr().err
    chat.handle("/clear")
    assert chat.turns == []


def test_diff_asks_without_and_with_strategies(chat, capsys):
    _, err = said(chat, capsys, "one", "/diff")
    assert "Nothing is on" in err
    out, err = said(chat, capsys, "/on scmoe", "/diff")
    assert [r.base for r in chat.engine.asked[-2:]] == [True, False]
    assert "base adapted: scmoe" in out
    assert "Both answers are the same." in err
    assert len(chat.turns) == 1


# --- files ------------------------------------------------------------------------------------------

TURNS = [Turn("héllo\nyou", "[bold]x\x1b[31m", False, (ttr.SCMoE(beta=0.3).to_dict(),)), Turn("b", "c", True)]


def test_a_conversation_comes_back(tmp_path):
    file = tmp_path / "talk.json"
    conversation.save(file, TURNS[:1], "pocket")
    conversation.save(file, TURNS, "pocket")  # over its own
    assert conversation.load(file) == (TURNS, "pocket")
    assert [p.name for p in tmp_path.iterdir()] == ["talk.json"]


def spoil(change):
    def apply(text):
        content = json.loads(text)
        change(content)
        return json.dumps(content)

    return apply


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: text[: len(text) // 2], "is damaged"),
        (lambda text: "\0", "is damaged"),
        (lambda text: "[" * 100_000, "is damaged"),
        (lambda text: "[]", "is no conversation"),
        (spoil(lambda c: c.update(kind="ttrouting.recipe")), "is no conversation"),
        (spoil(lambda c: c.update(schema=2)), "has schema 2, this version reads 1"),
        (spoil(lambda c: c["turns"][0].update(answer="other")), "its hash does not fit"),
        (spoil(lambda c: c.pop("sha256")), "its hash does not fit"),
    ],
)
def test_a_damaged_conversation_is_refused(chat, capsys, tmp_path, damage, words):
    file = tmp_path / "talk.json"
    conversation.save(file, TURNS, "pocket")
    file.write_text(damage(file.read_text(encoding="utf-8")), encoding="utf-8")
    said(chat, capsys, "one")
    _, err = said(chat, capsys, f"/load {file}")
    assert words in err
    assert [t.user for t in chat.turns] == ["one"]


def test_other_files_are_left_alone(chat, capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    _, err = said(chat, capsys, "one", f"/save {tmp_path}/notes.txt")
    assert "exists and is no conversation" in err
    assert (tmp_path / "notes.txt").read_text() == "mine"
    _, err = said(chat, capsys, f"/save {tmp_path}/no/x")
    assert "Cannot write" in err
    _, err = said(chat, capsys, f"/save {tmp_path}/x", "/clear", f"/load {tmp_path}/x")
    assert "1 turn from" in err
    assert chat.turns == [Turn("one", "one")]


# --- what is read and shown ---------------------------------------------------------------------------


def test_the_plain_format_is_that_of_solved_examples():
    assert plain([Turn("1+1", "2")], "2+2") == "Q: 1+1\nA: 2\nQ: 2+2\nA:"


@pytest.mark.parametrize(
    ("text", "stop", "ended", "shown"),
    [
        (" 12 ", STOP, True, "12"),
        (" a b\nQ: c", STOP, False, "a b"),
        ("\nQ: c", STOP, True, ""),
        ("Q: c", STOP, True, ""),
        ("a\nQ", STOP, False, "a"),
        ("a\nQ", STOP, True, "a\nQ"),
        ("a\nQ: b", None, True, "a\nQ: b"),
        ("a\n\n", None, False, "a"),
    ],
)
def test_what_belongs_to_an_answer(text, stop, ended, shown):
    assert visible(text, stop, ended) == shown


def test_what_was_shown_stays_the_beginning_of_the_answer():
    text = " one\n two Q: \nQ x \nQ: three"
    parts = [visible(text[:n], STOP, False) for n in range(len(text) + 1)]
    assert all(later.startswith(earlier) for earlier, later in pairwise(parts))
    assert visible(text, STOP, True) == "one\n two Q: \nQ x"


def written(pieces, *widths):
    """What is on the screen; each piece comes at the next of the widths, the last of which stays."""
    file, now = io.StringIO(), list(widths)
    writer = Writer(file, lambda: now[0])
    for piece in pieces:
        writer.feed(piece)
        del now[: len(now) > 1]
    writer.end()
    return file.getvalue()


@pytest.mark.parametrize("width", [8, 20, 80])
def test_words_are_not_broken_at_the_edge(width):
    text = (
        "The quick brown fox jumps over\n    indented code\n\nand extraordinarily long words; 日本語のテキスト ends."
    )
    for size in (1, 3, len(text)):
        shown = written([text[i : i + size] for i in range(0, len(text), size)], width)
        assert max(cell_len(line) for line in shown.split("\n")) <= width
        assert "".join(shown.split()) == "".join(text.split())
        broken = [w for w in re.findall(r"[a-z]+", text) if len(w) <= width - 2 and w not in shown]
        assert broken == []


def test_an_answer_follows_the_terminal_when_it_is_resized():
    shown = written(["ten cells, ", "and then the terminal is half as wide"], 40, 20).split("\n")
    assert shown[0] == "ten cells, and then"
    assert max(map(cell_len, shown)) <= 20


def test_routing_that_did_not_change_is_said(capsys):
    layer = LayerChange("0", (2.0, 2.0), (1.5, 1.5), (), ())
    Screen(Output(), live=False).routing(RoutingChange(9, ("rerouting",), (layer,)))
    done = capsys.readouterr()
    assert "No token met another expert." in done.err
    assert "gained" not in done.out


@pytest.mark.parametrize("width", [80, 140])
def test_the_table_of_routing_breaks_between_experts_only(width):
    shifts = ((127, 0.62), (112, 0.32), (103, -0.3))
    layers = tuple(LayerChange(str(n), (8.0, 6.5), (2.57, 2.36), shifts, shifts) for n in range(3))
    output = Output()
    output.results.file, output.results.width = io.StringIO(), width
    Screen(output, live=False).routing(RoutingChange(50, ("rerouting",), layers))
    shown = output.results.file.getvalue()
    assert len(re.findall(r"(?<!\S)(127:\+62|112:\+32|103:-30)(?!\S)", shown)) == 18
    assert max(cell_len(line.rstrip()) for line in shown.split("\n")) <= width


def test_a_start_says_nothing_of_packages_that_are_only_installed(caplog):
    chatty, level = logging.getLogger("torchao"), logging.getLogger("torchao").level
    with models._quiet():
        chatty.warning("a CUDA library is missing")
        chatty.error("this matters")
    assert [record.message for record in caplog.records] == ["this matters"]
    assert chatty.level == level


def test_pictures_of_the_chat_load_nothing_and_keep_styles_over_lines(tmp_path):
    demo = runpy.run_path(str(ROOT / "demos" / "chat_pictures.py"))
    text = "\x1b[2mdim, and\nstill dim\x1b[0m\n\x1b[7m toolbar \x1b[0m"
    light, dark = (demo["picture"](text, 80, palette) for palette in ("light", "dark"))
    assert light != dark
    for svg in (light, dark):
        assert "font-face" not in svg
        assert "url(http" not in svg
        styles = [re.search(rf'class="(\S+)"[^>]*>{line}<', svg)[1] for line in ("dim,&#160;and", "still&#160;dim")]
        assert styles[0] == styles[1]
    command = [sys.executable, str(ROOT / "demos" / "chat_pictures.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, env={"PATH": ""}, capture_output=True, text=True, check=False)
    assert (done.returncode, list(tmp_path.iterdir())) == (0, [])
    assert "tmux, which is not installed here" in done.stderr


def test_a_model_cannot_drive_the_terminal():
    assert printable("a\x1b[31mb\x07\x9b2J\r\n\tc\rd\x7f") == "a␛[31mb␇\ufffd2J\n    c␍d␡"
    assert "\x1b" not in written(["\x1b[2J", "x\x1b"], 80)


def test_tokens_that_differ_are_marked():
    left, right = marked(("The", " cat", " sat", "."), ("The", " dog", " sat", "\n"), plain=True)
    assert left.plain == "The[- cat-] sat[-.-]"
    assert right.plain == "The{+ dog+} sat{+↵\n+}"
    left, right = marked(("The", " cat"), ("The", " dog"), plain=False)
    assert (left.plain, right.plain) == ("The cat", "The dog")
    assert [(left.plain[s.start : s.end], s.style) for s in left.spans] == [(" cat", "red underline")]


def test_the_footer_tells_cost_and_every_outcome():
    done = {
        "rerouting": {"outcome": "rolled back: held-back loss 1.0 -> 1.1", "loss_before": 1.0, "loss_after": 0.5},
        "scmoe": {"outcome": "applied"},
    }
    report = Report([SequenceReport(5, 3, done, 1.5, [1.5])], ["a"], [2], {"adapt": 120.0, "readapt": 30.0})
    answer = Answer("x", ("x",), 2.0, 0.25, 21, 5, 10.0, "length", report, 1.5, idle=("dynamic_k",))
    text = " · ".join(fact.plain for fact in footer(answer))
    assert text == (
        "21 tokens · 10.0 tokens/s · first token 250 ms · adaptation 150 ms · 1.50 experts/token · rerouting rolled "
        "back: held-back loss 1.0 -> 1.1 · scmoe applied · dynamic_k changes nothing with these options · cut off by "
        "max_new_tokens: /set max_new_tokens N"
    )
    for width in (40, 80, 140):
        found = lines(footer(answer), width)
        assert all(cell_len(line.plain) <= width for line in found)
        assert " ".join(line.plain for line in found).replace(" · ", " ").split() == text.replace(" · ", " ").split()


@pytest.mark.parametrize("width", [10, 40, 80, 140])
def test_the_toolbar_fits_in_one_line(chat, width):
    chat.handle("/on rerouting scmoe dynamic_k")
    text = "".join(part[1] for part in toolbar(chat, width))
    assert len(text) < width
    assert width < 80 or "rerouting, scmoe, dynamic_k" in text
    chat.engine.name = "/a/long/path/" * 20 + "model"
    assert width < 40 or [part[1] for part in toolbar(chat, width)][1] == "model"


def test_two_answers_and_help_fit_into_eighty_columns(chat, capsys):
    output = Output()
    output._results = Console(file=io.StringIO(), width=80, force_terminal=True, markup=False, highlight=False)
    screen = Screen(output, live=True)
    words = tuple(f" word{i}" for i in range(60))
    base = Answer("", words, 1.0, 0.5, 60, 5, 10.0, "end", experts=2.0)
    screen.difference(base, base, ["rerouting", "scmoe", "dynamic_k"])
    chat.screen = screen
    chat.handle("/help")
    chat.handle("/methods")
    text = output._results.file.getvalue()
    plain_text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert max(cell_len(line) for line in plain_text.splitlines()) <= 80
