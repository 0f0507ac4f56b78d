"""Reference sets on disk: they are what was written, and damage, forgery and other people's sets are refused."""

import json
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from oracles.refset import FINGERPRINT, file_facts, forge, raw_set, read_manifest, write_manifest, write_raw
from ttrouting.errors import ArtefactError, ConfigError
from ttrouting.refsets import Record, ReferenceSet, index, index_files, resolve
from ttrouting.refsets.manifest import DATA_FILES
from ttrouting.refsets.writing import Block, write_set


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_raw(tmp_path / "set", *raw_set())


def use_all(refset: ReferenceSet) -> None:
    """Touch every file."""
    refset.record(0)
    refset.omega([0])
    refset.search(np.ones((1, refset.dimension)), 1, max_similarity=1)


# --- content ------------------------------------------------------------------------------------------


def test_a_set_is_what_was_written(folder):
    records, embeddings, omega, correct = raw_set()
    refset = ReferenceSet.open(folder)
    assert [refset.record(i) for i in range(len(refset))] == [Record(**record) for record in records]
    assert refset.correct.tolist() == correct.tolist()
    picked = [7, 0, 39]
    np.testing.assert_allclose(refset.omega(picked), omega[picked], atol=1e-3)
    assert refset.omega(picked).dtype == np.float32
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    np.testing.assert_allclose(refset.embeddings(), unit, atol=1e-3)
    assert (refset.dimension, refset.layers, refset.experts) == (12, 3, 5)
    assert (refset.fingerprint, refset.embedder_name) == (FINGERPRINT, "model")
    for wrong in (-1, 40):
        with pytest.raises(IndexError):
            refset.record(wrong)
        with pytest.raises(IndexError):
            refset.omega([0, wrong])


def blocks(count: int, rows: int, sizes: tuple[int, int, int], seed: int = 0):
    draw = np.random.default_rng(seed)
    dimension, layers, experts = sizes
    for start in range(0, count, rows):
        lines = [json.dumps({"number": i}).encode() + b"\n" for i in range(start, min(start + rows, count))]
        yield Block(
            np.frombuffer(b"".join(lines), np.uint8),
            np.array([len(line) for line in lines]),
            np.arange(start, start + len(lines)) % 2 == 0,
            draw.normal(size=(len(lines), dimension)).astype(np.float16),
            draw.random((len(lines), layers, experts)).astype(np.float16),
        )


@pytest.mark.parametrize("centred", [True, False])
def test_written_files_are_what_the_safetensors_library_reads(tmp_path, centred):
    files = write_set(tmp_path, blocks(23, 5, (6, 2, 3)), 23, (6, 2, 3), centred)
    whole = list(blocks(23, 5, (6, 2, 3)))
    embeddings = np.concatenate([block.embeddings for block in whole])
    found = safetensors.numpy.load_file(tmp_path / "embeddings.safetensors")
    assert np.array_equal(found.pop("embeddings"), embeddings)
    if centred:
        np.testing.assert_allclose(found.pop("mean"), embeddings.astype(np.float64).mean(0), atol=1e-6)
        np.testing.assert_allclose(found.pop("scale"), embeddings.astype(np.float64).std(0), atol=1e-6)
    assert found == {}
    omega = safetensors.numpy.load_file(tmp_path / "pathways.safetensors")
    assert np.array_equal(omega["omega"], np.concatenate([block.omega for block in whole]))
    lines = (tmp_path / "records.jsonl").read_bytes()
    flags = safetensors.numpy.load_file(tmp_path / "offsets.safetensors")
    cut = [lines[a:b] for a, b in zip(flags["offsets"], flags["offsets"][1:], strict=False)]
    assert cut == lines.splitlines(keepends=True)
    assert len(cut) == 23
    assert flags["correct"].tolist() == [1 - i % 2 for i in range(23)]
    assert files == {name: file_facts(tmp_path / name) for name in DATA_FILES}


def test_memory_does_not_grow_with_the_set(tmp_path):
    def peak(count: int) -> int:
        (tmp_path / str(count)).mkdir()
        tracemalloc.start()
        write_set(tmp_path / str(count), blocks(count, 500, (16, 2, 4)), count, (16, 2, 4), True)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(500)  # what is made once
    assert peak(80_000) < 1.1 * peak(20_000)  # rows are centred 16384 at a time


# --- search -------------------------------------------------------------------------------------------


def nearest(embeddings, query, k, allowed, most=0.95):
    """Neighbours by the format's description, in loops: centred, scaled unit vectors, leakage dropped."""
    rows = np.array([row / np.sqrt(row @ row) for row in embeddings])
    mean, scale = rows.mean(0), rows.std(0)
    wanted = (query / np.sqrt(query @ query) - mean) / scale
    found = []
    for number, row in enumerate(rows):
        row = (row - mean) / scale
        cosine = row @ wanted / np.sqrt(row @ row) / np.sqrt(wanted @ wanted)
        if allowed[number] and cosine <= most:
            found.append((cosine, number))
    return sorted(found, reverse=True)[:k]


@pytest.mark.parametrize("use", ["successful", "all"])
def test_search_is_brute_force_over_centred_vectors(folder, use):
    _, embeddings, _, correct = raw_set()
    query = np.concatenate([3 + np.random.default_rng(1).normal(size=(4, 12)), embeddings[20:21]])
    found = ReferenceSet.open(folder).search(query, 5, use=use)
    for row, one in enumerate(query):
        expected = nearest(embeddings, one, 5, correct | (use == "all"))
        assert found.index[row].tolist() == [number for _, number in expected]
        np.testing.assert_allclose(found.similarity[row], [cosine for cosine, _ in expected], atol=3e-3)
        np.testing.assert_allclose(found.distance[row] ** 2, 2 - 2 * found.similarity[row], atol=1e-5)
    assert 20 not in found.index[4]  # the question itself is leakage


def test_other_embedders_are_not_centred(tmp_path):
    content = raw_set()
    refset = ReferenceSet.open(write_raw(tmp_path / "set", *content, embedder="callable:mine"))
    rows = content[1] / np.linalg.norm(content[1], axis=1, keepdims=True)
    query = rows[20] @ rows.T
    found = refset.search(content[1][20:21], 3, use="all", max_similarity=1)
    assert found.index[0].tolist() == np.argsort(-query)[:3].tolist()


@pytest.mark.parametrize("layers", [[0, 2], [1]])
def test_near_pathways_are_by_distance_at_some_layers(folder, layers):
    _, embeddings, omega, correct = raw_set()
    stored = omega.astype(np.float16).astype(np.float64)
    query = np.random.default_rng(2).dirichlet(np.ones(5), (2, 3))[:, layers]
    refset = ReferenceSet.open(folder)
    found = refset.near_pathways(query, layers, 4)
    for row in range(2):
        apart = [np.sqrt(((stored[i, layers] - query[row]) ** 2).sum()) for i in range(40)]
        order = [i for i in np.argsort(apart) if correct[i]][:4]
        assert found.index[row].tolist() == order
        np.testing.assert_allclose(found.distance[row], np.array(apart)[order], atol=1e-5)
    same = refset.near_pathways(stored[30:31, layers], layers, 1, exclude_similar_to=embeddings[30:31])
    assert same.index[0, 0] != 30
    assert refset.near_pathways(stored[30:31, layers], layers, 1).index[0, 0] == 30


def test_what_cannot_be_searched_for(folder):
    refset = ReferenceSet.open(folder)
    query = np.ones((1, 12))
    for wrong, words in {
        "k": "number of references that may be found, 30; got 31",
        "dimension": r"\[1, 11\], this set compares \[B, 12\]",
        "nan": "numbers that are not finite",
        "zero": "is zero",
        "use": "use cannot be 'some'",
        "index": "No index of the kind 'tree'",
        "eps": "eps is a distance above 0",
    }.items():
        rows = {"dimension": query[:, 1:], "nan": query * np.nan, "zero": query * 0}.get(wrong, query)
        options = {"use": {"use": "some"}, "index": {"index": "tree"}, "eps": {"eps": -1.0}}.get(wrong, {})
        with pytest.raises(ConfigError, match=words):
            refset.search(rows, 31 if wrong == "k" else 1, **options)
    assert refset.search(query, 31, use="all").index.shape == (1, 31)


def test_the_shipped_set_has_a_name():
    assert resolve("pocket").parts[-2:] == ("shipped", "pocket")
    assert resolve("./pocket") == Path("pocket")  # a folder that happens to have this name


# --- indexes on disk ------------------------------------------------------------------------------------


@pytest.fixture
def indexed(folder, monkeypatch) -> Path:
    """A set with an HNSW index beside its embeddings; from here on building one is counted."""
    ReferenceSet.open(folder).search(np.ones((1, 12)), 3, index="hnsw")
    assert (folder / "index-hnsw.faiss").is_file()
    return folder


def count_calls(monkeypatch, name: str) -> list[str]:
    calls: list[str] = []
    original = getattr(index, name)
    monkeypatch.setattr(index, name, lambda *a: calls.append(name) or original(*a))
    return calls


def searched(folder: Path) -> ReferenceSet:
    refset = ReferenceSet.open(folder)
    found = refset.search(np.ones((1, 12)), 3, index="hnsw")
    assert found.index.tolist() == ReferenceSet.open(folder).search(np.ones((1, 12)), 3).index.tolist()
    return refset


def test_an_index_is_kept_and_read_again(indexed, monkeypatch):
    built, parsed = count_calls(monkeypatch, "build"), count_calls(monkeypatch, "parse")
    facts = read_manifest(indexed)["files"]
    assert facts["index-hnsw.faiss"]["of"] == facts["embeddings.safetensors"]["sha256"]
    refset = ReferenceSet.open(indexed)
    refset.verify()
    refset.search(np.ones((1, 12)), 3, index="hnsw")
    refset.search(np.ones((1, 12)), 3, index="hnsw")
    assert (built, parsed) == ([], ["parse"])


def uncovered(folder: Path) -> None:
    manifest = read_manifest(folder)
    del manifest["files"]["index-hnsw.faiss"]
    write_manifest(folder, manifest)


def of_other_embeddings(folder: Path) -> None:
    forge(folder, lambda manifest: manifest["files"]["index-hnsw.faiss"].update(of="0" * 64))


def changed(folder: Path) -> None:
    data = bytearray((folder / "index-hnsw.faiss").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "index-hnsw.faiss").write_bytes(data)


def gone(folder: Path) -> None:
    (folder / "index-hnsw.faiss").unlink()


def linked_from_outside(folder: Path) -> None:
    (folder / "index-hnsw.faiss").rename(folder.parent / "elsewhere")
    (folder / "index-hnsw.faiss").symlink_to(folder.parent / "elsewhere")


@pytest.mark.parametrize("damage", [uncovered, of_other_embeddings, changed, gone, linked_from_outside])
def test_an_index_that_is_not_covered_is_not_parsed_but_built_again(indexed, monkeypatch, damage):
    damage(indexed)
    built, parsed = count_calls(monkeypatch, "build"), count_calls(monkeypatch, "parse")
    ReferenceSet.open(indexed).search(np.ones((1, 12)), 3, index="hnsw")
    assert (built, parsed) == (["build"], [])
    monkeypatch.undo()
    assert not (indexed / "index-hnsw.faiss").is_symlink()
    searched(indexed).verify()  # and kept, with a manifest that covers it


def test_a_folder_that_cannot_be_written_keeps_no_index(folder, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(index_files, "write_file", refuse)
    before = sorted(os.listdir(folder)), (folder / "manifest.json").read_bytes()
    searched(folder).verify()
    assert (sorted(os.listdir(folder)), (folder / "manifest.json").read_bytes()) == before


def test_a_flat_index_is_not_kept(folder):
    ReferenceSet.open(folder).search(np.ones((1, 12)), 3, index="flat")
    assert sorted(read_manifest(folder)["files"]) == sorted(DATA_FILES)


# --- damage ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DATA_FILES)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_file_that_was_cut_short(folder, name, share):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(share * len(data))])
    with pytest.raises(ArtefactError, match=rf"{name} has \d+ bytes, its manifest says {len(data)}"):
        ReferenceSet.open(folder)


@pytest.mark.parametrize("name", DATA_FILES)
def test_a_changed_byte_is_found_by_verify_and_by_the_first_use(folder, name):
    data = (folder / name).read_bytes()
    for place in (len(data) - 1, len(data) // 2):
        (folder / name).write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(ArtefactError, match=f"{name} was changed: its sha256"):
            ReferenceSet.open(folder).verify()
        with pytest.raises(ArtefactError, match=f"{name} was changed: its sha256"):
            use_all(ReferenceSet.open(folder))
    (folder / name).write_bytes(data)
    ReferenceSet.open(folder).verify()


def test_each_first_use_hashes_what_it_reads_and_once(folder, monkeypatch):
    hashed: list[str] = []
    from ttrouting.refsets import manifest as module

    original = module.sha256_of
    monkeypatch.setattr(module, "sha256_of", lambda file: hashed.append(file.name) or original(file))
    refset = ReferenceSet.open(folder)
    assert hashed == []
    refset.record(1)
    assert sorted(hashed) == ["offsets.safetensors", "records.jsonl"]
    refset.omega([1])
    refset.search(np.ones((1, 12)), 1)
    assert sorted(hashed) == sorted(DATA_FILES)
    use_all(refset)
    refset.near_pathways(np.ones((1, 1, 5)), [0], 1)
    assert len(hashed) == 4
    refset.verify()
    assert len(hashed) == 8


@pytest.mark.parametrize("name", DATA_FILES)
def test_a_file_that_is_missing(folder, name):
    (folder / name).unlink()
    with pytest.raises(ArtefactError, match=f"{name} is missing"):
        ReferenceSet.open(folder)


def test_a_manifest_that_is_missing_or_damaged(folder, tmp_path):
    file = folder / "manifest.json"
    with pytest.raises(ArtefactError, match=r"holds no manifest\.json\. Give a folder that 'ttrouting refset build'"):
        ReferenceSet.open(tmp_path / "nowhere")
    with pytest.raises(ArtefactError, match=r"holds no manifest\.json"):
        ReferenceSet.open(file)
    whole = file.read_bytes()
    for place in range(0, len(whole), 7):
        changed = bytes([whole[place] ^ 1])
        if (whole[place : place + 1] + changed).isspace():
            continue
        file.write_bytes(whole[:place] + changed + whole[place + 1 :])
        with pytest.raises(ArtefactError, match="Build"):
            ReferenceSet.open(folder)
    for text in (whole[:-20], b"", b"[]", b"null", b"[" * 100_000, b"\xff\xfe"):
        file.write_bytes(text)
        with pytest.raises(ArtefactError, match=r"damaged|this version reads"):
            ReferenceSet.open(folder)
    file.unlink()
    (folder / "draft").mkdir()
    with pytest.raises(ArtefactError, match=r"is not finished. Run the same 'ttrouting refset build' again"):
        ReferenceSet.open(folder)


def renamed(name: str):
    def change(manifest):
        manifest["files"][name] = manifest["files"]["records.jsonl"]

    return change


FORGERIES = {
    "schema": (lambda m: m.update(schema=2), "schema 2; this version reads 'reference set' of schema 1"),
    "kind": (lambda m: m.update(kind="state"), "is of kind 'state'"),
    "fingerprint": (lambda m: m.update(fingerprint="yes"), "lacks the fingerprint of its model"),
    "embedder": (lambda m: m["embedder"].update(name=5), "lacks embedder.name"),
    "no dimension": (lambda m: m["embedder"].pop("dimension"), "lacks embedder.dimension"),
    "true for a number": (lambda m: m["counts"].update(records=True), "lacks counts.records"),
    "negative": (lambda m: m["counts"].update(records=-1), "lacks counts.records"),
    "sites": (lambda m: m.update(sites=[3, 5]), "lacks sites"),
    "no files": (lambda m: m.pop("files"), "lacks files"),
    "no pathways": (lambda m: m["files"].pop("pathways.safetensors"), "lacks files.pathways.safetensors"),
    "hash": (lambda m: m["files"]["records.jsonl"].update(sha256="0"), "lacks the sha256 of records.jsonl"),
    "size": (lambda m: m["files"]["records.jsonl"].update(bytes="9"), "lacks the size of records.jsonl"),
    "empty": (lambda m: m["counts"].update(records=0), "holds no record"),
    "fewer records": (
        lambda m: m["counts"].update(records=39),
        r"offsets has shape \[41\], by the manifest it is \[40\]",
    ),
    "dimension": (
        lambda m: m["embedder"].update(dimension=13),
        r"mean has shape \[12\], by the manifest it is \[13\]",
    ),
    "layers": (lambda m: m["sites"].update(layers=4), r"omega has shape \[40, 3, 5\]"),
    "not centred": (lambda m: m["embedder"].update(name="callable:f"), r"should hold embeddings \(F16, 2-d\)"),
    "path outside": (renamed("../secret"), "names '../secret', which is no plain file in its folder"),
    "absolute path": (renamed("/etc/passwd"), "names '/etc/passwd', which is no plain file"),
    "path inside": (renamed("a/b"), "names 'a/b', which is no plain file"),
    "hidden": (renamed(".."), "names '..', which is no plain file"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_manifest(folder, name):
    change, words = FORGERIES[name]
    forge(folder, lambda manifest: None)
    use_all(ReferenceSet.open(folder))  # a forgery without a change passes: the hash is no signature
    forge(folder, change)
    with pytest.raises(ArtefactError, match=words):
        ReferenceSet.open(folder)


@pytest.mark.parametrize("name", DATA_FILES)
def test_links_may_not_leave_the_folder(folder, name):
    (folder / name).rename(folder / "inside")
    (folder / name).symlink_to("inside")
    use_all(ReferenceSet.open(folder))
    (folder / "inside").rename(folder.parent / "outside")
    (folder / name).unlink()
    (folder / name).symlink_to(folder.parent / "outside")
    with pytest.raises(ArtefactError, match=f"{name} is a link out of its folder, or to nowhere"):
        ReferenceSet.open(folder)
    (folder / name).unlink()
    (folder / name).symlink_to(name)  # to itself
    with pytest.raises(ArtefactError, match=name):
        ReferenceSet.open(folder)


def header(text: bytes, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + data


def described(kind="F16", shape=(1, 1, 2), offsets=(0, 4)) -> bytes:
    return json.dumps({"omega": {"dtype": kind, "shape": list(shape), "data_offsets": list(offsets)}}).encode()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "header cannot have 0 bytes in a file of 0"),
        (b"PK\x03\x04 a zip file", "header cannot have"),
        (header(b"x" * 2_000_000), "header cannot have 2000000 bytes"),
        (header(b"{not json"), "is no safetensors file"),
        (header(b"[1]"), "its header is no JSON object"),
        (header(b"[" * 100_000), "is no safetensors file"),
        (header(b"{}"), "and holds nothing"),
        (header(b'{"omega": 3}'), "is no safetensors file"),
        (header(b'{"omega": {"dtype": "F16", "shape": [1]}}'), "it lacks 'data_offsets'"),
        (header(described(), b"12"), "has 81 bytes instead of 83"),
        (header(described(), b"123456"), "instead of"),
        (header(described(offsets=(2, 6)), b"123456"), r"stands at \[2, 6\] instead of \[0, 4\]"),
        (header(described(shape=(-1, 1, -2)), b"1234"), r"shape \[-1, 1, -2\]"),
        (header(described(kind="BOOL"), b"1234"), "type 'BOOL'"),
        (header(described(kind="F32", offsets=(0, 8)), b"12345678"), r"omega \(F16, 3-d\), and holds omega \(F32"),
        (header(described(shape=(2,)), b"1234"), r"and holds omega \(F16, 1-d\)"),
        (header(described(), b"1234"), r"omega has shape \[1, 1, 2\], by the manifest it is \[40, 3, 5\]"),
    ],
)
def test_a_file_with_a_fitting_hash_and_no_pathways_in_it(folder, content, words):
    (folder / "pathways.safetensors").write_bytes(content)
    forge(folder, lambda manifest: None)
    with pytest.raises(ArtefactError, match=words):
        ReferenceSet.open(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_embeddings_that_are_no_directions_are_refused_with_the_first_record(folder, value):
    file = folder / "embeddings.safetensors"
    arrays = safetensors.numpy.load_file(file)
    arrays["embeddings"][[11, 30]] = value
    safetensors.numpy.save_file(arrays, file)
    forge(folder, lambda manifest: None)
    refset = ReferenceSet.open(folder)
    for use in (lambda: refset.search(np.ones((1, 12)), 1), refset.embeddings):
        with pytest.raises(ArtefactError, match="2 of 40 embeddings are zero or not finite, the first of record 11"):
            use()


def test_pathways_that_are_not_finite_are_refused(folder):
    omega = safetensors.numpy.load_file(folder / "pathways.safetensors")["omega"]
    omega[4, 1, 1] = np.nan
    safetensors.numpy.save_file({"omega": omega}, folder / "pathways.safetensors")
    forge(folder, lambda manifest: None)
    refset = ReferenceSet.open(folder)
    refset.omega([3, 5])
    with pytest.raises(ArtefactError, match="not finite"):
        refset.omega([3, 4])


@pytest.mark.parametrize("offsets", [[0, 10**9], [5, 2], [-4, 9], [0, 7]])
def test_offsets_that_lead_nowhere(folder, offsets):
    arrays = safetensors.numpy.load_file(folder / "offsets.safetensors")
    arrays["offsets"][:2] = offsets
    safetensors.numpy.save_file(arrays, folder / "offsets.safetensors")
    forge(folder, lambda manifest: None)
    with pytest.raises(ArtefactError, match=r"Record 0 of .*(cannot stand|is no JSON)"):
        ReferenceSet.open(folder).record(0)


@pytest.mark.parametrize("line", ['"text"', "{}", '{"prompt": 1}', "[" * 40])
def test_lines_that_are_no_records(folder, line):
    file = folder / "records.jsonl"
    data = file.read_bytes()
    end = data.index(b"\n")
    file.write_bytes(line.encode().ljust(end) + data[end:])
    forge(folder, lambda manifest: None)
    with pytest.raises(ArtefactError, match=r"Record 0 of .* is no (record with prompt|JSON)"):
        ReferenceSet.open(folder).record(0)


def test_a_set_of_another_model(folder):
    refset = ReferenceSet.open(folder)
    refset.check_model(FINGERPRINT)
    words = re.escape("built with 'made' (fingerprint 0123456789ab), this model's is ffffffffffff")
    with pytest.raises(ArtefactError, match=words):
        refset.check_model("f" * 64)


# --- a million records ------------------------------------------------------------------------------------

OPENER = """
import sys
from pathlib import Path
from ttrouting.refsets import ReferenceSet

def now():
    status = Path("/proc/self/status").read_text().split()
    read = Path("/proc/self/io").read_text().split()
    return int(status[status.index("VmRSS:") + 1]) * 1024, int(read[1])

ReferenceSet.open(sys.argv[1])  # what is imported or made once
before = now()
refset = ReferenceSet.open(sys.argv[2])
after = now()
print(len(refset), after[0] - before[0], after[1] - before[1])
"""


def test_opening_a_million_records_takes_no_memory_and_reads_no_data(folder, tmp_path):
    """Sparse files of the right size: had anything been read or hashed, it would be gigabytes, and refused."""
    count, dimension, layers, experts = 1_000_000, 384, 16, 64
    big = tmp_path / "big"
    big.mkdir()
    shapes = {
        "offsets.safetensors": {"offsets": ("I64", [count + 1], 8), "correct": ("U8", [count], 1)},
        "embeddings.safetensors": {
            "mean": ("F32", [dimension], 4),
            "scale": ("F32", [dimension], 4),
            "embeddings": ("F16", [count, dimension], 2),
        },
        "pathways.safetensors": {"omega": ("F16", [count, layers, experts], 2)},
    }
    files = {}
    for name, arrays in shapes.items():
        end, described = 0, {}
        for array, (kind, shape, width) in arrays.items():
            begin, end = end, end + int(np.prod(shape)) * width
            described[array] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
        text = header(json.dumps(described).encode())
        (big / name).write_bytes(text)
        os.truncate(big / name, len(text) + end)
    (big / "records.jsonl").touch()
    os.truncate(big / "records.jsonl", 500_000_000)
    for name in DATA_FILES:
        files[name] = {"sha256": "0" * 64, "bytes": (big / name).stat().st_size}
    manifest = read_manifest(folder)
    manifest["files"] = files
    manifest["counts"] = {"records": count, "correct": count, "read": count}
    manifest["sites"] = {"layers": layers, "experts": experts}
    manifest["embedder"] = {"name": "model", "dimension": dimension}
    write_manifest(big, manifest)
    done = subprocess.run(
        [sys.executable, "-c", OPENER, str(folder), str(big)], capture_output=True, text=True, check=True
    )
    found, resident, read = map(int, done.stdout.split())
    assert found == count
    assert sum(facts["bytes"] for facts in files.values()) > 3e9
    assert resident < 1_000_000
    assert read < 20_000
