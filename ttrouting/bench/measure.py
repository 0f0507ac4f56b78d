"""How long does a call take until its first token and for each one after it, and how much memory has it at its peak?

Versions that are compared take turns within each repetition, in a new order each time: what else the machine does
then falls on all of them. Ratios are taken within a repetition, and their median and quartiles are reported.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from statistics import median, quantiles
from time import perf_counter, process_time
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StoppingCriteria

TIMES = {"wall": perf_counter, "cpu": process_time}


class Clock(StoppingCriteria):
    """Never stops; notes the time after each token, when the device is done with it.

    Args:
        kind: `wall`, or `cpu`: how long processors worked for this process, all its threads added up. On a machine
            that others use too that is the steadier one; of work on a GPU it knows nothing.
    """

    def __init__(self, device: torch.device, kind: str = "wall") -> None:
        self._device = device
        self._now = TIMES[kind]
        self.ticks: list[float] = []
        self.began = self._time()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.ticks.append(self._time())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def _time(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._now()


Call = Callable[[Clock], object]  # generates, with this clock among the stopping criteria
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Timing:
    """One call. Seconds: until the first token (all that is read or adapted before it included), and for each later
    step, which gives every sequence of the batch one token."""

    first: float
    step: float


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of `n` repetitions."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """At least one value."""
        low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
        return cls(median(values), low, high, len(values))

    @classmethod
    def of_ratios(cls, ours: Sequence[float], theirs: Sequence[float]) -> Spread:
        """Of ratios within each repetition."""
        return cls.of([a / b for a, b in zip(ours, theirs, strict=True)])


def timed(call: Call, device: torch.device, kind: str = "wall") -> Timing:
    """Run once. `step` is 0 where one token was made."""
    clock = Clock(device, kind)
    call(clock)
    ticks = clock.ticks
    return Timing(ticks[0] - clock.began, (ticks[-1] - ticks[0]) / max(1, len(ticks) - 1))


def interleaved(
    versions: Mapping[Name, Call],
    device: torch.device,
    repeats: int,
    seed: int = 0,
    kind: str = "wall",
    say: Callable[[str], None] = lambda _: None,
) -> dict[Name, list[Timing]]:
    """`repeats` timings of each version after one warm-up, versions taking turns in random order.

    Args:
        kind: of `Clock`.
    """
    found: dict[Name, list[Timing]] = {name: [] for name in versions}
    order = Random(seed)
    for repetition in range(repeats + 1):
        say(f"repetition {repetition} of {repeats}" if repetition else "warm-up")
        gc.collect()  # what earlier ones left in cycles
        names = list(versions)
        order.shuffle(names)
        for name in names:
            timing = timed(versions[name], device, kind)
            if repetition:
                found[name].append(timing)
    return found


def peak_bytes(call: Call, device: torch.device) -> int:
    """Most memory that one run holds beyond what was there before it; the KV cache counts.

    On CUDA this is what its allocator gave out. A CPU's allocator does not tell: there the storages of the tensors
    that operations return are added up while they live (`LiveBytes`). What a kernel allocates and frees inside itself
    is not seen. Never to be timed.
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call(Clock(device))
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with LiveBytes() as live:
        call(Clock(device))
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Adds up storages that operations make inside the block, as long as they live, those of backward passes too.

    Attributes:
        now: bytes that live. peak: the most there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}  # bytes by id of a living storage

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # an output may be a view of an input, or an input written in place: that storage is no new one
        inputs = {id(t.untyped_storage()) for t in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if id(storage) not in self._known and id(storage) not in inputs:
                self._add(storage)
        return out

    def _add(self, storage: Any) -> None:
        key, size = id(storage), int(storage.nbytes())
        self._known[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key).atexit = False

    def _drop(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)


def _tensors(values: Any) -> list[Tensor]:
    return [v for v in torch.utils._pytree.tree_leaves(values) if isinstance(v, Tensor)]
