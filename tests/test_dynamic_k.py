"""Dynamic-k against its rules in plain loops, on a model routed by hand."""

import json
from math import log

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ttrouting as ttr
from oracles.double import build_double
from oracles.plain_router import full_logits, plain_routing, top_k_rule
from ttrouting.calibration import PLACES

torch.set_num_threads(1)


pytestmark = pytest.mark.usefixtures("true_double")


@pytest.fixture(scope="module", params=["olmoe", "mixtral", "deepseek_v3"])
def model(request):
    return build_double(request.param)


@pytest.fixture(scope="module")
def olmoe():
    return build_double("olmoe")


class Words:
    """A tokenizer of one token a letter."""

    def __call__(self, text, return_tensors):
        return {"input_ids": torch.tensor([[3 + ord(c) % 90 for c in text]])}


TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "pack my box with five dozen liquor jugs",
    "sphinx of black quartz, judge my vow",
]


def prompt(seed=0, rows=1, length=20):
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


def kept_by(rule, pi, weights, all_pi, p=0.8, beta=0.5, threshold=0.005, sensitivity=1.0, tau=0.9, q=1.1, k_min=1):
    """One token: which of the chosen experts stay, best first. Plain Python floats."""
    order = sorted(range(len(pi)), key=lambda j: -pi[j])
    keep = set(order[:k_min])
    if rule == "entropy":
        entropy = (1 - sum(x**q for x in all_pi)) / (q - 1)
        most = (1 - len(all_pi) * (1 / len(all_pi)) ** q) / (q - 1)
        if entropy / most > tau:
            return set(order)
    if rule in ("top_p", "entropy"):
        total = 0.0
        for j in order:
            if total < p:
                keep.add(j)
            total += pi[j]
    elif rule == "relative":
        keep |= {j for j in order if weights[j] >= beta * max(weights)}
    elif rule == "sensitivity":
        keep |= {j for j in order if weights[j] >= (threshold / sensitivity) ** 0.5}
    return keep


def plain_rule(rule, counts, gate=None, renormalise=None, **options):
    """A router rule with experts dropped by the loop above; counts experts kept."""

    def route(router, scores, choice):
        ids, weights = top_k_rule(router, scores, choice)
        all_pi = scores / scores.sum(-1, keepdim=True)
        pi = all_pi.gather(1, ids)
        new = torch.zeros_like(weights)
        for t in range(len(ids)):
            keep = kept_by(rule, pi[t].tolist(), weights[t].tolist(), all_pi[t].tolist(), **options)
            if gate is not None and float(all_pi[t].max()) < gate:
                keep = set(range(ids.shape[1]))
            for j in keep:
                new[t, j] = weights[t, j]
            counts.append(len(keep))
        family = "Mixtral" in type(router).__name__ or getattr(router, "norm_topk_prob", False)
        if family if renormalise is None else renormalise:
            new = new / new.sum(-1, keepdim=True) * weights.sum(-1, keepdim=True)
        return ids, new

    return route


CASES = [
    ("top_p", {"p": 0.5}),
    ("top_p", {"p": 0.35, "k_min": 2}),
    ("relative", {"beta": 0.6}),
    ("sensitivity", {"threshold": 0.04, "sensitivity": 1.0}),
    ("entropy", {"p": 0.3, "tau": 0.8, "k_min": 1}),
]


@pytest.mark.parametrize(("rule", "options"), CASES)
def test_each_rule_equals_its_loop(model, rule, options):
    ids = prompt()
    counts = []
    with torch.no_grad(), plain_routing(model, rule=plain_rule(rule, counts, **options)):
        expected = full_logits(model, ids)
    options = dict(options)
    if rule == "sensitivity":
        options["sensitivity"] = (options["sensitivity"],) * len(ttr.find_sites(model))
    with ttr.adapt(model, ttr.DynamicK(rule=rule, **options)) as adapted:
        assert torch.allclose(adapted(input_ids=ids).logits, expected, atol=1e-8)
    assert 1 < sum(counts) / len(counts) < 3, "nothing or everything was dropped: the test cannot tell"


@pytest.mark.parametrize(("how", "renormalise"), [("always", True), ("never", False)])
def test_renormalisation_can_be_forced(model, how, renormalise):
    ids = prompt(1)
    with torch.no_grad(), plain_routing(model, rule=plain_rule("top_p", [], p=0.5, renormalise=renormalise)):
        expected = full_logits(model, ids)
    with ttr.adapt(model, ttr.DynamicK(p=0.5, renormalize=how)) as adapted:
        assert torch.allclose(adapted(input_ids=ids).logits, expected, atol=1e-8)


def test_the_gate_keeps_every_expert_of_unsure_tokens(olmoe):
    ids = prompt(2)
    counts = []
    with torch.no_grad(), plain_routing(olmoe, rule=plain_rule("top_p", counts, p=0.3, gate=0.5)):
        expected = full_logits(olmoe, ids)
    with ttr.adapt(olmoe, ttr.DynamicK(p=0.3, gate=0.5)) as adapted:
        assert torch.allclose(adapted(input_ids=ids).logits, expected, atol=1e-8)
    assert 1 in counts
    assert 3 in counts


def test_the_report_counts_experts_of_real_tokens(olmoe):
    ids = prompt(3, rows=2)
    mask = torch.ones_like(ids)
    mask[1, :8] = 0
    with ttr.adapt(olmoe, ttr.DynamicK(p=0.5)) as adapted:
        out = adapted.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=95, pad_token_id=0
        )
        report = adapted.report
    for row, start in ((0, 0), (1, 8)):
        counts = []
        with torch.no_grad(), plain_routing(olmoe, rule=plain_rule("top_p", counts, p=0.5)):
            full_logits(olmoe, out[row : row + 1, start:-1])  # the last token is never read
        tokens = len(counts) // 4
        per_layer = [sum(counts[i * tokens : (i + 1) * tokens]) / tokens for i in range(4)]
        assert report.sequences[row].experts_per_layer == pytest.approx(per_layer)
        assert report.sequences[row].experts_per_token == pytest.approx(sum(per_layer) / 4)


def test_p_one_is_the_identity_and_a_live_rule_that_drops_nothing_keeps_the_bits(model):
    ids = prompt(4)
    base = model(input_ids=ids).logits
    with ttr.adapt(model, ttr.DynamicK(p=1.0)) as adapted:
        assert adapted.strategies == ()
    with ttr.adapt(model, ttr.DynamicK(p=0.3, k_min=3)) as adapted:
        assert adapted.strategies != ()
        assert torch.equal(adapted(input_ids=ids).logits, base)


@pytest.mark.parametrize("rule", ["top_p", "relative", "sensitivity", "entropy"])
def test_calibration_meets_the_requested_mean(olmoe, rule):
    options = {"tau": 0.5, "k_min": 1} if rule == "entropy" else {}
    wanted = 2.6 if rule == "entropy" else 2.0
    strategy = ttr.calibrate(olmoe, Words(), TEXTS, mean_k=wanted, rule=rule, tolerance=0.05, **options)
    counts, kls = [], []
    plain = {
        "top_p": {"p": strategy.p},
        "relative": {"beta": strategy.beta},
        "entropy": {"p": strategy.p, "tau": 0.5},
    }
    for text in TEXTS:
        ids = Words()(text, "pt")["input_ids"]
        if rule == "sensitivity":  # one value a layer: the loop has to know where it is
            layers = iter(strategy.sensitivity)

            def route(router, scores, choice, layers=layers):
                return plain_rule(rule, counts, threshold=strategy.threshold, sensitivity=next(layers))(
                    router, scores, choice
                )
        else:
            route = plain_rule(rule, counts, **plain[rule])
        with torch.no_grad(), plain_routing(olmoe, rule=route):
            thin = full_logits(olmoe, ids)[0].log_softmax(-1)
        base = full_logits(olmoe, ids)[0].detach().log_softmax(-1)
        assert ids.shape[1] <= PLACES  # all tokens are looked at
        kls += (base.exp() * (base - thin)).sum(-1).tolist()
    assert sum(counts) / len(counts) == pytest.approx(wanted, abs=0.05)
    assert strategy.calibration.mean_k == pytest.approx(sum(counts) / len(counts))
    assert strategy.calibration.kl == pytest.approx(sum(kls) / len(kls), abs=1e-7)
    assert strategy.calibration.kl_high == pytest.approx(np.quantile(kls, 0.95), abs=1e-6)


def test_sensitivities_are_squared_gradients_of_the_moe_outputs(olmoe):
    strategy = ttr.calibrate(olmoe, Words(), TEXTS[:1], mean_k=2.0, rule="sensitivity", tolerance=0.1)
    ids = Words()(TEXTS[0], "pt")["input_ids"]
    # finite differences along random directions estimate each squared gradient norm
    generator = torch.Generator().manual_seed(0)
    estimates = []
    for layer in olmoe.model.layers:
        squares = []
        for _ in range(60):
            direction = torch.randn(1, ids.shape[1], 32, generator=generator, dtype=torch.float64)
            losses = []
            for sign in (1, -1):
                handle = layer.mlp.register_forward_hook(lambda _m, _a, out, d=sign * 1e-6 * direction: out + d)
                with torch.no_grad():
                    logits = full_logits(olmoe, ids)
                handle.remove()
                losses.append(float(F.cross_entropy(logits[0, :-1], ids[0, 1:])))
            squares.append(((losses[0] - losses[1]) / 2e-6) ** 2)
        estimates.append(sum(squares) / len(squares))
    mean = sum(estimates) / len(estimates)
    # 60 directions: the estimate of a squared norm scatters by sqrt(2 / 60), about 18 %
    assert strategy.sensitivity == pytest.approx([e / mean for e in estimates], rel=0.6)
    assert sum(strategy.sensitivity) / 4 == pytest.approx(1)


def test_a_prompt_far_from_calibration_keeps_every_expert(olmoe):
    strategy = ttr.calibrate(olmoe, Words(), TEXTS, mean_k=2.9)
    strict = ttr.DynamicK(p=0.2, calibration=strategy.calibration)  # far more is dropped than was calibrated
    ids = prompt(5)
    with ttr.adapt(olmoe, strict) as adapted:
        out = adapted.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
        facts = adapted.report.sequences[0]
    assert facts.strategies["dynamic_k"]["outcome"].startswith("rolled back")
    assert facts.experts_per_token == 3
    assert torch.equal(out, olmoe.generate(ids, max_new_tokens=6, do_sample=False))
    with ttr.adapt(olmoe, strict, no_harm=False) as adapted:
        adapted.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
        assert adapted.report.sequences[0].experts_per_token < 3


def test_an_impossible_mean_names_the_range(olmoe):
    with pytest.raises(ttr.ConfigError, match=r"it gives 1\.00 to 3\.00"):
        ttr.calibrate(olmoe, Words(), TEXTS, mean_k=3.5)


def test_a_calibration_belongs_to_one_model(olmoe):
    strategy = ttr.calibrate(olmoe, Words(), TEXTS[:1], mean_k=2.0)
    other = build_double("olmoe", seed=5)
    with pytest.raises(ttr.UnsupportedModelError, match="another model"):
        ttr.adapt(other, strategy)


def test_tsallis_entropy_tends_to_shannon():
    from ttrouting.strategies.dynamic_k import tsallis

    pi = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64)
    shannon = -sum(x * log(x) for x in (0.7, 0.2, 0.1)) / log(3)
    assert float(tsallis(pi, 1.0)) == pytest.approx(shannon)
    assert float(tsallis(pi, 1.0001)) == pytest.approx(shannon, rel=1e-3)
    assert float(tsallis(torch.full((1, 8), 0.125, dtype=torch.float64), 1.1)) == pytest.approx(1)


def test_json_round_trip(olmoe):
    for strategy in (ttr.DynamicK(rule="entropy"), ttr.calibrate(olmoe, Words(), TEXTS[:1], 2.0, rule="sensitivity")):
        assert ttr.DynamicK.from_dict(json.loads(json.dumps(strategy.to_dict()))) == strategy


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"p": 0}, "p must be in (0, 1], got 0"),
        ({"p": 1.2}, "got 1.2"),
        ({"rule": "topp"}, "Did you mean 'top_p'"),
        ({"renormalize": "yes"}, "Known: always, family, never"),
        ({"k_min": 0}, "k_min must be"),
        ({"gate": 2}, "gate must be in [0, 1], got 2"),
    ],
)
def test_options_out_of_range_are_named(options, words):
    with pytest.raises(ttr.ConfigError) as error:
        ttr.DynamicK(**options)
    assert words in str(error.value)


def test_sensitivity_needs_calibration(olmoe):
    with pytest.raises(ttr.ConfigError, match=r"ttr\.calibrate"):
        ttr.adapt(olmoe, ttr.DynamicK(rule="sensitivity"))
