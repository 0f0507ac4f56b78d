"""Expert masks and given tensors against routing by hand."""

import pytest
import torch

import ttrouting as ttr
from oracles.double import build_double
from oracles.plain_router import full_logits, plain_routing, top_k_rule

torch.set_num_threads(1)


pytestmark = pytest.mark.usefixtures("true_double")


@pytest.fixture(scope="module", params=["olmoe", "mixtral"])
def model(request):
    return build_double(request.param)


@pytest.fixture(scope="module")
def deepseek():
    return build_double("deepseek_v3")


class Words:
    """A tokenizer of one token a letter."""

    def __call__(self, text, return_tensors):
        return {"input_ids": torch.tensor([[3 + ord(c) % 90 for c in text]])}


TEXTS = ["the quick brown fox", "pack my box with jugs"]


def prompt(seed=0, rows=1, length=16):
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


def some_mask(layers, seed=0, keep=5):
    order = torch.rand(layers, 8, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return order < keep


def masked_rule(mask, before_scoring):
    layers = iter(range(1000))

    def rule(router, scores, choice):
        kept = mask[next(layers) % len(mask)]
        choice = choice.masked_fill(~kept, float("-inf"))
        if before_scoring:  # softmax over the experts that stay
            scores = scores * kept / (scores * kept).sum(-1, keepdim=True)
        return top_k_rule(router, scores, choice)

    return rule


@pytest.mark.parametrize("at", ["choice", "logits"])
def test_a_mask_equals_routing_without_those_experts(model, at):
    ids, mask = prompt(), some_mask(4)
    with torch.no_grad(), plain_routing(model, rule=masked_rule(mask, at == "logits")):
        expected = full_logits(model, ids)
    with ttr.adapt(model, ttr.ExpertMask(mask, at=at)) as adapted:
        logits = adapted(input_ids=ids).logits
    assert torch.allclose(logits, expected, atol=1e-9)
    assert not torch.allclose(logits, full_logits(model, ids), atol=1e-3)


@pytest.mark.parametrize("strategy", ["expert_mask", "static_routing"])
def test_under_groups_and_a_bias_no_masked_expert_is_used(deepseek, strategy):
    mask = some_mask(3, seed=1, keep=4)
    ids = prompt(1)
    seen = {}
    handles = [
        layer.mlp.experts.register_forward_hook(
            lambda _m, args, _o, i=i: seen.__setitem__(i, args[1][args[2] != 0].unique().tolist())
        )
        for i, layer in enumerate(deepseek.model.layers[1:])
    ]
    chosen = ttr.ExpertMask(mask) if strategy == "expert_mask" else ttr.StaticRouting(mask=mask)
    with ttr.adapt(deepseek, chosen) as adapted:
        adapted(input_ids=ids)
    for handle in handles:
        handle.remove()
    assert len(seen) == 3
    for layer, used in seen.items():
        assert set(used) <= set(mask[layer].nonzero().flatten().tolist())


def test_a_mask_for_each_sequence(model):
    ids = prompt(2, rows=2)
    masks = torch.stack([some_mask(4, 2), some_mask(4, 3)])
    with ttr.adapt(model, ttr.StaticRouting(mask=masks)) as adapted:
        both = adapted(input_ids=ids).logits
    for row in range(2):
        with torch.no_grad(), plain_routing(model, rule=masked_rule(masks[row], before_scoring=False)):
            assert torch.allclose(both[row], full_logits(model, ids[row : row + 1])[0], atol=1e-9)


def test_a_delta_for_each_sequence(model):
    ids = prompt(3, rows=2)
    delta = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with ttr.adapt(model, ttr.StaticRouting(delta=delta)) as adapted:
        logits = adapted(input_ids=ids).logits
    with plain_routing(model, delta):
        assert torch.allclose(logits, full_logits(model, ids), atol=1e-9)


def test_a_full_mask_is_the_identity_and_a_live_one_keeps_the_bits(model):
    full = torch.ones(4, 8, dtype=torch.bool)
    ids = prompt(4)
    with ttr.adapt(model, ttr.ExpertMask(full)) as adapted:
        assert adapted.strategies == ()
    with ttr.adapt(model, ttr.StaticRouting(mask=full)) as adapted:
        assert adapted.strategies != ()
        assert torch.equal(adapted(input_ids=ids).logits, model(input_ids=ids).logits)


def test_scores_from_demonstrations_equal_the_formula(model):
    strategy = ttr.ExpertMask.from_demonstrations(model, Words(), TEXTS, keep=4)
    scores = torch.zeros(4, 8, dtype=torch.float64)
    for text in TEXTS:
        ids = Words()(text, "pt")["input_ids"]
        inputs = []
        handles = [
            layer.mlp.experts.register_forward_pre_hook(lambda _m, args, seen=inputs: seen.append(args))
            for layer in model.model.layers
        ]
        model(input_ids=ids)
        for handle in handles:
            handle.remove()
        for layer, (hidden, chosen, weights) in enumerate(inputs):
            experts = model.model.layers[layer].mlp.experts
            for t in range(len(hidden)):
                outputs = {}
                for expert in chosen[t].tolist():
                    gate, up = (experts.gate_up_proj[expert] @ hidden[t]).chunk(2)
                    outputs[expert] = experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
                gains = dict(zip(chosen[t].tolist(), weights[t].tolist(), strict=True))
                mixed = hidden[t] + sum(gains[e] * outputs[e] for e in outputs)
                cosine = (hidden[t] @ mixed) / (hidden[t].norm() * mixed.norm())
                for expert, output in outputs.items():
                    scores[layer, expert] += float((1 - cosine) * gains[expert] * output.norm())
    for layer in range(4):
        best = set(scores[layer].sort(descending=True).indices[:4].tolist())
        assert set(strategy.mask[layer].nonzero().flatten().tolist()) == best


@pytest.mark.parametrize(("keep", "count"), [(3, 3), (0.5, 4), (1.0, 8)])
def test_keep_is_a_count_or_a_share(model, keep, count):
    assert ttr.ExpertMask.from_demonstrations(model, Words(), TEXTS, keep=keep).mask.sum(1).tolist() == [count] * 4


def test_bad_masks_are_refused(model):
    with pytest.raises(ttr.ConfigError, match=r"keeps 2 experts in .*, which chooses 3"):
        ttr.adapt(model, ttr.ExpertMask(some_mask(4, keep=2)))
    with pytest.raises(ttr.ConfigError, match=r"shape \(3, 8\)"):
        ttr.adapt(model, ttr.ExpertMask(some_mask(3)))
    with pytest.raises(ttr.ConfigError, match="bool tensor"):
        ttr.ExpertMask(torch.ones(4, 8))
    with pytest.raises(ttr.ConfigError, match="at least one text"):
        ttr.ExpertMask.from_demonstrations(model, Words(), [])
    with pytest.raises(ttr.ConfigError, match="NaN"):
        ttr.StaticRouting(delta=torch.full((4, 8), float("nan")))
