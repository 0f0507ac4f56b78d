"""Which share of the experts does an engine choose that transformers chooses? Shown at the end of the suite.

Equal tokens could hide experts that differ, and in half precision tokens say little: there routers near a tie fall
the other way, in this engine and in transformers alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import AGREEMENT, deltas, engine, prompts, sampling, saved, write
from torch import Tensor

pytest.importorskip("vllm.sampling_params", reason="vLLM is not installed here: make test-vllm")

import ttrouting as ttr
from ttrouting import vllm as ttv
from ttrouting.vllm.attach import moe_runners

LENGTHS = (60, 45, 50)


@contextmanager
def routed(llm: Any) -> Iterator[list[list[Tensor]]]:
    """`[T, K]` chosen experts of each forward, a list for each layer, through vLLM's own callback."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    routers = [one.router for one in moe_runners(runner.vllm_config).values()]
    found: list[list[Tensor]] = [[] for _ in routers]
    for router, seen in zip(routers, found, strict=True):
        router.set_capture_fn(lambda ids, seen=seen: seen.append(ids.long().clone()))
    try:
        yield found
    finally:
        for router in routers:
            router.set_capture_fn(None)


def in_vllm(llm: Any, prompt: list[int], strategy: Any, tokens: int) -> Tensor:
    """`[T, L, K]` experts of the prompt and of what was written, but for its last token, which nothing reads."""
    with routed(llm) as found:
        write(llm, [prompt], [sampling(ttv.spec(strategy), tokens, skip_reading_prefix_cache=True)])
    return torch.stack([torch.cat(forwards) for forwards in found], 1)


def in_transformers(model: Any, prompt: list[int], strategy: Any, tokens: int) -> Tensor:
    ids = torch.tensor([prompt])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": tokens, "do_sample": False}
    with ttr.adapt(model, strategy) as adapted, adapted.tracing() as traces:
        adapted.generate(ids, **options)
    return traces[0].ids.long()


def agreement(model: Any, llm: Any, strategy: Any, tokens: int) -> float:
    """The share of transformers' experts, over tokens, layers and columns, that vLLM has chosen too."""
    same = total = 0
    for prompt in prompts(*LENGTHS, seed=11):
        ours, theirs = in_vllm(llm, prompt, strategy, tokens), in_transformers(model, prompt, strategy, tokens)
        assert ours.shape == theirs.shape
        same += int((theirs[..., None] == ours[..., None, :]).any(-1).sum())
        total += theirs.numel()
    return same / total


def strategies(model: Any) -> dict[str, Any]:
    return {
        "plain": ttr.StaticRouting(delta=torch.zeros_like(deltas(model, 1)[0])),
        "delta": ttr.StaticRouting(delta=deltas(model, 1)[0]),
    }


@pytest.mark.parametrize("kind", ["plain", "delta"])
def test_every_expert_is_the_same_in_fp32(both: tuple[Any, Any], kind: str, record_property: Any) -> None:
    model, llm = both
    share = agreement(model, llm, strategies(model)[kind], tokens=8)
    record_property(AGREEMENT, (f"{model.config.model_type}, float32, {kind}", share))
    assert share == 1


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
def test_nearly_all_are_in_bfloat16(family: str, tmp_path: Path, record_property: Any) -> None:
    model, folder = saved(family, tmp_path)
    model = model.to(torch.bfloat16)
    llm = engine(folder, dtype="bfloat16")
    for kind, strategy in strategies(model).items():
        share = agreement(model, llm, strategy, tokens=1)  # later tokens would follow other texts
        record_property(AGREEMENT, (f"{family}, bfloat16, {kind}", share))
        assert share > 0.97
    llm.llm_engine.engine_core.shutdown()
