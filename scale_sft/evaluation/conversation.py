"""A conversation with a model in memory, whose adapter can be swapped between two answers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from scale_sft.adapters.format import CONFIG_FILE, Adapter
from scale_sft.adapters.live import LiveAdapter, Prepared, load_adapter
from scale_sft.config.options import ModelConfig
from scale_sft.data.turn_ends import INFO_KEY, ids_of, with_end
from scale_sft.errors import UserError, first_line
from scale_sft.model.empty import text_config
from scale_sft.model.loading import load_base, load_model_config, load_tokenizer

from .evaluate_model import model_section

if TYPE_CHECKING:
    from transformers import GenerationConfig

Say = Callable[[str], None]
"""Takes the next piece of an answer."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn."""

    temperature: float = 0.0  # 0: the most likely token
    top_p: float = 1.0
    max_new_tokens: int = 256


class Conversation:
    """Questions and answers so far, the model that answers, and its adapter.

    Args:
        model: a causal language model with its base's weights.
        tokenizer: of the base.
        sampling: of all answers.
        form: the text that is sent for a question, with {} in its place; None: as the chat template writes it.

    Attributes:
        turns: the conversation as a chat template takes it, without the system prompt.
    """

    def __init__(self, model: Any, tokenizer: Any, sampling: Sampling, form: str | None = None):
        self.model, self.tokenizer, self.sampling, self._form = model, tokenizer, sampling, form
        self.turns: list[dict[str, str]] = []
        self.system: str | None = None
        self.adapter: Path | None = None
        self._own_template = tokenizer.chat_template
        self._live: LiveAdapter | None = None
        self._ready: Prepared | None = None
        self._info: dict[str, Any] = {}
        self._stopped = False

    @property
    def alone(self) -> bool:
        """True if a question is sent without those before it: there is a `form`, or no chat template."""
        return self._form is not None or not self.tokenizer.chat_template

    @property
    def entries(self) -> int:
        """The number of entries of the present adapter."""
        return self._ready.active if self._ready else 0

    def swap(self, folder: Path) -> None:
        """Replace the present adapter, in O(K).

        Raises:
            UserError: it is damaged, or of another base; the present one stays.
        """
        adapter = Adapter.load(folder)
        if self._live is None:
            self._live = load_adapter(self.model, adapter)
        else:
            self._live.swap(adapter)
        self._ready = self._live.applied
        self.adapter, self._info = folder, adapter.info
        self.tokenizer.chat_template = adapter.info.get("chat_template") or self._own_template

    def reset(self, system: str | None = None) -> None:
        """Forget all turns, and set the system prompt or none."""
        self.turns, self.system = [], system

    def ask(self, question: str, say: Say) -> str:
        """Answer a question, piece by piece; question and answer become part of the conversation.

        Raises:
            UserError: the template refuses the conversation, or it has filled the model's positions; it is unchanged.
        """
        turns = [*self.turns, {"role": "user", "content": question}]
        answer = self._answer(turns, say)
        self.turns = [*turns, {"role": "assistant", "content": answer}]
        return answer

    def base_answer(self, say: Say) -> str:
        """Let the base answer the last question; the adapter is taken out for it, and the conversation stays.

        Raises:
            UserError: there is no adapter or no question.
        """
        if self._live is None or self._ready is None:
            raise UserError("/base: got no adapter, so the base has answered already. Fix: /adapter PATH")
        if not self.turns:
            raise UserError("/base: got no question yet, expected one before it")
        self._live.swap(None)
        try:
            return self._answer(self.turns[:-1], say)
        finally:
            self._live.swap(self._ready)

    def stop(self) -> None:
        """End the present answer after its next token; safe in a signal handler."""
        self._stopped = True

    # --- one answer -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _answer(self, turns: list[dict[str, str]], say: Say) -> str:
        inputs = self._encode(turns).to(self.model.device)
        self._stopped = False
        with self._live.hold() if self._live else nullcontext():
            output = self.model.generate(
                **inputs,
                generation_config=self._settings(inputs["input_ids"].shape[1]),
                streamer=_pieces(self.tokenizer, say),
                stopping_criteria=[lambda ids, scores: torch.full(ids.shape[:1], self._stopped, device=ids.device)],
            )
        ids = output[0, inputs["input_ids"].shape[1] :]
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _encode(self, turns: list[dict[str, str]]) -> Any:
        if self.alone:
            return self.tokenizer((self._form or "{}").replace("{}", turns[-1]["content"]), return_tensors="pt")
        messages = [{"role": "system", "content": self.system}] if self.system is not None else []
        try:
            return self.tokenizer.apply_chat_template(
                messages + turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except Exception as error:  # jinja2's TemplateError, or whatever a template's own code meets
            raise UserError(
                f"chat template: got '{first_line(error)}', expected it to take this conversation. Fix: /reset, and no "
                "system prompt where the template knows none"
            ) from None

    def _settings(self, length: int) -> GenerationConfig:
        """Settings that take nothing but token ids from the base."""
        from transformers import GenerationConfig

        positions = getattr(text_config(self.model.config), "max_position_embeddings", None)
        positions = positions or length + self.sampling.max_new_tokens
        if length >= positions:
            raise UserError(
                f"conversation: got {length:,} tokens, the model has {positions:,} positions. Fix: /reset starts over"
            )
        own, drawn = self.model.generation_config, self.sampling.temperature > 0
        ends = [*ids_of(own.eos_token_id), *ids_of(self.tokenizer.eos_token_id)]
        return GenerationConfig(
            do_sample=drawn,
            temperature=self.sampling.temperature if drawn else None,
            top_p=self.sampling.top_p if drawn else None,
            top_k=0 if drawn else None,
            use_cache=True,
            max_new_tokens=min(self.sampling.max_new_tokens, positions - length),
            bos_token_id=own.bos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=with_end(sorted(set(ends)) or None, self._info.get(INFO_KEY)),
        )


def open_conversation(
    what: str,
    sampling: Sampling,
    *,
    base: str | None = None,
    form: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
) -> Conversation:
    """Load a model, or an adapter with its base.

    Args:
        what: an adapter folder, a run that holds one, a model folder, a hub id or `demo`.
        base: of the adapter, if it is not where the adapter says.
        form: see `Conversation`.

    Raises:
        UserError: there is no such model or adapter, or they do not belong together.
    """
    if form is not None and "{}" not in form:
        raise UserError(f"prompt: got {form!r}, expected a text with {{}} where the question goes")
    folder = _adapter_folder(what)
    path = Path(what).expanduser()
    if not path.exists() and (what.startswith((".", "~")) or path.is_absolute() or len(path.parts) > 2):
        raise UserError(
            f"what: got '{what}', which does not exist, expected the folder of an adapter, run or model. Fix: check it"
        )
    if folder is None and base is not None:
        raise UserError(f"base: got {base} for '{what}', which is no adapter. Fix: leave it out")
    config = ModelConfig(base=base or what, dtype=dtype)
    config = model_section(config, folder, base_given=base is not None)
    place = _device(device)
    tokenizer = load_tokenizer(config)
    model = load_base(config, load_model_config(config), place).eval()
    conversation = Conversation(model, tokenizer, sampling, form)
    if folder is not None:
        conversation.swap(folder)
    return conversation


def _adapter_folder(what: str) -> Path | None:
    """Find the adapter that a path means: itself, or that of a run; None for anything else."""
    folder = Path(what).expanduser()
    return next((one for one in (folder, folder / "adapter") if (one / CONFIG_FILE).is_file()), None)


def _device(asked: str) -> torch.device:
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: got '{asked}', which torch cannot use here: {first_line(error)}") from None
    return device


def _pieces(tokenizer: Any, say: Say) -> Any:
    """Make a streamer that gives an answer to `say` word by word."""
    from transformers import TextStreamer

    class Pieces(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                say(text)

    return Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)
