"""The model after a call is the model before it: also after errors, interruptions and a bypassed router."""

import threading

import pytest
import torch
import torch.nn.functional as F
from transformers import LogitsProcessor, StoppingCriteria
from transformers.models.olmoe.modeling_olmoe import OlmoeAttention

import ttrouting as ttr
from ttrouting.patches import Patches

L, E = 4, 8
STRATEGIES = {
    "rerouting": lambda: [ttr.Rerouting(interval=3, layers="all")],
    "scmoe": lambda: [ttr.SCMoE()],
    "dynamic_k": lambda: [ttr.DynamicK(p=0.5)],
    "expert_mask": lambda: [ttr.ExpertMask(mask=torch.arange(E).expand(L, E) < 5)],
    "static_routing": lambda: [ttr.StaticRouting(delta=torch.ones(L, E))],
    "all": lambda: [ttr.Rerouting(interval=3, layers="all"), ttr.DynamicK(p=0.5), ttr.SCMoE()],
}
CALL = {"max_new_tokens": 6, "do_sample": False}


class Trip(Exception):
    """What the tests raise: no library knows it, so none can swallow it on purpose."""


class AtStep(StoppingCriteria, LogitsProcessor):
    """A user's criterion or processor that fails at its n-th call."""

    def __init__(self, step, error):
        self.left = step
        self.error = error

    def __call__(self, input_ids, scores):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return scores if isinstance(scores, torch.Tensor) else torch.zeros(1, dtype=torch.bool)


@pytest.fixture
def strike(monkeypatch):
    """`strike(model, error, when)`: the last layer's attention raises once, as soon as `when()` holds.

    The class is patched before a test takes its first fingerprint, and so is a part of all of them.
    """
    armed = []
    original = OlmoeAttention.forward

    def forward(self, *args, **kwargs):
        if armed and self is armed[0][0].model.layers[-1].self_attn and armed[0][2]():
            raise armed.pop()[1]
        return original(self, *args, **kwargs)

    monkeypatch.setattr(OlmoeAttention, "forward", forward)
    return lambda *what: armed.append(what)


def works(adapted, ids, expected):
    """The adapter does what it did before, and gives the model back again."""
    assert torch.equal(adapted.generate(ids, **CALL), expected)
    assert adapted.report.sequences


@pytest.mark.parametrize("name", STRATEGIES)
def test_after_calls_of_every_kind(olmoe, prompts, untouched, name):
    ids = prompts(30, 20)
    mask = (ids != 0).long()
    own = olmoe.generate(ids, attention_mask=mask, **CALL)
    with untouched(olmoe):
        adapted = ttr.adapt(olmoe, STRATEGIES[name]())
        adapted.generate(ids, attention_mask=mask, **CALL)
        adapted.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=True, num_return_sequences=2)
        adapted(input_ids=ids, attention_mask=mask)
        adapted.close()
        adapted.close()
    assert torch.equal(olmoe.generate(ids, attention_mask=mask, **CALL), own)


def test_while_it_runs_there_is_something_to_take_back(olmoe, prompts, fingerprint):
    """The fingerprint sees taps; a test that could not tell would pass without any cleaning up."""
    during = []

    class Look(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            during.append(fingerprint(olmoe))
            return torch.zeros(1, dtype=torch.bool)

    before = fingerprint(olmoe)
    with ttr.adapt(olmoe, ttr.StaticRouting(delta=torch.ones(L, E))) as adapted:
        adapted.generate(prompts(20), max_new_tokens=1, stopping_criteria=[Look()])
    changed = {key for key in before if during[0][key] != before[key]} - {"grad"}  # generate turns those off
    gates = {f"module model.layers.{i}.mlp.gate" for i in range(L)}
    experts = {f"module model.layers.{i}.mlp.experts" for i in range(L)}
    assert changed == gates | experts | {"module "}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Trip(), torch.cuda.OutOfMemoryError("memory")], ids=repr)
def test_an_interruption_inside_an_optimisation_step(olmoe, prompts, untouched, strike, error):
    ids = prompts(30)
    with untouched(olmoe), ttr.adapt(olmoe, STRATEGIES["all"]()) as adapted:
        expected = adapted.generate(ids, **CALL)
        # with gradients on: only the steps of the descent run like that. The third of five.
        seen = []
        strike(olmoe, error, lambda: torch.is_grad_enabled() and (seen.append(1), len(seen) == 3)[1])
        with pytest.raises(type(error)):
            adapted.generate(ids, **CALL)
        assert len(seen) == 3
        assert torch.is_grad_enabled()
        works(adapted, ids, expected)


@pytest.mark.parametrize("name", STRATEGIES)
def test_an_interruption_in_the_middle_of_decoding(olmoe, prompts, untouched, strike, name):
    ids = prompts(30)
    with untouched(olmoe), ttr.adapt(olmoe, STRATEGIES[name]()) as adapted:
        expected = adapted.generate(ids, **CALL)
        struck = []

        class Decoding(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                struck.append(input_ids.shape[1])
                return torch.zeros(1, dtype=torch.bool)

        strike(olmoe, KeyboardInterrupt(), lambda: len(struck) == 2)
        with pytest.raises(KeyboardInterrupt):
            adapted.generate(ids, stopping_criteria=[Decoding()], **CALL)
        assert struck == [31, 32]
        works(adapted, ids, expected)


@pytest.mark.parametrize("where", ["stopping_criteria", "logits_processor"])
@pytest.mark.parametrize("name", ["all", "static_routing"])
def test_an_error_in_the_users_own_code(olmoe, prompts, untouched, name, where):
    ids = prompts(30)
    with untouched(olmoe), ttr.adapt(olmoe, STRATEGIES[name]()) as adapted:
        expected = adapted.generate(ids, **CALL)
        report = adapted.report
        with pytest.raises(Trip):
            adapted.generate(ids, **{where: [AtStep(3, Trip())]}, **CALL)
        assert adapted.report is report, "of the last call that came to its end"
        works(adapted, ids, expected)


def test_an_error_inside_an_adapted_forward(olmoe, prompts, untouched, strike):
    ids = prompts(30)
    with untouched(olmoe), ttr.adapt(olmoe, STRATEGIES["static_routing"]()) as adapted:
        expected = adapted(input_ids=ids).logits
        strike(olmoe, Trip(), lambda: True)
        with pytest.raises(Trip):
            adapted(input_ids=ids)
        assert torch.equal(adapted(input_ids=ids).logits, expected)


def test_an_error_while_the_layers_are_looked_for(olmoe, untouched, strike):
    strike(olmoe, Trip(), lambda: True)
    with untouched(olmoe), pytest.raises(Trip):
        ttr.find_sites(olmoe)
    with untouched(olmoe):
        ttr.adapt(olmoe, "scmoe").close()


@pytest.mark.parametrize("number", range(1, 6))
def test_an_error_half_way_through_installation(olmoe, prompts, untouched, monkeypatch, number):
    """The n-th hook cannot be set: those before it are taken back."""
    ids = prompts(30)
    with untouched(olmoe), ttr.adapt(olmoe, STRATEGIES["static_routing"]()) as adapted:
        expected = adapted.generate(ids, **CALL)
        left = [number]
        original = Patches.forward

        def forward(self, module, make):
            left[0] -= 1
            if left[0] == 0:
                raise Trip
            original(self, module, make)

        with monkeypatch.context() as patch:
            patch.setattr(Patches, "forward", forward)
            with pytest.raises(Trip):
                adapted.generate(ids, **CALL)
        works(adapted, ids, expected)


def test_patches_that_were_there_before_stay_inside(olmoe, prompts, untouched):
    """Accelerate and users replace `forward` on instances and set hooks: all of that runs, and is still there."""
    ids = prompts(20)
    calls = []

    def count(module, name):
        original = module.forward

        def forward(*args, **kwargs):
            calls.append(name)
            return original(*args, **kwargs)

        module.forward = forward

    count(olmoe, "model")
    count(olmoe.model.layers[0].mlp.gate, "gate")
    olmoe.model.layers[0].mlp.experts.register_forward_pre_hook(lambda *_: calls.append("experts"))
    with untouched(olmoe), ttr.adapt(olmoe, STRATEGIES["static_routing"]()) as adapted:
        calls.clear()
        adapted.generate(ids, max_new_tokens=2, do_sample=False)
        assert calls == ["model", "gate", "experts"] * 2


# --- never silent: a router that is bypassed -------------------------------------------------------


def bypass(block, when):
    """The block's forward, which goes past its router where `when(tokens)` holds, as a fused kernel would."""

    def forward(hidden):
        flat = hidden.reshape(-1, hidden.shape[-1])
        if when(len(flat)):
            scores = F.linear(flat, block.gate.weight).softmax(-1)
            weights, ids = scores.topk(block.gate.top_k)
        else:
            _, weights, ids = block.gate(flat)
        return block.experts(flat, ids, weights).view_as(hidden)

    block.forward = forward


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("when", ["decoding", "prompt"])
def test_a_bypassed_router_is_an_error_and_no_answer(olmoe, prompts, untouched, name, when):
    ids = prompts(30, 30)
    # found with sixteen tokens, so that the probe meets the router
    bypass(olmoe.model.layers[2].mlp, lambda n: n <= 4 if when == "decoding" else n > 50)
    with untouched(olmoe), ttr.adapt(olmoe, STRATEGIES[name]()) as adapted:
        with pytest.raises(ttr.CoverageError, match=r"model\.layers\.2\.mlp.*use_kernels=False"):
            adapted.generate(ids, **CALL)
        assert adapted.report.sequences == []
        assert adapted.state.sequences is None


def test_experts_that_run_without_any_tap_are_missed_too(olmoe, prompts, untouched):
    """A kernel that fuses router and experts: nothing of the layer is seen, only its count is short."""
    block = olmoe.model.layers[1].mlp
    original = block.forward

    def forward(hidden):
        if hidden.shape[1] > 1:
            return original(hidden)
        flat = hidden.reshape(-1, hidden.shape[-1])
        weights, ids = F.linear(flat, block.gate.weight).softmax(-1).topk(3)
        return type(block.experts).forward(block.experts, flat, ids, weights).view_as(hidden)

    block.forward = forward
    with untouched(olmoe), ttr.adapt(olmoe, STRATEGIES["static_routing"]()) as adapted:
        with pytest.raises(ttr.CoverageError, match="routed 20 of 25"):
            adapted.generate(prompts(20), **CALL)
        adapted(input_ids=prompts(20))


# --- one at a time -----------------------------------------------------------------------------------


class Block(LogitsProcessor):
    """Holds a generation where it is until it is let go."""

    def __init__(self):
        self.inside = threading.Event()
        self.go_on = threading.Event()

    def __call__(self, input_ids, scores):
        self.inside.set()
        assert self.go_on.wait(60)
        return scores


def test_a_second_thread_is_told_to_wait(olmoe, prompts, untouched):
    ids = prompts(20)
    own = olmoe.generate(ids, **CALL)
    with untouched(olmoe):
        adapted = ttr.adapt(olmoe, STRATEGIES["static_routing"]())
        alone = adapted.generate(ids, **CALL)
        block, results = Block(), []
        thread = threading.Thread(
            target=lambda: results.append(adapted.generate(ids, logits_processor=[block], **CALL))
        )
        thread.start()
        assert block.inside.wait(60)
        try:
            for call in (adapted.generate, adapted):
                with pytest.raises(ttr.ModelBusy, match="Wait for it"):
                    call(input_ids=ids)
            # also past the adapter: taps of the other thread would edit this forward
            with pytest.raises(ttr.ModelBusy, match="Wait for that call"):
                olmoe(input_ids=ids)
            with pytest.raises(ttr.ModelBusy, match="close"):
                ttr.adapt(olmoe, "scmoe")
            adapted.close()
            with pytest.raises(ttr.ModelBusy, match="still running"):
                ttr.adapt(olmoe, "scmoe")
        finally:
            block.go_on.set()
            thread.join()
    assert torch.equal(results[0], alone), "the refused calls did not disturb it"
    assert torch.equal(olmoe.generate(ids, **CALL), own)
    with ttr.adapt(olmoe, "scmoe") as again:
        again.generate(ids, **CALL)


def test_a_call_inside_a_call_is_refused(olmoe, prompts, untouched):
    class Again(LogitsProcessor):
        def __call__(self, input_ids, scores):
            adapted.generate(input_ids, max_new_tokens=1)

    with untouched(olmoe), ttr.adapt(olmoe, STRATEGIES["static_routing"]()) as adapted, pytest.raises(ttr.ModelBusy):
        adapted.generate(prompts(20), logits_processor=[Again()], **CALL)


def test_a_forgotten_adapter_and_a_forgotten_model_free_their_places(olmoe):
    adapted = ttr.adapt(olmoe, "scmoe")
    with pytest.raises(ttr.ModelBusy):
        ttr.adapt(olmoe, "scmoe")
    del adapted
    ttr.adapt(olmoe, "scmoe").close()
