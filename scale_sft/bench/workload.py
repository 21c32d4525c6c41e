"""The common ground of contestants: the settings of a comparison, the frozen model, the micro-batches.

Shapes: B sequences of a micro-batch, L their length in tokens; O rows, I columns of a target weight.
"""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scale_sft.config.loading import load
from scale_sft.data.examples import Examples
from scale_sft.data.micro_batches import collate
from scale_sft.errors import UserError
from scale_sft.model.attention import EAGER_TOKENS
from scale_sft.model.compiled_blocks import compile_blocks, decoder_blocks
from scale_sft.model.loading import base_location, enable_checkpointing, load_base, load_model_config, resolve_dtype
from scale_sft.model.quantization import resolve_quantization
from scale_sft.model.targets import budget_of, targets_of
from scale_sft.planning.footprint import empty_model
from scale_sft.spiel.seeding import seeded_generator

RUN_STEPS = 2000  # length of the run that our measured steps belong to

LLAMA = {
    "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6, "num_attention_heads": 8,
    "max_position_embeddings": 8192, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_NAME = "random Llama, 6 layers of width 512"


@dataclass(frozen=True, kw_only=True)
class Case:
    """The settings shared by all contestants of one comparison. Exactly one of `rank` and `density` is given."""

    base: str | None = None  # a model folder or hub id; a folder with only config.json, or None: random weights
    dtype: str = "bfloat16"
    quantization: str = "none"
    length: int = 128  # tokens of a sequence
    micro_batch: int = 32  # sequences of a step
    gradient_checkpointing: bool = False
    attention: str = "sdpa"  # of all contestants, as in a run; or auto: the faster one
    rank: int | None = 16
    density: float | None = None
    kernels: str = "auto"  # of our methods, as in a run: off, cpu or auto
    seed: int = 0
    compile: str = "off"  # of all contestants: off, or blocks

    def settings(self) -> dict[str, Any]:
        """Return the settings for a row of results."""
        return dataclasses.asdict(self) | {"base": self.base or LLAMA_NAME}


class Base:
    """The frozen model of a case, loaded again, with the same weights, for each contestant.

    Raises:
        UserError: the model does not exist, its positions are too few, a rank exceeds a weight's entries, or it cannot
            be quantised here.
    """

    def __init__(self, case: Case, device: torch.device):
        if case.attention == "auto":
            case = dataclasses.replace(case, attention=faster_attention(case, device))
        self.case, self.device = case, device
        options = {"base": case.base, "dtype": case.dtype, "quantization": case.quantization, "seed": case.seed}
        options |= {"kernels": case.kernels, "attention": case.attention}
        budget = {"rank_equivalent": case.rank, "density": case.density}
        checkpointing = {"gradient_checkpointing": case.gradient_checkpointing}
        self.config = load(None, {**options, **budget, **checkpointing, "steps": RUN_STEPS})
        self.model_config = _llama() if case.base is None else load_model_config(self.config.model)
        self.quantization = resolve_quantization(self.config.model, self.model_config)
        self.dtype = resolve_dtype(self.config.model, self.model_config)
        positions = getattr(self.model_config, "max_position_embeddings", None)
        if positions and case.length > positions:
            raise UserError(f"length: got {case.length}, but the base has positions for {positions} tokens only")
        if case.rank:
            self._refuse_more_than_all(case.rank)
        self._written: tempfile.TemporaryDirectory | None = None

    def _refuse_more_than_all(self, rank: int) -> None:
        """Refuse a rank with r (O + I) > O I: the sparse deltas would have fewer trained entries than LoRA."""
        name, (rows, columns) = min(self.shapes.items(), key=lambda item: _largest_rank(*item[1]))
        if rank > _largest_rank(rows, columns):
            raise UserError(
                f"rank: got {rank}, but {name} [{rows}, {columns}] has fewer entries than LoRA of that rank has "
                f"parameters, so sparse deltas cannot train as many; expected at most {_largest_rank(rows, columns)}"
            )

    @property
    def random(self) -> bool:
        """True if there are no weights to load."""
        if self.case.base is None:
            return True
        folder = Path(base_location(self.case.base))
        return folder.is_dir() and not any(folder.glob("*.safetensors"))

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shape (O, I) of each target weight by name, from the meta device."""
        targets = targets_of(empty_model(self.config, self.model_config), self.config.sparse)
        return {target.name: target.shape for target in targets}

    @cached_property
    def bytes(self) -> int:
        """The bytes of all weights in the compute dtype."""
        entries = sum(weight.numel() for weight in empty_model(self.config, self.model_config).parameters())
        return entries * self.dtype.itemsize

    def load(self) -> nn.Module:
        """Load the model, frozen and in training mode, onto the device; its blocks compile with the first step."""
        model = self._load()
        if self.case.compile == "blocks":
            compile_blocks(decoder_blocks(model, self.shapes))
        return model

    def _load(self) -> nn.Module:
        config = self.config.model
        if self.random and self.quantization:
            if self._written is None:  # bitsandbytes quantises only weights loaded from files
                self._written = tempfile.TemporaryDirectory(prefix="scale-sft-bench-")
                made: Any = self._make()
                made.save_pretrained(self._written.name)
            config = dataclasses.replace(config, base=self._written.name)
        elif self.random:
            model = self._make().requires_grad_(False).train()
            if self.case.gradient_checkpointing:
                enable_checkpointing(model)
            return model
        return load_base(config, self.model_config, self.device, self.quantization)

    def _make(self) -> nn.Module:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        with torch.random.fork_rng(), torch.device(self.device):
            torch.manual_seed(self.case.seed)
            try:
                return AutoModelForCausalLM.from_config(
                    self.model_config, dtype=self.dtype, attn_implementation=self.case.attention
                )
            except (ImportError, ValueError) as error:
                raise UserError(f"attention: {self.case.attention} is not available here: {error}") from None

    @property
    def lora_rank(self) -> int:
        """The rank whose trainable parameters equal ours, or are nearest to them if a density was given."""
        if self.case.rank:
            return self.case.rank
        active = budget_of(self.config.sparse, self.shapes)
        return max(1, round(sum(active.values()) / sum(o + i for o, i in self.shapes.values())))


def faster_attention(case: Case, device: torch.device) -> str:
    """Choose the faster implementation of attention."""
    short = case.length <= EAGER_TOKENS
    return "eager" if device.type == "cpu" and case.dtype == "bfloat16" and short else "sdpa"


def _largest_rank(rows: int, columns: int) -> int:
    """Compute the largest r with r (O + I) <= O I."""
    return rows * columns // (rows + columns)


def _llama() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**LLAMA, use_cache=False)


class Batches:
    """Micro-batches of random tokens, all of which count, the same for all contestants.

    Args:
        distinct: their number before they repeat.
    """

    def __init__(self, case: Case, vocabulary: int, device: torch.device, distinct: int = 8):
        self.case, self.device = case, device
        generator = seeded_generator(case.seed, "benchmark")
        tokens = torch.randint(vocabulary, (distinct * case.micro_batch, case.length), generator=generator).tolist()
        self.examples, self.distinct = Examples.from_lists(tokens, tokens, "random tokens"), distinct

    def take(self, number: int) -> dict[str, Tensor]:
        """Return micro-batch `number`: input_ids, attention_mask, labels, each [B, L] int64."""
        first = number % self.distinct * self.case.micro_batch
        return collate(self.examples, range(first, first + self.case.micro_batch), 0, self.device)

    @property
    def target_tokens(self) -> int:
        """The target tokens of one micro-batch; the first token of a sequence is never predicted."""
        return self.case.micro_batch * (self.case.length - 1)
