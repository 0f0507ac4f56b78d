"""Structured outputs with SCMoE: a grammar acts on the contrasted distribution, and the weak stream follows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engines import engine

pytest.importorskip("vllm.sampling_params", reason="vLLM is not installed here: make test-vllm")

from vllm.sampling_params import StructuredOutputsParams

import ttrouting as ttr
from ttrouting import vllm as ttv
from ttrouting.pocket import POCKET_DIR
from vllm import SamplingParams

PROMPTS = ["Q: capital of France?\nA:", "Q: 12+30\nA:", "Q: reverse cat\nA:"]
DIGITS = 6
STRATEGIES: dict[str, Any] = {"scmoe": ttr.SCMoE(judge_on=None, beta=0.9), "dynamic_k": ttr.DynamicK(p=0.5)}


@pytest.fixture(scope="module")
def pocket() -> Iterator[tuple[Any, Any, Any]]:
    model, tokenizer = ttr.load_pocket()
    llm = engine(POCKET_DIR, skip_tokenizer_init=False)
    yield model, tokenizer, llm
    llm.llm_engine.engine_core.shutdown()


def digits(model: Any, tokenizer: Any, prompt: str, strategies: list[Any]) -> str:
    """What transformers writes where only digits may follow."""
    allowed = [tokenizer.convert_tokens_to_ids(d) for d in "0123456789"]
    inputs = tokenizer([prompt], return_tensors="pt")
    options = {"max_new_tokens": DIGITS, "do_sample": False, "prefix_allowed_tokens_fn": lambda *_: allowed}
    if not strategies:
        out = model.generate(**inputs, **options)
    else:
        with torch.no_grad(), ttr.adapt(model, strategies, tokenizer=tokenizer) as adapted:
            out = adapted.generate(**inputs, **options)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])


def sampling(strategies: list[Any], grammar: bool = True) -> Any:
    return SamplingParams(
        temperature=0,
        max_tokens=DIGITS,
        structured_outputs=StructuredOutputsParams(regex=f"[0-9]{{{DIGITS},9}}") if grammar else None,
        extra_args={"ttrouting": ttv.spec(strategies)} if strategies else None,
    )


@pytest.mark.parametrize("names", [("scmoe",), ("scmoe", "dynamic_k")], ids="+".join)
def test_a_grammar_acts_on_the_contrasted_distribution(pocket: tuple[Any, Any, Any], names: tuple[str, ...]) -> None:
    model, tokenizer, llm = pocket
    own = [STRATEGIES[name] for name in names]
    # side by side: with both, with a grammar alone, with the strategy alone
    asked = [*PROMPTS, PROMPTS[0], PROMPTS[0]]
    params = [*(sampling(own) for _ in PROMPTS), sampling([]), sampling(own, grammar=False)]
    texts = [out.outputs[0].text.strip() for out in llm.generate(asked, params, use_tqdm=False)]
    assert texts[:4] == [
        *(digits(model, tokenizer, p, own) for p in PROMPTS),
        digits(model, tokenizer, PROMPTS[0], []),
    ]
    assert all(re.fullmatch(f"[0-9]{{{DIGITS}}}", text) for text in texts[:4])
    assert not texts[4].isdigit(), "a grammar that changes nothing proves nothing"
    report = llm.collective_rpc("ttrouting_report")[0]
    assert report["totals"]["steps"] > 0
