"""Logit and score taps in every family: nothing where nothing is asked, the family's own rule where something is.

Legend: `B` rows, `N` tokens of a forward, `L` layers, `E` experts, `K` per token.
"""

from __future__ import annotations

import pytest
import torch

import ttrouting as ttr
from tests.families.build import build
from tests.families.expected import EXPECTED
from tests.families.harness import (
    Look,
    implementations,
    layers,
    random_delta,
    read,
    spy,
    tokens,
)
from tests.oracles import routing
from tests.oracles.routing import Place

pytestmark = pytest.mark.filterwarnings("ignore")
every_family = pytest.mark.parametrize("family", EXPECTED)
VARIANTS = [(family, name) for family, expected in EXPECTED.items() for name in expected.variants]


def zeros(family):
    expected = EXPECTED[family]
    return torch.zeros(len(expected.layers), expected.experts)


def places(model, family, ids):
    return [Place(family, one.router, one.block, model.config, ids.flatten()) for one in layers(model, family)]


def per_token(delta, layer, length):
    """`[B, L, E]` -> `[N, E]` fp64."""
    return delta[:, layer].repeat_interleave(length, 0).double()


def with_delta(family, logits, delta):
    """Logits `[N, C]` with a delta on the columns that are experts."""
    if EXPECTED[family].dtype == "bfloat16" and logits.dtype != torch.float64:
        return (logits + delta.to(logits.dtype)).double()
    logits = logits.double().clone()
    logits[:, : delta.shape[1]] += delta
    return logits


@pytest.mark.check("no-op")
@every_family
@torch.no_grad()
def test_without_strategy_and_with_a_delta_of_zero(family, model, note):
    expected, tiny, ids = EXPECTED[family], model(family), tokens()
    for name in implementations(tiny, expected):
        base = read(tiny, ids)
        assert torch.isfinite(base).all()
        with ttr.adapt(tiny, []) as off:
            assert torch.equal(read(off, ids), base), name
        with ttr.adapt(tiny, ttr.StaticRouting(delta=zeros(family))) as live, spy(tiny, family) as seen:
            assert torch.equal(read(live, ids), base), name
            assert all(layer.dense is not None for layer in seen)
    note(implementations=expected.implementations)


@pytest.mark.check("delta")
@every_family
@torch.no_grad()
def test_delta_equals_the_family_rule(family, model):
    check_delta(model(family), family)


@pytest.mark.parametrize(("family", "variant"), VARIANTS, ids=["-".join(v) for v in VARIANTS])
@torch.no_grad()
def test_delta_in_a_variant(family, variant):
    check_delta(build(family, **EXPECTED[family].variants[variant].changes), family)


def check_delta(tiny, family):
    expected, ids = EXPECTED[family], tokens()
    delta = random_delta(expected)
    with spy(tiny, family) as before:
        base = read(tiny, ids)
    base_dense = [layer.dense for layer in before]
    with ttr.adapt(tiny, ttr.StaticRouting(delta=delta)) as adapted, spy(tiny, family) as seen:
        moved = read(adapted, ids)
    assert not torch.allclose(base, moved, atol=1e-3 * float(base.abs().max()))
    for index, (layer, place) in enumerate(zip(seen, places(tiny, family, ids), strict=True)):
        logits = routing.native_logits(family, place.router, layer.hidden)
        choice = routing.choose(place, with_delta(family, logits, per_token(delta, index, ids.shape[1])))
        sure = choice.certain  # AX-K2's groups leave draws at score 0
        assert sure.all() or (family == "axk2" and sure.float().mean() > 0.5)
        torch.testing.assert_close(
            layer.dense.double()[sure], choice.dense(expected.experts)[sure], atol=1e-5, rtol=1e-5
        )
        assert not torch.allclose(layer.dense, base_dense[index], atol=1e-3), f"nothing moved in layer {index}"
        if choice.shared is not None:
            torch.testing.assert_close(layer.shared.double(), choice.shared, atol=1e-5, rtol=1e-5)


@pytest.mark.check("delta")
@every_family
@torch.no_grad()
def test_small_delta_in_bf16(family, model):
    """Finer than the spacing of bf16 logits: it must arrive at the choice and the weights all the same."""
    expected, tiny, ids = EXPECTED[family], model(family, torch.bfloat16), tokens()
    delta = random_delta(expected, scale=0.01)
    with ttr.adapt(tiny, ttr.StaticRouting(delta=delta)) as adapted, spy(tiny, family) as seen:
        read(adapted, ids)
    for index, (layer, place) in enumerate(zip(seen, places(tiny, family, ids), strict=True)):
        logits = routing.native_logits(family, place.router, layer.hidden)
        given = per_token(delta, index, ids.shape[1])
        if expected.dtype == "bfloat16":  # DBRX: both are rounded, and so is the softmax after them
            logits = logits.bfloat16()
        choice = routing.choose(place, with_delta(family, logits, given))
        want, got = choice.dense(expected.experts)[choice.certain], layer.dense.double()[choice.certain]
        if expected.dtype == "bfloat16":
            same = ((want != 0) == (got != 0)).all(1)
            assert same.float().mean() > 0.9
            want, got = want[same], got[same]
        torch.testing.assert_close(got, want, atol=2**-8, rtol=2**-6, msg=lambda m, i=index: f"layer {i}: {m}")


@pytest.mark.check("bits")
@every_family
@torch.no_grad()
def test_delta_of_zero_keeps_bits_in_bf16(family, model):
    """Over many tokens: an ulp in one of 50 000 softmaxes is enough to break it."""
    tiny, ids = model(family, torch.bfloat16), tokens(8, 48)
    base = read(tiny, ids)
    with ttr.adapt(tiny, ttr.StaticRouting(delta=zeros(family))) as live:
        assert torch.equal(read(live, ids), base)


@pytest.mark.check("bits")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@every_family
@torch.no_grad()
def test_rows_beside_an_edited_one_keep_their_bits(family, dtype, model, note):
    expected, tiny, ids = EXPECTED[family], model(family, dtype), tokens()
    delta = random_delta(expected)
    delta[0] = 0
    row = ids.shape[1]
    for name in implementations(tiny, expected):
        with spy(tiny, family) as seen:
            base = read(tiny, ids)
        native = seen[0].dense
        with ttr.adapt(tiny, ttr.StaticRouting(delta=delta)) as adapted, spy(tiny, family) as seen:
            both = read(adapted, ids)
        assert torch.equal(seen[0].dense[:row], native[:row])
        assert not torch.equal(seen[0].dense[row:], native[row:])
        assert not torch.equal(both[1], base[1])
        # the others multiply matrices whose height depends on the neighbours, which rounds differently
        if name == "batched_mm":
            assert torch.equal(both[0], base[0])
        elif dtype == torch.float32:
            torch.testing.assert_close(both[0], base[0], atol=1e-5 * float(base.abs().max()), rtol=1e-5)
    if expected.implementations == ("eager",):
        note(
            remark="choice and weights keep their bits; the output agrees to rounding, because these experts "
            "multiply matrices whose height depends on the neighbours, as eager and grouped_mm do in every family"
        )


def random_mask(expected, seed=2):
    """`[L, E]` bool: two experts more than are chosen."""
    order = torch.rand(len(expected.layers), expected.experts, generator=torch.Generator().manual_seed(seed))
    return order.argsort(-1).argsort(-1) < min(expected.top_k + 2, expected.experts - 1)


@pytest.mark.check("masks")
@pytest.mark.parametrize("at", ["choice", "logits"])
@every_family
@torch.no_grad()
def test_masked_experts_never_reach_the_experts(family, at, model):
    expected, tiny, ids = EXPECTED[family], model(family), tokens()
    mask = random_mask(expected)
    fixed = [not site.chooses for site in ttr.find_sites(tiny)]  # DeepSeek-V4: by token id
    mask[torch.tensor(fixed)] = True
    with ttr.adapt(tiny, ttr.ExpertMask(mask=mask, at=at)) as adapted, spy(tiny, family) as seen:
        read(adapted, ids)
    for index, (layer, place) in enumerate(zip(seen, places(tiny, family, ids), strict=True)):
        used = layer.dense != 0  # [N, E]
        assert not used[:, ~mask[index]].any(), f"layer {index}"
        if layer.ids is not None and family != "zaya":  # the skip class becomes id 0 with weight 0
            assert mask[index][layer.ids].all()
            assert all(len(set(row)) == len(row) for row in layer.ids.tolist())
        if at == "choice" and not fixed[index]:
            logits = routing.native_logits(family, place.router, layer.hidden)
            choice = routing.choose(place, logits, mask[index].expand(len(logits), -1))
            certain = choice.certain
            assert certain.any()  # a mask and a group limit together leave few
            torch.testing.assert_close(
                layer.dense.double()[certain], choice.dense(expected.experts)[certain], atol=1e-5, rtol=1e-5
            )


@pytest.mark.check("masks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@every_family
@torch.no_grad()
def test_full_mask_keeps_bits(family, dtype, model):
    expected, tiny, ids = EXPECTED[family], model(family, dtype), tokens()
    full = torch.ones(len(expected.layers), expected.experts, dtype=torch.bool)
    base = read(tiny, ids)
    with ttr.adapt(tiny, ttr.ExpertMask(mask=full)) as off:
        assert torch.equal(read(off, ids), base)
    with ttr.adapt(tiny, ttr.StaticRouting(mask=full)) as live:
        assert torch.equal(read(live, ids), base)
    with ttr.adapt(tiny, ttr.StaticRouting(mask=full, delta=zeros(family))) as live:
        assert torch.equal(read(live, ids), base)


@pytest.mark.check("masks")
@every_family
@torch.no_grad()
def test_ranks_are_the_familys_order(family, model):
    """The best K by rank are the experts that the family chose, under a delta too."""
    expected, tiny, ids = EXPECTED[family], model(family), tokens()
    compared = []

    def look(site, call, chosen, weights):
        if not site.chooses:
            return
        best = call.ranking().topk(site.top_k, -1).indices
        if site.real_experts < site.num_experts:  # Zaya: a skipped token shows id 0 with weight 0
            best = best.masked_fill(best >= site.real_experts, 0)
        assert torch.equal(best.sort(-1).values, chosen.sort(-1).values)
        compared.append(site.index)

    with ttr.adapt(tiny, [ttr.StaticRouting(delta=random_delta(expected)), Look(back=look)]) as adapted:
        read(adapted, ids)
        chooses = [site.index for site in adapted.sites if site.chooses]
    assert compared == chooses


@pytest.mark.check("trace")
@every_family
@torch.no_grad()
def test_failure_leaves_no_trace(family, model):
    """The `model` fixture compares the state of every module, hook and tensor before and after."""
    expected, tiny, ids = EXPECTED[family], model(family), tokens()
    base = read(tiny, ids)
    order = []

    def fail(site, call, chosen, weights):
        order.append(site.index)
        if site.index == len(expected.layers) - 1:
            raise KeyboardInterrupt

    with ttr.adapt(tiny, [ttr.StaticRouting(delta=random_delta(expected)), Look(back=fail)]) as adapted:
        with pytest.raises(KeyboardInterrupt):
            read(adapted, ids)
        assert order == list(range(len(expected.layers)))
        assert torch.equal(read(tiny, ids), base)
    assert torch.equal(read(tiny, ids), base)
