"""Which routers has the engine's model, what are their rules, and what cannot run on them?"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from ttrouting.errors import NotMoEError, TTRoutingError, UnsupportedModelError
from ttrouting.scoring import infer_weight_rule
from ttrouting.sites import candidates
from ttrouting.target import Target
from ttrouting.vllm.routing import Layer, Parts, Taps
from ttrouting.vllm.settings import Settings
from ttrouting.vllm.slots import Slots
from ttrouting.vllm.spec import PAIRED, Facts, parse

logger = logging.getLogger(__name__)

PROBES = 64  # rows of random logits that show a router's rule


def check_engine(vllm_config: Any) -> None:
    """Refuse layouts in which the taps were not tried, at the start of an engine.

    Raises:
        UnsupportedModelError: with what to change.
    """
    parallel = vllm_config.parallel_config
    wrong = {
        "--pipeline-parallel-size above 1": parallel.pipeline_parallel_size > 1,
        "--data-parallel-size above 1": parallel.data_parallel_size > 1,
        "--enable-expert-parallel": parallel.enable_expert_parallel,
        "--enable-eplb": getattr(parallel, "enable_eplb", False),
        "--enable-dbo": getattr(parallel, "enable_dbo", False),
        "--decode-context-parallel-size above 1": getattr(parallel, "decode_context_parallel_size", 1) > 1,
        "--prefill-context-parallel-size above 1": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
    }
    found = [option for option, given in wrong.items() if given]
    if found:
        raise UnsupportedModelError(
            f"ttrouting was not tried with {' and '.join(found)}, and would not be applied for certain. "
            "Start without, or without ttrouting in --additional-config; --tensor-parallel-size works."
        )
    if vllm_config.model_config.runner_type != "generate":
        raise UnsupportedModelError("ttrouting adapts generating models. Start without it for pooling.")


def moe_runners(vllm_config: Any) -> dict[str, Any]:
    """vLLM's MoE layers by module path, in forward order."""
    context = vllm_config.compilation_config.static_forward_context
    return {name: context[name] for name in vllm_config.compilation_config.static_all_moe_layers}


def find_layers(vllm_config: Any, device: torch.device) -> list[Layer]:
    """The routers of the loaded model, probed on random logits.

    Raises:
        NotMoEError: there is none. UnsupportedModelError: a kernel that routes by itself, or a router that cannot
            be probed.
    """
    runners = moe_runners(vllm_config)
    if not runners:
        raise NotMoEError("ttrouting found no MoE layer in this engine. Start without it.")
    found = []
    for index, (name, runner) in enumerate(runners.items()):
        router = runner.router
        if runner.is_monolithic:
            raise UnsupportedModelError(
                f"The MoE kernel of {name} ({type(runner.routed_experts.quant_method).__name__}) routes by itself, "
                "where nothing can be changed. Start with --moe-backend triton."
            )
        if type(router).__name__ in ("ZeroExpertRouter", "RoutingSimulatorRouter"):
            raise UnsupportedModelError(f"{name} has a {type(router).__name__}, which ttrouting was not tried with.")
        found.append(_probe(index, name, runner, router, vllm_config.model_config.dtype, device))
    return found


@torch.inference_mode()
def _probe(index: int, name: str, runner: Any, router: Any, dtype: torch.dtype, device: torch.device) -> Layer:
    generator = torch.Generator().manual_seed(index)
    size = router.global_num_experts
    logits = torch.randn(PROBES, size, generator=generator).to(device)  # [N, E]
    hidden = torch.zeros(PROBES, runner.moe_config.hidden_dim, dtype=dtype, device=device)
    try:
        weights, ids = router._compute_routing(hidden, logits, torch.int32)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"The router of {name} ({type(router).__name__}) does not choose by logits alone ({error}), so that "
            "ttrouting cannot steer it. Start without ttrouting."
        ) from error
    rule = infer_weight_rule(logits.cpu(), None, ids.long().cpu(), weights.float().cpu(), 1e-3)
    return Layer(
        index=index,
        name=name,
        size=size,
        top_k=ids.shape[1],
        rule=rule,
        bias=getattr(router, "e_score_correction_bias", None),
        scale=float(getattr(runner, "routed_scaling_factor", 1.0)),
    )


def refusals(vllm_config: Any, layers: list[Layer], settings: Settings) -> dict[str, str]:
    """By strategy name (or part), why requests that want it are refused."""
    found = {}
    grouped = [
        layer.name
        for layer, runner in zip(layers, moe_runners(vllm_config).values(), strict=True)
        if layer.bias is not None or (getattr(runner.router, "num_expert_group", None) or 1) > 1
    ]
    if grouped:
        found["mask"] = (
            f"Masks do not run in vLLM on routers with groups or a correction bias ({grouped[0]}): a masked expert "
            "could still be chosen. Use transformers, or a negative delta."
        )
    names = {
        "delta": ("static_routing", "task_delta", "rerouting"),
        "dynamic_k": ("dynamic_k",),
        "scmoe": ("scmoe",),
        "c3po": ("c3po",),
        "mask": ("mask", "expert_mask"),
    }
    for part, strategies in names.items():
        if part not in settings.parts:
            for name in strategies:
                found[name] = f"This engine was started without {part!r} in additional_config.ttrouting.parts."
    scheduler = vllm_config.scheduler_config
    paired = {
        "speculative decoding": vllm_config.speculative_config is not None,
        "--async-scheduling (start with --no-async-scheduling)": scheduler.async_scheduling,
        "--scheduling-policy priority": scheduler.policy != "fcfs",
        "--max-num-seqs 1": scheduler.max_num_seqs < 2,
        "vLLM's V2 model runner (start with VLLM_USE_V2_MODEL_RUNNER=0)": vllm_config.use_v2_model_runner,
    }
    for name in PAIRED:
        for what, is_so in paired.items():
            if is_so and name not in found:
                found[name] = f"{name} does not run with {what}."
    return found


def fingerprint(vllm_config: Any, model: nn.Module, layers: list[Layer]) -> str:
    """The model's fingerprint as `ttrouting.target` computes it with transformers; empty if that is not possible."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(vllm_config.model_config.model, trust_remote_code=False)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        sites = candidates(skeleton)
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError, KeyError, ImportError) as error:
        logger.warning("ttrouting cannot tell which model this is (%s): artefacts are not checked.", error)
        return ""
    modules = dict(model.named_modules())
    if len(sites) != len(layers):
        return ""
    described = []
    for site, layer in zip(sites, layers, strict=True):
        block = modules.get(layer.name.rpartition(".")[0])
        gate = next(
            (m for n, m in (block.named_children() if block is not None else ()) if n in ("gate", "router")), None
        )
        names = [n for n, _ in site.router.named_parameters()]
        if gate is None or names != ["weight"] or getattr(gate, "weight", None) is None:
            return ""
        weight = _weight(gate, int(site.router.get_parameter("weight").shape[1]), vllm_config.model_config.dtype)
        described.append(_Site(site.name, layer.size, layer.top_k, _Router(weight)))
    whole = _Routers(config, [site.router for site in described])
    return Target(whole, described).fingerprint  # type: ignore[arg-type]


@torch.inference_mode()
def _weight(gate: Any, hidden: int, dtype: torch.dtype) -> Tensor:
    """`[E, H]`: on CPUs vLLM packs a linear's weight away, but the identity still goes through it."""
    if gate.weight.numel():
        return gate.weight
    found = gate(torch.eye(hidden, dtype=dtype))
    return (found[0] if isinstance(found, tuple) else found).T.contiguous()


class _Router(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)


class _Site:
    """What a fingerprint asks a site for."""

    def __init__(self, name: str, num_experts: int, top_k: int, router: nn.Module) -> None:
        self.name, self.num_experts, self.top_k, self.router = name, num_experts, top_k, router


class _Routers(nn.Module):
    """A model of which only the configuration and the routers are known."""

    def __init__(self, config: Any, routers: list[nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.routers = nn.ModuleList(routers)


class Attached:
    """The plugin at work on one model.

    Attributes:
        layers: its routers. facts: for the front end. slots, taps: see there. settings: of the engine.
    """

    def __init__(self, vllm_config: Any, model: nn.Module, settings: Settings, device: torch.device) -> None:
        check_engine(vllm_config)
        settings.check()
        self.settings = settings
        self.layers = find_layers(vllm_config, device)
        scheduler = vllm_config.scheduler_config
        slots = scheduler.max_num_seqs + 1
        sizes = tuple(layer.size for layer in self.layers)
        tokens = max(scheduler.max_num_batched_tokens, scheduler.max_num_seqs) + 512  # graphs pad
        self.slots = Slots(len(self.layers), slots, max(sizes), tokens, device)
        parts = Parts(**{part: part in settings.parts for part in ("delta", "mask", "dynamic_k", "scmoe", "c3po")})
        eager = vllm_config.model_config.enforce_eager
        self.taps = Taps(self.slots, parts, always=device.type != "cpu" and not eager)
        self.facts = Facts(
            layers=len(self.layers),
            experts=max(sizes),
            top_k=tuple(layer.top_k for layer in self.layers),
            sizes=sizes,
            scorings=tuple(layer.rule.scoring for layer in self.layers),
            refusals=refusals(vllm_config, self.layers, settings),
            fingerprint=fingerprint(vllm_config, model, self.layers),
        )
        self._check_artefacts()
        for layer, runner in zip(self.layers, moe_runners(vllm_config).values(), strict=True):
            runner.router._compute_routing = self.taps.tap(layer, runner.router._compute_routing)

    def _check_artefacts(self) -> None:
        """An artefact that does not fit stops the start."""
        for name in self.settings.artefacts:
            try:
                parse({"strategies": [{"artefact": name}]}, self.settings, self.facts)
            except TTRoutingError as error:
                raise type(error)(f"Artefact {name!r}: {error}") from error
        for name in self.settings.refsets:
            if self.facts.fingerprint:
                self.settings.refset(name).check_model(self.facts.fingerprint)
