"""Reading texts with their answers: what is kept of a forward, against plain forwards of one text at a time."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import ttrouting as ttr
from families.build import build
from oracles.plain_router import full_logits, plain_routing
from ttrouting.errors import UnsupportedModelError
from ttrouting.pathways import answered_context, encode, read_answers, read_prompts, recording
from ttrouting.plan import Plan
from ttrouting.session import Session
from ttrouting.sites import find_sites
from ttrouting.target import Target

PROMPTS = [[5, 6, 7, 8, 9], [11, 12], [20], [30, 31, 32, 33, 34, 35, 36]]
ANSWERS = [[40, 41], [42, 43, 44, 45], [46], [47, 48, 49]]


def target_of(model):
    return Target(model, find_sites(model))


# --- layout -----------------------------------------------------------------------------------------------


def test_prompts_and_answers_stand_at_the_end_of_their_rows():
    context, at = answered_context(PROMPTS, ANSWERS, 7, torch.device("cpu"))
    assert context.ids.shape == (4, 10)
    assert context.explicit
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        whole = prompt + answer
        assert context.ids[row].tolist() == [7] * (10 - len(whole)) + whole
        assert context.mask[row].tolist() == [False] * (10 - len(whole)) + [True] * len(whole)
        assert context.targets[row].tolist() == [False] * (10 - len(answer)) + [True] * len(answer)
        assert int(at[row]) == len(prompt) - 1


# --- tokens -----------------------------------------------------------------------------------------------


def spoken(template=None, merges=()):
    """A tokenizer of single letters, with merges and with special tokens around a text."""
    words = ["<s>", "</s>", "#", *"abcdef :"]
    vocabulary = {word: i for i, word in enumerate([*words, *("".join(m) for m in merges)])}
    made = Tokenizer(BPE(vocabulary, list(merges), unk_token="#"))
    made.add_special_tokens(["<s>", "</s>"])
    if template:
        made.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "answer", "expected"),
    [
        # as the whole text is tokenized, wherever that only goes on from the prompt
        (spoken(), "ab:", " c", (["a", "b", ":"], [" ", "c"])),
        (spoken("<s> $A"), "ab:", " c", (["<s>", "a", "b", ":"], [" ", "c"])),
        # a chat template writes the first token itself
        (spoken("<s> $A"), "<s>ab:", "c", (["<s>", "a", "b", ":"], ["c"])),
        (spoken(merges=[("c", "d")]), "ab:", "cd", (["a", "b", ":"], ["cd"])),
        # the answer grows together with the prompt: then it is tokenized by itself
        (spoken(merges=[("b", "c")]), "ab", "cd", (["a", "b"], ["c", "d"])),
        # an end-of-text token is put behind every text
        (spoken("<s> $A </s>"), "ab:", "c", (["<s>", "a", "b", ":", "</s>"], ["c"])),
    ],
    ids=["plain", "bos", "chat", "merge inside", "merge across", "eos"],
)
def test_tokens_of_a_prompt_and_of_what_goes_on_from_it(tokenizer, prompt, answer, expected):
    (ids,), (more,) = encode(tokenizer, [prompt], [answer])
    assert (tokenizer.convert_ids_to_tokens(ids), tokenizer.convert_ids_to_tokens(more)) == expected


# --- readings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "deepseek_v3"])
@torch.no_grad()
def test_a_batch_of_answers_equals_plain_forwards_of_each(family):
    model = build(family)
    reading = read_answers(target_of(model), PROMPTS, ANSWERS)
    omega, pooled = read_prompts(target_of(model), PROMPTS)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        ids = torch.tensor([prompt + answer])
        with plain_routing(model) as seen:
            logits = full_logits(model, ids)[0]
        hidden = model.model(torch.tensor([prompt])).last_hidden_state[0]
        scores = torch.stack([layer[len(prompt) - 1] for _, layer in seen])
        log_p = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        torch.testing.assert_close(reading.omega[row], scores, atol=2e-5, rtol=0)
        torch.testing.assert_close(omega[row], scores, atol=2e-5, rtol=0)
        torch.testing.assert_close(reading.pooled[row], hidden.mean(0), atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(pooled[row], hidden.mean(0), atol=2e-5, rtol=1e-4)
        expected = float(log_p[range(len(answer)), answer].sum())
        assert float(reading.log_likelihood[row]) == pytest.approx(expected, abs=1e-3)
        assert bool(reading.greedy[row]) == (log_p.argmax(-1).tolist() == answer)


@torch.no_grad()
def test_greedy_is_what_greedy_decoding_writes():
    model = build("olmoe")
    model.generation_config.eos_token_id = None
    written = [
        model.generate(torch.tensor([p]), max_new_tokens=3, do_sample=False)[0, len(p) :].tolist() for p in PROMPTS
    ]
    changed = [[*answer[:2], (answer[2] + 1) % 96] for answer in written]
    assert read_answers(target_of(model), PROMPTS, written).greedy.all()
    assert not read_answers(target_of(model), PROMPTS, changed).greedy.any()
    mixed = [written[0], changed[1][:2], changed[2], written[3][:1]]  # of other lengths, too
    assert read_answers(target_of(model), PROMPTS, mixed).greedy.tolist() == [True, True, False, True]


def test_layers_with_fewer_experts_end_in_zeros():
    """Only LongCat's routers choose among more than they have; here one layer is cut down by hand."""
    from ttrouting.pathways import PathwayRecorder

    recorder = PathwayRecorder(torch.zeros(2, dtype=torch.int64))
    recorder.scores = {1: torch.ones(2, 3), 0: torch.full((2, 5), 2.0)}
    assert recorder.omega().tolist() == [[[2.0] * 5, [1.0, 1.0, 1.0, 0.0, 0.0]]] * 2
    with pytest.raises(UnsupportedModelError, match="cannot embed texts"):
        recorder.pooled()


@torch.no_grad()
def test_a_text_in_parts_gives_what_it_gives_whole_and_padding_nothing(prompts, untouched):
    """As `generate` reads a prompt in chunks, or a cache with its last token apart; NaN at padding stays there."""
    model = build("olmoe", dtype=torch.float64)
    model.set_experts_implementation("eager")
    ids = prompts(12, 7)
    mask = ids != 0
    at = mask.sum(1) - 1

    def poison(_module, _args, output):
        output.last_hidden_state = output.last_hidden_state.clone()
        valid = (
            mask[:, : output.last_hidden_state.shape[1]] if output.last_hidden_state.shape[1] > 1 else mask[:, -1:]
        )
        output.last_hidden_state[~valid] = float("nan")
        return output

    with untouched(model):
        found = []
        for parts in ((12,), (5, 4, 3), (11, 1)):
            session = Session(Plan(target_of(model), (), None), mask, torch.zeros(2, dtype=torch.int64))
            hook = model.model.register_forward_hook(poison) if parts == (12,) else None
            with session.installed(), recording(session, at) as recorder:
                cache, begin = None, 0
                for length in parts:
                    end = begin + length
                    cache = model(
                        input_ids=ids[:, begin:end],
                        attention_mask=mask[:, :end].long(),
                        position_ids=(mask.long().cumsum(1) - 1).clamp_min(0)[:, begin:end],
                        past_key_values=cache,
                        use_cache=True,
                    ).past_key_values
                    begin = end
            if hook:
                hook.remove()
            found.append((recorder.omega(), recorder.pooled()))
    for row, length in enumerate((12, 7)):
        alone = ids[row, -length:][None]
        with plain_routing(model) as seen:
            hidden = model.model(alone).last_hidden_state[0]
        scores = torch.stack([layer[-1] for _, layer in seen])
        for omega, pooled in found:
            torch.testing.assert_close(omega[row].double(), scores, atol=1e-6, rtol=0)
            torch.testing.assert_close(pooled[row].double(), hidden.mean(0), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_only_tokens_up_to_the_given_one_count(prompts, olmoe64):
    """Of a prompt with its answer the mean is the prompt's, and the scores are those of its last token."""
    ids = prompts(12, 9)
    mask = ids != 0
    at = torch.tensor([6, 2])
    session = Session(Plan(target_of(olmoe64), (), None), mask, torch.zeros(2, dtype=torch.int64))
    with session.installed(), recording(session, at) as recorder:
        positions = (mask.long().cumsum(1) - 1).clamp_min(0)
        olmoe64(input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=False)
    for row, (start, last) in enumerate(((0, 6), (3, 2))):
        prompt = ids[row, start : start + last + 1][None]
        with plain_routing(olmoe64) as seen:
            hidden = olmoe64.model(prompt).last_hidden_state[0]
        torch.testing.assert_close(recorder.pooled()[row].double(), hidden.mean(0), atol=1e-6, rtol=1e-5)
        scores = torch.stack([layer[-1] for _, layer in seen])
        torch.testing.assert_close(recorder.omega()[row].double(), scores, atol=1e-6, rtol=0)


@torch.no_grad()
def test_under_a_decoding_strategy_only_the_models_own_rows_are_recorded(olmoe64, prompts):
    """SCMoE's second rows have other hidden states and the same positions."""
    ids = prompts(12, 9)
    mask = ids != 0
    found = []
    for strategies in ([], [ttr.SCMoE(beta=0.9)]):
        with ttr.adapt(olmoe64, strategies) as adapted:
            plan = adapted._plan
            session = Session(plan, mask, torch.zeros(2, dtype=torch.int64))
            with session.installed(), recording(session, mask.sum(1) - 1) as recorder:
                positions = (mask.long().cumsum(1) - 1).clamp_min(0)
                olmoe64(input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=False)
            found.append((recorder.omega(), recorder.pooled()))
    for mine, plain in zip(*reversed(found), strict=True):
        torch.testing.assert_close(mine, plain, atol=1e-6, rtol=1e-6)
