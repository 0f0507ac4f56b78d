"""Evaluation against a server: a small OpenAI-compatible one with a real model, adapted as requests ask.

What comes back has to be what the same model gives in this process.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

import ttrouting as ttr
from ttrouting.registry import get_strategy

pytest.importorskip("lm_eval")

import toy_tasks
from eval_runs import evaluate, journal
from ttrouting.evaluation.files import prepare
from ttrouting.evaluation.question import Question, Variant, with_base
from ttrouting.evaluation.run import run
from ttrouting.evaluation.server import ServerLM
from ttrouting.server import ServerError

ROWS = [{"q": f"{a} is what{b}?", "a": "A", "choices": ["A", "BC", "D E"], "gold": i % 3}
        for i, (a, b) in enumerate(("ab", "ca", "df", "be", "fa"))]  # fmt: skip


class Service(BaseHTTPRequestHandler):
    """`/v1/models` and `/v1/completions`, the latter by plain forwards and by `generate`."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.reply({"data": [{"id": name} for name in self.server.names]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            if body.get("vllm_xargs") and self.server.refuses:
                self.reply({"message": "no slot is left for this delta"}, 400)
                return
            self.reply({"choices": [self.complete(body)]})

    def reply(self, content, status=200):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    @torch.no_grad()
    def complete(self, body):
        model, tokenizer = self.server.model, self.server.tokenizer
        ids = torch.tensor([body["prompt"]])
        spec = json.loads(body.get("vllm_xargs", {}).get("ttrouting", '{"strategies": [], "no_harm": true}'))
        strategies = [get_strategy(one["strategy"]).from_dict(one) for one in spec["strategies"]]
        with ttr.adapt(model, strategies, no_harm=spec["no_harm"], tokenizer=tokenizer) as adapted:
            if not body.get("echo"):
                out = adapted.generate(input_ids=ids, max_new_tokens=body["max_tokens"], do_sample=False)
                text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
                for stop in body["stop"]:
                    text = text.split(stop)[0] if stop else text
                return {"text": text}
            log_p = adapted(ids).logits[0].log_softmax(-1)
        own = [None, *(float(log_p[i, t]) for i, t in enumerate(body["prompt"][1:])), 0.0]
        best = [None, *({"best": float(row.max())} for row in log_p), {"best": 0.0}]
        return {"text": "", "logprobs": {"token_logprobs": own, "top_logprobs": best}}


@pytest.fixture
def server(olmoe, tokenizer):
    olmoe.generation_config.eos_token_id = 2
    service = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    service.model, service.tokenizer, service.lock = olmoe, tokenizer, threading.Lock()
    service.names, service.bodies, service.refuses = ["tiny"], [], False
    thread = threading.Thread(target=service.serve_forever, daemon=True)
    thread.start()
    yield service
    service.shutdown()
    service.server_close()
    thread.join()


def url(server, end="/v1"):
    return f"http://127.0.0.1:{server.server_address[1]}{end}"


@pytest.fixture
def folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def ask(server, folder, tasks, out, *strategies, **options):
    found = [Variant("+".join(s.name for s in group), tuple(group)) for group in strategies]
    question = Question(tuple(tasks), "test", batch_size=3, variants=tuple(with_base(found)), **options)
    prepare(out, False)
    lm = ServerLM(url(server), folder, question)
    return run(question, lm, tasks, out)


@pytest.mark.parametrize("kind", [toy_tasks.texts, toy_tasks.choices])
def test_a_server_gives_what_the_model_gives_here(server, folder, tokenizer, tmp_path, kind):
    strategy = [ttr.DynamicK(p=0.3)]
    finished = ask(server, folder, {"t": kind(ROWS, "t")}, tmp_path / "there", strategy)
    assert (finished.documents, finished.failed) == (10, 0)
    evaluate(tmp_path / "here", server.model, tokenizer, {"t": kind(ROWS, "t")}, strategy)
    changed = False
    for variant in ("base", "dynamic_k"):
        here, there = journal(tmp_path / "here", variant), journal(tmp_path / "there", variant)
        assert set(here) == set(there)
        for key, line in there.items():
            said, expected = line["responses"], here[key]["responses"]
            if kind is toy_tasks.choices:
                assert [r[0][0] for r in said] == pytest.approx([r[0][0] for r in expected], abs=1e-4)
                assert [r[0][1] for r in said] == [r[0][1] for r in expected]
            else:
                assert said == expected
            assert line["cost"] is None
            changed |= variant != "base" and said != journal(tmp_path / "there")[key]["responses"]
    assert changed, "the strategy changed nothing: the test cannot tell"
    carried = [json.loads(b["vllm_xargs"]["ttrouting"]) for b in server.bodies if "vllm_xargs" in b]
    assert len(carried) * 2 == len(server.bodies)
    assert all(one == {"strategies": [strategy[0].to_dict()], "no_harm": True} for one in carried)


def test_nothing_that_learns_scores_choices_there(server, folder, tmp_path):
    """The answer is part of the prompt that a server reads."""
    with pytest.raises(ttr.TTRoutingError, match="rerouting would read the answers"):
        ask(server, folder, {"t": toy_tasks.choices(ROWS * 2, "t")}, tmp_path / "a", [ttr.Rerouting(steps=1)])
    assert not any("vllm_xargs" in body for body in server.bodies)


def test_a_refusal_is_told_in_the_servers_words(server, folder, tmp_path):
    server.refuses = True
    with pytest.raises(ttr.TTRoutingError, match=r"says 400: .*no slot is left for this delta"):
        ask(server, folder, {"t": toy_tasks.texts(ROWS * 2, "t")}, tmp_path / "a", [ttr.DynamicK(p=0.3)])


def test_no_server_another_model_and_samples(server, folder):
    question = Question(("t",), "test")
    with pytest.raises(ServerError, match="does not answer"):
        ServerLM("http://127.0.0.1:9", folder, question)
    server.names = ["one", "two"]
    with pytest.raises(ServerError, match="serves one, two, not"):
        ServerLM(url(server, ""), folder, question)
    with pytest.raises(ttr.ConfigError, match="--samples"):
        ServerLM(url(server), folder, Question(("t",), "test", samples=4))
