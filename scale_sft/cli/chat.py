"""`scale-sft chat`: talk to a model in the terminal."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from scale_sft.config.click_options import option
from scale_sft.errors import UserError

if TYPE_CHECKING:
    from scale_sft.evaluation.conversation import Conversation

HELP = """\
/adapter PATH   answer with another adapter of this base; without PATH: name the present one
/base           let the base answer the last question
/system TEXT    start over with this system prompt; without TEXT: with none
/reset          start over
/quit           leave (so does Ctrl-D); Ctrl-C stops an answer"""


@click.command()
@click.argument("what", metavar="ADAPTER_OR_MODEL")
@click.option("--base", help="Folder or hub id of the adapter's base, if it is not where the adapter says.")
@click.option("--system", help="System prompt of the conversation.")
@click.option(
    "--prompt",
    metavar="TEXT",
    help=r"Send each question alone, as this text with {} in its place (\n: a new line), instead of a chat template: "
    "for an adapter that was trained on such prompts.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Draw tokens at this temperature; 0 takes the most likely one.",
)
@option(
    "--top_p",
    also=["--top-p"],
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Draw from the most likely tokens that together have this probability.",
)
@option(
    "--max_new_tokens",
    also=["--max-new-tokens"],
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Longest answer, in tokens.",
)
@click.option("--seed", type=click.IntRange(min=0), help="Seed of drawn tokens.  [default: another each time]")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float32"]),
    default="auto",
    show_default=True,
    help="Dtype of the model; auto: that of the adapter, or as the model is stored.",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 ...; auto: a GPU if there is one.")
def chat(
    what: str,
    base: str | None,
    system: str | None,
    prompt: str | None,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    seed: int | None,
    dtype: str,
    device: str,
) -> None:
    r"""Talk to ADAPTER_OR_MODEL: an adapter folder, a run, a model folder, a hub id or demo.

    Reads one question per line and streams the answers. /adapter PATH swaps the adapter, /base shows what the base
    would have answered, /help lists the rest. In a pipe it prints the answers alone.

    \b
    scale-sft chat runs/mine/adapter
    scale-sft chat demo --temperature 0.7 < questions.txt
    scale-sft chat runs/quickstart/adapter --prompt '{}\n'
    """
    import torch

    from scale_sft.evaluation.conversation import Sampling, open_conversation

    sampling = Sampling(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens)
    form = prompt and prompt.replace("\\n", "\n")
    conversation = open_conversation(what, sampling, base=base, form=form, dtype=dtype, device=device)
    if system is not None and conversation.alone:
        raise UserError("system: got a text, expected none without a chat template. Fix: leave it out")
    conversation.reset(system)
    if seed is not None:
        torch.manual_seed(seed)
    terminal = sys.stdin.isatty()
    if terminal:
        _note(_described(conversation) + "; /help lists commands")
    if conversation.alone and prompt is None:
        _note("note: this model has no chat template, so each question is sent alone, as it is written")
    lines = _typed() if terminal else iter(sys.stdin)
    for line in lines:
        if not _handle(line.strip(), conversation, patient=terminal):
            return


def _handle(line: str, conversation: Conversation, *, patient: bool) -> bool:
    """Do what a line says; returns False if the session is over.

    Args:
        patient: show errors and continue, instead of raising them.
    """
    name, _, rest = line.partition(" ")
    try:
        if name in ("/quit", "/exit"):
            return False
        if name.startswith("/"):
            _command(name, rest.strip(), conversation)
        elif line:
            _stream(conversation, lambda say: conversation.ask(line, say))
    except UserError as error:
        if not patient:
            raise
        click.secho(f"error: {error}", fg="red", err=True)
    return True


def _command(name: str, rest: str, conversation: Conversation) -> None:
    if name == "/adapter":
        if rest:
            conversation.swap(Path(rest).expanduser())
        _note(_described(conversation))
    elif name == "/base":
        _stream(conversation, conversation.base_answer)
    elif name == "/system":
        if rest and conversation.alone:
            raise UserError("/system: got a text, expected none without a chat template")
        conversation.reset(rest or None)
        _note("new conversation, " + ("with this system prompt" if rest else "without a system prompt"))
    elif name == "/reset":
        conversation.reset(conversation.system)
        _note("new conversation")
    elif name == "/help":
        click.echo(HELP)
    else:
        raise UserError(f"command: got {name}, expected one of /adapter, /base, /system, /reset, /help, /quit")


def _note(text: str) -> None:
    """Say something that is no answer: on stderr, so that a pipe holds the answers alone."""
    click.secho(text, fg="bright_black", err=True)


def _described(conversation: Conversation) -> str:
    model = type(conversation.model).__name__
    if conversation.adapter is None:
        return f"{model} without an adapter"
    return f"{conversation.adapter}, {conversation.entries:,} entries on {model}"


def _stream(conversation: Conversation, answer: Callable[[Callable[[str], None]], str]) -> None:
    """Print an answer as it is generated; Ctrl-C ends the answer and not the session."""
    with _interrupts(conversation.stop):
        answer(lambda piece: click.echo(piece, nl=False))
    click.echo()


@contextmanager
def _interrupts(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` on Ctrl-C within the `with` block."""
    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _typed() -> Iterator[str]:
    """Yield lines that somebody types, until Ctrl-D."""
    with suppress(ImportError):
        import readline  # noqa: F401 - arrow keys and history for input()
    while True:
        try:
            yield input("> ")
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo("\n(Ctrl-D or /quit leaves)", err=True)


COMMANDS = (chat,)
