"""From files to batches: examples tokenised and masked, in an order that depends on nothing but seed and step.

Shapes: B sequences of a micro-batch, L their padded length in tokens.
"""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import DEMO, DataConfig
from .errors import UserError
from .json_guard import refuse_unreadable_json
from .model import PACKAGE
from .spiel.delta import seeded_generator

IGNORED = -100
"""Label of a token that does not count."""


@dataclass(frozen=True)
class Examples:
    """Tokenised examples: `input_ids[n]` and, parallel to it, `labels[n]` (IGNORED where a token does not count)."""

    input_ids: list[list[int]]
    labels: list[list[int]]
    source: str

    def __len__(self) -> int:
        return len(self.input_ids)

    def digest(self) -> str:
        """SHA-256 over all tokens and labels: 64 hex digits."""
        sha = hashlib.sha256()
        for ids, labels in zip(self.input_ids, self.labels, strict=True):
            sha.update(array("q", [len(ids), *ids, *labels]).tobytes())
        return sha.hexdigest()

    def target_tokens(self, members: Sequence[int]) -> int:
        """How many tokens of these examples count; the first of a sequence is never predicted."""
        return sum(sum(label != IGNORED for label in self.labels[n][1:]) for n in members)


def load_examples(source: str, split: str, tokenizer: Any, config: DataConfig, limit: int | None) -> Examples:
    """Read, tokenise and mask the examples of a .json or .jsonl file ('demo' for those that ship).

    Rows have `prompt` and `completion`, or `messages` (a list of role and content; the tokenizer's chat template).

    Raises:
        UserError: the file is missing, empty, broken (with its line), of unknown fields, or an example has no target.
    """
    path = PACKAGE / "demo" / f"{split}.jsonl" if source == DEMO else Path(source)
    rows = _read_rows(path)
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    encode = _encoder(rows.column_names, tokenizer, config, path)
    input_ids, labels, cut = [], [], 0
    for number, row in enumerate(rows, start=1):
        ids, counted = encode(row, number)
        cut += len(ids) > config.max_length
        ids, counted = ids[: config.max_length], counted[: config.max_length]
        if not any(counted[1:]):
            reason = f"its prompt alone fills max_length ({config.max_length})" if len(ids) == config.max_length else (
                "its completion is empty"
            )
            raise UserError(f"{path}, example {number}: no token to learn from: {reason}; lengthen or remove it")
        input_ids.append(ids)
        labels.append([token if counts else IGNORED for token, counts in zip(ids, counted, strict=True)])
    return Examples(input_ids, labels, str(source))


def _read_rows(path: Path) -> Any:
    """The rows of a JSON or JSON Lines file as a `datasets.Dataset`."""
    import datasets

    if not path.exists():
        raise UserError(f"data: no such file: {path}")
    if path.is_dir() or path.suffix not in (".json", ".jsonl"):
        raise UserError(f"data: {path}: expected a .json or .jsonl file")
    if not path.stat().st_size:
        raise UserError(f"data: {path} is empty; expected one JSON object per line")
    refuse_unreadable_json(path)
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset("json", data_files=str(path), split="train")
    except Exception as error:  # datasets wraps whatever its reader met; say which line it was
        raise UserError(_broken_line(path) or f"data: {path}: not readable: {_first_line(error)}") from None
    if not len(rows):
        raise UserError(f"data: {path} holds no examples")
    return rows


def _broken_line(path: Path) -> str | None:
    """Which line of a JSON Lines file is not a JSON object, and why."""
    fields: dict[str, str] = {}
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                return f"data: {path}, line {number}: not JSON: {error.msg} at column {error.colno}"
            if not isinstance(row, dict):
                return f"data: {path}, line {number}: expected a JSON object, got {type(row).__name__}"
            for key, value in row.items():
                kind = fields.setdefault(key, type(value).__name__)
                if value is not None and kind not in ("NoneType", type(value).__name__):
                    return f"data: {path}, line {number}: field '{key}' is {type(value).__name__}, earlier {kind}"
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _encoder(columns: list[str], tokenizer: Any, config: DataConfig, path: Path):
    """The function row -> (input ids, which tokens count) for the fields that a file has."""
    if "messages" in columns:
        if not tokenizer.chat_template:
            raise UserError(f"data: {path} holds messages, but the base's tokenizer has no chat template")
        return lambda row, number: _encode_messages(row["messages"], tokenizer, config.loss_on, f"{path}, example {number}")
    if {"prompt", "completion"} <= set(columns):
        return lambda row, number: _encode_pair(row, tokenizer, config.loss_on, f"{path}, example {number}")
    raise UserError(
        f"data: {path}: expected the fields prompt and completion, or messages; got {', '.join(columns) or 'none'}"
    )


def _encode_pair(row: Mapping, tokenizer: Any, loss_on: str, where: str) -> tuple[list[int], list[bool]]:
    """[bos] prompt completion [eos]; the completion and its end count."""
    prompt, completion = row["prompt"], row["completion"]
    for name, text in (("prompt", prompt), ("completion", completion)):
        if not isinstance(text, str):
            raise UserError(f"{where}: field '{name}' is {type(text).__name__}, expected text")
    if not completion:
        raise UserError(f"{where}: no token to learn from: its completion is empty; lengthen or remove it")
    first = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    before = first + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    after = tokenizer(completion, add_special_tokens=False)["input_ids"]
    after = after + ([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])
    return before + after, [loss_on == "all"] * len(before) + [True] * len(after)


def _encode_messages(messages: Any, tokenizer: Any, loss_on: str, where: str) -> tuple[list[int], list[bool]]:
    """A conversation through the chat template; every assistant turn counts, its end token included.

    What a turn adds is found by comparing the template's output with and without it, because templates without
    generation marks report empty assistant masks (silently).
    """
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: 'messages' must be a list of turns, got {type(messages).__name__}")
    for turn in messages:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str) or "role" not in turn:
            raise UserError(f"{where}: each turn needs a role and a text content, got {turn!r:.80}")

    def render(count: int, ask: bool) -> list[int]:
        try:
            text = tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=ask)
        except Exception as error:  # jinja's TemplateError: unknown role, wrong order ...
            raise UserError(f"{where}: the chat template refuses it: {_first_line(error)}") from None
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    whole = render(len(messages), False)
    counts = [loss_on == "all"] * len(whole)
    for n, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        before, after = render(n, True), render(n + 1, False)
        if whole[: len(after)] != after or after[: len(before)] != before:
            raise UserError(f"{where}: the chat template rewrites earlier turns, so turn {n + 1} cannot be located")
        counts[len(before) : len(after)] = [True] * (len(after) - len(before))
    return whole, counts


@dataclass(frozen=True)
class BatchOrder:
    """Which examples make up each global batch: epochs, each shuffled by (seed, epoch), one after the other.

    A batch may run over the end of an epoch; only the last batch of a run of whole epochs can be smaller.
    """

    examples: int
    global_batch_size: int
    seed: int
    total_examples: int | None = None  # where the run stops, in examples seen; None: never

    def steps(self) -> int:
        """Optimizer steps until `total_examples` have been seen."""
        return math.ceil(self.total_examples / self.global_batch_size)

    def batch(self, step: int) -> list[int]:
        """Examples of global batch `step` (counted from 1)."""
        first = (step - 1) * self.global_batch_size
        last = first + self.global_batch_size
        if self.total_examples is not None:
            last = min(last, self.total_examples)
        return [self._epoch(place // self.examples)[place % self.examples] for place in range(first, last)]

    def _epoch(self, epoch: int) -> list[int]:
        if self._cache.get("epoch") != epoch:
            order = torch.randperm(self.examples, generator=seeded_generator(self.seed, "data order", str(epoch)))
            self._cache.update(epoch=epoch, order=order.tolist())
        return self._cache["order"]

    def __post_init__(self):
        object.__setattr__(self, "_cache", {})


def micro_batches(
    batch: Sequence[int], rank: int, world_size: int, micro_batch_size: int | None, first: int | None = None
) -> list[list[int | None]]:
    """The share of one rank in a global batch, cut into micro-batches; as many on every rank.

    Sequence n goes to rank n % world_size, so that the first sequences are spread evenly. Where the batch does not
    divide, None stands for a sequence that does not count. `first`: sequences, over all ranks, of the first
    micro-step (where they propose candidates), instead of micro_batch_size per rank.
    """
    sections = [(batch, micro_batch_size)]
    if first:
        sections = [(batch[:first], math.ceil(first / world_size)), (batch[first:], micro_batch_size)]
    cuts = []
    for members, size in sections:
        share: list[int | None] = list(members[rank::world_size])
        share += [None] * (math.ceil(len(members) / world_size) - len(share))
        size = size or len(share) or 1
        cuts += [share[start : start + size] for start in range(0, len(share), size)]
    return cuts


def collate(examples: Examples, members: Sequence[int | None], pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """A micro-batch, padded on the right: input_ids, attention_mask, labels, each [B, L] int64.

    A member None becomes a short sequence of which no token counts.
    """
    nothing = ([pad_id] * 2, [IGNORED] * 2)
    rows = [nothing if n is None else (examples.input_ids[n], examples.labels[n]) for n in members]
    length = max(len(ids) for ids, _ in rows)
    input_ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    labels = torch.full((len(rows), length), IGNORED, dtype=torch.int64)
    mask = torch.zeros((len(rows), length), dtype=torch.int64)
    for row, (ids, wanted) in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        labels[row, : len(wanted)] = torch.tensor(wanted)
        mask[row, : len(ids)] = 1
    batch = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def by_length(examples: Examples, size: int) -> Iterator[list[int]]:
    """All examples in groups of `size`, longest first: little padding, and the order does not depend on ranks."""
    order = sorted(range(len(examples)), key=lambda n: (-len(examples.input_ids[n]), n))
    for start in range(0, len(order), size):
        yield order[start : start + size]
