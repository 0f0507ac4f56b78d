"""What does the scheduler have to do for strategies that read a prompt more than once?

SCMoE: for every request a weak twin is added that no client sees. A twin has its own cache. Both may be read in any
chunks, but their last token is read in the same step, so that their logits can be contrasted; a step in which only
one of them would be sampled from is put off (the worker drops the sample, and the token is read again).

Rerouting: a request waits outside the queue while copies of its prompt, each with a delta of its own, are read; see
`ttrouting.vllm.evolution`.

C3PO and TaskDelta: when the worker has put the sample at a prompt's end off, the prompt's last token is read again,
or all of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request, RequestStatus

from ttrouting.vllm.learning import Learning, learn, start_learning
from ttrouting.vllm.patching import wrap
from ttrouting.vllm.settings import KEY

TWIN = "~weak"


class Pairs:
    """What is known of the requests of one scheduler.

    Attributes:
        partner: request id -> id of the other stream, both ways. repeated: requests of which the last prompt token
            is read twice (False: C3PO), or the whole prompt (True: TaskDelta). twins: ids of weak streams.
        learning: requests that wait for their rerouting. copies: id of each copy -> id of the request it is read for.
        disturbed: a pair was torn apart.
    """

    def __init__(self) -> None:
        self.partner: dict[str, str] = {}
        self.repeated: dict[str, bool] = {}
        self.twins: set[str] = set()
        self.disturbed = False
        self.learning: dict[str, Learning] = {}
        self.copies: dict[str, str] = {}

    @property
    def any(self) -> bool:
        """Whether there is anything to look after."""
        return bool(self.partner or self.repeated or self.learning or self.copies)

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self.repeated.pop(request_id, None)
        self.learning.pop(request_id, None)
        self.copies.pop(request_id, None)
        other = self.partner.pop(request_id, None)
        if other is not None:
            self.partner.pop(other, None)
        self.twins.discard(request_id)


def pairs_of(scheduler: Any) -> Pairs:
    """Kept on the scheduler."""
    found = scheduler.__dict__.get("ttrouting")
    if found is None:
        found = scheduler.ttrouting = Pairs()
    return found


def make_twin(request: Any) -> Any:
    """The weak stream of a request: the same text under another routing, never stopped by itself before it."""
    params: SamplingParams = request.sampling_params
    data = params.extra_args[KEY]
    twin_id = request.request_id + TWIN
    weak = SamplingParams(
        temperature=0.0,
        max_tokens=params.max_tokens,
        ignore_eos=True,
        detokenize=False,
        skip_reading_prefix_cache=params.skip_reading_prefix_cache,
        extra_args={KEY: {**data, "weak": True, "partner": request.request_id}},
    )
    params.extra_args = {**params.extra_args, KEY: {**data, "partner": twin_id}}
    return Request(
        request_id=twin_id,
        prompt_token_ids=list(request.prompt_token_ids),
        sampling_params=weak,
        pooling_params=None,
        client_index=request.client_index,
        arrival_time=request.arrival_time,
        lora_request=request.lora_request,
        cache_salt=f"{request.cache_salt or ''}|weak|{data['digest']}",
        priority=request.priority,
        block_hasher=request._block_hasher,
    )


def _add_request(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_request(self: Any, request: Any) -> None:
        extra = getattr(request.sampling_params, "extra_args", None)
        kinds = extra[KEY]["kinds"] if extra and KEY in extra else ()
        new = request.request_id not in self.requests
        if new and "scmoe" in kinds:
            pairs = pairs_of(self)
            twin = make_twin(request)
            original(self, request)
            original(self, twin)
            pairs.partner |= {request.request_id: twin.request_id, twin.request_id: request.request_id}
            pairs.twins.add(twin.request_id)
            return
        if new and "rerouting" in kinds:
            original(self, request)
            start_learning(self, pairs_of(self), request)
            return
        if new and ("c3po" in kinds or "task_delta" in kinds):
            pairs_of(self).repeated[request.request_id] = "task_delta" in kinds
        original(self, request)

    return add_request


def _limit(original: Callable[..., Any]) -> Callable[..., Any]:
    def reserve_prefill_lookahead(self: Any, request: Any, computed: int, new: int) -> int:
        new = original(self, request, computed, new)
        pairs: Pairs | None = self.__dict__.get("ttrouting")
        if pairs is None or new == 0 or request.request_id not in pairs.partner:
            return new
        other = self.requests[pairs.partner[request.request_id]]
        starts = request.status != RequestStatus.RUNNING
        other_runs = other.status == RequestStatus.RUNNING
        if starts and not other_runs and not has_room(self, pairs, request):
            return 0
        if computed + new < request.num_tokens:
            return new  # another chunk; nothing is sampled
        if starts:
            # a single token cannot be kept for later: it is read, its sample dropped, and read again
            return max(new - 1, 1)
        if new == 1 and other_runs and other.num_tokens - other.num_computed_tokens == 1:
            return 1
        return new - 1

    return reserve_prefill_lookahead


def has_room(scheduler: Any, pairs: Pairs, request: Any) -> bool:
    """Whether both streams of a pair can run, beside the pairs of which one stream still waits."""
    running = {r.request_id for r in scheduler.running}
    waited_for = sum(1 for one in running if one in pairs.partner and pairs.partner[one] not in running)
    if len(running) + waited_for + 2 > scheduler.max_num_active_reqs:
        return False
    blocks = 2 * (request.num_tokens // scheduler.block_size + 1)
    return not running or scheduler.kv_cache_manager.block_pool.get_num_free_blocks() >= blocks


def _preempt_request(original: Callable[..., Any]) -> Callable[..., Any]:
    def preempt_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        pairs: Pairs | None = self.__dict__.get("ttrouting")
        if pairs is not None and request.request_id in pairs.partner:
            pairs.disturbed = True
        return original(self, request, *args, **kwargs)

    return preempt_request


def _schedule(original: Callable[..., Any]) -> Callable[..., Any]:
    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        pairs: Pairs | None = self.__dict__.get("ttrouting")
        if pairs is not None and pairs.disturbed:
            settle(self, pairs)
        return original(self, *args, **kwargs)

    return schedule


def settle(scheduler: Any, pairs: Pairs) -> None:
    """After a preemption: both streams of a pair wait, one behind the other, or both run."""
    for request in list(scheduler.running):
        partner = pairs.partner.get(request.request_id)
        if partner is not None and scheduler.requests[partner].status == RequestStatus.PREEMPTED:
            scheduler.running.remove(request)
            scheduler._preempt_request(request, time.monotonic())
    pairs.disturbed = False
    waiting = {request.request_id: request for request in scheduler.waiting}
    placed: set[str] = set()
    order = []
    for request_id, request in waiting.items():
        if request_id in placed:
            continue
        both = [request]
        partner = pairs.partner.get(request_id)
        if partner in waiting:
            both.append(waiting[partner])
            both.sort(key=lambda r: r.request_id in pairs.twins)  # the strong one first
        order += both
        placed |= {r.request_id for r in both}
    scheduler.waiting.clear()
    scheduler.waiting.extend(order)


def _update_from_output(original: Callable[..., Any]) -> Callable[..., Any]:
    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        outputs = original(self, scheduler_output, model_runner_output)
        pairs: Pairs | None = self.__dict__.get("ttrouting")
        if pairs is None or not pairs.any:
            return outputs
        twins = set(pairs.twins)
        for request_id in scheduler_output.num_scheduled_tokens:
            if request_id not in pairs.partner and request_id not in pairs.repeated:
                continue
            request = self.requests.get(request_id)
            if request is None:
                continue
            # read to the end without a sample: the worker put the step off
            if request.status == RequestStatus.RUNNING and request.num_computed_tokens >= request.num_tokens:
                request.num_computed_tokens = 0 if pairs.repeated.get(request_id) else request.num_tokens - 1
        self.finish_requests(orphans(self, pairs), RequestStatus.FINISHED_ABORTED)
        for request_id in [*pairs.partner, *pairs.repeated]:
            if request_id not in self.requests:
                pairs.forget(request_id)
        hidden = twins | set(pairs.copies)
        for part in outputs.values():
            if pairs.learning:
                learn(self, pairs, part.outputs)
            part.outputs = [out for out in part.outputs if out.request_id not in hidden]
            if part.finished_requests:
                part.finished_requests -= hidden
        for one in [one for one in pairs.copies if one not in self.requests]:
            del pairs.copies[one]
        return outputs

    return update_from_output


def orphans(scheduler: Any, pairs: Pairs) -> list[str]:
    """Streams whose partner has ended."""
    return [
        one for one, other in pairs.partner.items() if other not in scheduler.requests and one in scheduler.requests
    ]


def _finish_requests(original: Callable[..., Any]) -> Callable[..., Any]:
    def finish_requests(self: Any, request_ids: str | Iterable[str] | None, status: Any) -> Any:
        pairs: Pairs | None = self.__dict__.get("ttrouting")
        if pairs is None or not pairs.any:
            return original(self, request_ids, status)
        if request_ids is None:
            request_ids = list(self.requests)
        ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        ids += [pairs.partner[one] for one in ids if one in pairs.partner]
        ids += [copy for copy, owner in pairs.copies.items() if owner in ids]
        ended = original(self, ids, status)
        unseen = pairs.twins | set(pairs.copies)
        for one in ids:
            if one not in self.requests:
                pairs.forget(one)
        return [request for request in ended if request.request_id not in unseen]

    return finish_requests


def install() -> None:
    """Wrap the scheduler."""
    from vllm.v1.core.sched.scheduler import Scheduler

    for name, make in (
        ("add_request", _add_request),
        ("_reserve_prefill_lookahead", _limit),
        ("_preempt_request", _preempt_request),
        ("schedule", _schedule),
        ("update_from_output", _update_from_output),
        ("finish_requests", _finish_requests),
    ):
        wrap(Scheduler, name, make)
