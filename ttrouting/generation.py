"""The seam to the model's own `generate`: what is checked before it, and what happens in its loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from ttrouting.context import Context
from ttrouting.endings import Endings
from ttrouting.errors import ConfigError, UnsupportedCallError
from ttrouting.plan import Plan
from ttrouting.sites import NO_BEAMS, text_config

REFUSED_ARGUMENTS = {
    "past_key_values": "its entries were computed under another routing; pass the whole text instead",
    "assistant_model": "the draft model's tokens would be checked under a changing routing",
    "prompt_lookup_num_tokens": "assisted decoding re-uses cache entries across routings",
    "assistant_early_exit": "assisted decoding re-uses cache entries across routings",
    "use_mtp": "assisted decoding re-uses cache entries across routings",
    "custom_generate": "it replaces the decoding loop that adaptation hooks into",
    "encoder_outputs": "encoder-decoder models are not supported",
    "inputs_embeds": "adaptation reads token ids; pass input_ids",
    "guidance_scale": "classifier-free guidance keeps a second cache that adaptation cannot reach",
    "negative_prompt_ids": "classifier-free guidance keeps a second cache that adaptation cannot reach",
}
NEUTRAL = {"guidance_scale": 1, "use_mtp": False}  # values that switch nothing on


def option(model: Any, arguments: dict[str, Any], name: str, default: Any = None) -> Any:
    """A generation option as `generate` will see it: argument, then config argument, then the model's own."""
    if arguments.get(name) is not None:
        return arguments[name]
    for config in (arguments.get("generation_config"), getattr(model, "generation_config", None)):
        value = getattr(config, name, None)
        if value is not None:
            return value
    return default


def most_new_tokens(model: Any, arguments: dict[str, Any]) -> int | None:
    """How many tokens `generate` may add, None if its default decides."""
    new = option(model, arguments, "max_new_tokens")
    longest, ids = option(model, arguments, "max_length"), arguments.get("input_ids")
    if new is None and longest is not None and isinstance(ids, Tensor) and ids.dim() == 2:
        return max(0, longest - ids.shape[1])
    return new


def find_endings(model: Any, arguments: dict[str, Any]) -> Endings:
    """The ids by which `generate` ends and pads sequences; it pads with the first end-of-sequence id by default."""
    eos = option(model, arguments, "eos_token_id")
    if eos is None:  # then it pads nothing
        return Endings()
    found = torch.as_tensor(eos).flatten().tolist()
    pad = option(model, arguments, "pad_token_id", found[0])
    return Endings(tuple(found), int(pad))


def check_model_call(model: Any) -> None:
    """Refuse modes in which no adapted call can work."""
    if torch.is_inference_mode_enabled():
        raise UnsupportedCallError(
            "Adapted calls do not run under torch.inference_mode(): tensors made there can never take part in "
            "an optimisation. Use torch.no_grad() instead."
        )
    if model.training:
        raise UnsupportedCallError(
            f"{type(model).__name__} is in training mode, where routers may be noisy. Call model.eval() first."
        )


def check_generate_call(plan: Plan, arguments: dict[str, Any]) -> None:
    """Refuse what cannot be done with `generate`, each with the next action."""
    model = plan.target.model
    if not getattr(model, "can_generate", lambda: False)():
        raise UnsupportedCallError(
            f"{type(model).__name__} cannot generate (no language-model head). Load the ...ForCausalLM class, or "
            "call the adapted model for a plain forward."
        )
    for name, reason in REFUSED_ARGUMENTS.items():
        value = option(model, arguments, name)  # also where a generation config asks for it
        if value is not None and not (name in NEUTRAL and value == NEUTRAL[name]):
            raise UnsupportedCallError(
                f"generate({name}=...) cannot be adapted: {reason}. Leave it out, or call the model itself."
            )
    if plan.decoding is not None and _early_cache(model, arguments):
        raise UnsupportedCallError(
            f"{plan.decoding.name} does not work with prefill_chunk_size beside a static cache, which is laid out "
            "before its second rows exist. Leave one of the two out."
        )
    beams = option(model, arguments, "num_beams", 1)
    if beams == 1:
        return
    if plan.decoding is not None:
        raise UnsupportedCallError(
            f"{plan.decoding.name} does not work with num_beams={beams}: a beam reorder would drop its second "
            "rows. Use num_beams=1."
        )
    if any(NO_BEAMS in site.limits for site in plan.target.sites):
        raise UnsupportedCallError(
            f"{type(model).__name__} does not work with num_beams={beams}: {NO_BEAMS}. Use num_beams=1."
        )
    new = most_new_tokens(model, arguments)
    if plan.interval is not None and (new is None or new > plan.interval):
        raise UnsupportedCallError(
            f"Adaptation every {plan.interval} tokens does not work with num_beams={beams}: beams share one "
            "adaptation. Use interval=None to adapt on the prompt only, or num_beams=1."
        )


def can_hand_over(plan: Plan, context: Context, arguments: dict[str, Any]) -> bool:
    """Whether `generate` can go on from a cache that was filled before it, with all but the last prompt token.

    Not where it lays out a cache of its own or reads the prompt its own way, and not under a decoding strategy,
    whose further rows have caches too. Strategies that read the prompt try the model's head when they are planned.
    """
    model = plan.target.model
    own = "_prepare_position_ids_for_generation" in type(model).__dict__  # multi-axis positions
    options = ("cache_implementation", "prefill_chunk_size")
    return (
        plan.decoding is None
        and plan.target.proven.get("head", False)
        and not own
        and context.ids.shape[1] > 1
        and bool(context.head().mask.any(1).all())
        and option(model, arguments, "use_cache", True) is not False
        and all(option(model, arguments, name) is None for name in options)
        and not context.inputs
    )


def _early_cache(model: Any, arguments: dict[str, Any]) -> bool:
    kind = option(model, arguments, "cache_implementation", "")
    return "static" in str(kind) and option(model, arguments, "prefill_chunk_size") is not None


def check_ids(ids: Any) -> Tensor:
    """Token ids `[B, T]`, or a `ConfigError`."""
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        found = f"a tensor of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ConfigError(f"An adapted call needs input_ids of shape [batch, tokens], got {found}.")
    return ids


def check_inputs(model: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
    """The mask of real tokens, `[B, T]` bool.

    Raises:
        ConfigError: a mask of another shape, or a sequence without a token.
        UnsupportedCallError: inputs and model are on different devices.
    """
    _check_device(model, ids)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(ids.device, torch.bool)
    if real.shape != ids.shape:
        raise ConfigError(
            f"attention_mask has shape {tuple(real.shape)} beside input_ids of shape {tuple(ids.shape)}. Pass both "
            "as the tokenizer gave them."
        )
    if ids.shape[1] == 0 or not bool(real.any(1).all()):
        raise ConfigError("A prompt is empty. Give every sequence at least one token.")
    return real


def check_prompt(model: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
    """The prompt's mask of real tokens, `[B, T]` bool.

    Raises:
        ConfigError: as in `check_inputs`; right padding, or a prompt longer than the context.
        UnsupportedCallError: as in `check_inputs`.
    """
    real = check_inputs(model, ids, mask)
    if not bool(real[:, -1].all()):
        raise ConfigError("The prompt is padded on the right. Pad on the left: tokenizer.padding_side = 'left'.")
    text = text_config(model.config)
    longest, limit = int(real.sum(1).max()), getattr(text, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise ConfigError(f"The prompt has {longest} tokens, the model's context {limit}. Shorten the prompt.")
    return real


def _check_device(model: Any, ids: Tensor) -> None:
    home = model.get_input_embeddings().weight.device
    mapped = home.type == "meta" or getattr(model, "hf_device_map", None)  # accelerate moves inputs itself
    if ids.is_meta or (not mapped and ids.device != home):
        raise UnsupportedCallError(
            f"input_ids are on {ids.device}, the model's embedding on {home}. Move them: "
            "inputs = inputs.to(model.device)."
        )


def infer_mask(model: Any, arguments: dict[str, Any], ids: Tensor) -> Tensor | None:
    """The mask that `generate` would assume without one: padding ids, unless they also end sequences."""
    pad = option(model, arguments, "pad_token_id")
    eos = option(model, arguments, "eos_token_id")
    ends = tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
    if pad is None or pad in ends:
        return None
    return ids != pad


def experts_implementation(model: Any) -> Any:
    """Which experts implementation the model and its parts run with."""
    read = getattr(model, "get_experts_implementation", None)
    return None if read is None else read()


@contextmanager
def using_experts(model: Any, implementation: Any) -> Iterator[None]:
    """Run with this implementation inside the block.

    On devices other than the CPU `generate` switches to `batched_mm` for its loop, which copies the weights of each
    token's experts: fine for one token a row, out of memory for a whole text.
    """
    now = experts_implementation(model)
    switch = now != implementation
    if switch:
        model.set_experts_implementation(implementation)
    try:
        yield
    finally:
        if switch:
            model.set_experts_implementation(now)


class EveryInterval(StoppingCriteria):
    """A criterion that never stops: it calls back every `interval` generated tokens."""

    def __init__(self, interval: int, prompt: int, last: int | None, call: Callable[[Tensor], None]) -> None:
        self.interval = interval
        self.prompt = prompt
        self.last = last
        self.call = call

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        new = input_ids.shape[1] - self.prompt
        if new and new % self.interval == 0 and (self.last is None or new < self.last):
            self.call(input_ids)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
