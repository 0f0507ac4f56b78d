"""Task deltas during a call: tasks and deltas by plain formulas, decoding by hand-patched routers, rows apart."""

import dataclasses
import math
import random
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

import ttrouting as ttr
from families.build import build as tiny
from oracles.c3po import PlainSet
from oracles.double import build_double
from oracles.plain_router import full_logits, plain_routing
from oracles.questions import needs_pocket
from ttrouting import refsets
from ttrouting.pocket.skills import few_shot_prompt, is_correct, sample
from ttrouting.refsets import ReferenceSet, TaskFit, fit_tasks
from ttrouting.refsets.task_classifier import TaskClassifier
from ttrouting.refsets.task_deltas import write_task_deltas

L, E, NEW = 4, 8, 5
DICT = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
LETTERS = {"low": "abcdef", "digit": "0123456", "sign": "(){}.:"}


def question(task, seed, length=8):
    draw = random.Random(f"{task} {seed}")
    return "Q " + "".join(draw.choice(LETTERS[task]) for _ in range(length)) + " A"


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A set of the tiny OLMoE: three tasks of twelve references, each of letters of its own."""
    rows = [{"q": question(task, i), "a": "yes", "task": task} for i in range(12) for task in LETTERS]
    shape = {"prompt": "{q}", "answer": "{a}", "task": "{task}", "keep": "all"}
    return refsets.build(tiny("olmoe"), tokenizer, rows, tmp_path_factory.mktemp("tasks") / "set", **shape).path


def bank(folder, out, accepted=("low", "digit"), scale=1.0, first=0, head="Q ", weight=None):
    """Random deltas for some tasks and a random classifier, written as a fit writes them."""
    refset = ReferenceSet.open(folder)
    fits, row = [], 0
    for task in LETTERS:
        taken = task in accepted
        fits.append(TaskFit(task, 12, "accepted" if taken else "rejected", "made", row if taken else -1))
        row += taken
    values = scale * np.random.default_rng(0).normal(size=(row, L, E)).astype(np.float32)
    values[:, :first] = 0
    facts = {"fingerprint": refset.fingerprint, "refset": refset.identity, "first": first, "head": head}
    if weight is None:
        weight = 2 * np.random.default_rng(1).normal(size=(len(fits), refset.dimension))
    classifier = TaskClassifier(weight.astype(np.float32), np.float32([0.1, 0.0, -0.1]))
    write_task_deltas(out, values, classifier, fits, {**facts, "familiar": -1.0})
    return str(out)


@pytest.fixture(scope="module")
def deltas(folder, tmp_path_factory):
    return bank(folder, tmp_path_factory.mktemp("deltas"))


@pytest.fixture(scope="module")
def model(folder):
    return build_double("olmoe")


@pytest.fixture
def make(folder, deltas):
    """The strategy with a random model's similarities, which say little: nothing is too far."""

    def strategy(**options):
        base = {"refset": str(folder), "deltas": deltas, "min_probability": 0.0, "kl_limit": 1e9}
        return ttr.TaskDelta(**base | options)

    return strategy


def call(model, tokenizer, strategies, prompts, no_harm=True, **more):
    """`(output, reports of task_delta, deltas [B, L, E])`"""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    with ttr.adapt(model, strategies, tokenizer=tokenizer, no_harm=no_harm) as adapted:
        out = adapted.generate(**inputs, **{"max_new_tokens": NEW, **DICT, **more})
        reports = [s.strategies.get("task_delta") for s in adapted.report.sequences]
        return out, reports, adapted.state.tensors.get("task_delta", {}).get("delta")


def plain_tasks(folder, deltas, tokenizer, model, prompt, start=0):
    """Probabilities by task, and the nearest cosine; the mean hidden state is over tokens from `start` on."""
    plain = PlainSet(folder, tokenizer)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        pooled = model.model(input_ids=ids, use_cache=False).last_hidden_state[0][start:].mean(0).numpy()
    (file,) = Path(deltas).glob("deltas-*.safetensors")
    tensors = safetensors.numpy.load_file(file)
    rows = zip(LETTERS, tensors["classifier.weight"], tensors["classifier.bias"], strict=True)
    powers = {task: math.exp(float((w * plain.query(pooled)).sum() + b)) for task, w, b in rows}
    found = {task: power / sum(powers.values()) for task, power in powers.items()}
    return found, plain.nearest(pooled, 1, "all", most=1.0)[0][1]


def told(report):
    return {one["task"]: one["probability"] for one in report["tasks"]}


def likely(found):
    """Those that a report names."""
    return {task: p for task, p in found.items() if p >= 0.01}


# --- the formula ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("true_double")
def test_the_delta_is_the_mean_of_the_tasks_deltas_by_their_probabilities(model, folder, tokenizer, make):
    values = dict(zip(("low", "digit"), ttr.TaskDelta(str(folder), make().deltas).bank.values, strict=True))
    mixed = 0
    for seed in range(9):
        prompt = question(("low", "digit", "sign")[seed % 3], 100 + seed)
        found, nearest = plain_tasks(folder, make().deltas, tokenizer, model, prompt)
        _, (report,), delta = call(model, tokenizer, make(), [prompt], no_harm=False)
        assert told(report) == pytest.approx(likely(found), abs=2e-4)
        assert list(told(report)) == sorted(likely(found), key=lambda task: -found[task])
        assert report["similarity"] == pytest.approx(nearest, abs=1e-3)
        expected = sum(likely(found).get(name, 0.0) * torch.from_numpy(v).double() for name, v in values.items())
        torch.testing.assert_close(delta[0], expected + torch.zeros(L, E), atol=1e-4, rtol=0)
        mixed += max(found.values()) < 0.9
    assert mixed, "every task is certain: the test cannot tell"


@pytest.mark.usefixtures("true_double")
@torch.no_grad()
def test_every_token_of_prompt_and_answer_is_routed_under_it(model, tokenizer, make):
    prompts = [question("low", 50), question("digit", 52, 5)]
    out, reports, delta = call(model, tokenizer, make(), prompts)
    assert [r["outcome"] for r in reports] == ["accepted"] * 2
    different = 0
    for row, prompt in enumerate(prompts):
        length = len(tokenizer(prompt)["input_ids"])
        ids = out.sequences[row : row + 1, -length - NEW : -1]
        with plain_routing(model, delta[row]):
            expected = full_logits(model, ids)[0, -NEW:]
        found = torch.stack([logits[row] for logits in out.logits])
        torch.testing.assert_close(found, expected.float(), atol=1e-6, rtol=1e-6)
        base = full_logits(model, ids)[0, -NEW:]
        different += not torch.allclose(base, expected, atol=1e-3)
        kl = (expected[0].log_softmax(-1).exp() * (expected[0].log_softmax(-1) - base[0].log_softmax(-1))).sum()
        assert reports[row]["kl"] == pytest.approx(float(kl), rel=1e-6)
        assert len(reports[row]["layers"]) == L
        assert reports[row]["experts"]
    assert different == 2


@pytest.mark.usefixtures("true_double")
def test_layers_below_the_first_one_fitted_are_not_touched(model, folder, tokenizer, make, tmp_path):
    strategy = make(deltas=bank(folder, tmp_path / "upper", first=2))
    out, (report,), delta = call(model, tokenizer, strategy, [question("low", 50)])
    assert not delta[:, :2].any()
    assert len(report["layers"]) == 2
    expected, _, _ = call(model, tokenizer, ttr.StaticRouting(delta=delta), [question("low", 50)])
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(out.logits, expected.logits, atol=1e-6, rtol=1e-6)


# --- by which part of a prompt ----------------------------------------------------------------------------


@pytest.mark.usefixtures("true_double")
def test_the_last_question_of_a_prompt_is_compared(model, folder, tokenizer, make):
    """Questions of another task stand before it; by the formula on hidden states of the whole text."""
    apart = 0
    for seed in range(3):
        before = "".join(question("digit", 20 + seed + i) + " yes\n" for i in range(3))
        prompt = before + question("low", 60 + seed)
        for embed_on, start in (("question", len(before)), ("all", 0), (r"yes\n", len(before) - 4)):
            found, nearest = plain_tasks(folder, make().deltas, tokenizer, model, prompt, start)
            _, (report,), _ = call(model, tokenizer, make(embed_on=embed_on), [prompt])
            assert told(report) == pytest.approx(likely(found), abs=2e-4)
            assert report["similarity"] == pytest.approx(nearest, abs=1e-3)
        whole, part = (plain_tasks(folder, make().deltas, tokenizer, model, prompt, n)[0] for n in (0, len(before)))
        apart += abs(whole["low"] - part["low"]) > 0.01
    assert apart, "the part does not matter: the test cannot tell"


def test_without_a_match_all_of_the_prompt_is_compared(olmoe, tokenizer, make):
    prompt = question("low", 3)
    reports = [call(olmoe, tokenizer, make(embed_on=e), [prompt])[1][0] for e in ("all", "nowhere", "question")]
    assert len({r["similarity"] for r in reports}) == 1


@pytest.mark.usefixtures("true_double")
def test_a_special_token_at_the_beginning_counts_with_the_question(model, folder, tokenizer, make):
    """As it does in references; its hidden state is like no other's."""
    prompt = "<s>" + question("digit", 1) + " yes\n" + question("low", 2)
    start = tokenizer(prompt)["input_ids"].index(tokenizer("Q")["input_ids"][0], 2)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[0]
    pooled = torch.cat([hidden[:1], hidden[start:]]).mean(0)
    found = PlainSet(folder, tokenizer).nearest(pooled.numpy(), 8, "all", most=1.0)
    _, (report,), _ = call(model, tokenizer, make(), [prompt])
    assert report["similarity"] == pytest.approx(found[0][1], abs=1e-3)


# --- what keeps its base routing --------------------------------------------------------------------------


def kept(model, tokenizer, strategy, prompt, words, no_harm=True):
    """The sequence keeps its base routing, bit for bit, and the report says why."""
    out, (report,), _ = call(model, tokenizer, strategy, [prompt], no_harm)
    assert words in report["outcome"]
    inputs = tokenizer([prompt], return_tensors="pt")
    base = model.generate(**inputs, max_new_tokens=NEW, **DICT)
    assert torch.equal(out.sequences, base.sequences)
    assert all(torch.equal(a, b) for a, b in zip(out.logits, base.logits, strict=True))
    assert report["layers"] == report["experts"] == []


def test_prompts_that_keep_their_base_routing(olmoe, folder, tokenizer, make, tmp_path):
    prompt = question("low", 50)
    kept(olmoe, tokenizer, make(min_similarity=1.0), prompt, "similar to the nearest reference, 1.00 is needed")
    kept(olmoe, tokenizer, make(kl_limit=1e-9), prompt, "rolled back: next-token KL")
    report = call(olmoe, tokenizer, make(), [prompt])[1][0]
    leader = report["tasks"][0]
    others = [task for task in LETTERS if task != leader["task"]]
    without = make(deltas=bank(folder, tmp_path / "others", accepted=others))
    kept(olmoe, tokenizer, without, prompt, f"skipped: no delta for {leader['task']} (rejected)")
    assert len(report["tasks"]) == 3
    uncertain = make(min_probability=leader["probability"] + 0.01)
    kept(olmoe, tokenizer, uncertain, prompt, f"skipped: the task is not certain, {leader['task']} has")
    # without no-harm a less probable task's delta applies by its probability, and any KL may be
    loose = make(deltas=without.deltas, kl_limit=1e-9)
    report, delta = call(olmoe, tokenizer, loose, [prompt], no_harm=False)[1:]
    assert report[0]["outcome"] == "accepted"
    assert delta.any()


def test_kept_rows_beside_adapted_ones_have_their_own_bits(model, tokenizer, make):
    """One row is rolled back for its KL, its neighbour is not."""
    prompts = [question("low", 50), question("digit", 52, 5)]
    kls = [report["kl"] for report in call(model, tokenizer, make(), prompts)[1]]
    limit = sum(kls) / 2
    out, reports, delta = call(model, tokenizer, make(kl_limit=limit), prompts)
    base = model.generate(**tokenizer(prompts, return_tensors="pt", padding=True), max_new_tokens=NEW, **DICT)
    row = kls.index(max(kls))
    assert "KL" in reports[row]["outcome"]
    assert reports[1 - row]["outcome"] == "accepted"
    assert not delta[row].any()
    assert delta[1 - row].any()
    assert torch.equal(out.sequences[row], base.sequences[row])
    for a, b in zip(out.logits, base.logits, strict=True):
        torch.testing.assert_close(a[row], b[row], atol=1e-6, rtol=0)


def test_identity(olmoe, folder, tokenizer, make, tmp_path):
    """No accepted task: no hook. Deltas of 0, with live taps: the same bits."""
    inputs = tokenizer([question("low", 50), question("digit", 52, 5)], return_tensors="pt", padding=True)
    none = make(deltas=bank(folder, tmp_path / "none", accepted=()))
    zero = make(deltas=bank(folder, tmp_path / "zero", scale=0.0))
    assert none.identity
    assert not zero.identity
    base = olmoe.generate(**inputs, max_new_tokens=NEW, **DICT)
    with ttr.adapt(olmoe, none, tokenizer=tokenizer) as adapted:
        assert adapted.strategies == ()
        out = adapted.generate(**inputs, max_new_tokens=NEW, **DICT)
        assert torch.equal(out.sequences, base.sequences)
        assert all(torch.equal(a, b) for a, b in zip(out.logits, base.logits, strict=True))
    with ttr.adapt(olmoe, zero, tokenizer=tokenizer) as adapted, torch.no_grad():
        # generate goes on from the prompt's cache, whose last token was read by itself: other products, other bits
        assert torch.equal(adapted.generate(**inputs, max_new_tokens=NEW, do_sample=False), base.sequences)
        assert [s.strategies["task_delta"]["kl"] for s in adapted.report.sequences] == pytest.approx([0, 0], abs=1e-6)
        assert torch.equal(adapted(**inputs, state=adapted.state).logits, olmoe(**inputs).logits)


# --- batches, beams, other strategies, state --------------------------------------------------------------


@pytest.mark.usefixtures("true_double")
def test_a_batch_equals_its_sequences_one_by_one(model, tokenizer, make):
    prompts = [question(task, 70 + n, n) for task, n in zip(LETTERS, (4, 9, 6), strict=True)]
    prompts[1] = question("sign", 5) + " yes\n" + prompts[1]
    out, reports, delta = call(model, tokenizer, make(), prompts)
    for row, prompt in enumerate(prompts):
        alone, (report,), own = call(model, tokenizer, make(), [prompt])
        assert torch.equal(out.sequences[row, -NEW:], alone.sequences[0, -NEW:])
        torch.testing.assert_close(delta[row], own[0], atol=1e-6, rtol=0)
        for a, b in zip(out.logits, alone.logits, strict=True):
            torch.testing.assert_close(a[row], b[0], atol=1e-5, rtol=1e-5)
        assert report["outcome"] == reports[row]["outcome"]


@pytest.mark.usefixtures("true_double")
@pytest.mark.parametrize(
    "more",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 4},
        {"use_cache": False},
    ],
    ids=str,
)
def test_every_way_of_decoding_is_that_of_a_static_delta(model, tokenizer, make, more):
    prompts = [question("low", 50), question("digit", 52, 5)]
    out, _, delta = call(model, tokenizer, make(), prompts, **more)
    copies = more.get("num_return_sequences", 1)
    assert delta.shape[0] == 2 * copies
    expected, _, _ = call(model, tokenizer, ttr.StaticRouting(delta=delta[::copies].clone()), prompts, **more)
    assert torch.equal(out.sequences, expected.sequences)


@pytest.mark.usefixtures("true_double")
def test_other_strategies_meet_its_delta(model, tokenizer, make):
    """Given deltas are added to it; what Rerouting optimises is on top of both; fewer experts come last."""
    prompts = [question("low", 50) + question("low", 52), question("digit", 51) + question("digit", 53, 4)]
    more = ttr.StaticRouting(delta=torch.randn(L, E, generator=torch.Generator().manual_seed(0)).double() / 10)
    rest = [ttr.DynamicK(p=0.6), ttr.Rerouting(steps=2, lr=0.1, layers="all", interval=None)]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    with ttr.adapt(model, [*rest, make(), more], tokenizer=tokenizer, no_harm=False) as adapted:
        assert [s.name for s in adapted.strategies] == ["static_routing", "task_delta", "rerouting", "dynamic_k"]
        out = adapted.generate(**inputs, max_new_tokens=NEW, **DICT)
        learned = adapted.state.tensors
    both = ttr.StaticRouting(delta=learned["task_delta"]["delta"] + more.delta)
    with ttr.adapt(model, [both, *rest], tokenizer=tokenizer, no_harm=False) as adapted:
        expected = adapted.generate(**inputs, max_new_tokens=NEW, **DICT)
        again = adapted.state.tensors
    torch.testing.assert_close(learned["rerouting"]["delta"], again["rerouting"]["delta"], atol=1e-6, rtol=0)
    assert torch.equal(out.sequences, expected.sequences)
    with pytest.raises(ttr.CompositionError, match="task_delta is given more than once"):
        ttr.adapt(model, [make(), make()], tokenizer=tokenizer)


@pytest.mark.usefixtures("true_double")
def test_both_streams_of_a_contrast_meet_it(model, tokenizer, make):
    prompts = [question("low", 50), question("digit", 52, 5)]
    out, _, delta = call(model, tokenizer, [make(), ttr.SCMoE()], prompts)
    expected, _, _ = call(model, tokenizer, [ttr.StaticRouting(delta=delta), ttr.SCMoE()], prompts)
    assert torch.equal(out.sequences, expected.sequences)


@pytest.mark.usefixtures("true_double")
def test_state_gives_what_generate_had(model, tokenizer, make, tmp_path):
    inputs = tokenizer([question("low", 50)], return_tensors="pt")
    other = tokenizer([question("digit", 52, 5)], return_tensors="pt")
    with ttr.adapt(model, make(), tokenizer=tokenizer) as adapted, torch.no_grad():
        one = adapted.generate(**inputs, max_new_tokens=1, **DICT)
        state = adapted.state
        ttr.save(tmp_path / "state", state)
        for learned in (state, ttr.load(tmp_path / "state")):
            logits = adapted(**inputs, state=learned).logits[:, -1]
            torch.testing.assert_close(logits.float(), one.logits[0], atol=1e-6, rtol=1e-6)
        assert torch.equal(adapted(**inputs).logits, model(**inputs).logits)
        # the next turn of a chat is looked at anew: it may be of another task
        turn = adapted.generate(**other, max_new_tokens=1, state=state, **DICT)
        fresh = adapted.generate(**other, max_new_tokens=1, **DICT)
        torch.testing.assert_close(turn.logits, fresh.logits, atol=1e-9, rtol=0)
        tensors = {"task_delta": {"delta": state.tensors["task_delta"]["delta"][:, :3]}}
        with pytest.raises(ttr.UnsupportedCallError, match=r"shape \(1, 3, 8\), the call needs \(1, 4, 8\)"):
            adapted(**inputs, state=type(state)(tensors, state.fingerprint))


# --- no trace, refusals, embedders ------------------------------------------------------------------------


def test_nothing_is_left_behind(olmoe, tokenizer, make, untouched, monkeypatch):
    prompts = [question("low", 50), question("digit", 52, 5)]
    with untouched(olmoe):
        call(olmoe, tokenizer, make(), prompts)
        call(olmoe, tokenizer, make(kl_limit=1e-9), prompts)
        call(olmoe, tokenizer, make(), prompts, num_beams=2)

        def interrupted(*_args, **_more):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("ttrouting.strategies._task_delta_run.recognise", interrupted)
            with pytest.raises(KeyboardInterrupt):
                call(olmoe, tokenizer, make(), prompts)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_probability": 1.1}, r"task_delta\.min_probability must be in \[0, 1\]"),
        ({"kl_limit": 0}, r"task_delta\.kl_limit must be in \(0"),
        ({"embed_on": "("}, "is no regular expression"),
        ({"embed_on": ""}, "'question', 'all' or a regular expression"),
        ({"index": "tree"}, r"task_delta\.index cannot be 'tree'"),
        ({"refset": 3}, "must be a reference set or its folder"),
        ({"deltas": 3}, "must be the folder of fitted deltas"),
    ],
    ids=str,
)
def test_options(options, words):
    with pytest.raises(ttr.ConfigError, match=words):
        ttr.TaskDelta(**options)


def test_models_sets_and_deltas_that_do_not_belong_together(olmoe, folder, tokenizer, make):
    with pytest.raises(ttr.ArtefactError, match=r"holds no deltas\.json.*ttrouting refset fit"):
        ttr.adapt(olmoe, make(deltas=None), tokenizer=tokenizer)
    with pytest.raises(ttr.ArtefactError, match="was built with"):
        ttr.adapt(tiny("olmoe", seed=5), make(), tokenizer=tokenizer)
    with pytest.raises(ttr.ConfigError, match="needs the tokenizer"):
        ttr.adapt(olmoe, make())
    with pytest.raises(ttr.ConfigError, match="embedded by the model itself"):
        ttr.adapt(olmoe, make(embedder=lambda texts: np.ones((len(texts), 4))), tokenizer=tokenizer)
    ttr.adapt(olmoe, make(embed_on="all")).close()


def test_a_set_with_an_embedder_of_its_own_gets_the_text_of_the_question(olmoe, tokenizer, tmp_path):
    asked = []

    def letters(texts):
        asked.extend(texts)
        return np.array([[1 + sum(map(text.count, LETTERS[task])) for task in LETTERS] for text in texts], float)

    rows = [{"q": question(task, i), "a": "yes", "task": task} for i in range(12) for task in LETTERS]
    shape = {"prompt": "{q}", "answer": "{a}", "task": "{task}", "keep": "all", "embedder": letters}
    folder = refsets.build(tiny("olmoe"), tokenizer, rows, tmp_path / "set", **shape).path
    deltas = bank(folder, tmp_path / "deltas", weight=20 * np.eye(3))  # a dimension for each task
    strategy = ttr.TaskDelta(str(folder), deltas, embedder=letters, kl_limit=1e9)
    prompt = question("digit", 1) + " yes\n" + question("low", 2)
    _, (report,), _ = call(olmoe, tokenizer, strategy, [prompt])
    assert asked[-1] == question("low", 2)
    assert report["tasks"] == [{"task": "low", "probability": pytest.approx(1.0), "delta": "accepted"}]
    assert dataclasses.replace(strategy, min_probability=0.5).to_dict()["embedder"] == "callable:letters"


# --- on a model whose routing means something -------------------------------------------------------------


@needs_pocket
@pytest.mark.slow
def test_it_mends_the_task_it_was_fitted_for_and_no_other(tmp_path):
    """Digits spelled as letters: the experts can reverse them, the router does not find those experts."""
    model, tokenizer = ttr.load_pocket()
    pairs = (("reverse", "letters", 48), ("reverse", "digits", 24), ("sort", "letters", 24))
    rows = [
        {"q": e.question, "a": e.answer, "task": f"{e.skill}/{e.dialect}"}
        for skill, dialect, n in pairs
        for e in sample(skill, dialect, "reference", n)
    ]
    shape = {"prompt": "Q: {q}\nA: ", "answer": "{a}\n", "task": "{task}", "keep": "all"}
    refset = refsets.build(model, tokenizer, rows, tmp_path / "set", **shape)
    found = fit_tasks(model, tokenizer, refset, steps=30)
    assert [task.task for task in found.accepted] == ["reverse/letters"]
    right = {}
    for skill, dialect in (("reverse", "letters"), ("reverse", "digits")):
        questions = sample(skill, dialect, "test", 12)
        shots = sample("sort", "letters", "dev", 2)  # another task before the question
        prompts = [few_shot_prompt(shots if i % 2 else [], q) + " " for i, q in enumerate(questions)]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True)
        length = inputs["input_ids"].shape[1]
        base = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        with ttr.adapt(model, ttr.TaskDelta(refset), tokenizer=tokenizer) as adapted:
            out = adapted.generate(**inputs, max_new_tokens=12, do_sample=False)
            outcomes = [s.strategies["task_delta"]["outcome"] for s in adapted.report.sequences]
        for name, ids in (("base", base), ("adapted", out)):
            texts = tokenizer.batch_decode(ids[:, length:], skip_special_tokens=True)
            right[name, dialect] = sum(is_correct(t, q) for t, q in zip(texts, questions, strict=True))
        if dialect == "letters":
            assert outcomes.count("accepted") >= 10
        else:
            assert outcomes == ["skipped: no delta for reverse/digits (not needed)"] * 12
            assert torch.equal(out, base)
    assert right["adapted", "letters"] >= right["base", "letters"] + 4
