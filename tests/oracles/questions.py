"""Questions for the pocket model, some with wrong answers, and the records of a set."""

import json
from pathlib import Path

import pytest

from ttrouting.pocket import POCKET_DIR
from ttrouting.pocket.skills import sample

needs_pocket = pytest.mark.skipif(
    not (POCKET_DIR / "model.safetensors").is_file(), reason="the pocket model's weights are not in this checkout"
)
SHAPE = {"prompt": "Q: {question}\nA:", "answer": " {answer}\n", "task": "{skill}", "source": "made"}


def questions(count: int) -> list[dict[str, str]]:
    """Questions of several skills, every third with a wrong answer."""
    skills = ("add", "sort", "maximum", "time")
    drawn = [sample(skill, "digits", "reference", count // len(skills)) for skill in skills]
    rows = [
        {"question": e.question, "answer": e.answer, "skill": e.skill}
        for each in zip(*drawn, strict=True)
        for e in each
    ]
    for row in rows[::3]:
        row["answer"] = row["answer"][::-1] + "7"
    return rows


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(refset) -> list[tuple[str, str]]:
    records = [refset.record(i) for i in range(len(refset))]
    return [(record.prompt, record.answer) for record in records]
