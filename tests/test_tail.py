"""A replay of the upper layers gives what a whole forward gives, and runs no layer below."""

import pytest
import torch
import torch.nn.functional as F

import ttrouting as ttr
from families.build import build
from oracles.plain_router import plain_routing
from ttrouting.context import Context
from ttrouting.plan import make_plan
from ttrouting.session import Session
from ttrouting.sites import find_sites
from ttrouting.target import Target


def session_of(model, ids, delta):
    target = Target(model, find_sites(model))
    mask = ids != 0
    keys = torch.zeros(len(ids), dtype=torch.int64)
    return Session(make_plan(target, ttr.StaticRouting(delta=delta)), mask, keys), Context(ids, mask, mask)


@pytest.fixture
def double():
    model = build("olmoe", dtype=torch.float64)
    model.set_experts_implementation("eager")
    return model


def deltas(model, first):
    """Two, which differ from layer `first` on."""
    sites = find_sites(model)
    generator = torch.Generator().manual_seed(first)
    before, after = (
        torch.randn(len(sites), sites[0].num_experts, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    after[:first] = before[:first]
    return before, after


def whole_logits(model, context, delta):
    """A forward of the model itself, with routers that the test has written."""
    positions = (context.mask.long().cumsum(1) - 1).clamp_min(0)
    inputs = {"input_ids": context.ids, "attention_mask": context.mask.long(), "position_ids": positions}
    with plain_routing(model, delta):
        return model(**inputs, use_cache=False).logits


@pytest.mark.parametrize("first", range(4))
def test_a_replay_equals_a_whole_forward_under_other_edits_above(double, prompts, untouched, first):
    before, after = deltas(double, first)
    ran = []
    for number, layer in enumerate(double.model.layers):
        layer.self_attn.register_forward_pre_hook(lambda *_, n=number: ran.append(n))
    session, context = session_of(double, prompts(12, 9), before)
    with untouched(double), torch.no_grad(), session.installed():
        tail = session.tail(first)
        with tail.capture():
            session.read(context)
        session.runs[0].delta = after.expand(2, -1, -1)
        ran.clear()
        replayed = session.read(context, None, tail).logits
        assert ran == list(range(first, len(double.model.layers)))
    session.check_coverage()
    with torch.no_grad():
        expected, other = whole_logits(double, context, after), whole_logits(double, context, before)
    assert torch.allclose(replayed[context.mask], expected[context.mask], atol=1e-6)  # logits are cast to fp32
    assert (expected - other)[context.mask].abs().max() > 1e-3


@pytest.mark.parametrize("recompute", [False, True])
def test_the_gradient_of_a_replay_is_that_of_a_whole_forward(double, prompts, recompute):
    before, after = deltas(double, 2)
    session, context = session_of(double, prompts(12, 9), before)
    labels = context.ids[:, 1:][context.mask[:, :-1]]

    def loss(logits):
        return F.cross_entropy(logits[:, :-1][context.mask[:, :-1]], labels)

    with session.installed():
        tail = session.tail(2, recompute)
        with torch.no_grad(), tail.capture():
            session.read(context)
        variable = after.clone().requires_grad_(True)
        session.runs[0].delta = variable.expand(2, -1, -1)
        (mine,) = torch.autograd.grad(loss(session.read(context, None, tail).logits), variable)
    session.check_coverage()
    variable = after.clone().requires_grad_(True)
    (expected,) = torch.autograd.grad(loss(whole_logits(double, context, variable)), variable)
    assert not mine[:2].any()
    assert torch.allclose(mine[2:], expected[2:], atol=1e-6)
    assert expected[2:].abs().max() > 1e-4


def test_climbing_replays_from_a_higher_layer(double, prompts):
    before, after = deltas(double, 3)
    session, context = session_of(double, prompts(12), before)
    with torch.no_grad(), session.installed():
        tail = session.tail(1)
        with tail.capture():
            session.read(context)
        tail.climb(3)
        assert [s.index for s in tail.skipped] == [0, 1, 2]
        session.runs[0].delta = after.expand(1, -1, -1)
        replayed = session.read(context, None, tail).logits
    assert torch.allclose(replayed, whole_logits(double, context, after), atol=1e-6)


def test_layers_that_exchange_more_than_a_hidden_state_are_all_run(double, prompts):
    """Layer 3 adds what layer 0 computed, as families do that share values between layers."""
    aside = {}
    double.model.layers[0].self_attn.register_forward_hook(lambda _m, _a, out: aside.update(value=out[0]))

    def add(_module, _args, out):
        return (out[0] + 0.1 * aside.pop("value", 0), *out[1:])

    double.model.layers[3].self_attn.register_forward_hook(add)
    before, after = deltas(double, 2)
    session, context = session_of(double, prompts(12), before)
    with torch.no_grad(), session.installed():
        tail = session.tail(2)
        assert tail.skipped == []
        with tail.capture():
            session.read(context)
        session.runs[0].delta = after.expand(1, -1, -1)
        replayed = session.read(context, None, tail).logits
    session.check_coverage()
    assert torch.allclose(replayed, whole_logits(double, context, after), atol=1e-6)


def test_what_layers_leave_aside_for_others_is_found_though_it_stays_there(double, prompts):
    """Layer 3 adds what layer 0 last computed. A replay of the text that was read last would not show it."""
    aside = {}
    double.model.layers[0].self_attn.register_forward_hook(lambda _m, _a, out: aside.update(value=out[0]))

    def add(_module, _args, out):
        return (out[0] + 0.1 * aside["value"], *out[1:])

    double.model.layers[3].self_attn.register_forward_hook(add)
    before, after = deltas(double, 2)
    session, context = session_of(double, prompts(12), before)
    with torch.no_grad(), session.installed():
        tail = session.tail(2)
        assert tail.skipped == []
        with tail.capture():
            session.read(context)
        session.read(Context(context.ids.flip(1), context.mask, context.mask))  # as a neighbour's text may be
        session.runs[0].delta = after.expand(1, -1, -1)
        replayed = session.read(context, None, tail).logits
    session.check_coverage()
    assert torch.allclose(replayed, whole_logits(double, context, after), atol=1e-6)


FAMILIES = [
    "olmoe",
    "mixtral",
    "deepseek_v3",
    "gemma4_text",
    "jamba",
    "qwen3_next",
    "nemotron_h",
    "deepseek_v4",
    "zaya",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_replay_under_the_same_edits_gives_every_bit(family, prompts, untouched):
    """Of a left-padded batch, from every MoE layer up."""
    model = build(family)
    sites = find_sites(model)
    delta = torch.randn(len(sites), sites[0].num_experts, generator=torch.Generator().manual_seed(0))
    session, context = session_of(model, prompts(12, 12) if family == "deepseek_v4" else prompts(12, 9), delta)
    with untouched(model), torch.no_grad(), session.installed():
        for first in range(len(sites)):
            tail = session.tail(first)
            with tail.capture():
                whole = session.read(context).logits
            assert torch.equal(session.read(context, None, tail).logits[context.mask], whole[context.mask])
            assert len(tail.skipped) == first, "run whole: the test cannot tell"
    session.check_coverage()
