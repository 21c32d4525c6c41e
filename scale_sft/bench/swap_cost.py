"""Time a swap of adapters on a resident model, compared with peft's LoRA hotswap and reloading a merged model.

    python -m scale_sft.bench.swap_cost ADAPTER OTHER_ADAPTER [MERGED]

Both adapters belong to one base; MERGED is a merged model to reload. LoRA's rank is the one with parameters nearest K.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch

from scale_sft.adapters.base_files import locate_base
from scale_sft.adapters.format import Adapter
from scale_sft.adapters.live import load_adapter


def seconds_of(work: Callable[[], object], repetitions: int) -> float:
    """Compute the median wall time of `work`, after one call that does not count."""
    work()
    times = []
    for _ in range(repetitions):
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def alternating(*choices: Callable[[], object]) -> Callable[[], object]:
    """Make a function that calls `choices` in turn, one per call."""
    turn = iter(range(1 << 62))
    return lambda: choices[next(turn) % len(choices)]()


def lora_hotswap(base: Path, dtype: torch.dtype, names: list[str], rank: int, repetitions: int) -> float:
    """Time one `peft` hotswap, in seconds, between two LoRA adapters of this rank, from files."""
    from peft import LoraConfig, get_peft_model
    from peft.utils.hotswap import hotswap_adapter
    from transformers import AutoModelForCausalLM

    load = lambda: AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    targets = [name.removesuffix(".weight") for name in names]
    with tempfile.TemporaryDirectory() as folder:
        for number in range(2):
            config = LoraConfig(r=rank, target_modules=targets, init_lora_weights=False)
            get_peft_model(load(), config).save_pretrained(f"{folder}/{number}")
        from peft import PeftModel

        model = PeftModel.from_pretrained(load(), f"{folder}/0")
        swap = lambda number: lambda: hotswap_adapter(model, f"{folder}/{number}", adapter_name="default")
        return seconds_of(alternating(swap(1), swap(0)), repetitions)


@click.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("other", type=click.Path(path_type=Path))
@click.argument("merged", required=False, type=click.Path(path_type=Path))
@click.option("--repetitions", default=20, show_default=True, help="Swaps of each kind; the median counts.")
def main(adapter: Path, other: Path, merged: Path | None, repetitions: int) -> None:
    """Print microseconds per swap, one line per way."""
    from transformers import AutoModelForCausalLM

    content = Adapter.load(adapter)
    base = locate_base(content)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=content.dtype).eval()
    live = load_adapter(model, adapter)
    ready = [live.prepare(other), live.prepare(adapter)]
    rows = {f"swap of {ready[0].active:,} entries, prepared": seconds_of(
        alternating(*(lambda one=one: live.swap(one) for one in ready)), repetitions
    )}  # fmt: skip
    rows["swap from files"] = seconds_of(alternating(lambda: live.swap(other), lambda: live.swap(adapter)), repetitions)
    live.undo()
    rank = max(1, round(ready[0].active / sum(o + i for o, i in content.shapes.values())))
    rows[f"peft LoRA hotswap, rank {rank}, from files"] = lora_hotswap(
        base, content.dtype, list(content.shapes), rank, repetitions
    )
    if merged is not None:

        def reload() -> None:
            loaded = AutoModelForCausalLM.from_pretrained(merged, dtype=content.dtype)
            for weight in loaded.parameters():  # a mapped file is read when it is used
                weight.data = weight.data.clone()

        rows["reload of the merged model"] = seconds_of(reload, max(3, repetitions // 4))
    for name, seconds in rows.items():
        click.echo(f"{seconds * 1e6:>12,.0f} us  {name}")


if __name__ == "__main__":
    main()
