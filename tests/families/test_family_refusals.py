"""What cannot be adapted says so, with what was found and what to do next."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ttrouting as ttr
from tests.families.build import build
from tests.families.expected import EXPECTED, REFUSED
from tests.families.harness import Replace, random_delta, read, spy, tokens


@pytest.mark.check("rule")
@pytest.mark.parametrize("family", REFUSED)
def test_refused_families(family, note):
    with pytest.raises(ttr.UnsupportedModelError) as caught:
        ttr.adapt(build(family), ttr.StaticRouting())
    message = str(caught.value)
    for words in REFUSED[family]:
        assert words in message
    note(refused=message)


def test_dense_model():
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    with pytest.raises(ttr.NotMoEError) as caught:
        ttr.find_sites(LlamaForCausalLM(config))
    message = str(caught.value)
    assert "No MoE layer in LlamaForCausalLM: searched" in message
    assert "'experts' beside a child 'router' or 'gate'" in message
    assert "ttr.load_pocket()" in message


def test_kernel_that_bypasses_the_router():
    """A fused block never calls its router: discovery must not go on as if it had."""
    model = build("olmoe")
    model.model.layers[2].mlp.forward = lambda hidden: hidden
    with pytest.raises(ttr.UnsupportedModelError, match=r"model.layers.2.mlp.*use_kernels=False"):
        ttr.find_sites(model)


@torch.no_grad()
def test_router_that_is_bypassed_later():
    """Discovered, then replaced: the output is withheld, not half adapted."""
    model, ids = build("olmoe"), tokens()
    with ttr.adapt(model, ttr.StaticRouting(delta=random_delta(EXPECTED["olmoe"]))) as adapted:
        model.model.layers[2].mlp.forward = lambda hidden: hidden
        with pytest.raises(ttr.CoverageError, match=r"1 of 4 MoE layers.*model.layers.2.mlp.*use_kernels=False"):
            read(adapted, ids)


@torch.no_grad()
def test_hash_layers_of_deepseek_v4(model):
    """Experts by token id: a delta changes their weights and not their choice, a mask is refused."""
    expected, tiny, ids = EXPECTED["deepseek_v4"], model("deepseek_v4"), tokens()
    assert [site.chooses for site in ttr.find_sites(tiny)] == [False, True, True, True]
    with spy(tiny, "deepseek_v4") as seen:
        read(tiny, ids)
    before = seen[0].ids, seen[0].weights
    with (
        ttr.adapt(tiny, ttr.StaticRouting(delta=random_delta(expected))) as adapted,
        spy(tiny, "deepseek_v4") as seen,
    ):
        read(adapted, ids)
    assert torch.equal(seen[0].ids, before[0])
    assert not torch.allclose(seen[0].weights, before[1], atol=1e-2)
    mask = torch.ones(4, 8, dtype=torch.bool)
    mask[0, 7] = False
    for strategy in (ttr.ExpertMask(mask=mask), ttr.StaticRouting(mask=mask)):
        with pytest.raises(ttr.ConfigError, match=r"model.layers.0.mlp, whose experts are fixed by token id"):
            ttr.adapt(tiny, strategy)


@torch.no_grad()
def test_llama4_saves_nothing(model):
    """Listed as a limit, and true: with one expert per token all eight still run on every token."""
    tiny, ids = model("llama4_text"), tokens()
    rows = []
    experts = tiny.model.layers[0].feed_forward.experts
    with ttr.adapt(tiny, Replace(columns=1)) as adapted:
        hook = experts.register_forward_pre_hook(lambda _module, args: rows.append(args[0].shape[0]))
        try:
            read(adapted, ids)
        finally:
            hook.remove()
        assert "fewer experts per token save nothing" in adapted.sites[0].limits[0]
    assert rows == [8 * ids.numel()]


@torch.no_grad()
def test_picture_tokens_of_ernie(model):
    """They go to experts of their own, so the routers see a part of the tokens only."""
    tiny, ids = model("ernie4_5_vl_moe_text"), tokens()
    kinds = torch.zeros_like(ids)
    kinds[:, 3:6] = 1
    delta = random_delta(EXPECTED["ernie4_5_vl_moe_text"])
    with ttr.adapt(tiny, ttr.StaticRouting(delta=delta)) as adapted:
        with pytest.raises(ttr.CoverageError, match=r"routes 18 tokens where the forward has 24.*text-only"):
            read(adapted, ids, moe_mm_token_type_ids=kinds)
        read(adapted, ids, moe_mm_token_type_ids=torch.zeros_like(ids))


def test_too_few_experts_left(model):
    """In every family the message names the layer and how many it chooses."""
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[:, :2] = True
    with pytest.raises(ttr.ConfigError, match=r"keeps 2 experts in model.layers.0.mlp, which chooses 3"):
        ttr.adapt(model("mixtral"), ttr.ExpertMask(mask=mask))
