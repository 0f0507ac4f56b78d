"""Shared fixtures: a tiny OLMoE in fp32 and in fp64, and a fingerprint of everything a model is made of.

The models are random: nothing here says whether a strategy helps.
"""

import functools
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from families.build import build
from oracles.double import InDouble
from ttrouting import refsets

State = dict[str, Any]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The models are too small for a second thread, which would only disturb the other worker."""
    torch.set_num_threads(1)


def _new(dtype: torch.dtype) -> Any:
    model = build("olmoe", dtype=dtype)
    if dtype == torch.float64:  # grouped matmul takes no fp64 on a CPU
        model.set_experts_implementation("eager")
    model.generation_config.eos_token_id = None  # random models end at once; tests of endings set it themselves
    return model


@pytest.fixture
def true_double() -> Iterator[None]:
    """No fp32 inside fp64 models during the test."""
    with InDouble():
        yield


@pytest.fixture
def olmoe() -> Any:
    """A tiny OLMoE (4 layers, 8 experts, 3 per token) in fp32, as it is loaded by default."""
    return _new(torch.float32)


@pytest.fixture
def olmoe64() -> Any:
    """The same weights in fp64 with eager experts: rows do not depend on the batch they are in.

    Not with eager attention: its softmax is in fp32, where the fp64 mask value overflows and padding becomes NaN.
    """
    return _new(torch.float64)


@pytest.fixture
def prompts() -> Callable[..., Tensor]:
    """`prompts(*lengths, seed=0)`: random token ids `[B, T]`, padded with 0 on the left, no special token inside."""

    def make(*lengths: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        rows = [torch.randint(3, 96, (n,), generator=generator) for n in lengths]
        return torch.stack([F.pad(row, (max(lengths) - len(row), 0)) for row in rows])

    return make


SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
LETTERS = "\n" + "".join(chr(c) for c in range(32, 127) if chr(c) not in "`~^@&")  # with SPECIAL: 96 tokens
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each character and a ChatML template; it fills the vocabulary of the tiny models."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *LETTERS])}
    letters = Tokenizer(BPE(vocabulary, [], unk_token="#"))
    letters.decoder = Fuse()  # without it decoding puts spaces between the letters
    letters.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=letters,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL[3:],
        padding_side="left",
        chat_template=CHATML,
    )


@pytest.fixture(scope="session")
def references(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`references(family="olmoe")`: the folder of a reference set of the tiny model, made once.

    24 questions of random letters in lower case; every second one is answered by what the model itself writes, the
    others (but by chance) wrongly.
    """

    @functools.cache
    def make(family: str = "olmoe", embedder: Any = "model") -> Path:
        model, draw = build(family), random.Random(1)
        rows: list[dict[str, str]] = []
        while len(rows) < 24:
            question = "".join(draw.choice(LETTERS[1:]) for _ in range(draw.randint(4, 14))).lower()
            answer = "".join(draw.choice(LETTERS[1:]) for _ in range(draw.randint(1, 4)))
            if len(rows) % 2:
                ids = tokenizer(question, return_tensors="pt")["input_ids"]
                more = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
                answer = tokenizer.decode(more[0, ids.shape[1] :])
                if "<" in answer:  # a special token, which would not be read back as it was written
                    continue
            rows.append({"q": question, "a": answer, "n": str(len(rows))})
        folder = tmp_path_factory.mktemp("references") / family
        return refsets.build(
            model, tokenizer, rows, folder, embedder=embedder, prompt="{q}", answer="{a}", task="{n}", keep="all"
        ).path

    return make


def _sha(tensor: Tensor) -> str:
    raw = tensor.detach().cpu().contiguous().view(-1)
    return hashlib.sha256(raw.view(torch.uint8).numpy().tobytes()).hexdigest() if raw.numel() else "empty"


def _state(model: nn.Module) -> State:
    state: State = {
        "functions": (id(F.linear), id(F.softmax), id(torch.topk), id(Tensor.topk)),
        "modes": torch.overrides._len_torch_function_stack(),  # type: ignore[attr-defined]
        "grad": torch.is_grad_enabled(),
        "config": json.dumps(model.config.to_dict(), sort_keys=True, default=str),
        "implementations": (model.config._attn_implementation, model.config._experts_implementation),
    }
    if hasattr(model, "generation_config"):
        state["generation_config"] = json.dumps(model.generation_config.to_dict(), sort_keys=True, default=str)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        state[f"tensor {name}"] = (
            _sha(tensor),
            tensor.dtype,
            tensor.device,
            tensor.requires_grad,
            tensor.grad is None,
        )
    for name, module in model.named_modules():
        state[f"module {name}"] = {
            "class": (type(module), type(module).__call__, type(module).forward),
            "attributes": sorted(vars(module)),
            "forward": vars(module).get("forward"),
            "hooks": {k: list(v.values()) for k, v in vars(module).items() if k.endswith("_hooks")},
            "training": module.training,
        }
    return state


@pytest.fixture
def fingerprint() -> Callable[[nn.Module], State]:
    """`fingerprint(model)`: weights, buffers, gradients, attributes, hooks, forwards, mode, configs, globals.

    A dictionary and not one hash, so that a failing comparison says what was left behind.
    """
    return _state


@pytest.fixture
def untouched() -> Callable[[nn.Module], AbstractContextManager[None]]:
    """`with untouched(model):` fails unless the model is the same after the block as before it."""

    @contextmanager
    def check(model: nn.Module) -> Iterator[None]:
        before = _state(model)
        yield
        assert _state(model) == before

    return check
