"""Which tasks of a set get a delta, what is written of it, and does the command do what the library does?"""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import ttrouting as ttr
from oracles.c3po import PlainSet
from oracles.questions import needs_pocket
from oracles.refset import raw_set, write_raw
from ttrouting.cli import app
from ttrouting.pocket.skills import sample
from ttrouting.refsets import ReferenceSet, TaskDeltas, TaskFit, build, fit_tasks, fitting, task_deltas
from ttrouting.refsets.company import embedded
from ttrouting.refsets.familiar import least_similarity
from ttrouting.refsets.fitting import common_head, judge
from ttrouting.refsets.task_classifier import TaskClassifier
from ttrouting.refsets.task_deltas import DELTAS, write_task_deltas
from ttrouting.shared_fit import Answered, Part, fit_shared_delta
from ttrouting.target import Target

# --- the rule -----------------------------------------------------------------------------------------


def held(before, after, right_before=None, right_after=None):
    wrong = [False] * len(before)
    return Part(
        list(range(len(before))), Answered(before, right_before or wrong), Answered(after, right_after or wrong)
    )


def one_sided(before, after):
    """Share of all sign flips whose sum is at most the one seen."""
    change = np.array(after) - np.array(before)
    sums = [float((np.array(signs) * change).sum()) for signs in itertools.product((1, -1), repeat=len(change))]
    return sum(s <= change.sum() + 1e-12 for s in sums) / len(sums)


BEFORE = [1.0, 0.8, 1.2, 0.9, 1.1, 0.7, 1.3, 1.0]


def test_a_delta_is_accepted_where_held_out_losses_fall_beyond_chance():
    for drops, outcome in (
        ([0.5, 0.3, 0.4, 0.2, 0.6, 0.1, 0.35, 0.45], "accepted"),  # all fall: p = 1/256
        ([0.5, -0.3, 0.4, -0.2, 0.6, -0.1, 0.35, -0.45], "rejected"),
        ([-0.5, -0.3, -0.4, -0.2, -0.6, -0.1, -0.35, -0.45], "rejected"),  # all rise, as far from chance
        ([0.5, 0.3, 0.4, 0.2, 0.6, 0.1, -0.35, 0.45], "accepted"),
    ):
        after = [b - d for b, d in zip(BEFORE, drops, strict=True)]
        found, reason, p = judge(held(BEFORE, after), step=10)
        assert found == outcome, reason
        assert p == pytest.approx(one_sided(BEFORE, after), abs=1 / 256 + 1e-9)
        assert (p < 0.05) == (outcome == "accepted")


def test_a_delta_is_rejected_where_fewer_answers_are_right():
    after = [b / 2 for b in BEFORE]
    right = [True, True, False, False, True, False, False, False]
    assert judge(held(BEFORE, after, right, right), 10)[0] == "accepted"
    assert judge(held(BEFORE, after, right, [False, *right[1:]]), 10)[:2] == (
        "rejected",
        "fewer are right: 38% -> 25%",
    )


def test_nothing_is_fitted_where_nothing_is_wrong():
    right = [True] * 8
    assert judge(held(BEFORE, BEFORE, right, right), 0)[0] == "not needed"
    assert judge(held(BEFORE, BEFORE), 0)[:2] == ("rejected", "no step lowered the loss")


def test_the_head_is_what_all_prompts_begin_with_and_nothing_else_holds():
    assert common_head(["Q: 1\nA:", "Q: 22\nA:", "Q: a\nA:"]) == "Q: "
    assert common_head(["The end", "The start of The end"]) == ""  # it may stand inside a question
    assert common_head(["one", "two"]) == ""
    assert common_head(["  one", "  two"]) == ""


# --- files --------------------------------------------------------------------------------------------

TASKS = [
    TaskFit("t0", 14, "accepted", "loss fell", 0, 4, 0.5, 0.75, 1.0, 0.5, 0.01, 20),
    TaskFit("t1", 13, "rejected", "no step lowered the loss"),
    TaskFit("t2", 13, "accepted", "loss fell", 1, 4, 0.5, 0.75, 1.0, 0.5, 0.01, 20),
]


@pytest.fixture
def refset(tmp_path):
    return ReferenceSet.open(write_raw(tmp_path / "set", *raw_set()))


def facts(refset):
    return {"fingerprint": refset.fingerprint, "refset": refset.identity, "first": 1, "head": "Q: ", "familiar": 0.5}


def values(seed=0):
    return np.random.default_rng(seed).normal(size=(2, 3, 5)).astype(np.float32)


def classifier(refset, seed=0):
    random = np.random.default_rng(seed)
    weight, bias = random.normal(size=(3, refset.dimension)), random.normal(size=3)
    return TaskClassifier(weight.astype(np.float32), bias.astype(np.float32))


def write(refset, deltas, tasks=TASKS):
    write_task_deltas(refset.path, deltas, classifier(refset), tasks, facts(refset))


def test_deltas_come_back(refset):
    write(refset, values())
    back = TaskDeltas.open(refset.path, refset)
    assert np.array_equal(back.values, values())
    assert np.array_equal(back.classifier.weight, classifier(refset).weight)
    assert np.array_equal(back.classifier.bias, classifier(refset).bias)
    assert list(back.tasks.values()) == TASKS
    assert [task.task for task in back.accepted] == ["t0", "t2"]
    assert (back.first, back.head) == (1, "Q: ")
    assert ReferenceSet.open(refset.path).identity == refset.identity  # beside a set they change nothing in it


def test_a_kill_leaves_the_old_deltas_or_the_new_ones(refset, monkeypatch):
    write(refset, values(0))

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(task_deltas, "write_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            write(refset, values(1))
    assert np.array_equal(TaskDeltas.open(refset.path, refset).values, values(0))
    write(refset, values(2))
    assert np.array_equal(TaskDeltas.open(refset.path, refset).values, values(2))
    assert len(list(refset.path.glob("deltas-*.safetensors"))) == 1


def signed(folder, change):
    """The manifest with a change and with a hash over itself that fits."""
    manifest = json.loads((folder / DELTAS).read_text())
    change(manifest)
    task_deltas.write_manifest(folder / DELTAS, manifest)


DAMAGE = {
    "cut short": (lambda folder, file: file.write_bytes(file.read_bytes()[:-1]), "bytes, its manifest says"),
    "changed": (lambda folder, file: file.write_bytes(file.read_bytes()[:-1] + b"x"), "sha256 is not"),
    "gone": (lambda folder, file: file.unlink(), "is missing"),
    "no deltas": (lambda folder, file: (folder / DELTAS).unlink(), "holds no deltas.json.*ttrouting refset fit"),
    "edited": (
        lambda folder, file: (folder / DELTAS).write_text((folder / DELTAS).read_text().replace("t1", "t9")),
        "was changed after it was written",
    ),
    "other data": (lambda folder, file: signed(folder, lambda m: m.update(refset="f" * 64)), "another reference set"),
    "other model": (lambda folder, file: signed(folder, lambda m: m.update(fingerprint="f" * 64)), "another model"),
    "other schema": (lambda folder, file: signed(folder, lambda m: m.update(schema=1)), "schema 1; this version"),
    "no layers": (lambda folder, file: signed(folder, lambda m: m.update(first=3)), "begins at layer 3 of 3"),
    "a task twice": (lambda folder, file: signed(folder, lambda m: m["tasks"].append(m["tasks"][1])), "one entry"),
    "a row too many": (
        lambda folder, file: signed(folder, lambda m: m["tasks"][1].update(outcome="accepted", row=2)),
        r"should hold delta, fp32 \[3, 3, 5\]",
    ),
    "a task that the classifier does not know": (
        lambda folder, file: signed(folder, lambda m: m["tasks"].append({**m["tasks"][1], "task": "t9"})),
        r"should hold classifier.weight, fp32 \[4, 12\]",
    ),
    "outside": (
        lambda folder, file: signed(folder, lambda m: m.update(files={"../x": next(iter(m["files"].values()))})),
        "no plain file in its folder",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_files_that_are_refused(refset, name):
    write(refset, values())
    harm, words = DAMAGE[name]
    harm(refset.path, next(refset.path.glob("deltas-*.safetensors")))
    with pytest.raises(ttr.ArtefactError, match=words):
        TaskDeltas.open(refset.path, refset)


def test_numbers_that_are_not_finite_are_refused(refset):
    write(refset, values() * np.nan)
    with pytest.raises(ttr.ArtefactError, match="numbers of delta that are not finite"):
        TaskDeltas.open(refset.path, refset)


# --- how similar ----------------------------------------------------------------------------------------


def test_the_least_similarity_is_that_of_the_loneliest_reference(tmp_path):
    """Of a set whose embedder knows single texts only; all references are tried, by hand one by one."""
    refset = ReferenceSet.open(write_raw(tmp_path / "set", *raw_set(), embedder="callable:mine"))
    records = [refset.record(i) for i in range(len(refset))]
    unit = np.asarray(refset.embeddings(), np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    nearest = [max(float(a @ b) for j, b in enumerate(unit) if j != i) for i, a in enumerate(unit)]
    assert least_similarity(None, refset, records, "Q: ", 8, 0) == pytest.approx(0.75 * min(nearest), abs=1e-3)


@needs_pocket
def test_questions_are_embedded_where_they_stand_in_a_text(small):
    """The tokens of the last question alone, by hidden states of the whole text; by hand for each reference."""
    refset = ReferenceSet.open(small)
    model, tokenizer = ttr.load_pocket()
    records = [refset.record(i) for i in range(len(refset))]
    read = []

    class Watched(type(model.model)):
        def forward(self, *args, **more):
            read.extend(row[row != 0] for row in more["input_ids"] * more["attention_mask"])
            return super().forward(*args, **more)

    target = Target(model, ttr.find_sites(model), tokenizer)
    model.model.__class__ = Watched
    found = least_similarity(target, refset, records, "Q: ", 16, 0)
    texts, lowest, plain = list(read), 1.0, PlainSet(small, tokenizer)
    assert len(texts) == 64
    for ids in texts:
        text = tokenizer.decode(ids)
        assert text.count("Q: ") == 4
        question = text[text.rindex("Q: ") :]
        own = next(i for i, record in enumerate(records) if record.prompt == question)
        with torch.no_grad():
            hidden = model.model(input_ids=ids[None], attention_mask=torch.ones_like(ids[None])).last_hidden_state[0]
        pooled = torch.cat([hidden[:1], hidden[-len(question) :]]).mean(0)  # a special token begins each text
        near = plain.nearest(pooled.numpy(), 2, "all", most=1.0)
        lowest = min(lowest, next(cosine for number, cosine, _ in near if number != own))
    assert found == pytest.approx(0.75 * lowest, abs=1e-3)


@needs_pocket
def test_the_classifier_sees_references_in_longer_texts(small, monkeypatch):
    """Each of up to 48 of a task twice, after one to six solved others: of its own task, and of any."""
    refset, texts = ReferenceSet.open(small), []
    model, tokenizer = ttr.load_pocket()
    records = [refset.record(i) for i in range(len(refset))]
    own = {t: [i for i, r in enumerate(records) if r.task == t] for t in sorted({r.task for r in records})}

    def watched(target, rows, head, batch_size):
        texts.extend(tokenizer.decode(row, skip_special_tokens=True) for row in rows)
        return embedded(target, rows, head, batch_size)

    monkeypatch.setattr(fitting, "embedded", watched)
    fitted = fitting._classifier(Target(model, ttr.find_sites(model), tokenizer), refset, records, own, "Q: ", 16, 0)
    assert fitted.right > 0.9
    prompts = {r.prompt: r for r in records}
    asked = ["Q: " + text.rsplit("Q: ", 1)[1] for text in texts]
    assert {prompt: asked.count(prompt) for prompt in asked} == dict.fromkeys(prompts, 2)
    mixed = 0
    for number, (text, prompt) in enumerate(zip(texts, asked, strict=True)):
        before = [r for r in records if r.solved in text[: -len(prompt)]]
        assert 1 <= len(before) <= 6
        assert sorted(r.solved for r in before) == sorted(_solved(text[: -len(prompt)]))
        assert prompts[prompt] not in before
        if number % 2 == 0:
            assert {r.task for r in before} == {prompts[prompt].task}
        mixed += len({r.task for r in before}) > 1
    assert mixed > 20


def _solved(front):
    return ["Q: " + part for part in front.split("Q: ")[1:]]


# --- fitting a set ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The pocket model's references of one shifted and one trained pair, and of one with too few."""
    rows = [
        {"q": e.question, "a": e.answer, "task": f"{e.skill}/{e.dialect}"}
        for skill, dialect, n in (("reverse", "letters", 48), ("sort", "digits", 24), ("add", "digits", 5))
        for e in sample(skill, dialect, "reference", n)
    ]
    model, tokenizer = ttr.load_pocket()
    shape = {"prompt": "Q: {q}\nA: ", "answer": "{a}\n", "task": "{task}", "keep": "all"}
    return build(model, tokenizer, rows, tmp_path_factory.mktemp("fit") / "set", **shape).path


def run(*arguments):
    done = CliRunner().invoke(app, ["refset", "fit", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


@needs_pocket
@pytest.mark.slow
def test_the_command_fits_what_is_wrong_and_leaves_what_is_right(small, tmp_path):
    done = run(small, "--steps", "20", "--out", tmp_path / "deltas", "--json")
    found = json.loads(done.stdout)
    by_task = {task["task"]: task for task in found["tasks"]}
    assert found["head"] == "Q: "
    assert found["classifier"]["right"] > 0.9
    assert {name: task["outcome"] for name, task in by_task.items()} == {
        "add/digits": "too few",
        "reverse/letters": "accepted",
        "sort/digits": "not needed",
    }
    refset = ReferenceSet.open(small)
    assert not (small / DELTAS).exists()
    deltas = TaskDeltas.open(tmp_path / "deltas", refset)
    model, tokenizer = ttr.load_pocket()
    records = [refset.record(i) for i in range(len(refset))]
    pairs = [(r.prompt, r.answer) for r in records if r.task == "reverse/letters"]
    by_hand = fit_shared_delta(model, tokenizer, pairs, steps=20)
    assert np.allclose(deltas.values[0], by_hand.delta.numpy(), atol=1e-5)
    assert by_task["reverse/letters"]["loss_after"] == pytest.approx(by_hand.held.after.loss, abs=1e-5)
    shown = run(small, "--steps", "1", "--out", tmp_path / "again").stdout.splitlines()
    assert shown[0].split()[:2] == ["task", "references"]
    assert len(shown) == 4


@needs_pocket
def test_requests_that_are_refused(small, tmp_path):
    model, tokenizer = ttr.load_pocket()
    other = ReferenceSet.open(write_raw(tmp_path / "other", *raw_set()))
    with pytest.raises(ttr.ArtefactError, match="was built with 'made'"):
        fit_tasks(model, tokenizer, other)
    refset = ReferenceSet.open(small)
    (tmp_path / "file").touch()
    with pytest.raises(ttr.ArtefactError, match=r"Choose another folder for the deltas: out \(--out DIR\)"):
        fit_tasks(model, tokenizer, refset, tmp_path / "file" / "deltas")
    for options, words in (
        ({"shots": -1}, "shots must be a whole number"),
        ({"shots": 40}, "use fewer solved examples"),
        ({"layers": "random:0.5"}, "must be 'last:N' or 'all'"),
    ):
        with pytest.raises(ttr.ConfigError, match=words):
            fit_tasks(model, tokenizer, refset, tmp_path / "none", **options)
    done = run(tmp_path / "nowhere")
    assert done.exit_code == 2
    assert "holds no manifest.json" in done.stderr
    plain = shutil.copytree(small, tmp_path / "plain")
    rows = [{"q": f"{i}+1", "a": str(i + 1)} for i in range(8)]
    shutil.rmtree(plain)
    build(model, tokenizer, rows, plain, prompt="Q: {q}\nA: ", answer="{a}\n", keep="all")
    with pytest.raises(ttr.ConfigError, match="labels no tasks"):
        fit_tasks(model, tokenizer, ReferenceSet.open(plain))
    assert not (tmp_path / "none").exists()
