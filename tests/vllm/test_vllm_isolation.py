"""Do requests of an engine leave each other alone: in chunks, preempted, in the prefix cache, when one is bad?"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from engines import deltas, expected, prompts, report, sampling, write

pytest.importorskip("vllm.sampling_params", reason="vLLM is not installed here: make test-vllm")

from vllm.exceptions import VLLMValidationError
from vllm.v1.core.sched.scheduler import Scheduler

import ttrouting as ttr
from ttrouting import vllm as ttv


def scheduler_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def test_chunks_and_preemption(tight: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, llm = tight
    preempted: list[str] = []
    original = Scheduler._preempt_request

    def noted(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.request_id)
        return original(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", noted)
    texts = prompts(1, 10, 37, 20, 28, 16)
    one, two = deltas(model, 2)
    own: list[Any] = [[ttr.SCMoE(judge_on=None, beta=0.7)]] * 6 + [[]] * 3 + [[ttr.StaticRouting(delta=one)]] * 3
    own += [[ttr.DynamicK(p=0.5), ttr.StaticRouting(delta=two)]] * 3
    asked = [texts[i % 6] for i in range(len(own))]
    params = [sampling(ttv.spec(given) if given else None, tokens=50) for given in own]
    wanted = [expected(model, text, given, tokens=50) for text, given in zip(asked, own, strict=True)]
    assert write(llm, asked, params) == wanted
    assert any("~weak" in one for one in preempted), "no pair was torn apart: the test is too easy"
    assert any("~weak" not in one for one in preempted)
    found = report(llm)
    assert found["free_slots"] == found["slots"]
    assert found["totals"]["put_off"] > 0
    assert scheduler_of(llm).ttrouting.partner == {}


def test_cached_prefixes_serve_equal_routings_only(olmoes: tuple[Any, Any]) -> None:
    model, llm = olmoes
    one, two = deltas(model, 2)
    text = prompts(100, seed=11)[0]
    own: list[Any] = [
        None,
        ttr.StaticRouting(delta=one),
        ttr.StaticRouting(delta=two),
        ttr.SCMoE(judge_on=None),
        ttr.DynamicK(p=0.5),
    ]
    for strategy in own:
        wanted = expected(model, text, [] if strategy is None else [strategy])
        for again in (False, True):
            params = sampling(None if strategy is None else ttv.spec(strategy))
            out = llm.generate([{"prompt_token_ids": text}], params, use_tqdm=False)[0]
            assert list(out.outputs[0].token_ids) == wanted
            # the strong stream of SCMoE is the model's own, and shares its cache
            cached = 96 if again or isinstance(strategy, ttr.SCMoE) else 0
            assert out.num_cached_tokens == cached


def test_equal_content_is_shared_and_another_salt_is_not(olmoes: tuple[Any, Any]) -> None:
    model, llm = olmoes
    text = prompts(100, seed=12)[0]
    (delta,) = deltas(model, 1, seed=5)
    found = []
    for spec, salt in (
        (ttv.spec(ttr.StaticRouting(delta=delta)), "a"),
        (ttv.spec_json(ttr.StaticRouting(delta=delta.clone())), "a"),
        (ttv.spec(ttr.StaticRouting(delta=delta)), "b"),
    ):
        asked: Any = [{"prompt_token_ids": text, "cache_salt": salt}]
        found.append(llm.generate(asked, sampling(spec), use_tqdm=False)[0].num_cached_tokens)
    assert found == [0, 96, 0]


BAD: dict[str, Any] = {
    "no object": 5,
    "no JSON": "{",
    "deep JSON": "[" * 100_000,
    "unknown key": {"strategies": [{"strategy": "scmoe"}], "path": "/etc/passwd"},
    "nothing": {"strategies": []},
    "text": {"strategies": "scmoe"},
    "unknown strategy": {"strategies": [{"strategy": "scmoes"}]},
    "no name": {"strategies": [{"strategy": 3}]},
    "unknown option": {"strategies": [{"strategy": "scmoe", "betta": 1}]},
    "out of range": {"strategies": [{"strategy": "scmoe", "beta": -1}]},
    "wrong type": {"strategies": [{"strategy": "scmoe", "beta": "1"}]},
    "NaN": '{"strategies": [{"strategy": "scmoe", "beta": NaN}]}',
    "random weak": {"strategies": [{"strategy": "scmoe", "weak": "random"}]},
    "high rank": {"strategies": [{"strategy": "scmoe", "weak": "rank:4"}]},
    "two of one": {"strategies": [{"strategy": "scmoe"}, {"strategy": "scmoe"}]},
    "unknown artefact": {"strategies": [{"artefact": "/etc"}]},
    "artefact with options": {"strategies": [{"artefact": "x", "beta": 1}]},
    "refset by path": {"strategies": [{"strategy": "c3po", "refset": "/etc"}]},
    "shape": {"strategies": [{"strategy": "static_routing", "delta": [[0.0] * 8] * 3}]},
    "ragged": {"strategies": [{"strategy": "static_routing", "delta": [[0.0], [0.0, 1.0]]}]},
    "infinite": '{"strategies": [{"strategy": "static_routing", "delta": [[Infinity]]}]}',
    "text in numbers": {"strategies": [{"strategy": "static_routing", "delta": [["x"] * 8] * 4}]},
    "mask of few": {"strategies": [{"strategy": "static_routing", "mask": [[True] * 2 + [False] * 6] * 4}]},
    "no mask": {"strategies": [{"strategy": "expert_mask"}]},
    "sensitivities": {"strategies": [{"strategy": "dynamic_k", "rule": "sensitivity", "sensitivity": [1.0]}]},
    "text sensitivities": {
        "strategies": [{"strategy": "dynamic_k", "rule": "sensitivity", "sensitivity": ["a"] * 4}]
    },
    "no_harm": {"strategies": [{"strategy": "scmoe"}], "no_harm": "yes"},
    "internal": {"spec": {}, "kinds": [], "weak": True},
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_spec_is_refused_and_harms_nobody(olmoes: tuple[Any, Any], name: str) -> None:
    _, llm = olmoes
    with pytest.raises(VLLMValidationError, match="ttrouting: "):
        write(llm, prompts(5), [sampling(BAD[name])])
    assert not llm.llm_engine.has_unfinished_requests()


def test_the_engine_lives_after_bad_specs(olmoes: tuple[Any, Any]) -> None:
    model, llm = olmoes
    text = prompts(9, seed=13)
    assert write(llm, text, [sampling()]) == [expected(model, text[0])]


def test_prompt_logprobs_are_refused_with_scmoe(olmoes: tuple[Any, Any]) -> None:
    _, llm = olmoes
    with pytest.raises(VLLMValidationError, match="prompt_logprobs"):
        write(llm, prompts(5), [sampling(ttv.spec(ttr.SCMoE(judge_on=None)), prompt_logprobs=1)])


def test_a_pair_that_never_fits_is_refused(tight: tuple[Any, Any]) -> None:
    _, llm = tight
    with pytest.raises(VLLMValidationError, match="two caches"):
        write(llm, prompts(150), [sampling(ttv.spec(ttr.SCMoE(judge_on=None)), tokens=5)])


def test_identity_settings_are_plain_requests(olmoes: tuple[Any, Any]) -> None:
    model, llm = olmoes
    text = prompts(9, seed=14)
    before = report(llm)["totals"]["requests"]
    assert write(llm, text, [sampling(ttv.spec([ttr.SCMoE(beta=0), ttr.DynamicK(p=1.0)]))]) == [
        expected(model, text[0])
    ]
    assert report(llm)["totals"]["requests"] == before


def test_several_answers_of_one_request(olmoes: tuple[Any, Any]) -> None:
    model, llm = olmoes
    text = prompts(9, seed=15)[0]
    wanted = expected(model, text, [ttr.SCMoE(judge_on=None, beta=0.7)])
    asked: Any = [{"prompt_token_ids": text}]
    # greedy takes n = 1 only: a temperature near 0 instead
    params = sampling(ttv.spec(ttr.SCMoE(judge_on=None, beta=0.7)), n=3, temperature=1e-4)
    out = llm.generate(asked, params, use_tqdm=False)[0]
    assert [list(one.token_ids) for one in out.outputs] == [wanted] * 3


def test_a_seed_gives_the_same_sample_alone_and_in_a_batch(olmoes: tuple[Any, Any]) -> None:
    _, llm = olmoes
    text = prompts(9, seed=16)
    one, two = (ttv.spec(ttr.SCMoE(judge_on=None, beta=beta)) for beta in (0.7, 0.5))
    params = sampling(one, temperature=1.0, seed=3)
    alone = write(llm, text, [params])
    beside = write(llm, [*prompts(4, 20, seed=17), *text], [sampling(two), sampling(), params])
    assert beside[2:] == alone
    other = write(llm, text, [sampling(one, temperature=1.0, seed=4)])
    assert other != alone


def test_logprobs_are_those_of_the_contrast(olmoes: tuple[Any, Any]) -> None:
    model, llm = olmoes
    text = prompts(14, seed=18)[0]
    strategy = ttr.SCMoE(judge_on=None, beta=0.5, alpha=1e-3)
    asked: Any = [{"prompt_token_ids": text}]
    out = llm.generate(asked, sampling(ttv.spec(strategy), tokens=1, logprobs=3), use_tqdm=False)[0].outputs[0]
    ids = torch.tensor([text])
    options: Any = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
    with ttr.adapt(model, [strategy]) as adapted:
        logits = adapted.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options).logits[0][0]
    best = logits.float().log_softmax(-1).topk(3)
    found = out.logprobs[0]
    assert sorted(found) == sorted(best.indices.tolist())
    for token, value in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        assert found[token].logprob == pytest.approx(value, abs=1e-3)


def test_only_one_stream_is_seen_and_stop_tokens_end_both(olmoes: tuple[Any, Any]) -> None:
    model, llm = olmoes
    text = prompts(14, seed=19)[0]
    wanted = expected(model, text, [ttr.SCMoE(judge_on=None, beta=0.7)])
    stop = wanted[5]
    params = sampling(ttv.spec(ttr.SCMoE(judge_on=None, beta=0.7)), stop_token_ids=[stop])
    asked: Any = [{"prompt_token_ids": text}]
    outs = llm.generate(asked, params, use_tqdm=False)
    assert len(outs) == 1
    assert list(outs[0].outputs[0].token_ids) == wanted[: wanted.index(stop) + 1]
    assert scheduler_of(llm).ttrouting.partner == {}
    assert scheduler_of(llm).requests == {}


def test_aborts_free_everything(olmoes: tuple[Any, Any]) -> None:
    model, llm = olmoes
    engine = llm.llm_engine
    (delta,) = deltas(model, 1)
    ids = []
    for number, given in enumerate([ttr.SCMoE(), ttr.StaticRouting(delta=delta), ttr.SCMoE(judge_on=None)]):
        asked: Any = {"prompt_token_ids": prompts(12, seed=20 + number)[0]}
        ids.append(engine.add_request(f"gone{number}", asked, sampling(ttv.spec(given), tokens=60)))
    engine.abort_request([ids[2]], internal=True)  # before it ever ran
    for _ in range(4):
        engine.step()
    engine.abort_request(ids[:2], internal=True)
    found = report(llm)
    assert found["free_slots"] == found["slots"]
    assert found["running"] == 0
    assert scheduler_of(llm).requests == {}
    assert not engine.has_unfinished_requests()


def test_thousands_of_short_requests_leave_every_slot_free(olmoes: tuple[Any, Any]) -> None:
    model, llm = olmoes
    draw = random.Random(0)
    given: list[Any] = [
        None,
        ttr.StaticRouting(delta=deltas(model, 1)[0]),
        ttr.DynamicK(p=0.5),
        ttr.SCMoE(judge_on=None),
        ttr.DynamicK(rule="relative"),
    ]
    texts = prompts(*(draw.randint(1, 12) for _ in range(2500)), seed=30)
    params = [sampling(s and ttv.spec(s), tokens=draw.randint(1, 4)) for s in draw.choices(given, k=len(texts))]
    before = report(llm)["totals"]
    out = write(llm, texts, params)
    assert [len(tokens) for tokens in out] == [p.max_tokens for p in params]
    found = report(llm)
    assert found["free_slots"] == found["slots"]
    twins = sum(1 for p in params if p.extra_args and "scmoe" in str(p.extra_args))
    adapted = sum(1 for p in params if p.extra_args)
    assert found["totals"]["requests"] - before["requests"] == adapted + twins
