"""Re-adaptation while decoding: when it happens, and what becomes of the KV cache."""

from contextlib import nullcontext
from inspect import signature
from itertools import pairwise

import pytest
import torch

import ttrouting as ttr
from families.build import build
from oracles.double import InDouble
from oracles.plain_router import full_logits, plain_routing

EVERY, NEW = 2, 5


def rerouting(**options):
    return ttr.Rerouting(**{"interval": EVERY, "lr": 0.5, "steps": 2, "layers": "all", **options})


def generate(model, ids, new=NEW, options=None, **call):
    """`(tokens, logits [B, NEW, V], delta, report)` of one adapted call."""
    with ttr.adapt(model, rerouting(**(options or {})), no_harm=False) as adapted:
        out = adapted.generate(
            ids,
            attention_mask=(ids != 0).long(),
            max_new_tokens=new,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **call,
        )
        delta = adapted.state.tensors["rerouting"]["delta"]
        return out.sequences, torch.stack(out.logits, 1), delta, adapted.report


def phases(model, ids, **how):
    """The delta of each phase: a call that stops at the end of a phase never starts the next one."""
    return [generate(model, ids, new=n, **how)[2] for n in range(EVERY, NEW + EVERY, EVERY)]


def test_it_happens_every_interval_and_not_after_the_last_token(olmoe64, prompts):
    ids = prompts(24, 20)
    for new, expected in ((2, 1), (3, 2), (4, 2), (5, 3)):
        report = generate(olmoe64, ids, new=new)[3]
        adaptations = [s.strategies["rerouting"]["adaptations"] for s in report.sequences]
        for length, found in zip((24, 20), adaptations, strict=True):
            assert [phase["tokens"] for phase in found] == [length + EVERY * i for i in range(expected)]
        assert ("readapt" in report.milliseconds) == (expected > 1)


def test_each_phase_learns_from_the_text_so_far(olmoe64, prompts):
    """The losses of a phase, taken by hand on the tokens that were there, under the delta that it went on from."""
    ids = prompts(24)
    tokens, _, _, report = generate(olmoe64, ids)
    found = report.sequences[0].strategies["rerouting"]["adaptations"]
    deltas = phases(olmoe64, ids)
    before = torch.zeros_like(deltas[0])
    for number, phase in enumerate(found):
        text = tokens[:, : 24 + EVERY * number]
        for delta, name in ((before, "loss_before"), (deltas[number], "loss_after")):
            with torch.no_grad(), plain_routing(olmoe64, delta):
                logits = full_logits(olmoe64, text)
            loss = torch.nn.functional.cross_entropy(logits[0, :-1], text[0, 1:])
            assert phase[name] == pytest.approx(float(loss), abs=1e-5)
        before = deltas[number]


@pytest.mark.parametrize("call", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_a_refilled_cache_equals_no_cache_at_all(olmoe64, prompts, call):
    ids = prompts(24, 20)
    tokens, logits, _, _ = generate(olmoe64, ids, **call)
    deltas = phases(olmoe64, ids)
    text = ids
    for step in range(NEW):
        mask = torch.cat([(ids != 0).long(), torch.ones(2, step, dtype=torch.long)], 1)
        with torch.no_grad(), plain_routing(olmoe64, deltas[step // EVERY]):
            expected = full_logits(olmoe64, text, mask)[:, -1]
        assert torch.allclose(logits[:, step], expected.float(), atol=1e-4)
        text = torch.cat([text, expected.argmax(-1, keepdim=True)], 1)
    assert torch.equal(tokens, text)
    moves = [float((b - a).abs().max()) for a, b in pairwise(deltas)]
    assert min(moves) > 0.1, "deltas hardly moved: the test cannot tell"


@pytest.mark.parametrize("call", [{}, {"cache_implementation": "static"}], ids=str)
def test_without_refresh_old_entries_stay(olmoe64, prompts, call):
    ids = prompts(24)
    how = {"options": {"refresh_kv": False}, **call}
    tokens, logits, _, _ = generate(olmoe64, ids, **how)
    deltas = phases(olmoe64, ids, **how)
    cache, fresh, text = None, ids, ids
    for step in range(NEW):
        with torch.no_grad(), plain_routing(olmoe64, deltas[step // EVERY]):
            out = olmoe64(input_ids=fresh, past_key_values=cache, use_cache=True)
        cache, expected = out.past_key_values, out.logits[:, -1]
        assert torch.allclose(logits[:, step], expected.float(), atol=1e-4)
        fresh = expected.argmax(-1, keepdim=True)
        text = torch.cat([text, fresh], 1)
    assert torch.equal(tokens, text)
    refreshed = generate(olmoe64, ids, **call)[1]
    assert (refreshed - logits).abs().max() > 1e-3, "old entries made no difference: the test cannot tell"


# states of Mamba, of gated delta rules and of a compressed (latent) cache are refilled as well as keys and values
@pytest.mark.parametrize("family", ["jamba", "qwen3_next", "deepseek_v3"])
def test_caches_of_other_kinds(prompts, family):
    model = build(family, dtype=torch.float64)
    model.set_experts_implementation("eager")
    model.generation_config.eos_token_id = None
    ids = prompts(20, 17)
    # Qwen3-Next's recurrence rounds to fp32 inside
    with InDouble() if family == "qwen3_next" else nullcontext():
        compare_with_no_cache(model, ids)


def compare_with_no_cache(model, ids):
    tokens, logits, _, _ = generate(model, ids)
    text, mask = ids, (ids != 0).long()
    for step in range(NEW):
        if step % EVERY == 0:
            delta = generate(model, ids, new=step + EVERY)[2]
        with ttr.adapt(model, ttr.StaticRouting(delta=delta)) as adapted, torch.no_grad():
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            known = "position_ids" in signature(model.forward).parameters  # Jamba has no positions
            options = {"position_ids": positions} if known else {}
            expected = adapted(input_ids=text, attention_mask=mask, use_cache=False, **options).logits[:, -1]
        assert torch.allclose(logits[:, step], expected.float(), atol=1e-4)
        text = torch.cat([text, expected.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
    assert torch.equal(tokens, text)


def test_a_decoding_strategy_keeps_its_second_rows_over_a_refill(olmoe64, prompts):
    """SCMoE under Rerouting: with a cache, and again without one."""
    ids = prompts(24, 20)
    call = {"attention_mask": (ids != 0).long(), "max_new_tokens": NEW, "do_sample": False}
    call |= {"return_dict_in_generate": True, "output_logits": True}
    with ttr.adapt(olmoe64, [rerouting(), ttr.SCMoE(beta=0.9)], no_harm=False) as adapted:
        cached, plain = (adapted.generate(ids, use_cache=use, **call) for use in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    for a, b in zip(cached.logits, plain.logits, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_sampled_copies_adapt_apart(olmoe64, prompts):
    ids = prompts(24)
    torch.manual_seed(0)
    with ttr.adapt(olmoe64, rerouting(interval=3), no_harm=False) as adapted:
        out = adapted.generate(ids, max_new_tokens=8, do_sample=True, temperature=3.0, num_return_sequences=3)
        state = adapted.state.tensors["rerouting"]["delta"]
        lengths = [[p["tokens"] for p in s.strategies["rerouting"]["adaptations"]] for s in adapted.report.sequences]
        # by hand: adapt to each copy's own text, phase by phase
        carried = None
        for end in (24, 27, 30):
            adapted.generate(out[:, :end], state=carried, max_new_tokens=1, do_sample=False)
            carried = adapted.state
        delta = carried.tensors["rerouting"]["delta"]
    assert lengths == [[24, 27, 30]] * 3
    assert torch.allclose(state, delta, atol=1e-4)
    assert not torch.allclose(state[0], state[1], atol=1e-3)


@pytest.mark.parametrize("length", [{"max_length": 31}, {"max_new_tokens": 7}], ids=str)
def test_the_end_of_the_text_is_known_from_either_option(olmoe64, prompts, length):
    ids = prompts(24)
    with ttr.adapt(olmoe64, rerouting(interval=3), no_harm=False) as adapted:
        adapted.generate(ids, do_sample=False, **length)
        phases = adapted.report.sequences[0].strategies["rerouting"]["adaptations"]
    assert [phase["tokens"] for phase in phases] == [24, 27, 30]
    with ttr.adapt(olmoe64, rerouting(interval=7), no_harm=False) as adapted:
        adapted.generate(ids, do_sample=False, **length)
        (_only,) = adapted.report.sequences[0].strategies["rerouting"]["adaptations"]


# --- what is not computed again ---------------------------------------------------------------------


def attended(model, layer):
    """Tokens `(rows, length)` that a layer's attention reads, call by call."""
    seen = []
    attention = model.model.layers[layer].self_attn
    attention.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(tuple(kwargs["hidden_states"].shape[:2])), with_kwargs=True
    )
    return seen


LAST = {"layers": "last:1", "interval": EVERY, "steps": 3, "lr": 0.1}


def test_layers_below_the_adapted_one_read_the_text_once(prompts):
    """And its last token again where a next-token distribution is asked for: before and after each adaptation."""
    model = build("olmoe", dtype=torch.float64)
    model.set_experts_implementation("eager")
    model.generation_config.eos_token_id = None
    ids = prompts(20, 17)
    low, high = attended(model, 0), attended(model, -1)
    with ttr.adapt(model, ttr.Rerouting(**LAST), no_harm=False) as adapted:
        low.clear()
        high.clear()
        adapted.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=2 * EVERY + 1, do_sample=False)
        phases = [len(s.strategies["rerouting"]["adaptations"]) for s in adapted.report.sequences]
    assert phases == [3, 3]
    whole = [shape for shape in low if shape != (2, 1) and shape[0] == 2]
    assert whole == [(2, 19)]
    # at each phase: once as it was (the first time with all layers), three steps, once as it is
    tail = [shape for shape in high if shape != (2, 1) and shape[0] == 2]
    assert tail == [(2, 19)] * 5 + [(2, 19 + EVERY)] * 5 + [(2, 19 + 2 * EVERY)] * 5
    assert low.count((2, 1)) == 2 * 3 + 2 * EVERY + 1


@pytest.mark.parametrize("no_harm", [False, True])
@pytest.mark.parametrize("changes", [{}, {"recompute": True}, {"refresh_kv": False}, {"layers": "highest:0.3"}])
def test_the_short_way_equals_the_long_one(prompts, monkeypatch, changes, no_harm):
    model = build("olmoe", dtype=torch.float64)
    model.set_experts_implementation("eager")
    model.generation_config.eos_token_id = None
    ids = prompts(40, 33)
    call = {"attention_mask": (ids != 0).long(), "max_new_tokens": 2 * EVERY + 2, "do_sample": False}
    call |= {"return_dict_in_generate": True, "output_logits": True}
    found = []
    for long in (False, True):
        if long:  # no cache is handed over, and nothing is followed
            monkeypatch.setattr("ttrouting.adaptive.can_hand_over", lambda *_: False)
        options = {**LAST, **changes, "recompute": changes.get("recompute", False) and not long}
        with ttr.adapt(model, ttr.Rerouting(**options), no_harm=no_harm) as adapted:
            out = adapted.generate(ids, **call)
            delta = adapted.state.tensors["rerouting"]["delta"]
            outcomes = [s.strategies["rerouting"]["adaptations"] for s in adapted.report.sequences]
            found.append((out, delta, [[p["outcome"][:8] for p in phases] for phases in outcomes]))
    (short, mine, told), (long_way, plain, expected) = found
    assert told == expected
    assert torch.allclose(mine, plain, atol=1e-9)
    assert plain.any()
    assert torch.equal(short.sequences, long_way.sequences)
    for a, b in zip(short.logits, long_way.logits, strict=True):
        assert torch.allclose(a, b, atol=1e-6)  # transformers casts logits to fp32
