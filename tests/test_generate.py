"""`adapted.generate` and the adapted forward: the same arguments, returns and decoding modes as the model's own."""

import json
from threading import Thread

import pytest
import torch
from torch import nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
)

import ttrouting as ttr
from oracles.plain_router import full_logits, greedy, plain_routing

L, E = 4, 8  # layers and experts of the tiny OLMoE

# settings that change nothing; the last one is live: its taps run and add zero
NOTHING = {
    "none": list,
    "rerouting": lambda: ttr.Rerouting(steps=0),
    "scmoe": lambda: ttr.SCMoE(beta=0),
    "dynamic_k": lambda: ttr.DynamicK(p=1.0),
    "expert_mask": lambda: ttr.ExpertMask(mask=torch.ones(L, E, dtype=torch.bool)),
    "live": lambda: ttr.StaticRouting(delta=torch.zeros(L, E), mask=torch.ones(L, E, dtype=torch.bool)),
}


def random_delta(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def learned(adapted, ids):
    """Adapt to prompts, generate one token, give the deltas `[B, L, E]`."""
    adapted.generate(ids, max_new_tokens=1, do_sample=False)
    return adapted.state.tensors["rerouting"]["delta"]


# --- nothing changes where nothing is to change ------------------------------------------------------


@pytest.mark.parametrize("name", NOTHING)
def test_settings_that_change_nothing_leave_sampling_and_scores_bit_identical(olmoe, prompts, name):
    ids = prompts(9, 9)
    options = {"max_new_tokens": 8, "do_sample": True, "top_p": 0.9, "temperature": 1.3, "num_return_sequences": 2}
    options |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    torch.manual_seed(0)
    expected = olmoe.generate(ids, **options)
    with ttr.adapt(olmoe, NOTHING[name]()) as adapted:
        torch.manual_seed(0)
        got = adapted.generate(ids, **options)
        assert torch.equal(adapted(input_ids=ids).logits, olmoe(input_ids=ids).logits)
    assert type(got) is type(expected)
    assert torch.equal(got.sequences, expected.sequences)
    for mine, own in zip((*got.scores, *got.logits), (*expected.scores, *expected.logits), strict=True):
        assert torch.equal(mine, own)


def test_paused_calls_go_to_the_model_itself(olmoe, prompts, untouched):
    ids = prompts(12)
    seen = []
    with ttr.adapt(olmoe, ttr.StaticRouting(delta=3 * random_delta(L, E))) as adapted:
        olmoe.register_forward_pre_hook(lambda *_: seen.append("forward" in vars(olmoe)))
        edited = adapted.generate(ids, max_new_tokens=6, do_sample=False)
        with untouched(olmoe), adapted.paused():
            plain = adapted.generate(ids, max_new_tokens=6, do_sample=False)
            logits = adapted(input_ids=ids).logits
            assert adapted.report.sequences == []
        again = adapted.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(plain, olmoe.generate(ids, max_new_tokens=6, do_sample=False))
    assert torch.equal(logits, olmoe(input_ids=ids).logits)
    assert torch.equal(edited, again)
    assert not torch.equal(edited, plain)
    assert seen[:6] == [True] * 6, "the hook must tell a patched model from a plain one"
    assert not any(seen[6:13])


# --- the object --------------------------------------------------------------------------------------


def test_it_stands_for_the_model_and_is_no_module(olmoe):
    with ttr.adapt(olmoe, ["rerouting", "dynamic-k", "scmoe"]) as adapted:
        assert not isinstance(adapted, nn.Module)
        assert adapted.config is olmoe.config
        assert adapted.get_input_embeddings() is olmoe.get_input_embeddings()
        assert [s.name for s in adapted.strategies] == ["rerouting", "dynamic_k", "scmoe"]
        assert [(s.num_experts, s.top_k) for s in adapted.sites] == [(E, 3)] * L
        with pytest.raises(AttributeError):
            adapted.no_such_attribute  # noqa: B018


def test_strategies_may_be_one_name_or_one_instance(olmoe):
    for given in ("scmoe", ttr.SCMoE(), ["scmoe"], [ttr.SCMoE()]):
        with ttr.adapt(olmoe, given) as adapted:
            assert adapted.strategies == (ttr.SCMoE(),)


def test_the_report_prints_and_is_ready_for_json(olmoe, prompts):
    with ttr.adapt(olmoe, [ttr.Rerouting(), ttr.DynamicK(p=0.6), ttr.SCMoE(judge_on=None)]) as adapted:
        assert str(adapted.report) == "No adapted call yet."
        adapted.generate(prompts(30, 20), max_new_tokens=5, do_sample=False)
        report = adapted.report
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False)) == json.loads(report.to_json())
    assert [(s.prompt_tokens, s.new_tokens) for s in report.sequences] == [(30, 5), (20, 5)]
    for sequence in report.sequences:
        assert set(sequence.strategies) == {"rerouting", "dynamic_k", "scmoe"}
        assert 1 <= sequence.experts_per_token < 3
        assert sequence.strategies["scmoe"]["steps"] == 5
    assert set(report.milliseconds) == {"adapt", "generate", "total"}
    assert report.milliseconds["total"] >= report.milliseconds["adapt"] > 0
    text = str(report)
    assert all(word in text for word in ("rerouting", "dynamic_k", "scmoe", "experts/token"))


# --- a plain forward ---------------------------------------------------------------------------------


def test_a_forward_routes_and_never_optimises(olmoe64, prompts, monkeypatch):
    ids = prompts(30)
    with ttr.adapt(olmoe64, ttr.Rerouting(lr=0.5, layers="all"), no_harm=False) as adapted:
        delta = learned(adapted, ids)
        state = adapted.state
        monkeypatch.setattr(torch.autograd, "grad", None)
        with torch.no_grad():
            base, carried = adapted(input_ids=ids).logits, adapted(input_ids=ids, state=state).logits
            assert torch.equal(adapted.forward(input_ids=ids, state=state).logits, carried)
            assert torch.equal(base, olmoe64(input_ids=ids).logits)
            with plain_routing(olmoe64, delta):
                expected = full_logits(olmoe64, ids)
    assert torch.allclose(carried, expected, atol=1e-5)
    assert (carried - base).abs().max() > 1e-3


def test_a_forward_takes_what_the_model_takes(olmoe64, prompts):
    ids = prompts(12, 7)
    mask = (ids != 0).long()
    delta = random_delta(2, L, E)
    with torch.no_grad():
        with ttr.adapt(olmoe64, ttr.StaticRouting(delta=delta)) as adapted:
            out = adapted(ids, attention_mask=mask, labels=ids, output_hidden_states=True)
            reported = adapted(ids, attention_mask=mask, output_router_logits=True).router_logits[0]
        with plain_routing(olmoe64, delta):
            expected = olmoe64(ids, attention_mask=mask, labels=ids, output_hidden_states=True)
        with plain_routing(olmoe64, delta) as seen:
            olmoe64(ids, attention_mask=mask)
    assert torch.allclose(out.loss, expected.loss, atol=1e-5)
    assert torch.allclose(out.hidden_states[-1], expected.hidden_states[-1], atol=1e-5)
    # reported router logits are the model's own: the delta is ours
    edited = seen[0][0].view(2, 12, E)
    assert torch.allclose(reported.view(2, 12, E), edited - delta[:, None, 0], atol=1e-5)


# --- state -------------------------------------------------------------------------------------------


def test_a_second_call_goes_on_from_the_state_of_the_first(olmoe64, prompts):
    ids = prompts(30, 30)
    first = ttr.Rerouting(lr=2.0, interval=None, layers="all")
    with ttr.adapt(olmoe64, first, no_harm=False) as adapted:
        assert adapted.state.sequences is None
        turn = adapted.generate(ids, state=adapted.state, max_new_tokens=4, do_sample=False)
        state = adapted.state
    with ttr.adapt(olmoe64, ttr.Rerouting(lr=1e-12, interval=None), no_harm=False) as adapted:
        carried = adapted.generate(turn, state=state, max_new_tokens=6, do_sample=False)
        fresh = adapted.generate(turn, max_new_tokens=6, do_sample=False)
    expected = greedy(olmoe64, turn, 6, delta=state.tensors["rerouting"]["delta"])
    assert torch.equal(carried, expected)
    assert not torch.equal(fresh, carried)


def test_the_state_of_beams_has_a_row_for_each_returned_sequence(olmoe64, prompts):
    ids = prompts(30, 30)
    with ttr.adapt(olmoe64, ttr.Rerouting(interval=None, layers="all"), no_harm=False) as adapted:
        best = adapted.generate(ids, max_new_tokens=2, num_beams=3, do_sample=False)
        single = adapted.state.tensors["rerouting"]["delta"]
        adapted.generate(best, state=adapted.state, max_new_tokens=2, do_sample=False)
        two = adapted.generate(ids, max_new_tokens=2, num_beams=3, num_return_sequences=2, do_sample=False)
        double = adapted.state.tensors["rerouting"]["delta"]
        expected = learned(adapted, ids)
    assert (len(best), len(two)) == (2, 4)
    assert torch.equal(single, expected)
    assert torch.equal(double, expected.repeat_interleave(2, 0))


# --- ways of decoding: a model with the delta put into its routers by hand is the oracle ------------


@pytest.mark.parametrize(
    ("how", "options"),
    [
        ("given", {"do_sample": True, "temperature": 0.7}),
        ("optimised", {"do_sample": True, "top_p": 0.8, "top_k": 0}),
        ("optimised", {"do_sample": True, "top_k": 5, "num_return_sequences": 3}),
        ("given", {"num_beams": 3}),
        ("optimised", {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5}),
        ("given", {"num_beams": 2, "do_sample": True}),
        ("given", {"cache_implementation": "static"}),
        ("optimised", {"cache_implementation": "static", "num_beams": 2}),
        ("given", {"use_cache": False}),
        ("optimised", {"prefill_chunk_size": 7}),
        ("given", {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 3}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_decoding_equals_a_model_with_the_delta_inside(olmoe64, prompts, options, how):
    ids = prompts(25, 17)
    mask = (ids != 0).long()
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": 9, **options}
    delta = random_delta(2, L, E)
    strategy = ttr.StaticRouting(delta=delta)
    if how == "optimised":
        strategy = ttr.Rerouting(lr=2.0, steps=2, interval=None, layers="all")
    with ttr.adapt(olmoe64, strategy, no_harm=False) as adapted:
        if how == "optimised":
            delta = learned(adapted, ids)
        torch.manual_seed(1)
        got = adapted.generate(ids, **options)
    with plain_routing(olmoe64, delta):
        torch.manual_seed(1)
        expected = olmoe64.generate(ids, **options)
    torch.manual_seed(1)
    base = olmoe64.generate(ids, **options)
    assert torch.equal(got, expected)
    assert got.shape != base.shape or not torch.equal(got, base), "the delta changed nothing: the test cannot tell"


def test_a_generation_config_is_taken_by_name_and_by_place(olmoe64, prompts):
    ids = prompts(20)
    config = GenerationConfig(max_new_tokens=6, num_beams=3, do_sample=False, pad_token_id=0)
    delta = random_delta(L, E)
    with ttr.adapt(olmoe64, ttr.StaticRouting(delta=delta)) as adapted:
        got = [adapted.generate(ids, config), adapted.generate(inputs=ids, generation_config=config)]
        with pytest.raises(ttr.ConfigError, match="Pass one"):
            adapted.generate(ids, config, input_ids=ids)
    with plain_routing(olmoe64, delta):
        expected = olmoe64.generate(ids, config)
    assert all(torch.equal(g, expected) for g in got)


class StopAt(StoppingCriteria):
    """Notes the lengths that it sees and stops at one of them."""

    def __init__(self, length):
        self.length = length
        self.seen = []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.shape[1])
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


class Look(LogitsProcessor):
    """Notes the shape of the scores that it sees."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(tuple(scores.shape))
        return scores


@pytest.mark.parametrize(
    "strategy",
    [ttr.StaticRouting(delta=torch.ones(L, E)), ttr.Rerouting(interval=2), ttr.SCMoE()],
    ids=lambda strategy: strategy.name,
)
def test_the_users_criteria_and_processors_are_called(olmoe, prompts, strategy):
    criterion, processor = StopAt(25), Look()
    given = [criterion]
    with ttr.adapt(olmoe, strategy) as adapted:
        out = adapted.generate(
            prompts(20, 20), max_new_tokens=50, do_sample=False, stopping_criteria=given, logits_processor=[processor]
        )
    assert out.shape == (2, 25)
    assert criterion.seen == [21, 22, 23, 24, 25]
    assert processor.seen == [(2, 96)] * 5
    assert given == [criterion], "the caller's list is the caller's"


@pytest.mark.parametrize("name", ["rerouting", "scmoe", "dynamic_k"])
def test_streamers_get_every_token(olmoe, tokenizer, capsys, name):
    ids = tokenizer("What is two plus two, and why is that so?", return_tensors="pt")["input_ids"]
    strategy = ttr.Rerouting(interval=4) if name == "rerouting" else name
    with ttr.adapt(olmoe, strategy) as adapted:
        out = adapted.generate(ids, max_new_tokens=10, do_sample=False, streamer=TextStreamer(tokenizer))
        assert capsys.readouterr().out == tokenizer.decode(out[0]) + "\n"
        # a thread generates, the caller reads
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        options = {"input_ids": ids, "max_new_tokens": 10, "do_sample": False, "streamer": streamer}
        thread = Thread(target=adapted.generate, kwargs=options)
        thread.start()
        text = "".join(streamer)
        thread.join()
        assert len(adapted.report.sequences) == 1
    assert text == tokenizer.decode(out[0, ids.shape[1] :])


# --- refusals ----------------------------------------------------------------------------------------

LIVE = ttr.StaticRouting(delta=torch.zeros(L, E))


@pytest.mark.parametrize(
    ("strategy", "options", "words"),
    [
        (ttr.SCMoE(), {"num_beams": 2}, "num_beams=1"),
        (ttr.Rerouting(interval=4), {"num_beams": 2}, "interval=None"),
        (ttr.SCMoE(), {"prefill_chunk_size": 4, "cache_implementation": "static"}, "Leave one of the two out"),
        (LIVE, {"past_key_values": "DynamicCache"}, "pass the whole text"),
        (LIVE, {"assistant_model": "model"}, "Leave it out"),
        (LIVE, {"prompt_lookup_num_tokens": 3}, "Leave it out"),
        (LIVE, {"generation_config": GenerationConfig(prompt_lookup_num_tokens=3)}, "Leave it out"),
        (LIVE, {"guidance_scale": 1.5}, "classifier-free guidance"),
        (LIVE, {"inputs_embeds": torch.zeros(1, 3, 32)}, "pass input_ids"),
        (LIVE, {"custom_generate": "some/repository"}, "decoding loop"),
    ],
    ids=lambda value: "" if isinstance(value, str) else getattr(value, "name", None) or "-".join(value),
)
def test_what_cannot_be_adapted_is_refused_with_a_way_out(olmoe, prompts, untouched, strategy, options, words):
    stand_ins = {"model": olmoe, "DynamicCache": object()}
    options = {k: stand_ins.get(v, v) if isinstance(v, str) else v for k, v in options.items()}
    with untouched(olmoe), ttr.adapt(olmoe, strategy) as adapted:
        with pytest.raises(ttr.UnsupportedCallError) as error:
            adapted.generate(prompts(20), max_new_tokens=8, **options)
        assert words in str(error.value)


def test_neutral_values_of_refused_options_pass(olmoe, prompts):
    ids = prompts(20)
    with ttr.adapt(olmoe, [LIVE, ttr.Rerouting(interval=8)]) as adapted:
        adapted.generate(ids, max_new_tokens=4, do_sample=False, guidance_scale=1.0, past_key_values=None)
        # no interval is reached within the tokens asked for
        assert adapted.generate(ids, max_new_tokens=8, do_sample=False, num_beams=2).shape == (1, 28)


def test_modes_that_cannot_work_are_refused(olmoe, prompts, untouched):
    ids = prompts(20)
    with ttr.adapt(olmoe, LIVE) as adapted:
        with untouched(olmoe), torch.inference_mode():
            for call in (adapted.generate, adapted):
                with pytest.raises(ttr.UnsupportedCallError, match=r"torch\.no_grad\(\)"):
                    call(input_ids=ids)
        olmoe.train()
        for call in (adapted.generate, adapted):
            with pytest.raises(ttr.UnsupportedCallError, match=r"model\.eval\(\)"):
                call(input_ids=ids)
        olmoe.eval()
        cache = olmoe(input_ids=ids).past_key_values
        with pytest.raises(ttr.UnsupportedCallError, match="Pass the whole text"):
            adapted(input_ids=ids[:, :1], past_key_values=cache)
        with pytest.raises(ttr.UnsupportedCallError, match="left-padded"):
            adapted.generate_batch([ids[0].tolist()])


# --- SCMoE -------------------------------------------------------------------------------------------


def two_streams(model, ids):
    """`(strong, weak)` next-token logits by full forwards, no cache; the weak one has only the second expert."""

    def second(router, scores, choice):
        chosen = choice.sort(-1, descending=True).indices[:, 1:2]
        # OLMoE does not renormalise: the weight is the raw score
        return chosen, scores.gather(1, chosen)

    with torch.no_grad():
        with plain_routing(model):
            strong = full_logits(model, ids)[:, -1]
        with plain_routing(model, rule=second):
            weak = full_logits(model, ids)[:, -1]
    return strong.float(), weak.float()  # generate makes fp32 of all logits


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 6}, {"use_cache": False}], ids=str)
def test_scores_are_one_row_a_sequence_and_follow_the_formula(olmoe64, prompts, options):
    ids = prompts(20, 20)
    strategy = ttr.SCMoE(alpha=0.2, beta=0.7)
    with torch.no_grad():
        with ttr.adapt(olmoe64, strategy, no_harm=False) as adapted:
            out = adapted.generate(
                ids,
                max_new_tokens=5,
                do_sample=False,
                return_dict_in_generate=True,
                output_scores=True,
                output_hidden_states=True,
                output_router_logits=True,
                **options,
            )
            assert adapted.report.sequences[0].strategies["scmoe"].get("steps") is None
        text = ids
        for scores in out.scores:
            assert scores.shape == (2, 96)
            strong, weak = two_streams(olmoe64, text)
            mixed = 1.7 * strong - 0.7 * weak
            inside = strong.softmax(-1) >= 0.2 * strong.softmax(-1).amax(-1, keepdim=True)
            assert torch.allclose(scores[inside], mixed[inside], atol=1e-4)
            # probability nought, without infinities that a ban on the rest could turn into NaN
            assert (scores.softmax(-1)[~inside] == 0).all()
            assert torch.isfinite(scores).all()
            text = torch.cat([text, scores.argmax(-1, keepdim=True)], 1)
    assert torch.equal(out.sequences, text)
    for step in out.hidden_states:
        assert {len(h) for h in step} == {2}


def test_steps_are_counted_once_for_each_new_token(olmoe, prompts):
    strategies = [ttr.Rerouting(interval=3, layers="all"), ttr.SCMoE(judge_on=None)]
    for options in ({}, {"prefill_chunk_size": 6}, {"use_cache": False}):
        with ttr.adapt(olmoe, strategies) as adapted:
            adapted.generate(prompts(30), max_new_tokens=10, do_sample=False, **options)
            assert adapted.report.sequences[0].strategies["scmoe"]["steps"] == 10


def test_where_a_processor_bans_all_plausible_tokens_the_strong_order_decides(olmoe64, prompts):
    ids = prompts(20)
    with torch.no_grad():
        strong, _ = two_streams(olmoe64, ids)
        order = strong[0].sort(descending=True).indices.tolist()
        plausible = (strong[0].softmax(-1) >= 0.1 * strong[0].softmax(-1).max()).sum()
        allowed = order[int(plausible) :][::-1]  # everything that the contrast masks, worst first
        assert len(allowed) > 10
        with ttr.adapt(olmoe64, ttr.SCMoE(judge_on=None)) as adapted:
            out = adapted.generate(
                ids,
                max_new_tokens=1,
                do_sample=False,
                prefix_allowed_tokens_fn=lambda row, text: allowed,
                return_dict_in_generate=True,
                output_scores=True,
            )
            torch.manual_seed(0)
            sampled = adapted.generate(
                ids, max_new_tokens=3, do_sample=True, prefix_allowed_tokens_fn=lambda row, text: allowed
            )
    assert int(out.sequences[0, -1]) == allowed[-1], "the best of the allowed ones by strong logits"
    assert not out.scores[0].isnan().any()
    got = out.scores[0].softmax(-1)[0, allowed]
    assert torch.allclose(got, strong[0, allowed].softmax(-1), atol=1e-5), (
        "relative to each other as the strong model has them"
    )
    assert set(sampled[0, 20:].tolist()) <= set(allowed)


def test_a_sequence_ends_at_eos_and_its_count_stops(olmoe, prompts):
    ids = prompts(20, 20)
    with ttr.adapt(olmoe, ttr.SCMoE(judge_on=None), no_harm=True) as adapted:
        free = adapted.generate(ids, max_new_tokens=10, do_sample=False)
        eos = int(free[0, 23])  # the fourth new token of the first sequence
        out = adapted.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=eos, pad_token_id=0)
        facts = [s.strategies["scmoe"] for s in adapted.report.sequences]
        counts = [s.new_tokens for s in adapted.report.sequences]
    for row in range(2):
        new = free[row, 20:].tolist()
        expected = new[: new.index(eos) + 1] if eos in new else new
        found = out[row, 20:].tolist()
        assert found[: len(expected)] == expected
        assert set(found[len(expected) :]) <= {0}
        assert facts[row]["steps"] == len(expected)
        assert counts[row] == len(expected) - (eos in new), "the token that ends a sequence is not a part of it"
