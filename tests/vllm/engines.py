"""Engines and transformers models with the same weights, and what both of them write.

Imports nothing of vLLM at the top, so that the suite is collected where it is not installed.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import ttrouting as ttr
from families.build import build

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}

AGREEMENT = "experts chosen as in transformers"  # the property of a test's report that tells (what of, share)

# vLLM's attention on CPUs takes heads of 32 and more
WIDE = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
LATENT = {
    "hidden_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 128,
}
# what the released checkpoint says, vLLM reads, and transformers leaves out when it saves
UNSAVED: dict[str, dict[str, Any]] = {"deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}}
CHANGES: dict[str, dict[str, Any]] = {
    "olmoe": WIDE,
    "mixtral": {**WIDE, "head_dim": 32, "sliding_window": None},
    "qwen3_moe": {**WIDE, "head_dim": 32, "norm_topk_prob": True},
    "deepseek_v2": {**LATENT, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    "deepseek_v3": LATENT,  # sigmoid, a correction bias, the best 2 of 4 groups
}


def saved(family: str, folder: Path) -> tuple[Any, Path]:
    """A random model, and where it was saved."""
    model = build(family, **CHANGES[family])
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | UNSAVED.get(family, {})))
    return model, folder


def engine(folder: Path, **options: Any) -> Any:
    """An engine in this process, in fp32."""
    from ttrouting import vllm as ttv
    from vllm import LLM

    settings: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 128,
        "max_num_seqs": 8,
        "skip_tokenizer_init": True,
        "block_size": 32,
        "num_gpu_blocks_override": 100,
        "additional_config": ttv.config(),
    }
    return LLM(str(folder), **(settings | options))


def put_away(llm: Any) -> None:
    """End an engine, so that another can be made in this process."""
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Random token ids, no special ones."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 96, (n,), generator=generator).tolist() for n in lengths]


def deltas(model: Any, count: int, scale: float = 2.0, seed: int = 1) -> list[torch.Tensor]:
    """Random deltas `[L, E]`."""
    sites = ttr.find_sites(model)
    generator = torch.Generator().manual_seed(seed)
    shape = (len(sites), max(site.num_experts for site in sites))
    return [scale * torch.randn(shape, generator=generator) for _ in range(count)]


def sampling(spec: dict[str, Any] | None = None, tokens: int = 12, **options: Any) -> Any:
    """Greedy parameters with a spec."""
    from vllm import SamplingParams

    extra = None if spec is None else {"ttrouting": spec}
    settings: dict[str, Any] = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True, "detokenize": False}
    return SamplingParams(**(settings | options), extra_args=extra)


def write(llm: Any, prompts: Sequence[list[int]], params: Any) -> list[list[int]]:
    """The tokens that the engine adds to each prompt."""
    asked: Any = [{"prompt_token_ids": ids} for ids in prompts]
    return [list(out.outputs[0].token_ids) for out in llm.generate(asked, params, use_tqdm=False)]


def report(llm: Any) -> dict[str, Any]:
    """What the workers counted, after a plain request that lets them see the end of those before it."""
    write(llm, [[5, 6, 7]], sampling(tokens=1))
    return llm.collective_rpc("ttrouting_report")[0]


@torch.no_grad()
def expected(
    model: Any, prompt: list[int], strategies: Any = (), tokens: int = 12, no_harm: bool = True
) -> list[int]:
    """What transformers writes with the same strategies."""
    ids = torch.tensor([prompt])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": tokens, "do_sample": False}
    if not strategies:
        return model.generate(ids, **options)[0, len(prompt) :].tolist()
    with ttr.adapt(model, strategies, no_harm=no_harm) as adapted:
        return adapted.generate(ids, **options)[0, len(prompt) :].tolist()


def one_of_each(model: Any) -> list[list[Any]]:
    """One of each kind, and a plain request."""
    one, two = deltas(model, 2)
    mask = torch.zeros(one.shape, dtype=torch.bool)
    mask[:, ::2] = True
    entropy = ttr.DynamicK(rule="entropy", tau=0.7, p=0.4)
    return [
        [ttr.StaticRouting(delta=one)],
        [],
        [ttr.DynamicK(p=0.5)],
        [ttr.ExpertMask(mask=mask)],
        [ttr.StaticRouting(delta=two), entropy],
        [ttr.SCMoE(judge_on=None, beta=0.7)],
    ]


def all_equal(model: Any, llm: Any, given: list[list[Any]]) -> None:
    """Requests with these strategies, beside each other and twice, write what transformers does."""
    from ttrouting import vllm as ttv

    texts = prompts(7, 20, 33, 12, 40, 9)[: len(given)]
    wanted = [expected(model, text, own) for text, own in zip(texts, given, strict=True)]
    params = [sampling(ttv.spec(own) if own else None) for own in given]
    for _ in range(2):
        assert write(llm, texts, params) == wanted
