"""The arithmetic of surrogates and of the descent: loops, a grid, torch's own optimisers."""

import math

import numpy as np
import pytest
import torch

from ttrouting.descent import descend
from ttrouting.strategies._surrogates import core_experts, cosine_rates, mean_pathway, search_alpha

B, L, E = 5, 3, 7


def draw(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- core experts, mean pathway ---------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize(
    ("amount", "counts"),
    [(3, (3, 3, 3)), (4, (4, 4, 4)), (1.0, (7, 4, 6)), (0.4, (3, 2, 2)), (0.01, (1, 1, 1))],  # of 7, 4 and 6
)
def test_core_experts_are_the_heaviest_of_each_critical_layer(first, amount, counts):
    sizes, omega = (7, 4, 6), draw(B, L, E)
    for layer, size in enumerate(sizes):
        omega[:, layer, size:] = 9.0  # what stands where a layer has no expert must not count
    core = core_experts(omega, list(sizes), first, amount)
    assert core.dtype == torch.bool
    for row in range(B):
        for layer, size in enumerate(sizes):
            scores = omega[row, layer, :size].tolist()
            expected = sorted(range(size), key=lambda e, s=scores: -s[e])[: counts[layer]] if layer >= first else []
            assert core[row, layer].nonzero().flatten().tolist() == sorted(expected)


def test_mean_pathway_equals_numpy():
    omega, weights = draw(B, 4, L, E), draw(B, 4, seed=1)
    weights = weights / weights.sum(1, keepdim=True)
    expected = np.zeros((B, L, E))
    for row in range(B):
        for i in range(4):
            expected[row] += weights[row, i].item() * omega[row, i].numpy()
    np.testing.assert_allclose(mean_pathway(weights, omega).numpy(), expected, atol=1e-12)


# --- search for alpha -------------------------------------------------------------------------------------

VALLEYS = {
    "quadratic": lambda a, low: (a - low) ** 2,
    "pointed": lambda a, low: (a - low).abs(),
    "lopsided": lambda a, low: torch.where(a < low, 5 * (low - a), (a - low) ** 2),
    "flat outside": lambda a, low: (a - low).abs().clamp_max(0.2),
}


@pytest.mark.parametrize("shape", VALLEYS)
def test_alpha_of_one_valley_is_found_to_a_fortieth(shape):
    """Each sequence has its own valley, also outside [0, 1]: then the edge is best."""
    low = torch.linspace(-0.15, 1.15, 58, dtype=torch.float64)
    calls = []

    def loss(alpha):
        calls.append(alpha)
        assert bool(((alpha >= 0) & (alpha <= 1)).all())
        return VALLEYS[shape](alpha, low)

    alpha, least = search_alpha(loss, low)
    grid = torch.stack([VALLEYS[shape](torch.full_like(low, i / 40), low) for i in range(41)])
    coarse = grid[::4]
    assert torch.allclose(least, VALLEYS[shape](alpha, low))
    assert bool((least <= coarse.amin(0) + 1e-12).all())
    assert torch.allclose(least, grid.amin(0), atol=1e-12), "not the best of a grid of forty steps"
    assert (alpha - low.clamp(0, 1)).abs().max() <= 0.025 + 1e-9
    assert len(calls) == 15


def test_alpha_of_several_valleys_is_never_above_a_coarse_point():
    centres = draw(B, 4, seed=2)

    def loss(alpha):
        return torch.sin(9 * alpha + centres[:, 0]) + torch.cos(23 * alpha * centres[:, 1]) + alpha * centres[:, 2]

    alpha, least = search_alpha(loss, centres)
    coarse = torch.stack([loss(torch.full((B,), i / 10, dtype=torch.float64)) for i in range(11)])
    assert bool((least <= coarse.amin(0) + 1e-12).all())
    assert torch.allclose(loss(alpha), least)


def test_of_equal_losses_the_least_change_is_taken_and_no_number_is_never_best():
    like = torch.zeros(2, 3)
    assert search_alpha(lambda alpha: torch.ones_like(alpha), like)[0].tolist() == [1.0, 1.0]
    alpha, least = search_alpha(lambda alpha: torch.where(alpha < 0.5, torch.nan, alpha), like)
    assert alpha.tolist() == [0.5, 0.5]
    assert least.tolist() == [0.5, 0.5]


# --- rates and the descent --------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 10])
def test_rates_are_torchs_cosine_annealing(steps):
    found = cosine_rates(1e-2, 1e-5, steps)
    assert len(found) == steps
    if steps < 2:
        assert found == [1e-2] * steps
        return
    optimiser = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=steps - 1, eta_min=1e-5)
    expected = []
    for _ in range(steps):
        expected.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    assert found == pytest.approx(expected, rel=1e-9)
    assert (found[0], found[-1]) == (pytest.approx(1e-2), pytest.approx(1e-5))


def bowl(x):
    """`[B, 3]` -> `[B]`, each row with a bottom of its own."""
    centre = torch.arange(x.shape[0], dtype=x.dtype)[:, None]
    return ((x - centre).square() * torch.tensor([1.0, 10.0, 0.1], dtype=x.dtype)).sum(1) + torch.cos(3 * x).sum(1)


@pytest.mark.parametrize(("name", "optimiser"), [("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)])
def test_descent_equals_torchs_optimisers(name, optimiser):
    start, rates = draw(B, 3), [0.05, 0.02, 0.05, 0.001]
    found, curve = descend(bowl, start, rates, torch.ones(1), name)
    expected = start.clone().requires_grad_(True)
    reference, losses = optimiser([expected], lr=1.0), []
    for rate in rates:
        reference.param_groups[0]["lr"] = rate
        loss = bowl(expected)
        losses.append(loss.detach())
        (expected.grad,) = torch.autograd.grad(loss.sum(), expected)
        reference.step()
    assert torch.allclose(found, expected.detach(), atol=1e-12)
    assert torch.allclose(torch.stack(curve), torch.stack(losses), atol=1e-12)
    assert not found.requires_grad


def test_what_may_not_move_stays_to_the_bit_and_steps_end_where_they_are_projected():
    start, moves = draw(B, 3), torch.tensor([1.0, 0.0, 0.5])
    found, _ = descend(bowl, start, [0.1] * 4, moves)
    assert torch.equal(found[:, 1], start[:, 1])
    assert (found[:, [0, 2]] != start[:, [0, 2]]).all()
    half, _ = descend(bowl, start, [0.1], moves)
    assert torch.allclose((half - start)[:, 2].abs(), torch.full((B,), 0.05, dtype=torch.float64), atol=1e-6)
    seen = []

    def watched(x):
        seen.append(x.detach().clone())
        return bowl(x)

    held, _ = descend(watched, start, [0.5] * 5, torch.ones(1), project=lambda x: x.clamp(0.2, 0.9))
    assert bool(((held >= 0.2) & (held <= 0.9)).all())
    assert torch.equal(seen[0], start)
    assert all(bool(((x >= 0.2) & (x <= 0.9)).all()) for x in seen[1:]), "a step began outside"


def test_rows_do_not_mix_and_no_step_changes_nothing():
    start = draw(B, 3)
    together, curve = descend(bowl, start, [0.1] * 3, torch.ones(1))
    for row in range(1, B):

        def alone(x, row=row):
            return bowl(torch.cat([torch.zeros(row, 3, dtype=x.dtype), x]))[row:]

        one, own = descend(alone, start[row : row + 1], [0.1] * 3, torch.ones(1))
        assert torch.equal(together[row], one[0])
        assert torch.equal(torch.stack(curve)[:, row], torch.stack(own)[:, 0])
    same, none = descend(bowl, start, [], torch.ones(1))
    assert torch.equal(same, start)
    assert none == []


def test_one_row_without_a_number_leaves_the_others_alone():
    start = draw(2, 3)

    def broken(x):
        return bowl(x) * torch.tensor([math.nan, 1.0])

    found, curve = descend(broken, start, [0.1] * 2, torch.ones(1))
    sound, _ = descend(bowl, start, [0.1] * 2, torch.ones(1))
    assert torch.equal(found[1], sound[1])
    assert bool(curve[0][0].isnan())
