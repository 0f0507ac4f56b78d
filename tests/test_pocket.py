"""Is the pocket model what its card says, and are its questions right and cleanly split?"""

import itertools
import os
import random
import re
import subprocess
import sys

import pytest
import torch

from ttrouting import pocket
from ttrouting.pocket import POCKET_DIR, PocketWeightsMissing, load_pocket
from ttrouting.pocket.card import model_card
from ttrouting.pocket.measure import Score, exact_match, expert_load, loads_by_pair, mutual_information
from ttrouting.pocket.skills import (
    DIALECTS,
    SKILLS,
    SPLITS,
    Example,
    draw,
    few_shot_prompt,
    is_correct,
    sample,
    shifted_pairs,
    split_of,
    to_dialect,
    trained_pairs,
)

ALL_PAIRS = [(skill, dialect) for skill in SKILLS for dialect in DIALECTS]


# --- independent oracles: from the question's text alone, sharing no code with the generators ---


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _word_oracle(question: str) -> str:
    steps = [str(_numbers(question)[0])]
    for verb, number in re.findall(r"(GETS|GIVES) (\d+)", question):
        step = steps[-1] + {"GETS": "+", "GIVES": "-"}[verb] + number
        steps = [*steps[:-1], step, str(eval(step))]
    return "=".join(steps)


def _logic_oracle(question: str) -> str:
    return "YES" if eval(question.replace("AND", "and").replace("OR", "or")) else "NO"


def _time_oracle(question: str) -> str:
    hours, minutes, plus = _numbers(question)
    for _ in range(plus):
        minutes += 1
        if minutes == 60:
            minutes, hours = 0, hours + 1
        if hours == 24:
            hours = 0
    return f"{hours:02d}:{minutes:02d}"


def _program_oracle(question: str) -> str:
    space: dict[str, int] = {}
    trace = []
    for line in question.split(";"):
        exec(line, space)
        trace.append(str(space["X"]))
    return " ".join(trace[1:])


def _lookup_oracle(question: str) -> str:
    table, key = question.split(" AT ")
    return dict(pair.split("=") for pair in table.split())[key]


def _sequence_oracle(question: str) -> str:
    terms = _numbers(question.replace("NEXT ", ""))
    gaps = {b - a for a, b in itertools.pairwise(terms)}
    assert len(gaps) == 1
    return str(terms[-1] + gaps.pop())


def _units_oracle(question: str) -> str:
    big, small = _numbers(question)
    return str(big * (1000 if "KG" in question else 100) + small)


def _count_oracle(question: str) -> str:
    wanted, *items = _numbers(question)
    return str(items.count(wanted))


ORACLES = {
    "add": lambda q: str(eval(q)),
    "subtract": lambda q: str(eval(q)),
    "word": _word_oracle,
    "sort": lambda q: " ".join(sorted(q.split()[1:])),
    "reverse": lambda q: " ".join(q.split()[:0:-1]),
    "count": _count_oracle,
    "minimum": lambda q: str(sorted(_numbers(q))[0]),
    "maximum": lambda q: str(sorted(_numbers(q))[-1]),
    "logic": _logic_oracle,
    "time": _time_oracle,
    "program": _program_oracle,
    "lookup": _lookup_oracle,
    "sequence": _sequence_oracle,
    "units": _units_oracle,
    "minimum5": lambda q: str(sorted(_numbers(q))[0]),
    "maximum5": lambda q: str(sorted(_numbers(q))[-1]),
    "count7": _count_oracle,
}


# --- skills, dialects, splits ---


def test_every_skill_has_an_oracle_and_there_are_enough():
    assert set(ORACLES) == set(SKILLS)
    assert len(SKILLS) >= 12
    assert len(shifted_pairs()) >= 6
    assert sorted(trained_pairs() + shifted_pairs()) == sorted(ALL_PAIRS)


@pytest.mark.parametrize("skill", SKILLS)
def test_answers_agree_with_the_oracle(skill):
    for example in sample(skill, "digits", "test", 200, seed=7):
        assert example.answer == ORACLES[skill](example.question), example.question


@pytest.mark.parametrize("skill", SKILLS)
def test_dialects_spell_the_same_questions(skill):
    back = str.maketrans("abcdefghij", "0123456789")
    digits = sample(skill, "digits", "dev", 50)
    letters = sample(skill, "letters", "dev", 50)
    for d, x in zip(digits, letters, strict=True):
        assert d.canonical == x.canonical == d.question == x.question.translate(back)
        assert d.answer == x.answer.translate(back)
        assert not re.search(r"\d", x.prompt + x.completion)
        # In digits no lowercase letter occurs, so in letters each one is a digit.
        assert not re.search(r"[a-z]", d.prompt + d.completion)


@pytest.mark.parametrize("skill", SKILLS)
def test_splits_are_disjoint_in_both_dialects(skill):
    seen: dict[str, str] = {}
    for split in SPLITS:
        for dialect in DIALECTS:
            for seed in (0, 1):
                for example in sample(skill, dialect, split, 150, seed):
                    assert seen.setdefault(example.canonical, split) == split
                    assert split_of(skill, example.canonical) == split
    assert set(seen.values()) == set(SPLITS)


@pytest.mark.parametrize("skill", SKILLS)
def test_question_spaces_are_large(skill):
    rng = random.Random(0)
    drawn = {SKILLS[skill].generate(rng)[0] for _ in range(3000)}
    assert len(drawn) > 2400  # a space of 10^4 gives about 2590 different ones in 3000 draws


def test_split_shares():
    rng = random.Random(0)
    splits = [split_of("add", SKILLS["add"].generate(rng)[0]) for _ in range(4000)]
    for name, share in (("train", 0.7), ("dev", 0.1), ("test", 0.1), ("reference", 0.1)):
        assert abs(splits.count(name) / 4000 - share) < 0.03


def test_sample_is_deterministic_unique_and_a_prefix():
    few, many = sample("sort", "letters", "test", 5, 3), sample("sort", "letters", "test", 40, 3)
    assert many[:5] == few == sample("sort", "letters", "test", 5, 3)
    assert len({e.canonical for e in many}) == 40
    assert many != sample("sort", "letters", "test", 40, 4)


def test_a_split_never_changes():
    # Frozen: the shipped weights were trained on this split.
    frozen = "tr tr te tr tr tr te re tr tr te tr tr tr tr de tr tr tr tr tr de tr tr"
    assert " ".join(split_of("add", f"{a}+7")[:2] for a in range(40, 64)) == frozen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("divide", "digits", "test"), "unknown skill 'divide'; choose one of add, "),
        (("add", "roman", "test"), "unknown dialect 'roman'; choose one of digits, letters"),
        (("add", "digits", "valid"), "unknown split 'valid'; choose one of train, dev"),
    ],
)
def test_unknown_names_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        sample(*arguments, n=1)


def test_asking_for_more_questions_than_there_are():
    with pytest.raises(ValueError, match=r"asked for 2000 different test questions of 'sequence'"):
        sample("sequence", "digits", "test", 2000)


def test_prompts_and_exact_match():
    shot = Example("add", "digits", "dev", "12+3", "15", "12+3")
    asked = Example("add", "letters", "test", "bc+d", "bf", "12+3")
    assert few_shot_prompt([shot], asked) == "Q: 12+3\nA: 15\nQ: bc+d\nA:"
    assert few_shot_prompt([], asked) == asked.prompt
    assert is_correct(asked.completion, asked)
    assert is_correct(" bf\nQ: j+j\nA: bi", asked)  # what follows the answer line does not count
    for wrong in ("", "\nbf", " bff\n", " 15\n", " b f\n"):
        assert not is_correct(wrong, asked)
    assert to_dialect("X=10;X+=9", "letters") == "X=ba;X+=j"


def test_draw_keeps_to_its_split():
    rng = random.Random(1)
    assert {draw("time", "letters", "dev", rng).split for _ in range(20)} == {"dev"}


def test_wilson_interval():
    # Reference values: Wilson 1927 score interval, 95 %, 15 of 20.
    low, high = Score(15, 20).interval
    assert (round(low, 4), round(high, 4)) == (0.5313, 0.8881)
    assert Score(0, 50).interval[0] == 0.0
    assert Score(50, 50).interval[1] == pytest.approx(1.0)


# --- the shipped model ---


@pytest.fixture(scope="module")
def loaded():
    return load_pocket()


def test_folder_is_small_and_complete():
    sizes = {path.name: path.stat().st_size for path in POCKET_DIR.iterdir()}
    assert sum(sizes.values()) <= 10_000_000
    assert {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    } == set(sizes)


def test_loads_without_a_network():
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "from ttrouting.pocket import POCKET_DIR\n"
        "AutoModelForCausalLM.from_pretrained(POCKET_DIR)\n"
        "AutoTokenizer.from_pretrained(POCKET_DIR)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HTTPS_PROXY": "http://127.0.0.1:9"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_missing_weights_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(pocket, "POCKET_DIR", tmp_path)
    with pytest.raises(PocketWeightsMissing, match=r"model\.safetensors.*train_pocket\.py"):
        load_pocket()


def test_config_facts(loaded):
    model, tokenizer = loaded
    config = model.config
    assert config.model_type == "olmoe"
    assert config.num_hidden_layers >= 6
    assert config.num_experts >= 16
    assert config.num_experts_per_tok >= 2
    assert config.max_position_embeddings >= 512
    assert config.vocab_size == len(tokenizer)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert 3_500_000 < model.num_parameters() < 5_000_000


def test_weights_are_exact_in_bf16(loaded):
    model, _ = loaded
    for name, p in model.named_parameters():
        assert torch.equal(p, p.to(torch.bfloat16).float()), name


def test_tokenizer_round_trip(loaded):
    _, tokenizer = loaded
    text = "".join(e.prompt + e.completion for s, d in ALL_PAIRS for e in sample(s, d, "dev", 3))
    text += "  two  spaces, \n\n blank line and lowercase: aA jJ 9.\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert len(ids) == 1 + len(text)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.padding_side == "left"
    assert None not in (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)


@pytest.mark.parametrize(
    ("skill", "dialect"),
    [("add", "digits"), ("sort", "letters"), ("maximum", "letters"), ("reverse", "digits")],
)
def test_trained_skills_are_mastered(loaded, skill, dialect):
    # The card claims >= 0.95; 40 questions leave room for chance.
    assert exact_match(*loaded, skill, dialect, n=40, seed=11).accuracy >= 0.9


def test_six_shot_prompts_are_in_distribution(loaded):
    assert exact_match(*loaded, "sort", "digits", n=20, shots=6, seed=11).accuracy >= 0.85


def test_left_padding_does_not_change_answers(loaded):
    one_by_one = exact_match(*loaded, "units", "digits", n=8, seed=5, batch_size=1)
    assert one_by_one == exact_match(*loaded, "units", "digits", n=8, seed=5)


def test_no_expert_is_dead(loaded):
    texts = [e.prompt + e.completion for s, d in trained_pairs() for e in sample(s, d, "test", 6, 1)]
    load = expert_load(*loaded, texts)
    assert load.shape == (loaded[0].config.num_hidden_layers, loaded[0].config.num_experts)
    assert torch.allclose(load.sum(1), torch.ones(len(load)))
    assert load.min() > 0


def test_card_lists_command_and_accuracy_of_every_pair():
    card = (POCKET_DIR / "README.md").read_text(encoding="utf-8")
    assert "python demos/train_pocket.py --out ttrouting/pocket/weights" in card
    trained, shifted = card.split("### Shifted")
    for pairs, section in ((trained_pairs(), trained), (shifted_pairs(), shifted)):
        for skill, dialect in pairs:
            row = re.search(rf"^\| {skill} \| {dialect} \|.*$", section, re.MULTILINE)
            assert row, (skill, dialect)
            assert len(re.findall(r"[01]\.\d{3} \[", row[0])) == 2


def test_card_is_what_the_template_gives_for_its_numbers(loaded):
    # The card's prose and its template must not drift apart: fill the template with the card's figures.
    card = (POCKET_DIR / "README.md").read_text(encoding="utf-8")
    n, seed = map(int, re.search(r"n = (\d+) different questions a cell, seed\n(\d+);", card).groups())
    scores = {}
    for skill, dialect in ALL_PAIRS:
        row = re.search(rf"^\| {skill} \| {dialect} \|.*$", card, re.MULTILINE)[0]
        zero, six = (float(cell) for cell in re.findall(r"([01]\.\d{3}) \[", row))
        scores[skill, dialect, 0], scores[skill, dialect, 6] = Score(round(zero * n), n), Score(round(six * n), n)
    versions = dict(re.findall(r"(torch|transformers) (\d[\d.]*\d)", card))
    facts = FACTS | versions | {"n": n, "eval_seed": seed}
    loads = loads_by_pair(*loaded, ALL_PAIRS, n=32, seed=seed)
    given, made = (NUMBER.split(text) for text in (card, model_card(scores, loads, facts)))
    assert given == made
    # a rounding elsewhere may send a token elsewhere: the experts' shares need not agree to the last digit
    given, made = (list(map(float, NUMBER.findall(text))) for text in (card, model_card(scores, loads, facts)))
    assert given == pytest.approx(made, abs=0.011)


NUMBER = re.compile(r"(?<!\w)\d+(?:\.\d+)?")
# What the shipped run was, next to the figures that the test reads from the card.
FACTS = {
    "parameters": 3_973_248,
    "command": "python demos/train_pocket.py --out ttrouting/pocket/weights",
    "seed": 0,
    "steps": 4600,
    "batch": 4096,
    "tokens": 18.8416,
    "short": 64,
    "long": 320,
    "long_share": 0.35,
    "answer_weight": 10.0,
    "lr": 0.0025,
    "late": 2400,
    "horizon": 3600,
    "shots": 6,
}


def test_mutual_information():
    # by hand: two groups that share no expert tell one bit, equal groups none, half-and-half 0.311
    a, b, mixed = ([[1.0, 0.0]], [[0.0, 1.0]], [[0.5, 0.5]])
    assert mutual_information([torch.tensor(a), torch.tensor(b)]).item() == pytest.approx(1.0)
    assert mutual_information([torch.tensor(a), torch.tensor(a)]).item() == pytest.approx(0.0, abs=1e-6)
    assert mutual_information([torch.tensor(a), torch.tensor(mixed)]).item() == pytest.approx(0.3113, abs=1e-4)


def test_experts_specialise_by_skill(loaded):
    skills = loads_by_pair(*loaded, [pair for pair in trained_pairs() if pair[1] == "digits"], n=16, seed=3)
    same = loads_by_pair(*loaded, [("sort", "digits")], n=16, seed=4)
    told = mutual_information(list(skills.values()))
    chance = mutual_information([skills["sort", "digits"], same["sort", "digits"]])
    assert told.shape == (loaded[0].config.num_hidden_layers,)
    assert (told > 5 * chance).all()
