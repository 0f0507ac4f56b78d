"""What is a record, and what is it on a line of `records.jsonl`?"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import asdict, dataclass

from ttrouting.errors import ArtefactError


@dataclass(frozen=True)
class Record:
    """A question with its answer, as the model reads them.

    Attributes:
        prompt: the text exactly as the model got it. answer: exactly as it continues the prompt, leading space
            included. source, task: labels for people. correct: whether the model answers it correctly.
    """

    prompt: str
    answer: str
    source: str
    task: str
    correct: bool

    @property
    def solved(self) -> str:
        """The question with its answer, to stand before another one."""
        return self.prompt + self.answer

    def line(self) -> bytes:
        """The record as a line of JSON."""
        return (json.dumps(asdict(self), ensure_ascii=False) + "\n").encode()

    @classmethod
    def parse(cls, line: bytes, where: str) -> Record:
        """The record on a line.

        Raises:
            ArtefactError: no such record; `where` names the place.
        """
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ArtefactError(f"{where} is no JSON: {error}. Build the set again.") from None
        kinds = {"prompt": str, "answer": str, "source": str, "task": str, "correct": bool}
        if not isinstance(fields, dict) or {k: type(v) for k, v in fields.items()} != kinds:
            raise ArtefactError(f"{where} is no record with {', '.join(kinds)}. Build the set again.")
        return cls(**fields)


def others_than(number: int, total: int, count: int, draw: random.Random) -> list[int]:
    """`count` different numbers of records below `total`, none of them `number`."""
    return [(number + 1 + i) % total for i in draw.sample(range(total - 1), count)]


def pair_digest(prompt: str, answer: str) -> int:
    """A number for a prompt with its answer, by which a repeated one is known: 64 bits of a hash."""
    text = json.dumps([prompt, answer]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
