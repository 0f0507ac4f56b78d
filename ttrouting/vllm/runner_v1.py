"""Where does vLLM's V1 model runner say which tokens it sends through the model, and which requests have ended?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ttrouting.vllm.attach import Attached
from ttrouting.vllm.bookkeeping import Bookkeeping
from ttrouting.vllm.contrasting import contrast, decide, follow, pair_rows
from ttrouting.vllm.patching import wrap
from ttrouting.vllm.settings import read_settings


def attach_on_load(original: Callable[..., Any]) -> Callable[..., Any]:
    """`load_model`: find the routers where the engine was started with the plugin on."""

    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        settings = read_settings(self.vllm_config.additional_config)
        if settings is not None:
            self.ttrouting = Bookkeeping(Attached(self.vllm_config, self.model, settings, self.device))
        return result

    return load_model


def _update_states(original: Callable[..., Any]) -> Callable[..., Any]:
    def update_states(self: Any, scheduler_output: Any) -> Any:
        book: Bookkeeping | None = getattr(self, "ttrouting", None)
        if book is not None:
            # here and not in _prepare_inputs, which a request that has ended may never reach
            for request_id in scheduler_output.finished_req_ids:
                book.drop(request_id)
            for request_id in scheduler_output.preempted_req_ids or ():
                book.release(request_id)
            for new in scheduler_output.scheduled_new_reqs:
                book.add(new.req_id, new.sampling_params, len(new.prompt_token_ids or ()))
        return original(self, scheduler_output)

    return update_states


def _prepare_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    def prepare_inputs(self: Any, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        book: Bookkeeping | None = getattr(self, "ttrouting", None)
        if book is not None:
            batch = self.input_batch
            book.place(batch.req_ids, num_scheduled_tokens, batch.num_computed_tokens_cpu)
        return original(self, scheduler_output, num_scheduled_tokens)

    return prepare_inputs


def after_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """`execute_model`: prove that the forward was adapted."""

    def execute_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        book: Bookkeeping | None = getattr(self, "ttrouting", None)
        if book is not None:
            book.after_forward()
        return result

    return execute_model


def _sample_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        book: Bookkeeping | None = getattr(self, "ttrouting", None)
        state = self.execute_model_state
        if book is None or state is None or state.logits is None or not book.requests:
            return original(self, *args, **kwargs)
        rows = self.input_batch.req_id_to_index
        put_off = self.discard_request_mask.np
        again = book.read_prompts(rows, state.hidden_states, state.logits)
        pairs, alone = pair_rows(book, rows, ~put_off[: len(rows)])
        alone += again
        for _, _, held in pairs:
            if held.judged is not None and held.partner is not None:
                weak = book.requests[held.partner]
                decide(held, weak, self.requests[weak.partner].prompt_token_ids, self.model.compute_logits)
        contrast(state.logits, pairs)
        if alone:
            put_off[alone] = True
        # nothing is drawn for a sample that is dropped: a generator could not be turned back on CPUs
        generators = self.input_batch.generators
        idle = {row: generators[row] for row in list(generators) if put_off[row] and _ours(book, self, row)}
        for row in idle:
            del generators[row]
        self._ttrouting_pairs = pairs
        try:
            return original(self, *args, **kwargs)
        finally:
            self._ttrouting_pairs = []
            generators.update(idle)

    return sample_tokens


def _ours(book: Bookkeeping, runner: Any, row: int) -> bool:
    return runner.input_batch.req_ids[row] in book.requests


def _sample(original: Callable[..., Any]) -> Callable[..., Any]:
    def sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        pairs = getattr(self, "_ttrouting_pairs", None)
        if pairs:
            follow(output.sampled_token_ids, pairs)
        return output

    return sample


def _facts(self: Any) -> dict[str, Any]:
    """What the front end must know; see `Facts`. Called through `collective_rpc`."""
    return self.model_runner.ttrouting.attached.facts.to_dict()


def _report(self: Any) -> dict[str, Any]:
    """See `Bookkeeping.report`. Called through `collective_rpc`."""
    return self.model_runner.ttrouting.report()


def install() -> None:
    """Wrap the V1 runner and give workers two methods."""
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.worker_base import WorkerBase

    wrap(GPUModelRunner, "load_model", attach_on_load)
    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner

        wrap(CPUModelRunner, "load_model", attach_on_load)
    wrap(GPUModelRunner, "_update_states", _update_states)
    wrap(GPUModelRunner, "_prepare_inputs", _prepare_inputs)
    wrap(GPUModelRunner, "execute_model", after_forward)
    wrap(GPUModelRunner, "sample_tokens", _sample_tokens)
    wrap(GPUModelRunner, "_sample", _sample)
    for name, function in (("ttrouting_facts", _facts), ("ttrouting_report", _report)):
        if not hasattr(WorkerBase, name):
            setattr(WorkerBase, name, function)
