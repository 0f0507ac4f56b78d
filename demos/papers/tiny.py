"""A random model of a released one's architecture, and a few made-up records in the form of the benchmark sets.

They show that a paper's setting runs from end to end; what they score means nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 8192,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TRAIN, TEST = 12, 3  # records


def tiny_model(architecture: Mapping[str, Any]) -> tuple[Any, Any]:
    """`(model, tokenizer)` of a `model_type`; what else `architecture` says comes before `SIZES`."""
    tokenizer = bytes_tokenizer()
    settings = {**SIZES, "vocab_size": len(tokenizer), **architecture}
    torch.manual_seed(0)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    return AutoModelForCausalLM.from_config(config).eval(), tokenizer


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, so that it reads any text."""
    special = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def write_sets(folder: Path) -> None:
    """Made-up records where `--data-dir` looks for GSM8K, HumanEval, ARC-Challenge, OpenBookQA and SciQ."""
    sums = [{"question": f"What is {i} plus 2?", "answer": f"{i} + 2 = {i + 2}\n#### {i + 2}"} for i in range(TRAIN)]
    code = [
        {
            "task_id": f"made-up/{i}",
            "prompt": f'def add_{i}(x):\n    """Add {i} to x."""\n',
            "canonical_solution": f"    return x + {i}\n",
            "test": f"def check(candidate):\n    assert candidate(1) == {i + 1}\n",
            "entry_point": f"add_{i}",
        }
        for i in range(TEST)
    ]
    choices = [
        {"question": f"Which number follows {i}?", "choices": [str(i + k) for k in (3, 1, 4, 2)], "label": 1}
        for i in range(TRAIN)
    ]
    science = [
        {"question": one["question"], "correct_answer": str(i + 1)}
        | {f"distractor{k}": str(i + 1 + k) for k in (1, 2, 3)}
        for i, one in enumerate(choices, TRAIN)
    ]
    _write(folder / "gsm8k" / "train.jsonl", sums)
    _write(folder / "gsm8k" / "test.jsonl", sums[:TEST])
    _write(folder / "humaneval" / "test.jsonl", code)
    _write(folder / "arc_challenge" / "test.jsonl", choices[:TEST])
    _write(folder / "openbookqa" / "train.jsonl", choices)
    _write(folder / "sciq" / "train.jsonl", science)


def _write(file: Path, records: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
