"""A left-padded batch equals its sequences one by one, under every strategy."""

import contextlib

import pytest
import torch
from transformers import StoppingCriteria

import ttrouting as ttr
from families.build import build
from oracles.double import InDouble

L, E = 4, 8
NEW = 7
STRATEGIES = {
    # re-adapts twice within the new tokens
    "rerouting": lambda: [ttr.Rerouting(interval=3, steps=2, lr=0.1, layers="all")],
    "rerouting-by-confidence": lambda: [ttr.Rerouting(interval=3, steps=2, lr=0.1, layers="highest:0.5")],
    "rerouting-random-layers": lambda: [ttr.Rerouting(steps=2, lr=0.1, layers="random:0.5")],
    "scmoe-rank": lambda: [ttr.SCMoE(beta=0.9, judge_on=None)],
    "scmoe-judged": lambda: [ttr.SCMoE(beta=0.9, kl_limit=1e9)],
    "scmoe-random": lambda: [ttr.SCMoE(weak="random", beta=0.9, judge_on=None)],
    "dynamic_k": lambda: [ttr.DynamicK(p=0.5)],
    "dynamic_k-entropy": lambda: [ttr.DynamicK(rule="entropy", tau=0.6, p=0.5)],
    "expert_mask": lambda: [ttr.ExpertMask(mask=torch.arange(E).expand(L, E) < 5)],
    "all": lambda: [
        ttr.Rerouting(interval=3, steps=2, lr=0.1, layers="all"),
        ttr.DynamicK(p=0.6),
        ttr.ExpertMask(mask=torch.arange(E).expand(L, E) < 6),
        ttr.SCMoE(weak="random", judge_on=None),
    ],
}


def generate(adapted, ids):
    """`(tokens, logits of each step, state, report)` of the new tokens."""
    out = adapted.generate(
        ids,
        attention_mask=(ids != 0).long(),
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits = torch.stack(out.logits, 1)  # [B, NEW, V]
    return out.sequences[:, ids.shape[1] :], logits, adapted.state, adapted.report


def facts(sequence):
    """A sequence's report as a flat list of values, floats apart."""
    words, numbers = [], []

    def walk(value):
        if isinstance(value, dict):
            for key in sorted(value):
                words.append(key)
                walk(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                walk(item)
        elif isinstance(value, float):
            numbers.append(value)
        else:
            words.append(value)

    walk({k: v for k, v in vars(sequence).items() if k != "strategies"})
    # an outcome may quote rounded losses
    walk({n: {k: v for k, v in f.items() if k != "adaptations"} for n, f in sequence.strategies.items()})
    walk([f.get("adaptations", []) for f in sequence.strategies.values()])
    return words, numbers


def assert_batch_equals_rows(model, strategies, ids, atol):
    with ttr.adapt(model, strategies) as adapted:
        tokens, logits, state, report = generate(adapted, ids)
        adaptations = 0
        for row in range(len(ids)):
            alone = ids[row][ids[row] != 0][None]
            own_tokens, own_logits, own_state, own_report = generate(adapted, alone)
            assert torch.equal(tokens[row], own_tokens[0])
            assert torch.allclose(logits[row], own_logits[0], atol=atol)
            for name, group in own_state.tensors.items():
                for key, value in group.items():
                    assert torch.allclose(state.tensors[name][key][row], value[0], atol=atol)
            words, numbers = facts(report.sequences[row])
            own_words, own_numbers = facts(own_report.sequences[0])
            assert words == own_words
            assert numbers == pytest.approx(own_numbers, abs=atol)
            adaptations += str(report.sequences[row].strategies).count("'accepted'")
    return adaptations


@pytest.mark.parametrize("name", STRATEGIES)
def test_olmoe(olmoe64, prompts, name):
    adaptations = assert_batch_equals_rows(olmoe64, STRATEGIES[name](), prompts(30, 20, seed=6), atol=1e-5)
    if name.startswith("rerouting"):
        assert adaptations, "nothing was adapted: the test cannot tell"


@pytest.mark.parametrize("name", ["rerouting", "scmoe-random", "all"])
def test_random_weak_experts_and_deltas_do_change_the_text(olmoe64, prompts, name):
    ids = prompts(30, 20, seed=6)
    base = olmoe64.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=NEW, do_sample=False)
    with ttr.adapt(olmoe64, STRATEGIES[name]()) as adapted:
        tokens = generate(adapted, ids)[0]
    assert not torch.equal(tokens, base[:, 30:])


# Mamba states, gated delta rules and a router with a bias, groups and a sigmoid; in true double precision
@pytest.mark.parametrize("family", ["jamba", "qwen3_next", "deepseek_v3"])
@pytest.mark.parametrize("name", ["rerouting", "scmoe-random", "dynamic_k"])
def test_other_families(prompts, family, name):
    model = build(family, dtype=torch.float64)
    model.set_experts_implementation("eager")
    model.generation_config.eos_token_id = None
    with InDouble():
        assert_batch_equals_rows(model, STRATEGIES[name](), prompts(26, 19), atol=1e-8)


def watch_experts(model, seen):
    """Note the `(ids, weights)` that every experts module really ran with: a forward hook sees edited arguments."""
    stack = contextlib.ExitStack()
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            handle = module.register_forward_hook(lambda _module, args, _out: seen.append((args[1], args[2])))
            stack.callback(handle.remove)
    return stack


def test_in_fp32_nearly_every_token_takes_the_same_route(olmoe, prompts):
    """Rounding flips a near-tie in top-k; one flip moves what follows it. How often is measured, not promised."""
    ids = prompts(40, 24, 31)
    mask = ids != 0
    strategy = ttr.Rerouting(lr=0.2, layers="all", interval=None)
    with ttr.adapt(olmoe, strategy, no_harm=False) as adapted:
        adapted.generate(ids, attention_mask=mask.long(), max_new_tokens=1, do_sample=False)
        together, state = [], adapted.state
        with watch_experts(olmoe, together):
            adapted(input_ids=ids, attention_mask=mask.long(), state=state)
        same = total = 0
        for row in range(3):
            alone = []
            one = ids[row][mask[row]][None]
            adapted.generate(one, max_new_tokens=1, do_sample=False)
            with watch_experts(olmoe, alone):
                adapted(input_ids=one, state=adapted.state)
            for (a, _), (b, _) in zip(together, alone, strict=True):
                batch = a.view(3, 40, -1)[row, mask[row]].sort(-1).values
                same += int((batch == b.sort(-1).values).all(-1).sum())
                total += len(b)
    assert total == 4 * (40 + 24 + 31)
    assert same / total >= 0.98, f"{same} of {total} routes agree"


def test_a_row_that_is_rolled_back_beside_adapted_ones_is_that_of_the_base_model(olmoe, prompts):
    """To rounding: the cache is filled before `generate`, by all tokens but the last."""
    olmoe.set_experts_implementation("batched_mm")
    ids = prompts(40, 40, 40)
    few = torch.ones_like(ids)
    few[1, 15:] = 0  # fourteen loss tokens, too few; the third row is rolled back by its held-back loss
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    base = olmoe.generate(ids, **options)
    with ttr.adapt(olmoe, ttr.Rerouting(layers="all", interval=None), no_harm=True) as adapted:
        out = adapted.generate(ids, loss_mask=few, **options)
        outcomes = [s.strategies["rerouting"]["outcome"] for s in adapted.report.sequences]
        delta = adapted.state.tensors["rerouting"]["delta"]
    assert [outcome.split(":")[0] for outcome in outcomes] == ["accepted", "skipped", "rolled back"]
    moved, kept = [0], [1, 2]
    for mine, own in zip(out.logits, base.logits, strict=True):
        assert torch.allclose(mine[kept], own[kept], atol=2e-5)
    assert (out.logits[0][moved] - base.logits[0][moved]).abs().max() > 1e-2
    assert not delta[kept].any()
    assert delta[moved].any()


@pytest.mark.parametrize(
    ("options", "words"), [({"kl_limit": 1e-12}, "KL"), ({"lr": 50.0, "kl_limit": 1e-3}, "rolled back")]
)
def test_rolled_back_for_every_row_the_whole_call_is_the_base_model(olmoe, prompts, options, words):
    olmoe.set_experts_implementation("batched_mm")
    ids = prompts(40, 30, seed=5)
    call = {"attention_mask": (ids != 0).long(), "max_new_tokens": 9, "do_sample": True, "top_k": 20}
    torch.manual_seed(0)
    base = olmoe.generate(ids, **call)
    strategy = ttr.Rerouting(layers="all", interval=4, **options)
    with ttr.adapt(olmoe, strategy) as adapted:
        torch.manual_seed(0)
        out = adapted.generate(ids, **call)
        reports = [s.strategies["rerouting"]["adaptations"] for s in adapted.report.sequences]
        assert not adapted.state.tensors["rerouting"]["delta"].any()
    assert torch.equal(out, base)
    assert all(phase["outcome"].startswith("rolled back") for phases in reports for phase in phases)
    assert any(words in phase["outcome"] for phases in reports for phase in phases)
    assert [len(phases) for phases in reports] == [3, 3]


def test_an_ended_sequence_stops_adapting_and_counting(olmoe64, prompts):
    ids = prompts(30, 30, seed=1)
    strategies = [ttr.Rerouting(interval=4, steps=2, lr=0.5, layers="all"), ttr.DynamicK(p=0.6)]
    with ttr.adapt(olmoe64, strategies, no_harm=False) as adapted:
        free = adapted.generate(ids, max_new_tokens=11, do_sample=False)[:, 30:]
        early = int(free[0, 5])  # after one interval, before the second
        assert early not in (*free[0, :5].tolist(), *free[1].tolist()), "choose another seed"
        short = adapted.generate(ids, max_new_tokens=6, do_sample=False)
        until = adapted.state.tensors["rerouting"]["delta"]
        used = [s.experts_per_layer for s in adapted.report.sequences]
        out = adapted.generate(ids, max_new_tokens=11, do_sample=False, eos_token_id=early, pad_token_id=0)
        delta = adapted.state.tensors["rerouting"]["delta"]
        first, second = adapted.report.sequences
    assert torch.equal(out[0], torch.cat([short[0], short.new_zeros(5)]))
    assert torch.equal(out[1, 30:], free[1])
    assert torch.allclose(delta[0], until[0], atol=1e-9), "it has ended: nothing may move it any more"
    assert not torch.allclose(delta[1], until[1], atol=1e-3)
    phases = [[p["tokens"] for p in s.strategies["rerouting"]["adaptations"]] for s in (first, second)]
    assert phases == [[30, 34], [30, 34, 38]]
    assert (first.new_tokens, second.new_tokens) == (5, 11)
    # neither padding behind the end nor the forwards of an adaptation are in the mean
    assert first.experts_per_layer == pytest.approx(used[0])
    with ttr.adapt(olmoe64, strategies, no_harm=False) as adapted:
        adapted.generate(ids[:1], max_new_tokens=6, do_sample=False)
        assert adapted.report.sequences[0].experts_per_layer == pytest.approx(first.experts_per_layer)


def test_the_mean_of_experts_is_that_of_real_tokens(olmoe64, prompts):
    ids = prompts(20, 13)
    mask = ids != 0
    seen = []
    with ttr.adapt(olmoe64, ttr.DynamicK(p=0.5)) as adapted, watch_experts(olmoe64, seen):
        adapted.generate(ids, attention_mask=mask.long(), max_new_tokens=4, do_sample=False)
        report = adapted.report
    assert [len(weights) for _, weights in seen[::L]] == [40, 2, 2, 2]
    for row, sequence in enumerate(report.sequences):
        for layer in range(L):
            prompt, *steps = (weights.view(2, -1, 3)[row] != 0 for _, weights in seen[layer::L])
            kept = torch.cat([prompt[mask[row]], *steps]).sum(-1).double()
            assert sequence.experts_per_layer[layer] == pytest.approx(float(kept.mean()))
            assert len(kept) == (20, 13)[row] + 3


def test_padding_that_a_model_emits_itself_does_not_end_a_sequence(olmoe, prompts):
    """Without an end-of-sequence id nothing is padded: every generated token is text."""
    ids = prompts(30)
    strategy = ttr.Rerouting(interval=2, layers="all", lr=1e-9)
    with ttr.adapt(olmoe, strategy, no_harm=False) as adapted:
        emitted = int(adapted.generate(ids, max_new_tokens=3, do_sample=False)[0, -1])
        mask = torch.ones_like(ids)
        adapted.generate(ids, attention_mask=mask, max_new_tokens=7, do_sample=False, pad_token_id=emitted)
        (sequence,) = adapted.report.sequences
    assert sequence.new_tokens == 7
    assert [p["tokens"] for p in sequence.strategies["rerouting"]["adaptations"]] == [30, 32, 34, 36]


def test_a_sequence_that_a_callers_criterion_ends_stops_adapting(olmoe, prompts):
    """No end-of-sequence id is written then; the padding behind it says so."""

    class EndFirst(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([input_ids.shape[1] >= 33, False])

    ids = prompts(30, 30)
    strategies = [ttr.Rerouting(interval=2, steps=1, layers="all"), ttr.DynamicK(p=0.6), ttr.SCMoE(judge_on=None)]
    with ttr.adapt(olmoe, strategies, no_harm=True) as adapted:
        free = adapted.generate(ids, max_new_tokens=8, do_sample=False)
        never = next(i for i in range(3, 96) if i not in free.tolist()[0] + free.tolist()[1])
        options = {"eos_token_id": never, "pad_token_id": 0, "stopping_criteria": [EndFirst()]}
        out = adapted.generate(ids, max_new_tokens=8, do_sample=False, **options)
        first, second = adapted.report.sequences
    assert out[0, 33:].tolist() == [0] * 5
    assert [[p["tokens"] for p in s.strategies["rerouting"]["adaptations"]] for s in (first, second)] == [
        [30, 32],
        [30, 32, 34, 36],
    ]
    assert (first.new_tokens, second.new_tokens) == (3, 8)
    # one more step than tokens: its last token is read before any padding is
    assert [s.strategies["scmoe"]["steps"] for s in (first, second)] == [4, 8]
