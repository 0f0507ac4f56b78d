"""Gradients to the delta in every family, against finite differences in fp64.

Legend: `L` layers, `E` experts.
"""

from __future__ import annotations

import pytest
import torch

import ttrouting as ttr
from tests.families.expected import EXPECTED
from tests.families.harness import implementations, random_delta, read, spy, tokens
from tests.oracles.double import InDouble

STEP = 1e-6


@pytest.mark.check("gradient")
@pytest.mark.parametrize("family", EXPECTED)
def test_gradient_equals_finite_differences(family, model):
    expected, tiny, ids = EXPECTED[family], model(family, torch.float64), tokens(1)
    if expected.implementations != ("eager",):
        tiny.set_experts_implementation("eager")  # grouped_mm takes no fp64 on the CPU
    generator = torch.Generator().manual_seed(3)

    def value(delta):
        with ttr.adapt(tiny, ttr.StaticRouting(delta=delta)) as adapted, spy(tiny, family) as seen:
            out = read(adapted, ids)
        chosen = [layer.dense != 0 for layer in seen]
        return (out * projection).mean(), chosen

    with InDouble():
        delta = random_delta(expected, batch=None).double()
        with torch.no_grad():
            projection = torch.randn(read(tiny, ids).shape, generator=generator, dtype=torch.float64)
        leaf = delta.clone().requires_grad_(True)
        loss, chosen = value(leaf)
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert torch.isfinite(gradient).all()
        assert (gradient.abs().amax(1) > 0).all(), "a layer has no gradient"
        for _ in range(2):
            direction = torch.randn(delta.shape, generator=generator, dtype=torch.float64)
            with torch.no_grad():
                (above, up), (below, down) = (value(delta + s * STEP * direction) for s in (1, -1))
            assert all(torch.equal(a, b) for a, b in zip(up, down, strict=True)), "a route flips: a tie"
            slope = (above - below) / (2 * STEP)
            torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-9)
    never = torch.stack([~used.any(0) for used in chosen])  # [L, E]
    if expected.scoring == "softmax" and not expected.renormalises:
        assert (gradient[never] != 0).all(), "softmax over all experts must reach those that are not chosen"
    elif expected.scoring != "other":
        rounding = 1e-12 * gradient.abs().max()
        assert (gradient[never].abs() < rounding).all(), "an expert that is never chosen has a gradient"


@pytest.mark.check("gradient")
@pytest.mark.parametrize("family", EXPECTED)
def test_gradient_agrees_between_implementations(family, model):
    expected, tiny, ids = EXPECTED[family], model(family), tokens()
    found = []
    for _ in implementations(tiny, expected):
        leaf = random_delta(expected).requires_grad_(True)
        with ttr.adapt(tiny, ttr.StaticRouting(delta=leaf)) as adapted:
            loss = read(adapted, ids)[..., :7].square().mean()
        found.append(torch.autograd.grad(loss, leaf)[0])
    assert found[0].abs().max() > 0
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-3 * float(found[0].abs().max()), rtol=1e-2)
