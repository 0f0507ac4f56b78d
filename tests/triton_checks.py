"""What the decode kernel for GPUs must do. `test_triton_kernel.py` runs this file, on a GPU or in the interpreter.

Legend: `N` tokens, `H` hidden size, `E` experts, `K` columns. The oracle is the loop in the family's own file.
"""

import pytest
import torch

from families.build import build
from ttrouting.kernels import triton_decode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = ["olmoe", "aria_text", "gpt_oss", "openai_privacy_filter", "nemotron_h", "deepseek_v4"]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def new_experts(family, dtype=torch.float32):
    module = next(m for m in build(family).modules() if hasattr(m, "is_transposed"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    first = module.gate_up_proj if module.has_gate else module.up_proj
    return module.to(DEVICE, dtype).requires_grad_(False), first.shape[1 if module.is_transposed else 2]


def choice(module, width, tokens, kept=0.5, columns=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, width, generator=generator)
    ids = torch.rand(tokens, module.num_experts, generator=generator).argsort(-1)[:, :columns]
    weights = 0.1 + torch.rand(tokens, columns, generator=generator)
    weights *= torch.rand(tokens, columns, generator=generator) < kept
    return hidden.to(DEVICE, dtype), ids.to(DEVICE), weights.to(DEVICE, dtype)


def eager(module, hidden, ids, weights):
    """In fp32, whatever the dtype."""
    wide = type(module).forward.__wrapped__
    dtype = hidden.dtype
    out = wide(module.float(), hidden.float(), ids, weights.float())
    module.to(dtype)
    return out


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", LAYOUTS)
def test_values(family, dtype):
    module, width = new_experts(family, dtype)
    for tokens, kept in ((1, 1.0), (1, 0.5), (3, 0.5), (2, 0.0)):
        inputs = choice(module, width, tokens, kept, dtype=dtype)
        made, expected = triton_decode.decode_forward(module, *inputs), eager(module, *inputs)
        assert made.dtype == dtype
        scale = max(1, float(expected.abs().max()))
        assert float((made.float() - expected).abs().max()) <= TOLERANCE[dtype] * scale


def test_sizes_that_no_block_divides():
    """Rows shorter and longer than a block, outputs that end inside one."""
    for hidden, inner in ((37, 11), (300, 5), (9, 270)):
        module, _ = new_experts("olmoe")
        generator = torch.Generator().manual_seed(hidden)
        for name, shape in (("gate_up_proj", (8, 2 * inner, hidden)), ("down_proj", (8, hidden, inner))):
            weight = 0.1 * torch.randn(shape, generator=generator).to(DEVICE)
            setattr(module, name, torch.nn.Parameter(weight, requires_grad=False))
        inputs = choice(module, hidden, 2, 0.7)
        torch.testing.assert_close(
            triton_decode.decode_forward(module, *inputs), eager(module, *inputs), atol=1e-5, rtol=1e-4
        )


def test_the_gate_is_fused_only_where_it_is_the_usual_one():
    assert triton_decode._is_plain_silu(new_experts("olmoe")[0])
    assert triton_decode._is_plain_silu(new_experts("lfm2_moe")[0])  # `F.silu` itself
    for family in ("deepseek_v4", "gpt_oss", "gemma4_text"):  # clamps, another formula, GELU
        assert not triton_decode._is_plain_silu(new_experts(family)[0])


def test_experts_that_nobody_needs_are_not_read():
    for family in LAYOUTS:
        module, width = new_experts(family)
        hidden, ids, weights = choice(module, width, 3, 0.4)
        for parameter in module.parameters():
            for e in set(range(module.num_experts)) - set(ids[weights != 0].tolist()):
                parameter[e] = float("nan")
        assert any(p.isnan().any() for p in module.parameters())
        assert torch.isfinite(triton_decode.decode_forward(module, hidden, ids, weights)).all()


def test_ids_beyond_the_experts_are_skipped():
    module, width = new_experts("olmoe")
    hidden, ids, weights = choice(module, width, 3, 1.0)
    beyond = torch.zeros_like(ids, dtype=torch.bool)
    beyond[0, 1] = beyond[2] = True
    made = triton_decode.decode_forward(module, hidden, ids.masked_fill(beyond, module.num_experts + 4), weights)
    torch.testing.assert_close(made, eager(module, hidden, ids, weights * ~beyond), atol=1e-5, rtol=1e-4)


def test_router_weights_in_fp32_beside_bf16():
    module, width = new_experts("olmoe", torch.bfloat16)
    hidden, ids, weights = choice(module, width, 2, dtype=torch.bfloat16)
    made = triton_decode.decode_forward(module, hidden, ids, weights.float() / 3)
    assert made.dtype == torch.bfloat16
    expected = eager(module, hidden, ids, weights.float() / 3)
    torch.testing.assert_close(made.float(), expected.float(), atol=2e-2, rtol=2e-2)


def test_inputs_of_any_stride():
    module, width = new_experts("olmoe")
    hidden, ids, weights = choice(module, width, 3)
    expected = triton_decode.decode_forward(module, hidden, ids, weights)
    made = triton_decode.decode_forward(module, hidden.t().contiguous().t(), ids.t().contiguous().t(), weights)
    assert torch.equal(made, expected)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_replay_of_a_graph_follows_its_inputs():
    """Captured once, other experts and other drops at each replay; through the registered implementation."""
    from ttrouting.kernels import ragged_experts_forward

    module, width = new_experts("olmoe", torch.bfloat16)
    static = choice(module, width, 4, 1.0, dtype=torch.bfloat16)
    ragged_experts_forward(module, *static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ragged_experts_forward(module, *static)
    for kept in (0.5, 0.0, 1.0):
        new = choice(module, width, 4, kept, dtype=torch.bfloat16)
        for old, value in zip(static, new, strict=True):
            old.copy_(value)
        graph.replay()
        assert torch.equal(out, triton_decode.decode_forward(module, *new))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_nothing_waits_for_the_device():
    module, width = new_experts("olmoe", torch.bfloat16)
    inputs = choice(module, width, 4, dtype=torch.bfloat16)
    triton_decode.decode_forward(module, *inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        triton_decode.decode_forward(module, *inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
