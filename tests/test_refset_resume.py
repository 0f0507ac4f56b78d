"""Builds that are stopped, killed, or meet a full disk; shards and how they are joined."""

import fcntl
import json
import re
import resource
import shutil
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

import ttrouting as ttr
from oracles.questions import SHAPE, needs_pocket, questions, texts, write
from oracles.refset import forge
from ttrouting.errors import ArtefactError, ConfigError
from ttrouting.refsets import Progress, ReferenceSet, build, builder, merge_sets
from ttrouting.refsets.manifest import DATA_FILES


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


# --- folders, disks, and going on ----------------------------------------------------------------------------


class Stop(Exception):
    pass


def stopped(after: int):
    """A progress function that stops a build after some records."""

    def tell(at: Progress) -> None:
        if at.read >= after:
            raise Stop

    return tell


def content(folder: Path) -> dict[str, bytes]:
    """Every byte of a set but the day on which it was made."""
    found = {file.name: file.read_bytes() for file in folder.iterdir()}
    manifest = json.loads(found["manifest.json"])
    del manifest["sha256"], manifest["provenance"]["created"]
    found["manifest.json"] = json.dumps(manifest, sort_keys=True).encode()
    return found


@needs_pocket
def test_a_build_goes_on_where_it_stopped(pocket, rows, tmp_path, monkeypatch):
    rows = rows + rows[:5]  # repeated ones are known after a restart too
    whole = build(*pocket, rows, tmp_path / "whole", batch_size=5, **SHAPE)
    asked: list[str] = []
    original = builder.Judge.__call__
    monkeypatch.setattr(
        builder.Judge,
        "__call__",
        lambda self, batch: asked.extend(a.question.where for a in batch) or original(self, batch),
    )
    seen: list[Progress] = []
    for after in (1, 23, 48):
        with pytest.raises(Stop):
            build(*pocket, rows, tmp_path / "set", batch_size=5, progress=stopped(after), **SHAPE)
        with pytest.raises(ArtefactError, match="is not finished"):
            ReferenceSet.open(tmp_path / "set")
    build(*pocket, rows, tmp_path / "set", batch_size=5, progress=seen.append, **SHAPE)
    assert Counter(asked) == Counter(f"record {i}" for i in range(1, 49))  # none twice, none lost
    assert content(tmp_path / "set") == content(whole.path)
    assert whole.manifest["counts"]["duplicates"] == 5
    assert seen == [Progress(53, 53, len(whole), 53)]
    asked.clear()
    again = build(*pocket, rows, tmp_path / "set", batch_size=9, **SHAPE)
    assert asked == []  # a finished set is left as it is
    assert texts(again) == texts(whole)


@needs_pocket
def test_a_build_under_other_options_is_refused_and_says_which(pocket, rows, tmp_path):
    data, out = write(tmp_path / "a.jsonl", rows), tmp_path / "set"
    with pytest.raises(Stop):
        build(*pocket, data, out, progress=stopped(16), **SHAPE)
    changes = {
        "prompt was 'Q: {question}\\nA:' and is '{question}'": {"prompt": "{question}"},
        "keep was 'successful' and is 'all'": {"keep": "all"},
        "shard was '1/1' and is '1/2'": {"shard": "1/2"},
        "embedder was 'model' and is 'callable:mine'": {"embedder": mine},
    }
    for words, change in changes.items():
        with pytest.raises(ConfigError, match=re.escape(words)):
            build(*pocket, data, out, **{**SHAPE, **change})
    with pytest.raises(ConfigError, match="dtype was 'float32' and is 'bfloat16'"):
        build(*ttr.load_pocket(torch.bfloat16), data, out, **SHAPE)
    with pytest.raises(ConfigError, match="data was '"):
        build(*pocket, write(tmp_path / "b.jsonl", rows[1:]), out, **SHAPE)
    moved = data.rename(tmp_path / "moved.jsonl")  # the same content under another name is the same data
    done = build(*pocket, moved, out, **SHAPE)
    with pytest.raises(ConfigError, match=r"holds a finished set with other options: keep was .*, delete it, or"):
        build(*pocket, moved, out, restart=True, **{**SHAPE, "keep": "all"})
    assert texts(ReferenceSet.open(out)) == texts(done)


def mine(batch: list[str]) -> np.ndarray:
    return np.ones((len(batch), 2))


@needs_pocket
def test_restart_drops_what_was_begun(pocket, rows, tmp_path):
    with pytest.raises(Stop):
        build(*pocket, rows, tmp_path / "set", progress=stopped(16), batch_size=4, **{**SHAPE, "keep": "all"})
    build(*pocket, rows, tmp_path / "set", restart=True, **SHAPE)
    assert content(tmp_path / "set") == content(build(*pocket, rows, tmp_path / "fresh", **SHAPE).path)


@needs_pocket
def test_a_draft_that_was_damaged(pocket, rows, tmp_path):
    out = tmp_path / "set"

    def begin() -> None:
        shutil.rmtree(out, ignore_errors=True)
        with pytest.raises(Stop):
            build(*pocket, rows, out, progress=stopped(16), batch_size=4, **SHAPE)

    for damage, words in {
        "batch-00000001.safetensors": "lacks some of its batches. Begin again with restart",
        "plan.json": "plan.json is damaged. Begin again with restart",
    }.items():
        begin()
        (out / "draft" / damage).unlink()
        with pytest.raises(ArtefactError, match=words):
            build(*pocket, rows, out, **SHAPE)
    begin()
    file = out / "draft" / "batch-00000003.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ArtefactError, match="was cut short"):
        build(*pocket, rows, out, **SHAPE)
    assert len(build(*pocket, rows, out, restart=True, **SHAPE)) > 20


@needs_pocket
def test_folders_that_cannot_be_used(pocket, rows, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "records.jsonl").write_text("mine")
    for out in ("file", "full"):
        with pytest.raises(ArtefactError, match=r"was not written by 'ttrouting refset build'\. Choose another path"):
            build(*pocket, rows, tmp_path / out, **SHAPE)
    with pytest.raises(ArtefactError, match=r"Cannot write in .*: Not a directory"):
        build(*pocket, rows, tmp_path / "file" / "below", **SHAPE)
    assert (tmp_path / "full" / "records.jsonl").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    build(*pocket, rows[1:3], tmp_path / "empty", **SHAPE)


@needs_pocket
def test_two_builds_do_not_share_a_folder(pocket, rows, tmp_path):
    with pytest.raises(Stop):
        build(*pocket, rows, tmp_path / "set", progress=stopped(16), **SHAPE)
    with (tmp_path / "set" / "draft" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="Another process is building into"):
            build(*pocket, rows, tmp_path / "set", **SHAPE)
    build(*pocket, rows, tmp_path / "set", **SHAPE)


@needs_pocket
@pytest.mark.parametrize("most", [1500, 6000])
def test_nothing_is_lost_when_writing_fails(pocket, rows, tmp_path, most):
    """Files may not grow beyond a size: the first batch fails, or the final files do."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        with pytest.raises(ArtefactError, match=r"Cannot write in .*set: File too large. .* goes on from there"):
            build(*pocket, rows, tmp_path / "set", batch_size=4, **SHAPE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(list((tmp_path / "set" / "draft").glob("batch-*"))) == {1500: 0, 6000: 12}[most]
    build(*pocket, rows, tmp_path / "set", batch_size=4, **SHAPE)
    assert content(tmp_path / "set") == content(build(*pocket, rows, tmp_path / "fresh", batch_size=4, **SHAPE).path)


@needs_pocket
def test_a_disk_that_is_too_small_is_told_early(pocket, tmp_path, monkeypatch):
    many = [{"question": f"{i}+{i}", "answer": str(i + i), "skill": "add"} for i in range(10, 2000)]
    free = types.SimpleNamespace(free=200_000)
    monkeypatch.setattr("ttrouting.refsets.draft.shutil.disk_usage", lambda _: free)
    words = r"will need about \d MB more, its disk has 0 MB free.*records are kept and safe"
    with pytest.raises(ArtefactError, match=words):
        build(*pocket, many, tmp_path / "set", batch_size=64, keep="all", **SHAPE)
    assert len(list((tmp_path / "set" / "draft").glob("batch-*"))) == 1
    free.free = 10_000_000
    assert len(build(*pocket, many[:70], tmp_path / "less", batch_size=64, keep="all", **SHAPE)) == 70


# --- shards --------------------------------------------------------------------------------------------------


@needs_pocket
def test_shards_join_to_the_whole(pocket, rows, everything, tmp_path):
    options = {**SHAPE, "keep": "all", "batch_size": 7}
    parts = [tmp_path / f"part{i}" for i in range(1, 4)]
    for i, part in enumerate(parts, 1):
        build(*pocket, rows, part, shard=f"{i}/3", **options)
    joined = merge_sets(parts, tmp_path / "joined")
    joined.verify()
    order = [*range(0, 48, 3), *range(1, 48, 3), *range(2, 48, 3)]
    whole = texts(everything)
    assert texts(joined) == [whole[i] for i in order]
    assert joined.correct.tolist() == everything.correct[order].tolist()
    np.testing.assert_allclose(joined.omega(range(48)), everything.omega(order), atol=1e-3)
    np.testing.assert_allclose(joined.embeddings(), everything.embeddings()[order], atol=1e-3)
    arrays = safetensors.numpy.load_file(joined.path / "embeddings.safetensors")
    np.testing.assert_allclose(arrays["mean"], arrays["embeddings"].astype(np.float64).mean(0), atol=1e-6)
    np.testing.assert_allclose(arrays["scale"], arrays["embeddings"].astype(np.float64).std(0), atol=1e-6)
    counts = joined.manifest["counts"]
    assert (counts["read"], counts["records"], counts["correct"]) == (48, 48, int(everything.correct.sum()))
    assert [part["name"] for part in joined.manifest["provenance"]["merged"]] == ["part1", "part2", "part3"]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["joined", "part1", "part2", "part3"]
    with pytest.raises(ConfigError, match="holds a finished set with other options"):
        build(*pocket, rows, joined.path, **options)


@needs_pocket
def test_a_join_keeps_equal_records_once(pocket, rows, everything, tmp_path):
    some = build(*pocket, [*rows[10:20], {**rows[30], "answer": "other"}], tmp_path / "some", keep="all", **SHAPE)
    joined = merge_sets([everything.path, some.path], tmp_path / "joined")
    assert texts(joined) == [*texts(everything), texts(some)[-1]]
    counts = joined.manifest["counts"]
    assert (counts["records"], counts["read"], counts["duplicates"]) == (49, 59, 10)
    assert counts["correct"] == int(joined.correct.sum())
    np.testing.assert_array_equal(joined.omega([48]), some.omega([10]))
    np.testing.assert_array_equal(joined.embeddings()[48], some.embeddings()[10])


@needs_pocket
def test_sets_that_do_not_belong_together(pocket, rows, everything, tmp_path):
    other = build(*pocket, rows[:3], tmp_path / "other", embedder=mine, keep="all", **SHAPE)
    with pytest.raises(ConfigError, match="not alike: embedder name model and callable:mine"):
        merge_sets([everything.path, other.path], tmp_path / "joined")
    strange = shutil.copytree(everything.path, tmp_path / "strange")
    forge(strange, lambda manifest: manifest.update(fingerprint="f" * 64))
    with pytest.raises(ConfigError, match=r"are of another model: fingerprint [0-9a-f]{64} and f{64}"):
        merge_sets([everything.path, strange], tmp_path / "joined")
    with pytest.raises(ConfigError, match="two sets or more, got 1"):
        merge_sets([everything.path], tmp_path / "joined")
    with pytest.raises(ArtefactError, match=r"exists\. Choose another path"):
        merge_sets([everything.path, everything.path], other.path)
    damaged = shutil.copytree(everything.path, tmp_path / "damaged")
    file = damaged / "pathways.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(ArtefactError, match=r"pathways\.safetensors was changed"):
        merge_sets([everything.path, damaged], tmp_path / "joined")
    assert not (tmp_path / "joined").exists()
    (tmp_path / ".joined.merging").mkdir()
    (tmp_path / ".joined.merging" / "half").touch()  # of a join that was killed
    merge_sets([everything.path, everything.path], tmp_path / "joined")
    assert sorted(f.name for f in (tmp_path / "joined").iterdir()) == sorted([*DATA_FILES, "manifest.json"])


# --- kills ----------------------------------------------------------------------------------------------------

KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
import ttrouting as ttr
from ttrouting.refsets import build

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.scandir", "os.listdir", "shutil.rmtree"}
torch.set_num_threads(1)
data, whole, by_step, by_time = map(Path, sys.argv[1:])
model, tokenizer = ttr.load_pocket()

def run(out):
    shape = {"prompt": "Q: {question}\\nA:", "answer": " {answer}\\n", "task": "{skill}"}
    build(model, tokenizer, data, out, batch_size=4, **shape)

run(whole)
began = time.perf_counter()

def child(out, step):
    left = [step]

    def stop(event, arguments):
        if event in EVENTS and arguments and str(out) in str(arguments[0]):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    if step:
        sys.addaudithook(stop)
    run(out)
    os._exit(0)

def killed(out, step=0, delay=None):
    process = os.fork()
    if process == 0:
        child(out, step)
    if delay is not None:
        time.sleep(delay)
        os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

# run after run goes one operation on the folder further; so does each of the last ones through the finish
step = 1
while (code := killed(by_step, step)) != 0:
    assert code == -signal.SIGKILL, code
    step += 1
print("steps", step)
# and some at moments that nothing marks
draw = random.Random(0)
for _ in range(8):
    if killed(by_time, delay=draw.uniform(0.02, 0.4)) == 0:
        break
assert killed(by_time) == 0
"""


@needs_pocket
@pytest.mark.slow
def test_a_kill_at_any_moment_repeats_and_loses_nothing(rows, tmp_path):
    """SIGKILL before the n-th operation on the folder for every n, and at random moments; then byte for byte."""
    data = write(tmp_path / "data.jsonl", rows[:21] + rows[:3])
    folders = [tmp_path / name for name in ("whole", "step", "time")]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(data), *map(str, folders)], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[1]) > 30
    for folder in folders[1:]:
        assert content(folder) == content(folders[0])
        ReferenceSet.open(folder).verify()
