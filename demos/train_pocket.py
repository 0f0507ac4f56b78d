"""How was the pocket model trained? This script is the whole answer.

    python demos/train_pocket.py --out ttrouting/pocket/weights

It generates the text (`ttrouting.pocket.skills`), trains a small OLMoE from scratch, rounds it to
bf16, measures the rounded weights on held-out questions and writes model, tokenizer and model
card to `--out`. About an hour on two CPU cores; `--device cuda` works too. Batches depend on
`--seed` and the step alone, so with `--checkpoint` a run that was killed goes on where it was.

Shapes: B rows, T tokens, L layers, E experts, K experts per token, V vocabulary.
"""

import argparse
import math
import random
import sys
import time
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from ttrouting.pocket.card import model_card, overall
from ttrouting.pocket.measure import Pair, Score, exact_match, loads_by_pair
from ttrouting.pocket.skills import DIALECTS, SKILLS, Example, draw, shifted_pairs, trained_pairs

SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))  # printable ASCII
ANSWER_WEIGHT = 10.0  # an answer token weighs ten question tokens: questions are random
SHORT, LONG = 64, 320  # tokens in a row: one or two examples; a context with about ten
TOKENS_PER_STEP = 4096
LONG_SHARE = 0.35  # of the steps
LATE = 2400  # from this step on skills are drawn by their late weight
EARLY_HORIZON = 3600  # the cosine's end before LATE; at LATE the rate rises to the full run's cosine
STEPS, LR = 4600, 2.5e-3
EVAL_SEED, SHOTS = 1234, 6


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, `<bos>` in front, left padding."""
    vocabulary = {token: i for i, token in enumerate((*SPECIALS, *CHARACTERS))}
    core = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> OlmoeForCausalLM:
    """A fresh OLMoE of about four million parameters. `generate` stops at the end of the line."""
    config = OlmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_experts=16,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        router_aux_loss_coef=0.01,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(seed)
    model = OlmoeForCausalLM(config)
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("\n")],
    )
    return model


class Text:
    """Batches of packed training text: token ids and the weight of each as a target."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.ids = tokenizer.get_vocab()
        self.seed = seed
        self.pairs = trained_pairs()
        self.weights = [SKILLS[skill].weight for skill, _ in self.pairs]
        self.late_weights = [SKILLS[skill].late_weight for skill, _ in self.pairs]

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`(ids, weights)`, both `[B, T]`; the same for the same seed and step."""
        rng = random.Random(f"{self.seed}|{step}")
        length = LONG if rng.random() < LONG_SHARE else SHORT
        weights_now = self.weights if step < LATE else self.late_weights
        rows = [self._row(length, rng, weights_now) for _ in range(TOKENS_PER_STEP // length)]
        ids, weights = zip(*rows, strict=True)
        return torch.tensor(ids), torch.tensor(weights)

    def _row(self, length: int, rng: random.Random, share: list[float]) -> tuple[list[int], list[float]]:
        """Examples one after the other until the row is full: zero-shot first, then few-shot.

        Three quarters of the rows keep to one skill and dialect, the others change freely. One
        row in five has no `<bos>`, so that callers who add none find a trained model too. Short
        rows may end their document, and start another one, after any example.
        """
        one_skill = rng.random() < 0.75
        skill, dialect = rng.choices(self.pairs, share)[0]
        ids, weights = ([], []) if rng.random() < 0.2 else ([self.ids["<bos>"]], [0.0])
        while len(ids) < length:
            if not one_skill:
                skill, dialect = rng.choices(self.pairs, share)[0]
            self._append(draw(skill, dialect, "train", rng), ids, weights)
            if length == SHORT and rng.random() < 0.2:
                ids += [self.ids["<eos>"], self.ids["<bos>"]]
                weights += [1.0, 0.0]
        return ids[:length], weights[:length]

    def _append(self, example: Example, ids: list[int], weights: list[float]) -> None:
        ids += [self.ids[c] for c in example.prompt + example.completion]
        weights += [1.0] * len(example.prompt) + [ANSWER_WEIGHT] * len(example.completion)


def balance_loss(router_logits: tuple[torch.Tensor, ...], k: int) -> torch.Tensor:
    """Load balancing, per layer: `E * sum_e f_e P_e`, at best K; mean over the layers.

    transformers' own loss pools the layers, which lets an expert die in one layer unseen.
    """
    losses = []
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)  # [B*T, E]
        chosen = probabilities.topk(k, dim=-1).indices
        share = F.one_hot(chosen, logits.shape[-1]).sum(1).float().mean(0)  # [E], sums to K
        losses.append(logits.shape[-1] * (share * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


def step_loss(model: OlmoeForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`(loss to minimise, weighted cross-entropy)` of one batch, in nats per token."""
    out = model(input_ids=ids, output_router_logits=True, use_cache=False)
    logits, targets, w = out.logits[:, :-1], ids[:, 1:], weights[:, 1:]
    entropy = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    entropy = (entropy * w.flatten()).sum() / w.sum()
    balance = balance_loss(out.router_logits, model.config.num_experts_per_tok)
    return entropy + model.config.router_aux_loss_coef * balance, entropy


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 100 steps, then a cosine down to one twentieth of the peak.

    Before LATE the cosine aims at EARLY_HORIZON, from LATE on at `steps`: a small warm restart, as
    the shipped weights had it.
    """
    horizon = EARLY_HORIZON if step < LATE else steps
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / horizon)))
    return peak * min(1.0, (step + 1) / 100) * (0.05 + 0.95 * cosine)


def train(model: OlmoeForCausalLM, text: Text, args: argparse.Namespace) -> None:
    """Train in place for `args.steps` steps, saving to and resuming from `args.checkpoint`."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)
    first = restore(model, optimizer, args.checkpoint)
    model.train()
    began, mean = time.monotonic(), None
    for step in range(first, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        ids, weights = (x.to(args.device) for x in text.batch(step))
        loss, entropy = step_loss(model, ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = entropy.item() if mean is None else 0.98 * mean + 0.02 * entropy.item()
        if (step + 1) % 50 == 0:
            speed = (step + 1 - first) * TOKENS_PER_STEP / (time.monotonic() - began)
            print(
                f"step {step + 1}/{args.steps}  loss {mean:.4f}  {speed:.0f} tokens/s",
                file=sys.stderr,
                flush=True,
            )
        if (step + 1) % 200 == 0 or step + 1 == args.steps:
            save(model, optimizer, step + 1, args.checkpoint)


def save(model: OlmoeForCausalLM, optimizer: torch.optim.Optimizer, step: int, folder: Path | None) -> None:
    """Write a checkpoint whole or not at all: a kill in the middle leaves the one before."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    torch.save(state, folder / "next.pt")
    (folder / "next.pt").replace(folder / "last.pt")


def restore(model: OlmoeForCausalLM, optimizer: torch.optim.Optimizer, folder: Path | None) -> int:
    """Load the last checkpoint if there is one; returns the number of steps done."""
    if folder is None or not (folder / "last.pt").is_file():
        return 0
    state = torch.load(folder / "last.pt", map_location=model.device, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def export(model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model, rounded to bf16, and its tokenizer to `out`."""
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def evaluate(out: Path, n: int, device: str) -> tuple[dict[tuple[str, str, int], Score], dict[Pair, torch.Tensor]]:
    """Measure what was written: `{(skill, dialect, shots): score}` and expert loads of every pair."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    model = OlmoeForCausalLM.from_pretrained(out, dtype=torch.float32).to(device).eval()
    scores = {}
    for skill in SKILLS:
        for dialect in DIALECTS:
            for shots in (0, SHOTS):
                score = exact_match(model, tokenizer, skill, dialect, n=n, shots=shots, seed=EVAL_SEED)
                scores[skill, dialect, shots] = score
                print(f"{skill} {dialect} {shots}-shot {score.accuracy:.3f}", file=sys.stderr)
    return scores, loads_by_pair(model, tokenizer, [*trained_pairs(), *shifted_pairs()], seed=EVAL_SEED)


def reproduce(args: argparse.Namespace) -> str:
    """The command that gives these weights, without paths of this machine."""
    command = ["python", "demos/train_pocket.py", "--out", "ttrouting/pocket/weights"]
    for name, default in (("steps", STEPS), ("lr", LR), ("seed", 0)):
        if getattr(args, name) != default:
            command += [f"--{name}", str(getattr(args, name))]
    return " ".join(command)


def facts(args: argparse.Namespace, parameters: int) -> dict[str, object]:
    """What the model card says about the run; the names are fields of its template."""
    return {
        "parameters": parameters,
        "command": reproduce(args),
        "seed": args.seed,
        "steps": args.steps,
        "batch": TOKENS_PER_STEP,
        "tokens": args.steps * TOKENS_PER_STEP / 1e6,
        "short": SHORT,
        "long": LONG,
        "long_share": LONG_SHARE,
        "answer_weight": ANSWER_WEIGHT,
        "lr": args.lr,
        "late": LATE,
        "horizon": EARLY_HORIZON,
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
        "n": args.n,
        "eval_seed": EVAL_SEED,
        "shots": SHOTS,
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained model")
    parser.add_argument("--checkpoint", type=Path, help="folder to resume from and save to")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps in all")
    parser.add_argument("--lr", type=float, default=LR, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the text")
    parser.add_argument("--n", type=int, default=200, help="test questions per skill and dialect")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--card", action="store_true", help="train nothing: measure what --out holds, write its card")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, args.seed).to(args.device)
    parameters = model.num_parameters()
    if not args.card:
        train(model, Text(tokenizer, args.seed), args)
        export(model, tokenizer, args.out)
    scores, loads = evaluate(args.out, args.n, args.device)
    text = model_card(scores, loads, facts(args, parameters))
    (args.out / "README.md").write_text(text, encoding="utf-8")
    if (dead := int((overall(loads) == 0).sum())) > 0:
        sys.exit(f"{dead} experts were never chosen; train with another --seed or more --steps")


if __name__ == "__main__":
    main()
