"""Wrap `model.generate`: the same arguments and the same results, with routing adapted to each prompt.

    python demos/wrap_generate.py

Eight questions in a spelling that the pocket model never met with this skill, each after six solved examples. The
router logits are optimised on those examples, for each row of the batch by itself; afterwards the model is as before.
"""

from __future__ import annotations

from typing import Any

import ttrouting as ttr
from ttrouting.pocket.skills import Example, few_shot_prompt, parse_answer, sample

QUESTIONS, SHOTS = 8, 6
# the solved answers and their line ends are what is to be learned
STRATEGY = ttr.Rerouting(steps=10, lr=0.1, layers="all", loss_on=r"A:(.*\n)")


def questions() -> tuple[list[Example], list[str]]:
    """Test questions, and the prompts that ask them."""
    asked = sample("reverse", "letters", "test", QUESTIONS)
    solved = sample("reverse", "letters", "dev", QUESTIONS * SHOTS)
    return asked, [few_shot_prompt(solved[i * SHOTS : (i + 1) * SHOTS], one) for i, one in enumerate(asked)]


def answers(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Greedy answers in one batch. Nothing in here knows whether the model is adapted."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [parse_answer(text) for text in texts]


def main() -> None:
    model, tokenizer = ttr.load_pocket()  # or any MoE that transformers loads
    asked, prompts = questions()
    base = answers(model, tokenizer, prompts)
    with ttr.adapt(model, STRATEGY, tokenizer=tokenizer) as adapted:
        rerouted = answers(adapted, tokenizer, prompts)
        print(adapted.report)
    print(f"\n{'question':20}  {'answer':10}  {'base':10}  rerouted")
    for question, before, after in zip(asked, base, rerouted, strict=True):
        print(f"{question.question:20}  {question.answer:10}  {before:10}  {after}")
    for name, found in (("base", base), ("rerouted", rerouted)):
        right = sum(text == question.answer for text, question in zip(found, asked, strict=True))
        print(f"{name}: {right} of {QUESTIONS} right")
    print("as before, once it is closed:", answers(model, tokenizer, prompts) == base)


if __name__ == "__main__":
    main()
