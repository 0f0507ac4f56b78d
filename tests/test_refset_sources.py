"""From files and templates to questions: what is read, what is left out and counted, what is refused."""

import json
import re
import sys
import types

import numpy as np
import pytest

import ttrouting as ttr
from oracles.questions import SHAPE, needs_pocket, questions, texts, write
from ttrouting.errors import ConfigError
from ttrouting.refsets import build
from ttrouting.refsets.recipe import Questions, Recipe
from ttrouting.refsets.sources import open_source
from ttrouting.refsets.templates import FieldFault, Template

# --- which records ----------------------------------------------------------------------------------------


@needs_pocket
def test_records_that_cannot_be_used_are_counted_and_the_first_is_named(tmp_path):
    rows = questions(48)
    lines = [json.dumps(row) for row in rows[1:3]]
    bad = [
        '{"question": "1+1"',
        '["a", "list"]',
        json.dumps({"question": "1+1", "skill": "add"}),
        json.dumps({"question": "1+1", "answer": None, "skill": "add"}),
        json.dumps({"question": ["1+1"], "answer": "2", "skill": "add"}),
        json.dumps({"question": "\ud800", "answer": "2", "skill": "add"}),
        "[" * 100_000,
    ]
    long = json.dumps({"question": "1+" * 300, "answer": "300", "skill": "add"})
    data = tmp_path / "data.jsonl"
    whole = "\n\n".join([lines[0], *bad[:2], lines[1], lines[0], *bad[2:], long, lines[1]]).encode()
    data.write_bytes(whole + b'\n{"question": "caf\xe9"}\n')
    refset = build(*ttr.load_pocket(), data, tmp_path / "set", keep="all", batch_size=3, **SHAPE)
    assert texts(refset) == [(f"Q: {r['question']}\nA:", f" {r['answer']}\n") for r in rows[1:3]]
    counts = refset.manifest["counts"]
    found = {name: counts[name] for name in ("read", "records", "bad", "duplicates", "too_long")}
    assert found == {"read": 13, "records": 2, "bad": 8, "duplicates": 2, "too_long": 1}
    assert counts["first_bad"] == "line 3: it is no JSON: Expecting ',' delimiter at character 19"


def kept(rows, **options) -> list[str]:
    recipe = Recipe(prompt="{q}", answer="{a}", **options)
    source = open_source(rows, limit=recipe.limit)
    found = list(Questions(source, recipe))
    assert recipe.size(source) == len(list(found))
    return [question.prompt for question in found]


def test_shards_are_parts_of_the_whole_and_a_limit_comes_first():
    rows = [{"q": f"q{i}", "a": "a"} for i in range(23)]
    parts = [kept(rows, shard=f"{i}/4", limit=18) for i in range(1, 5)]
    assert sorted(prompt for part in parts for prompt in part) == sorted(f"q{i}" for i in range(18))
    assert {len(part) for part in parts} == {4, 5}
    assert kept(rows, limit=3) == ["q0", "q1", "q2"]
    assert kept(rows[:2], shard="2/2") == ["q1"]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{a}", "1"),
        ("x {{{a}}} {b.c} {{}}", "x {1} deep {}"),
        ("{list[1]}{list[at]}", "yx"),
        ("{named[key]} {b[c]}", "v deep"),
        ("{two words}, {dotted.name}", "w, d"),
        ("{float}{flag}", "0.5True"),
        ("", ""),
    ],
)
def test_templates(template, text):
    fields = {
        "a": 1,
        "b": {"c": "deep"},
        "list": ["x", "y"],
        "at": 0,
        "named": {"k": "v"},
        "key": "k",
        "c": "c",
        "two words": "w",
        "dotted.name": "d",
        "float": 0.5,
        "flag": True,
    }
    assert Template(template, "prompt").render(fields) == text


@pytest.mark.parametrize("template", ["{", "}", "{}", "{a", "a}", "{ a}", "{a..b}", "{a[}", "{a[0}", "{{a}", "{a[]}"])
def test_templates_that_cannot_be_read(template):
    with pytest.raises(ConfigError, match="The template prompt"):
        Template(template, "prompt")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{list}", r"a list, not text or a number; name one item, as in \{list\[0\]\}"),
        ("{list[2]}", "item 2 of 2"),
        ("{list[-1]}", "item -1 of 2"),
        ("{list[text]}", "item 'word' of a list"),
        ("{text[0]}", "item 0 of text"),
        ("{text.inner}", "'inner' in text"),
        ("{none}", "is null"),
        ("{object}", "an object"),
        ("{lst}", "no field 'lst'. Did you mean 'list'"),
        ("{list[nothing]}", "no field 'nothing'"),
    ],
)
def test_records_that_a_template_does_not_fit(template, words):
    fields = {"list": ["x", "y"], "text": "word", "none": None, "object": {}}
    with pytest.raises(FieldFault, match=words):
        Template(template, "prompt").render(fields)


# --- what is asked for wrongly ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": "Q: question"}, "names no field"),
        ({"judge": "exactly"}, "judge cannot be 'exactly'. Did you mean 'exact'"),
        ({"keep": "some"}, "keep cannot be 'some'"),
        ({"choice_score": "mean"}, "choice_score cannot be 'mean'"),
        ({"judge": "choice"}, "choices, the field with the list of choices, go together"),
        ({"choices": "c"}, "go together"),
        ({"judge": "choice", "choices": "c d..e"}, "choices names a field"),
        ({"judge": "choice", "choices": "c", "answer": "{a} {b}"}, "has 2"),
        ({"judge": "regex"}, "pattern, the regular expression, go together"),
        ({"judge": "regex", "pattern": "(" * 3}, "is no regular expression"),
        ({"shard": "0/4"}, "shard is i/n"),
        ({"shard": "5/4"}, "shard is i/n"),
        ({"shard": "1"}, "shard is i/n"),
        ({"limit": 0}, "must be at least 1"),
        ({"max_new_tokens": 0}, "must be at least 1"),
    ],
)
def test_recipes_that_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        Recipe(**{"prompt": "{question}", "answer": "{answer}", **options})


def test_choices_that_are_refused():
    rows = [
        {"q": "1", "a": "x", "c": ["x", "y"]},
        {"q": "2", "a": "z", "c": ["x", "y"]},
        {"q": "3", "a": "x", "c": ["x"]},
        {"q": "4", "a": "x", "c": "xy"},
        {"q": "5", "a": "x", "c": ["x", None]},
    ]
    found = Questions(open_source(rows), Recipe("{q}", "{a}", judge="choice", choices="c"))
    assert [question.prompt for question in found] == ["1"]
    assert found.counts.bad == 4
    assert found.counts.first_bad == "record 2: its answer 'z' is not among its choices"


def test_a_field_that_no_record_has_is_told_at_once():
    found = Questions(open_source([["a"], {"question": "1", "answer": "2"}]), Recipe("{qestion}", "{answer}"))
    words = (
        "Record 2 of list in memory: {qestion}: there is no field 'qestion'. Did you mean 'question'? Known: answer"
    )
    with pytest.raises(ConfigError, match=re.escape(words)):
        list(found)


def test_sources_that_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n \n")
    for data, words in {
        str(tmp_path / "none.jsonl"): "Cannot read .*none.jsonl: No such file",
        str(tmp_path): "Cannot read .*: Is a directory",
        "./no/such/file": "Cannot read",
        str(tmp_path / "empty.jsonl"): "holds no record",
    }.items():
        with pytest.raises(ConfigError, match=words):
            open_source(data)
    for data in (iter([{"a": 1}]), 5, {"a": 1}, ({"a": i} for i in range(3))):
        with pytest.raises(ConfigError, match="read twice"):
            open_source(data)
    with pytest.raises(ConfigError, match="subset and split are for sets on the hub"):
        open_source(write(tmp_path / "a.jsonl", [{"a": 1}]), split="test")


def test_what_a_source_is_known_by(tmp_path):
    rows = [{"a": i} for i in range(4)]
    file = write(tmp_path / "a.jsonl", rows)
    assert open_source(file).sha256 == open_source(str(file)).sha256
    assert open_source(file).size == open_source(rows).size == 4
    assert open_source(rows).sha256 != open_source(rows[:3]).sha256
    assert open_source(rows, limit=3).sha256 == open_source(rows[:3]).sha256
    assert open_source([{"a": np.int64(3)}]).sha256 != open_source([{"a": np.int64(4)}]).sha256
    mark = b"\xef\xbb\xbf"  # a byte order mark
    file.write_bytes(mark + file.read_bytes())
    assert [row.fields for row in open_source(file).read()] == rows


class Hub(types.ModuleType):
    """Stands for the package datasets, which tests do not need and a test machine cannot use."""

    __version__ = "4.1.0"

    class exceptions:
        class DatasetsError(Exception):
            pass

    def load_dataset(self, name, subset, split):
        if name == "nobody/nothing":
            raise self.exceptions.DatasetsError("Dataset 'nobody/nothing' doesn't exist on the Hub")
        return [{"from": f"{name}/{subset}/{split}", "number": i} for i in range(5)]


def test_sets_on_the_hub_are_read_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", Hub("datasets"))
    source = open_source("org/name", subset="main", limit=2)
    assert (source.name, source.size) == ("org/name/main [train]", 2)
    assert [row.fields["from"] for row in source.read()] == ["org/name/main/train"] * 2
    assert next(open_source("name", split="test").read()).fields["from"] == "name/None/test"
    with pytest.raises(ConfigError, match=r"Cannot load 'nobody/nothing' .*doesn't exist on the Hub"):
        open_source("nobody/nothing")
    monkeypatch.setattr(Hub, "__version__", "3.6.0")
    with pytest.raises(ConfigError, match="may run code that comes with a set"):
        open_source("org/name")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"no file org/name. Reading 'org/name' .* needs the package datasets"):
        open_source("org/name")
