"""The selection tap: other experts, fewer and more of them, and what then comes out.

Legend: `N` tokens, `E` experts, `K` per token, `H` hidden size.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import ttrouting as ttr
from tests.families.expected import EXPECTED
from tests.families.harness import Replace, implementations, layers, random_selection, read, spy, tokens


def columns_to_try(expected):
    """Fewer than K, and more."""
    return sorted({1, expected.top_k + 2})


def single_expert(family, block, hidden, expert):
    """`[N, H]` output of one expert with weight 1, by the model's own experts module alone."""
    ids = torch.full((len(hidden), 1), expert)
    weights = torch.ones(len(hidden), 1, dtype=hidden.dtype)
    if family == "longcat_flash":  # it takes two columns at least: the second is an identity expert of weight 0
        ids, weights = F.pad(ids, (0, 1), value=9), F.pad(weights, (0, 1))
    return block.experts(hidden, ids, weights)


def llama4_block(block, given, dense):
    """Scores multiply the input of each expert; the shared expert is added."""
    hidden = given.reshape(-1, given.shape[-1])
    out = block.shared_expert(hidden)
    for e in range(dense.shape[1]):
        gate, up = (dense[:, e : e + 1] * hidden @ block.experts.gate_up_proj[e]).chunk(2, -1)
        out = out + (up * F.silu(gate)) @ block.experts.down_proj[e]
    return out


def jetmoe_block(block, given, dense):
    """Weights multiply the output of each expert; a bias is added."""
    hidden = given.reshape(-1, given.shape[-1])
    out = block.bias.expand_as(hidden)
    for e in range(dense.shape[1]):
        gate, up = (hidden @ block.input_linear.weight[e].T).chunk(2, -1)
        out = out + dense[:, e : e + 1] * ((F.silu(gate) * up) @ block.output_linear.weight[e].T)
    return out


def weighted_sum(family, expected, block, given, dense):
    """`[N, H]` what the experts must give for weights `[N, E]`."""
    if expected.interface == "dense":
        return llama4_block(block, given, dense)
    if expected.interface == "sorted":
        return jetmoe_block(block, given, dense)
    hidden = given.reshape(-1, given.shape[-1])
    made = [single_expert(family, block, hidden, e) for e in range(dense.shape[1]) if dense[:, e].any()]
    used = [e for e in range(dense.shape[1]) if dense[:, e].any()]
    return sum(dense[:, e : e + 1] * out.reshape(hidden.shape) for e, out in zip(used, made, strict=True))


@pytest.mark.check("selection")
@pytest.mark.parametrize("family", EXPECTED)
@torch.no_grad()
def test_other_experts_and_another_number_of_them(family, model):
    expected, tiny, ids = EXPECTED[family], model(family), tokens()
    base = read(tiny, ids)
    for columns in columns_to_try(expected):
        replace = Replace(columns=columns)
        outputs = []
        for name in implementations(tiny, expected):
            with ttr.adapt(tiny, replace) as adapted, spy(tiny, family) as seen:
                outputs.append(read(adapted, ids))
            tolerance = 1e-5 * (1 + float(outputs[-1].abs().max()))
            for index, (layer, one) in enumerate(zip(seen, layers(tiny, family), strict=True)):
                chosen, weights = random_selection(replace, index, ids.numel(), expected.experts)
                if family == "zaya":  # class 8 skips the experts
                    weights = weights.masked_fill(chosen >= 8, 0)
                want = torch.zeros(ids.numel(), expected.experts).scatter_add(1, chosen, weights)
                torch.testing.assert_close(layer.dense, want, atol=1e-6, rtol=1e-6)
                total = weighted_sum(family, expected, one.block, layer.given, want)
                torch.testing.assert_close(
                    layer.made.reshape(total.shape), total, atol=tolerance, rtol=1e-4, msg=f"{name}, {columns}"
                )
        for other in outputs[1:]:
            torch.testing.assert_close(other, outputs[0], atol=1e-4 * float(base.abs().max()), rtol=1e-3)
        assert not torch.allclose(outputs[0], base, atol=1e-3 * float(base.abs().max()))


@torch.no_grad()
def test_attention_experts_of_jetmoe_are_left_alone(model):
    tiny, ids = model("jetmoe"), tokens()
    attention = [n for n, _ in tiny.named_modules() if n.endswith("self_attention.experts.router")]
    sites = ttr.find_sites(tiny)
    assert len(attention) == len(sites) == 4
    assert not any(name in site.name for name in attention for site in sites)
    seen = {}

    def look(name):
        return lambda _module, args, out: seen.__setitem__(name, (args[0], out[2]))

    hooks = [tiny.get_submodule(n).register_forward_hook(look(n)) for n in attention]
    try:
        with ttr.adapt(tiny, Replace(columns=1)) as adapted:
            read(adapted, ids)
    finally:
        for hook in hooks:
            hook.remove()
    for name in attention:
        hidden, gates = seen[name]
        router = tiny.get_submodule(name)
        logits = hidden @ router.layer.weight.T
        want = logits.topk(router.top_k, -1).values.softmax(-1)
        torch.testing.assert_close(gates.sort().values, want.flatten().sort().values, atol=1e-6, rtol=1e-6)
