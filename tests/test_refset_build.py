"""Building reference sets: what is kept and what is stored, by plain forwards."""

import functools
import math
import re

import numpy as np
import pytest
import safetensors.numpy
import torch

import ttrouting as ttr
from oracles.questions import SHAPE, needs_pocket, questions, texts
from ttrouting.errors import ArtefactError, ConfigError, UnsupportedCallError
from ttrouting.pocket.skills import sample
from ttrouting.refsets import ReferenceSet, build
from ttrouting.refsets.judging import same_match
from ttrouting.refsets.manifest import DATA_FILES
from ttrouting.sites import find_sites
from ttrouting.target import Target


@pytest.fixture(scope="module")
def pocket():
    return ttr.load_pocket()


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return questions(48)


@pytest.fixture(scope="module")
def everything(pocket, rows, tmp_path_factory) -> ReferenceSet:
    """All 48 questions, the wrongly answered ones too."""
    return build(*pocket, rows, tmp_path_factory.mktemp("all") / "set", keep="all", batch_size=7, **SHAPE)


@functools.cache
def written(model, tokenizer, prompt: str, **options) -> str:
    """What greedy decoding adds, one prompt at a time."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, **options)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=False)


def likelihood(model, tokenizer, prompt: str, answer: str) -> float:
    """Log-likelihood of an answer, one at a time."""
    ids = tokenizer(prompt)["input_ids"] + tokenizer(answer, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    total = 0.0
    for place in range(len(tokenizer(prompt)["input_ids"]), len(ids)):
        shares = torch.exp(logits[place - 1] - logits[place - 1].max())
        total += math.log(float(shares[ids[place]] / shares.sum()))
    return total


# --- what is in a set -----------------------------------------------------------------------------------


@needs_pocket
def test_exact_keeps_what_greedy_decoding_writes(pocket, rows, tmp_path):
    refset = build(*pocket, rows, tmp_path / "set", batch_size=16, **SHAPE)
    expected = [
        (f"Q: {row['question']}\nA:", f" {row['answer']}\n")
        for row in rows
        if written(*pocket, f"Q: {row['question']}\nA:") == f" {row['answer']}\n"
    ]
    assert texts(refset) == expected
    assert 20 < len(expected) < 40
    assert refset.correct.all()
    counts = refset.manifest["counts"]
    assert (counts["records"], counts["correct"], counts["read"]) == (len(expected), len(expected), 48)


@needs_pocket
def test_all_are_kept_with_a_flag(everything, pocket, rows):
    assert texts(everything) == [(f"Q: {row['question']}\nA:", f" {row['answer']}\n") for row in rows]
    right = [written(*pocket, prompt) == answer for prompt, answer in texts(everything)]
    assert everything.correct.tolist() == right
    assert [everything.record(i).correct for i in range(48)] == right
    assert everything.record(1).task == rows[1]["skill"]
    assert everything.record(1).source == "made"


@needs_pocket
def test_pathways_and_embeddings_are_those_of_plain_forwards(everything, pocket):
    """One prompt at a time, without its answer, without padding, by the model's own outputs."""
    model, tokenizer = pocket
    omega = everything.omega(range(48))
    for number, (prompt, _) in enumerate(texts(everything)):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            hidden = model.model(ids).last_hidden_state[0]  # [T, D]
            logits = model(ids, output_router_logits=True).router_logits  # L x [T, E]
        expected = np.stack([layer[-1].softmax(-1).numpy() for layer in logits])
        np.testing.assert_allclose(omega[number], expected, atol=1e-3)  # stored in half precision
        mean = hidden.numpy().mean(0)
        np.testing.assert_allclose(everything.embeddings()[number], mean / np.linalg.norm(mean), atol=5e-4)
    arrays = safetensors.numpy.load_file(everything.path / "embeddings.safetensors")
    rows = arrays["embeddings"].astype(np.float64)
    np.testing.assert_allclose(arrays["mean"], rows.mean(0), atol=1e-6)
    np.testing.assert_allclose(arrays["scale"], rows.std(0), atol=1e-6)


@needs_pocket
def test_the_manifest_says_where_a_set_comes_from(everything, pocket, rows):
    manifest = everything.manifest
    target = Target(pocket[0], find_sites(pocket[0]))
    assert manifest["fingerprint"] == target.fingerprint
    everything.check_model(target.fingerprint)
    assert manifest["sites"]["layers"] == 6
    assert manifest["sites"]["experts"] == 16
    assert manifest["embedder"] == {"name": "model", "dimension": 128}
    plan = manifest["provenance"]["plan"]
    assert plan["prompt"] == SHAPE["prompt"]
    assert (plan["judge"], plan["keep"], plan["limit"], plan["shard"]) == ("exact", "all", None, "1/1")
    assert manifest["provenance"]["versions"]["torch"] == torch.__version__
    assert sorted(manifest["files"]) == sorted(DATA_FILES)
    assert sorted(f.name for f in everything.path.iterdir()) == sorted([*DATA_FILES, "manifest.json"])


@needs_pocket
def test_an_answer_that_goes_on_after_an_end_of_text_is_never_written(pocket, tmp_path):
    """`generate` stops at a line end, one forward over the whole answer would not see that."""
    model, tokenizer = pocket
    prompt = f"Q: {sample('add', 'digits', 'reference', 1)[0].question}\nA:"
    longer = written(model, tokenizer, prompt, eos_token_id=2)  # with the line end as a token like any other
    line, _, rest = longer.partition("\n")
    assert rest
    rows = [{"p": prompt, "a": line + "\n"}, {"p": prompt, "a": f"{line}\n{rest[:3]}"}]
    refset = build(*pocket, rows, tmp_path / "set", prompt="{p}", answer="{a}", keep="all")
    assert refset.correct.tolist() == [True, False]


@needs_pocket
@pytest.mark.parametrize("score", ["per_byte", "sum"])
def test_choice_keeps_what_is_likeliest(pocket, tmp_path, score):
    model, tokenizer = pocket
    rows = []
    for e in sample("add", "digits", "reference", 12):
        wrong = [str(int(e.answer) + 10), e.answer[0], f"{e.answer}{e.answer}"]
        place = int(e.answer) % 4
        rows.append({"q": e.question, "in": {"options": [*wrong[:place], e.answer, *wrong[place:]]}, "label": place})
        rows.append({"q": e.question, "in": {"options": wrong}, "label": 1})  # the right answer is not offered
    shape = {"prompt": "Q: {q}\nA:", "answer": " {in.options[label]}", "choices": "in.options", "judge": "choice"}
    refset = build(*pocket, rows, tmp_path / "set", keep="all", choice_score=score, batch_size=5, **shape)
    expected = []
    for row in rows:
        options, prompt = row["in"]["options"], f"Q: {row['q']}\nA:"
        scores = [likelihood(model, tokenizer, prompt, f" {option}") for option in options]
        if score == "per_byte":
            scores = [s / len(option) for s, option in zip(scores, options, strict=True)]
        expected.append(scores.index(max(scores)) == row["label"])
    assert refset.correct.tolist() == expected
    assert 0 < sum(expected) < len(rows)
    assert texts(refset) == [(f"Q: {r['q']}\nA:", f" {r['in']['options'][r['label']]}") for r in rows]
    other = build(*pocket, rows, tmp_path / "other", keep="all", choice_score="sum", **shape)
    assert (other.correct.tolist() == expected) == (score == "sum"), "both scores agree: the test shows nothing"
    one, two = np.flatnonzero(refset.correct)[0], 0  # pathways are the question's, whatever is chosen
    np.testing.assert_allclose(refset.omega([one, two]), other.omega([one, two]), atol=1e-3)


@needs_pocket
def test_regex_keeps_what_ends_in_the_same(pocket, tmp_path):
    model, tokenizer = pocket
    rows = [{"q": e.question, "a": e.answer} for e in sample("word", "digits", "reference", 10)]
    for row in rows[::2]:
        row["a"] = f"guessed={row['a'].rpartition('=')[2]}"  # another way to the same number
    rows[0]["a"] = "guessed=1000"
    shape = {
        "prompt": "Q: {q}\nA:",
        "answer": " {a}\n",
        "judge": "regex",
        "pattern": r"=(\d+)\n$",
        "max_new_tokens": 24,
    }
    refset = build(*pocket, rows, tmp_path / "set", keep="all", batch_size=4, **shape)
    expected = []
    for row in rows:
        found = re.search(r"=(\d+)\n$", written(model, tokenizer, f"Q: {row['q']}\nA:"))
        expected.append(found is not None and found[1] == row["a"].rpartition("=")[2])
    assert refset.correct.tolist() == expected
    assert sum(expected[::2]) > 2
    assert not expected[0]


@pytest.mark.parametrize(
    ("pattern", "completion", "answer", "same"),
    [
        (r"#### (\d+)", "so 3+4 #### 7", "it is #### 7", True),
        (r"#### (\d+)", "so 3+4 #### 7", "7 ", True),  # nothing found in the answer: all of it, stripped
        (r"#### (\d+)", "so 3+4 #### 7", "#### 8", False),
        (r"#### (\d+)", "7", "7", False),
        (r"\d+", "a 12 b 13", "12", True),
        (r"(a)?(\d)", "5", "a5", False),  # the first group took no part
    ],
)
def test_what_a_pattern_finds(pattern, completion, answer, same):
    assert same_match(pattern, completion, answer) is same


@needs_pocket
def test_other_embedders_get_the_prompts_that_are_kept(pocket, rows, tmp_path):
    seen: list[str] = []

    def letters(batch: list[str]) -> np.ndarray:
        seen.extend(batch)
        return np.array([[text.count(c) for c in "0123456789:"] for text in batch]) + 0.5

    refset = build(*pocket, rows, tmp_path / "set", embedder=letters, batch_size=5, **SHAPE)
    assert (refset.embedder_name, refset.dimension) == ("callable:letters", 11)
    prompts = [prompt for prompt, _ in texts(refset)]
    assert seen[-len(prompts) :] == prompts
    expected = letters(prompts)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(refset.embeddings(), expected, atol=5e-4)
    assert set(safetensors.numpy.load_file(refset.path / "embeddings.safetensors")) == {"embeddings"}


# --- what is refused --------------------------------------------------------------------------------


@needs_pocket
def test_no_record_was_kept(pocket, rows, tmp_path):
    with pytest.raises(ArtefactError, match=r"No record was kept: of 3 records .* 0 were answered correctly"):
        build(*pocket, rows[:1] + rows[3:4] + rows[6:7], tmp_path / "set", **SHAPE)
    assert len(build(*pocket, rows[:1], tmp_path / "set", keep="all", **SHAPE)) == 1  # nothing is in the way


@needs_pocket
def test_embeddings_that_are_not_finite_are_refused_with_the_first_record(pocket, rows, tmp_path):
    def broken(batch: list[str]) -> np.ndarray:
        return np.array([[np.nan if rows[7]["question"] in text else 1.0, 1.0] for text in batch])

    words = "1 of 4 embeddings in a batch are zero or not finite, the first at record 8"
    with pytest.raises(ArtefactError, match=words):
        build(*pocket, rows, tmp_path / "set", embedder=broken, keep="all", batch_size=4, **SHAPE)
    model, tokenizer = ttr.load_pocket()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ArtefactError, match=r"embeddings in a batch are zero or not finite.*--dtype float32"):
        build(model, tokenizer, rows, tmp_path / "other", keep="all", **SHAPE)


@needs_pocket
def test_calls_that_are_refused(pocket, rows, tmp_path):
    with pytest.raises(ConfigError, match="batch_size must be at least 1"):
        build(*pocket, rows, tmp_path / "set", batch_size=0, **SHAPE)
    model, tokenizer = ttr.load_pocket()
    with ttr.adapt(model, "scmoe") as adapted, pytest.raises(ConfigError, match="a loaded model that is not adapted"):
        build(adapted, tokenizer, rows, tmp_path / "set", **SHAPE)
    with pytest.raises(UnsupportedCallError, match="training mode"):
        build(model.train(), tokenizer, rows, tmp_path / "set", **SHAPE)
    assert not (tmp_path / "set").exists()
