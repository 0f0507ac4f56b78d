"""Quantised experts, with torchao, on any device: what works equals an oracle, what cannot work says so.

The weights are random: nothing here says what quantisation does to quality.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, TorchAoConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import ttrouting as ttr
from families.build import build
from oracles.double import InDouble
from oracles.plain_router import full_logits, greedy, plain_routing
from oracles.trace import trace
from ttrouting.target import Target

pytest.importorskip("torchao", reason="needs torchao: pip install 'ttrouting[test]'")

from torchao.quantization import (
    Float8WeightOnlyConfig,
    FqnToConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchao", "ignore::DeprecationWarning:torchao")

DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]
LAYERS, EXPERTS = 4, 8
DELTA = torch.linspace(-2, 2, LAYERS * EXPERTS)[torch.randperm(32, generator=torch.Generator().manual_seed(0))]
DELTA = DELTA.view(LAYERS, EXPERTS)


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def experts_only(config):
    return FqnToConfig({r"re:.*experts\.gate_up_proj": config, r"re:.*experts\.down_proj": config})


def new(implementation="eager", config=None):
    """A tiny OLMoE, its experts quantised if a config is given."""
    model = build("olmoe")
    model.generation_config.eos_token_id = None
    model.set_experts_implementation(implementation)
    if config is not None:
        quantize_(model, experts_only(config), filter_fn=None)
    return model


def run(model, ids, strategies, **options):
    with ttr.adapt(model, strategies, no_harm=False) as adapted:
        out = adapted.generate(input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=0, **options)
        return out, adapted.state.tensors


# --- int8 weights: everything works --------------------------------------------------------------------


def test_experts_are_really_packed():
    model = new(config=Int8WeightOnlyConfig())
    for layer in model.model.layers:
        for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            parts = {name: getattr(weight, name) for name in weight.__tensor_flatten__()[0]}
            assert parts["qdata"].dtype == torch.int8
            stored = sum(part.numel() * part.element_size() for part in parts.values())
            assert stored < 0.4 * weight.numel() * 4


def test_tokens_equal_greedy_decoding_with_the_learned_delta_baked_in(device, prompts):
    ids = prompts(24).to(device)
    model = new(config=Int8WeightOnlyConfig()).to(device)
    out, state = run(model, ids, ttr.Rerouting(layers="all", lr=0.3))
    delta = state["rerouting"]["delta"][0]
    assert torch.equal(out, greedy(model, ids, 6, delta=delta))
    assert not torch.equal(out, greedy(model, ids, 6)), "the delta changed nothing: the test cannot tell"


def test_the_gradient_equals_finite_differences_of_the_unpacked_weights_in_double(device, prompts):
    ids = prompts(24)
    model = new(config=Int8WeightOnlyConfig())
    twin = build("olmoe", dtype=torch.float64)
    twin.set_experts_implementation("eager")
    twin.set_attn_implementation("eager")
    for packed, plain in zip(model.model.layers, twin.model.layers, strict=True):
        for name in ("gate_up_proj", "down_proj"):
            unpacked = getattr(packed.mlp.experts, name).dequantize().double()
            assert not torch.equal(unpacked, getattr(plain.mlp.experts, name)), "nothing was rounded"
            getattr(plain.mlp.experts, name).data = unpacked
    one_step = ttr.Rerouting(steps=1, lr=1.0, optimizer="sgd", layers="all")
    _, state = run(model.to(device), ids.to(device), one_step)
    gradient = -state["rerouting"]["delta"][0].cpu().double()  # one step of plain descent from zero

    def loss(delta):
        with torch.no_grad(), InDouble(), plain_routing(twin, delta):
            return F.cross_entropy(full_logits(twin, ids)[0, :-1], ids[0, 1:]).item()

    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        step = 1e-6  # small: the choice of experts must not flip
        expected = (loss(step * direction) - loss(-step * direction)) / (2 * step)
        assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_all_strategies_together_leave_the_packed_weights_as_they_were(device, prompts):
    model = new(config=Int8WeightOnlyConfig()).to(device)
    before = trace(model)
    ids = prompts(20, 24).to(device)
    strategies = [ttr.Rerouting(interval=3), ttr.StaticRouting(delta=DELTA), ttr.DynamicK(p=0.4), ttr.SCMoE()]
    out, _ = run(model, ids, strategies)
    assert not torch.equal(out, run(model, ids, [])[0])
    assert trace(model) == before


def test_a_model_that_from_pretrained_quantises_is_the_same(tmp_path, prompts):
    new().save_pretrained(tmp_path)
    config = TorchAoConfig(experts_only(Int8WeightOnlyConfig()))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    loaded.set_experts_implementation("eager")
    loaded.generation_config.eos_token_id = None
    assert type(loaded.model.layers[0].mlp.experts.down_proj).__name__ == "Int8Tensor"
    ids = prompts(24)
    strategies = [ttr.Rerouting(layers="all", lr=0.3), ttr.DynamicK(p=0.4), ttr.SCMoE()]
    assert torch.equal(run(loaded, ids, strategies)[0], run(new(config=Int8WeightOnlyConfig()), ids, strategies)[0])


def test_a_quantised_router_is_seen_and_edited(prompts):
    """torchao's linear is still torch's `linear`, so the taps meet it."""
    ids = prompts(12)
    model, twin = new(), new()
    quantize_(model, FqnToConfig({r"re:.*mlp\.gate\.weight": Int8WeightOnlyConfig()}), filter_fn=None)
    for packed, plain in zip(model.model.layers, twin.model.layers, strict=True):
        assert type(packed.mlp.gate.weight).__name__ == "Int8Tensor"
        plain.mlp.gate.weight.data = packed.mlp.gate.weight.dequantize()
    with ttr.adapt(model, ttr.StaticRouting(delta=DELTA)) as adapted, plain_routing(twin, DELTA):
        expected = full_logits(twin, ids)
        assert torch.allclose(adapted(input_ids=ids).logits, expected, atol=1e-4)
    assert not torch.allclose(full_logits(twin, ids), expected, atol=1e-2), "the delta changed nothing"


def test_the_fingerprint_is_of_the_router():
    def of(model):
        return Target(model, ttr.find_sites(model)).fingerprint

    plain, experts, router = new(), new(config=Int8WeightOnlyConfig()), new()
    quantize_(router, FqnToConfig({r"re:.*mlp\.gate\.weight": Int8WeightOnlyConfig()}), filter_fn=None)
    assert of(experts) == of(plain)
    assert of(router) != of(plain)


# --- kernels without a backward pass: Rerouting alone is refused -----------------------------------------


@torch.library.custom_op("ttrouting_tests::experts", mutates_args=())
def opaque_experts(
    hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """A fused kernel as many are: a forward pass, and nothing registered for the other direction."""
    out = torch.zeros_like(hidden)
    for row in range(hidden.shape[0]):
        for expert, weight in zip(ids[row].tolist(), weights[row], strict=True):
            gate, value = (up[expert] @ hidden[row]).chunk(2)
            out[row] += weight * (down[expert] @ (F.silu(gate) * value))
    return out


@pytest.fixture
def opaque():
    """The name of that kernel among transformers' experts implementations."""

    def forward(experts, hidden, ids, weights):
        return opaque_experts(hidden, ids, weights, experts.gate_up_proj, experts.down_proj)

    name = "ttrouting_tests_opaque"
    ALL_EXPERTS_FUNCTIONS.register(name, forward)
    yield name
    ALL_EXPERTS_FUNCTIONS._global_mapping.pop(name)


BAD = {
    "raises": ("grouped_mm", Float8WeightOnlyConfig, "'grouped_mm'", "'eager'"),
    "detaches": ("eager", Int8DynamicActivationInt8WeightConfig, "detached", "without their activations"),
    "unregistered": ("opaque", None, "no autograd formula was registered", "'eager'"),
}


@pytest.fixture(params=BAD)
def bad(request, opaque):
    """`(model, words of the reason, words of the next action)`."""
    implementation, config, reason, action = BAD[request.param]
    model = new(opaque if implementation == "opaque" else implementation, config and config())
    return model, reason, action


def test_rerouting_is_refused_with_the_reason_and_the_next_action(bad):
    model, reason, action = bad
    before = trace(model)
    for strategies in (ttr.Rerouting(), [ttr.DynamicK(), ttr.Rerouting()]):
        with pytest.raises(ttr.UnsupportedModelError, match="rerouting needs gradients") as error:
            ttr.adapt(model, strategies)
        assert reason in str(error.value)
        assert action in str(error.value)
    assert trace(model) == before


def near_greedy(model, out, start):
    """Whether a full forward with the delta makes each written token its best, or as good as that.

    Activations that are quantised as they come round otherwise beside a cache: what is nearly a tie falls either way.
    """
    with plain_routing(model, delta=DELTA):
        logits = full_logits(model, out)[:, start - 1 : -1]
    written = logits.gather(-1, out[:, start:, None])[..., 0]
    return bool((logits.amax(-1) - written < 0.02 * logits.std()).all())


def test_the_other_strategies_work_there(bad, prompts):
    model, ids = bad[0], prompts(10)
    out, _ = run(model, ids, ttr.StaticRouting(delta=DELTA))
    assert near_greedy(model, out, ids.shape[1])
    plain = run(model, ids, [])[0]
    assert not near_greedy(model, plain, ids.shape[1]), "the delta changed nothing: the test cannot tell"
    for strategy in (ttr.DynamicK(p=0.2), ttr.SCMoE(beta=2.0), ttr.StaticRouting(mask=DELTA < 1)):
        assert not torch.equal(run(model, ids, strategy)[0], plain)


def test_one_layer_without_a_backward_pass_is_enough():
    model = new()
    config = FqnToConfig({r"re:.*layers\.2\.mlp\.experts\..*_proj": Int8DynamicActivationInt8WeightConfig()})
    quantize_(model, config, filter_fn=None)
    assert type(model.model.layers[1].mlp.experts.down_proj) is nn.Parameter
    assert type(model.model.layers[2].mlp.experts.down_proj) is not nn.Parameter
    with pytest.raises(ttr.UnsupportedModelError, match="detached"):
        ttr.adapt(model, ttr.Rerouting())


def test_sensitivities_are_refused_there_too(bad, tokenizer):
    with pytest.raises(ttr.UnsupportedModelError, match="sensitivity"):
        ttr.calibrate(bad[0], tokenizer, ["pack my box with five dozen jugs"], mean_k=2.0, rule="sensitivity")


# --- what nothing can be done with -----------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_packed_weights_that_a_kernel_cannot_take_are_refused_with_the_one_that_can(implementation):
    model = new(implementation, Int8WeightOnlyConfig())
    before = trace(model)
    with pytest.raises(ttr.UnsupportedModelError, match="cannot run a plain forward") as error:
        ttr.adapt(model, ttr.DynamicK())
    assert "unimplemented operator" in str(error.value)
    assert "set_experts_implementation('eager')" in str(error.value)
    assert trace(model) == before
    model.set_experts_implementation("eager")
    ttr.adapt(model, ttr.DynamicK()).close()


class Packed(nn.Module):
    """A quantised linear with a product of its own: no tap can see into it."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.abs().max().item() / 127
        self.register_buffer("packed", (linear.weight / self.scale).round().to(torch.int8))

    def forward(self, x):
        return torch.matmul(x, self.packed.T.to(x.dtype)) * self.scale


@pytest.mark.parametrize(("family", "linear"), [("jamba", "router"), ("dbrx", "router.layer")])
def test_a_router_inside_an_opaque_kernel_is_refused_by_name(family, linear):
    model = build(family)
    first = ttr.find_sites(model)[0].name
    path = f"{first}.{linear}"
    model.set_submodule(path, Packed(model.get_submodule(path)))
    before = trace(model)
    with pytest.raises(ttr.UnsupportedModelError, match="was not seen at work") as error:
        ttr.adapt(model, ttr.DynamicK())
    assert first in str(error.value)
    assert "0 linear layers" in str(error.value)
    assert "keep its router unquantised" in str(error.value)
    assert trace(model) == before
