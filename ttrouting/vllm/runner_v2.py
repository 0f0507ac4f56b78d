"""The same as `runner_v1` for vLLM's V2 model runner, the default on GPUs.

Experimental: it was checked against the runner's classes, and has not run on a GPU yet. SCMoE, C3PO and TaskDelta
are refused with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ttrouting.vllm.bookkeeping import Bookkeeping
from ttrouting.vllm.patching import wrap
from ttrouting.vllm.runner_v1 import after_forward, attach_on_load

METHODS = {
    "finish_requests": ("self", "scheduler_output"),
    "add_requests": ("self", "scheduler_output"),
    "prepare_inputs": ("self", "scheduler_output", "batch_req_state", "batch_desc", "num_active_loras"),
}


def finish_requests(original: Callable[..., Any]) -> Callable[..., Any]:
    """Requests that ended or were preempted."""

    def finish(self: Any, scheduler_output: Any) -> Any:
        book: Bookkeeping | None = getattr(self, "ttrouting", None)
        if book is not None:
            for request_id in scheduler_output.finished_req_ids:
                book.drop(request_id)
            for request_id in scheduler_output.preempted_req_ids or ():
                book.release(request_id)
        return original(self, scheduler_output)

    return finish


def add_requests(original: Callable[..., Any]) -> Callable[..., Any]:
    """Requests that start; with this runner also those that go on after a preemption."""

    def add(self: Any, scheduler_output: Any) -> Any:
        book: Bookkeeping | None = getattr(self, "ttrouting", None)
        if book is not None:
            for new in scheduler_output.scheduled_new_reqs:
                book.add(new.req_id, new.sampling_params, new.prompt_len)
        return original(self, scheduler_output)

    return add


def prepare_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    """The batch of a step."""

    def prepare(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        batch = original(self, scheduler_output, *args, **kwargs)
        book: Bookkeeping | None = getattr(self, "ttrouting", None)
        if book is not None:
            book.place(batch.req_ids, batch.num_scheduled_tokens, batch.num_computed_tokens_np)
        return batch

    return prepare


def install() -> None:
    """Wrap the V2 runner."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    wrap(GPUModelRunner, "load_model", attach_on_load)
    wrap(GPUModelRunner, "finish_requests", finish_requests)
    wrap(GPUModelRunner, "add_requests", add_requests)
    wrap(GPUModelRunner, "prepare_inputs", prepare_inputs)
    wrap(GPUModelRunner, "execute_model", after_forward)
