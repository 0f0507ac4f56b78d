"""A reference set written by the safetensors library and plain JSON, from the format's description alone."""

import hashlib
import json
from pathlib import Path

import numpy as np
import safetensors.numpy

FINGERPRINT = "0123456789abcdef" * 4


def raw_set(count: int = 40, dimension: int = 12, layers: int = 3, experts: int = 5, seed: int = 0):
    """Random content: records, raw embeddings, pathways, flags. The first records are answered wrongly."""
    draw = np.random.default_rng(seed)
    correct = np.arange(count) >= count // 4
    records = [
        {"prompt": f"Q: ü{i}\nA:", "answer": f" {i * i}\n", "source": "made", "task": f"t{i % 3}", "correct": bool(c)}
        for i, c in enumerate(correct)
    ]
    embeddings = 3 + draw.normal(size=(count, dimension))  # nearly parallel, as pooled hidden states are
    omega = draw.dirichlet(np.ones(experts), (count, layers))
    return records, embeddings, omega, correct


def write_raw(folder: Path, records, embeddings, omega, correct, *, embedder: str = "model", **facts) -> Path:
    """The folder of a set. `facts` replace parts of the manifest."""
    folder.mkdir(parents=True)
    lines = [json.dumps(record).encode() + b"\n" for record in records]
    (folder / "records.jsonl").write_bytes(b"".join(lines))
    unit = (embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)).astype(np.float16)
    arrays = {"embeddings": unit}
    if embedder == "model":
        arrays["mean"] = unit.astype(np.float64).mean(0).astype(np.float32)
        arrays["scale"] = unit.astype(np.float64).std(0).astype(np.float32)
    safetensors.numpy.save_file(arrays, folder / "embeddings.safetensors")
    safetensors.numpy.save_file({"omega": omega.astype(np.float16)}, folder / "pathways.safetensors")
    offsets = np.cumsum([0] + [len(line) for line in lines]).astype(np.int64)
    flags = {"offsets": offsets, "correct": np.asarray(correct, dtype=np.uint8)}
    safetensors.numpy.save_file(flags, folder / "offsets.safetensors")
    names = ("records.jsonl", "embeddings.safetensors", "pathways.safetensors", "offsets.safetensors")
    manifest = {
        "schema": 1,
        "kind": "reference set",
        "fingerprint": FINGERPRINT,
        "model": "made",
        "sites": {"layers": omega.shape[1], "experts": omega.shape[2], "hidden": embeddings.shape[1]},
        "embedder": {"name": embedder, "dimension": embeddings.shape[1]},
        "counts": {"records": len(records), "correct": int(np.sum(correct)), "read": len(records)},
        "provenance": {},
        "files": {name: file_facts(folder / name) for name in names},
        **facts,
    }
    write_manifest(folder, manifest)
    return folder


def file_facts(file: Path) -> dict:
    data = file.read_bytes()
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def read_manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def write_manifest(folder: Path, manifest: dict) -> None:
    """With a hash over itself that fits."""
    rest = {k: v for k, v in manifest.items() if k != "sha256"}
    rest["sha256"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(rest))


def forge(folder: Path, change) -> None:
    """Change the manifest, with the hashes of files as they are now: what somebody could do on purpose."""
    manifest = read_manifest(folder)
    for name in manifest["files"]:
        if (folder / name).is_file():
            manifest["files"][name] |= file_facts(folder / name)
    change(manifest)
    write_manifest(folder, manifest)
