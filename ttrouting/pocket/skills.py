"""What can the pocket model be asked? Skills, dialects, splits, prompts and exact match.

Every skill writes its question and answer with the digits 0-9; this is the *canonical* form. A
*dialect* is a spelling of the digits: `digits` (0-9) or `letters` (a-j, so that 47 reads `eh`).
Words and keys are uppercase, so that a lowercase letter is always a digit of the second dialect.

Some skills are trained in both dialects, some in `digits` only, and some not at all: those ask a trained
skill for a *longer list*. An untrained pair of skill and dialect is *shifted*: the model knows the skill
and knows the letters, but never met them together, or never met so long a list.

A question's split follows from a hash of its canonical form alone, so a question that is held out
in one dialect is held out in the other, whatever the seed.

    >>> e = sample("subtract", "letters", "test", n=1, seed=0)[0]
    >>> e.prompt + e.completion  # 'Q: bgf-ej\\nA: bbg\\n', one solved example
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

DIALECTS = ("digits", "letters")
SPLITS = ("train", "dev", "test", "reference")

_TO_LETTERS = str.maketrans("0123456789", "abcdefghij")
# Upper bounds of a hash bucket in 0..99: 70 % train, 10 % each for the three held-out splits.
_SPLIT_BOUNDS = (("train", 70), ("dev", 80), ("test", 90), ("reference", 100))
_NAMES = ("ANN", "BOB", "EVA", "IAN", "LEO", "MIA", "SAM", "TOM")
_KEYS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

Generator = Callable[[random.Random], tuple[str, str]]


@dataclass(frozen=True)
class Skill:
    """One task that the pocket model was trained on.

    Attributes:
        name: key in `SKILLS`.
        generate: draws one canonical `(question, answer)`.
        trained_dialects: dialects that appear in the training text for this skill; none for a longer list.
        weight: how often each trained dialect of the skill is drawn, relative to the other skills.
        late_weight: the same in the last third of training, which goes to what is learned slowly.
        about: one line for the model card.
    """

    name: str
    generate: Generator
    trained_dialects: tuple[str, ...]
    weight: float
    late_weight: float
    about: str


@dataclass(frozen=True)
class Example:
    """One question in one dialect.

    Attributes:
        skill, dialect, split: where it comes from.
        question, answer: text in the example's dialect, without `Q:`, `A:` or line ends.
        canonical: the question in digits; equal for the same question in both dialects.
    """

    skill: str
    dialect: str
    split: str
    question: str
    answer: str
    canonical: str

    @property
    def prompt(self) -> str:
        """What the model is given: everything up to and including `A:`, no trailing space."""
        return f"Q: {self.question}\nA:"

    @property
    def completion(self) -> str:
        """What the model should add: a space, the answer, the end of the line."""
        return f" {self.answer}\n"


def _add(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(10, 299), rng.randint(1, 99)
    return f"{a}+{b}", str(a + b)


def _subtract(rng: random.Random) -> tuple[str, str]:
    b = rng.randint(1, 99)
    a = rng.randint(max(b, 10), 299)
    return f"{a}-{b}", str(a - b)


def _word(rng: random.Random) -> tuple[str, str]:
    have, gets = rng.randint(5, 70), rng.randint(1, 29)
    gives = rng.randint(1, min(have, 29))
    name = rng.choice(_NAMES)
    if rng.random() < 0.5:
        steps = f"{have}+{gets}={have + gets}-{gives}={have + gets - gives}"
        return f"{name} HAS {have} GETS {gets} GIVES {gives}", steps
    steps = f"{have}-{gives}={have - gives}+{gets}={have - gives + gets}"
    return f"{name} HAS {have} GIVES {gives} GETS {gets}", steps


def _sort(rng: random.Random) -> tuple[str, str]:
    items = _digits(rng, 5)
    return f"SORT {' '.join(items)}", " ".join(sorted(items))


def _reverse(rng: random.Random) -> tuple[str, str]:
    items = _digits(rng, 5)
    return f"REVERSE {' '.join(items)}", " ".join(reversed(items))


def _count(rng: random.Random, length: int = 6) -> tuple[str, str]:
    wanted, times = str(rng.randrange(10)), rng.randint(0, 5)
    others = [d for d in "0123456789" if d != wanted]
    items = [wanted] * times + [rng.choice(others) for _ in range(length - times)]
    rng.shuffle(items)
    return f"COUNT {wanted} IN {' '.join(items)}", str(times)


def _minimum(rng: random.Random, length: int = 3) -> tuple[str, str]:
    items = [rng.randint(10, 99) for _ in range(length)]
    return f"MIN {' '.join(map(str, items))}", str(min(items))


def _maximum(rng: random.Random, length: int = 3) -> tuple[str, str]:
    items = [rng.randint(10, 99) for _ in range(length)]
    return f"MAX {' '.join(map(str, items))}", str(max(items))


def _logic(rng: random.Random) -> tuple[str, str]:
    wanted, joiner = rng.random() < 0.5, rng.choice(("AND", "OR"))
    while True:  # Redrawn until the verdict fits, so that YES and NO are equally frequent.
        a, b, c, d = (rng.randrange(10) for _ in range(4))
        left, right = rng.choice("<>"), rng.choice("<>")
        first = a < b if left == "<" else a > b
        second = c < d if right == "<" else c > d
        verdict = (first and second) if joiner == "AND" else (first or second)
        if verdict == wanted:
            return f"{a}{left}{b} {joiner} {c}{right}{d}", "YES" if verdict else "NO"


def _sequence(rng: random.Random) -> tuple[str, str]:
    step, start = rng.randint(1, 25), rng.randint(0, 199)
    terms = [start + i * step for i in range(5)]
    if rng.random() < 0.5:
        terms.reverse()
    return f"NEXT {' '.join(map(str, terms[:4]))}", str(terms[4])


def _units(rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.5:
        big, small = rng.randint(1, 99), rng.randint(1, 99)
        return f"{big} M {small} CM IN CM", str(100 * big + small)
    big, small = rng.randint(1, 20), rng.randint(1, 999)
    return f"{big} KG {small} G IN G", str(1000 * big + small)


def _time(rng: random.Random) -> tuple[str, str]:
    hour, minute, plus = rng.randrange(24), rng.randrange(60), rng.randint(1, 59)
    total = (60 * hour + minute + plus) % (24 * 60)
    return f"{hour:02}:{minute:02}+{plus} MIN", f"{total // 60:02}:{total % 60:02}"


def _program(rng: random.Random) -> tuple[str, str]:
    value = rng.randint(10, 99)
    lines, trace = [f"X={value}"], []
    for _ in range(2):
        operator = rng.choice("+-*")
        operand = 2 if operator == "*" else rng.randint(1, 9)
        value = {"+": value + operand, "-": value - operand, "*": value * operand}[operator]
        lines.append(f"X{operator}={operand}")
        trace.append(str(value))
    return ";".join(lines), " ".join(trace)


def _lookup(rng: random.Random) -> tuple[str, str]:
    keys = rng.sample(_KEYS, 4)
    values = [str(rng.randint(10, 99)) for _ in keys]
    table = " ".join(f"{k}={v}" for k, v in zip(keys, values, strict=True))
    wanted = rng.randrange(4)
    return f"{table} AT {keys[wanted]}", values[wanted]


def _digits(rng: random.Random, n: int) -> list[str]:
    """`n` independent single digits, as text."""
    return [str(rng.randrange(10)) for _ in range(n)]


_BOTH, _ONE, _NONE = DIALECTS, ("digits",), ()

SKILLS: dict[str, Skill] = {
    skill.name: skill
    for skill in (
        Skill("add", _add, _BOTH, 1.5, 2.0, "sum of two numbers"),
        Skill("word", _word, _BOTH, 1.5, 2.5, "word problem, two worked steps"),
        Skill("sort", _sort, _BOTH, 1.0, 0.3, "five digits in ascending order"),
        Skill("maximum", _maximum, _BOTH, 1.0, 0.3, "largest of three numbers"),
        Skill("logic", _logic, _BOTH, 1.0, 3.0, "two comparisons joined by AND or OR"),
        Skill("time", _time, _BOTH, 2.0, 1.0, "time of day after some minutes"),
        Skill("program", _program, _BOTH, 1.5, 1.5, "trace of a three-statement program"),
        Skill("subtract", _subtract, _ONE, 2.5, 3.0, "difference of two numbers"),
        Skill("reverse", _reverse, _ONE, 1.5, 0.4, "five digits in reversed order"),
        Skill("count", _count, _ONE, 1.5, 3.0, "how often a digit is in a list"),
        Skill("minimum", _minimum, _ONE, 1.5, 0.8, "smallest of three numbers"),
        Skill("units", _units, _ONE, 1.5, 0.5, "metres to centimetres, kilograms to grams"),
        Skill("lookup", _lookup, _ONE, 1.5, 3.0, "value of a key in a given table"),
        Skill("sequence", _sequence, _ONE, 2.5, 3.0, "next term of an arithmetic sequence"),
        Skill("minimum5", partial(_minimum, length=5), _NONE, 0, 0, "smallest of five numbers"),
        Skill("maximum5", partial(_maximum, length=5), _NONE, 0, 0, "largest of five numbers"),
        Skill("count7", partial(_count, length=7), _NONE, 0, 0, "how often a digit is in a list of seven"),
    )
}


def trained_pairs() -> list[tuple[str, str]]:
    """`(skill, dialect)` pairs that are in the training text."""
    return [(s.name, d) for s in SKILLS.values() for d in s.trained_dialects]


def shifted_pairs() -> list[tuple[str, str]]:
    """`(skill, dialect)` pairs that the model never met in training: another spelling, or longer lists."""
    return [(s.name, d) for s in SKILLS.values() for d in DIALECTS if d not in s.trained_dialects]


def to_dialect(text: str, dialect: str) -> str:
    """Respell a canonical text (digits 0-9) in `dialect`; everything but digits is kept."""
    _known("dialect", dialect, DIALECTS)
    return text.translate(_TO_LETTERS) if dialect == "letters" else text


def split_of(skill: str, canonical: str) -> str:
    """The split that a canonical question belongs to: a fixed function of its text."""
    digest = hashlib.blake2b(f"{skill}|{canonical}".encode(), digest_size=8).digest()
    bucket = int.from_bytes(digest, "big") % 100
    return next(name for name, bound in _SPLIT_BOUNDS if bucket < bound)


def draw(skill: str, dialect: str, split: str, rng: random.Random) -> Example:
    """One example from `split`, drawn with `rng` (repeats are possible; see `sample`)."""
    _known("skill", skill, SKILLS)
    _known("split", split, SPLITS)
    while True:
        question, answer = SKILLS[skill].generate(rng)
        if split_of(skill, question) == split:
            spelled = to_dialect(question, dialect), to_dialect(answer, dialect)
            return Example(skill, dialect, split, *spelled, canonical=question)


def sample(skill: str, dialect: str, split: str, n: int, seed: int = 0) -> list[Example]:
    """`n` different questions, the same for the same arguments on every machine.

    The dialect does not enter the draw: both dialects give the same questions in the same order,
    and a larger `n` continues the list of a smaller one.

    Raises:
        ValueError: unknown skill, dialect or split, or fewer than `n` questions were found.
    """
    rng = random.Random(f"{seed}|{skill}|{split}")
    found: dict[str, Example] = {}
    repeats = 0  # in a row; many of them mean that nothing new is left to find
    while len(found) < n and repeats < 2000:
        example = draw(skill, dialect, split, rng)
        repeats = repeats + 1 if example.canonical in found else 0
        found.setdefault(example.canonical, example)
    if len(found) < n:
        raise ValueError(f"asked for {n} different {split} questions of {skill!r}, found {len(found)}; ask for fewer")
    return list(found.values())


def few_shot_prompt(shots: Sequence[Example], example: Example) -> str:
    """Solved `shots`, then the question of `example`; with no shots this is `example.prompt`."""
    return "".join(shot.prompt + shot.completion for shot in shots) + example.prompt


def parse_answer(completion: str) -> str:
    """The answer in a completion: its first line without surrounding spaces."""
    return completion.split("\n", 1)[0].strip()


def is_correct(completion: str, example: Example) -> bool:
    """Exact match on the answer line. `completion` must not contain the prompt."""
    return parse_answer(completion) == example.answer


def _known(kind: str, value: str, known: Sequence[str] | dict[str, Skill]) -> None:
    """Raise `ValueError` naming the choices if `value` is not one of them."""
    if value not in known:
        raise ValueError(f"unknown {kind} {value!r}; choose one of {', '.join(known)}")
