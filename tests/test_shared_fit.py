"""One delta for many texts: its loss and gradient against a plain model, torch's Adam, and what each part may see."""

import random

import pytest
import torch
import torch.nn.functional as F

import ttrouting as ttr
from oracles.c3po import answer_loss_under, whole
from oracles.double import build_double
from oracles.plain_router import plain_routing
from ttrouting.shared_fit import fit_shared_delta, split_pairs

pytestmark = pytest.mark.usefixtures("true_double")
L, E = 4, 8
LETTERS = "abcdefghijklmnop (){}"


def make_pairs(count=16, seed=0, answers=("yes", "(a)")):
    """Random questions of several lengths with few answers, which one delta can make likelier."""
    draw = random.Random(seed)
    return [
        ("".join(draw.choice(LETTERS) for _ in range(draw.randint(3, 12))), draw.choice(answers))
        for _ in range(count)
    ]


PAIRS = make_pairs()


@pytest.fixture(scope="module", params=["olmoe", "deepseek_v3"])
def model(request):
    return build_double(request.param)


@pytest.fixture(scope="module")
def olmoe_double():
    return build_double("olmoe")


@pytest.fixture
def gradients(monkeypatch):
    """Each gradient that Adam was given, `[1, L, E]`."""
    kept = []

    class Watched(torch.optim.Adam):
        def step(self, *args, **more):
            kept.append(self.param_groups[0]["params"][0].grad.clone())
            return super().step(*args, **more)

    monkeypatch.setattr(torch.optim, "Adam", Watched)
    return kept


def encoded(tokenizer, pair):
    return tokenizer(pair[0])["input_ids"], tokenizer(pair[1], add_special_tokens=False)["input_ids"]


def plain_loss(model, tokenizer, pairs, delta):
    """Mean over pairs of the mean loss of an answer's tokens, each text alone and unpadded."""
    return sum(answer_loss_under(model, *encoded(tokenizer, pair), delta) for pair in pairs) / len(pairs)


def zeros(model):
    sites = ttr.find_sites(model)
    return torch.zeros(len(sites), max(s.num_experts for s in sites), dtype=torch.float64)


# --- loss and gradient ------------------------------------------------------------------------------------


def test_the_gradient_equals_finite_differences(model, tokenizer, gradients):
    fit = fit_shared_delta(model, tokenizer, PAIRS, steps=1, lr=1e-3)
    (gradient,) = gradients
    own = [PAIRS[i] for i in fit.fit.numbers]
    generator, step = torch.Generator().manual_seed(0), 1e-7
    for _ in range(2):
        direction = torch.randn(zeros(model).shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            up, down = (float(plain_loss(model, tokenizer, own, s * step * direction)) for s in (1, -1))
        assert float((gradient[0] * direction).sum()) == pytest.approx((up - down) / (2 * step), rel=1e-4, abs=1e-7)
    assert bool((gradient[0].abs().amax(1) > 1e-6).all())


def test_softmax_routers_do_not_feel_a_constant(olmoe_double, tokenizer, gradients):
    fit_shared_delta(olmoe_double, tokenizer, PAIRS, steps=3)
    assert len(gradients) == 3
    for gradient in gradients:
        assert float(gradient.sum(-1).abs().max()) < 1e-12


def test_losses_and_right_answers_are_those_of_a_plain_model(model, tokenizer):
    fit = fit_shared_delta(model, tokenizer, PAIRS, steps=10, lr=0.1, batch_size=5)
    assert fit.step
    for part in (fit.fit, fit.stop, fit.held):
        for told, delta in ((part.before, zeros(model)), (part.after, fit.delta)):
            for number, loss, right in zip(part.numbers, told.losses, told.right, strict=True):
                prompt, answer = encoded(tokenizer, PAIRS[number])
                with torch.no_grad(), plain_routing(model, delta):
                    logits = whole(model, [*prompt, *answer])[len(prompt) - 1 : -1]
                assert loss == pytest.approx(float(F.cross_entropy(logits, torch.tensor(answer))), abs=1e-9)
                assert right == (logits.argmax(-1).tolist() == answer)
    assert fit.fit.after.loss < fit.fit.before.loss
    assert fit.checks[-1][1] < fit.checks[0][1]


def test_steps_equal_torch_adam_on_a_plain_model(olmoe_double, tokenizer):
    fit = fit_shared_delta(olmoe_double, tokenizer, PAIRS, steps=3, lr=0.05)
    assert fit.step == 3
    own = [PAIRS[i] for i in fit.fit.numbers]
    delta = zeros(olmoe_double).requires_grad_(True)
    optimiser = torch.optim.Adam([delta], lr=0.05)
    curve = []
    for _ in range(3):
        loss = plain_loss(olmoe_double, tokenizer, own, delta)
        curve.append(float(loss.detach()))
        (delta.grad,) = torch.autograd.grad(loss, delta)
        optimiser.step()
    torch.testing.assert_close(fit.delta, delta.detach(), atol=1e-7, rtol=0)
    assert fit.curve == pytest.approx(curve, abs=1e-9)


def test_layers_that_are_not_chosen_stay_at_zero(olmoe_double, tokenizer):
    fit = fit_shared_delta(olmoe_double, tokenizer, PAIRS, steps=5, layers="last:2")
    assert fit.first == 2
    assert not fit.delta[:2].any()
    assert bool((fit.delta[2:].abs().amax(1) > 0).all())


# --- what each part sees ----------------------------------------------------------------------------------


def test_parts_cover_all_pairs_once():
    for count, share in ((8, 0.25), (8, 0.9), (100, 0.25), (57, 0.1)):
        fit, stop, held = split_pairs(count, share, 3)
        assert sorted(fit + stop + held) == list(range(count))
        assert fit
        assert stop
        assert held
    assert [len(part) for part in split_pairs(100, 0.25, 0)] == [60, 15, 25]
    assert split_pairs(100, 0.25, 0) != split_pairs(100, 0.25, 1)


def test_held_out_answers_change_nothing(olmoe_double, tokenizer):
    options = {"steps": 10, "lr": 0.1, "batch_size": 4}
    one = fit_shared_delta(olmoe_double, tokenizer, PAIRS, **options)
    held = set(one.held.numbers)
    others = [(p, "}}}}" if i in held else a) for i, (p, a) in enumerate(PAIRS)]
    two = fit_shared_delta(olmoe_double, tokenizer, others, **options)
    assert torch.equal(one.delta, two.delta)
    assert (one.step, one.curve, one.checks) == (two.step, two.curve, two.checks)
    assert one.held.before.losses != two.held.before.losses


def test_the_step_with_the_lowest_loss_of_the_stop_part_is_taken(olmoe_double, tokenizer):
    """A rate so large that later steps lose again; after four looks without a lower loss it ends."""
    fit = fit_shared_delta(olmoe_double, tokenizer, PAIRS, steps=200, lr=2.0)
    step, loss = min(fit.checks, key=lambda check: check[1])
    assert fit.step == step
    assert fit.stop.after.loss == pytest.approx(loss, abs=1e-12)
    assert len(fit.curve) == step + 20 < 200


def test_nothing_is_fitted_where_enough_is_right(olmoe_double, tokenizer):
    fit = fit_shared_delta(olmoe_double, tokenizer, PAIRS, enough=0.0)
    assert (fit.step, fit.curve, len(fit.checks)) == (0, [], 1)
    assert not fit.delta.any()
    assert fit.held.before == fit.held.after


# --- no trace, bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, KeyboardInterrupt()], ids=["whole", "interrupted"])
def test_nothing_is_left_behind(olmoe_double, tokenizer, untouched, error):
    def progress(step, loss):
        if error is not None and step == 2:
            raise error

    with untouched(olmoe_double):
        if error is None:
            fit_shared_delta(olmoe_double, tokenizer, PAIRS, steps=3, progress=progress)
        else:
            with pytest.raises(KeyboardInterrupt):
                fit_shared_delta(olmoe_double, tokenizer, PAIRS, steps=3, progress=progress)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": "highest:0.5"}, "must be 'last:N' or 'all', got 'highest:0.5'"),
        ({"steps": -1}, r"shared_fit\.steps must be in"),
        ({"held_out": 0}, r"shared_fit\.held_out must be in \(0, 0\.9\]"),
        ({"pairs": PAIRS[:7]}, "at least 8 pairs, got 7"),
        ({"pairs": [*PAIRS, ("a", "")]}, "pair 16 has no token"),
        ({"pairs": [*PAIRS, ("a" * 5000, "b")]}, "pair 16 has 5001 tokens, the model's context"),
    ],
    ids=str,
)
def test_wrong_requests(olmoe_double, tokenizer, untouched, options, words):
    with untouched(olmoe_double), pytest.raises(ttr.ConfigError, match=words):
        fit_shared_delta(olmoe_double, tokenizer, options.pop("pairs", PAIRS), **options)


def test_models_that_are_refused(olmoe_double, tokenizer):
    with ttr.adapt(olmoe_double, ttr.StaticRouting()) as adapted, pytest.raises(ttr.ConfigError, match="not adapted"):
        fit_shared_delta(adapted, tokenizer, PAIRS)
    with pytest.raises(ttr.UnsupportedCallError, match="training mode"):
        fit_shared_delta(build_double("olmoe").train(), tokenizer, PAIRS)
