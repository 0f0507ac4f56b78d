"""The same under vLLM's compiled layers: a graph holds what a strategy needs, whatever the request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engines import all_equal, engine, expected, one_of_each, prompts, put_away, report, sampling, write

pytest.importorskip("vllm.sampling_params", reason="vLLM is not installed here: make test-vllm")

import ttrouting as ttr
from ttrouting import refsets
from ttrouting import vllm as ttv
from ttrouting.vllm import learning


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled(olmoe: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = olmoe
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    llm = engine(folder, enforce_eager=False)
    all_equal(model, llm, one_of_each(model))
    found = report(llm)
    assert found["free_slots"] == found["slots"]
    put_away(llm)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_rereadings(
    olmoe: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    """C3PO reads the last prompt token again, rerouting the whole prompt many times: both under compiled layers."""
    model, folder = olmoe
    rows = [{"q": f"{a}+{b}", "a": str(a + b)} for a in range(10, 22) for b in (3, 5)]
    options: dict[str, Any] = {"embedder": "model", "prompt": "{q}", "answer": "{a}", "task": "t", "keep": "all"}
    path = refsets.build(model, tokenizer, rows, tmp_path / "sums", **options).path
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    descents: list[Any] = []
    original = learning.tell
    monkeypatch.setattr(learning, "tell", lambda request, one: (descents.append(one), original(request, one)))
    llm = engine(folder, enforce_eager=False, additional_config=ttv.config(refsets={"sums": path}))
    c3po = {"surrogate": "kernel_regression", "alpha": 0.1, "use": "all", "max_similarity": 1.0}
    texts = [tokenizer("17+8")["input_ids"], *prompts(33, 20)]
    own = [
        ttv.spec(ttr.C3PO(refset="sums", **c3po), no_harm=False),
        ttv.spec(ttr.Rerouting(interval=None, layers="all", steps=3, lr=0.3), no_harm=False),
        None,
    ]
    got = write(llm, texts, [sampling(spec) for spec in own])
    (descent,) = descents
    assert descent.delta.any()
    learned = ttr.StaticRouting(delta=descent.delta)
    assert got[0] == expected(model, texts[0], [ttr.C3PO(refset=str(path), **c3po)], no_harm=False)
    assert got[1:] == [expected(model, texts[1], [learned]), expected(model, texts[2])]
    assert all(one != expected(model, text) for one, text in zip(got[:2], texts[:2], strict=True))
    found = report(llm)
    assert found["free_slots"] == found["slots"]
    put_away(llm)
