"""What does a MoE layer cost with each experts implementation, with all experts and with half of them dropped?

A random OLMoE (by default 118M parameters) and its own hidden states. All ways take turns within a round; a figure
is the median over rounds with its quartiles, a ratio the median over rounds of two times of one round. `half`: each
token keeps a random half of its experts, the rest have weight 0; `best`: the fastest of eager, grouped_mm and
batched_mm, nothing dropped; `read`: matrices that half of the experts touch, over those that all touch, which no
implementation can beat where reading weights is all the work.

    taskset -c 1 python demos/bench_experts.py --dtype float32 --json experts.json
    python demos/bench_experts.py --device cuda --shape 16x2048x1024x64x8 --graphs
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, OlmoeConfig, OlmoeForCausalLM

from ttrouting.kernels import NAME

BASELINES = ("eager", "grouped_mm", "batched_mm")
LARGEST_COPY = 2 << 30  # bytes of expert weights that batched_mm may copy in one layer before it is left out
HOPELESS = 3  # a baseline this many times slower than the best leaves after the warm-up
PROMPT = 64  # tokens in the cache of a decode step

Run = Callable[[], Any]


def build(shape: list[int], dtype: torch.dtype, device: str) -> OlmoeForCausalLM:
    """A random OLMoE; `shape`: layers, hidden size, size of an expert, experts, experts per token."""
    layers, hidden, inner, experts, top_k = shape
    torch.manual_seed(0)
    config = OlmoeConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=inner,
        num_experts=experts,
        num_experts_per_tok=top_k,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=8192,
        pad_token_id=0,
        eos_token_id=1,
    )
    return OlmoeForCausalLM(config).to(device, dtype).eval().requires_grad_(False)


def blocks(model: OlmoeForCausalLM) -> list[Any]:
    return [layer.mlp for layer in model.model.layers]


@contextmanager
def watching(model: OlmoeForCausalLM) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Collects each block's input, `[B, T, H]`, and each layer's choice, `[N, K]`."""
    inputs: list[Tensor] = []
    choices: list[Tensor] = []
    hooks = [b.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for b in blocks(model)]
    hooks += [b.experts.register_forward_pre_hook(lambda _, args: choices.append(args[1])) for b in blocks(model)]
    try:
        yield inputs, choices
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def dropping(model: OlmoeForCausalLM, kept: list[Tensor]) -> Iterator[None]:
    """Inside, weights of pairs that are not in `kept`, a `[N, K]` for each layer, are 0."""
    hooks = [
        block.experts.register_forward_pre_hook(lambda _, args, mask=mask: (*args[:2], args[2] * mask))
        for block, mask in zip(blocks(model), kept, strict=True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Case:
    """One phase at one batch size: what to run, and which experts go."""

    def __init__(self, model: OlmoeForCausalLM, phase: str, batch: int, length: int) -> None:
        self.model = model
        self.new = 1 if phase == "decode" else length
        generator = torch.Generator().manual_seed(batch)
        ids = torch.randint(2, 8192, (batch, self.new), generator=generator).to(model.device)
        self.cache = DynamicCache(config=model.config)
        self.filled = PROMPT if phase == "decode" else 0
        if self.filled:
            prompt = torch.randint(2, 8192, (batch, PROMPT), generator=generator).to(model.device)
            model(input_ids=prompt, past_key_values=self.cache, logits_to_keep=1)
        self.ids = ids
        with watching(model) as (self.inputs, self.choices):
            self.step()
        columns, tokens = model.config.num_experts_per_tok, batch * self.new
        draws = [torch.rand(tokens, columns, generator=generator) for _ in self.choices]
        self.kept = [(d.argsort(-1) < columns // 2).to(model.device) for d in draws]
        self.copied = tokens * columns * sum(p[0].nbytes for p in blocks(model)[0].experts.parameters())

    def layers(self) -> None:
        """Every MoE block on its own hidden states."""
        for block, x in zip(blocks(self.model), self.inputs, strict=True):
            block(x)

    def step(self) -> None:
        """The whole model on the new tokens."""
        if not self.filled:
            self.model(input_ids=self.ids, use_cache=False, logits_to_keep=1)
            return
        self.model(input_ids=self.ids, past_key_values=self.cache, logits_to_keep=1)
        self.cache.crop(-1)

    def read(self) -> float:
        """Distinct experts that half of the pairs need, over those that all need."""
        half = sum(c[k].unique().numel() for c, k in zip(self.choices, self.kept, strict=True))
        return half / sum(c.unique().numel() for c in self.choices)


def graphed(run: Run) -> Run:
    """The same as a replay of a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def clock(run: Run, args: argparse.Namespace) -> float:
    """Milliseconds of one run."""
    if args.device == "cpu":
        now = time.process_time if args.clock == "cpu" else time.perf_counter
        begin = now()
        run()
        return 1e3 * (now() - begin)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def measure(case: Case, run: Run, args: argparse.Namespace) -> dict[str, list[float]]:
    """Milliseconds of each way in each round. Ways: a baseline, `ttrouting`, `half`."""

    def go(way: str) -> float:
        case.model.set_experts_implementation(NAME if way == "half" else way)
        if args.graphs and way != "eager":
            if way not in replays:
                with dropping(case.model, case.kept if way == "half" else [k | True for k in case.kept]):
                    replays[way] = graphed(run)
            return clock(replays[way], args)
        if way != "half":
            return clock(run, args)
        with dropping(case.model, case.kept):
            return clock(run, args)

    replays: dict[str, Run] = {}
    ways = [*BASELINES, NAME, "half"]
    if case.copied > LARGEST_COPY:
        ways.remove("batched_mm")
    warm = {way: min(go(way) for _ in range(2)) for way in ways}
    best = min(warm[way] for way in ways if way in BASELINES)
    ways = [way for way in ways if way not in BASELINES or warm[way] <= HOPELESS * best]
    rounds = int(args.seconds * 1e3 / sum(warm[way] for way in ways))
    times: dict[str, list[float]] = {way: [] for way in ways}
    for i in range(min(max(rounds, 5), 200)):
        for j in range(len(ways)):  # a way's neighbour is not always the same
            way = ways[(i + j) % len(ways)]
            times[way].append(go(way))
    return times


def summary(times: dict[str, list[float]]) -> dict[str, Any]:
    """Medians and quartiles in ms, and the three ratios."""
    best = min((way for way in times if way in BASELINES), key=lambda way: statistics.median(times[way]))

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))

    return {
        "ms": {way: statistics.quantiles(t, n=4) for way, t in times.items()},  # [quartile, median, quartile]
        "rounds": len(times[NAME]),
        "best": best,
        "all_over_best": ratio(NAME, best),
        "half_over_best": ratio("half", best),
        "half_over_all": ratio("half", NAME),
    }


def row(phase: str, batch: int, scope: str, found: dict[str, Any]) -> str:
    cells = [phase, str(batch), scope]
    for way in (*BASELINES, NAME, "half"):
        low, middle, high = found["ms"].get(way, (0, 0, 0))
        cells.append(f"{middle:.1f} ({low:.1f}-{high:.1f})" if middle else "-")
    cells += [f"{found[k]:.2f}" for k in ("all_over_best", "half_over_best", "half_over_all", "read")]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="8x512x128x64x8", help="layers x hidden x inner x experts x per token")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch, on a CPU")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 8, 32])
    parser.add_argument("--phases", nargs="+", default=["decode", "prefill"], choices=("decode", "prefill"))
    parser.add_argument("--length", type=int, default=512, help="tokens of a prefill")
    parser.add_argument("--scopes", nargs="+", default=["layers", "model"], choices=("layers", "model"))
    parser.add_argument("--seconds", type=float, default=20, help="for each case, at least five rounds")
    parser.add_argument(
        "--clock", default="wall", choices=("wall", "cpu"), help="cpu: not while others run; 1 thread"
    )
    parser.add_argument("--graphs", action="store_true", help="on CUDA: time replays of graphs of the layers")
    parser.add_argument("--json", help="file for all figures")
    args = parser.parse_args()
    if args.graphs and (args.device != "cuda" or args.scopes != ["layers"]):
        parser.error("--graphs needs --device cuda --scopes layers")
    torch.set_num_threads(args.threads)
    shape = [int(n) for n in args.shape.split("x")]
    model = build(shape, getattr(torch, args.dtype), args.device)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    where = args.device if args.device == "cuda" else f"cpu, {args.threads} thread(s), {args.clock} clock"
    print(f"{millions:.0f}M parameters, {args.dtype}, {where}, torch {torch.__version__}")
    print(
        "| | batch | of | " + " | ".join((*BASELINES, NAME, "half")) + " | all/best | half/best | half/all | read |"
    )
    print("|---" * 12 + "|", flush=True)
    results = []
    with torch.no_grad():
        for phase in args.phases:
            for batch in args.batches:
                model.set_experts_implementation("grouped_mm")
                case = Case(model, phase, batch, args.length)
                for scope in args.scopes:
                    found = summary(measure(case, case.layers if scope == "layers" else case.step, args))
                    found["read"] = case.read()
                    results.append({"phase": phase, "batch": batch, "scope": scope, **found})
                    print(row(phase, batch, scope, found), flush=True)
    if args.json:
        about = {**vars(args), "parameters": millions, "torch": torch.__version__, "machine": platform.processor()}
        with open(args.json, "w") as file:
            json.dump({"about": about, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
