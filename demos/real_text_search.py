"""Does a reference set of real questions, asked with other real questions, find the same topic?

OpenBookQA and CommonsenseQA train questions become a reference set of the pocket model; ARC-Challenge test questions
search it, by one of two embedders: the pocket model's own hidden states, or a sentence-transformers model.

    python demos/real_text_search.py --data-dir DATA --embedder model
    python demos/real_text_search.py --data-dir DATA --embedder all-MiniLM-L6-v2     # or its folder

DATA holds `openbookqa/train.jsonl`, `commonsenseqa/train.jsonl` and `arc_challenge/test.jsonl`: one JSON object a
line with question, choices and label, the number of the right choice.

How "the same topic" is judged, by no embedder: searches read questions, the judge reads ANSWER CHOICES, which no
search saw. Two questions are on the same topic when their choices share content words (lower case, cut to six
letters, stop words left out) with an idf-weighted Jaccard overlap in the top 1 % of random pairs of questions. So
chance is at most 1 %. Reference points: a random reference (exactly: the share of all references that are on the
topic), the nearest by BM25 over the questions' words, and the best reference there is. A second measure takes the
sets as labels: how often the nearest is a science question (OpenBookQA) rather than a commonsense one, as all of
ARC's are. Intervals are paired bootstraps over ARC questions, 95 %. Times are CPU times on one thread.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch

import ttrouting as ttr
from ttrouting.pathways import read_prompts
from ttrouting.refsets import ReferenceSet, build
from ttrouting.refsets.embedders import Embedder, SentenceTransformerEmbedder
from ttrouting.sites import find_sites
from ttrouting.target import Target

REFERENCES = {"openbookqa": "openbookqa/train.jsonl", "commonsenseqa": "commonsenseqa/train.jsonl"}
QUESTIONS = "arc_challenge/test.jsonl"
SCIENCE = "openbookqa"
PROMPT = "Q: {question}\nA:"
CHANCE = 0.01
STEM = 6  # letters of a word that are compared
STOP = """a about above after again all also am an and any are as at be because been before being below between both
but by can could did do does doing down during each few for from further get had has have having he her here him his
how i if in into is it its just like likely made make many may me might more most much must my no nor not now of off
on once one only or other our out over own same she should so some such than that the their them then there these they
this those through to too under until up use used using very was way we were what when where which while who whom why
will with would you your following best"""
STOP_WORDS = frozenset(re.findall("[a-z]+", STOP))


def records(folder: Path, per_set: int | None) -> list[dict[str, Any]]:
    """The references' records, the first `per_set` of each file, each with the name of its set."""
    found = []
    for name, file in REFERENCES.items():
        found += [{**record, "set": name} for record in _lines(folder / file)[:per_set]]
    return found


def questions(folder: Path, limit: int | None) -> list[dict[str, Any]]:
    return _lines(folder / QUESTIONS)[:limit]


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# --- words ------------------------------------------------------------------------------------------------


def stems(text: str) -> list[str]:
    """Content words, cut to their first letters."""
    words = re.findall(r"[a-z]{3,}", text.lower())
    return [word[:STEM] for word in words if word not in STOP_WORDS]


class Words:
    """Which of some texts share words with another one, and how much these words weigh."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.bags = [Counter(stems(text)) for text in texts]
        holders: dict[str, list[int]] = defaultdict(list)
        for number, bag in enumerate(self.bags):
            for word in bag:
                holders[word].append(number)
        self.holders = {word: np.array(numbers) for word, numbers in holders.items()}
        self.count = len(texts)
        self.length = np.array([sum(bag.values()) for bag in self.bags])  # [N]
        self.weight = np.array([sum(map(self.idf, bag)) for bag in self.bags])  # [N] of each text's set of words

    def idf(self, word: str) -> float:
        held = len(self.holders.get(word, ()))
        return float(np.log(1 + (self.count - held + 0.5) / (held + 0.5)))

    def jaccard(self, text: str) -> np.ndarray:
        """idf-weighted Jaccard overlap `[N]` of each text's set of words with those of another one."""
        own = set(stems(text))
        shared = np.zeros(self.count)
        for word in own & self.holders.keys():
            shared[self.holders[word]] += self.idf(word)
        either = self.weight + sum(map(self.idf, own)) - shared
        return shared / np.maximum(either, 1e-9)

    def bm25(self, text: str, k1: float = 1.2, b: float = 0.75) -> np.ndarray:
        """BM25 scores `[N]`."""
        scores = np.zeros(self.count)
        for word in set(stems(text)) & self.holders.keys():
            where = self.holders[word]
            often = np.array([self.bags[i][word] for i in where])
            size = k1 * (1 - b + b * self.length[where] / self.length.mean())
            scores[where] += self.idf(word) * often * (k1 + 1) / (often + size)
        return scores


def same_topic(asked: list[dict[str, Any]], held: list[dict[str, Any]], seed: int) -> np.ndarray:
    """`[questions, references]` bool: choices overlap as at most 1 % of random pairs do."""
    words = Words([" ".join(record["choices"]) for record in held])
    overlap = np.stack([words.jaccard(" ".join(record["choices"])) for record in asked])
    sample = np.random.default_rng(seed).choice(overlap.size, size=min(overlap.size, 200_000), replace=False)
    return overlap > np.quantile(overlap.ravel()[sample], 1 - CHANCE)


# --- search -----------------------------------------------------------------------------------------------


def model_embedding(model: Any, tokenizer: Any) -> Callable[[list[str]], np.ndarray]:
    """The pocket model's mean-pooled hidden states of prompts. Characters it has no token for become <unk>."""
    target = Target(model, find_sites(model), tokenizer)

    def embed(prompts: list[str]) -> np.ndarray:
        found = [
            read_prompts(target, tokenizer(prompts[i : i + 16])["input_ids"])[1] for i in range(0, len(prompts), 16)
        ]
        return torch.cat(found).numpy()

    return embed


def timed(call: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """What a call gives, and its milliseconds of CPU time: other work on the machine does not count."""
    began = process_time()
    result = call(*args)
    return result, 1000 * (process_time() - began)


def search(refset: ReferenceSet, embed: Callable[[list[str]], np.ndarray], asked: list[str]) -> dict[str, Any]:
    """The nearest reference of each question, and what one question costs."""
    raw = [timed(embed, [prompt]) for prompt in asked[:50]]
    embeddings = np.concatenate([embed(asked[start : start + 64]) for start in range(0, len(asked), 64)])
    refset.search(embeddings[:1], 1, use="all")  # the first search hashes files and builds the index
    found = [
        timed(lambda i: refset.search(embeddings[i : i + 1], 3, use="all"), i)[1] for i in range(len(asked[:50]))
    ]
    return {
        "neighbours": refset.search(embeddings, 3, use="all"),
        "embed_ms": float(np.median([ms for _, ms in raw])),
        "search_ms": float(np.median(found)),
    }


def bootstrap(difference: np.ndarray, seed: int, draws: int = 10_000) -> tuple[float, float]:
    """95 % interval of the mean of `[questions]`, questions drawn again."""
    noise = np.random.default_rng(seed)
    means = [difference[noise.integers(len(difference), size=len(difference))].mean() for _ in range(draws)]
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def compare(
    nearest: np.ndarray, held: list[dict[str, Any]], asked: list[dict[str, Any]], seed: int
) -> dict[str, Any]:
    """How often the nearest reference is on the topic, beside chance, BM25 and the best there is.

    Args:
        nearest: `[questions]`, numbers of references.
    """
    words = Words([record["question"] for record in held])
    lexical = np.array([words.bm25(record["question"]).argmax() for record in asked])
    topic = same_topic(asked, held, seed)
    science = np.array([record["set"] == SCIENCE for record in held])
    every = np.arange(len(asked))
    hit = topic[every, nearest].astype(float)
    return {
        "topic": {
            "embedder": hit.mean(),
            "random": topic.mean(),
            "bm25": topic[every, lexical].mean(),
            "best": topic.any(1).mean(),
            "minus random": bootstrap(hit - topic.mean(1), seed),
            "minus bm25": bootstrap(hit - topic[every, lexical], seed),
        },
        "science": {
            "embedder": science[nearest].mean(),
            "random": science.mean(),
            "bm25": science[lexical].mean(),
            "best": 1.0,
            "minus random": bootstrap(science[nearest] - science.mean(), seed),
            "minus bm25": bootstrap(science[nearest].astype(float) - science[lexical], seed),
        },
    }


def print_report(refset: ReferenceSet, found: dict[str, Any], asked: list[dict[str, Any]], show: int) -> None:
    neighbours = found["neighbours"]
    for row in range(min(show, len(asked))):
        print(f"\n{asked[row]['question']}")
        for number, cosine in zip(neighbours.index[row], neighbours.similarity[row], strict=True):
            record = refset.record(number) if number >= 0 else None
            print(f"  {cosine:.2f}  {record.source}: {record.prompt[3:-3]}" if record else "  none")
    print(f"\n{len(refset):,} references, {len(asked):,} questions, embedder {refset.embedder_name}")
    print(f"one question: {found['embed_ms']:.1f} ms to embed, {found['search_ms']:.2f} ms to search (medians)")
    print("| nearest reference is | random | by BM25 | by embedder | best | embedder - random | embedder - BM25 |")
    print("|---|---|---|---|---|---|---|")
    for name, text in (("topic", "on the same topic"), ("science", "a science question")):
        row = found[name]
        shares = " | ".join(f"{row[k]:.3f}" for k in ("random", "bm25", "embedder", "best"))
        spans = " | ".join("{:+.3f} to {:+.3f}".format(*row[k]) for k in ("minus random", "minus bm25"))
        print(f"| {text} | {shares} | {spans} |")


def run(
    data: Path,
    out: Path,
    embedder: str | Embedder = "model",
    *,
    per_set: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> tuple[ReferenceSet, dict[str, Any], list[dict[str, Any]]]:
    """Build the set, search it, judge what was found.

    Returns:
        The set, the results, and the questions that were asked.
    """
    model, tokenizer = ttr.load_pocket()
    held, asked = records(data, per_set), questions(data, limit)
    # the pocket model knows none of the answers: everything is kept
    refset, ms = timed(
        lambda: build(
            model,
            tokenizer,
            held,
            out,
            prompt=PROMPT,
            answer=" {choices[label]}\n",
            source="{set}",
            keep="all",
            embedder=embedder,
        )
    )
    embed = embedder.embed if isinstance(embedder, Embedder) else model_embedding(model, tokenizer)
    prompts = [PROMPT.format(question=record["question"]) for record in asked]
    unknown = sum(tokenizer(p)["input_ids"].count(tokenizer.unk_token_id) for p in prompts)
    # a set has no record twice, and keeps the order of its source
    by_text = {PROMPT.format(question=r["question"]) + f" {r['choices'][r['label']]}\n": r for r in reversed(held)}
    held = [by_text[record.prompt + record.answer] for record in map(refset.record, range(len(refset)))]
    found = search(refset, embed, prompts)
    found |= compare(found["neighbours"].index[:, 0], held, asked, seed)
    found |= {"build_s": ms / 1000, "unknown": unknown / sum(map(len, prompts))}
    return refset, found, asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the benchmark sets")
    parser.add_argument("--embedder", default="model", help="model, or a sentence-transformers name or folder")
    parser.add_argument("--name", help="of the embedder in the set's manifest, where it is a folder")
    parser.add_argument("--out", type=Path, help="folder for the set; a temporary one if not given")
    parser.add_argument("--per-set", type=int, help="only the first so many records of each set")
    parser.add_argument("--limit", type=int, help="only the first so many questions")
    parser.add_argument("--show", type=int, default=5, help="questions to print with their neighbours")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap and of the random pairs")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the models are small
    embedder = (
        args.embedder if args.embedder == "model" else SentenceTransformerEmbedder(args.embedder, name=args.name)
    )
    with tempfile.TemporaryDirectory() as folder:
        refset, found, asked = run(
            args.data_dir, args.out or Path(folder) / "set", embedder, per_set=args.per_set, limit=args.limit
        )
        print_report(refset, found, asked, args.show)
        print(f"\nbuilding the set took {found['build_s']:.0f} s; {found['unknown']:.2%} of characters were unknown")


if __name__ == "__main__":
    main()
