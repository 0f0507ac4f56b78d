"""The chat as a real process: one message, lines from a pipe, a terminal with Ctrl-C, a running server."""

import json
import os
import pty
import re
import select
import subprocess
import sys
import termios
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import ttrouting as ttr
from families.build import build
from ttrouting.cli.chat.prompts import plain
from ttrouting.cli.chat.remote import RemoteEngine
from ttrouting.cli.chat.screen import Screen
from ttrouting.cli.chat.switches import Settings, Switches
from ttrouting.cli.chat.talk import Chat
from ttrouting.cli.output import Output
from ttrouting.pocket import POCKET_DIR
from ttrouting.registry import get_strategy

needs_pocket = pytest.mark.skipif(
    not (POCKET_DIR / "model.safetensors").is_file(), reason="the pocket model's weights are not in this checkout"
)
COMMAND = [sys.executable, "-m", "ttrouting", "chat"]


def process(*arguments, stdin=""):
    return subprocess.run(
        [*COMMAND, *arguments], input=stdin, capture_output=True, text=True, check=False, timeout=240
    )


# --- not a terminal -------------------------------------------------------------------------------------


@needs_pocket
@pytest.mark.slow
def test_one_message_and_its_json():
    done = process("-p", "12+30", "--adapt", "scmoe", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (turn,) = found["answers"]
    assert (turn["message"], turn["answer"], turn["ended"]) == ("12+30", "42", "end")
    assert turn["report"]["sequences"][0]["strategies"]["scmoe"]["outcome"].startswith("skipped: ")  # too short
    assert found["strategies"] == [ttr.SCMoE().to_dict()]
    assert "experts/token" in done.stderr


@needs_pocket
@pytest.mark.slow
def test_lines_from_a_pipe_are_messages_and_commands():
    done = process(stdin="12+30\n/on rerouting\n45+11\n/hlep\n\n/exit\n7+7\n")
    assert done.stdout == "42\n56\n"  # nothing after /exit
    assert "On: rerouting." in done.stderr
    assert "There is no command /hlep. Did you mean 'help'?" in done.stderr
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert done.returncode == 2  # a line was wrong


# --- a terminal -------------------------------------------------------------------------------------------


class Terminal:
    """A process on a pseudo-terminal of 80 columns; keys go in, the screen's text comes out."""

    def __init__(self, *arguments, **environment):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            kept = {**os.environ, "TERM": "xterm-256color", **environment}
            os.execve(sys.executable, [*COMMAND, *arguments], kept)
        termios.tcsetwinsize(self.fd, (24, 80))
        self.raw, self.at = "", 0

    def keys(self, text):
        os.write(self.fd, text.encode())

    def read(self):
        """What is there, False at the end. Whoever asks where the cursor is, as a toolbar does, is told."""
        try:
            data = os.read(self.fd, 65536)
        except OSError:
            return False
        for _ in range(data.count(b"\x1b[6n")):
            self.keys("\x1b[1;1R")
        self.raw += data.decode("utf-8", "replace")
        return bool(data)

    def until(self, pattern, seconds=200):
        """Read until the text without control sequences matches, from where the last match ended; gives the match."""
        deadline = time.monotonic() + seconds
        while not (found := re.compile(pattern).search(self.text(), self.at)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.text()[self.at :]!r}"
            if select.select([self.fd], [], [], 0.2)[0]:
                assert self.read(), f"it ended before {pattern!r}: {self.text()!r}"
        self.at = found.end()
        return found[0]

    def text(self):
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\x1b\][^\x07]*\x07", "", self.raw)

    def code(self):
        """Read to the end; the exit code."""
        while self.read():
            pass
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A random model that never ends by itself, with a chat template."""
    model = build("olmoe", max_position_embeddings=4096)
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


LINE = r"\n[^\n|]{60,}\r\n"  # a full line of an answer; the toolbar has bars in it


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_a_second_one_leaves(folder, tmp_path):
    options = ["--model", folder, "--max-new-tokens", "3000", "--temperature", "1"]
    terminal = Terminal(*options, XDG_STATE_HOME=str(tmp_path), NO_COLOR="1")
    terminal.until(r"nothing on \| adaptation: continue")
    terminal.keys("/on scm\t")
    terminal.until("oe")  # what was completed
    terminal.keys("\r")
    terminal.until(r"On: scmoe\.")
    terminal.until(r"\| 0 turns")
    terminal.keys("hello\r")
    terminal.until(LINE)
    terminal.keys("\x03")
    assert int(re.match(r"\d+", terminal.until(r"\d+ tokens ·[^·]*·[\s\S]*?stopped"))[0]) < 3000
    terminal.until(r"\| 1 turn")
    terminal.keys("half a line\x03")  # what was typed is dropped, the chat goes on
    terminal.keys("/hel\r")
    terminal.until(r"There is no command /hel\. Did you mean 'help'\?[\s\S]*?\| 1 turn")
    terminal.keys("first\x1b\rsecond\r")  # Alt-Enter: one message of two lines
    terminal.until("second")
    terminal.until(LINE)
    terminal.keys("\x03")
    terminal.until(r"stopped[\s\S]*?\| 2 turns")
    terminal.keys(f"/save {tmp_path}/talk.json\r")
    terminal.until(r"Written to[\s\S]*?\| 2 turns")
    terminal.keys("\x03")
    terminal.until(r"Ctrl-C again leaves[\s\S]*?\| 2 turns")  # the prompt is there again
    terminal.keys("\x03")
    assert terminal.code() == 0
    assert "Traceback" not in terminal.raw
    assert not re.search(r"\x1b\[[0-9;]*3[1-7]m", terminal.raw)  # NO_COLOR
    turns = json.loads((tmp_path / "talk.json").read_text())["turns"]
    assert [(t["user"], t["stopped"]) for t in turns] == [("hello", True), ("first\nsecond", True)]
    history = tmp_path / "ttrouting" / "chat_history"
    assert "+/on scmoe" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


# What a terminal sends for keys that send no line: function and cursor keys, control and alt with letters, a mouse.
KEYS = [
    *(f"\x1b{code}" for code in ("OP", "[15~", "[A", "[B", "[C", "[D", "[H", "[F", "[5~", "[6~", "[3~", "[2~", "[Z")),
    *(f"\x1b[1;5{way}" for way in "ABCD"),
    *(chr(ord(letter) - 64) for letter in "ABEFGHKLNPQSTUWXY]_"),
    *(f"\x1b{letter}" for letter in "bcdfltuwy<>.-?"),
    "\x12nothing\x07",  # a search in the history, given up
    "\x1b[M !!",
    "\t\t",
    "\x1b",
]
BAD = ["/", "/foo", "/set", "/set nonsense", "/set scmoe.beta abc", "/set scmoe.no 3", "/on a b"]


@pytest.mark.slow
def test_no_key_and_no_bad_command_gives_a_traceback(folder, tmp_path):
    options = ["--model", folder, "--max-new-tokens", "3000", "--temperature", "1"]
    terminal = Terminal(*options, XDG_STATE_HOME=str(tmp_path), NO_COLOR="1")
    terminal.until(r"nothing on \| adaptation: continue")
    for key in KEYS:
        terminal.keys(f"a{key}")
    time.sleep(1)  # an escape alone is one after half a second
    terminal.keys("\x07\x05\x15")  # give up, to the end, drop the line
    for line in BAD:
        terminal.keys(f"{line}\r")
        terminal.until(r"! [\s\S]*?\| 0 turns")
    terminal.keys("\r\r  \r")  # empty lines are nothing
    terminal.keys("\x1b[200~one\ntwo\tthree\n\x1b[201~")  # pasted: nothing is sent yet
    terminal.until("three")
    terminal.keys("\r")
    terminal.until(LINE)
    for columns in (140, 30, 80):  # while an answer is written
        termios.tcsetwinsize(terminal.fd, (24, columns))
        terminal.until(r"\n")
    terminal.keys("\x03")
    terminal.until(r"stopped[\s\S]*?\| 1 turn")
    terminal.keys(f"/save {tmp_path}/talk.json\r")
    terminal.until(r"Written to[\s\S]*?\| 1 turn")
    terminal.keys("\x04")
    assert terminal.code() == 0
    assert "Traceback" not in terminal.raw
    (turn,) = json.loads((tmp_path / "talk.json").read_text())["turns"]
    assert turn["user"].split() == ["one", "two", "three"]


# --- a server ---------------------------------------------------------------------------------------------


class Service(BaseHTTPRequestHandler):
    """`/v1/models`, `/v1/chat/completions` and `/v1/completions`, streamed, by a real model."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.reply({"data": [{"id": "tiny", "max_model_len": 256}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append((self.path, body))
        if body.get("vllm_xargs") and self.server.refuses:
            self.reply({"message": "no slot is left for this delta"}, 400)
        elif self.path == "/v1/chat/completions" and not self.server.templated:
            self.reply({"message": "you must provide a chat template if the tokenizer does not define one"}, 400)
        else:
            self.stream(body)

    def reply(self, content, status=200):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def stream(self, body):
        text = self.server.answer(body)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        chat = "messages" in body
        for i, piece in enumerate(text):
            said = {"delta": {"content": piece}} if chat else {"text": piece}
            self.event({"choices": [{**said, "finish_reason": "length" if i == len(text) - 1 else None}]})
            if self.server.breaks:
                return
        self.event({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": len(text)}})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, content):
        self.wfile.write(f": ping\n\ndata: {json.dumps(content)}\n\n".encode())
        self.wfile.flush()


def oracle(model, tokenizer, body):
    """What this model writes in this process."""
    spec = json.loads(body.get("vllm_xargs", {}).get("ttrouting", '{"strategies": [], "no_harm": true}'))
    strategies = [get_strategy(one["strategy"]).from_dict(one) for one in spec["strategies"]]
    if "messages" in body:
        text = tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
    else:
        text = body["prompt"]
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with ttr.adapt(model, strategies, no_harm=spec["no_harm"], tokenizer=tokenizer) as adapted:
        out = adapted.generate(ids, max_new_tokens=body["max_tokens"], do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.fixture
def server(olmoe, tokenizer):
    service = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    service.bodies, service.refuses, service.breaks, service.templated = [], False, False, True
    service.answer = lambda body: oracle(olmoe, tokenizer, body)
    thread = threading.Thread(target=service.serve_forever, daemon=True)
    thread.start()
    yield service
    service.shutdown()
    service.server_close()
    thread.join()


def url(server):
    return f"http://127.0.0.1:{server.server_address[1]}"


@pytest.fixture
def remote(server):
    settings = Settings(max_new_tokens=12, adaptation="fresh")
    chat = Chat(RemoteEngine(url(server), "pocket"), Screen(Output(), live=False), settings, Switches())
    yield chat
    chat.engine.close()


def test_a_server_answers_what_the_model_answers(remote, server, capsys):
    for line in ("hello", "/set scmoe.alpha 0.0001", "/on scmoe", "you"):
        remote.handle(line)
    (first_path, first), (_, second) = server.bodies
    assert first_path == "/v1/chat/completions"
    assert [m["content"] for m in second["messages"]] == ["hello", remote.turns[0].answer, "you"]
    assert "vllm_xargs" not in first
    carried = json.loads(second["vllm_xargs"]["ttrouting"])
    assert carried == {"strategies": [ttr.SCMoE(alpha=0.0001).to_dict()], "no_harm": True}
    assert [t.answer for t in remote.turns] == [server.answer(body).strip() for body in (first, second)]
    err = capsys.readouterr().err
    assert "12 tokens" in err
    assert "first token" in err
    assert "experts/token" not in err  # a server does not tell
    remote.handle("/diff")
    assert [bool(b.get("vllm_xargs")) for _, b in server.bodies[2:]] == [False, True]
    remote.handle("/set adaptation continue")
    assert "A server keeps nothing between turns" in " ".join(capsys.readouterr().err.split())


def test_a_server_without_a_template_is_asked_in_lines(remote, server, capsys):
    server.templated = False
    remote.handle("hello")
    path, body = server.bodies[-1]
    assert (path, body["prompt"], body["stop"]) == ("/v1/completions", plain([], "hello"), ["\nQ:"])
    assert remote.turns[0].answer == server.answer(body).strip()
    assert "This model has no chat template" in capsys.readouterr().err


def test_what_a_server_refuses_is_told(remote, server, capsys):
    server.refuses = True
    remote.handle("/on scmoe")
    remote.handle("hello")
    assert "says 400" in (err := capsys.readouterr().err)
    assert "no slot is left for this delta" in err
    assert remote.turns == []
    server.refuses, server.breaks = False, True
    remote.handle("hello")
    assert "broke off in the middle" in capsys.readouterr().err
    assert remote.turns == []


@pytest.mark.slow
def test_the_flag_for_a_server(server):
    done = process("--server", url(server), "--max-new-tokens", "12", stdin="hello\n/status\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(server.answer(server.bodies[0][1]).strip() + "\n")
    assert "fresh (a server keeps nothing)" in done.stdout
    nobody = process("--server", "http://127.0.0.1:9", "-p", "hello")
    assert nobody.returncode == 1
    assert "does not answer" in nobody.stderr
    assert "Traceback" not in nobody.stderr
