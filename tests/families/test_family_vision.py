"""Vision-language models loaded whole, and given text: the same sites, under the language model."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoConfig

import ttrouting as ttr
from tests.families.build import tiny_config
from tests.families.expected import EXPECTED
from tests.families.harness import fingerprint, random_delta, read, tokens

EYES = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
WHOLE = {
    "qwen3_vl_moe_text": ("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", {"deepstack_visual_indexes": [0]}),
    "glm4v_moe_text": ("glm4v_moe", "Glm4vMoeForConditionalGeneration", {}),
    "ernie4_5_vl_moe_text": ("ernie4_5_vl_moe", "Ernie4_5_VLMoeForConditionalGeneration", {}),
    "step3p5": ("step3p7", "Step3p7ForConditionalGeneration", {}),
}


@pytest.mark.check("generate")
@pytest.mark.parametrize("family", WHOLE)
@torch.no_grad()
def test_text_through_the_whole_model(family, note):
    parent, cls, eyes = WHOLE[family]
    text = {k: v for k, v in tiny_config(family).to_dict().items() if k != "model_type"}
    config = type(AutoConfig.for_model(parent))(
        text_config=text, vision_config={**EYES, **eyes, "out_hidden_size": 32}
    )
    torch.manual_seed(0)
    model = getattr(transformers, cls)(config).eval()
    before, expected = fingerprint(model), EXPECTED[family]
    names = [f"{s.name}.{expected.routers.rpartition('.')[2]}" for s in ttr.find_sites(model)]
    assert names == [f"model.language_model.{name}" for name in expected.router_names()]
    ids = tokens()
    ids[1, :4] = 0
    delta = random_delta(expected)
    with ttr.adapt(model, ttr.StaticRouting(delta=delta)) as adapted:
        out = adapted.generate(
            input_ids=ids,
            attention_mask=(ids != 0).long(),
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    logits = torch.stack(out.logits, 1)
    for row, pad in enumerate((0, 4)):
        with ttr.adapt(model, ttr.StaticRouting(delta=delta[row])) as adapted:
            full = read(adapted, out.sequences[row : row + 1, pad:-1])[0, -4:]
        torch.testing.assert_close(logits[row], full, atol=1e-4, rtol=1e-4)
    assert fingerprint(model) == before
    note(remark="the whole vision-language model generates text: cached equals recompute, left-padded too")
