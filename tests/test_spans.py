"""Which tokens count in a loss: patterns, assistant turns, the caller's own mask. Against loops over letters."""

import re

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

import ttrouting as ttr
from ttrouting.context import Context
from ttrouting.spans import check_loss_on, narrow_targets, token_starts

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi assistant, what is it?"},
    {"role": "assistant", "content": "A\nreply."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "More of it!"},
]


def context(tokenizer, *texts, explicit=False):
    """Left-padded, every real token but the first a target."""
    batch = tokenizer(list(texts), padding=True, return_tensors="pt")
    mask = batch["attention_mask"].bool()
    targets = mask.clone()
    targets[torch.arange(len(texts)), mask.long().argmax(1)] = False
    return Context(batch["input_ids"], mask, targets, explicit)


def by_hand(tokenizer, text, spans):
    """The targets of one text: with one token for a letter (or for a special word), walk along the text."""
    ids = tokenizer(text)["input_ids"]
    position, marks = 0, []
    for token in ids:
        word = tokenizer.convert_ids_to_tokens(token)
        marks.append(any(begin < position + len(word) and position < end for begin, end in spans))
        position += len(word)
    assert position == len(text)
    return [False, *marks[1:]]  # nothing predicts the first token


@pytest.mark.parametrize(
    ("pattern", "spans"),
    [
        ("A: .*", [(5, 10), (16, 21)]),
        ("A: (.*)", [(8, 10), (19, 21)]),
        ("4\\d", [(8, 10)]),
        ("Q", [(11, 12)]),  # the Q at the start is the first token, which nothing predicts
        ("nothing", []),
        ("", None),
    ],
)
def test_patterns_and_groups(tokenizer, pattern, spans):
    text = "Q: 9\nA: 41\nQ: 1\nA: 7!\n"
    assert [m.start() for m in re.finditer("A", text)] == [5, 16]
    if spans is None:
        with pytest.raises(ttr.ConfigError):
            check_loss_on(pattern)
        return
    found = narrow_targets(context(tokenizer, text), pattern, tokenizer)
    assert found[0].tolist() == by_hand(tokenizer, text, spans)


def test_padding_and_neighbours_do_not_matter(tokenizer):
    texts = ["x A: 12", "A: 3", "a longer one without any", "A: 45 and A: 6"]
    found = narrow_targets(context(tokenizer, *texts), r"A: \d+", tokenizer)
    for row, text in zip(found, texts, strict=True):
        spans = [m.span() for m in re.finditer(r"A: \d+", text)]
        assert row.tolist() == [False] * (len(row) - len(text)) + by_hand(tokenizer, text, spans)
    assert not found[2].any()


def test_all_and_the_callers_own_mask_are_left_as_they_are(tokenizer):
    given = context(tokenizer, "Q: 1\nA: 2", explicit=True)
    given.targets[0, 5:] = False
    for loss_on in ("all", "A: .*", "assistant"):
        assert torch.equal(narrow_targets(given, loss_on, tokenizer), given.targets)
    free = context(tokenizer, "Q: 1\nA: 2")
    assert torch.equal(narrow_targets(free, "all", None), free.targets)


# --- assistant turns -----------------------------------------------------------------------------------


def reply_spans(text, replies):
    """Where the replies stand, found one after the other."""
    spans, start = [], 0
    for reply in replies:
        start = text.index(reply, start)
        spans.append((start, start + len(reply)))
        start += len(reply)
    return spans


@pytest.mark.parametrize("ending", ["finished", "asked", "cut", "tool", "one"])
def test_assistant_turns(tokenizer, ending):
    """However a chat ends: after a reply, before one, in the middle of one, or with a tool that speaks in between."""
    chat, replies = list(CHAT), ["A\nreply.", "More of it!"]
    if ending == "tool":
        chat[3] = {"role": "tool", "content": "And?"}
    if ending == "one":
        chat, replies = chat[:3], replies[:1]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=ending == "asked")
    if ending == "cut":
        text = text[: text.index(" it!")]
        replies[1] = "More of"
    found = narrow_targets(context(tokenizer, text), "assistant", tokenizer)
    assert found[0].tolist() == by_hand(tokenizer, text, reply_spans(text, replies))


@pytest.mark.parametrize(
    "template",
    [
        # plain words between turns, and the next turn is all that ends a reply
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
        # Llama 2: no roles, brackets around the user
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}</s>{% else %}"
        "<s>[INST] {{ m.content }} [/INST] {% endif %}{% endfor %}",
    ],
)
def test_other_templates(tokenizer, template, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    text = tokenizer.apply_chat_template(CHAT[1:4], tokenize=False)
    found = narrow_targets(context(tokenizer, text), "assistant", tokenizer)
    assert found[0].tolist() == by_hand(tokenizer, text, reply_spans(text, ["A\nreply."]))


@pytest.mark.parametrize(
    "template", [None, "{% for m in messages %}{{ m.content }}{% endfor %}", "{{ messages[0].content }} and so on"]
)
def test_templates_that_do_not_tell_turns_apart_are_refused(olmoe, tokenizer, untouched, monkeypatch, template):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with untouched(olmoe), pytest.raises(ttr.ConfigError, match="pattern"):
        ttr.adapt(olmoe, ttr.Rerouting(loss_on="assistant"), tokenizer=tokenizer)


@pytest.mark.parametrize("loss_on", ["A: (", "", None, 3])
def test_bad_patterns_are_refused(loss_on):
    with pytest.raises(ttr.ConfigError, match="loss_on"):
        ttr.Rerouting(loss_on=loss_on)


# --- tokens of more than one letter ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def bytes_tokenizer():
    """Byte-level BPE with a few merges: tokens of several letters, and letters of several tokens."""
    letters = sorted(ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("A", ":")]
    words = [*letters, *(a + b for a, b in merges)]
    inner = Tokenizer(BPE({word: i for i, word in enumerate(words)}, merges))
    inner.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.mark.parametrize("text", ["the other theA: the A:x", "the 'quote' , and  spaces .", "naïve the café"])
def test_offsets_are_those_of_the_pieces(bytes_tokenizer, text):
    ids = bytes_tokenizer(text)["input_ids"]
    found, starts = token_starts(ids, bytes_tokenizer)
    assert found == text
    # by hand: the bytes of each token, and how many whole letters stand before it
    table = {letter: byte for byte, letter in zip(_byte_order(), sorted_alphabet(), strict=True)}
    raw = b""
    for token, start in zip(ids, starts, strict=True):
        before = len(raw.decode(errors="ignore"))
        assert start == before
        raw += bytes(table[c] for c in bytes_tokenizer.convert_ids_to_tokens(token))
    assert raw.decode() == text


def sorted_alphabet():
    """The letters that byte-level tokenizers write for the bytes 0..255 (GPT-2's table)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in shown]
    return [chr(b) for b in shown] + [chr(256 + i) for i in range(len(rest))]


def _byte_order():
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [*shown, *(b for b in range(256) if b not in shown)]


def test_text_that_was_split_in_another_way(bytes_tokenizer):
    """Generated tokens need not be the ones that the tokenizer would choose for the same text."""
    pieces = ["t", "h", "e", "Ġ", "th", "e", "A", ":", "t"]
    ids = bytes_tokenizer.convert_tokens_to_ids(pieces)
    text, starts = token_starts(ids, bytes_tokenizer)
    assert text == "the theA:t"
    assert bytes_tokenizer(text)["input_ids"] != ids
    assert starts == [0, 1, 2, 3, 4, 6, 7, 8, 9]


def test_a_token_that_is_half_inside_a_match_counts(bytes_tokenizer):
    ids = torch.tensor([bytes_tokenizer("x the y")["input_ids"]])
    every = torch.ones_like(ids, dtype=torch.bool)
    pieces = bytes_tokenizer.convert_ids_to_tokens(ids[0])
    assert pieces == ["x", "Ġthe", "Ġ", "y"]
    found = narrow_targets(Context(ids, every, every), "he", bytes_tokenizer)
    assert found[0].tolist() == [False, True, False, False]


# --- in a call -------------------------------------------------------------------------------------------


def test_an_adaptation_learns_from_what_is_named_and_a_mask_wins(olmoe64, tokenizer):
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    batch = tokenizer([text, text[40:]], padding=True, return_tensors="pt")
    replies = len("A\nreply.") + len("More of it!")
    call = {**batch, "max_new_tokens": 1, "do_sample": False}

    def learned(loss_on, **more):
        strategy = ttr.Rerouting(loss_on=loss_on, layers="all", interval=None)
        with ttr.adapt(olmoe64, strategy, no_harm=False, tokenizer=tokenizer) as adapted:
            adapted.generate(**call, **more)
            counts = [s.strategies["rerouting"]["loss_tokens"] for s in adapted.report.sequences]
            return counts, adapted.state.tensors["rerouting"]["delta"]

    counts, by_name = learned("assistant")
    assert counts == [replies, replies]
    mask = torch.zeros_like(batch["input_ids"])
    for row, own in enumerate((text, text[40:])):
        for begin, end in reply_spans(own, ["A\nreply.", "More of it!"]):
            ids = tokenizer(own)["input_ids"]
            first, last = len(tokenizer(own[:begin])["input_ids"]), len(tokenizer(own[:end])["input_ids"])
            mask[row, mask.shape[1] - len(ids) + first : mask.shape[1] - len(ids) + last] = 1
    for loss_on in ("all", "assistant", "Hi"):  # whatever is named, the mask wins
        counts, by_mask = learned(loss_on, loss_mask=mask)
        assert counts == [replies, replies]
        assert torch.equal(by_mask, by_name)
    counts, by_all = learned("all")
    assert counts == [len(tokenizer(t)["input_ids"]) - 1 for t in (text, text[40:])]
    assert not torch.allclose(by_all, by_name, atol=1e-3)


def test_generated_tokens_count_as_what_they_are(olmoe64, tokenizer):
    """At an interval the pattern is looked for in the longer text, not in the prompt alone."""
    text = "Q: one and one and one and one\nA: "
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    strategy = ttr.Rerouting(loss_on="A: (.*)", interval=4, lr=1e-9)
    with ttr.adapt(olmoe64, strategy, no_harm=False, tokenizer=tokenizer) as adapted:
        out = adapted.generate(ids, max_new_tokens=10, do_sample=False)
        phases = adapted.report.sequences[0].strategies["rerouting"]["adaptations"]
    found = []
    for new in (0, 4, 8):
        whole = tokenizer.decode(out[0, : ids.shape[1] + new])
        matches = [m.group(1) for m in re.finditer("A: (.*)", whole)]
        found.append(sum(len(tokenizer(m)["input_ids"]) for m in matches))
    assert [phase["loss_tokens"] for phase in phases] == found
    assert found[0] == 0
    assert found[1] > 0
