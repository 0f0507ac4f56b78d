"""What does the plugin cost an engine: throughput and latency with it and without it, none to all requests adapted?

Two engines in processes of their own (`ttrouting.vllm.load_engine`), one of which never loads the plugin, take turns
on the same requests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from ttrouting.bench.measure import Spread
from ttrouting.errors import TTRoutingError
from ttrouting.vllm.spec import PAIRED

NO_PLUGIN = "no plugin"
SOME = 4  # one of so many requests is adapted
REQUESTS = (1, 8, 32, 128)


class EngineEnded(TTRoutingError):
    """vLLM did not start with these options, or ended in the middle."""


@dataclass(frozen=True)
class Row:
    """One version of a load.

    Attributes:
        prompt, new_tokens: tokens of each request. requests: sent at the same time.
        version: `no plugin`, or which requests are adapted: `none`, `some` or `all`. adapted: how many those are.
        tokens_per_second: written by all requests together.
        first_token_ms: of the median request, from the moment when all were sent; next_token_ms: each one after it.
        ratio: of throughput, to the engine without the plugin in the same repetition; above 1 is faster.
    """

    prompt: int
    new_tokens: int
    requests: int
    version: str
    adapted: int
    tokens_per_second: Spread
    first_token_ms: Spread
    next_token_ms: Spread
    ratio: Spread


class Engine:
    """An engine in a process of its own that runs loads when it is asked to.

    Args:
        start: see `load_engine.serve`.
    """

    def __init__(self, start: Mapping[str, Any], plugin: bool, environment: Mapping[str, str]) -> None:
        # on CPUs vLLM takes a share of the whole machine for its cache otherwise
        defaults = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "2"}
        environment = {**defaults, **os.environ, **environment}
        if not plugin:
            environment["VLLM_PLUGINS"] = ""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ttrouting.vllm.load_engine"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )
        self._write({**start, "plugin": plugin})

    def ready(self) -> dict[str, Any]:
        """Wait until it has started; what it says about itself.

        Raises:
            EngineEnded: it did not start.
        """
        return self._read()

    def run(self, **load: int) -> dict[str, float]:
        """Answer a load; see `load_engine.serve`. Raises as `ready`."""
        self._write(load)
        return self._read()

    def _write(self, what: Mapping[str, Any]) -> None:
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):  # reading tells why
                self._process.stdin.write(json.dumps(what) + "\n")
                self._process.stdin.flush()

    def _read(self) -> dict[str, Any]:
        for line in self._process.stdout or ():
            if line.startswith("{"):  # vLLM writes there too
                found: dict[str, Any] = json.loads(line)
                return found
        self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        said = [line.strip() for line in lines if "Error" in line] or [line for line in lines if line.strip()]
        raise EngineEnded(f"vLLM's engine has ended: {said[-1] if said else 'it did not say why'}")

    def end(self) -> None:
        """End its process."""
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()


def measure(
    model: str | Path,
    requests: Sequence[int] = REQUESTS,
    prompts: Sequence[int] = (64,),
    new_tokens: int = 32,
    repeats: int = 5,
    spec: Mapping[str, Any] | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """A row for each prompt length, number of requests at a time, and version.

    Args:
        model: what `vllm.LLM` takes. requests: at a time. prompts: lengths in tokens. repeats: after a warm-up, in
            each of which all versions take turns in a new order.
        spec: of adapted requests (`ttrouting.vllm.spec`); None: a random delta. options: of `vllm.LLM`, for both.

    Raises:
        EngineEnded: see there.
    """
    kinds = {one.get("strategy") for one in (spec or {}).get("strategies", ())}
    paired = not kinds.isdisjoint(PAIRED)
    settings = {
        "max_num_seqs": max(2, max(requests) * (2 if "scmoe" in kinds else 1)),
        "max_model_len": max(prompts) + new_tokens + 1,
        "gpu_memory_utilization": 0.4,  # both engines are there at the same time
        **({"async_scheduling": False} if paired else {}),
        **(options or {}),
    }
    environment = {"VLLM_USE_V2_MODEL_RUNNER": "0"} if paired else {}
    start = {"model": str(model), "options": settings, "spec": spec}
    engines: dict[bool, Engine] = {}
    rows: list[Row] = []
    try:
        for plugin in (False, True):  # one after the other: each looks how much memory is free
            say(f"starting vLLM {'with' if plugin else 'without'} the plugin")
            engines[plugin] = Engine(start, plugin, environment)
            engines[plugin].ready()
        for prompt in prompts:
            for count in requests:
                rows += _case(engines, prompt, new_tokens, count, repeats, seed, say)
    finally:
        for engine in engines.values():
            engine.end()
    return rows


def _case(
    engines: Mapping[bool, Engine],
    prompt: int,
    new_tokens: int,
    count: int,
    repeats: int,
    seed: int,
    say: Callable[[str], None],
) -> list[Row]:
    """All versions of one number of requests."""
    adapted = {NO_PLUGIN: 0, "none": 0}
    if count > 1:
        adapted["some"] = max(1, count // SOME)
    adapted["all"] = count
    found: dict[str, list[dict[str, float]]] = {name: [] for name in adapted}
    order = Random(seed)
    for repetition in range(repeats + 1):
        what = f"repetition {repetition} of {repeats}" if repetition else "warm-up"
        say(f"{count} requests of {prompt} tokens: {what}")
        names = list(adapted)
        order.shuffle(names)
        for name in names:
            took = engines[name != NO_PLUGIN].run(
                requests=count, adapted=adapted[name], prompt=prompt, new_tokens=new_tokens, seed=seed + repetition
            )
            if repetition:
                found[name].append(took)

    def of(name: str, quantity: str) -> list[float]:
        return [took[quantity] for took in found[name]]

    base = of(NO_PLUGIN, "tokens_per_second")
    return [
        Row(
            prompt,
            new_tokens,
            count,
            name,
            adapted[name],
            Spread.of(of(name, "tokens_per_second")),
            Spread.of(of(name, "first_token_ms")),
            Spread.of(of(name, "next_token_ms")),
            Spread.of_ratios(of(name, "tokens_per_second"), base),
        )
        for name in adapted
    ]
