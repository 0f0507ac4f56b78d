"""Is a request admitted? Everything that can be wrong with a spec is told here, as HTTP 400, and harms nobody.

What is raised later, in a worker, would end the engine for everyone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any

from vllm.exceptions import VLLMValidationError

from ttrouting.errors import TTRoutingError, UnsupportedCallError
from ttrouting.vllm.contrasting import judged_positions
from ttrouting.vllm.patching import wrap
from ttrouting.vllm.recognising import compared
from ttrouting.vllm.settings import KEY, Settings, read_settings
from ttrouting.vllm.spec import Facts, Wanted, parse, read

ABSENT = object()
OFF = (
    "This engine was started without ttrouting, so the request would be answered unadapted. Start it with "
    "'ttrouting serve', or with additional_config=ttrouting.vllm.config()."
)


def asked(params: Any) -> Any:
    """The spec in sampling parameters, or `ABSENT`."""
    extra = getattr(params, "extra_args", None)
    return extra.get(KEY, ABSENT) if isinstance(extra, dict) else ABSENT


class Admission:
    """Checks requests of one engine; kept on its input processor."""

    def __init__(self, vllm_config: Any) -> None:
        self.vllm_config = vllm_config
        self.settings: Settings | None = read_settings(vllm_config.additional_config)
        self.facts: Facts | None = None

    def check(self, value: Any, params: Any) -> tuple[dict[str, Any], Wanted]:
        """The spec as plain data, and what it means.

        Raises:
            TTRoutingError: what is wrong.
        """
        if self.settings is None or self.facts is None:
            raise UnsupportedCallError(OFF)
        data = read(value)
        wanted = parse(data, self.settings, self.facts)
        special = wanted.rereading
        if special and params.prompt_logprobs is not None:
            raise UnsupportedCallError(
                f"prompt_logprobs are not defined with {special[0]}: prompts are read more than once. Leave them out."
            )
        if len(special) > 1:
            raise UnsupportedCallError(f"{' and '.join(special)} do not run together in vLLM. Keep one of them.")
        return data, wanted

    def admit(self, request: Any, data: dict[str, Any], wanted: Wanted, tokenizer: Any) -> None:
        """Write into an engine request what the scheduler and the workers need.

        Args:
            tokenizer: of the engine; None where it was started without.

        Raises:
            TTRoutingError: the prompt is of a kind or size that cannot be adapted.
        """
        params = request.sampling_params
        extra = {name: value for name, value in (params.extra_args or {}).items() if name != KEY}
        if wanted.identity:  # nothing is to be done: the request is a plain one
            params.extra_args = extra or None
            return
        kinds = wanted.rereading
        if kinds and (request.prompt_token_ids is None or request.mm_features or request.resumable):
            raise UnsupportedCallError(
                f"{kinds[0]} in vLLM reads text prompts only: no embeddings, pictures, sessions."
            )
        if "scmoe" in kinds:
            self._check_pair_fits(len(request.prompt_token_ids) + (params.max_tokens or 0))
        told: dict[str, Any] = {"spec": data, "kinds": kinds, "digest": wanted.digest}
        if "scmoe" in kinds and wanted.no_harm and wanted.scmoe.judge_on is not None:
            told["judged"] = judged_positions(wanted.scmoe, list(request.prompt_token_ids), tokenizer)
            params.skip_reading_prefix_cache = True  # both streams of the whole prompt are looked at
        if "rerouting" in kinds and self.facts is not None:
            options = dataclasses.asdict(wanted.rerouting)
            told["rerouting"] = {"options": options, "shape": [self.facts.layers, self.facts.experts]}
            told["no_harm"] = wanted.no_harm
        if "task_delta" in kinds:
            told["compared"] = compared(wanted.task_delta, list(request.prompt_token_ids), tokenizer)
        params.extra_args = {**extra, KEY: told}
        changes_cache = wanted.delta is not None or wanted.mask is not None or wanted.dynamic_k is not None
        salt = [request.cache_salt or "", "ttrouting", wanted.digest]
        if kinds and "scmoe" not in kinds:
            # what is learned from a whole prompt must not serve another prompt that begins like it
            ids = json.dumps(list(request.prompt_token_ids)).encode()
            salt.append(hashlib.sha256(ids).hexdigest()[:32])
            params.skip_reading_prefix_cache = True
            changes_cache = True
        if changes_cache:  # the strong stream of SCMoE alone may share the plain requests' cache
            request.cache_salt = "|".join(salt)

    def _check_pair_fits(self, tokens: int) -> None:
        cache = self.vllm_config.cache_config
        if not cache.num_gpu_blocks:
            return
        tokens = min(tokens, self.vllm_config.model_config.max_model_len)
        blocks = 2 * -(-tokens // cache.block_size) + 1  # vLLM keeps one for itself
        if blocks > cache.num_gpu_blocks:
            raise UnsupportedCallError(
                f"scmoe keeps two caches: {blocks} blocks of {cache.block_size} tokens, this engine has "
                f"{cache.num_gpu_blocks}. Ask for fewer tokens, or start the engine with a larger cache."
            )


def _admission(processor: Any) -> Admission:
    found = getattr(processor, "ttrouting", None)
    if found is None:
        found = processor.ttrouting = Admission(processor.vllm_config)
    return found


def _refuse(error: TTRoutingError) -> VLLMValidationError:
    return VLLMValidationError(f"ttrouting: {error}", parameter="vllm_xargs.ttrouting")


def _process_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        value = asked(params)
        if value is ABSENT:
            return original(self, request_id, prompt, params, *args, **kwargs)
        admission = _admission(self)
        try:
            data, wanted = admission.check(value, params)
        except TTRoutingError as error:
            raise _refuse(error) from error
        request = original(self, request_id, prompt, params, *args, **kwargs)
        try:
            admission.admit(request, data, wanted, self.tokenizer)
        except TTRoutingError as error:
            raise _refuse(error) from error
        return request

    return process_inputs


def _needs_facts(engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    params = kwargs.get("params", args[2] if len(args) > 2 else None)
    if asked(params) is ABSENT:
        return False
    admission = _admission(engine.input_processor)
    return admission.settings is not None and admission.facts is None


def _add_request(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _needs_facts(self, args, kwargs):
            facts = self.collective_rpc("ttrouting_facts")
            self.input_processor.ttrouting.facts = Facts.from_dict(facts[0])
        return original(self, *args, **kwargs)

    return add_request


def _add_request_async(original: Callable[..., Any]) -> Callable[..., Any]:
    async def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _needs_facts(self, args, kwargs):
            facts = await self.collective_rpc("ttrouting_facts")
            self.input_processor.ttrouting.facts = Facts.from_dict(facts[0])
        return await original(self, *args, **kwargs)

    return add_request


def _beam_search_params(original: Callable[..., Any]) -> Callable[..., Any]:
    def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.vllm_xargs and KEY in self.vllm_xargs:
            raise _refuse(UnsupportedCallError("vLLM's beam search drops vllm_xargs. Sample, or use transformers."))
        return original(self, *args, **kwargs)

    return to_beam_search_params


def install() -> None:
    """Wrap the entrances of vLLM's front end."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.llm_engine import LLMEngine

    wrap(InputProcessor, "process_inputs", _process_inputs)
    wrap(LLMEngine, "add_request", _add_request)
    wrap(AsyncLLM, "add_request", _add_request_async)
    for protocol in (CompletionRequest, ChatCompletionRequest):
        wrap(protocol, "to_beam_search_params", _beam_search_params)
