"""C3PO's fit against its formulas: plain numpy, brute force, finite differences, torch's Adam, routers by hand."""

import random

import numpy as np
import pytest
import torch

import ttrouting as ttr
from oracles.c3po import (
    PlainSet,
    answer_loss,
    answer_loss_under,
    heaviest,
    kernel,
    overridden,
    read_alone,
    whole,
)
from oracles.double import build_double
from ttrouting.strategies import _c3po_run as c3po_run

pytestmark = pytest.mark.usefixtures("true_double")
CORE = 3


def text(seed, length=9):
    return "".join(random.Random(f"question {seed}").choice("abcdefghijklmnop (){}") for _ in range(length))


class Case:
    """A model in double precision, a reference set of it, and the last two of its MoE layers as critical ones."""

    def __init__(self, family, folder, tokenizer):
        self.model, self.folder, self.tokenizer = build_double(family), folder, tokenizer
        self.plain = PlainSet(folder, tokenizer)
        self.sites = len(ttr.find_sites(self.model))
        self.first = self.sites - 2
        sigmoid = family == "deepseek_v3"
        self.limits = {"lowest": 1e-7, "highest": 1 - 1e-7 if sigmoid else float("inf")}  # of scores

    def strategy(self, **options):
        base = {"refset": str(self.folder), "use": "all", "layers": "last:2", "core_experts": CORE}
        return ttr.C3PO(**base | options)

    def ask(self, prompt, no_harm=False, new=1, **options):
        """`(state of the one sequence, its report, output)` of one call."""
        strategy = self.strategy(**options)
        with ttr.adapt(self.model, strategy, no_harm=no_harm, tokenizer=self.tokenizer) as adapted:
            out = adapted.generate(
                **self.tokenizer([prompt], return_tensors="pt"),
                max_new_tokens=new,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
            state = {name: value[0] for name, value in adapted.state.tensors["c3po"].items()}
            return state, adapted.report.sequences[0].strategies["c3po"], out

    def read(self, prompt):
        """`(token ids, omega [L, E], mean hidden state [D])`."""
        ids = self.tokenizer(prompt)["input_ids"]
        return ids, *read_alone(self.model, ids)

    def loss(self, found, weights, scores):
        """Weighted mean loss of the neighbours' answers under `scores [L, E]`."""
        parts = [
            weight * answer_loss(self.model, self.plain.prompts[i], self.plain.answers[i], scores, self.first)
            for (i, _, _), weight in zip(found, weights, strict=True)
        ]
        return sum(parts)


@pytest.fixture(scope="module", params=["olmoe", "deepseek_v3"])
def case(request, references, tokenizer):
    return Case(request.param, references(request.param), tokenizer)


@pytest.fixture(scope="module")
def olmoe(references, tokenizer):
    return Case("olmoe", references("olmoe"), tokenizer)


def same(a, b):
    """Equal but for the order of a sum of 32 products."""
    return torch.allclose(a, b, atol=1e-12, rtol=0)


def numbers(facts):
    return [n["record"] for n in facts["neighbours"]]


# --- kernel regression and mode finding -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gaussian", "matern", "linear", "polynomial"])
@pytest.mark.parametrize("no_harm", [False, True])
def test_kernel_regression_is_the_weighted_mean_on_core_experts(olmoe, name, no_harm):
    """With `no_harm` a fourth neighbour is fetched, and is in no sum."""
    for seed in range(2):
        _, omega, pooled = olmoe.read(text(seed))
        state, facts, _ = olmoe.ask(text(seed), no_harm, surrogate="kernel_regression", alpha=0.3, kernel=name)
        found = olmoe.plain.nearest(pooled, 3 + no_harm, "all")
        assert numbers(facts) == [f[0] for f in found]
        weights = kernel(name, found[:3])
        mean = olmoe.plain.mean_pathway(found[:3], weights)
        core = heaviest(omega, 2, CORE).numpy()
        expected = np.where(core, 0.3 * omega.numpy() + 0.7 * mean, omega.numpy())
        np.testing.assert_allclose(state["value"].numpy(), expected, atol=1e-6)
        assert (np.abs(expected - omega.numpy())[core] > 1e-3).mean() > 0.5, "hardly moved: the test cannot tell"
        assert same(state["value"][~torch.from_numpy(core)], omega[~torch.from_numpy(core)])
        told = [n["weight"] for n in facts["neighbours"]]
        assert told == pytest.approx([*weights, 0.0][: len(told)], abs=1e-4)
        assert [n["held_back"] for n in facts["neighbours"]] == [False] * 3 + [True] * no_harm


@pytest.mark.parametrize("sigma", [0.3, 2.0])
def test_the_width_of_the_kernel_can_be_given(olmoe, sigma):
    _, omega, pooled = olmoe.read(text(4))
    state, _, _ = olmoe.ask(text(4), surrogate="kernel_regression", alpha=0.0, sigma=sigma, core_experts=1.0, k=5)
    found = olmoe.plain.nearest(pooled, 5, "all")
    mean = olmoe.plain.mean_pathway(found, kernel("gaussian", found, sigma))
    np.testing.assert_allclose(state["value"].numpy()[2:], mean[2:], atol=1e-6)
    np.testing.assert_allclose(state["value"].numpy()[:2], omega.numpy()[:2], atol=1e-12)


def test_mode_finding_has_its_neighbours_in_pathway_space(olmoe):
    elsewhere = 0
    for seed in range(4):
        _, omega, pooled = olmoe.read(text(seed))
        state, facts, _ = olmoe.ask(text(seed), surrogate="mode_finding", alpha=0.5)
        found = olmoe.plain.nearest_pathways(pooled, omega.numpy(), 2, 3, "all")
        assert numbers(facts) == [f[0] for f in found]
        mean = olmoe.plain.mean_pathway(found, kernel("gaussian", found))
        core = heaviest(omega, 2, CORE).numpy()
        expected = np.where(core, 0.5 * omega.numpy() + 0.5 * mean, omega.numpy())
        np.testing.assert_allclose(state["value"].numpy(), expected, atol=1e-6)
        elsewhere += numbers(facts) != [f[0] for f in olmoe.plain.nearest(pooled, 3, "all")]
    assert elsewhere, "the same neighbours as by embedding: the test cannot tell"


def test_only_successful_references_are_asked_unless_all_are_wanted(olmoe):
    right = {i for i, r in enumerate(olmoe.plain.records) if r["correct"]}
    assert 12 <= len(right) < 24
    for seed in range(2):
        _, _, pooled = olmoe.read(text(seed))
        for use in ("successful", "all"):
            facts = olmoe.ask(text(seed), surrogate="kernel_regression", alpha=0.5, use=use, k=6)[1]
            assert numbers(facts) == [f[0] for f in olmoe.plain.nearest(pooled, 6, use)]
            assert (set(numbers(facts)) <= right) == (use == "successful")


@pytest.mark.parametrize("surrogate", ["kernel_regression", "mode_finding"])
def test_leaks_are_dropped(olmoe, surrogate):
    for number in (2, 7):
        prompt = olmoe.plain.records[number]["prompt"]
        facts = olmoe.ask(prompt, surrogate=surrogate, alpha=0.5)[1]
        assert number not in numbers(facts)
        assert len(numbers(facts)) == 3
        assert all(n["similarity"] <= 0.95 for n in facts["neighbours"])
        kept = olmoe.ask(prompt, surrogate=surrogate, alpha=0.5, max_similarity=1.0)[1]["neighbours"]
        assert kept[0]["record"] == number
        assert kept[0]["similarity"] == pytest.approx(1, abs=1e-3)


def test_an_eps_ball_holds_those_that_are_near_enough(olmoe):
    sizes = set()
    for seed in range(4):
        _, _, pooled = olmoe.read(text(seed))
        distances = [f[2] for f in olmoe.plain.nearest(pooled, 24, "all")]
        eps = (distances[3] + distances[4]) / 2 if seed % 2 else (distances[1] + distances[2]) / 2
        facts = olmoe.ask(text(seed), surrogate="kernel_regression", alpha=0.5, eps=eps, k=20)[1]
        expected = olmoe.plain.nearest(pooled, 20, "all", eps=eps)
        assert numbers(facts) == [f[0] for f in expected]
        sizes.add(len(expected))
    assert sizes == {2, 4}


def test_alpha_has_the_least_loss_of_a_grid(case):
    """Losses by a plain model whose routers are overridden by hand."""
    inner, fine = 0, 4 if "Olmoe" in type(case.model).__name__ else 1
    for seed in (10, 24):
        count = 2 if fine == 1 else 1  # one neighbour: few flips of a top-k, one valley
        _, omega, pooled = case.read(text(seed))
        state, facts, _ = case.ask(text(seed), surrogate="kernel_regression", k=count)
        found = case.plain.nearest(pooled, count, "all")
        weights = kernel("gaussian", found)
        mean = torch.from_numpy(case.plain.mean_pathway(found, weights))
        core = heaviest(omega, case.first, CORE)

        def loss(alpha, omega=omega, mean=mean, core=core, found=found, weights=weights):
            mixed = torch.where(core, alpha * omega + (1 - alpha) * mean, omega)
            return float(case.loss(found, weights, mixed))

        with torch.no_grad():
            grid = [loss(i / (10 * fine)) for i in range(10 * fine + 1)]
            assert facts["loss_after"] == pytest.approx(loss(facts["alpha"]), abs=1e-6)
        assert facts["loss_before"] == pytest.approx(grid[-1], abs=1e-6)
        assert facts["loss_after"] <= min(grid[::fine]) + 1e-6
        turns = sum((b - a) * (c - b) < 0 for a, b, c in zip(grid, grid[1:], grid[2:], strict=False))
        if fine > 1 and turns <= 1:  # one valley
            assert facts["loss_after"] <= min(grid) + 1e-6
            inner += 0 < facts["alpha"] < 1
        mixed = torch.where(core, facts["alpha"] * omega + (1 - facts["alpha"]) * mean, omega)
        torch.testing.assert_close(state["value"], mixed, atol=1e-6, rtol=0)
    assert inner or fine == 1, "no valley inside: the test cannot tell"


# --- neighbourhood gradient descent -----------------------------------------------------------------------


@pytest.fixture
def slope(monkeypatch):
    """Where the descent began and the gradient of its loss there, as the implementation has it."""
    kept = {}
    original = c3po_run.descend

    def watched(loss, start, *rest, **more):
        leaf = start.clone().requires_grad_(True)
        with torch.enable_grad():
            (kept["gradient"],) = torch.autograd.grad(loss(leaf).sum(), leaf)
        kept["start"] = start
        return original(loss, start, *rest, **more)

    monkeypatch.setattr(c3po_run, "descend", watched)
    return kept


def test_gradient_equals_finite_differences(case, slope):
    _, omega, pooled = case.read(text(0))
    case.ask(text(0), steps=1, k=2)
    gradient = slope["gradient"][0]
    assert same(slope["start"][0], omega)
    assert not gradient[: case.first].any()
    assert bool((gradient[case.first :].abs().amax(1) > 1e-6).all())
    found = case.plain.nearest(pooled, 2, "all")
    weights, step = kernel("gaussian", found), 1e-7
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        direction = torch.randn(omega.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            up, down = (float(case.loss(found, weights, omega + s * step * direction)) for s in (1, -1))
        assert float((gradient * direction).sum()) == pytest.approx((up - down) / (2 * step), rel=1e-4, abs=1e-6)


def descended(start, core, loss, steps, lr, lowest=-float("inf"), highest=float("inf")):
    """`(x, losses)`: torch's Adam under its cosine schedule, from `lr` in the first step to 1e-5 in the last."""
    x = start.clone().requires_grad_(True)
    optimiser = torch.optim.Adam([x], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=max(1, steps - 1), eta_min=1e-5)
    losses = []
    for _ in range(steps):
        value = loss(x)
        losses.append(float(value.detach()))
        (slope,) = torch.autograd.grad(value, x)
        x.grad = torch.where(core, slope, 0)
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            x.copy_(torch.where(core, x.clamp(lowest, highest), x))
    return x.detach(), losses


def test_descent_equals_torch_adam_on_a_plain_model(case):
    for seed, options in ((1, {"steps": 10, "k": 1}), (2, {"steps": 3, "k": 3, "lr": 0.05})):
        _, omega, pooled = case.read(text(seed))
        state, facts, _ = case.ask(text(seed), **options)
        found = case.plain.nearest(pooled, options["k"], "all")
        weights, core = kernel("gaussian", found), heaviest(omega, case.first, CORE)
        expected, losses = descended(
            omega,
            core,
            lambda x, found=found, weights=weights: case.loss(found, weights, x),
            options["steps"],
            options.get("lr", 1e-2),
            **case.limits,
        )
        assert numbers(facts) == [f[0] for f in found]
        torch.testing.assert_close(state["value"], expected, atol=1e-6, rtol=0)
        assert same(state["value"][~core], omega[~core])
        assert facts["curve"] == pytest.approx(losses, abs=1e-6)
        with torch.no_grad():
            after = float(case.loss(found, weights, expected))
        assert (facts["loss_before"], facts["loss_after"]) == pytest.approx((losses[0], after), abs=1e-6)
    assert all(p.grad is None for p in case.model.parameters())


def test_a_set_that_holds_the_question_itself_teaches_its_answer(case):
    """Allowed with `max_similarity=1` only. The answer's loss is taken by hand, on the question itself."""
    for number in (4,) if case.sites == 3 else (9,):
        prompt, ids, answer = (x[number] for x in (case.plain.records, case.plain.prompts, case.plain.answers))
        omega, _ = read_alone(case.model, ids)
        state, facts, _ = case.ask(prompt["prompt"], k=1, max_similarity=1.0)
        assert numbers(facts) == [number]
        with torch.no_grad():
            before, after = (
                float(answer_loss(case.model, ids, answer, w, case.first)) for w in (omega, state["value"])
            )
        assert (facts["loss_before"], facts["loss_after"]) == pytest.approx((before, after), abs=1e-6)
        assert after < before
        # the same through the strategy: a forward over question and answer
        strategy = case.strategy(k=1, max_similarity=1.0)
        with ttr.adapt(case.model, strategy, no_harm=False, tokenizer=case.tokenizer) as adapted:
            adapted.generate(torch.tensor([ids]), max_new_tokens=1, do_sample=False)
            logits = adapted(torch.tensor([[*ids, *answer]]), state=adapted.state).logits[0, len(ids) - 1 : -1]
        assert float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer))) == pytest.approx(
            after, abs=1e-6
        )


@pytest.mark.parametrize("scope", ["last_prompt_token", "all"])
def test_the_oracle_lowers_the_loss_of_the_label(case, scope):
    ids, omega, _ = case.read(text(5))
    label = "yes ("
    answer = case.tokenizer(label)["input_ids"]
    lr = 0.02 if scope == "all" else 0.01
    state, facts, _ = case.ask(
        text(5), no_harm=True, surrogate="oracle", labels=(label,), scope=scope, lr=lr, steps=5
    )
    core = heaviest(omega, case.first, CORE)
    if scope == "all":
        start, limits = torch.zeros_like(omega), {}

        def loss(x):
            return answer_loss_under(case.model, ids, answer, x)
    else:
        start, limits = omega, case.limits

        def loss(x):
            return answer_loss(case.model, ids, answer, x, case.first)

    expected, losses = descended(start, core, loss, 5, lr, **limits)
    torch.testing.assert_close(state["value"], expected, atol=1e-6, rtol=0)
    assert facts["curve"] == pytest.approx(losses, abs=1e-6)
    assert facts["loss_after"] < facts["loss_before"]
    assert facts["outcome"] == "accepted"
    assert "neighbours" not in facts


def test_a_delta_for_the_whole_sequence_is_fitted_to_whole_texts(case):
    _, omega, pooled = case.read(text(6))
    state, facts, _ = case.ask(text(6), scope="all", steps=4, k=2)
    found = case.plain.nearest(pooled, 2, "all")
    weights, core = kernel("gaussian", found), heaviest(omega, case.first, CORE)

    def loss(delta):
        texts = [(case.plain.prompts[i], case.plain.answers[i]) for i, _, _ in found]
        parts = [answer_loss_under(case.model, *pair, delta) for pair in texts]
        return sum(w * part for w, part in zip(weights, parts, strict=True))

    expected, losses = descended(torch.zeros_like(omega), core, loss, 4, 0.1)
    torch.testing.assert_close(state["value"], expected, atol=1e-6, rtol=0)
    assert facts["curve"] == pytest.approx(losses, abs=1e-6)
    assert not state["value"][~core].any()


def test_a_delta_of_kernel_regression_leads_from_the_own_scores_to_the_mixed_ones(case):
    _, omega, pooled = case.read(text(7))
    state, _, _ = case.ask(text(7), scope="all", surrogate="kernel_regression", alpha=0.4)
    found = case.plain.nearest(pooled, 3, "all")
    mean = torch.from_numpy(case.plain.mean_pathway(found, kernel("gaussian", found)))
    core = heaviest(omega, case.first, CORE)
    mixed = 0.4 * omega + 0.6 * mean
    sigmoid = "Deepseek" in type(case.model).__name__
    apart = (mixed / (1 - mixed)).log() - (omega / (1 - omega)).log() if sigmoid else mixed.log() - omega.log()
    torch.testing.assert_close(state["value"], torch.where(core, apart, 0), atol=1e-5, rtol=0)


# --- what was fitted is what the model gets ---------------------------------------------------------------


def test_next_token_divergence_is_that_of_the_two_forwards(case):
    ids, _, _ = case.read(text(8))
    state, facts, out = case.ask(text(8), surrogate="kernel_regression", alpha=0.2)
    with torch.no_grad():
        base = whole(case.model, ids)[-1].log_softmax(-1)
        with overridden(case.model, state["value"], len(ids) - 1, case.first):
            new = whole(case.model, ids)[-1].log_softmax(-1)
    assert facts["kl"] == pytest.approx(float((new.exp() * (new - base)).sum()), abs=1e-8)
    torch.testing.assert_close(out.logits[0][0].double().log_softmax(-1), new, atol=1e-5, rtol=0)


def test_layers_and_core_experts_limit_what_moves(olmoe):
    _, omega, _ = olmoe.read(text(9))
    for layers, first in (("last:1", 3), ("last:3", 1), ("last:9", 0), ("all", 0)):
        for amount, count in ((1, 1), (0.5, 4)) if first else ((8, 8), (1.0, 8)):
            how = {"surrogate": "kernel_regression", "alpha": 0.0, "layers": layers, "core_experts": amount}
            state, facts, _ = olmoe.ask(text(9), **how)
            moved = (state["value"] - omega).abs() > 1e-12
            core = heaviest(omega, first, count)
            assert not moved[~core].any()
            assert moved[core].all()
            assert facts["layers"] == [f"model.layers.{i}.mlp" for i in range(first, 4)]
