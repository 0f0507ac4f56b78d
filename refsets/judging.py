"""Which questions does the model answer correctly, and how was it routed at them?

Legend: `n` questions, `L` MoE layers, `E` experts, `H` hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ttrouting.generation import find_endings
from ttrouting.pathways import Reading, encode, read_answers
from ttrouting.refsets.recipe import Question, Recipe
from ttrouting.sites import text_config
from ttrouting.target import Target

# whatever a model's own settings bring: generate warns of numbers for sampling when it is greedy
GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@dataclass(frozen=True)
class Asked:
    """A question in token ids.

    Attributes:
        prompt: of the prompt. answers: of each choice, or of the answer alone. right: which of them is the answer.
    """

    question: Question
    prompt: list[int]
    answers: list[list[int]]
    right: int


@dataclass(frozen=True)
class Judged:
    """What the model made of some questions.

    Attributes:
        correct: `[n]` bool. omega: `[n, L, E]` fp32, scores before bias at the last prompt token.
        pooled: `[n, H]` fp32, mean hidden state of the prompt.
    """

    correct: NDArray[np.bool_]
    omega: NDArray[np.float32]
    pooled: NDArray[np.float32]


class Judge:
    """Judges batches of questions as a recipe says, under the model's own routing.

    Args:
        target: the model. tokenizer: its tokenizer. batch_size: texts in one forward at most.
    """

    def __init__(self, target: Target, tokenizer: Any, recipe: Recipe, batch_size: int) -> None:
        self._target = target
        self._tokenizer = tokenizer
        self._recipe = recipe
        self._batch_size = batch_size
        self._limit = getattr(text_config(target.model.config), "max_position_embeddings", None)
        self._endings = set(find_endings(target.model, {}).eos)

    def encode(self, questions: Sequence[Question]) -> list[Asked]:
        """Questions in token ids."""
        texts = [q.choices or (q.answer,) for q in questions]
        prompts = [q.prompt for q, answers in zip(questions, texts, strict=True) for _ in answers]
        ids, continued = encode(self._tokenizer, prompts, [a for answers in texts for a in answers])
        found, begin = [], 0
        for question, answers in zip(questions, texts, strict=True):
            end = begin + len(answers)
            right = answers.index(question.answer)
            found.append(Asked(question, ids[begin], continued[begin:end], right))
            begin = end
        return found

    def fits(self, asked: Asked) -> bool:
        """Whether the model's context holds the prompt and what comes after it."""
        new = max(map(len, asked.answers))
        if self._recipe.judge == "regex":
            new = max(new, self._recipe.max_new_tokens)
        return self._limit is None or len(asked.prompt) + new <= self._limit

    def __call__(self, asked: Sequence[Asked]) -> Judged:
        """Judge a batch; at least one question, each with at least one token in its prompt and its answers."""
        pairs = [(a.prompt, answer) for a in asked for answer in a.answers]
        readings = [
            read_answers(self._target, *zip(*pairs[start : start + self._batch_size], strict=True))
            for start in range(0, len(pairs), self._batch_size)
        ]
        # [n] row of each question's first choice; what is read at the prompt is the same in all of its rows
        first = np.cumsum([0] + [len(a.answers) for a in asked[:-1]])
        if self._recipe.judge == "choice":
            correct = self._best_choice(asked, _joined(readings, "log_likelihood"), first)
        elif self._recipe.judge == "regex":
            correct = self._matches(asked)
        else:
            # generate stops at the first end of a text: an answer with one inside is never written
            whole = [self._endings.isdisjoint(a.answers[a.right][:-1]) for a in asked]
            correct = _joined(readings, "greedy")[first] & np.array(whole)
        return Judged(correct, _joined(readings, "omega")[first], _joined(readings, "pooled")[first])

    def _best_choice(
        self, asked: Sequence[Asked], likelihood: NDArray[Any], first: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Whether the right choice has the highest score; of equal ones the first counts."""
        right = []
        for question, begin in zip(asked, first, strict=True):
            scores = likelihood[begin : begin + len(question.answers)]
            if self._recipe.choice_score == "per_byte":
                scores = scores / np.maximum(question.question.sizes, 1)
            right.append(int(scores.argmax()) == question.right)
        return np.array(right)

    @torch.no_grad()
    def _matches(self, asked: Sequence[Asked]) -> NDArray[np.bool_]:
        model, tokenizer = self._target.model, self._tokenizer
        device = model.get_input_embeddings().weight.device
        longest = max(len(a.prompt) for a in asked)
        padded = [[0] * (longest - len(a.prompt)) + a.prompt for a in asked]
        real = [[0] * (longest - len(a.prompt)) + [1] * len(a.prompt) for a in asked]
        home = "cpu" if device.type == "meta" else device
        pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        ids = model.generate(
            input_ids=torch.tensor(padded, device=home),
            attention_mask=torch.tensor(real, device=home),
            max_new_tokens=self._recipe.max_new_tokens,
            pad_token_id=pad,
            **GREEDY,
        )
        completions = tokenizer.batch_decode(ids[:, longest:], skip_special_tokens=True)
        return np.array(
            [
                same_match(str(self._recipe.pattern), completion, a.question.answer)
                for completion, a in zip(completions, asked, strict=True)
            ]
        )


def same_match(pattern: str, completion: str, answer: str) -> bool:
    """Whether `pattern` finds the same in both; an answer in which it finds nothing counts as a whole, stripped."""
    found, wanted = _first_match(pattern, completion), _first_match(pattern, answer)
    return found is not None and found == (answer.strip() if wanted is None else wanted)


def _first_match(pattern: str, text: str) -> str | None:
    """The first group of the first match, the match where there is no group."""
    match = re.search(pattern, text)
    return None if match is None else match[1 if match.re.groups else 0]


def _joined(readings: Sequence[Reading], name: str) -> NDArray[Any]:
    return torch.cat([getattr(reading, name).cpu() for reading in readings]).numpy()
