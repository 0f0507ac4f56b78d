"""The child process of `ttrouting.vllm.load`: how long does one engine take for a load of requests?"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch

SPREAD = 0.1  # standard deviation of the random delta


def serve(start: Mapping[str, Any]) -> None:
    """Start an engine, then answer each line of stdin, one load, by a line of what it took.

    Args:
        start: `model`, `options` of `vllm.LLM`, `plugin`: whether it is on, `spec`: of adapted requests, None for a
            random delta. A load has `requests`, how many of them are `adapted`, tokens of each `prompt`, `new_tokens`
            and the `seed` of the prompts.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from ttrouting.vllm import config
    from vllm import LLM

    additional = {"additional_config": config()} if start["plugin"] else {}
    llm = LLM(
        start["model"], skip_tokenizer_init=True, enable_prefix_caching=False, **{**additional, **start["options"]}
    )
    extra = {"ttrouting": start["spec"] or random_delta(llm)} if start["plugin"] else None
    print(json.dumps({"ready": True}), flush=True)
    for number, line in enumerate(sys.stdin):
        print(json.dumps(run(llm, number, extra, **json.loads(line))), flush=True)


def random_delta(llm: Any) -> dict[str, Any]:
    """A spec: small numbers for each expert of each layer."""
    from ttrouting.strategies.static_routing import StaticRouting
    from ttrouting.vllm import spec
    from ttrouting.vllm.spec import Facts

    facts = Facts.from_dict(llm.collective_rpc("ttrouting_facts")[0])
    generator = torch.Generator().manual_seed(0)
    return spec(StaticRouting(delta=SPREAD * torch.randn(facts.layers, facts.experts, generator=generator)))


def run(
    llm: Any,
    number: int,
    extra: dict[str, Any] | None,
    requests: int,
    adapted: int,
    prompt: int,
    new_tokens: int,
    seed: int,
) -> dict[str, float]:
    """Send all requests at once, the first `adapted` of them with `extra`, and wait for the last token."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    generator = torch.Generator().manual_seed(seed)
    vocabulary = engine.model_config.get_vocab_size()
    texts = torch.randint(3, vocabulary, (requests, prompt), generator=generator).tolist()
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    tokens = 0
    begin = time.perf_counter()
    for i, text in enumerate(texts):
        params = SamplingParams(
            temperature=0,
            max_tokens=new_tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args=extra if i < adapted else None,
        )
        given: Any = {"prompt_token_ids": text}
        engine.add_request(f"{number}-{i}", given, params)
    while engine.has_unfinished_requests():
        for out in engine.step():
            now = time.perf_counter() - begin
            first.setdefault(out.request_id, now)
            last[out.request_id] = now
            tokens += len(out.outputs[0].token_ids) if out.finished else 0
    took = time.perf_counter() - begin
    later = max(1, new_tokens - 1)
    return {
        "tokens_per_second": tokens / took,
        "first_token_ms": 1000 * statistics.median(first.values()),
        "next_token_ms": 1000 * statistics.median((last[one] - first[one]) / later for one in last),
    }


if __name__ == "__main__":
    serve(json.loads(sys.stdin.readline()))
