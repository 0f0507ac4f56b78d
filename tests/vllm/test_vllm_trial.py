"""SCMoE's trial on the prompt: an engine contrasts the requests that transformers contrasts, and tells the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engines import engine, expected, prompts, put_away, report, sampling, write

pytest.importorskip("vllm.sampling_params", reason="vLLM is not installed here: make test-vllm")

from vllm.exceptions import VLLMValidationError

import ttrouting as ttr
from ttrouting import vllm as ttv
from ttrouting.pocket import POCKET_DIR
from ttrouting.pocket.skills import few_shot_prompt, sample

STRONG: dict[str, Any] = {"beta": 0.9, "alpha": 1e-3, "kl_limit": 1e3}
TOLD = ("judged_tokens", "turned_right", "turned_wrong")


@torch.no_grad()
def in_transformers(model: Any, ids: list[int], strategy: Any, tokenizer: Any = None) -> tuple[list[int], Any]:
    """What is written, and the report on the trial."""
    given = torch.tensor([ids])
    options = {"attention_mask": torch.ones_like(given), "max_new_tokens": 12, "do_sample": False}
    with ttr.adapt(model, strategy, tokenizer=tokenizer) as adapted:
        out = adapted.generate(given, **options, eos_token_id=None)[0, len(ids) :].tolist()
        return out, adapted.report.sequences[0].strategies["scmoe"]


def brief(facts: dict[str, Any]) -> tuple[Any, ...]:
    return facts["outcome"].split(":")[0], *(facts[name] for name in TOLD)


def texts_for(model: Any) -> list[list[int]]:
    """Random texts, one too short to judge by, and two that were written with contrast, so that it is right there."""
    beginnings = prompts(6, 9, seed=40)
    contrasted = ttr.SCMoE(judge_on=None, **STRONG)
    written = [one + expected(model, one, [contrasted], tokens=70) for one in beginnings]
    return [*prompts(40, 25, 12, seed=41), *written]


@pytest.mark.parametrize("kind", ["olmoes", "tight"])
def test_a_prompt_decides_whether_it_is_contrasted(request: pytest.FixtureRequest, kind: str) -> None:
    model, llm = request.getfixturevalue(kind)
    texts, strategy = texts_for(model), ttr.SCMoE(**STRONG)
    wanted = [in_transformers(model, text, strategy) for text in texts]
    plain = write(llm, texts, sampling())
    for _ in range(2):  # the second time every prompt stands in the cache of prefixes
        before = len(report(llm)["finished"])
        got = write(llm, [*texts, texts[0]], [*[sampling(ttv.spec(strategy))] * len(texts), sampling()])
        assert got == [*(out for out, _ in wanted), plain[0]]
        told = [one for one in report(llm)["finished"][before:] if "outcome" in one]
        assert sorted(map(brief, told)) == sorted(brief(facts) for _, facts in wanted)
    outcomes = [brief(facts)[0] for _, facts in wanted]
    assert outcomes[:3] == ["rolled back", "rolled back", "skipped"]
    assert outcomes[3:] == ["applied", "applied"]
    assert got[3:5] != plain[3:]


def test_without_the_rule_nothing_is_tried(olmoes: tuple[Any, Any]) -> None:
    model, llm = olmoes
    texts, strategy = prompts(30, 8, seed=42), ttr.SCMoE(**STRONG)
    wanted = [expected(model, text, [strategy], no_harm=False) for text in texts]
    assert write(llm, texts, sampling(ttv.spec(strategy, no_harm=False))) == wanted
    assert wanted != [expected(model, text) for text in texts]


def test_tokens_that_are_found_in_text(olmoes: tuple[Any, Any]) -> None:
    _, llm = olmoes
    with pytest.raises(VLLMValidationError, match="judge_on='A' looks at text"):
        write(llm, prompts(5), sampling(ttv.spec(ttr.SCMoE(judge_on="A"))))


def test_answers_of_solved_examples() -> None:
    model, tokenizer = ttr.load_pocket()
    llm = engine(POCKET_DIR, skip_tokenizer_init=False, max_model_len=512)
    solved = sample("word", "letters", "dev", 5)
    texts = [tokenizer(few_shot_prompt(solved, q))["input_ids"] for q in sample("word", "letters", "test", 4)]
    strategy = ttr.SCMoE(judge_on=r"A:(.*\n)", **STRONG)
    wanted = [in_transformers(model, text, strategy, tokenizer) for text in texts]
    assert write(llm, texts, sampling(ttv.spec(strategy))) == [out for out, _ in wanted]
    told = [one for one in report(llm)["finished"] if "outcome" in one]
    assert sorted(map(brief, told)) == sorted(brief(facts) for _, facts in wanted)
    assert 16 <= told[0]["judged_tokens"] < len(texts[0]) - 1
    put_away(llm)
