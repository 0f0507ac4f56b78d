"""Which of the files that ship with the project are older than what they are made from? Those are made again.

    make artefacts                              what changed, and everything that follows from it
    python -m demos.artefacts --list            each step, whether it would run, why, and its commands
    python -m demos.artefacts --only page       one step, whatever changed
    python -m demos.artefacts --accept model    what is there was made from what is there: it was made elsewhere

Whether something changed is told by content and not by dates, which a checkout sets as it likes: `artefacts.json`
remembers of each step the hash of what its outputs were made from. The package's own code is not among it: after a
change there that matters, name the steps with --only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ttrouting.errors import ConfigError, did_you_mean
from ttrouting.evaluation.files import write_json

ROOT = Path(__file__).parents[1]
RECORD = Path("demos/artefacts.json")
WEIGHTS, SET = "ttrouting/pocket/weights", "refsets/shipped/pocket"
DRAFT = "out/artefacts"


@dataclass(frozen=True)
class Step:
    """Commands of a shell, run in the root of the repository, that make `outputs` from `inputs` (patterns)."""

    name: str
    takes: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    commands: tuple[str, ...]


STEPS = (
    Step(
        "model",
        "hours",
        ("demos/train_pocket.py", "ttrouting/pocket/skills.py"),
        (f"{WEIGHTS}/model.safetensors", f"{WEIGHTS}/tokenizer.json"),
        (f"python demos/train_pocket.py --out {WEIGHTS} --checkpoint {DRAFT}/training",),
    ),
    Step(
        "card",
        "minutes",
        (f"{WEIGHTS}/model.safetensors", f"{WEIGHTS}/tokenizer.json", "ttrouting/pocket/card.py"),
        (f"{WEIGHTS}/README.md",),
        (f"python demos/train_pocket.py --out {WEIGHTS} --card",),
    ),
    Step(
        "refset",
        "minutes",
        (
            f"{WEIGHTS}/model.safetensors",
            f"{WEIGHTS}/tokenizer.json",
            "demos/pocket_records.py",
            "ttrouting/pocket/skills.py",
        ),
        (f"{SET}/manifest.json",),
        (
            f"mkdir -p {DRAFT} && python demos/pocket_records.py --n 100 > {DRAFT}/records.jsonl",
            f"ttrouting refset build -e --data {DRAFT}/records.jsonl --prompt 'Q: {{question}}\\nA: ' "
            f"--answer '{{answer}}\\n' --task '{{skill}}/{{dialect}}' --source 'generated, split reference' "
            f"--keep all --restart --out {DRAFT}/pocket",
            f"rm -rf {SET} && cp -r {DRAFT}/pocket {SET}",
        ),
    ),
    Step(
        "deltas",
        "half an hour",
        (f"{SET}/manifest.json",),
        (f"{SET}/deltas.json",),
        ("ttrouting refset fit pocket --shots 6",),
    ),
    Step(  # all three go on where they were left, so long as out/ is there
        "study",
        "a night",
        (
            f"{WEIGHTS}/model.safetensors",
            f"{SET}/manifest.json",
            f"{SET}/deltas.json",
            "demos/study/plan.py",
            "demos/study/oracles.py",
        ),
        ("docs/results.json",),
        ("python -m demos.study.oracles", "python -m demos.study.run", "python -m demos.study.collect"),
    ),
    Step(
        "page",
        "a minute",
        (
            "docs/results.json",
            "demos/study/page.py",
            "demos/study/tables.py",
            "demos/study/pictures.py",
            "demos/study/arithmetic.py",
            "demos/study/why.md",
        ),
        ("docs/results.md",),
        ("python -m demos.study.page",),
    ),
)


def made_from(step: Step, root: Path = ROOT) -> str:
    """One hash of the names and contents of a step's inputs."""
    digest = hashlib.sha256()
    for pattern in step.inputs:
        for file in sorted(root.glob(pattern)):
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            digest.update(f"{file.relative_to(root).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def stale(step: Step, record: dict[str, str], root: Path = ROOT) -> str | None:
    """Why a step has to run; None where it has not."""
    for pattern in step.outputs:
        if not any(root.glob(pattern)):
            return f"there is no {pattern}"
    if step.name not in record:
        return "it is not on record what its outputs were made from"
    return "what its outputs were made from has changed" if record[step.name] != made_from(step, root) else None


def read_record(root: Path = ROOT) -> dict[str, str]:
    """By step, the hash of what its outputs were made from."""
    file = root / RECORD
    return json.loads(file.read_bytes()) if file.exists() else {}


def keep(step: Step, record: dict[str, str], root: Path = ROOT) -> None:
    """Write down that a step's outputs were made from what its inputs are now."""
    record[step.name] = made_from(step, root)
    write_json(root / RECORD, {one.name: record[one.name] for one in STEPS if one.name in record})


def run(step: Step, root: Path = ROOT) -> None:
    """Run a step's commands with this interpreter's own programs.

    Raises:
        SystemExit: a command failed; what came before it is kept.
    """
    here = Path(sys.executable).parent
    for command in step.commands:
        print(f"{step.name}: {command}", file=sys.stderr, flush=True)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f'PATH="{here}:$PATH"; {command}'], cwd=root, check=False
        )
        if done.returncode:
            sys.exit(f"{step.name} failed: {command}")


def named(text: str) -> list[Step]:
    """Steps by their names, in their order."""
    wanted = [name.strip() for name in text.split(",") if name.strip()]
    known = [step.name for step in STEPS]
    for name in wanted:
        if name not in known:
            raise ConfigError(f"No step {name!r}.{did_you_mean(name, known)}")
    return [step for step in STEPS if step.name in wanted]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--list", action="store_true", help="run nothing")
    chosen.add_argument("--only", metavar="STEP,...", help="run these, whatever changed")
    chosen.add_argument("--accept", metavar="STEP,...", help="run nothing; outputs of these are up to date")
    options = parser.parse_args(arguments)
    record = read_record()
    if options.list:
        for step in STEPS:
            print(f"{step.name} ({step.takes}): {stale(step, record) or 'up to date'}")
            print("".join(f"    {command}\n" for command in step.commands), end="")
        return
    for step in named(options.only or options.accept) if options.only or options.accept else STEPS:
        if options.accept:
            missing = [pattern for pattern in step.outputs if not any(ROOT.glob(pattern))]
            if missing:
                sys.exit(f"{step.name} cannot be accepted: there is no {missing[0]}. Make it: --only {step.name}")
        elif options.only or stale(step, record) is not None:
            run(step)
        else:
            continue
        keep(step, record)


if __name__ == "__main__":
    main()
