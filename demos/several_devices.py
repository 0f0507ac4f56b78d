"""Spread a model over devices with accelerate, and adapt it as if it were in one place.

    python demos/several_devices.py

With several GPUs layers are shared out among them; with one or none the rest of them is on the CPU and on disk, and
brought where it is computed for each forward. Answers and what was learned are those of a model in one place.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import ttrouting as ttr
from ttrouting.pocket import POCKET_DIR
from ttrouting.pocket.skills import few_shot_prompt, sample

STRATEGIES = [ttr.Rerouting(steps=4, lr=0.1, layers="all", loss_on=r"A:(.*\n)"), ttr.DynamicK(p=0.7)]


def device_map(layers: int) -> dict[str, int | str]:
    """For each module where its weights rest; `device_map="auto"` would fill one device after another."""
    gpus: list[int | str] = list(range(torch.cuda.device_count()))
    places = gpus if len(gpus) > 1 else [*gpus, "cpu", "disk"]
    ends = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), places[0])
    return ends | {f"model.layers.{i}": places[i * len(places) // layers] for i in range(layers)}


def answer(model: Any, tokenizer: Any, prompts: list[str]) -> tuple[list[str], torch.Tensor]:
    """Greedy answers, and the deltas `[sequences, layers, experts]` that were learned on the way."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(model.get_input_embeddings().weight.device)
    with ttr.adapt(model, STRATEGIES, tokenizer=tokenizer) as adapted:
        out = adapted.generate(**inputs, max_new_tokens=12, do_sample=False)
        delta = adapted.state.tensors["rerouting"]["delta"].cpu()
    return tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True), delta


def main() -> None:
    whole, tokenizer = ttr.load_pocket()
    solved, asked = sample("reverse", "letters", "dev", 6), sample("reverse", "letters", "test", 4)
    prompts = [few_shot_prompt(solved, question) for question in asked]
    texts, delta = answer(whole, tokenizer, prompts)
    places = device_map(whole.config.num_hidden_layers)
    with tempfile.TemporaryDirectory() as folder:
        spread = AutoModelForCausalLM.from_pretrained(
            POCKET_DIR, dtype=torch.float32, device_map=places, offload_folder=folder
        )
        found, learned = answer(spread.eval(), tokenizer, prompts)
    print("modules by place:", dict(Counter(map(str, places.values()))))
    print("answers:", [text.strip() for text in found])
    print("the same answers as in one place:", found == texts)
    print(f"largest difference of what was learned: {float((learned - delta).abs().max()):.1g}")


if __name__ == "__main__":
    main()
