"""Which records become references, and what are they asked? The options of a build, and records under them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ttrouting.errors import ConfigError, did_you_mean
from ttrouting.refsets.records import pair_digest
from ttrouting.refsets.sources import Source
from ttrouting.refsets.templates import FieldFault, Template, as_text, check_path, lookup

JUDGES = ("exact", "choice", "regex")
CHOICE_SCORES = ("per_byte", "sum")
KEEP = ("successful", "all")


@dataclass(frozen=True)
class Recipe:
    """Options of a build that decide what is in the set. Templates are those of `ttrouting.refsets.templates`.

    Attributes:
        prompt: template of what the model gets. answer: of how it should go on, leading space and line end included.
        source, task: templates, or plain text, of labels for people.
        judge: which records count as answered correctly.
            "exact": greedy decoding writes the answer, token by token. What it would write after that is not looked
                at, so end the answer with what ends an answer, such as a line end.
            "choice": of the record's choices, each put where the answer's one placeholder stands, the right one has
                the highest log-likelihood.
            "regex": greedy decoding writes something in which `pattern` finds the same as in the answer.
        choices: for "choice", the field with the list of choices; the answer's placeholder must give one of them.
        choice_score: for "choice", log-likelihood "per_byte" of the choice in UTF-8 (lm-eval's acc_norm divides by
            characters) or its "sum" (lm-eval's acc).
        pattern: for "regex"; its first group, or the whole match. max_new_tokens: for "regex".
        keep: "successful" records, or "all", with a flag.
        limit: only so many records from the start of the source. shard: "i/n" takes the i-th of every n records.

    Raises:
        ConfigError: a template that cannot be read, or options that do not go together.
    """

    prompt: str
    answer: str
    source: str = ""
    task: str = ""
    judge: str = "exact"
    choices: str | None = None
    choice_score: str = "per_byte"
    pattern: str | None = None
    max_new_tokens: int = 256
    keep: str = "successful"
    limit: int | None = None
    shard: str = "1/1"

    def __post_init__(self) -> None:
        for name, known in (("judge", JUDGES), ("choice_score", CHOICE_SCORES), ("keep", KEEP)):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"{name} cannot be {value!r}.{did_you_mean(str(value), known)}")
        if not Template(self.prompt, "prompt").paths:
            raise ConfigError(f"The template prompt {self.prompt!r} names no field. Name one, such as {{question}}.")
        places = Template(self.answer, "answer").paths
        if (self.judge == "choice") != (self.choices is not None):
            raise ConfigError("judge='choice' and choices, the field with the list of choices, go together.")
        if self.choices is not None:
            check_path(self.choices, "choices")
            if len(places) != 1:
                raise ConfigError(
                    f"With judge='choice' every choice is put into the answer's one placeholder; the template answer "
                    f"{self.answer!r} has {len(places)}."
                )
        if (self.judge == "regex") != (self.pattern is not None):
            raise ConfigError("judge='regex' and pattern, the regular expression, go together.")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ConfigError(f"pattern {self.pattern!r} is no regular expression: {error}.") from None
        if self.max_new_tokens < 1 or (self.limit is not None and self.limit < 1):
            raise ConfigError("max_new_tokens and limit must be at least 1.")
        self.part()

    def part(self) -> tuple[int, int]:
        """`shard` as numbers, the first one counted from 0."""
        match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", self.shard)
        if match is None or int(match[1]) > int(match[2]):
            raise ConfigError(f"shard is i/n with i from 1 to n, such as 1/4; got {self.shard!r}.")
        return int(match[1]) - 1, int(match[2])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def size(self, source: Source) -> int:
        """How many records of the source this recipe reads."""
        first, of = self.part()
        whole = source.size if self.limit is None else min(source.size, self.limit)
        return len(range(first, whole, of))


@dataclass(frozen=True)
class Question:
    """A record as the model gets it.

    Attributes:
        where: its place in the source. prompt, answer, source, task: texts.
        choices: texts that could continue the prompt, the answer among them; none unless choices are judged.
        sizes: length of each choice in bytes.
    """

    where: str
    prompt: str
    answer: str
    source: str
    task: str
    choices: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()


@dataclass
class Counts:
    """What became of the records of a source.

    Attributes:
        read: all that were looked at. bad: that could not be used; first_bad: the first of them, and why.
        duplicates: with the prompt and answer of an earlier one. too_long: longer than the model's context.
        correct: that the model answered correctly. records: that were kept.
    """

    read: int = 0
    bad: int = 0
    duplicates: int = 0
    too_long: int = 0
    correct: int = 0
    records: int = 0
    first_bad: str = ""


class Questions:
    """The questions of a source under a recipe, repeated ones left out. `counts` goes along with the iteration."""

    def __init__(self, source: Source, recipe: Recipe) -> None:
        self.counts = Counts()
        self._source = source
        self._recipe = recipe
        self._prompt, self._answer = Template(recipe.prompt, "prompt"), Template(recipe.answer, "answer")
        self._labels = Template(recipe.source, "source"), Template(recipe.task, "task")

    def __iter__(self) -> Iterator[Question]:
        """Once through the source.

        Raises:
            ConfigError: the first record lacks a field that a template names.
        """
        seen: set[int] = set()
        first, of = self._recipe.part()
        for number, row in enumerate(self._source.read()):
            if self._recipe.limit is not None and number >= self._recipe.limit:
                return
            if number % of != first:
                continue
            self.counts.read += 1
            if row.fields is None:
                self.count_bad(row.where, row.fault)
                continue
            try:
                question = self._question(row.where, row.fields)
                digest = pair_digest(question.prompt, question.answer)
            except FieldFault as fault:
                if fault.unknown and self.counts.read == 1 + self.counts.bad:
                    raise ConfigError(f"{row.where.capitalize()} of {self._source.name}: {fault}") from None
                self.count_bad(row.where, str(fault))
                continue
            if digest in seen:
                self.counts.duplicates += 1
                continue
            seen.add(digest)
            yield question

    def _question(self, where: str, fields: Mapping[str, Any]) -> Question:
        source, task = (label.render(fields) for label in self._labels)
        prompt, answer = self._prompt.render(fields), self._answer.render(fields)
        _check_characters(prompt, answer, source, task)
        if not prompt or not answer:
            raise FieldFault(f"its {'answer' if prompt else 'prompt'} is empty")
        if self._recipe.choices is None:
            return Question(where, prompt, answer, source, task)
        found = lookup(fields, self._recipe.choices)
        if not isinstance(found, list) or len(found) < 2:
            raise FieldFault(f"{{{self._recipe.choices}}} is no list of two choices or more")
        choices = [as_text(choice, self._recipe.choices) for choice in found]
        _check_characters(*choices)
        texts = tuple(self._answer.fill([choice]) for choice in choices)
        if answer not in texts:
            raise FieldFault(f"its answer {answer!r} is not among its choices")
        return Question(where, prompt, answer, source, task, texts, tuple(len(c.encode()) for c in choices))

    def count_bad(self, where: str, reason: str) -> None:
        """A record that cannot be used."""
        self.counts.bad += 1
        self.counts.first_bad = self.counts.first_bad or f"{where}: {reason}"


def _check_characters(*texts: str) -> None:
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise FieldFault("its text holds half of a character (a lone surrogate)") from None
