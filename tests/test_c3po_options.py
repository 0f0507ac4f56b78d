"""C3PO's options: what is refused and in which words, files and the command line, embedders of the user's own."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

import ttrouting as ttr
from families.build import build
from oracles.c3po import PlainSet
from oracles.refset import forge, read_manifest
from ttrouting.cli.settings import make_strategies
from ttrouting.errors import ArtefactError, ConfigError, UnsupportedModelError
from ttrouting.refsets import ReferenceSet, resolve

QUESTION = "what is it"


def letters(texts):
    """Eight counts of letters: an embedder that a user may write."""
    return [[1 + text.count(c) for c in "aeiou (#"] for text in texts]


def fewer(texts):
    return [row[:5] for row in letters(texts)]


@dataclasses.dataclass
class Named:
    """An embedder with a name of its own."""

    name: str = "mine"
    dimension: int = 8

    def embed(self, texts):
        return np.array(letters(texts), dtype=np.float32)


@pytest.fixture(scope="module")
def folder(references):
    return references("olmoe")


@pytest.fixture(scope="module")
def counted(references):
    """A set embedded by `letters`."""
    return references("olmoe", letters)


def ask(model, tokenizer, strategy, no_harm=False, **call):
    with ttr.adapt(model, strategy, no_harm=no_harm, tokenizer=tokenizer) as adapted:
        adapted.generate(**tokenizer([QUESTION], return_tensors="pt"), max_new_tokens=1, do_sample=False, **call)
        return adapted.state.tensors["c3po"], adapted.report.sequences[0].strategies["c3po"]


# --- refused when it is made ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"refset": 5}, "refset must be a reference set or its folder, got 5"),
        ({"refset": None}, "refset must be"),
        ({"surrogate": "ngdd"}, "Did you mean 'ngd'"),
        ({"k": 0}, "k must be in [1, 1000], got 0"),
        ({"k": 2.5}, "k must be a whole number"),
        ({"k": True}, "k must be a whole number"),
        ({"steps": -1}, "steps must be in [0, 10000]"),
        ({"lr": float("nan")}, "lr must be in [0, 100]"),
        ({"eps": 0}, "eps must be in (0, 2]"),
        ({"eps": 2.5}, "eps must be in (0, 2]"),
        ({"eps": 0.5, "surrogate": "mode_finding"}, "Leave eps out"),
        ({"sigma": 0.0}, "sigma must be in (0, inf), got 0.0"),
        ({"alpha": 1.1}, "alpha must be in [0, 1]"),
        ({"layers": "highest:0.5"}, "'last:N' or 'all', got 'highest:0.5'"),
        ({"layers": "last:0"}, "at least 1"),
        ({"layers": "lats:3"}, "Did you mean 'last'"),
        ({"core_experts": 0}, "core_experts must be in [1, 10000], got 0"),
        ({"core_experts": 0.0}, "core_experts must be in (0, 1], got 0.0"),
        ({"core_experts": 1.5}, "core_experts must be in (0, 1]"),
        ({"core_experts": True}, "core_experts must be a number, got True"),
        ({"kernel": "gausian"}, "Did you mean 'gaussian'"),
        ({"scope": "last"}, "scope cannot be 'last'"),
        ({"use": "successfull"}, "Did you mean 'successful'"),
        ({"index": "faiss"}, "index cannot be 'faiss'"),
        ({"max_similarity": 1.01}, "max_similarity must be in [-1, 1]"),
        ({"kl_limit": 0}, "kl_limit must be in (0"),
        ({"surrogate": "oracle"}, "surrogate='oracle' needs them"),
        ({"labels": ("a",)}, "no other may have them"),
        ({"surrogate": "oracle", "labels": "Paris"}, "a list of answers, one for each sequence"),
        ({"surrogate": "oracle", "labels": ("a", "")}, "none of them empty; got ('a', '')"),
        ({"surrogate": "oracle", "labels": [1, 2]}, "a list of answers"),
        ({"surrogate": "oracle", "labels": 3}, "a list of answers"),
    ],
    ids=str,
)
def test_options_out_of_range_are_named(options, words):
    with pytest.raises(ConfigError) as error:
        ttr.C3PO(**options)
    assert words in str(error.value)


# --- refused when it meets a model ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "no_harm", "words"),
    [
        (
            {"core_experts": 9},
            False,
            r"core_experts=9, and model\.layers\.0\.mlp has 8 experts.*a share such as 0\.3",
        ),
        ({"k": 25, "use": "all"}, False, r"k=25 asks for 25 neighbours; this .* has 24 references\. .*larger set\."),
        ({"k": 24, "use": "all"}, True, r"k=24 asks for 24 neighbours and one more to judge by \(no_harm\)"),
        ({"k": 20}, False, r"has 1\d successful references\. Use a smaller k or a larger set, or use='all'\."),
        ({"embedder": letters}, False, r"embedded by the model itself\. Leave it out"),
    ],
    ids=["core_experts", "k", "k and one to judge by", "successful", "embedder"],
)
def test_a_set_that_does_not_fit_the_options(olmoe, folder, tokenizer, untouched, options, no_harm, words):
    with untouched(olmoe), pytest.raises(ConfigError, match=words):
        ttr.adapt(olmoe, ttr.C3PO(refset=folder, **options), no_harm=no_harm, tokenizer=tokenizer)


def test_as_many_neighbours_as_there_are(olmoe, folder, tokenizer):
    for no_harm in (False, True):
        strategy = ttr.C3PO(refset=folder, k=24 - no_harm, use="all", max_similarity=1.0, steps=1)
        assert len(ask(olmoe, tokenizer, strategy, no_harm)[1]["neighbours"]) == 24
    # an eps-ball holds what there is
    assert len(ask(olmoe, tokenizer, ttr.C3PO(refset=folder, k=999, eps=2.0, use="all"))[1]["neighbours"]) == 24


def test_no_set_there(olmoe, tokenizer, tmp_path):
    with pytest.raises(ArtefactError, match="manifest"):
        ttr.adapt(olmoe, ttr.C3PO(refset=tmp_path / "nothing"), tokenizer=tokenizer)


def test_a_set_of_another_model(folder, tokenizer):
    other = build("olmoe", seed=3)
    with pytest.raises(ArtefactError, match=r"was built with 'OlmoeForCausalLM'.*Build a set with this model"):
        ttr.adapt(other, ttr.C3PO(refset=folder), tokenizer=tokenizer)
    # the oracle asks no set
    ttr.adapt(other, ttr.C3PO(refset="nowhere", surrogate="oracle", labels=["a"]), tokenizer=tokenizer).close()


def test_texts_need_a_tokenizer_and_pathways_alone_do_not(olmoe, folder, counted):
    mixes = {"surrogate": "kernel_regression", "alpha": 0.5}
    for strategy, no_harm in (
        (ttr.C3PO(refset=folder), False),
        (ttr.C3PO(refset=folder, **mixes), True),
        (ttr.C3PO(refset=folder, surrogate="mode_finding"), False),
        (ttr.C3PO(surrogate="oracle", labels=("a",)), False),
        (ttr.C3PO(refset=counted, embedder=letters, **mixes), False),
    ):
        with pytest.raises(ConfigError, match=r"needs the tokenizer: ttr\.adapt\(model"):
            ttr.adapt(olmoe, strategy, no_harm=no_harm)
    with ttr.adapt(olmoe, ttr.C3PO(refset=folder, **mixes), no_harm=False) as adapted:
        adapted.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=1)
        assert adapted.report.sequences[0].strategies["c3po"]["outcome"] == "accepted"


def test_models_without_a_head_or_an_inverse(folder, tokenizer):
    with pytest.raises(UnsupportedModelError, match="no causal language-model head"):
        ttr.adapt(build("qwen3_vl_moe_text"), ttr.C3PO(refset=folder), tokenizer=tokenizer)
    with pytest.raises(UnsupportedModelError, match=r"no inverse \(other\)\. Use rerouting"):
        ttr.adapt(build("phimoe"), ttr.C3PO(refset=folder), tokenizer=tokenizer)


def test_another_number_of_labels_than_of_sequences(olmoe, tokenizer, untouched):
    strategy = ttr.C3PO(surrogate="oracle", labels=("a", "b"))
    with (
        untouched(olmoe),
        ttr.adapt(olmoe, strategy, tokenizer=tokenizer) as adapted,
        pytest.raises(ConfigError, match=r"has 2 answers for 1 sequences\. Give one for each"),
    ):
        adapted.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=1)


def test_two_of_them_are_refused(olmoe, folder, tokenizer):
    with pytest.raises(ttr.CompositionError, match="c3po is given more than once"):
        ttr.adapt(olmoe, [ttr.C3PO(refset=folder), ttr.C3PO(refset=folder, k=2)], tokenizer=tokenizer)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"lr": 0.0},
        {"surrogate": "kernel_regression", "alpha": 1.0},
        {"surrogate": "oracle", "steps": 0},
    ],
    ids=str,
)
def test_identity_settings_install_nothing(olmoe, folder, options):
    labels = ("a",) if options.get("surrogate") == "oracle" else None
    with ttr.adapt(olmoe, ttr.C3PO(refset=folder, labels=labels, **options)) as adapted:
        assert adapted.strategies == ()


# --- files and the command line ---------------------------------------------------------------------------


def test_saved_and_loaded_it_does_the_same(olmoe, folder, tokenizer, tmp_path):
    strategy = ttr.C3PO(refset=ReferenceSet.open(folder), k=2, use="all", steps=2, core_experts=1.0, layers="last:2")
    assert json.loads(json.dumps(strategy.to_dict()))["refset"] == str(folder)
    (loaded,) = ttr.load(ttr.save(tmp_path / "saved", strategy))
    assert loaded == dataclasses.replace(strategy, refset=str(folder))
    assert isinstance(loaded.core_experts, float)
    assert torch.equal(ask(olmoe, tokenizer, strategy)[0]["value"], ask(olmoe, tokenizer, loaded)[0]["value"])


def test_options_on_the_command_line():
    settings = {
        "refset": "sets/train",
        "surrogate": "kernel_regression",
        "k": "5",
        "eps": "0.7",
        "lr": "none",
        "layers": "last:3",
        "core_experts": "20",
        "sigma": "2",
        "alpha": "0.25",
        "scope": "all",
        "embedder": "all-MiniLM-L6-v2",
    }
    (strategy,) = make_strategies(["c3po"], [f"c3po.{name}={value}" for name, value in settings.items()])
    assert strategy == ttr.C3PO(
        refset="sets/train",
        surrogate="kernel_regression",
        k=5,
        eps=0.7,
        layers="last:3",
        core_experts=20,
        sigma=2,
        alpha=0.25,
        scope="all",
        embedder="all-MiniLM-L6-v2",
    )
    (share,) = make_strategies(["c3po"], ["c3po.core_experts=0.5"])
    assert share.core_experts == 0.5
    (oracle,) = make_strategies(["c3po"], ["c3po.surrogate=oracle", 'c3po.labels=[" 12\\n", "b"]'])
    assert oracle.labels == (" 12\n", "b")
    with pytest.raises(ConfigError, match="k must be a whole number, got 'three'"):
        make_strategies(["c3po"], ["c3po.k=three"])


def test_the_word_pocket_is_the_set_that_ships():
    assert resolve(ttr.C3PO().refset).parts[-2:] == ("shipped", "pocket")


# --- embedders --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("surrogate", ["kernel_regression", "mode_finding", "ngd"])
def test_a_function_embeds_questions_as_it_embedded_the_set(olmoe, counted, tokenizer, surrogate):
    """Compared as they are: only the model's own embeddings are centred."""
    asked = []

    def letters(texts):  # the same name: it is what the set knows its embedder by
        asked.append(list(texts))
        return globals()["letters"](texts)

    assert read_manifest(counted)["embedder"] == {"name": "callable:letters", "dimension": 8}
    strategy = ttr.C3PO(
        refset=counted, embedder=letters, surrogate=surrogate, use="all", k=4, steps=2, max_similarity=0.9
    )
    note = ask(olmoe, tokenizer, strategy, no_harm=True)[1]
    assert asked[-1] == [QUESTION]
    plain = PlainSet(counted, tokenizer)
    assert plain.mean is None
    query = np.array(letters([QUESTION])[0])
    cosines = {i: float((plain.raw[i] * query).sum() / np.linalg.norm(query)) for i in range(24)}
    assert max(cosines.values()) > 0.9
    for n in note["neighbours"]:
        assert n["similarity"] == pytest.approx(cosines[n["record"]], abs=1e-3)
        assert n["similarity"] <= 0.9
    if surrogate != "mode_finding":
        assert [n["record"] for n in note["neighbours"]] == [i for i, _, _ in plain.nearest(query, 5, "all", 0.9)]


def test_an_embedder_of_ones_own_class(olmoe, counted, tokenizer, tmp_path):
    renamed = tmp_path / "renamed"
    shutil.copytree(counted, renamed)
    forge(renamed, lambda manifest: manifest["embedder"].update(name="mine"))
    how = {"surrogate": "kernel_regression", "alpha": 0.5, "use": "all"}
    mine = ask(olmoe, tokenizer, ttr.C3PO(refset=renamed, embedder=Named(), **how))
    function = ask(olmoe, tokenizer, ttr.C3PO(refset=counted, embedder=letters, **how))
    assert torch.equal(mine[0]["value"], function[0]["value"])


@pytest.mark.parametrize(
    ("embedder", "words"),
    [
        (None, r"was embedded by callable:letters\. Give it: embedder=\.\.\."),
        (fewer, r"is callable:fewer with 5 numbers a text, .* by callable:letters with 8\. Give that one"),
        (Named("callable:letters", 7), r"is callable:letters with 7 numbers a text"),
        (Named(), r"is mine with 8 numbers a text, .* embedded by callable:letters"),
        ("callable:letters", r"name of a function.*dataclasses\.replace\(strategy, embedder=function\)"),
        (5, r"An embedder is the name of a sentence-transformers model, a function or an object"),
    ],
    ids=["none", "another function", "another dimension", "another name", "a function's name", "a number"],
)
def test_another_embedder_than_the_sets(olmoe, counted, tokenizer, embedder, words):
    with pytest.raises(ConfigError, match=words):
        ttr.adapt(olmoe, ttr.C3PO(refset=counted, embedder=embedder), tokenizer=tokenizer)


def test_a_function_is_named_in_a_file_and_given_again(olmoe, counted, tokenizer, tmp_path):
    strategy = ttr.C3PO(refset=counted, embedder=letters, surrogate="kernel_regression", alpha=0.5)
    (loaded,) = ttr.load(ttr.save(tmp_path / "saved", strategy))
    assert loaded.embedder == "callable:letters"
    with pytest.raises(ConfigError, match="embedder=function"):
        ttr.adapt(olmoe, loaded, tokenizer=tokenizer)
    again = dataclasses.replace(loaded, embedder=letters)
    assert torch.equal(ask(olmoe, tokenizer, again)[0]["value"], ask(olmoe, tokenizer, strategy)[0]["value"])


def test_an_embedder_that_fails_leaves_nothing_behind(olmoe, counted, tokenizer, untouched):
    healthy = [True]

    def letters(texts):
        if not healthy[0]:
            raise ZeroDivisionError
        return globals()["letters"](texts)

    with untouched(olmoe):
        strategy = ttr.C3PO(refset=counted, embedder=letters)
        with ttr.adapt(olmoe, strategy, tokenizer=tokenizer) as adapted:
            healthy[0] = False
            with pytest.raises(ZeroDivisionError):
                adapted.generate(**tokenizer([QUESTION], return_tensors="pt"), max_new_tokens=1)


def test_a_damaged_set_is_noticed_at_its_first_use(olmoe, folder, tokenizer, untouched, tmp_path):
    """Opening looks at sizes only; what is read is hashed first, and nothing is generated."""
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    data = bytearray((damaged / "pathways.safetensors").read_bytes())
    data[-2] ^= 1
    (damaged / "pathways.safetensors").write_bytes(data)
    strategy = ttr.C3PO(refset=damaged, surrogate="kernel_regression")
    with untouched(olmoe), ttr.adapt(olmoe, strategy, tokenizer=tokenizer) as adapted:
        with pytest.raises(ArtefactError, match=r"pathways\.safetensors"):
            adapted.generate(**tokenizer([QUESTION], return_tensors="pt"), max_new_tokens=1)
        assert adapted.report.sequences == []
