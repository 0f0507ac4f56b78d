"""Every demo does what it says: what it prints is checked against the plain model, the public API or plain lines."""

import json
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import ttrouting as ttr
from demos import (
    c3po_own_data,
    chat_script,
    evaluate,
    scmoe_room,
    several_devices,
    vllm_requests,
    wrap_generate,
    write_strategy,
)
from oracles.plain_router import plain_routing
from ttrouting import vllm as ttv
from ttrouting.pocket.measure import complete
from ttrouting.pocket.skills import is_correct, parse_answer, sample

DEMOS = Path(__file__).parent.parent / "demos"
PAPERS = ("rerouting", "c3po", "scmoe", "dynamic_k", "expert_mask")


@pytest.fixture(scope="module")
def pocket():
    return ttr.load_pocket()


# --- the page ------------------------------------------------------------------------------------------


def test_the_page_lists_every_demo_with_its_own_command():
    page = (DEMOS / "README.md").read_text()
    own = [module.__name__.rpartition(".")[2] for module in (c3po_own_data, chat_script, evaluate, several_devices)]
    for name in [*own, "vllm_requests", "wrap_generate", "write_strategy"]:
        assert f"`python demos/{name}.py`" in page
        assert f"python demos/{name}.py" in (DEMOS / f"{name}.py").read_text()
    assert sorted(PAPERS) == sorted({f.stem for f in (DEMOS / "papers").glob("*.py")} - {"reproduce", "tiny"})
    for name in PAPERS:
        assert f"`python -m demos.papers.{name}`" in page
        assert f"python -m demos.papers.{name}" in (DEMOS / "papers" / f"{name}.py").read_text()


# --- the pocket model ----------------------------------------------------------------------------------


def test_scmoe_room_counts_what_generating_would():
    """Reading right answers with contrast by hand counts as many right as SCMoE generates."""
    n, beta = 8, 1.2
    model, tokenizer = ttr.load_pocket()
    expected = {}
    for weak in ("rank:2", "rank:4"):
        right = 0
        with ttr.adapt(model, ttr.SCMoE(beta=beta, weak=weak, judge_on=None), no_harm=False) as adapted:
            for ids, answers in scmoe_room.batches(tokenizer, "word", "letters", n):
                for row, answer in zip(ids, answers, strict=True):
                    out = adapted.generate(row[None, : answer.start], max_new_tokens=answer.stop - answer.start)
                    right += torch.equal(out[0, answer.start :], row[answer])
        expected[weak.replace(":", " ")] = right
    usual, changed = scmoe_room.count(model, tokenizer, scmoe_room.Weak(model), "word", "letters", n)
    assert usual > 0
    assert min(expected.values()) < usual
    for name, right in expected.items():
        everywhere = (name, beta, float("inf"))
        assert usual + changed[(*everywhere, True)] - changed[(*everywhere, False)] == right


def test_wrap_generate(pocket, capsys, monkeypatch):
    monkeypatch.setattr(wrap_generate, "QUESTIONS", 3)
    wrap_generate.main()
    out = capsys.readouterr().out
    asked, prompts = wrap_generate.questions()
    base = [parse_answer(text) for text in complete(*pocket, prompts)]
    rows = [re.split(r"\s{2,}", line) for line in out.splitlines() if line.startswith("REVERSE")]
    assert [row[:3] for row in rows] == [[q.question, q.answer, text] for q, text in zip(asked, base, strict=True)]
    for column, name in ((2, "base"), (3, "rerouted")):
        assert f"{name}: {sum(row[column] == row[1] for row in rows)} of 3 right" in out
    assert "as before, once it is closed: True" in out
    model, tokenizer = pocket
    alone = tokenizer(prompts[1], return_tensors="pt")
    with ttr.adapt(model, wrap_generate.STRATEGY, tokenizer=tokenizer) as adapted:
        (ids,) = adapted.generate(**alone, max_new_tokens=12, do_sample=False)
    assert rows[1][3] == parse_answer(tokenizer.decode(ids[alone["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.mark.slow
def test_chat_script(pocket):
    messages = [line for line in chat_script.LINES.splitlines() if not line.startswith("/")]
    first, second, third = chat_script.chat(chat_script.LINES)
    assert [one["message"] for one in (first, second, third)] == messages
    (plain,) = complete(*pocket, [f"Q: {messages[0]}\nA:"])
    assert first["answer"] == parse_answer(plain)
    assert first["report"]["sequences"] == []
    assert list(second["report"]["sequences"][0]["strategies"]) == ["rerouting"]
    assert list(third["report"]["sequences"][0]["strategies"]) == ["dynamic_k"]
    assert third["experts_per_token"] < second["experts_per_token"] == pocket[0].config.num_experts_per_tok


def test_evaluate(pocket, tmp_path):
    pytest.importorskip("lm_eval")
    found = evaluate.evaluate(tmp_path / "out", 8)
    one = found["tasks"][evaluate.TASK]
    asked = sample("reverse", "letters", "test", 8)
    texts = complete(*pocket, [f"{question.prompt} " for question in asked])
    right = [is_correct(text, question) for text, question in zip(texts, asked, strict=True)]
    assert one["base"]["mean"] == pytest.approx(sum(right) / 8)
    assert list(one["variants"]) == [variant.name for variant in evaluate.VARIANTS]
    thin = one["variants"]["task_delta, fewer experts"]["cost"]["experts_per_token"]
    assert thin < one["variants"]["task_delta"]["cost"]["experts_per_token"]


def test_c3po_own_data(pocket, tmp_path, capsys):
    file = tmp_path / "mine.jsonl"
    c3po_own_data.write_records(file)
    records = [json.loads(line) for line in file.read_text().splitlines()]
    prompts = [f"Q: {record['question']}\nA: " for record in records]
    texts = complete(*pocket, prompts)
    right = sum(text.startswith(f"{record['answer']}\n") for text, record in zip(texts, records, strict=True))
    c3po_own_data.main()
    out = capsys.readouterr().out
    assert f"reference set: {len(records)} records, {right} that the model answers itself" in out
    base, adapted = (int(n) for n in re.findall(r"(?:base|c3po): (\d+) of 12 right", out))
    questions = sample("reverse", "letters", "test", 12)
    texts = complete(*pocket, [f"{question.prompt} " for question in questions])
    assert base == sum(is_correct(text, question) for text, question in zip(texts, questions, strict=True))
    assert adapted > base


def test_several_devices(capsys, monkeypatch):
    several_devices.main()
    out = capsys.readouterr().out
    assert "the same answers as in one place: True" in out
    assert re.search(r"of what was learned: (0|\de-\d\d)$", out.strip())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    places = several_devices.device_map(8)
    assert [places[f"model.layers.{i}"] for i in range(8)] == [0, 0, 0, 1, 1, 1, 2, 2]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert set(several_devices.device_map(8).values()) == {0, "cpu", "disk"}


# --- a strategy of one's own ---------------------------------------------------------------------------


def by_hand(model, ids, steps, strength):
    """Greedy decoding that counts the chosen experts itself, and takes their shares off the next token's logits."""
    used = torch.zeros(4, 8)  # layers, experts of the tiny model
    text, new, cache = ids, ids, None
    for _ in range(steps):
        share = 3 * used / used.sum(-1, keepdim=True).clamp_min(1)
        with torch.no_grad(), plain_routing(model, delta=-strength * share) as seen:
            out = model(input_ids=new, past_key_values=cache, use_cache=True)
        for layer, (_, scores) in enumerate(seen):
            used[layer] += scores.topk(3).indices.flatten().bincount(minlength=8)
        new, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        text = torch.cat([text, new], 1)
    return text


def test_write_strategy_is_its_formula(olmoe, prompts):
    ids = prompts(14, 9)
    options = {"attention_mask": (ids != 0).long(), "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    with ttr.adapt(olmoe, write_strategy.SpreadLoad(4.0)) as adapted:
        found = adapted.generate(ids, **options)
    plain = olmoe.generate(ids, **options)
    for row, length in zip(range(2), (14, 9), strict=True):
        assert torch.equal(found[row, 14 - length :], by_hand(olmoe, ids[row : row + 1, 14 - length :], 10, 4.0)[0])
    assert not torch.equal(found, plain), "the strategy changed nothing: the test cannot tell"
    with ttr.adapt(olmoe, write_strategy.SpreadLoad(0.0)) as adapted:
        assert torch.equal(adapted.generate(ids, **options), plain)
    with pytest.raises(ttr.ConfigError, match="strength"):
        write_strategy.SpreadLoad(-1.0)


def test_write_strategy_as_a_package(tmp_path, monkeypatch):
    group = re.search(r'\[project.entry-points."(.*)"\]\n\s*(\w+) = "my_package:(\w+)"', write_strategy.__doc__)
    about = tmp_path / "my_package-0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my_package\nVersion: 0.1\n")
    (about / "entry_points.txt").write_text(f"[{group[1]}]\n{group[2]} = my_package:{group[3]}\n")
    (tmp_path / "my_package.py").write_text((DEMOS / "write_strategy.py").read_text())
    monkeypatch.syspath_prepend(tmp_path)
    assert ttr.get_strategy("spread_load").summary == write_strategy.SpreadLoad.summary
    assert "spread_load" in {info.name for info in ttr.list_strategies()}


def test_write_strategy_says_how_far_it_spreads(capsys):
    write_strategy.main()
    low, _, high = (int(n) for n in re.findall(r"has (\d+)%", capsys.readouterr().out))
    assert high < low


# --- vLLM ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("vllm.sampling_params") is not None, reason="vLLM is installed here")
def test_vllm_requests_says_why_it_does_nothing():
    """In a process of its own: beside the tests there is a folder of that name."""
    command = [sys.executable, str(DEMOS / "vllm_requests.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "Skipped: vLLM is not installed here; see docs/vllm.md, or give --server URL."
    ]


class Echo(BaseHTTPRequestHandler):
    """A server in OpenAI's protocol that answers with what the request carries for ttrouting."""

    def do_GET(self):
        self.say({"data": [{"id": "pocket"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.say({"choices": [{"text": body.get("vllm_xargs", {}).get("ttrouting", body["prompt"])}]})

    def say(self, found):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(found).encode())

    def log_message(self, *_):
        pass


def test_vllm_requests_over_http():
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        found = vllm_requests.over_http(f"http://127.0.0.1:{server.server_address[1]}")
        server.shutdown()
        thread.join()
    assert found.pop("untouched") == vllm_requests.PROMPT
    for name, text in found.items():
        assert json.loads(text) == ttv.spec(vllm_requests.REQUESTS[name])


# --- papers --------------------------------------------------------------------------------------------

SETTINGS = [(name, model) for name in PAPERS for model in import_module(f"demos.papers.{name}").PAPER.models]


@pytest.mark.parametrize(("name", "model"), SETTINGS)
def test_paper(name, model, capsys, monkeypatch, tmp_path):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    paper = import_module(f"demos.papers.{name}").PAPER
    out = tmp_path / "out"
    paper.main(None, ["--tiny", "--confirm-run-unsafe-code", "--limit", "2", "--model", model, "--out", str(out)])
    told = capsys.readouterr().out
    found = json.loads((out / "comparison.json").read_text())
    (task,) = found["tasks"]
    assert task == paper.tasks[0]
    assert f"model {model} (its architecture, tiny, with random weights)" in told
    for variant, cell in found["tasks"][task]["variants"].items():
        assert cell["n"] == 2
        assert cell["failed"] == 0
        said = paper.published.get((model, task, variant), "no number is known here")
        place = told.index(f"{task}, {variant}\n    published  {said}\n    measured")
        low, high = (100 * end for end in cell["difference_interval"])
        assert f"[{low:+.1f}, {high:+.1f}], n 2: cannot tell" in told[place:]
    assert not [key for key in paper.published if key[0] not in paper.models or key[1] not in paper.tasks]
    assert not found["run"]["no_harm"], "no paper has this rule"


def test_papers_tell_what_is_missing(capsys):
    pytest.importorskip("lm_eval")
    with pytest.raises(SystemExit):
        import_module("demos.papers.scmoe").PAPER.main(None, ["--tiny", "--tasks", "strategyqa"])
    assert "strategyqa" in capsys.readouterr().err
