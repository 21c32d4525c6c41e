"""Verify an exported adapter against the model it came from."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scale_sft.errors import UserError
from scale_sft.model.empty import model_class, text_config
from scale_sft.model.loading import silence_progress_bars

from .apply import apply_adapter
from .base_files import locate_base
from .format import Adapter, opened


@dataclass(frozen=True)
class Verification:
    """Logits of the exported model against those of the trained one."""

    logits: int  # how many were compared
    identical: bool
    largest_difference: float


@torch.inference_mode()
def verify(
    adapter: str | Path | Adapter, to: str, output: str | Path, *, base: str | None = None, device: str = "cpu"
) -> Verification:
    """Load an export in stock peft or transformers and compare logits with the base under the adapter itself.

    The inputs are random token ids (seeded): a batch of several sequences, and a single token.

    Raises:
        UserError: peft is missing or too old; the base or adapter is wrong.
    """
    from transformers import AutoConfig

    silence_progress_bars()
    require_verifiable(adapter, to)
    output = Path(output).expanduser()
    with opened(adapter) as content:
        source = locate_base(content, base)

        def load(folder: str | Path) -> nn.Module:
            kind = model_class(AutoConfig.from_pretrained(folder))
            return _aligned(kind.from_pretrained(folder, dtype=content.dtype).eval().to(device))

        model = load(source)
        probes = probe_inputs(model.config, device)
        apply_adapter(model, content)
        wanted = [model(input_ids=ids, use_cache=False).logits for ids in probes]
        del model
        model = load(output) if to == "merged" else _in_peft(load(source), output)
    found = [model(input_ids=ids, use_cache=False).logits for ids in probes]
    pairs = list(zip(wanted, found, strict=True))
    return Verification(
        logits=sum(a.numel() for a in wanted),
        identical=all(a.dtype is b.dtype and torch.equal(a, b) for a, b in pairs),
        largest_difference=max(float((a.float() - b.float()).abs().max()) for a, b in pairs),
    )


def require_verifiable(adapter: str | Path | Adapter, to: str) -> None:
    """Raise UserError if `verify` could not run after an export: ask before the work of exporting.

    It needs peft for what peft loads, and an adapter of an unquantised base.
    """
    with opened(adapter) as content:
        if content.is_quantized:
            raise UserError(
                f"verify: got an adapter trained on a base in {content.info['quantization']}, expected one of an "
                "unquantised base. Fix: leave out --verify"
            )
    if to != "merged" and find_spec("peft") is None:
        raise UserError("verify: needs peft >= 0.21, which is not installed. Fix: pip install 'peft>=0.21'")


def _aligned(model: nn.Module) -> nn.Module:
    """Give every weight memory of its own.

    Weights mapped from a file start anywhere, and for small products CPU kernels sum in an order that depends on that.
    """
    for weight in model.parameters():
        weight.data = weight.data.clone()
    return model


def _in_peft(model: nn.Module, adapter: str | Path) -> nn.Module:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(adapter)).eval()
    except (ValueError, KeyError, TypeError) as error:  # an older peft does not know the format
        raise UserError(f"verify: this peft does not load {adapter}: {error}; expected peft >= 0.21") from None


def probe_inputs(config: Any, device: str) -> list[Tensor]:
    """Draw random token ids, the same every time: [3, L] and [1, 1] int64."""
    generator = torch.Generator().manual_seed(0)
    text = text_config(config)
    length = min(32, getattr(text, "max_position_embeddings", None) or 32)
    shapes = [(3, length), (1, 1)]
    return [torch.randint(text.vocab_size, shape, generator=generator).to(device) for shape in shapes]
