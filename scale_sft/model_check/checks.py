"""The checks of one model type, each on a tiny random model, through the trainer's own code."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from scale_sft.errors import UserError, first_line
from scale_sft.model.experts import parse_slice

from .findings import ANSWERS, EXPERTS, FAILED, REACHED, TRAINS, Findings, code_version
from .tiny import byte_tokenizer

SENTENCES = [{"prompt": f"{n} + {n * n} = ", "completion": str(n + n * n)} for n in range(24)]
GRADIENT_TOLERANCE = 1e-4
"""Largest difference of a gradient from autograd's, over the largest entry of its weight's gradient."""


class Checker:
    """The checks of one model, in a folder of its own.

    Args:
        name: of the type, for the findings.
        folder: for its model and its runs.
        tiny: makes its configuration.
    """

    def __init__(self, name: str, folder: Path, tiny: Callable[[], Any]):
        self.found = Findings(name, code=code_version())
        self.folder, self.tiny, self.tokenizer = folder, tiny, byte_tokenizer()
        self.base = folder / "base"

    def run(self, chosen: Collection[str] | None = None) -> Findings:
        """Run all checks, or `trains` and the chosen ones; a check that fails does not stop the next."""
        began = time.perf_counter()
        checks = {
            "gradient": self._gradient,
            "merge": self._merge,
            "checkpointing": self._checkpointing,
            "packing": self._packing,
            "4 bits": self._four_bits,
            ANSWERS: self._answers,
        }
        if self._check(TRAINS, self.make) and self._check(TRAINS, self.train):
            for name, check in checks.items():
                if chosen is None or name in chosen:
                    self._check(name, check)
        self.found.seconds = round(time.perf_counter() - began, 1)
        return self.found

    def _check(self, name: str, check: Callable[[], str]) -> bool:
        try:
            self.found.cells[name] = check()
        except UserError as error:
            self.found.refuse(name, error)
            return False
        except Exception as error:
            self.found.cells[name] = f"{FAILED}: {type(error).__name__}: {first_line(error)}"
            return False
        return True

    # --- the checks ---------------------------------------------------------------------------------------------------

    def make(self) -> str:
        """Write a random model and the tokenizer, and sentences to learn."""
        from scale_sft.model.empty import model_class

        config = self.tiny()
        torch.manual_seed(0)
        model = model_class(config).from_config(config)
        for name, weight in model.named_parameters():  # zero in a fresh model: no gradient would pass, as it later does
            if name.endswith("bias") or not weight.any():
                nn.init.normal_(weight, std=0.1)
        model.save_pretrained(self.base)
        self.tokenizer.save_pretrained(self.base)
        (self.folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SENTENCES), encoding="utf-8")
        return "made"

    def _config(self, **options: Any) -> Any:
        from scale_sft.config.loading import load

        return load(None, options_of(self.folder, **options))

    def _run(self, **options: Any) -> None:
        """Run the whole trainer, but for the report."""
        from scale_sft.train import run_training
        from scale_sft.training import lifecycle

        with patch.object(lifecycle, "write_report", lambda folder: folder / "report.html"):
            run_training(self._config(**options))

    def train(self) -> str:
        """Run the whole trainer for two steps, with drop and grow."""
        allowed = {}
        try:
            self._run()
        except UserError as error:
            if "--allow_randomness" not in str(error):
                raise
            allowed = {"allow_randomness": True}
            self._run(**allowed)
        self._reach()
        return "with allow_randomness" if allowed else "yes"

    def _reach(self) -> None:
        """Note the shares of the blocks and of the experts that are targets, and why the rest is not."""
        from scale_sft.model.coverage import Coverage

        adapter = self.folder / "run" / "adapter"
        info = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        reach = Coverage.of_document(info["block_weights"])
        self.found.cells[REACHED] = _share(reach.share)
        if reach.rest:
            self.found.remark = "; ".join(dict.fromkeys(f"{one.kind}: {one.reason}" for one in reach.rest[:4])) + ". "
        weights = dict(self._load(self.base).named_parameters())
        experts = sum(weight.numel() for name, weight in weights.items() if _of_experts(name) and weight.dim() > 1)
        if experts:
            reached = sum(math.prod(shape) for name, shape in info["shapes"].items() if _of_experts(name))
            self.found.cells[EXPERTS] = _share(reached / experts)

    def _session(self, **options: Any) -> Any:
        from scale_sft.distributed.cluster import Cluster
        from scale_sft.training.assemble import assemble
        from scale_sft.training.inputs import read_inputs

        inputs = read_inputs(self._config(allow_randomness=True, **options))
        cluster = Cluster.start(sharded=False, dtype=inputs.dtype)
        self._cluster = cluster
        return assemble(inputs, cluster)

    def _recorded(self, **options: Any) -> tuple[Any, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Return a session, its gradients by weight name with every entry active, and the batch."""
        from scale_sft.data.micro_batches import collate
        from scale_sft.model.loss import token_loss_sum

        run = self._session(density=1.0, **options)
        batch = collate(run.inputs.train, range(4), run.inputs.tokenizer.pad_token_id, torch.device("cpu"))
        run.tuning.begin_step(1)
        token_loss_sum(run.model, batch).backward()
        gradients, first = {}, 0
        for delta in run.tuning.store:
            gradients[delta.name] = (
                run.tuning.recorder.gradients[first : first + delta.active].view(delta.shape).clone()
            )
            first += delta.active
        return run, gradients, batch

    def _gradient(self) -> str:
        """Compare every entry's gradient with autograd's on a stock model."""
        from scale_sft.model.loading import load_base
        from scale_sft.model.loss import token_loss_sum

        torch.manual_seed(0)
        run, self.gradients, batch = self._recorded()
        model_config = run.inputs.model_config
        self._cluster.close()
        stock = load_base(run.inputs.config.model, model_config, torch.device("cpu"))
        weights = dict(stock.named_parameters())
        for name in self.gradients:
            weights[_parameter(name)].requires_grad_(True)
        torch.manual_seed(0)
        token_loss_sum(stock, batch).backward()
        worst = max(_difference(value, _gradient_of(weights, name)) for name, value in self.gradients.items())
        if worst > GRADIENT_TOLERANCE and not self.found.cells[TRAINS].startswith("with"):
            raise ValueError(f"differs by {worst:.1e}")
        return f"{worst:.0e}"

    def _merge(self) -> str:
        """Compare the logits of the merged folder with those of base + adapter in place, and count its tensors."""
        from safetensors import safe_open

        from scale_sft.adapters.apply import apply_adapter
        from scale_sft.adapters.format import Adapter
        from scale_sft.adapters.merge import merge, unmerge

        adapter = self.folder / "run" / "adapter"
        merged = merge(adapter, self.folder / "merged")
        model = self._load(self.base)
        before = _logits(model)
        apply_adapter(model, Adapter.load(adapter))
        wanted = _logits(model)
        if torch.equal(before, wanted):
            raise ValueError("the adapter changes nothing")
        if not torch.equal(_logits(self._load(merged)), wanted):
            raise ValueError("other logits")
        restored = unmerge(adapter, merged, self.folder / "restored")
        for a in sorted(self.base.glob("*.safetensors")):
            with safe_open(a, "pt") as x, safe_open(restored / a.name, "pt") as y:
                names = set(x.keys())
                if names != set(y.keys()) or not all(torch.equal(x.get_tensor(n), y.get_tensor(n)) for n in names):
                    raise ValueError("unmerging gives another base")
        return "identical"

    def _load(self, folder: Path) -> Any:
        from transformers import AutoConfig

        from scale_sft.model.empty import model_class

        return model_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype=torch.float32).eval()

    def _checkpointing(self) -> str:
        torch.manual_seed(0)
        _, gradients, _ = self._recorded(gradient_checkpointing=True)
        self._cluster.close()
        worst = max(_difference(value, self.gradients[name]) for name, value in gradients.items())
        if worst > GRADIENT_TOLERANCE and not self.found.cells[TRAINS].startswith("with"):
            raise ValueError(f"gradients differ by {worst:.1e}")
        return "yes"

    def _packing(self) -> str:
        self._session(packing=True)
        self._cluster.close()
        return "yes"

    def _four_bits(self) -> str:
        """Train one step on a base in nf4, and merge it."""
        from scale_sft.adapters.merge import merge
        from scale_sft.model.packed_weights import is_quantized_layer

        self._run(quantization="nf4", output_dir=str(self.folder / "nf4"), steps=1, allow_randomness=True)
        merged = merge(self.folder / "nf4" / "adapter", self.folder / "nf4-merged")
        if not _logits(self._load(merged)).isfinite().all():
            raise ValueError("the merged model gives no finite logits")
        run = self._session(quantization="nf4", density=0.1)
        packed = sum(m.in_features * m.out_features for m in run.model.modules() if is_quantized_layer(m))
        self._cluster.close()
        return f"{packed / sum(weight.numel() for weight in self._load(self.base).parameters()):.0%} packed"

    def _answers(self) -> str:
        """Answer prompts together and one by one."""
        from scale_sft.evaluation.answers import greedy_answers, why_one_by_one

        data = str(self.folder / "data.jsonl")
        run = self._session(eval_data=data, exact_match_examples=6, max_new_tokens=8)
        alone = why_one_by_one(run.model, run.inputs.tokenizer, self._cluster)
        give = lambda size: greedy_answers(
            run.model, run.inputs.tokenizer, run.inputs.eval, self._cluster, count=6, batch_size=size, max_new_tokens=8
        )
        same = bool(alone) or give(6) == give(1)
        self._cluster.close()
        if not same:
            raise ValueError("answers depend on the batch")
        return "one at a time" if alone else "in batches"


def options_of(folder: Path, **options: Any) -> dict[str, Any]:
    """Return the options of a run of two steps, with drop and grow, on the model and the sentences in a folder."""
    return {
        "base": str(folder / "base"), "train_data": str(folder / "data.jsonl"), "output_dir": str(folder / "run"),
        "density": 0.1, "steps": 2, "global_batch_size": 4, "update_interval_steps": 1, "estimation_steps": 1,
        "max_length": 32, "learning_rate": 0.05, "base_placement": "replicate", "kernels": "off",
        "log_every_steps": 1, "save_every_steps": None, **options,
    }  # fmt: skip


def _parameter(target: str) -> str:
    """Return the name of the parameter that holds a target: its own, or that of all experts of a layer."""
    found = parse_slice(target)
    return found[0] if found else target


def _gradient_of(weights: Mapping[str, Any], target: str) -> torch.Tensor | None:
    """Return autograd's gradient of a target."""
    gradient, found = weights[_parameter(target)].grad, parse_slice(target)
    return gradient[found[1]] if found and gradient is not None else gradient


def _share(share: float) -> str:
    """Write a share in [0, 1] in whole per cent; 100 % only if nothing is missing."""
    return ">99%" if 0.995 <= share < 1 else f"{share:.0%}"


def _of_experts(name: str) -> bool:
    """Return True for a weight of routed experts, by its name (the second is JetMoe's)."""
    return re.search(r"\.experts\.(?!router)(?!.*bias)|\.mlp\.(input|output)_linear\.", name) is not None


def _difference(found: torch.Tensor, wanted: torch.Tensor | None) -> float:
    """Return the largest difference over the largest entry of `wanted`; a gradient that is missing counts as 0."""
    wanted = torch.zeros_like(found) if wanted is None else wanted.float()
    scale = float(wanted.abs().max())
    return float((found - wanted).abs().max()) / scale if scale else float(found.abs().max())


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    ids = (torch.arange(24).view(2, 12) * 5 + 1) % 250
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
