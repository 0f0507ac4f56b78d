"""The model `ttrouting` of lm-eval: what is scored, what adaptations read, how texts are written and drawn."""

import copy
import json
import math
import random
import sys
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

import ttrouting as ttr
from oracles.c3po import overridden, whole
from oracles.likelihood import contrasted, log_likelihood, plain
from ttrouting.choices import Continuation
from ttrouting.cli.settings import make_strategies
from ttrouting.errors import ConfigError
from ttrouting.strategy import RoutingRun, RoutingStrategy

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

import toy_tasks
from ttrouting.evaluation.adapted_lm import AdaptedLM
from ttrouting.evaluation.contexts import Encoded, group
from ttrouting.evaluation.decoding import KeyedSampler, sample_key
from ttrouting.evaluation.lm_eval import main, with_tasks

CONTEXTS = ["the quick brown fox jumps over it", "pack my box with five jugs", "how daft zebras jump"]
CHOICES = [[" SLEEPS", " RUNS", " X"], [" NOW", " Y"], [" Z", " W", " V", " U"]]


def letters(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def ask(context, continuation, doc_id=None, idx=0):
    return Instance("loglikelihood", {}, (context, continuation), idx, ("t", doc_id, 1))


def write(prompt, doc_id=0, idx=0, repeats=1, **options):
    return Instance("generate_until", {}, (prompt, {"until": ["\n"], **options}), idx, ("t", doc_id, repeats))


@pytest.fixture
def model(olmoe64, true_double):
    """In fp64 throughout: rows do not depend on the batch they are in."""
    return olmoe64


@pytest.fixture
def requests():
    return [ask(c, choice, i, j) for i, c in enumerate(CONTEXTS) for j, choice in enumerate(CHOICES[i])]


@pytest.fixture
def lm(model, tokenizer):
    return AdaptedLM(model, tokenizer=tokenizer, batch_size=4, no_harm=False)


def rank_two(router, scores, choice):
    one = choice.sort(-1, descending=True).indices[:, 1:2]
    return one, scores.gather(1, one)


# --- log-likelihoods -----------------------------------------------------------------------------------------


def check(found, requests, tokenizer, after):
    """Scores against plain forwards; `after(doc_id)` gives the next-token logits for the texts of a document."""
    for request, (value, greedy) in zip(requests, found, strict=True):
        context, continuation = (letters(tokenizer, text) for text in request.args)
        expected, best = log_likelihood(after(request.doc_id), context, continuation)
        assert value == pytest.approx(expected, abs=1e-6)
        assert greedy == best


def test_base_scores_are_plain_forwards(lm, model, tokenizer, requests):
    check(lm.loglikelihood(requests), requests, tokenizer, lambda _: plain(model))


def test_base_scores_equal_those_of_lm_eval(lm, model, tokenizer, requests):
    theirs = HFLM(model, tokenizer=tokenizer, batch_size=3).loglikelihood(requests, disable_tqdm=True)
    ours = lm.loglikelihood(requests, disable_tqdm=True)
    assert [g for _, g in ours] == [g for _, g in theirs]
    assert [v for v, _ in ours] == pytest.approx([v for v, _ in theirs], abs=1e-5)


def twin(model):
    """The same weights again: a model that answers requests is adapted already."""
    other = copy.deepcopy(model)
    return other.eval()


def learned(model, tokenizer, context, strategy):
    """What a call of `generate` learns from a context alone."""
    model, ids = twin(model), torch.tensor([letters(tokenizer, context)])
    with ttr.adapt(model, strategy, no_harm=False, tokenizer=tokenizer) as adapted:
        adapted.generate(ids, max_new_tokens=1, do_sample=False)
        return {name: value[0] for name, value in adapted.state.tensors[strategy.name].items()}


def test_choices_are_scored_under_what_their_context_teaches(lm, model, tokenizer, requests):
    strategy = ttr.Rerouting(lr=0.3)
    deltas = [learned(model, tokenizer, c, strategy)["delta"] for c in CONTEXTS]
    assert all(d.abs().max() > 0.1 for d in deltas)
    lm.use([strategy])
    check(lm.loglikelihood(requests), requests, tokenizer, lambda i: plain(model, deltas[i]))


def test_scmoe_is_contrasted_without_its_mask(lm, model, tokenizer, requests):
    lm.use([ttr.SCMoE(beta=0.7, alpha=0.9)])
    after = contrasted(plain(model), plain(model, rule=rank_two), 0.7)
    check(lm.loglikelihood(requests), requests, tokenizer, lambda _: after)
    assert lm.get_model_info()["ttrouting"]["notes"] == [
        "scmoe: log-likelihoods are contrasted without the plausibility mask, and normalised"
    ]


def test_scmoe_over_rerouting(lm, model, tokenizer, requests):
    strategy = ttr.Rerouting(lr=0.3)
    lm.use([strategy, ttr.SCMoE(beta=0.5)])
    after = []
    for context in CONTEXTS:
        delta = learned(model, tokenizer, context, strategy)["delta"]
        after.append(contrasted(plain(model, delta), plain(model, delta, rule=rank_two), 0.5))
    check(lm.loglikelihood(requests), requests, tokenizer, lambda i: after[i])


def test_scmoe_limits_beta_where_a_token_is_scored(model, tokenizer, requests):
    """With `no_harm` beta is halved until the KL of what is scored is within the limit, at each position."""
    limit, strong, weak = 0.02, plain(model), plain(model, rule=rank_two)

    def after(text):
        z_strong, z_weak = strong(text), weak(text)
        for beta in (0.9, 0.45, 0.225, 0.1125, 0.0):
            logits = (1 + beta) * z_strong - beta * z_weak
            p, q = logits.log_softmax(0), z_strong.log_softmax(0)
            if float((p.exp() * (p - q)).sum()) <= limit:
                return logits
        raise AssertionError

    lm = AdaptedLM(model, tokenizer=tokenizer, batch_size=8)
    lm.use([ttr.SCMoE(beta=0.9, kl_limit=limit, judge_on=None)])
    check(lm.loglikelihood(requests), requests, tokenizer, lambda _: after)
    report = lm.adapted.report.sequences[-1].strategies["scmoe"]
    assert 0 < report["limited_steps"] <= report["steps"]


@pytest.mark.parametrize("scope", ["last_prompt_token", "all"])
def test_c3po_acts_on_the_last_token_of_the_context(olmoe, tokenizer, references, scope):
    """In fp32, as the references are."""
    single = AdaptedLM(olmoe, tokenizer=tokenizer, batch_size=2, no_harm=False)
    strategy = ttr.C3PO(refset=str(references()), surrogate="ngd", steps=2, scope=scope, max_similarity=1.0)
    single.use([strategy])
    context, options = CONTEXTS[0], CHOICES[0]
    found = single.loglikelihood([ask(context, o, 0, j) for j, o in enumerate(options)])
    state = learned(olmoe, tokenizer, context, strategy)
    text = letters(tokenizer, context)
    assert bool(state["on"])
    assert int(state["at"]) == len(text) - 1
    first = strategy.first_layer(len(single.adapted.sites))

    @torch.no_grad()
    def after(ids):
        if scope == "all":
            return plain(olmoe, state["value"])(ids)
        with overridden(olmoe, state["value"], len(text) - 1, first):
            return whole(olmoe, ids)[-1]

    base = plain(olmoe)
    for option, (value, _) in zip(options, found, strict=True):
        expected, _ = log_likelihood(after, text, letters(tokenizer, option))
        assert value == pytest.approx(expected, abs=2e-3)
        assert value != pytest.approx(log_likelihood(base, text, letters(tokenizer, option))[0], abs=1e-5)


def test_scores_do_not_depend_on_the_batch(lm, requests):
    lm.use([ttr.Rerouting(lr=0.3), ttr.SCMoE()])
    whole_batch = lm.loglikelihood(requests)
    one_by_one = [lm.loglikelihood([r])[0] for r in requests]
    assert [v for v, _ in whole_batch] == pytest.approx([v for v, _ in one_by_one], abs=1e-9)


def test_the_score_of_a_choice_does_not_depend_on_the_others(lm):
    lm.use([ttr.Rerouting(lr=0.3)])
    context, choice = CONTEXTS[0], " SLEEPS"
    beside = [[" RUNS"], [" SLEEPS WELL", " X", " Y"], ["?" * 30]]
    values = []
    for others in beside:
        asked = [ask(context, c, 0, j) for j, c in enumerate([choice, *others])]
        values.append(lm.loglikelihood(asked)[0][0])
    assert values == pytest.approx([values[0]] * len(values), abs=1e-9)


@dataclass(frozen=True)
class Spy(RoutingStrategy):
    """Writes down what it may learn from."""

    name = "spy"
    read: tuple[list[Tensor], ...] = ((),)

    def start(self, session):
        return SpyRun(self, session)


class SpyRun(RoutingRun):
    def edit_logits(self, site, logits, rows):
        return logits

    def prepare(self, context):
        self.strategy.read[0].append(
            [ids[mask].tolist() for ids, mask in zip(context.ids, context.mask, strict=True)]
        )


def every_read(model, monkeypatch):
    """All token ids that the model reads, and after how many of these reads the choices of a batch are scored.

    But for the sixteen fixed tokens on which short cuts through a model are tried.
    """
    reads, boundary = [], []
    probe = [(n * 7919 + 11) % 96 for n in range(16)]

    def read(_module, args):
        if args[0].tolist() not in ([probe], [probe[::-1]]):
            reads.append(args[0].tolist())

    hook = model.get_input_embeddings().register_forward_pre_hook(read)
    original = ttr.adaptive.read_choices
    monkeypatch.setattr(
        "ttrouting.adaptive.read_choices", lambda *args: boundary.append(len(reads)) or original(*args)
    )
    return reads, boundary, hook


@pytest.mark.parametrize("strategy", ["rerouting", "rerouting,scmoe", "dynamic_k"])
def test_no_answer_token_reaches_an_adaptation(lm, model, tokenizer, requests, monkeypatch, strategy):
    """Contexts are in lower case, answers in upper case: until choices are scored the model reads no capital."""
    seen = []
    lm.use([Spy(read=(seen,)), *make_strategies([strategy])])
    reads, boundary, hook = every_read(model, monkeypatch)
    with torch.no_grad():
        lm.loglikelihood(requests)
    hook.remove()
    answers = {t for choices in CHOICES for c in choices for t in letters(tokenizer, c.strip())}

    def holds_answer(batch):
        return bool(answers & {t for row in batch for t in row})

    contexts = [letters(tokenizer, c) for c in CONTEXTS]
    assert sorted(row for batch in seen for row in batch) == sorted(contexts)  # each once, whatever its choices
    start, adapted = 0, 0
    for end in boundary:
        adapted += end - start
        assert not any(map(holds_answer, reads[start:end]))
        # what scores the choices comes up to the next adaptation, whose reads begin with a context again
        start = next((i for i in range(end, len(reads)) if not holds_answer(reads[i])), len(reads))
    assert adapted or strategy == "dynamic_k"
    assert any(map(holds_answer, reads))  # the choices were read at all


def test_choices_that_stand_in_the_context_are_not_adapted_on(lm, model, tokenizer):
    """As in WinoGrande: the sentence up to the blank is what adaptations read, the candidate and the rest are not."""
    seen, strategy = [], ttr.Rerouting(lr=0.3)
    lm.use([Spy(read=(seen,)), strategy])
    stem, end = "the trophy does not fit in the suitcase as the ", " is far too small"
    asked = [ask(f"{stem}{candidate}", end, 7, j) for j, candidate in enumerate(("TROPHY", "SUITCASE"))]
    found = lm.loglikelihood(asked)
    assert seen == [[letters(tokenizer, stem)]]
    delta = learned(model, tokenizer, stem, strategy)["delta"]
    check(found, asked, tokenizer, lambda _: plain(model, delta))


def test_choices_of_one_token_are_read_together(lm, model):
    reads = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _m, args: reads.append(args[0].shape))
    lm.loglikelihood([ask("which? ", c, 0, j) for j, c in enumerate("ABCD")])
    hook.remove()
    assert reads == [(1, 7)]


def test_an_empty_context_begins_with_the_prefix_token(lm, model, tokenizer):
    found = lm.loglikelihood([ask("", "abc", 0)])
    expected = log_likelihood(plain(model), [tokenizer.bos_token_id], letters(tokenizer, "abc"))
    assert found[0][0] == pytest.approx(expected[0], abs=1e-6)


def test_groups():
    shared = group([Encoded("d", (1, 2, 3), (8, 9)), Encoded("d", (1, 2, 4), (8, 9))], 0, 100)
    assert [(g.context, g.choices) for g in shared] == [
        ((1, 2), (Continuation((3, 8, 9), 1), Continuation((4, 8, 9), 1)))
    ]
    nothing = group([Encoded("d", (3,), (8,)), Encoded("d", (4, 5), (8,))], 77, 100)
    assert nothing[0].context == (77,)
    assert [c.given for c in nothing[0].choices] == [1, 2]
    long = group([Encoded("d", tuple(range(10)), (8, 9)), Encoded("d", tuple(range(10)), (7,))], 0, 6)
    assert long[0].context == tuple(range(5, 10))  # 5 + 2 - 1 tokens are read


def test_rolling_is_lm_evals_without_strategies_and_learns_from_what_a_window_is_given(model, tokenizer):
    text = " ".join(CONTEXTS)
    asked = [Instance("loglikelihood_rolling", {}, (t,), 0, ("t", i, 1)) for i, t in enumerate((text, "short"))]
    theirs = HFLM(model, tokenizer=tokenizer, batch_size=2, max_length=30).loglikelihood_rolling(asked, True)
    lm = AdaptedLM(model, tokenizer=tokenizer, batch_size=2, max_length=30, no_harm=False)
    assert lm.loglikelihood_rolling(asked, True) == pytest.approx(theirs, abs=1e-4)
    lm.use([ttr.DynamicK(p=0.5)])
    assert lm.loglikelihood_rolling(asked, True) != pytest.approx(theirs, abs=1e-2)
    value, cost = lm.rolling(asked[:1])[0]
    assert value == pytest.approx(lm.loglikelihood_rolling(asked[:1], True)[0])
    assert cost.flops > 0


def test_scoring_refuses_what_cannot_be_scored(model, prompts):
    ids = prompts(5, 5)
    with ttr.adapt(model, ["dynamic_k"]) as adapted:
        with pytest.raises(ConfigError, match="leaves nothing to score"):
            Continuation((1, 2), given=2)
        with pytest.raises(ConfigError, match="got 2 texts and continuations for 1"):
            adapted.score(ids, [[Continuation((5,))], []])
        with pytest.raises(ConfigError, match="context"):
            adapted.score(ids[:1], [[Continuation((5,) * model.config.max_position_embeddings)]])


def test_scoring_leaves_no_trace(model, prompts, untouched):
    with untouched(model), ttr.adapt(model, [ttr.Rerouting(), "scmoe"], no_harm=False) as adapted:
        adapted.score(prompts(20, 9), [[Continuation((5, 6))], [Continuation((7,))]])


# --- texts ---------------------------------------------------------------------------------------------------


def test_texts_equal_those_of_lm_eval(model, tokenizer):
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    asked = [write(c, i, until=["\n", "e"], max_gen_toks=12) for i, c in enumerate(CONTEXTS)]
    asked.append(write("another", 3, max_gen_toks=5))  # other options: another batch
    theirs = HFLM(model, tokenizer=tokenizer, batch_size=3).generate_until(asked, disable_tqdm=True)
    ours = AdaptedLM(model, tokenizer=tokenizer, batch_size=3).generate_until(asked, disable_tqdm=True)
    assert ours == theirs
    assert any(ours)


def test_texts_under_strategies_equal_single_calls(lm, model, tokenizer):
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    strategies = [ttr.Rerouting(lr=0.3, interval=4), ttr.DynamicK(p=0.6)]
    lm.use(strategies)
    found = lm.generate_until([write(c, i, max_gen_toks=10) for i, c in enumerate(CONTEXTS)], disable_tqdm=True)
    lm.close()
    for context, text in zip(CONTEXTS, found, strict=True):
        ids = torch.tensor([letters(tokenizer, context)])
        with ttr.adapt(model, strategies, no_harm=False) as adapted:
            out = adapted.generate(ids, max_new_tokens=10, do_sample=False)
        assert text == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).split("\n")[0]


def test_a_row_ends_at_its_own_stop(lm, model, tokenizer):
    """lm-eval's criterion lets it write on until every row has ended; what it writes then is no text of its own."""
    asked = [write(c, i, until=["~"], max_gen_toks=12) for i, c in enumerate(CONTEXTS)]
    free = lm.generate_until(asked, disable_tqdm=True)
    stop = next(letter for letter in free[0] if not any(letter in text for text in free[1:]))
    asked = [write(c, i, until=[stop], max_gen_toks=12) for i, c in enumerate(CONTEXTS)]
    found = lm.answer(asked)
    assert [text for text, _ in found] == [free[0].split(stop)[0], *free[1:]]
    assert found[0][1].new_tokens == free[0].index(stop) + 1 < 12
    assert {cost.new_tokens for _, cost in found[1:]} == {12}


def test_a_prompt_that_leaves_no_room_is_refused(lm):
    with pytest.raises(ConfigError, match="new tokens"):
        lm.generate_until([write("a", max_gen_toks=lm.max_length)], disable_tqdm=True)


# --- samples -------------------------------------------------------------------------------------------------


def samples(lm, count, documents=2, **options):
    drawn = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 6, "until": ["~"], **options}
    asked = [write(CONTEXTS[d], d, repeats=count, **drawn) for d in range(documents) for _ in range(count)]
    return lm.generate_until(asked, disable_tqdm=True)


@pytest.mark.parametrize("strategies", [[], [ttr.Rerouting(lr=0.3), ttr.SCMoE()]])
def test_samples_do_not_depend_on_the_batch(model, tokenizer, strategies):
    found = []
    for batch_size in (1, 3, 16):
        lm = AdaptedLM(model, tokenizer=tokenizer, batch_size=batch_size, no_harm=False, seed=5)
        lm.use(strategies)
        torch.manual_seed(batch_size)  # nothing of torch's own random numbers may enter
        found.append(samples(lm, 4))
        lm.close()
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) == len(found[0])  # and each is another one


def test_samples_depend_on_the_seed_and_the_document(model, tokenizer):
    def draw(seed, doc_id):
        lm = AdaptedLM(model, tokenizer=tokenizer, seed=seed)
        options = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 6}
        text = lm.generate_until([write(CONTEXTS[0], doc_id, **options)], disable_tqdm=True)
        lm.close()
        return text

    assert draw(0, 0) == draw(0, 0) != draw(1, 0)
    assert draw(0, 0) != draw(0, 1)


def test_one_adaptation_serves_all_samples_of_a_prompt(model, tokenizer, monkeypatch):
    prepared = []
    monkeypatch.setattr(
        "ttrouting.adaptive._prepare",
        lambda session, context, original=ttr.adaptive._prepare: (
            prepared.append(context.ids.shape[0]) or original(session, context)
        ),
    )
    lm = AdaptedLM(model, tokenizer=tokenizer, batch_size=8, no_harm=False)
    lm.use([ttr.Rerouting()])
    samples(lm, 4)
    assert prepared == [2]  # two prompts of four rows each


def test_draws_have_the_probabilities_of_the_model():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -30.0]])
    rows = 4000
    keys = [sample_key(0, n) for n in range(rows)]

    def shares(**options):
        out = KeyedSampler(keys, **options)(torch.zeros(rows, 5, dtype=torch.long), logits.expand(rows, -1))
        assert ((out == 0).sum(1) == 1).all()
        assert ((out == 0) | (out == -math.inf)).all()
        return (out == 0).double().mean(0)

    for temperature in (0.7, 1.0, 1.5):
        expected = (logits[0].double() / temperature).softmax(0)
        error = 4 * (expected * (1 - expected) / rows).sqrt() + 1e-9  # four standard errors
        assert ((shares(temperature=temperature) - expected).abs() <= error).all()
    assert shares(temperature=1.0, top_k=2)[2:].sum() == 0
    assert shares(temperature=1.0, top_p=0.5)[1:].sum() == 0


def test_each_step_has_its_own_numbers():
    keys = [sample_key(0, n) for n in range(200)]
    sampler, text = KeyedSampler(keys, temperature=1.0), torch.zeros(200, 3, dtype=torch.long)
    first, second = (sampler(text, torch.zeros(200, 7)).argmax(1) for _ in range(2))
    assert 0.05 < (first == second).double().mean() < 0.3  # one in seven by chance


# --- through lm-eval -----------------------------------------------------------------------------------------


def rows(count, seed=0):
    draw = random.Random(seed)
    return [
        {"q": "".join(draw.choice("abcdef ") for _ in range(12)) + "?", "choices": ["A", "BC", "D"], "gold": i % 3}
        for i in range(count)
    ]


def test_chat_templates_and_few_shot_examples(lm, monkeypatch):
    task = toy_tasks.choices(rows(6), num_fewshot=2)
    read = []
    original = AdaptedLM._likelihoods
    monkeypatch.setattr(
        AdaptedLM,
        "_likelihoods",
        lambda self, groups: read.extend(g.context for g in groups) or original(self, groups),
    )
    lm.use([ttr.Rerouting()])
    found = evaluate(
        lm, {"tasks": {"choices": task}, "groups": {}}, apply_chat_template=True, fewshot_as_multiturn=True, limit=3
    )
    assert found["results"]["choices"]["sample_len"] == 3
    prompts = [lm.tokenizer.decode(ids) for ids in read]
    assert len(prompts) == 3
    assert all(p.count("<|im_start|>user") == 3 and p.endswith("<|im_start|>assistant") for p in prompts)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"adapt": "reroutin"}, "Did you mean 'rerouting'"),
        ({"adapt": "scmoe", "scmoe.bta": 0.3}, "Did you mean 'beta'"),
        ({"scmoe.beta": 0.3}, "is not used"),
        ({"batch_size": "auto"}, "give a number"),
        ({"mixed_precision_dtype": "bfloat16"}, "another dtype"),
    ],
)
def test_model_args_that_cannot_be_honoured(model, tokenizer, options, error):
    with pytest.raises(ConfigError, match=error):
        AdaptedLM(model, tokenizer=tokenizer, **options)


def test_model_args(model, tokenizer):
    options = {
        "adapt": "rerouting+scmoe",
        "scmoe.beta": 0.3,
        "rerouting.layers": "last:2",
        "rerouting.interval": None,
    }
    lm = AdaptedLM(model, tokenizer=tokenizer, **options)
    rerouting, scmoe = lm.adapted.strategies
    assert (rerouting.layers, rerouting.interval, scmoe.beta) == ("last:2", None, 0.3)


def test_include_path_is_ours_unless_it_is_given():
    assert with_tasks(["--tasks", "a"], "F") == ["--tasks", "a", "--include_path", "F"]
    assert with_tasks(["run", "--tasks", "a", "--include_path=G"], "F") == ["run", "--tasks", "a", "--include_path=G"]
    assert with_tasks(["-h"], "F") == ["-h"]
    assert with_tasks([], "F") == []


@pytest.fixture
def only_ours(monkeypatch):
    """lm-eval without its own thousands of tasks, which take ten seconds to look through."""
    import lm_eval.tasks

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))


def test_the_launcher(only_ours, tmp_path, monkeypatch, capsys):
    asked = "run --model ttrouting --tasks pocket_minimum_letters --limit 2 --batch_size 2 --log_samples"
    args = "pretrained=pocket,adapt=rerouting+scmoe,scmoe.beta=0.3,rerouting.steps=1"
    monkeypatch.setattr(sys, "argv", ["x", *asked.split(), "--model_args", args, "--output_path", str(tmp_path)])
    main()
    (file,) = tmp_path.glob("**/results_*.json")
    found = json.loads(file.read_text())
    assert found["config"]["ttrouting"]["strategies"][1] == {
        **ttr.SCMoE(beta=0.3).to_dict(),
    }
    assert found["n-samples"]["pocket_minimum_letters"]["effective"] == 2
    assert "pocket_minimum_letters" in capsys.readouterr().out


def test_the_launcher_tells_a_wrong_option_in_one_line(only_ours, monkeypatch, capsys):
    asked = "run --model ttrouting --tasks pocket_minimum_letters --limit 1 --model_args pretrained=pocket,adapt=scmo"
    monkeypatch.setattr(sys, "argv", ["x", *asked.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "Did you mean 'scmoe'" in capsys.readouterr().err
