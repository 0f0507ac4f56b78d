"""Saved strategies and states: they come back as they were, or are refused with the reason."""

import dataclasses
import hashlib
import json
import os
import pickle
import subprocess
import sys

import pytest
import safetensors.torch
import torch

import ttrouting as ttr
from families.build import build

L, E = 4, 8
CALIBRATION = {"mean_k": 2.1, "k_low": 1.9, "kl": 0.02, "kl_high": 0.05, "tokens": 900, "fingerprint": "f" * 64}


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def calibration():
    from ttrouting.strategies.dynamic_k import Calibration

    return Calibration(**CALIBRATION)


# one or more for every strategy that there is, with no option at its default
EXAMPLES = {
    "rerouting": lambda: ttr.Rerouting(
        steps=3,
        lr=0.02,
        interval=None,
        optimizer="sgd",
        layers="last:2",
        refresh_kv=False,
        loss_on="A: .*",
        kl_limit=1.5,
        seed=7,
        recompute=True,
    ),
    "c3po": lambda: ttr.C3PO(
        "my_set",
        surrogate="oracle",
        k=5,
        eps=0.7,
        steps=4,
        lr=0.03,
        layers="last:2",
        core_experts=3,
        kernel="matern",
        sigma=0.2,
        alpha=0.4,
        scope="all",
        use="all",
        max_similarity=0.9,
        index="hnsw",
        embedder="all-MiniLM-L6-v2",
        kl_limit=2.0,
        labels=(" 1\n", " 2\n"),
    ),
    "scmoe": lambda: ttr.SCMoE(alpha=0.3, beta=0.7, weak="random", kl_limit=1.0, judge_on=r"A:(.*)", seed=3),
    "dynamic_k": lambda: ttr.DynamicK(
        rule="sensitivity",
        p=0.9,
        beta=0.1,
        threshold=0.01,
        sensitivity=(1.0, 0.5, 2.0, 0.25),
        tau=0.8,
        q=2.0,
        k_min=2,
        renormalize="always",
        gate=0.3,
        calibration=calibration(),
    ),
    "expert_mask": lambda: ttr.ExpertMask(mask=some(L, E) > 0, at="logits", fingerprint="a" * 64),
    "static_routing": lambda: ttr.StaticRouting(
        delta=some(2, L, E).double(), mask=some(L, E).T.contiguous().T > -1, fingerprint="b" * 64
    ),
    "task_delta": lambda: ttr.TaskDelta(
        "my_set",
        deltas="my_deltas",
        min_probability=0.7,
        min_similarity=0.3,
        embed_on="all",
        kl_limit=1.5,
        index="flat",
        embedder="all-MiniLM-L6-v2",
    ),
}


def options(strategy):
    return {field.name: getattr(strategy, field.name) for field in dataclasses.fields(strategy)}


def assert_same(a, b):
    assert type(a) is type(b)
    for name, value in options(a).items():
        other = options(b)[name]
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other)
            assert value.dtype == other.dtype
        else:
            assert value == other
            assert type(value) is type(other)


# --- round trips -----------------------------------------------------------------------------------


def test_there_is_an_example_of_every_strategy_and_of_every_option():
    built_in = {info.name for info in ttr.list_strategies() if info.source == "ttrouting"}
    assert set(EXAMPLES) == built_in, "add the new strategy to EXAMPLES"
    for name, make in EXAMPLES.items():
        for field in dataclasses.fields(make()):
            assert getattr(make(), field.name) is not field.default, f"{name}.{field.name} is at its default"


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_strategy_comes_back(tmp_path, name):
    strategy = EXAMPLES[name]()
    folder = ttr.save(tmp_path / "deep" / "er", strategy)
    (back,) = ttr.load(folder)
    assert_same(strategy, back)


def test_several_strategies_come_back_in_their_order(tmp_path):
    strategies = [make() for make in EXAMPLES.values()]
    strategies.append(ttr.StaticRouting(delta=some(L, E, seed=5)))  # two of one kind keep their tensors apart
    ttr.save(str(tmp_path / "set"), strategies)
    back = ttr.load(str(tmp_path / "set"))
    for a, b in zip(strategies, back, strict=True):
        assert_same(a, b)


def test_a_state_comes_back_and_goes_on(tmp_path, olmoe, prompts):
    ids = prompts(30, 20)
    call = {"attention_mask": (ids != 0).long(), "max_new_tokens": 4, "do_sample": False}
    with ttr.adapt(olmoe, ttr.Rerouting(lr=0.2), no_harm=False) as adapted:
        adapted.generate(ids, **call)
        state = adapted.state
        folder = ttr.save(tmp_path / "state", state)
        back = ttr.load(folder)
        out = adapted.generate(ids, state=state, **call)
        assert torch.equal(adapted.generate(ids, state=back, **call), out)
    assert back.fingerprint == state.fingerprint
    assert torch.equal(back.tensors["rerouting"]["delta"], state.tensors["rerouting"]["delta"])
    assert back.tensors["rerouting"]["delta"].any()


def test_an_empty_state_comes_back(tmp_path):
    assert ttr.load(ttr.save(tmp_path / "state", ttr.AdaptationState())).tensors == {}


def test_a_folder_holds_json_and_safetensors_and_nothing_else(tmp_path):
    folder = ttr.save(tmp_path / "mask", [make() for make in EXAMPLES.values()])
    manifest, tensors = sorted(folder.iterdir(), key=lambda f: f.suffix)
    assert json.loads(manifest.read_text())["schema"] == 1
    assert set(safetensors.torch.load_file(tensors)) == {"4/mask", "5/delta", "5/mask"}


def test_saving_again_replaces_everything_and_only_its_own(tmp_path):
    folder = ttr.save(tmp_path / "set", EXAMPLES["static_routing"]())
    (folder / "notes.txt").write_text("mine")
    ttr.save(folder, EXAMPLES["expert_mask"]())
    assert_same(ttr.load(folder)[0], EXAMPLES["expert_mask"]())
    assert (folder / "notes.txt").read_text() == "mine"
    assert len(list(folder.iterdir())) == 3


def test_what_is_no_artefact_is_not_overwritten(tmp_path):
    (tmp_path / "letters.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "letters.txt"):
        with pytest.raises(ttr.ArtefactError, match="Choose another path"):
            ttr.save(path, ttr.SCMoE())
    assert (tmp_path / "letters.txt").read_text() == "mine"


@pytest.mark.parametrize("what", [None, [], "scmoe", ["scmoe"], ttr.SCMoE, {"delta": 1}], ids=repr)
def test_what_cannot_be_saved(tmp_path, what):
    with pytest.raises(ttr.ConfigError, match="strategies, an adapted model's state or a trace"):
        ttr.save(tmp_path / "x", what)
    assert not (tmp_path / "x").exists()


# --- damage ------------------------------------------------------------------------------------------


def saved(tmp_path):
    """A folder with a mask and a delta, its manifest and its tensor file."""
    folder = ttr.save(tmp_path / "artefact", [EXAMPLES["expert_mask"](), EXAMPLES["static_routing"]()])
    (tensors,) = folder.glob("*.safetensors")
    return folder, folder / "ttrouting.json", tensors


def test_a_missing_folder_manifest_or_tensor_file(tmp_path):
    with pytest.raises(ttr.ArtefactError, match=r"holds no ttrouting\.json. Give a folder that ttr\.save wrote"):
        ttr.load(tmp_path / "nowhere")
    folder, manifest, tensors = saved(tmp_path)
    with pytest.raises(ttr.ArtefactError, match="Give a folder"):
        ttr.load(manifest)
    tensors.rename(tmp_path / "away")
    with pytest.raises(ttr.ArtefactError, match=r"it is missing, cut short or was changed\. Save it again"):
        ttr.load(folder)
    manifest.unlink()
    with pytest.raises(ttr.ArtefactError, match="holds no"):
        ttr.load(folder)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_file_that_is_cut_short(tmp_path, share):
    folder, manifest, tensors = saved(tmp_path)
    for file in (tensors, manifest):
        whole = file.read_bytes()
        file.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ttr.ArtefactError, match="Save it again"):
            ttr.load(folder)
        file.write_bytes(whole)
    assert len(ttr.load(folder)) == 2


def test_any_changed_byte_is_noticed(tmp_path):
    folder, manifest, tensors = saved(tmp_path)
    for file in (tensors, manifest):
        whole = file.read_bytes()
        for place in range(0, len(whole), 23):
            # to another letter, so that most of the manifest stays readable
            changed = bytes([whole[place] ^ 1])
            if file == manifest and (whole[place : place + 1] + changed).isspace():
                continue  # space for space means the same
            file.write_bytes(whole[:place] + changed + whole[place + 1 :])
            with pytest.raises(ttr.ArtefactError):
                ttr.load(folder)
        file.write_bytes(whole)


def forge(folder, change):
    """Change a manifest and make its hash fit again: what somebody could do on purpose."""
    file = folder / "ttrouting.json"
    manifest = json.loads(file.read_text())
    del manifest["sha256"]
    change(manifest)
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(manifest))


FORGERIES = {
    "schema": (lambda m: m.update(schema=2), ttr.ArtefactError, "has schema 2, this version reads 1"),
    "no schema": (lambda m: m.pop("schema"), ttr.ArtefactError, "has schema None"),
    "kind": (lambda m: m.update(kind="pickle"), ttr.ArtefactError, "kind 'pickle'"),
    "no strategies": (lambda m: m.pop("strategies"), ttr.ArtefactError, "lacks its content"),
    "strategies of text": (lambda m: m.update(strategies=["scmoe"]), ttr.ArtefactError, "lacks its content"),
    "no name": (lambda m: m["strategies"][0].pop("strategy"), ttr.ArtefactError, "lacks its content"),
    "path": (lambda m: m.update(tensors="../" * 22), ttr.ArtefactError, "lacks its content"),
    # a name is looked up among what is installed, and never imported
    "code": (lambda m: m["strategies"][0].update(strategy="os:system"), ttr.ConfigError, "No strategy 'os:system'"),
    "class": (
        lambda m: m["strategies"][0].update(strategy="ttrouting.strategies.scmoe.SCMoE"),
        ttr.ConfigError,
        "No strategy",
    ),
    "flag": (
        lambda m: m["strategies"][0].update(trust_remote_code=True),
        ttr.ConfigError,
        "has no option 'trust_remote_code'",
    ),
    "value": (lambda m: m["strategies"][0].update(at="somewhere"), ttr.ConfigError, "cannot be 'somewhere'"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_manifest(tmp_path, name):
    change, error, words = FORGERIES[name]
    folder, *_ = saved(tmp_path)
    forge(folder, lambda manifest: None)
    assert len(ttr.load(folder)) == 2, "a forgery without a change passes: the hash is no signature"
    forge(folder, change)
    with pytest.raises(error, match=words):
        ttr.load(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"calibration": {"mean_k": 2.0}}, "calibration holds"),
        ({"calibration": {**CALIBRATION, "kl": "low"}}, "must be a number"),
        ({"calibration": [1, 2]}, r"must come from ttr\.calibrate"),
        ({"sensitivity": 5}, "a number for each layer"),
        ({"sensitivity": ["a"]}, "must be a number"),
        ({"k_min": {"a": 1}}, "must be a whole number"),
    ],
)
def test_values_of_a_wrong_kind_in_a_manifest(tmp_path, change, words):
    folder = ttr.save(tmp_path / "k", EXAMPLES["dynamic_k"]())
    forge(folder, lambda manifest: manifest["strategies"][0].update(change))
    with pytest.raises(ttr.ConfigError, match=words):
        ttr.load(folder)


class Runs:
    """Unpickled, it would make a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (os.mkdir, (str(self.file),))


def test_a_pickle_is_not_read(tmp_path):
    folder, _, tensors = saved(tmp_path)
    mark = tmp_path / "executed"
    for data in (pickle.dumps(Runs(mark)), b"\x80\x02" + pickle.dumps({"0/mask": Runs(mark)})):
        digest = hashlib.sha256(data).hexdigest()
        tensors.unlink(missing_ok=True)
        tensors = folder / f"tensors-{digest[:16]}.safetensors"
        tensors.write_bytes(data)
        forge(folder, lambda manifest, digest=digest: manifest.update(tensors=digest))
        with pytest.raises(ttr.ArtefactError, match="is no safetensors file"):
            ttr.load(folder)
    assert not mark.exists()


def test_artefacts_of_another_model(tmp_path, olmoe):
    with ttr.adapt(olmoe, "rerouting") as adapted:
        adapted.generate(torch.arange(3, 33)[None], max_new_tokens=1)
        state = ttr.load(ttr.save(tmp_path / "state", adapted.state))
    mask = ttr.ExpertMask(mask=torch.arange(E).expand(L, E) < 5, fingerprint=state.fingerprint)
    ttr.save(tmp_path / "mask", mask)
    ttr.adapt(olmoe, ttr.load(tmp_path / "mask")).close()
    other = build("olmoe", seed=1)
    with pytest.raises(ttr.UnsupportedModelError, match="Make it again on this model"):
        ttr.adapt(other, ttr.load(tmp_path / "mask"))
    with ttr.adapt(other, "rerouting") as adapted, pytest.raises(ttr.UnsupportedCallError, match="another model"):
        adapted.generate(torch.arange(3, 33)[None], state=state, max_new_tokens=1)


# --- a kill at any moment ------------------------------------------------------------------------------

SAVER = """
import os, sys
import torch
import ttrouting as ttr

EVENTS = "open os.rename os.remove os.mkdir os.rmdir os.listdir os.scandir shutil.rmtree".split()
folder = sys.argv[1]
new = ttr.StaticRouting(delta=torch.full((4, 8), 2.0))
ttr.save(folder + "-warm", new)  # imports and the like are over

def save_until(step):
    if os.fork():
        return os.waitstatus_to_exitcode(os.wait()[1])
    left = [step]

    def stop(event, arguments):
        if event in EVENTS and folder in str(arguments[0]):
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)

    sys.addaudithook(stop)
    ttr.save(folder, new)
    os._exit(0)

step = 1
while True:
    ttr.save(folder, ttr.StaticRouting(delta=torch.full((4, 8), 1.0)))
    done = save_until(step) == 0
    (found,) = ttr.load(folder)
    print(step, float(found.delta.min()), float(found.delta.max()), flush=True)
    if done:
        break
    step += 1
ttr.save(folder, new)
print(sorted(os.listdir(folder)) == sorted(os.listdir(folder + "-warm")))
"""


def test_a_kill_at_any_moment_leaves_the_old_folder_or_the_new_one(tmp_path):
    """A process that dies before its n-th operation on the folder, for every n."""
    done = subprocess.run(
        [sys.executable, "-c", SAVER, str(tmp_path / "set")], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    *lines, clean = done.stdout.split("\n")[:-1]
    found = [tuple(map(float, line.split()[1:])) for line in lines]
    assert len(found) >= 6
    assert set(found) == {(1.0, 1.0), (2.0, 2.0)}
    assert found == sorted(found), "old until a moment, new from then on"
    assert found[-1] == (2.0, 2.0)
    assert clean == "True", "a later save cleans up"


def test_a_kill_during_the_first_save_does_not_block_the_next(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / ".draft").write_bytes(b"half")
    (folder / "tensors-0123456789abcdef.safetensors").write_bytes(b"whole, but no manifest yet")
    with pytest.raises(ttr.ArtefactError, match="holds no"):
        ttr.load(folder)
    ttr.save(folder, ttr.SCMoE(beta=0.3))
    assert ttr.load(folder) == [ttr.SCMoE(beta=0.3)]
    assert len(list(folder.iterdir())) == 2
