"""Each mistake gives one typed error that names the next action, and leaves the model as it was."""

import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OlmoeModel

import ttrouting as ttr
from families.build import build

L, E, V = 4, 8, 96
NAN = float("nan")
SOME = torch.arange(E).expand(L, E)


def delta(*shape):
    return ttr.StaticRouting(delta=torch.zeros(*shape))


def dense():
    config = LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config).eval()


# --- options, before there is a model ------------------------------------------------------------

OPTIONS = [
    (lambda: ttr.SCMoE(beta=-0.1), r"scmoe\.beta must be in \[0, 100\], got -0\.1"),
    (lambda: ttr.SCMoE(beta=NAN), r"scmoe\.beta must be in .* got nan"),
    (lambda: ttr.SCMoE(beta="0.5"), r"scmoe\.beta must be a number, got '0\.5'"),
    (lambda: ttr.SCMoE(alpha=0), r"scmoe\.alpha must be in \(0, 1\], got 0"),
    (lambda: ttr.SCMoE(weak="ranked:2"), "Did you mean 'rank'"),
    (lambda: ttr.SCMoE(weak="rank:0"), "at least 1 as in 'rank:2'"),
    (lambda: ttr.SCMoE(weak=2), r"scmoe\.weak cannot be 2"),
    (lambda: ttr.DynamicK(p=0), r"dynamic_k\.p must be in \(0, 1\], got 0"),
    (lambda: ttr.DynamicK(p=1.01), r"dynamic_k\.p must be in \(0, 1\], got 1\.01"),
    (lambda: ttr.DynamicK(rule="topp"), "Did you mean 'top_p'"),
    (lambda: ttr.DynamicK(k_min=1.5), "k_min must be a whole number, got 1.5"),
    (lambda: ttr.DynamicK(sensitivity=3.0), "a number for each layer, got 3.0"),
    (lambda: ttr.DynamicK(calibration=0.5), r"must come from ttr\.calibrate, got 0\.5"),
    (lambda: ttr.Rerouting(steps=2.5), "steps must be a whole number, got 2.5"),
    (lambda: ttr.Rerouting(interval=True), "interval must be a whole number, got True"),
    (lambda: ttr.StaticRouting(delta=torch.full((L, E), NAN)), "32 values that are NaN or infinite out of 32"),
    (lambda: ttr.StaticRouting(delta=torch.full((L, E), float("inf"))), "Check how the tensor was made"),
    (lambda: ttr.StaticRouting(delta=[[0.0]]), r"must be \[L, E\] or \[B, L, E\], got list"),
    (lambda: ttr.StaticRouting(mask=torch.ones(L, E)), r"must be bool, got torch\.float32\. Use mask\.bool\(\)"),
    (lambda: ttr.ExpertMask(), "from_demonstrations"),
    (lambda: ttr.ExpertMask(mask=torch.ones(L, E)), "must be a bool tensor"),
    (lambda: ttr.Rerouting.from_dict({"stepz": 3}), "has no option 'stepz'. Did you mean 'steps'"),
    (lambda: ttr.SCMoE.from_dict({}, {"delta": torch.zeros(1)}), "has no option 'delta'"),
    (lambda: ttr.get_strategy("re-rooting"), "No strategy 're-rooting'. Did you mean 'rerouting'"),
]


@pytest.mark.parametrize(("make", "words"), OPTIONS, ids=[words for _, words in OPTIONS])
def test_options(make, words):
    with pytest.raises(ttr.ConfigError, match=words):
        make()


# --- a plan: strategies and a model -------------------------------------------------------------------

PLANS = [
    ("scmo", ttr.ConfigError, "No strategy 'scmo'. Did you mean 'scmoe'"),
    (ttr.SCMoE, ttr.ConfigError, r"SCMoE is a class\. Pass an instance: SCMoE\(\)"),
    ([{"strategy": "scmoe"}], ttr.ConfigError, r"is not a strategy\. Pass instances"),
    ([None], ttr.ConfigError, "None is not a strategy"),
    ("expert_mask", ttr.ConfigError, "from_demonstrations"),
    ([ttr.SCMoE(), ttr.SCMoE(weak="random")], ttr.CompositionError, "both decoding strategies.*Keep one"),
    ([ttr.Rerouting(), ttr.Rerouting(lr=0.1)], ttr.CompositionError, "more than once.*Keep one"),
    (delta(L, E + 1), ttr.ConfigError, r"shape \(4, 9\); this model needs \[4, 8\] or \[B, 4, 8\]"),
    (delta(E, L), ttr.ConfigError, r"shape \(8, 4\)"),
    (ttr.ExpertMask(mask=torch.ones(L, 6, dtype=torch.bool)), ttr.ConfigError, r"needs \(4, 8\)"),
    (ttr.ExpertMask(mask=SOME < 2), ttr.ConfigError, "keeps 2 experts.*Keep at least 3"),
    (ttr.StaticRouting(mask=SOME < 2), ttr.ConfigError, "keeps 2 experts.*Keep at least 3"),
    (ttr.SCMoE(weak="rank:9"), ttr.ConfigError, "offers 8. Use 'rank:8' or less"),
    (ttr.SCMoE(weak="top:4"), ttr.ConfigError, "offers 3. Use 'top:3' or less"),
    (ttr.DynamicK(rule="sensitivity", sensitivity=(1.0,)), ttr.ConfigError, "each of 4 layers, got 1.*ttr.calibrate"),
    (ttr.Rerouting(loss_on="A: .*"), ttr.ConfigError, "needs the tokenizer: ttr.adapt"),
    (
        ttr.StaticRouting(delta=torch.zeros(L, E), fingerprint="0" * 64),
        ttr.UnsupportedModelError,
        "made for another model.*Make it again on this model",
    ),
    (ttr.ExpertMask(mask=SOME < 5, fingerprint="0" * 64), ttr.UnsupportedModelError, "another model"),
]


@pytest.mark.parametrize(("strategies", "error", "words"), PLANS, ids=[words for _, _, words in PLANS])
def test_plans(olmoe, untouched, strategies, error, words):
    with untouched(olmoe):
        with pytest.raises(error, match=words):
            ttr.adapt(olmoe, strategies)
        ttr.adapt(olmoe, []).close()  # a refused plan does not keep the model


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (dense, ttr.NotMoEError, "searched 33 modules .*load_pocket"),
        (lambda: torch.nn.Linear(2, 2), ttr.NotMoEError, "No MoE layer in Linear"),
        (lambda: "a/hub-name", ttr.ConfigError, "from_pretrained"),
        (lambda: None, ttr.ConfigError, "from_pretrained"),
        (lambda: build("switch_transformers"), ttr.UnsupportedModelError, "decoder-only"),
    ],
    ids=["dense", "module", "name", "nothing", "encoder-decoder"],
)
def test_models(make, error, words):
    with pytest.raises(error, match=words):
        ttr.adapt(make(), "scmoe")


def test_a_backbone_without_a_head_takes_a_forward_and_no_generate(untouched):
    torch.manual_seed(0)
    model = OlmoeModel(build("olmoe").config).eval()
    with untouched(model):
        with pytest.raises(ttr.UnsupportedModelError, match="ForCausalLM"):
            ttr.adapt(model, "rerouting")
        with ttr.adapt(model, delta(L, E)) as adapted:
            adapted(input_ids=torch.ones(1, 5, dtype=torch.long))
            with pytest.raises(ttr.UnsupportedCallError, match="ForCausalLM"):
                adapted.generate(torch.ones(1, 5, dtype=torch.long))


# --- calls --------------------------------------------------------------------------------------------

IDS = torch.arange(3, 27).view(2, 12)
ONES = torch.ones_like(IDS)
RIGHT = ONES.clone()
RIGHT[0, 9:] = 0
EMPTY = ONES.clone()
EMPTY[1] = 0
PADDED = IDS.clone()
PADDED[0, 9:] = 0

CALLS = [
    ({}, ttr.ConfigError, "needs input_ids .* got NoneType"),
    ({"input_ids": [[3, 4]]}, ttr.ConfigError, "needs input_ids .* got list"),
    ({"input_ids": IDS[0]}, ttr.ConfigError, r"got a tensor of shape \(12,\)"),
    ({"input_ids": IDS[:, :0]}, ttr.ConfigError, "A prompt is empty. Give every sequence at least one token"),
    ({"input_ids": IDS, "attention_mask": EMPTY}, ttr.ConfigError, "A prompt is empty"),
    ({"input_ids": IDS, "attention_mask": RIGHT}, ttr.ConfigError, "padded on the right.*padding_side = 'left'"),
    ({"input_ids": PADDED}, ttr.ConfigError, "padded on the right.*padding_side = 'left'"),
    ({"input_ids": IDS, "attention_mask": ONES[:, :5]}, ttr.ConfigError, r"shape \(2, 5\) beside .* \(2, 12\)"),
    ({"input_ids": torch.full((1, 257), 5)}, ttr.ConfigError, "has 257 tokens, the model's context 256. Shorten"),
    ({"input_ids": IDS, "loss_mask": ONES[:1]}, ttr.ConfigError, r"loss_mask has shape \(1, 12\)"),
    ({"input_ids": IDS.to("meta")}, ttr.UnsupportedCallError, r"on meta, .* on cpu.*\.to\(model\.device\)"),
    ({"input_ids": IDS, "inputs": IDS}, ttr.ConfigError, "Pass one of them"),
]


@pytest.mark.parametrize("strategy", ["rerouting", "scmoe"])
@pytest.mark.parametrize(("call", "error", "words"), CALLS, ids=[words for _, _, words in CALLS])
def test_prompts(olmoe, untouched, call, error, words, strategy):
    with untouched(olmoe), ttr.adapt(olmoe, strategy) as adapted:
        with pytest.raises(error, match=words):
            adapted.generate(max_new_tokens=2, **call)
        assert adapted.generate(IDS, max_new_tokens=2, do_sample=False).shape == (2, 14)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        ({}, ttr.ConfigError, "needs input_ids"),
        ({"input_ids": IDS.to("meta")}, ttr.UnsupportedCallError, r"on meta, .* on cpu.*\.to\(model\.device\)"),
        ({"input_ids": IDS[:, :0]}, ttr.ConfigError, "empty"),
        ({"input_ids": IDS, "attention_mask": ONES[:, :5]}, ttr.ConfigError, r"shape \(2, 5\) beside"),
    ],
    ids=["nothing", "device", "empty", "mask"],
)
def test_forwards(olmoe, untouched, call, error, words):
    with untouched(olmoe), ttr.adapt(olmoe, delta(L, E)) as adapted:
        with pytest.raises(error, match=words):
            adapted(**call)
        assert adapted(input_ids=IDS, attention_mask=RIGHT).logits.shape == (2, 12, V)  # a forward may pad anywhere


def test_a_delta_for_another_number_of_sequences(olmoe, untouched):
    with untouched(olmoe), ttr.adapt(olmoe, delta(3, L, E)) as adapted:
        for call in (adapted.generate, adapted):
            with pytest.raises(ttr.ConfigError, match="has 3 sequences, the call has 2"):
                call(input_ids=IDS)


def state(shape=(2, L, E), value=0.0, fingerprint=None, model=None):
    own = ttr.adapt(model, [])
    own.close()
    return ttr.AdaptationState(
        {"rerouting": {"delta": torch.full(shape, value)}}, fingerprint or own._plan.target.fingerprint
    )


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        ({"shape": (3, L, E)}, ttr.UnsupportedCallError, "has 3 sequences, the call has 2.*start without state"),
        ({"shape": (2, L, 9)}, ttr.UnsupportedCallError, r"shape \(2, 4, 9\), the call needs \(2, 4, 8\)"),
        ({"value": NAN}, ttr.ConfigError, "64 values that are NaN"),
        ({"fingerprint": "0" * 64}, ttr.UnsupportedCallError, "learned on another model.*Start without state"),
    ],
    ids=["sequences", "shape", "nan", "model"],
)
def test_states(olmoe, untouched, make, error, words):
    given = state(model=olmoe, **make)
    with untouched(olmoe), ttr.adapt(olmoe, "rerouting") as adapted:
        for call in (adapted.generate, adapted):
            with pytest.raises(error, match=words):
                call(input_ids=IDS, state=given)
        adapted.generate(IDS, state=state(model=build("olmoe")), max_new_tokens=1)  # equal weights: the same model
        with pytest.raises(ttr.UnsupportedCallError, match="another model"):
            adapted.generate(IDS, state=state(model=build("olmoe", seed=1)), max_new_tokens=1)


def test_a_closed_adapter_and_an_adapted_model(olmoe, untouched):
    with untouched(olmoe):
        with ttr.adapt(olmoe, "scmoe") as adapted:
            for again in (adapted, olmoe):
                with pytest.raises(ttr.ModelBusy, match=re.escape(".close()")):
                    ttr.adapt(again, "scmoe")
        for call in (adapted.generate, adapted):
            with pytest.raises(ttr.UnsupportedCallError, match=r"closed. Call ttr\.adapt"):
                call(input_ids=IDS)
        ttr.adapt(olmoe, "scmoe").close()


def test_every_error_is_one_of_ours():
    for name in ttr.__all__:
        value = getattr(ttr, name)
        if isinstance(value, type) and issubclass(value, Exception):
            assert issubclass(value, ttr.TTRoutingError)
    assert issubclass(ttr.ConfigError, ValueError)
