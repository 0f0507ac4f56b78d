"""Does an engine write what transformers writes, request by request, whatever else is in its batch?

fp32 and greedy: every token is compared.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engines import deltas, expected, prompts, report, sampling, write

pytest.importorskip("vllm.sampling_params", reason="vLLM is not installed here: make test-vllm")

from vllm.exceptions import VLLMValidationError

import ttrouting as ttr
from ttrouting import vllm as ttv

RULES: dict[str, Any] = {
    "top_p": ttr.DynamicK(p=0.5),
    "relative": ttr.DynamicK(rule="relative", beta=0.7),
    "sensitivity": ttr.DynamicK(rule="sensitivity", threshold=0.03, sensitivity=(0.5, 1.0, 1.5, 1.0)),
    "entropy": ttr.DynamicK(rule="entropy", tau=0.7, p=0.4),
    "shannon": ttr.DynamicK(rule="entropy", tau=0.8, q=1.0, p=0.4, k_min=1),
    "gate": ttr.DynamicK(p=0.3, gate=0.4),
    "renormalised": ttr.DynamicK(p=0.5, renormalize="always"),
    "raw": ttr.DynamicK(p=0.5, renormalize="never"),
}


def layers_of(llm: Any) -> int:
    return int(llm.collective_rpc("ttrouting_facts")[0]["layers"])


def test_a_batch_of_different_deltas_and_plain_requests(both: tuple[Any, Any]) -> None:
    model, llm = both
    texts = prompts(7, 20, 33, 12, 40)
    own = [*(ttr.StaticRouting(delta=d) for d in deltas(model, 3)), None, None]
    params = [sampling(None if one is None else ttv.spec(one)) for one in own]
    wanted = [expected(model, text, [] if one is None else [one]) for text, one in zip(texts, own, strict=True)]
    assert write(llm, texts, params) == wanted
    plain = [expected(model, text) for text in texts[:3]]
    assert all(a != b for a, b in zip(wanted, plain, strict=False)), "deltas that change nothing prove nothing"


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_of_dynamic_k(both: tuple[Any, Any], rule: str) -> None:
    model, llm = both
    strategy = RULES[rule]
    if rule == "sensitivity":
        strategy = ttr.DynamicK(rule=rule, threshold=0.03, sensitivity=strategy.sensitivity[: layers_of(llm)])
    texts = prompts(9, 21, seed=2)
    wanted = [expected(model, texts[0], [strategy]), expected(model, texts[1])]
    assert write(llm, texts, [sampling(ttv.spec(strategy)), sampling()]) == wanted


def test_rules_side_by_side(both: tuple[Any, Any]) -> None:
    model, llm = both
    rules = [one for name, one in RULES.items() if name != "sensitivity"]
    texts = prompts(*range(6, 6 + len(rules)), seed=3)
    wanted = [expected(model, text, [one]) for text, one in zip(texts, rules, strict=True)]
    assert write(llm, texts, [sampling(ttv.spec(one)) for one in rules]) == wanted


@pytest.mark.parametrize("at", ["choice", "logits"])
def test_masks(both: tuple[Any, Any], at: str) -> None:
    model, llm = both
    shape = deltas(model, 1)[0].shape
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[:, ::2] = True  # four of eight experts stay, three are chosen
    texts = prompts(9, 21, seed=4)
    strategy = ttr.ExpertMask(mask=mask, at=at)
    if model.config.model_type == "deepseek_v3":
        with pytest.raises(VLLMValidationError, match="groups or a correction bias"):
            write(llm, texts, [sampling(ttv.spec(strategy)), sampling()])
        return
    wanted = [expected(model, texts[0], [strategy]), expected(model, texts[1])]
    assert write(llm, texts, [sampling(ttv.spec(strategy)), sampling()]) == wanted
    assert wanted[0] != expected(model, texts[0])


def test_strategies_compose(both: tuple[Any, Any]) -> None:
    model, llm = both
    delta = deltas(model, 1)[0]
    mask = torch.ones(delta.shape, dtype=torch.bool)
    mask[:, 1::4] = False
    if model.config.model_type == "deepseek_v3":
        mask = None  # refused, see above
    given = [ttr.StaticRouting(delta=delta, mask=mask), ttr.DynamicK(p=0.6)]
    text = prompts(25, seed=5)
    assert write(llm, text, [sampling(ttv.spec(given))]) == [expected(model, text[0], given)]


@pytest.mark.parametrize("weak", ["rank:1", "rank:2", "rank:3", "top:2"])
def test_scmoe(both: tuple[Any, Any], weak: str) -> None:
    model, llm = both
    strategy = ttr.SCMoE(judge_on=None, beta=0.7, weak=weak)
    texts = prompts(1, 9, 33, 14, seed=6)
    params = [sampling(ttv.spec(strategy))] * 3 + [sampling()]
    wanted = [*(expected(model, text, [strategy]) for text in texts[:3]), expected(model, texts[3])]
    assert write(llm, texts, params) == wanted


def test_scmoe_over_a_delta_and_dynamic_k(both: tuple[Any, Any]) -> None:
    model, llm = both
    given = [ttr.StaticRouting(delta=deltas(model, 1)[0]), ttr.DynamicK(p=0.6), ttr.SCMoE(judge_on=None, beta=0.5)]
    text = prompts(18, seed=7)
    assert write(llm, text, [sampling(ttv.spec(given))]) == [expected(model, text[0], given)]


def test_every_token_of_adapted_requests_was_counted(both: tuple[Any, Any]) -> None:
    model, llm = both
    report(llm)
    texts = prompts(11, 19, seed=8)
    params = [sampling(ttv.spec(ttr.StaticRouting(delta=deltas(model, 1)[0]))), sampling()]
    write(llm, texts, params)
    found = report(llm)
    assert found["finished"][-1]["tokens"] == 11 + 12 - 1  # the last token that is written is not read
    assert found["free_slots"] == found["slots"]


def test_the_fingerprint_is_that_of_transformers(both: tuple[Any, Any]) -> None:
    from ttrouting.target import Target

    model, llm = both
    assert llm.collective_rpc("ttrouting_facts")[0]["fingerprint"] == Target(model, ttr.find_sites(model)).fingerprint
