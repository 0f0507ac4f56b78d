"""Behind the OpenAI-compatible server, with the `openai` package as the client, in processes of their own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engines  # noqa: F401 - sets the environment
import pytest
import torch

pytest.importorskip("vllm.sampling_params", reason="vLLM is not installed here: make test-vllm")

import ttrouting as ttr
from ttrouting import vllm as ttv
from ttrouting.pocket.skills import sample

openai = pytest.importorskip("openai", reason="the openai package is not installed here: make test-vllm")

PROMPTS = ["Q: 12+30\nA:", "Q: 7+8\nA:", "Q: capital of France?\nA:"]


@pytest.fixture(scope="module")
def pocket() -> Any:
    return ttr.load_pocket()


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    delta = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    return ttr.save(tmp_path_factory.mktemp("artefacts") / "poet", ttr.StaticRouting(delta=delta))


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, artefact: Path) -> Iterator[Any]:
    """A client of `ttrouting serve`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    run = [sys.executable, "-m", "ttrouting", "serve", "--artefact", f"poet={artefact}", "--port", str(port)]
    run += [
        "--refset",
        "pocket=pocket",
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-model-len",
        "256",
        "--max-num-seqs",
        "8",
    ]
    run += ["--block-size", "32", "--num-gpu-blocks-override", "100"]
    with log.open("w") as written:
        server = subprocess.Popen(run, stdout=written, stderr=subprocess.STDOUT, env=environment)
    try:
        wait(server, f"http://127.0.0.1:{port}/health", log)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
    finally:
        server.terminate()
        server.wait(60)


def wait(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    for _ in range(600):
        if server.poll() is not None:
            pytest.fail(f"The server has ended:\n{log.read_text()[-4000:]}")
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    pytest.fail(f"The server did not come up:\n{log.read_text()[-4000:]}")


def complete(client: Any, prompt: str, spec: str | None = None, **options: Any) -> Any:
    extra: dict[str, Any] = {"ignore_eos": True}
    if spec is not None:
        extra["vllm_xargs"] = {"ttrouting": spec}
    settings = {"max_tokens": 16, "temperature": 0, **options}
    return client.completions.create(model="pocket", prompt=prompt, extra_body=extra, **settings)


def wanted(pocket: Any, prompt: str, strategies: Any = (), tokens: int = 16) -> str:
    model, tokenizer = pocket
    inputs = tokenizer(prompt, return_tensors="pt")
    options = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None}
    length = inputs["input_ids"].shape[1]
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    if strategies:
        with ttr.adapt(model, strategies, tokenizer=tokenizer) as adapted:
            out = adapted.generate(**inputs, **options)
    else:
        out = model.generate(**inputs, **options)
    return str(tokenizer.decode(out[0, length:], skip_special_tokens=True))


def named(artefact: Path) -> list[Any]:
    return list(ttr.load(artefact))


def test_strategies_over_http(client: Any, pocket: Any, artefact: Path) -> None:
    for prompt in PROMPTS:
        assert complete(client, prompt).choices[0].text == wanted(pocket, prompt)
        for given, own in (
            (["poet"], named(artefact)),
            ([ttr.SCMoE(judge_on=None, beta=0.5)], [ttr.SCMoE(judge_on=None, beta=0.5)]),
            ([ttr.DynamicK(p=0.6), "poet"], [ttr.DynamicK(p=0.6), *named(artefact)]),
        ):
            found = complete(client, prompt, ttv.spec_json(given)).choices[0].text
            assert found == wanted(pocket, prompt, own)


def test_what_a_task_was_taught_over_http(client: Any, pocket: Any) -> None:
    prompts = [question.prompt for question in sample("reverse", "letters", "test", 4)]
    own = [complete(client, prompt, ttv.spec_json(ttr.TaskDelta())).choices[0].text for prompt in prompts]
    assert own == [wanted(pocket, prompt, [ttr.TaskDelta()]) for prompt in prompts]
    assert own != [wanted(pocket, prompt) for prompt in prompts]


def test_a_stream_shows_one_stream(client: Any, pocket: Any) -> None:
    own = [ttr.SCMoE(judge_on=None, beta=0.5)]
    parts = complete(client, PROMPTS[0], ttv.spec_json(own), stream=True)
    assert "".join(part.choices[0].text for part in parts) == wanted(pocket, PROMPTS[0], own)


def test_stop_strings_end_both_streams(client: Any, pocket: Any) -> None:
    own = [ttr.SCMoE(judge_on=None, beta=0.5)]
    whole = wanted(pocket, PROMPTS[0], own)
    stop = whole[3:5]
    found = complete(client, PROMPTS[0], ttv.spec_json(own), stop=[stop], max_tokens=200).choices[0]
    assert found.finish_reason == "stop"
    assert found.text == whole[: whole.index(stop)]


def test_a_client_that_leaves_frees_its_place(client: Any, pocket: Any) -> None:
    scmoe = ttr.SCMoE(judge_on=None, beta=0.5)
    own = ttv.spec_json(scmoe)
    for _ in range(12):  # more than run at a time
        stream = complete(client, PROMPTS[1], own, stream=True, max_tokens=200)
        next(iter(stream))
        stream.close()
    assert complete(client, PROMPTS[0], own).choices[0].text == wanted(pocket, PROMPTS[0], [scmoe])


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("{", "no JSON"),
        ('{"strategies": [{"strategy": "scmoes"}]}', "Did you mean 'scmoe'"),
        ('{"strategies": [{"strategy": "scmoe", "beta": -1}]}', "beta must be in"),
        ('{"strategies": [{"artefact": "poems"}]}', "Did you mean 'poet'"),
        ('{"strategies": [{"strategy": "c3po", "refset": "/etc"}]}', "No reference set"),
        ('{"strategies": [{"strategy": "static_routing", "delta": [[1.0]]}]}', "this model needs [6, 16]"),
    ],
)
def test_bad_specs_are_answered_with_400(client: Any, pocket: Any, spec: str, says: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, PROMPTS[0], spec)
    assert caught.value.status_code == 400
    assert says in str(caught.value)
    assert complete(client, PROMPTS[0]).choices[0].text == wanted(pocket, PROMPTS[0])


def test_beam_search_is_refused(client: Any) -> None:
    body = {"use_beam_search": True, "vllm_xargs": {"ttrouting": ttv.spec_json(ttr.SCMoE(judge_on=None))}}
    with pytest.raises(openai.BadRequestError, match="beam search"):
        client.completions.create(model="pocket", prompt="Q: 1+1\nA:", max_tokens=4, n=2, extra_body=body)
