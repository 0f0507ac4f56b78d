"""The same in other layouts: in half precision, with drafted tokens, over two processes; or refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import all_equal, deltas, engine, expected, one_of_each, prompts, put_away, sampling, write

pytest.importorskip("vllm.sampling_params", reason="vLLM is not installed here: make test-vllm")

from vllm.exceptions import VLLMValidationError

import ttrouting as ttr
from ttrouting import vllm as ttv
from ttrouting.errors import CoverageError, UnsupportedModelError
from ttrouting.vllm.attach import check_engine, moe_runners


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes(olmoe: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = olmoe
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    llm = engine(folder, tensor_parallel_size=2)
    all_equal(model, llm, one_of_each(model))
    reports = llm.collective_rpc("ttrouting_report")
    assert len(reports) == 2
    assert reports[0]["totals"] == reports[1]["totals"]
    put_away(llm)


def test_drafted_tokens(olmoe: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = olmoe
    # what vLLM imports for drafts keeps a second engine of the same process from starting
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    drafts = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    llm = engine(folder, speculative_config=drafts)
    all_equal(model, llm, one_of_each(model)[:-1])
    with pytest.raises(VLLMValidationError, match="speculative decoding"):
        write(llm, prompts(5), [sampling(ttv.spec(ttr.SCMoE()))])
    put_away(llm)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_requests_keep_their_bits(olmoe: tuple[Any, Path], dtype: str) -> None:
    model, folder = olmoe
    texts = prompts(7, 20, 33, 12)
    (delta,) = deltas(model, 1)

    def run(llm: Any, adapted: bool) -> list[Any]:
        plain = sampling(logprobs=5)
        own = sampling(ttv.spec([ttr.StaticRouting(delta=delta), ttr.DynamicK(p=0.5)])) if adapted else sampling()
        asked: Any = [{"prompt_token_ids": text} for text in texts]
        outs = llm.generate(asked, [own, plain, own, plain], use_tqdm=False)
        outs = [outs[1].outputs[0], outs[3].outputs[0]]
        return [[{t: p.logprob for t, p in step.items()} for step in out.logprobs] for out in outs]

    llm = engine(folder, dtype=dtype, additional_config={}, enable_prefix_caching=False)
    without = run(llm, adapted=False)
    with pytest.raises(VLLMValidationError, match="started without ttrouting"):
        run(llm, adapted=True)
    put_away(llm)
    llm = engine(folder, dtype=dtype, enable_prefix_caching=False)
    assert run(llm, adapted=False) == without
    assert run(llm, adapted=True) == without
    put_away(llm)


def test_parts_that_the_engine_was_not_started_with(olmoe: tuple[Any, Path]) -> None:
    _, folder = olmoe
    llm = engine(folder, additional_config=ttv.config(parts=("delta",)))
    with pytest.raises(VLLMValidationError, match="started without 'scmoe'"):
        write(llm, prompts(5), [sampling(ttv.spec(ttr.SCMoE()))])
    put_away(llm)


def test_a_bypassed_router_ends_the_engine(olmoe: tuple[Any, Path]) -> None:
    model, folder = olmoe
    llm = engine(folder)
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    router = next(iter(moe_runners(runner.vllm_config).values())).router
    del router._compute_routing  # as a kernel would that routes by itself
    (delta,) = deltas(model, 1)
    assert write(llm, prompts(5), [sampling()]) == [expected(model, prompts(5)[0])]
    with pytest.raises(CoverageError, match="bypassed"):
        write(llm, prompts(5), [sampling(ttv.spec(ttr.StaticRouting(delta=delta)))])
    put_away(llm)


def test_an_artefact_of_another_model_stops_the_start(olmoe: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = olmoe
    ttr.save(tmp_path / "other", ttr.StaticRouting(delta=torch.zeros(4, 8), fingerprint="0" * 64))
    with pytest.raises(ttr.ConfigError, match="made for another model"):
        engine(folder, additional_config=ttv.config(artefacts={"other": tmp_path / "other"}))


@pytest.mark.parametrize(
    "layout",
    [
        {"pipeline_parallel_size": 2},
        {"data_parallel_size": 2},
        {"enable_expert_parallel": True},
        {"enable_eplb": True},
        {"enable_dbo": True},
    ],
)
def test_layouts_that_were_not_tried_are_refused_at_the_start(layout: dict[str, Any]) -> None:
    plain = {"pipeline_parallel_size": 1, "data_parallel_size": 1, "enable_expert_parallel": False}
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(**{**plain, **layout}), model_config=SimpleNamespace(runner_type="generate")
    )
    with pytest.raises(UnsupportedModelError, match="--"):
        check_engine(config)
    config.parallel_config = SimpleNamespace(**plain)
    check_engine(config)
