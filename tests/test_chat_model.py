"""The chat with a model in this process: its answers are those of `generate` on the text that a turn stands for."""

import os
import signal
import threading

import pytest
import torch

import ttrouting as ttr
from families.build import build
from ttrouting.cli.chat.conversation import Turn
from ttrouting.cli.chat.local import LocalEngine
from ttrouting.cli.chat.screen import Screen
from ttrouting.cli.chat.switches import Settings, Switches
from ttrouting.cli.chat.talk import Chat
from ttrouting.cli.output import Output
from ttrouting.pocket import POCKET_DIR

needs_pocket = pytest.mark.skipif(
    not (POCKET_DIR / "model.safetensors").is_file(), reason="the pocket model's weights are not in this checkout"
)


def talk(model, tokenizer, name="tiny", live=False, **settings):
    engine = LocalEngine(model, tokenizer, name)
    return Chat(engine, Screen(Output(), live), Settings(**{"max_new_tokens": 12, **settings}), Switches(), live)


@pytest.fixture(scope="module")
def pocket():
    return ttr.load_pocket()


@pytest.fixture
def tiny(tokenizer):
    model = build("olmoe", max_position_embeddings=256)
    model.generation_config.eos_token_id = None  # a random model would end at once
    return model, tokenizer


def completion(model, tokenizer, text, new=12, **inputs):
    """What a model writes after a text, special tokens left out; `model` may be adapted."""
    ids = tokenizer(text, return_tensors="pt", **inputs)["input_ids"]
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def script(model, ids):
    """Let the model write these tokens, whatever it reads."""
    plain = model.forward

    def scripted(*args, **kwargs):
        out = plain(*args, **kwargs)
        out.logits[:, -1] = -1e9
        out.logits[:, -1, next(ids)] = 0.0
        return out

    model.forward = scripted


# --- what is read -------------------------------------------------------------------------------------


@needs_pocket
def test_turns_of_the_pocket_model_are_solved_examples(pocket):
    model, tokenizer = pocket
    chat = talk(model, tokenizer, "pocket")
    for question in ("12+30", "45+11"):
        chat.handle(question)
    first = completion(model, tokenizer, "Q: 12+30\nA:")
    second = completion(model, tokenizer, f"Q: 12+30\nA: {first}\nQ: 45+11\nA:")
    assert [t.answer for t in chat.turns] == [first, second]
    assert first == "42"
    assert "Q: <message>" in chat.engine.advice


def test_a_chat_template_is_used_where_there_is_one(tiny):
    model, tokenizer = tiny
    chat = talk(model, tokenizer)
    chat.handle("hello")
    begin = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    first = completion(model, tokenizer, begin, add_special_tokens=False)
    assert chat.turns[0].answer == first
    chat.turns[0] = Turn("hello", "fine")
    chat.handle("you")
    more = f"{begin}fine<|im_end|>\n<|im_start|>user\nyou<|im_end|>\n<|im_start|>assistant\n"
    assert chat.turns[1].answer == completion(model, tokenizer, more, add_special_tokens=False)
    assert chat.engine.length(chat.turns[:1]) == len(
        tokenizer(more.replace("you", ""), add_special_tokens=False)["input_ids"]
    )


def test_text_of_the_next_turn_ends_an_answer(tiny):
    """A base model goes on with a question of its own: the answer ends there."""
    model, tokenizer = tiny
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer._tokenizer, eos_token="</s>", pad_token="<pad>")
    engine = LocalEngine(model, tokenizer, "tiny")
    assert "no chat template" in engine.advice
    script(model, iter(tokenizer("ab\nQ: cd")["input_ids"] * 10))
    chat = Chat(engine, Screen(Output(), False), Settings(), Switches())
    chat.handle("hello")
    assert chat.turns[0].answer == "ab"
    assert chat.answers[0][1].ended == "end"


def test_an_answer_may_be_empty(tiny, capsys):
    model, tokenizer = tiny
    model.generation_config.eos_token_id = 2
    script(model, iter([2] * 10))
    chat = talk(model, tokenizer)
    chat.handle("hello")
    assert (chat.turns[0].answer, chat.answers[0][1].pieces, chat.answers[0][1].ended) == ("", (), "end")
    assert "(an empty answer)" in capsys.readouterr().err


# --- context ------------------------------------------------------------------------------------------


def test_turns_that_no_longer_fit_are_told(tiny, capsys):
    model, tokenizer = tiny
    chat = talk(model, tokenizer)
    chat.turns = [Turn("a" * 60, "b"), Turn("c" * 60, "d"), Turn("e" * 60, "f")]
    whole = chat.engine.length(chat.turns)
    assert whole > 256
    chat.handle("hello")
    err = capsys.readouterr().err
    assert "1 of 3 earlier turns no longer fit into the context of 256 tokens" in err
    assert "/clear" in err
    assert len(chat.turns) == 4  # nothing is lost
    left = "".join(
        f"<|im_start|>user\n{t.user}<|im_end|>\n<|im_start|>assistant\n{t.answer}<|im_end|>\n"
        for t in chat.turns[1:3]
    )
    text = f"{left}<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert chat.turns[3].answer == completion(model, tokenizer, text, add_special_tokens=False)


def test_a_message_that_alone_does_not_fit_is_refused(tiny, capsys):
    chat = talk(*tiny)
    chat.handle("x" * 300)
    assert "This message alone has" in capsys.readouterr().err
    assert chat.turns == []


def test_an_answer_that_fills_the_context_says_so(tiny, capsys):
    chat = talk(*tiny, max_new_tokens=400)
    chat.handle("x" * 100)
    answer = chat.answers[0][1]
    assert answer.ended == "context"
    assert answer.prompt_tokens + answer.tokens == 256
    assert "the model's context is full" in " ".join(capsys.readouterr().err.split())
    chat.handle("/clear")
    chat.handle("/set max_new_tokens 3")
    chat.handle("x")
    assert chat.answers[1][1].ended == "length"


@needs_pocket
def test_characters_without_a_token_are_told(pocket, capsys):
    chat = talk(*pocket, "pocket")
    chat.handle("1é+ü")
    assert "no token for é ü" in capsys.readouterr().err


# --- strategies -----------------------------------------------------------------------------------------


def test_an_adaptation_goes_on_or_begins_anew_as_chosen(tiny):
    model, tokenizer = tiny
    lines = ("the first message is long enough", "the second message")
    texts = {}
    for choice in ("continue", "fresh"):
        chat = talk(model, tokenizer, no_harm=False)
        chat.handle(f"/set adaptation {choice}")
        chat.handle("/set rerouting.lr 0.5")
        chat.handle("/on rerouting")
        for line in lines:
            chat.handle(line)
        texts[choice] = [t.answer for t in chat.turns]
        states = [a.state.tensors["rerouting"]["delta"] for _, a in chat.answers]
        chat.engine.close()
        with ttr.adapt(model, ttr.Rerouting(lr=0.5), no_harm=False, tokenizer=tokenizer) as adapted:
            state = None
            for i, line in enumerate(lines):
                messages = []
                for turn in chat.turns[:i]:
                    messages += [("user", turn.user), ("assistant", turn.answer)]
                written = tokenizer.apply_chat_template(
                    [{"role": r, "content": c} for r, c in [*messages, ("user", line)]],
                    tokenize=False,
                    add_generation_prompt=True,
                )
                ids = tokenizer(written, return_tensors="pt", add_special_tokens=False)["input_ids"]
                adapted.generate(ids, max_new_tokens=12, do_sample=False, state=state)
                assert torch.equal(adapted.state.tensors["rerouting"]["delta"], states[i])
                state = adapted.state if choice == "continue" else None
    assert texts["continue"][0] == texts["fresh"][0]


def test_what_was_learned_goes_with_its_strategy(tiny, capsys):
    chat = talk(*tiny, no_harm=False)
    chat.handle("/on rerouting")
    chat.handle("the first message is long enough")
    chat.handle("/off rerouting")
    assert "What rerouting learned is forgotten." in capsys.readouterr().err
    chat.handle("/on rerouting")
    chat.handle("/regen")
    assert torch.equal(*(a.state.tensors["rerouting"]["delta"] for _, a in chat.answers))  # from where it began


@needs_pocket
def test_a_skipped_adaptation_is_in_the_footer(pocket, capsys):
    chat = talk(*pocket, "pocket")
    chat.handle("/on rerouting")
    chat.handle("1+1")
    assert "rerouting skipped: 9 loss tokens, 16 are needed" in " ".join(capsys.readouterr().err.split())


def test_a_refused_combination_leaves_the_chat_as_it_was(tiny, capsys):
    model, tokenizer = tiny
    chat = talk(model, tokenizer)
    chat.handle("/on scmoe")
    chat.handle("/set scmoe.weak rank:99")
    assert "scmoe.weak='rank:99' needs 99 experts" in " ".join(capsys.readouterr().err.split())
    assert chat.switches.on == (ttr.SCMoE(),)
    chat.handle("hello")
    with_scmoe = chat.turns[0].answer
    chat.engine.close()
    with ttr.adapt(model, ttr.SCMoE()) as adapted:
        text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
        assert with_scmoe == completion(adapted, tokenizer, text, add_special_tokens=False)


def test_diff_marks_what_the_strategy_changed(tiny, capsys):
    model, tokenizer = tiny
    chat = talk(model, tokenizer)
    chat.handle("hello")
    base = chat.turns[0].answer
    chat.handle("/set scmoe.alpha 0.0001")
    chat.handle("/set scmoe.judge_on none")  # the message is too short to try contrast on
    chat.handle("/on scmoe")
    capsys.readouterr()
    found = chat.compare()
    assert "".join(found[0].pieces) == found[0].text == base
    assert "".join(found[1].pieces) == found[1].text != base
    chat.handle("/diff")
    out = capsys.readouterr().out
    assert "[-" in out
    assert "{+" in out


def test_routing_shows_the_change_in_experts(tiny, capsys):
    """Beside plain counts of dynamic-k on the model's own router logits, in layer 0: nothing came before it."""
    model, tokenizer = tiny
    chat = talk(model, tokenizer)
    chat.handle("hello")
    chat.handle("/routing")
    assert "no strategy was on" in capsys.readouterr().err
    chat.handle("/set dynamic_k.p 0.3")
    chat.handle("/on dynamic_k")
    chat.handle("/regen")
    change = chat.engine.routing()
    text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    ids = chat.engine._last[0]
    assert tokenizer.decode(ids).startswith(text)
    with torch.no_grad():
        logits = model(torch.tensor([ids]), output_router_logits=True).router_logits[0]
    pi = logits.softmax(-1)  # [T, E]
    ranked = pi.topk(3, -1).values
    kept = (ranked.cumsum(-1) - ranked < 0.3).sum(-1).float()
    assert change.layers[0].mean_k == pytest.approx((3.0, float(kept.mean())))
    entropy = float(-(pi * pi.log()).sum(-1).mean())
    assert change.layers[0].entropy == pytest.approx((entropy, entropy), rel=1e-4)
    lost = dict(change.layers[0].lost)
    order = pi.topk(3, -1).indices
    share = torch.zeros(8).index_add(0, order.flatten(), torch.ones(order.numel())) / len(ids)
    mask = ranked.cumsum(-1) - ranked < 0.3
    thinned = torch.zeros(8).index_add(0, order[mask], torch.ones(int(mask.sum()))) / len(ids)
    worst = int((thinned - share).argmin())
    assert lost[worst] == pytest.approx(float((thinned - share)[worst]), abs=1e-4)
    assert change.layers[0].gained == ()


# --- Ctrl-C -------------------------------------------------------------------------------------------


def test_ctrl_c_stops_the_answer_and_leaves_no_trace(tiny, untouched, capsys):
    model, tokenizer = tiny
    with untouched(model):
        chat = talk(model, tokenizer, live=True, max_new_tokens=200)
        chat.handle("/on dynamic_k")
        write, pressed = chat.screen.writer, []

        def pressing():
            writer = write()
            feed = writer.feed

            def feed_and_press(text):
                feed(text)
                if not pressed:
                    pressed.append(True)
                    os.kill(os.getpid(), signal.SIGINT)

            writer.feed = feed_and_press
            return writer

        chat.screen.writer = pressing
        before = signal.getsignal(signal.SIGINT)
        chat.handle("hello")
        answer = chat.answers[0][1]
        assert answer.ended == "stopped"
        assert 0 < answer.tokens < 200
        assert chat.turns == [Turn("hello", answer.text, True, (ttr.DynamicK().to_dict(),))]
        assert signal.getsignal(signal.SIGINT) is before
        chat.screen.writer = write
        chat.handle("/set max_new_tokens 5")
        chat.handle("and now")
        assert chat.answers[1][1].ended == "length"
        chat.engine.close()


def test_ctrl_c_while_it_adapts_takes_everything_back(tiny, untouched):
    model, tokenizer = tiny
    with untouched(model):
        chat = talk(model, tokenizer, live=True)
        chat.handle("/set rerouting.steps 10000")
        chat.handle("/on rerouting")
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            chat.handle("a message of more than sixteen tokens")
        assert chat.turns == []
        chat.engine.close()
