"""The base with an adapter merged in, as a plain transformers folder; and back.

One tensor is in memory at a time, so a model far larger than the memory can be merged. Only the adapter's weights are
rewritten, in the dtype that the adapter was trained in; every other tensor keeps its stored bytes. The file
`base_entries.unmerge` next to the weights (safetensors: the K overwritten base values of each weight) lets `unmerge`
restore the base bit for bit.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from scale_sft.data.turn_ends import write_taught_end
from scale_sft.errors import UserError
from scale_sft.files import new_folder, require_free_bytes, write_text
from scale_sft.model.fingerprints import fingerprint
from scale_sft.model.resident import WeightPart, effective_values, read_entries, write_entries

from .apply import require_base
from .base_files import BaseFiles, Specs, bytes_of, locate_base
from .format import Adapter, opened
from .merge_packed import merge_quantized
from .model_card import write_card
from .safetensors_writer import TensorReader, TensorWriter

UNMERGE_FILE = "base_entries.unmerge"


def merge(
    adapter: str | Path | Adapter, output: str | Path, base: str | None = None, *, licence: str | None = None
) -> Path:
    """Write base + adapter as a plain transformers folder with a model card.

        scale_sft.merge("runs/demo/adapter", "merged")
        model = AutoModelForCausalLM.from_pretrained("merged")

    The adapter's weights get their effective values by the one rounding rule, so the logits are those of the trained
    model, bit for bit. A base in 4 or 8 bits is dequantised; see `merge_quantized`.

    Args:
        adapter: the adapter/ folder of a run, or an adapter in memory.
        output: a new folder, or an empty one.
        base: folder or hub id of the base, if it is not where the adapter says.
        licence: for the model card, as the hub knows it ("apache-2.0"); default: that of the base where it is known.

    Returns:
        The folder written.

    Raises:
        UserError: the base is another one, the adapter is unreadable, or `output` is not empty or cannot be written.
            Nothing is left behind.
    """
    target = Path(output).expanduser()
    with opened(adapter) as source, new_folder(target, "merge") as work:
        if source.is_quantized:
            merge_quantized(source, work, base)
        else:
            _merge_files(source, work, base)
        write_taught_end(work, source.info)
        if source.info.get("chat_template"):
            write_text(work / "chat_template.jinja", source.info["chat_template"])
        write_card(adapter, work, form="merged", name=target.resolve().name, licence=licence)
    return target


def _merge_files(adapter: Adapter, work: Path, base: str | None) -> None:
    """Write the merged weights, the base values that they replace, and the base's small files into `work`."""
    with BaseFiles(locate_base(adapter, base)) as files:
        sources = files.sources_of(adapter.shapes)
        kept_specs: Specs = {name: (adapter.dtype_of(name), (adapter.active(name),)) for name in adapter.shapes}
        require_free_bytes(work, files.bytes_rewritten(sources, adapter) + bytes_of(kept_specs), "merge")
        with TensorWriter(work / UNMERGE_FILE, kept_specs, {"base_hash": adapter.info["base_hash"]}) as kept:

            def put_in(name: str, entries: Tensor) -> tuple[int, int]:
                found = fingerprint(WeightPart(lambda: entries, 0, entries.numel()))
                indices = adapter.indices[name]
                values = read_entries(entries, indices)
                kept.write(name, values)
                write_entries(entries, indices, effective_values(values, adapter.deltas[name]))
                return found

            prints = files.rewrite(work, sources, adapter, put_in)
        require_base(prints, adapter, f"merge: '{files.folder}' is not the base that the adapter was trained on")
        files.copy_small_files(work, adapter.info["dtype"])


def unmerge(adapter: str | Path | Adapter, merged: str | Path, output: str | Path) -> Path:
    """Undo `merge`: write the base that `merged` was made from, bit for bit.

    Weights that the adapter changed are written in the adapter's dtype.

    Raises:
        UserError: `merged` was not made by `merge` with this adapter, or is damaged. Nothing is left behind.
    """
    merged, target = Path(merged).expanduser(), Path(output).expanduser()
    if not (merged / UNMERGE_FILE).is_file():
        raise UserError(f"unmerge: {merged} holds no {UNMERGE_FILE}; expected a folder that `scale-sft merge` wrote")
    with (
        opened(adapter) as source,
        BaseFiles(merged) as files,
        TensorReader(merged / UNMERGE_FILE) as kept,
        new_folder(target, "unmerge") as work,
    ):
        sources = files.sources_of(source.shapes)
        if kept.metadata.get("base_hash") != source.info["base_hash"] or set(kept.names) != set(source.shapes):
            raise UserError(f"unmerge: {merged} was not merged with this adapter")
        require_free_bytes(work, files.bytes_rewritten(sources, source), "unmerge")

        def take_out(name: str, entries: Tensor) -> tuple[int, int]:
            indices, values = source.indices[name], kept.tensor(name)
            same = read_entries(entries, indices).equal(effective_values(values, source.deltas[name]))
            if not same:
                raise UserError(f"unmerge: '{name}' of {merged} does not hold the deltas of this adapter")
            write_entries(entries, indices, values)
            return fingerprint(WeightPart(lambda: entries, 0, entries.numel()))

        prints = files.rewrite(work, sources, source, take_out)
        require_base(prints, source, f"unmerge: {merged} has changed since it was merged")
        files.copy_small_files(work, source.info["dtype"])
    return target
