"""Export an adapter in a form that stock peft or transformers loads, with the same logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn

from scale_sft.errors import UserError, first_line
from scale_sft.files import new_folder
from scale_sft.model.empty import empty_model
from scale_sft.model.experts import parse_slice
from scale_sft.model.fingerprints import fingerprint
from scale_sft.model.loading import base_location
from scale_sft.model.resident import WeightPart, read_entries

from .apply import require_base
from .base_files import BaseFiles, locate_base
from .format import Adapter, absolute_base, opened
from .merge import merge
from .model_card import write_card
from .peft import Exported, write_shira, write_supertuning

FORMATS = ("shira", "supertuning", "merged")


def export(
    adapter: str | Path | Adapter, to: str, output: str | Path, *, base: str | None = None, licence: str | None = None
) -> Exported:
    """Write an adapter as SHiRA, as Super-Tuning, or merged; with a model card.

    Args:
        to: shira, supertuning or merged.
        base: folder or hub id of the base, if it is not where the adapter says.
        licence: for the model card, as the hub knows it ("apache-2.0").

    Raises:
        UserError: wrong base, unreadable adapter, an output folder that is not empty, or a format that cannot hold it.
    """
    if to not in FORMATS:
        raise UserError(f"export: got {to!r}, expected one of {', '.join(FORMATS)}")
    if to == "merged":
        merge(adapter, output, base, licence=licence)
        with opened(adapter) as source:
            return Exported(source.active(), 0)
    from transformers import AutoConfig

    with opened(adapter) as source, new_folder(output, "export") as work:
        refuse_quantised(source, f"--to {to}")
        folder = locate_base(source, base)
        model = empty_model(AutoConfig.from_pretrained(folder))
        require_linear(source, model, folder, to)
        named = absolute_base(base_location(base or source.info["base"]))
        with BaseFiles(folder) as files:
            values = BaseValues(files, source, model)
            values.require_same_base()
            if to == "shira":
                written = write_shira(source, work, named, values)
            else:
                written = write_supertuning(source, work, named, values)
        write_card(adapter, work, form=to, name=Path(output).expanduser().resolve().name, licence=licence)
    return written


class BaseValues(Mapping):
    """[K] by weight name: the base at the active entries, read from its files at each access.

    Args:
        files: of the base.
        adapter: its entries.
        model: the base on the meta device.
    """

    def __init__(self, files: BaseFiles, adapter: Adapter, model: nn.Module):
        self._files, self._adapter = files, adapter
        self._sources = files.sources_of(adapter.shapes, model)

    def __getitem__(self, name: str) -> Tensor:
        return read_entries(self._entries(name), self._adapter.indices[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def whole(self, name: str) -> Tensor:
        """Return the whole base weight, flattened: a new tensor [O * I]."""
        return self._entries(name)

    def _entries(self, name: str) -> Tensor:
        return self._files.weight(self._sources[name], name, self._adapter.dtype_of(name))

    def require_same_base(self) -> None:
        """Raise UserError if these are not the weights that the adapter was trained on."""
        prints = {name: self._fingerprint(name) for name in self._sources}
        require_base(prints, self._adapter, f"export: '{self._files.folder}' is not the base of the adapter")

    def _fingerprint(self, name: str) -> tuple[int, int]:
        entries = self._entries(name)
        return fingerprint(WeightPart(lambda: entries, 0, entries.numel()))


def refuse_quantised(adapter: Adapter, what: str) -> None:
    """Raise UserError if the adapter was trained on a quantised base: only a merged model repeats its rounding."""
    if adapter.is_quantized:
        raise UserError(
            f"export: the adapter was trained on a base in {adapter.info['quantization']}, whose rounding {what} would "
            "not repeat; use --to merged, which writes the dequantised model"
        )


def require_linear(adapter: Adapter, model: nn.Module, source: Path, to: str) -> None:
    """Raise UserError if a weight belongs to no `nn.Linear`: peft knows these formats for nothing else."""
    layers = dict(model.named_modules())
    experts = [name for name in adapter.shapes if parse_slice(name)]
    if experts:
        raise UserError(
            f"export: got {len(experts):,} experts of fused parameters ('{experts[0]}', ...), expected weights of "
            f"nn.Linear: peft's {to} has no such layer. Fix: --to merged"
        )
    for name in adapter.shapes:
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None:
            raise UserError(f"export: the base '{source}' has no layer for '{name}'")
        if not isinstance(layer, nn.Linear):
            raise UserError(
                f"export: '{name}' belongs to a {type(layer).__name__} layer; peft's {to} is for nn.Linear only. "
                "Use --to merged"
            )


def push_to_hub(folder: str | Path, repository: str, *, private: bool = False) -> str:
    """Upload a folder to a model repository of the Hugging Face hub (made where there is none); returns its address.

    Raises:
        UserError: the hub refuses (no login, no right, no network).
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        address = hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=repository,
            folder_path=str(Path(folder).expanduser()),
            commit_message="Sparse fine-tuning with scale_sft",
        )
    except Exception as error:  # hub errors are many; all mean that it was not uploaded
        raise UserError(f"push-to-hub: '{repository}': {first_line(error)}; log in with `hf auth login`") from None
    return str(address)
