"""The experts implementation `ttrouting` on a CPU: values, gradients, what is computed, and the way back.

Legend: `N` tokens, `H` hidden size, `E` experts, `K` columns. The oracles are transformers' own eager loops in the
family's file, and for OLMoE the formula in numpy.
"""

import gc
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, Qwen3VLMoeForConditionalGeneration
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import ttrouting as ttr
from families.build import build, tiny_config
from families.expected import EXPECTED
from ttrouting.kernels import NAME, cpu, ragged_experts_forward, skipping
from ttrouting.kernels.grouped import grouped_forward
from ttrouting.kernels.lean import lean_forward, wants_edits_only

SERVED = [family for family, expected in EXPECTED.items() if expected.implementations != ("eager",)]
# one family for each way that weights are laid out and used; `test_no_layout_is_forgotten` compares with the sources
LAYOUTS = {
    "olmoe": "",
    "aria_text": "is_transposed=True",
    "gpt_oss": "is_concatenated=False, is_transposed=True, has_bias=True",
    "openai_privacy_filter": "is_transposed=True, has_bias=True",
    "nemotron_h": "has_gate=False",
    "deepseek_v4": "",  # a gate of its own
}
MASKS = {"all": 1.0, "half": 0.5, "few": 0.1, "none": 0.0}


def served(module):
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate")


def new_experts(family="olmoe", dtype=torch.float32, seed=0):
    """One experts module with weights of a size that matters, and its input width."""
    module = next(m for m in build(family).modules() if served(m)).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        with torch.no_grad():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    first = module.gate_up_proj if module.has_gate else module.up_proj
    return module, first.shape[1 if module.is_transposed else 2]


def choice(module, width, tokens, kept=0.5, columns=3, dtype=torch.float32, seed=0):
    """`hidden [N, H]`, `ids [N, K]` distinct in a row, `weights [N, K]`, 0 where dropped."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator)
    ids = torch.rand(tokens, module.num_experts, generator=generator).argsort(-1)[:, :columns]
    weights = 0.1 + torch.rand(tokens, columns, generator=generator)
    mask = torch.rand(tokens, columns, generator=generator) < kept
    return hidden.to(dtype), ids, (weights * mask).to(dtype)


def eager(module, *inputs):
    """The loop in the family's own file."""
    return type(module).forward.__wrapped__(module, *inputs)


def gradients(run, module, hidden, ids, weights):
    """Gradients of hidden states, pairs' weights and parameters, for a loss that weighs every output differently."""
    hidden, weights = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
    wanted = [hidden, weights, *module.parameters()]
    out = run(module, hidden, ids, weights)
    loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out).to(out)).sum()
    return torch.autograd.grad(loss, wanted, allow_unused=True)


def poison(module, ids, weights):
    """NaN in all experts that no kept pair needs."""
    needed = set(ids[weights != 0].tolist())
    with torch.no_grad():
        for parameter in module.parameters():
            for e in set(range(module.num_experts)) - needed:
                parameter[e] = float("nan")
    assert len(needed) < module.num_experts


# --- values and gradients ---------------------------------------------------------------------------------


def test_values_are_the_formula():
    module, width = new_experts(dtype=torch.float64)
    hidden, ids, weights = choice(module, width, 9, dtype=torch.float64)
    up, down = module.gate_up_proj.detach().numpy(), module.down_proj.detach().numpy()
    expected = np.zeros((9, width))
    for n in range(9):
        for e, w in zip(ids[n].tolist(), weights[n].tolist(), strict=True):
            gate, linear = np.split(up[e] @ hidden[n].numpy(), 2)
            expected[n] += w * (down[e] @ (gate / (1 + np.exp(-gate)) * linear))
    with torch.no_grad():
        made = ragged_experts_forward(module, hidden, ids, weights)
    np.testing.assert_allclose(made.numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("family", SERVED)
@torch.no_grad()
def test_values_in_every_family(family):
    model = build(family)
    with skipping(model) as switched:
        assert switched
    module = next(m for m in model.modules() if served(m))
    first = module.gate_up_proj if module.has_gate else module.up_proj
    inputs = choice(module, first.shape[1 if module.is_transposed else 2], 11)
    expected = eager(module, *inputs)
    for run in (ragged_experts_forward, grouped_forward):
        torch.testing.assert_close(run(module, *inputs), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("many_rows", [cpu.MANY_ROWS, 1], ids=["", "in turn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("family", LAYOUTS)
@torch.no_grad()
def test_values_at_every_density(family, dtype, many_rows, monkeypatch):
    """One token, few tokens, few to an expert, many and very many to an expert take different ways."""
    monkeypatch.setattr(cpu, "MANY_ROWS", many_rows)
    module, width = new_experts(family, dtype)
    tolerance = 1e-5 if dtype == torch.float32 or family == "openai_privacy_filter" else 1e-12  # it computes in fp32
    for tokens in (0, 1, 2, 7, 13, 60):
        for kept in MASKS.values():
            inputs = choice(module, width, tokens, kept, dtype=dtype, seed=tokens)
            expected = eager(module, *inputs)
            for run in (ragged_experts_forward, grouped_forward):
                if tokens:
                    made = run(module, *inputs)
                    torch.testing.assert_close(made, expected, atol=tolerance, rtol=tolerance)
            assert ragged_experts_forward(module, *inputs).shape == expected.shape


@torch.no_grad()
def test_values_where_rows_are_long(monkeypatch):
    """Experts of a usual size are read as they are, in fp32 too."""
    module, width = new_experts()
    monkeypatch.setattr(cpu, "SHORT_ROW", 0)
    for tokens in (1, 13, 60):
        inputs = choice(module, width, tokens)
        made = ragged_experts_forward(module, *inputs)
        torch.testing.assert_close(made, eager(module, *inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", LAYOUTS)
def test_gradients(family):
    module, width = new_experts(family, torch.float64)
    tolerance = 1e-5 if family == "openai_privacy_filter" else 1e-10
    for tokens in (1, 12):
        hidden, ids, weights = choice(module, width, tokens, dtype=torch.float64)
        expected = list(gradients(eager, module, hidden, ids, weights))
        expected[1] = expected[1] * (weights != 0)  # dropped pairs have no gradient
        for run in (ragged_experts_forward, grouped_forward):
            for new, old in zip(gradients(run, module, hidden, ids, weights), expected, strict=True):
                torch.testing.assert_close(new, old, atol=tolerance, rtol=tolerance)


def test_a_mask_that_drops_gets_the_same_gradient():
    """What a strategy does: weights times a mask. Behind the mask nothing differs from computing every pair."""
    module, width = new_experts(dtype=torch.float64)
    hidden, ids, weights = choice(module, width, 12, 1.0, dtype=torch.float64)
    mask = torch.rand(weights.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    found = []
    for run in (eager, ragged_experts_forward):
        raw = weights.clone().requires_grad_()
        out = run(module, hidden, ids, (raw / raw.sum(-1, keepdim=True)) * mask)
        found.append(torch.autograd.grad(out.square().sum(), raw)[0])
    torch.testing.assert_close(found[1], found[0], atol=1e-10, rtol=1e-10)


def test_a_second_gradient():
    module, width = new_experts(dtype=torch.float64)
    hidden, ids, weights = choice(module, width, 3, dtype=torch.float64)
    module.requires_grad_(False)

    def run(x):
        return ragged_experts_forward(module, x, ids, weights)[:, :3]

    assert torch.autograd.gradgradcheck(run, hidden.requires_grad_(), check_undefined_grad=False)


@pytest.mark.parametrize("wide", [False, True], ids=["weights in bf16", "weights in fp32"])
@pytest.mark.parametrize("family", LAYOUTS)
@torch.no_grad()
def test_bf16_is_no_further_off_than_eager(family, wide):
    module, width = new_experts(family, torch.bfloat16)
    precise, _ = new_experts(family, torch.bfloat16)
    precise.double()
    for tokens in (1, 60):
        hidden, ids, weights = choice(module, width, tokens, dtype=torch.bfloat16)
        weights = weights.float() if wide else weights
        expected = eager(precise, hidden.double(), ids, weights.double())
        allowed = 2 * (eager(module, hidden, ids, weights).double() - expected).abs().max()
        allowed += 2**-8 * expected.abs().max()  # one family's own loop is in fp32
        for run in (ragged_experts_forward, grouped_forward):
            made = run(module, hidden, ids, weights)
            assert made.dtype == torch.bfloat16
            assert (made.double() - expected).abs().max() <= allowed


@torch.no_grad()
def test_autocast():
    module, width = new_experts()
    hidden, ids, weights = choice(module, width, 9)
    expected = ragged_experts_forward(module, hidden, ids, weights)
    with torch.autocast("cpu", torch.bfloat16):
        made = ragged_experts_forward(module, hidden, ids, weights)
    assert made.dtype == hidden.dtype
    torch.testing.assert_close(made, expected, atol=0.1, rtol=0.05)
    assert not torch.equal(made, expected)


@pytest.mark.parametrize("run", [ragged_experts_forward, grouped_forward])
@torch.no_grad()
def test_ids_beyond_the_experts_are_skipped(run):
    module, width = new_experts()
    hidden, ids, weights = choice(module, width, 9, 1.0)
    beyond = torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)) < 0.4
    expected = eager(module, hidden, ids, weights * ~beyond)
    for offset in (0, 5):
        made = run(module, hidden, ids.masked_fill(beyond, module.num_experts + offset), weights)
        torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_same_bits_every_time():
    for dtype in (torch.float32, torch.bfloat16):
        module, width = new_experts(dtype=dtype)
        for tokens in (1, 5, 60):
            inputs = choice(module, width, tokens, dtype=dtype)
            first = ragged_experts_forward(module, *inputs)
            assert all(torch.equal(ragged_experts_forward(module, *inputs), first) for _ in range(5))


@torch.no_grad()
def test_a_gate_of_its_own_is_used():
    module, width = new_experts("deepseek_v4")
    module.limit = 0.05  # binds for most values
    inputs = choice(module, width, 9)
    made = ragged_experts_forward(module, *inputs)
    torch.testing.assert_close(made, eager(module, *inputs), atol=1e-6, rtol=1e-5)
    module.limit = 1e9
    assert not torch.allclose(made, eager(module, *inputs))


# --- what is computed, and what is not --------------------------------------------------------------------


@pytest.mark.parametrize("gradient", [False, True], ids=["no gradient", "gradient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", LAYOUTS)
def test_experts_that_nobody_needs_are_not_read(family, dtype, gradient):
    for tokens in (1, 4):
        module, width = new_experts(family, dtype)
        inputs = choice(module, width, tokens, 0.4, columns=4, dtype=dtype, seed=tokens)
        poison(module, *inputs[1:])
        module.requires_grad_(gradient)
        for run in (ragged_experts_forward, grouped_forward):
            assert torch.isfinite(run(module, *inputs)).all()


@torch.no_grad()
def test_multiplications_are_those_of_the_kept_pairs():
    module, width = new_experts(dtype=torch.float64)
    inner = module.down_proj.shape[2]
    for kept in MASKS.values():
        hidden, ids, weights = choice(module, width, 40, kept, dtype=torch.float64)
        with FlopCounterMode(display=False) as counter:
            ragged_experts_forward(module, hidden, ids, weights)
        assert counter.get_total_flops() == int((weights != 0).sum()) * 2 * 3 * inner * width


@pytest.mark.parametrize("run", [ragged_experts_forward, grouped_forward])
@pytest.mark.parametrize("family", LAYOUTS)
def test_memory_that_nobody_wrote_is_not_used(family, run):
    """Deterministic mode fills new memory with NaN; behind the last group a grouped matmul writes nothing."""
    module, width = new_experts(family)
    hidden, ids, weights = choice(module, width, 12, 0.4)
    expected = list(gradients(eager, module, hidden, ids, weights))
    expected[1] = expected[1] * (weights != 0)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        made = run(module, hidden, ids, weights)
        found = gradients(run, module, hidden, ids, weights)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(made, eager(module, hidden, ids, weights), atol=1e-5, rtol=1e-4)
    for new, old in zip(found, expected, strict=True):
        torch.testing.assert_close(new, old, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("family", LAYOUTS)
def test_gradients_of_edits_alone(family, dtype):
    """Frozen experts: each token's hidden state and each kept pair's weight, whoever of them asks."""
    module, width = new_experts(family, dtype)
    module.requires_grad_(False)
    # this family computes in fp32
    tolerance = 1e-4 if dtype == torch.float32 or family == "openai_privacy_filter" else 1e-10
    for tokens in (1, 7, 60):
        for kept in MASKS.values():
            hidden, ids, weights = choice(module, width, tokens, kept, dtype=dtype, seed=tokens)
            for asks in ("hidden", "weights", "both"):
                found = []
                for run in (lean_forward, eager):
                    x, w = hidden.clone(), weights.clone()
                    leaves = {"hidden": [x], "weights": [w], "both": [x, w]}[asks]
                    for leaf in leaves:
                        leaf.requires_grad_()
                    assert wants_edits_only(module, x, w)
                    out = run(module, x, ids, w)
                    pull = torch.linspace(-1, 1, out.numel()).view_as(out).to(out)
                    slopes = torch.autograd.grad((out * pull).sum(), leaves)
                    # a dropped pair gets none: nothing is computed for it
                    found.append(
                        [
                            out,
                            *(s * (weights != 0) if leaf is w else s for s, leaf in zip(slopes, leaves, strict=True)),
                        ]
                    )
                torch.testing.assert_close(*found, atol=tolerance, rtol=tolerance)


def test_gradients_of_edits_alone_keep_one_tensor_a_layer():
    """What autograd keeps beside what is there anyway: what the first matrix gave."""
    module, width = new_experts()
    module.requires_grad_(False)
    hidden, ids, weights = choice(module, width, 40)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lean_forward(module, hidden.requires_grad_(), ids, weights.requires_grad_())
    pairs = int((weights != 0).sum())
    made = [t for t in kept if t is not weights and t.shape[0] != module.num_experts]  # nor views of the matrices
    assert sum(t.numel() for t in made) == pairs * module.gate_up_proj.shape[1]


def test_a_parameter_that_learns_is_no_edit():
    module, width = new_experts()
    hidden, _, weights = choice(module, width, 4)
    assert not wants_edits_only(module, hidden.requires_grad_(), weights)
    module.requires_grad_(False)
    assert wants_edits_only(module, hidden, weights)
    assert not wants_edits_only(module, hidden.detach(), weights)
    with torch.no_grad():
        assert not wants_edits_only(module, hidden, weights)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made, views apart."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in given:
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gradient", [False, True], ids=["no gradient", "gradient"])
def test_no_expert_is_copied(dtype, gradient):
    """With two tokens everything that is made is smaller than one matrix of one expert."""
    module, width = new_experts(dtype=dtype)
    hidden, ids, weights = choice(module, width, 2, dtype=dtype)
    with torch.set_grad_enabled(gradient), Largest() as made:
        ragged_experts_forward(module, hidden, ids, weights)
    assert 0 < made.elements < module.down_proj[0].numel()
    with torch.no_grad(), Largest() as made:
        ALL_EXPERTS_FUNCTIONS["batched_mm"](module, hidden, ids, weights)
    assert made.elements > module.down_proj[0].numel()  # the measure sees a copy


def test_no_layout_is_forgotten():
    """Every way that transformers' files decorate an experts class is one of those tested here."""
    models = Path(transformers.__file__).parent / "models"
    found = set()
    for path in models.glob("*/modeling_*.py"):
        found |= set(re.findall(r"^@use_experts_implementation(?:\((.*)\))?$", path.read_text(), re.MULTILINE))
    assert found == set(LAYOUTS.values())


# --- the switch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", ["eager", "grouped_mm", "batched_mm"])
@torch.no_grad()
def test_nothing_dropped_is_the_models_own_to_the_bit(own, prompts):
    model = build("olmoe")
    model.set_experts_implementation(own)
    ids = prompts(9, 7)
    expected = model(ids).logits
    with skipping(model):
        assert torch.equal(model(ids).logits, expected)


@torch.no_grad()
def test_grouped_is_the_models_own_to_the_bit():
    module, width = new_experts()
    hidden, ids, weights = choice(module, width, 40, 1.0)
    expected = ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, hidden, ids, weights)
    assert torch.equal(grouped_forward(module, hidden, ids, weights), expected)


@pytest.mark.parametrize("own", ["eager", "grouped_mm", "batched_mm"])
@torch.no_grad()
def test_inside_dropped_experts_are_not_read(own):
    model = build("olmoe")
    model.set_experts_implementation(own)
    module = model.model.layers[0].mlp.experts
    _, width = new_experts()
    inputs = choice(module, width, 4, 0.3)
    poison(module, *inputs[1:])
    assert module(*inputs).isnan().any()
    with skipping(model):
        assert torch.isfinite(module(*inputs)).all()
    assert module(*inputs).isnan().any()


def test_the_setting_comes_back(untouched):
    model = build("olmoe")
    with untouched(model):
        with skipping(model), skipping(model) as again:
            assert not again
        with pytest.raises(KeyboardInterrupt), skipping(model):
            raise KeyboardInterrupt


def vision_model():
    text = {k: v for k, v in tiny_config("qwen3_vl_moe_text").to_dict().items() if k != "model_type"}
    eyes = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "deepstack_visual_indexes": [0]}
    config = type(AutoConfig.for_model("qwen3_vl_moe"))(
        text_config=text, vision_config={**eyes, "out_hidden_size": 32}
    )
    return Qwen3VLMoeForConditionalGeneration(config).eval()


@pytest.mark.parametrize("text", ["eager", "batched_mm"])
def test_parts_of_a_model_get_their_own_setting_back(text):
    model = vision_model()
    parts = {"": "grouped_mm", "text_config": text, "vision_config": "grouped_mm"}
    model.set_experts_implementation(parts)
    before = model.get_experts_implementation()
    assert before["text_config"] == text
    with skipping(model) as switched:
        assert switched
        assert model.config.text_config._experts_implementation not in (text, "grouped_mm")
    assert model.get_experts_implementation() == before


@pytest.mark.parametrize(
    "strategy", [ttr.DynamicK(p=0.3), ttr.SCMoE(weak="rank:2", judge_on=None)], ids=lambda s: s.name
)
@pytest.mark.parametrize("own", ["eager", "grouped_mm"])
def test_a_call_multiplies_for_the_experts_that_it_kept(own, strategy, prompts, untouched):
    """The prompt's tokens, and no others: one new token is made of their last logits."""
    model, ids = build("olmoe"), prompts(20, 20)
    model.set_experts_implementation(own)
    inner, width = model.config.intermediate_size, model.config.hidden_size

    def multiplications(generate, rows):
        with FlopCounterMode(display=False) as counter:
            generate(input_ids=ids.repeat(rows, 1), max_new_tokens=1, do_sample=False)
        return counter.get_total_flops()

    with untouched(model), ttr.adapt(model, strategy) as adapted:
        made = multiplications(adapted.generate, 1)
    streams = 2 if strategy.name == "scmoe" else 1
    model.set_experts_implementation("eager")  # the counter does not see into a grouped matmul
    everything = multiplications(model.generate, streams)
    kept = sum(sum(s.experts_per_layer) for s in adapted.report.sequences) * ids.shape[1]
    if strategy.name == "scmoe":  # the report is about the strong stream; a weak token has one expert
        kept += ids.numel() * model.config.num_hidden_layers
    chosen = streams * ids.numel() * model.config.num_hidden_layers * model.config.num_experts_per_tok
    assert 0 < kept < chosen
    assert everything - made == round(chosen - kept) * 2 * 3 * inner * width


def test_a_kernel_that_was_chosen_stays():
    model = build("olmoe")
    for chosen in (NAME, "deepgemm", "sonicmoe"):
        model.set_experts_implementation(chosen)
        with skipping(model) as switched:
            assert not switched
            assert model.config._experts_implementation == chosen


def test_models_without_such_experts_are_left_alone():
    with skipping(torch.nn.Sequential(torch.nn.Linear(2, 2))) as switched:
        assert not switched
    with skipping(build("longcat_flash")) as switched:
        assert not switched


@pytest.mark.filterwarnings("ignore::UserWarning:torchao", "ignore::DeprecationWarning:torchao")
def test_quantised_experts_are_left_alone():
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao: pip install 'ttrouting[test]'")
    model = build("olmoe")
    per_channel = quantization.Int8WeightOnlyConfig()
    regex = {r"re:.*experts\.(gate_up|down)_proj": per_channel}
    quantization.quantize_(model, quantization.FqnToConfig(regex), filter_fn=None)
    assert type(model.model.layers[0].mlp.experts.down_proj) is not torch.nn.Parameter
    with skipping(model) as switched:
        assert not switched


def test_experts_of_another_registry_are_left_alone():
    """FP8 experts ask their own registry, which does not know our name, by the same config."""
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
    from transformers.integrations.moe import use_experts_implementation

    class Eight(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.down_proj = torch.nn.Parameter(torch.ones(8, 2, 2))

        def forward(self, hidden_states, top_k_index, top_k_weights):
            return hidden_states

    model = build("olmoe")
    with skipping(model) as switched:
        assert switched
    other = use_experts_implementation(Eight, experts_interface=ALL_FP8_EXPERTS_FUNCTIONS)
    model.model.layers[1].mlp.experts = other(model.config)
    with skipping(model) as switched:
        assert not switched


@torch.no_grad()
def test_generation_under_dynamic_k(prompts):
    model = build("olmoe")
    model.generation_config.eos_token_id = None
    ids = prompts(12, 9)
    mask = (ids != 0).long()
    kwargs = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    with ttr.adapt(model, ttr.DynamicK(p=0.5)) as adapted:
        expected = adapted.generate(input_ids=ids, **kwargs)
        with skipping(model):
            assert torch.equal(adapted.generate(input_ids=ids, **kwargs), expected)
    assert not torch.equal(model.generate(input_ids=ids, **kwargs), expected)


# --- under torch.compile ----------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [None, "grouped_mm", "eager"], ids=str)
@torch.no_grad()
def test_compiled_in_one_graph(own):
    torch._dynamo.reset()
    model = build("olmoe")
    module = model.model.layers[0].mlp.experts
    _, width = new_experts()
    model.set_experts_implementation(own or NAME)
    batches = [choice(module, width, 6, kept, seed=i) for i, kept in enumerate((1.0, 0.5, 0.2))]
    expected = [eager(module, *inputs) for inputs in batches]
    with skipping(model) as switched:
        assert switched is (own is not None)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(module, backend=counter, fullgraph=True)
        for inputs, old in zip(batches, expected, strict=True):
            torch.testing.assert_close(compiled(*inputs), old, atol=1e-5, rtol=1e-4)
        assert counter.frame_count == 1
        poison(module, *batches[2][1:])
        assert torch.isfinite(compiled(*batches[2])).all()
    torch._dynamo.reset()
    gc.collect()
