"""`ttrouting refset`: does it do what the library does, and say in one line what was asked wrongly?"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import ttrouting as ttr
from oracles.refset import forge, raw_set, write_raw
from ttrouting.cli import app, refset_build
from ttrouting.pocket import POCKET_DIR
from ttrouting.pocket.skills import sample
from ttrouting.refsets import Progress, ReferenceSet, build, merge_sets

pytestmark = pytest.mark.skipif(
    not (POCKET_DIR / "model.safetensors").is_file(), reason="the pocket model's weights are not in this checkout"
)
SHAPE = ["--prompt", r"Q: {question}\nA:", "--answer", r" {answer}\n", "--task", "{skill}", "--escapes"]


def run(*arguments: Any) -> Any:
    """The command in this process; stdout and stderr apart. A bug is raised, not printed."""
    done = CliRunner().invoke(app, ["refset", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def run_json(*arguments: Any) -> dict[str, Any]:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)  # one object and nothing else
    return found


def refused(code: int, *arguments: Any) -> str:
    """The one line on stderr of a command that ends with `code`."""
    done = run(*arguments)
    assert done.exit_code == code
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "Traceback" not in line
    return str(line)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    drawn = [e for skill in ("add", "sort", "time") for e in sample(skill, "digits", "reference", 8)]
    rows = [{"question": e.question, "answer": e.answer, "skill": e.skill} for e in drawn]
    file = tmp_path_factory.mktemp("data") / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{half of a record\n")
    return file


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sets") / "set"
    assert run("build", "--data", data, "--out", out, *SHAPE).exit_code == 0
    return out


def test_build_is_the_library_s_build(folder: Path, data: Path, tmp_path: Path) -> None:
    by_hand = build(
        *ttr.load_pocket(),
        data,
        tmp_path / "set",
        prompt="Q: {question}\nA:",
        answer=" {answer}\n",
        task="{skill}",
        name="pocket",
    )
    by_hand.verify()
    for file in by_hand.path.glob("*.*"):
        assert file.name == "manifest.json" or file.read_bytes() == (folder / file.name).read_bytes()
    ours, theirs = by_hand.manifest, ReferenceSet.open(folder).manifest
    assert {**ours, "sha256": "", "provenance": {}} == {**theirs, "sha256": "", "provenance": {}}
    assert ours["provenance"]["plan"] == theirs["provenance"]["plan"]


def test_build_says_what_came_of_it(data: Path, tmp_path: Path) -> None:
    arguments = ["build", "--data", data, "--out", tmp_path / "set", *SHAPE, "--keep", "all", "--limit", "10"]
    done = run(*arguments)
    assert "10 of 10 read; " in done.stdout
    assert "6 MoE layers of 16 experts" in done.stdout
    assert "ttrouting refset search" in done.stderr
    found = run_json(*arguments)
    assert found["counts"]["records"] == 10
    assert found["provenance"]["plan"]["limit"] == 10
    again = run(*arguments)
    assert again.exit_code == 0
    assert "was finished before. Nothing was done." in again.stderr


def test_build_names_the_first_record_that_cannot_be_used(data: Path, tmp_path: Path) -> None:
    done = run("build", "--data", data, "--out", tmp_path / "set", *SHAPE)
    assert "The first unusable record: line 25: it is no JSON" in done.stderr
    assert "1 unusable, 0 repeated, 0 too long" in done.stdout


def test_escapes_are_read_only_where_asked(data: Path, tmp_path: Path) -> None:
    shape = ["--prompt", r"{question}\n", "--answer", "{answer}", "--keep", "all", "--limit", "2"]
    done = run("build", "--data", data, "--out", tmp_path / "set", *shape)
    assert "Add --escapes if it is meant to be a line end" in done.stderr
    assert ReferenceSet.open(tmp_path / "set").record(0).prompt.endswith(r"\n")


def test_shards_and_merge(data: Path, tmp_path: Path) -> None:
    parts = [tmp_path / "one", tmp_path / "two"]
    for i, part in enumerate(parts, 1):
        run_json("build", "--data", data, "--out", part, *SHAPE, "--shard", f"{i}/2", "--keep", "all")
    found = run_json("merge", *parts, "--out", tmp_path / "joined")
    by_hand = merge_sets(parts, tmp_path / "by_hand")
    assert found["files"] == by_hand.manifest["files"]
    assert found["counts"]["records"] == 24
    assert "joined" in refused(2, "merge", *parts, "--out", tmp_path / "joined")
    assert "two sets or more" in refused(2, "merge", parts[0], "--out", tmp_path / "other")


def test_judges_have_their_options(data: Path, tmp_path: Path) -> None:
    arguments = ["build", "--data", data, *SHAPE, "--limit", "3", "--keep", "all"]
    found = run_json(
        *arguments, "--out", tmp_path / "a", "--judge", "regex", "--pattern", r"\d+", "--max-new-tokens", 9
    )
    plan = found["provenance"]["plan"]
    assert (plan["judge"], plan["pattern"], plan["max_new_tokens"]) == ("regex", r"\d+", 9)
    rows = [{"question": "1+1", "answer": "2", "skill": "add", "c": ["2", "3"]}]
    choices = tmp_path / "choices.jsonl"
    choices.write_text(json.dumps(rows[0]))
    more = ["--judge", "choice", "--choices", "c", "--choice-score", "sum"]
    found = run_json("build", "--data", choices, *SHAPE, "--keep", "all", "--out", tmp_path / "b", *more)
    plan = found["provenance"]["plan"]
    assert (plan["judge"], plan["choices"], plan["choice_score"]) == ("choice", "c", "sum")


def test_info_and_verify(folder: Path) -> None:
    found = run_json("info", folder)
    assert found == {"path": str(folder), **ReferenceSet.open(folder).manifest}
    assert "embedder  model  dimension 128" in run("info", folder).stdout
    assert run_json("verify", folder)["verified"] == sorted(found["files"])
    assert "4 files are what the manifest says" in run("verify", folder).stdout


def test_search_is_the_library_s_search(folder: Path) -> None:
    text = "Q: 12+30\nA:"
    found = run_json("search", folder, r"Q: 12+30\nA:", "-e", "-k", "3")
    model, tokenizer = ttr.load_pocket()
    with torch.no_grad():
        hidden = model.model(tokenizer(text, return_tensors="pt")["input_ids"]).last_hidden_state[0]
    refset = ReferenceSet.open(folder)
    near = refset.search(hidden.mean(0).numpy()[None], 3)
    assert [row["number"] for row in found["neighbours"]] == near.index[0].tolist()
    assert [row["similarity"] for row in found["neighbours"]] == pytest.approx(near.similarity[0].tolist(), abs=1e-4)
    assert [row["prompt"] for row in found["neighbours"]] == [refset.record(i).prompt for i in near.index[0]]
    shown = run("search", folder, text, "-k", "3")
    assert shown.stdout.splitlines()[0].split()[:3] == ["similarity", "distance", "task"]
    assert len(shown.stdout.splitlines()) == 4
    assert "of 2" in shown.stderr
    near_by = run_json("search", folder, text, "-k", "9", "--eps", found["neighbours"][1]["distance"] + 1e-5)
    assert [row["number"] for row in near_by["neighbours"]] == [r["number"] for r in found["neighbours"][:2]]


def test_search_by_another_embedder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refset = write_raw(tmp_path / "set", *raw_set(), embedder="sentence-transformers:small")

    class Small:
        name = "sentence-transformers:small"
        dimension = 12

        def embed(self, texts: list[str]) -> np.ndarray:
            return np.arange(12.0)[None].repeat(len(texts), 0)

    monkeypatch.setattr("ttrouting.cli.refset.as_embedder", lambda name: Small())
    found = run_json("search", refset, "text", "--embedder", "small", "--model", "./no/such/model")
    assert len(found["neighbours"]) == 5
    monkeypatch.setattr(Small, "name", "sentence-transformers:other")
    assert "not 'sentence-transformers:other'" in refused(2, "search", refset, "text", "--embedder", "other")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "--prompt", "{qestion}"], "Line 1 of data.jsonl: {qestion}: there is no field 'qestion'. Did you"),
        (["build", "--prompt", "{question"], "The template prompt '{question' has '{' at character 0"),
        (["build", "--judge", "choice"], "go together"),
        (["build", "--data", "no/such.jsonl"], "Cannot read no/such.jsonl: No such file"),
        (["build", "--split", "test"], "subset and split are for sets on the hub"),
        (["build", "--shard", "3/2"], "shard is i/n"),
        (["build", "--device", "abacus"], "--device 'abacus' is not here"),
        (["info", "no/such"], "no/such holds no manifest.json"),
        (["verify", "no/such"], "no/such holds no manifest.json"),
        (["search", "no/such", "text"], "no/such holds no manifest.json"),
        (["merge", "no/such", "nor/this", "--out", "x"], "no/such holds no manifest.json"),
    ],
)
def test_wrong_requests_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, data: Path, tmp_path: Path
) -> None:
    if arguments[0] == "build":
        given = {
            "--data": str(data),
            "--prompt": "{question}",
            "--answer": "{answer}",
            "--out": str(tmp_path / "set"),
        }
        given |= dict(zip(arguments[1::2], arguments[2::2], strict=True))
        arguments = ["build", *(word for pair in given.items() for word in pair)]
    assert message in refused(2, *arguments)
    assert not (tmp_path / "set" / "manifest.json").exists()


def test_searches_that_are_refused(folder: Path, tmp_path: Path) -> None:
    assert "number of references that may be found" in refused(2, "search", folder, "text", "-k", "999")
    assert "No index of the kind 'tree'" in refused(2, "search", folder, "text", "--index", "tree")
    assert "give it 1 to 512" in refused(2, "search", folder, "Q" * 600).replace(" tokens", "")
    assert "embedded by 'model', and the text would be by 'other'" in refused(
        2, "search", folder, "text", "--embedder", "other"
    )
    mine = write_raw(tmp_path / "mine", *raw_set(), embedder="callable:mine")
    assert "a set that a function embedded is searched in Python" in refused(2, "search", mine, "text")
    other = shutil.copytree(folder, tmp_path / "other")
    forge(other, lambda manifest: manifest.update(fingerprint="f" * 64))
    assert "(fingerprint ffffffffffff), this model's is" in refused(2, "search", other, "text")
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    (damaged / "embeddings.safetensors").write_bytes((folder / "embeddings.safetensors").read_bytes()[:-2] + b"!!")
    assert "embeddings.safetensors was changed" in refused(2, "search", damaged, "text")
    assert "embeddings.safetensors was changed" in refused(2, "verify", damaged)


def test_a_manifest_names_no_model_to_load(tmp_path: Path) -> None:
    """A set from a stranger must not decide what is downloaded."""
    refset = write_raw(tmp_path / "set", *raw_set(), embedder="sentence-transformers:evil/model", model="evil/model")
    assert "Give the same with --embedder" in refused(2, "search", refset, "text")


def test_progress_tells_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, said = [100.0], []
    monkeypatch.setattr(refset_build, "perf_counter", lambda: clock[0])
    tell = refset_build._progress("data.jsonl", said.append)
    for seconds, read, kept in ((105.0, 200, 120), (106.0, 210, 126), (125.0, 300, 180), (1000.0, 1000, 600)):
        clock[0] = seconds
        tell(Progress(read, 1000, kept, 200))
    assert said == [
        "data.jsonl: 200 of 1000 records read, 120 kept",  # an earlier run's: no rate yet
        "data.jsonl: 300 of 1000 records read, 180 kept, 5.0/s, 2 min left",
        "data.jsonl: 1000 of 1000 records read, 600 kept, 0.9/s, 0 s left",
    ]


def test_help_names_the_commands() -> None:
    done = run("--help")
    assert all(f" {name} " in done.stdout for name in ("build", "info", "search", "verify", "merge"))
