"""SCMoE against two full forwards without a cache, the weak one routed by hand."""

import json
from math import log

import pytest
import torch
from transformers import LogitsProcessor

import ttrouting as ttr
from oracles.double import build_double
from oracles.plain_router import family_weights, full_logits, plain_routing, top_k_rule

torch.set_num_threads(1)


pytestmark = pytest.mark.usefixtures("true_double")


@pytest.fixture(scope="module", params=["olmoe", "mixtral", "deepseek_v3"])
def model(request):
    return build_double(request.param)


@pytest.fixture(scope="module")
def olmoe():
    return build_double("olmoe")


def prompt(seed=0, rows=1, length=12):
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


def rank_rule(rank):
    """Only the expert of this rank. Its weight: the family's usual sum, or its raw score."""

    def rule(router, scores, choice):
        one = choice.sort(-1, descending=True).indices[:, rank - 1 : rank]
        usual = top_k_rule(router, scores, choice)[1].sum(-1, keepdim=True)
        renormalises = "Mixtral" in type(router).__name__ or router.norm_topk_prob
        return one, usual if renormalises else scores.gather(1, one) * getattr(router, "routed_scaling_factor", 1.0)

    return rule


def top_rule(count):
    """The first few experts, weighted as the family weights a choice of that size; sum as usual."""

    def rule(router, scores, choice):
        some = choice.sort(-1, descending=True).indices[:, :count]
        return some, family_weights(router, scores.gather(1, some))

    return rule


def plain_scores(strong, weak, alpha, beta):
    """The paper's formula, token by token."""
    best = float(strong.max())
    return torch.tensor(
        [
            (1 + beta) * s - beta * w if s >= log(alpha) + best else float("-inf")
            for s, w in zip(strong, weak, strict=True)
        ]
    )


@torch.no_grad()
def plain_decode(model, ids, steps, rule, alpha=0.1, beta=0.5, delta=None):
    for _ in range(steps):
        with plain_routing(model, delta):
            strong = full_logits(model, ids)[0, -1]
        with plain_routing(model, delta, rule):
            weak = full_logits(model, ids)[0, -1]
        ids = torch.cat([ids, plain_scores(strong, weak, alpha, beta).argmax()[None, None]], 1)
    return ids


def decode(model, ids, strategies, steps=16, no_harm=False, **options):
    with ttr.adapt(model, strategies, no_harm=no_harm) as adapted:
        return adapted.generate(input_ids=ids, max_new_tokens=steps, do_sample=False, **options)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_greedy_tokens_equal_two_forwards_without_a_cache(model, rank):
    ids = prompt(rank)
    out = decode(model, ids, ttr.SCMoE(beta=0.9, weak=f"rank:{rank}"))
    assert torch.equal(out, plain_decode(model, ids, 16, rank_rule(rank), beta=0.9))


def test_a_rank_beyond_the_chosen_experts(olmoe):
    ids = prompt(5)
    out = decode(olmoe, ids, ttr.SCMoE(beta=0.9, weak="rank:5"))
    assert torch.equal(out, plain_decode(olmoe, ids, 16, rank_rule(5), beta=0.9))


def test_it_differs_from_greedy(olmoe):
    """Or the test above proves nothing."""
    outputs = [decode(olmoe, prompt(s), ttr.SCMoE(beta=0.9)) for s in range(4)]
    plain = [olmoe.generate(prompt(s), max_new_tokens=16, do_sample=False) for s in range(4)]
    assert not all(torch.equal(a, b) for a, b in zip(outputs, plain, strict=True))


@pytest.mark.parametrize("count", [1, 2])
def test_top_n(model, count):
    ids = prompt(7)
    out = decode(model, ids, ttr.SCMoE(beta=0.9, weak=f"top:{count}"))
    assert torch.equal(out, plain_decode(model, ids, 16, top_rule(count), beta=0.9))


def test_weak_equal_to_strong_gives_strong_logits(model):
    ids = prompt(8)
    with ttr.adapt(model, ttr.SCMoE(weak="top:3", alpha=1e-30), no_harm=False) as adapted:
        out = adapted.generate(
            input_ids=ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    for step, logits in enumerate(out.logits):
        expected = full_logits(model, out.sequences[:, : 12 + step])[:, -1]
        assert torch.allclose(logits.double(), expected, atol=1e-5)


def test_the_mask_is_exact_on_given_logits():
    from ttrouting.strategies.scmoe import contrast

    generator = torch.Generator().manual_seed(0)
    strong, weak = (3 * torch.randn(50, generator=generator, dtype=torch.float64) for _ in range(2))
    for alpha, beta in ((0.1, 0.5), (0.5, 0.9), (1.0, 0.3), (0.01, 0.1)):
        expected = plain_scores(strong, weak, alpha, beta).double()
        assert torch.allclose(contrast(strong, weak, alpha, beta), expected)
    assert torch.isfinite(contrast(strong, weak, 0.1, 0.5, mask=False)).all()


def test_logits_on_the_way_to_processors_follow_the_formula(olmoe):
    seen = []

    class Spy(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append((input_ids.clone(), scores.clone()))
            return scores

    decode(olmoe, prompt(9, rows=2), ttr.SCMoE(), steps=3, logits_processor=[Spy()])
    for ids, scores in seen:
        assert scores.shape == (2, 96)
        for row in range(2):
            one = ids[row : row + 1]
            with plain_routing(olmoe):
                strong = full_logits(olmoe, one)[0, -1]
            with plain_routing(olmoe, rule=rank_rule(2)):
                weak = full_logits(olmoe, one)[0, -1]
            expected = plain_scores(strong, weak, 0.1, 0.5).softmax(-1)
            assert torch.allclose(scores[row].softmax(-1).double(), expected.double(), atol=1e-5)


def test_where_every_plausible_token_is_banned_the_strong_order_decides(olmoe):
    ids = prompt(11)
    with plain_routing(olmoe):
        strong = full_logits(olmoe, ids)[0, -1]
    plausible = (strong >= log(0.1) + strong.max()).nonzero().flatten().tolist()
    allowed = [t for t in range(96) if t not in plausible]
    out = decode(olmoe, ids, ttr.SCMoE(), steps=1, prefix_allowed_tokens_fn=lambda _row, _ids: allowed)
    assert int(out[0, -1]) == max(allowed, key=lambda t: float(strong[t]))


def test_the_end_of_a_sequence_is_never_banned(olmoe):
    ids = prompt(12)
    free = decode(olmoe, ids, ttr.SCMoE(), steps=6)
    third = int(free[0, 14])
    out = decode(olmoe, ids, ttr.SCMoE(), steps=6, eos_token_id=third, pad_token_id=0)
    first = (free[0, 12:] == third).nonzero()[0, 0]
    assert torch.equal(out, free[:, : 12 + int(first) + 1])


def test_random_experts_depend_on_the_seed_and_the_text_only(olmoe):
    ids = prompt(13, rows=2)
    one = decode(olmoe, ids, ttr.SCMoE(weak="random", beta=0.9))
    assert torch.equal(one, decode(olmoe, ids, ttr.SCMoE(weak="random", beta=0.9)))
    swapped = decode(olmoe, ids.flip(0), ttr.SCMoE(weak="random", beta=0.9))
    assert torch.equal(one, swapped.flip(0))
    others = [decode(olmoe, ids, ttr.SCMoE(weak="random", beta=0.9, seed=s)) for s in (1, 2, 3)]
    assert any(not torch.equal(one, other) for other in others)


def test_it_composes_with_a_delta_on_both_streams(olmoe):
    delta = torch.randn(4, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ids = prompt(14)
    out = decode(olmoe, ids, [ttr.StaticRouting(delta=delta), ttr.SCMoE(beta=0.9)])
    assert torch.equal(out, plain_decode(olmoe, ids, 16, rank_rule(2), beta=0.9, delta=delta))


def test_dynamic_k_thins_the_strong_stream_only(olmoe):
    ids = prompt(15)

    def thin(router, scores, choice):
        some, weights = top_k_rule(router, scores, choice)
        before = weights.cumsum(-1) - weights  # olmoe's weights are raw probabilities, best first
        return some, weights * (before < 0.4)

    expected = ids
    with torch.no_grad():
        for _ in range(16):
            with plain_routing(olmoe, rule=thin):
                strong = full_logits(olmoe, expected)[0, -1]
            with plain_routing(olmoe, rule=rank_rule(2)):
                weak = full_logits(olmoe, expected)[0, -1]
            expected = torch.cat([expected, plain_scores(strong, weak, 0.1, 0.9).argmax()[None, None]], 1)
    out = decode(olmoe, ids, [ttr.DynamicK(p=0.4), ttr.SCMoE(beta=0.9)])
    assert torch.equal(out, expected)


def test_no_harm_halves_beta_until_the_kl_limit_holds(olmoe):
    limit = 0.02
    ids = expected = prompt(16)
    reduced = 0
    with torch.no_grad():
        for _ in range(12):
            with plain_routing(olmoe):
                strong = full_logits(olmoe, expected)[0, -1]
            with plain_routing(olmoe, rule=rank_rule(2)):
                weak = full_logits(olmoe, expected)[0, -1]
            for beta in (0.9, 0.45, 0.225, 0.1125, 0.0):
                scores = plain_scores(strong, weak, 0.1, beta).double()
                inside = scores > float("-inf")
                p, q = scores.log_softmax(-1)[inside], strong.log_softmax(-1)[inside]
                if float((p.exp() * (p - q)).sum()) <= limit:
                    break
            reduced += beta < 0.9
            expected = torch.cat([expected, scores.argmax()[None, None]], 1)
    with ttr.adapt(olmoe, ttr.SCMoE(beta=0.9, kl_limit=limit, judge_on=None)) as adapted:
        out = adapted.generate(input_ids=ids, max_new_tokens=12, do_sample=False)
        facts = adapted.report.sequences[0].strategies["scmoe"]
    assert reduced > 0, "the limit never bit: the test cannot tell"
    assert torch.equal(out, expected)
    assert facts["limited_steps"] == reduced


BOLD = {"beta": 0.9, "kl_limit": 1e9}  # the limit on each step never bites


def judged(model, ids):
    """Tokens of a prompt that contrast turns right and wrong: every position by two full forwards."""
    with plain_routing(model), torch.no_grad():
        strong = full_logits(model, ids)[0]
    with plain_routing(model, rule=rank_rule(2)), torch.no_grad():
        weak = full_logits(model, ids)[0]
    won = lost = 0
    for t in range(1, ids.shape[1]):
        before = int(strong[t - 1].argmax()) == int(ids[0, t])
        after = int(plain_scores(strong[t - 1], weak[t - 1], 0.1, 0.9).argmax()) == int(ids[0, t])
        won, lost = won + (after and not before), lost + (before and not after)
    return won, lost


def test_no_harm_contrasts_where_it_predicts_the_prompt_better(olmoe):
    # a text that contrast wrote is predicted better with it, one that greedy decoding wrote is not
    written = decode(olmoe, prompt(16), ttr.SCMoE(**BOLD), steps=30)
    plain = olmoe.generate(prompt(16), max_new_tokens=30, do_sample=False)
    options = {"attention_mask": torch.ones_like(plain), "max_new_tokens": 8, "do_sample": False}
    with ttr.adapt(olmoe, ttr.SCMoE(**BOLD)) as adapted:
        for ids, helps in ((written, True), (plain, False)):
            out = adapted.generate(input_ids=ids, **options)
            facts = adapted.report.sequences[0].strategies["scmoe"]
            won, lost = judged(olmoe, ids)
            assert (won > lost) == helps
            assert (facts["judged_tokens"], facts["turned_right"], facts["turned_wrong"]) == (41, won, lost)
            expected = plain_decode(olmoe, ids, 8, rank_rule(2), beta=0.9) if helps else None
            if expected is None:
                expected = olmoe.generate(ids, **options)
                assert facts["outcome"].startswith(f"rolled back: on the prompt {won} tokens right for {lost} wrong")
            assert torch.equal(out, expected)
        alone = torch.cat([adapted.generate(input_ids=one, **options) for one in (written, plain)])
        options["attention_mask"] = torch.ones(2, plain.shape[1], dtype=torch.int64)
        assert torch.equal(adapted.generate(input_ids=torch.cat([written, plain]), **options), alone)
        options |= {"do_sample": True, "top_k": 1, "num_return_sequences": 2}
        copies = adapted.generate(input_ids=torch.cat([written, plain]), **options)
        assert torch.equal(copies, alone.repeat_interleave(2, 0))


def test_a_sequence_that_is_rolled_back_keeps_its_strong_logits_to_the_bit(olmoe):
    ids = prompt(17)  # too short to judge by

    def logits(model):
        return model.generate(
            input_ids=ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
        ).logits

    with ttr.adapt(olmoe, ttr.SCMoE(beta=0.0001, judge_on=None)) as adapted:
        moved = logits(adapted)
    with ttr.adapt(olmoe, ttr.SCMoE(**BOLD)) as adapted:
        kept = logits(adapted)
        assert adapted.report.sequences[0].strategies["scmoe"]["outcome"].startswith("skipped: 11 tokens")
    plain = logits(olmoe)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(kept, plain, strict=True))  # two rows beside one
    assert not all(torch.equal(a, b) for a, b in zip(moved, kept, strict=True))


@pytest.mark.parametrize(
    ("trial", "p", "passed"),
    [
        # by hand: halves to the power of those that changed, times the ways to lose no more
        ((40, 5, 0), 1 / 32, True),
        ((40, 4, 0), 1 / 16, False),
        ((40, 7, 1), (1 + 8) / 256, True),
        ((40, 6, 1), (1 + 7) / 128, False),
        ((40, 0, 0), 1.0, False),
        ((40, 2, 3), (10 + 10 + 5 + 1) / 32, False),
        ((15, 9, 0), 1 / 512, False),
    ],
)
def test_a_trial_is_a_sign_test(trial, p, passed):
    from ttrouting.strategies.scmoe import Trial

    assert Trial(*trial).p_value == pytest.approx(p)
    assert Trial(*trial).passed == passed


def test_judge_on_names_the_tokens(olmoe):
    mask = torch.zeros(1, 42, dtype=torch.bool)
    mask[:, 22:] = True
    ids = decode(olmoe, prompt(16), ttr.SCMoE(**BOLD), steps=30)
    with ttr.adapt(olmoe, ttr.SCMoE(**BOLD)) as adapted:
        adapted.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, loss_mask=mask)
        assert adapted.report.sequences[0].strategies["scmoe"]["judged_tokens"] == 20
    with pytest.raises(ttr.ConfigError, match=r"scmoe\.judge_on='A: \.\*' looks at text and needs the tokenizer"):
        ttr.adapt(olmoe, ttr.SCMoE(judge_on="A: .*"))


def test_beta_zero_runs_no_second_row(olmoe):
    with ttr.adapt(olmoe, ttr.SCMoE(beta=0)) as adapted:
        assert adapted.strategies == ()


def test_json_round_trip():
    strategy = ttr.SCMoE(beta=0.3, weak="top:2")
    assert ttr.SCMoE.from_dict(json.loads(json.dumps(strategy.to_dict()))) == strategy


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": 0}, "alpha must be in (0, 1], got 0"),
        ({"alpha": 1.5}, "got 1.5"),
        ({"beta": -0.1}, "got -0.1"),
        ({"weak": "rnk:2"}, "Did you mean 'rank'"),
        ({"weak": "rank:0"}, "at least 1"),
        ({"weak": "random:3"}, "no count"),
        ({"judge_on": "("}, "scmoe.judge_on='(' is no regular expression"),
        ({"judge_on": 3}, "scmoe.judge_on must be 'all'"),
    ],
)
def test_options_out_of_range_are_named(options, words):
    with pytest.raises(ttr.ConfigError) as error:
        ttr.SCMoE(**options)
    assert words in str(error.value)


def test_a_rank_that_no_layer_has_is_refused(olmoe):
    with pytest.raises(ttr.ConfigError, match="offers 8"):
        ttr.adapt(olmoe, ttr.SCMoE(weak="rank:9"))
