"""`scale-sft chat`: who answers, what a pipe prints, and what ends an answer but not the session."""

import os
import signal

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

import scale_sft
from scale_sft.cli.chat import _interrupts
from scale_sft.cli.main import main
from scale_sft.errors import UserError
from scale_sft.evaluation.conversation import Sampling, open_conversation

SHORT = ("--max_new_tokens", "12")
FEW = Sampling(max_new_tokens=12)


@pytest.fixture
def base(tiny_model):
    return tiny_model("llama")


@pytest.fixture
def adapters(base, tmp_path):
    """Two adapters whose answers differ from the base's and from each other."""
    folders = []
    for seed in (1, 2):
        sparse = scale_sft.attach(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), density=0.2, seed=seed)
        sparse.tuning.store.flat.normal_(generator=torch.Generator().manual_seed(seed))
        sparse.carrier.write()
        folders.append(sparse.save(tmp_path / f"run{seed}" / "adapter"))
    return folders


def chat(*arguments, typed: str = ""):
    return CliRunner().invoke(main, ["chat", *map(str, arguments)], input=typed)


def answer_of(what, question: str) -> str:
    """The answer of a model or adapter that was loaded for this question alone."""
    pieces: list[str] = []
    answer = open_conversation(str(what), FEW).ask(question, pieces.append)
    assert "".join(pieces).strip() == answer
    return answer


def test_a_pipe_gets_the_answers_of_whoever_is_asked_and_nothing_else(base, adapters) -> None:
    typed = f"hello\n/base\n/reset\n/adapter {adapters[1]}\nhello\n\n/quit\nnever\n"
    result = chat(adapters[0].parent, *SHORT, typed=typed)  # a run means its adapter
    answers = [answer_of(what, "hello") for what in (adapters[0], base, adapters[1])]
    assert result.exit_code == 0 and len(set(answers)) == 3
    assert [line.strip() for line in result.stdout.split("\n")] == [*"\n".join(answers).split("\n"), ""]
    assert f"{adapters[1]}, " in result.stderr and "new conversation" in result.stderr


def test_a_conversation_keeps_its_turns_and_the_base_sees_the_same_ones(base, adapters) -> None:
    conversation = open_conversation(str(adapters[0]), FEW)
    first = conversation.ask("one", str)
    alone = conversation.ask("two", str)
    assert [turn["role"] for turn in conversation.turns] == ["user", "assistant"] * 2
    before = list(conversation.turns)
    by_base = conversation.base_answer(str)
    assert conversation.turns == before
    plain = open_conversation(str(base), FEW)
    plain.turns = before[:2]
    assert plain.ask("two", str) == by_base
    conversation.turns = before[:2]
    assert conversation.ask("two", str) == alone  # the adapter is back, bit for bit
    conversation.reset("be brief")
    assert conversation.ask("one", str) != first  # the template shows the system prompt


def test_without_a_chat_template_each_question_is_sent_alone_and_a_line_says_so(base, tmp_path) -> None:
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((base / name).read_bytes())
    result = chat(tmp_path, *SHORT, typed="a\nb\n")
    assert result.exit_code == 0 and "no chat template" in result.stderr
    assert result.stdout == chat(base, *SHORT, "--prompt", "{}", typed="a\nb\n").stdout
    assert result.stdout != chat(base, *SHORT, typed="a\nb\n").stdout
    assert chat(tmp_path, "--system", "be brief").exit_code == 1


def test_a_seed_repeats_drawn_answers(base) -> None:
    draw = lambda seed: chat(base, *SHORT, "--temperature", 1.5, "--top_p", 0.9, "--seed", seed, typed="a\nb\n").stdout
    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize(
    ("arguments", "typed", "message"),
    [
        (["{base}"], "/adapter nowhere\n", "nowhere holds no adapter_config.json"),
        (["{base}"], "hello\n/base\n", "/base: got no adapter"),
        (["{adapter}"], "/base\n", "/base: got no question"),
        (["{base}"], "/bse\n", "got /bse, expected one of /adapter, /base"),
        (["{base}", "--base", "x"], "", "which is no adapter"),
        (["{base}", "--prompt", "x"], "", "expected a text with {} where the question goes"),
        (["/nope"], "", "got '/nope', which does not exist"),
        (["runs/none/adapter"], "", "got 'runs/none/adapter', which does not exist"),
        (["{base}", "--device", "moon"], "", "device: got 'moon'"),
        (["{adapter}", "--dtype", "bfloat16"], "", "torch.bfloat16 in the model"),
        (["{base}"], "x" * 2000 + "\n", "positions. Fix: /reset"),
    ],
)
def test_what_cannot_work_ends_a_pipe_with_one_line(base, adapters, arguments, typed, message) -> None:
    fill = {"{base}": base, "{adapter}": adapters[0]}
    result = chat(*(fill.get(argument, argument) for argument in arguments), *SHORT, typed=typed)
    assert result.exit_code == 1 and message in result.stderr
    assert [line for line in result.stderr.splitlines() if line.startswith("error: ")] == [
        result.stderr.splitlines()[-1]
    ]


def test_a_refused_adapter_leaves_the_present_one(base, adapters) -> None:
    conversation = open_conversation(str(adapters[0]), FEW)
    first = conversation.ask("one", str)
    with pytest.raises(UserError, match="nowhere"):
        conversation.swap(base / "nowhere")
    conversation.reset()
    assert conversation.adapter == adapters[0] and conversation.ask("one", str) == first


def test_ctrl_c_ends_the_answer_and_not_the_session(base) -> None:
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs without it
    conversation = open_conversation(str(base), Sampling(max_new_tokens=40))
    whole = conversation.ask("hello", str)
    conversation.reset()
    hook = conversation.model.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with _interrupts(conversation.stop):
        cut = conversation.ask("hello", str)
    hook.remove()
    assert whole.startswith(cut) and len(cut) < len(whole)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, handler)
    conversation.reset()
    assert conversation.ask("hello", str) == whole
