"""C3PO on data of your own: a JSONL file becomes a reference set of this model, and new questions learn from it.

    python demos/c3po_own_data.py

The file here holds solved questions in a spelling that the pocket model never met with this skill. Each is asked;
with `keep="all"` those that the model answers wrongly are kept too, since their answers are known. A new question is
then routed by what lowers the loss of its nearest neighbours' answers.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import ttrouting as ttr
from ttrouting import refsets
from ttrouting.pocket.skills import is_correct, sample

SKILL, DIALECT = "reverse", "letters"
PROMPT, ANSWER = "Q: {question}\nA: ", "{answer}\n"  # templates over the records' fields
# one delta for prompt and answer; `ttr.C3PO.preset("paper", refset=...)` changes the last prompt token alone
OPTIONS = {"scope": "all", "layers": "all", "core_experts": 1.0, "k": 4, "use": "all"}


def write_records(file: Path, n: int = 48) -> None:
    """One JSON object a line: replace it by your own questions and answers."""
    records = [{"question": e.question, "answer": e.answer} for e in sample(SKILL, DIALECT, "reference", n)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def build(model: Any, tokenizer: Any, file: Path, out: Path) -> ttr.ReferenceSet:
    """Ask the model every record; a build that was stopped goes on when it is asked for again."""
    return refsets.build(model, tokenizer, file, out, prompt=PROMPT, answer=ANSWER, keep="all")


def answers(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Greedy answers, in one batch."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    model, tokenizer = ttr.load_pocket()
    questions = sample(SKILL, DIALECT, "test", 12)
    prompts = [PROMPT.format(question=question.question) for question in questions]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "mine.jsonl"
        write_records(file)
        refset = build(model, tokenizer, file, Path(folder) / "mine")
        counts = refset.manifest["counts"]
        print(f"reference set: {counts['records']} records, {counts['correct']} that the model answers itself")
        found = {"base": answers(model, tokenizer, prompts)}
        with ttr.adapt(model, ttr.C3PO(refset=refset, **OPTIONS), tokenizer=tokenizer) as adapted:
            found["c3po"] = answers(adapted, tokenizer, prompts)
            print(adapted.report)
    for name, texts in found.items():
        right = sum(is_correct(text, question) for text, question in zip(texts, questions, strict=True))
        print(f"{name}: {right} of {len(questions)} right")


if __name__ == "__main__":
    main()
