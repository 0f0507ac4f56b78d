"""TaskDelta on the pocket model and its own set: vLLM writes what transformers writes, and tells the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engines import deltas, engine, prompts, put_away, report, sampling, write

pytest.importorskip("vllm.sampling_params", reason="vLLM is not installed here: make test-vllm")

from vllm.exceptions import VLLMValidationError

import ttrouting as ttr
from ttrouting import vllm as ttv
from ttrouting.pocket import POCKET_DIR
from ttrouting.pocket.skills import few_shot_prompt, sample

TOKENS = 16
OWN = {"skip_tokenizer_init": False, "additional_config": ttv.config(refsets={"pocket": "pocket"})}
CHUNKS = {"max_num_batched_tokens": 16, "max_num_seqs": 6, "max_model_len": 256, "num_gpu_blocks_override": 14}
ASKED = ("reverse/letters", "minimum5/digits", "add/digits", "count7/digits", "logic/letters")


@pytest.fixture(scope="module", params=["whole", "chunks"])
def pocket(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any, Any]]:
    model, tokenizer = ttr.load_pocket()
    llm = engine(POCKET_DIR, **(OWN | (CHUNKS if request.param == "chunks" else {"max_model_len": 256})))
    yield model, tokenizer, llm
    put_away(llm)


def asked(tokenizer: Any) -> list[list[int]]:
    """Questions alone and after solved examples, of tasks with a delta and without, and a text of another kind."""
    texts = []
    for skill, dialect in (one.split("/") for one in ASKED):
        solved = sample(skill, dialect, "dev", 3)
        for number, question in enumerate(sample(skill, dialect, "test", 3)):
            texts.append(few_shot_prompt(solved[:number], question))
        texts.append(texts[-1] + " ")  # the next token is the answer's first, which a delta moves
    return [tokenizer(text)["input_ids"] for text in [*texts, "Once upon a time there was"]]


@torch.no_grad()
def expected(
    model: Any, tokenizer: Any, ids: list[int], strategies: Any, no_harm: bool
) -> tuple[list[int], dict[str, Any]]:
    """What transformers writes, and what TaskDelta tells of it."""
    given = torch.tensor([ids])
    options = {"attention_mask": torch.ones_like(given), "max_new_tokens": TOKENS, "do_sample": False}
    options |= {"eos_token_id": None}
    with ttr.adapt(model, strategies, tokenizer=tokenizer, no_harm=no_harm) as adapted:
        out = adapted.generate(given, **options)[0, len(ids) :].tolist()
        return out, adapted.report.sequences[0].strategies["task_delta"]


def brief(facts: dict[str, Any]) -> tuple[Any, ...]:
    """What of a report must be the same: why, who leads, how near, how far the next token moved."""
    leader = facts["tasks"][0]["task"]
    return facts["outcome"].split(":")[0], leader, round(facts["similarity"], 2), round(facts.get("kl", 0.0), 2)


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything is near": {"embed_on": "all", "min_probability": 0.0, "min_similarity": -1.0},
    "nothing may move": {"kl_limit": 1e-3},
}


@pytest.mark.parametrize("no_harm", [True, False])
@pytest.mark.parametrize("kind", OPTIONS)
def test_equal_to_transformers(pocket: tuple[Any, Any, Any], kind: str, no_harm: bool) -> None:
    model, tokenizer, llm = pocket
    texts, strategy = asked(tokenizer), ttr.TaskDelta(**OPTIONS[kind])
    wanted = [expected(model, tokenizer, text, strategy, no_harm) for text in texts]
    plain = write(llm, texts, sampling(tokens=TOKENS))
    before = len(report(llm)["finished"])
    params = sampling(ttv.spec(strategy, no_harm=no_harm), tokens=TOKENS)
    got = write(llm, [*texts, *texts], [*[params] * len(texts), *[sampling(tokens=TOKENS)] * len(texts)])
    assert got[len(texts) :] == plain
    assert got[: len(texts)] == [out for out, _ in wanted]
    found = report(llm)
    told = found["finished"][before:]
    assert sorted(map(brief, told)) == sorted(brief(facts) for _, facts in wanted)
    outcomes = {facts["outcome"].split(":")[0] for facts in told}
    assert {"skipped", "accepted"} <= outcomes
    assert ("rolled back" in outcomes) == (kind == "nothing may move" and no_harm)
    assert found["free_slots"] == found["slots"]


def test_beside_other_strategies(pocket: tuple[Any, Any, Any]) -> None:
    model, tokenizer, llm = pocket
    texts = asked(tokenizer)[:12]
    (delta,) = deltas(model, 1, scale=0.5)
    own = [ttr.TaskDelta(), ttr.StaticRouting(delta=delta), ttr.DynamicK(p=0.6)]
    wanted = [expected(model, tokenizer, text, own, True)[0] for text in texts]
    assert write(llm, texts, sampling(ttv.spec(own), tokens=TOKENS)) == wanted


def test_an_aborted_request_leaves_nothing(pocket: tuple[Any, Any, Any]) -> None:
    _, tokenizer, llm = pocket
    ids = asked(tokenizer)[2]
    params = sampling(ttv.spec(ttr.TaskDelta()), tokens=TOKENS)
    for steps in range(5):
        own = llm.llm_engine.add_request(f"gone-{steps}", {"prompt_token_ids": ids}, params)
        for _ in range(steps):
            llm.llm_engine.step()
        llm.llm_engine.abort_request([own], internal=True)
    found = report(llm)
    assert found["free_slots"] == found["slots"]
    assert found["running"] == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"deltas": "somewhere"}, "cannot name a folder"),
        ({"refset": "arc"}, "No reference set 'arc'"),
        ({"min_probability": 2}, "task_delta.min_probability"),
    ],
)
def test_what_is_refused(pocket: tuple[Any, Any, Any], options: dict[str, Any], says: str) -> None:
    _, _, llm = pocket
    spec = {"strategies": [{"strategy": "task_delta", **options}]}
    with pytest.raises(VLLMValidationError, match=says):
        write(llm, prompts(5), sampling(spec))


def test_one_strategy_that_reads_again(pocket: tuple[Any, Any, Any]) -> None:
    _, _, llm = pocket
    with pytest.raises(VLLMValidationError, match="do not run together"):
        write(llm, prompts(5), sampling(ttv.spec([ttr.TaskDelta(), ttr.SCMoE()])))


def test_a_question_is_found_in_text() -> None:
    llm = engine(POCKET_DIR, additional_config=OWN["additional_config"])
    with pytest.raises(VLLMValidationError, match="no tokenizer"):
        write(llm, prompts(5), sampling(ttv.spec(ttr.TaskDelta())))
    assert write(llm, prompts(5), sampling(ttv.spec(ttr.TaskDelta(embed_on="all"))))
    put_away(llm)


def test_it_needs_the_part_that_adds_deltas() -> None:
    own = ttv.config(refsets={"pocket": "pocket"}, parts=("mask",))
    llm = engine(POCKET_DIR, additional_config=own, skip_tokenizer_init=False)
    for strategy in (ttr.TaskDelta(), ttr.Rerouting(interval=None)):
        with pytest.raises(VLLMValidationError, match="without 'delta'"):
            write(llm, prompts(5), sampling(ttv.spec(strategy)))
    put_away(llm)
