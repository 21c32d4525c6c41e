"""The method again, dense and naive, to hold the real one against: full tensors, stock autograd, sorting for top-k.

Written from the description of the method and not from the code: nothing of the package is imported. `make_trace`
writes what it did in the form that `run_trace.py` replays. fp32, one process, one micro-batch per step.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

LEAVES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Everything that a trace depends on."""

    algorithm: str  # ag, ma or static
    total_steps: int = 13
    interval: int = 4  # S
    estimation: int = 2  # G
    rate: float = 0.4  # initial replacement fraction
    density: float = 0.05
    learning_rate: float = 0.01
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    layers: int = 2
    hidden: int = 32
    tied: bool = False
    targets: list[str] = field(default_factory=lambda: list(LEAVES))
    seed: int = 0

    def reallocations(self) -> list[int]:
        if self.algorithm == "static":
            return [self.estimation] if self.estimation <= self.total_steps else []
        return list(range(self.estimation, self.total_steps + 1, self.interval))

    def model_config(self) -> dict:
        return {
            "vocab_size": 40, "hidden_size": self.hidden, "intermediate_size": 48, "num_hidden_layers": self.layers,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
            "tie_word_embeddings": self.tied, "initializer_range": 0.1,
        }  # fmt: skip


@dataclass
class Dense:
    """One weight [O, I] with all that the method keeps for it, as full flat tensors [N] or [O], [I]."""

    base: Tensor
    active: Tensor  # bool
    delta: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    age: Tensor
    row: Tensor
    col: Tensor
    candidate: Tensor | None = None  # bool
    gradient_sum: Tensor | None = None
    square_sum: Tensor | None = None


def largest(scores: Tensor, count: int, among: Tensor) -> Tensor:
    """Mask of the `count` largest scores among the entries of a mask; ties go to the smaller index."""
    keys = torch.where(among, scores.double(), -torch.inf)
    chosen = torch.zeros_like(among)
    chosen[torch.sort(keys, descending=True, stable=True).indices[:count]] = True
    return chosen


def adamw(weight: Dense, gradient: Tensor, setting: Setting) -> None:
    """AdamW on the active entries, each corrected by the number of gradients that its moments have seen."""
    beta1, beta2 = setting.betas
    weight.age += weight.active
    decayed = weight.delta * (1 - setting.learning_rate * setting.weight_decay)
    exp_avg = beta1 * weight.exp_avg + (1 - beta1) * gradient
    exp_avg_sq = beta2 * weight.exp_avg_sq + (1 - beta2) * gradient**2
    age = weight.age.clamp(min=1).double()
    corrected = exp_avg / (1 - beta1**age)
    denominator = (exp_avg_sq / (1 - beta2**age)).sqrt() + setting.eps
    moved = (decayed - setting.learning_rate * corrected / denominator).float()
    weight.delta = torch.where(weight.active, moved, 0.0)
    weight.exp_avg = torch.where(weight.active, exp_avg, 0.0)
    weight.exp_avg_sq = torch.where(weight.active, exp_avg_sq, 0.0)


def sm3(weight: Dense, gradient: Tensor, setting: Setting) -> None:
    """SM3 on the active entries with one accumulator per row and per column."""
    shape = weight.base.shape
    active, gradient = weight.active.view(shape), gradient.view(shape)
    nu = torch.minimum(weight.row[:, None], weight.col[None, :]) + gradient**2
    reached = torch.where(active, nu, 0.0)
    weight.row = torch.maximum(weight.row, reached.amax(1))
    weight.col = torch.maximum(weight.col, reached.amax(0))
    moved = weight.delta.view(shape) * (1 - setting.learning_rate * setting.weight_decay)
    moved = moved - setting.learning_rate * gradient / (nu + setting.eps).sqrt()
    weight.delta = torch.where(active, moved, 0.0).flatten()


def drop_and_grow_by_gradient(weight: Dense, count: int, setting: Setting) -> None:
    """The smallest deltas give way to the candidates of largest mean gradient; as many as there are such candidates."""
    mean, mean_square = weight.gradient_sum / setting.estimation, weight.square_sum / setting.estimation
    while True:
        dropped = largest(-weight.delta.abs(), count, weight.active)
        growable = weight.candidate & ~(weight.active & ~dropped)
        if int(growable.sum()) >= count:
            break
        count -= 1
    grown = largest(mean.abs(), count, growable)
    kept = (weight.active & ~dropped) | (weight.active & grown)
    new = grown & ~kept
    beta1, beta2 = setting.betas
    weight.delta = torch.where(kept, weight.delta, 0.0)
    weight.exp_avg = torch.where(new, mean * (1 - beta1**setting.estimation), torch.where(kept, weight.exp_avg, 0.0))
    seeded = mean_square * (1 - beta2**setting.estimation)
    weight.exp_avg_sq = torch.where(new, seeded, torch.where(kept, weight.exp_avg_sq, 0.0))
    weight.age = torch.where(new, setting.estimation, torch.where(kept, weight.age, 0))
    weight.active = kept | new


def drop_and_grow_by_accumulators(weight: Dense, count: int) -> None:
    """The smallest deltas give way to the inactive entries of largest row[i] * col[j]."""
    count = min(count, int((~weight.active).sum()))
    dropped = largest(-weight.delta.abs(), count, weight.active)
    grown = largest((weight.row[:, None] * weight.col[None, :]).flatten(), count, ~weight.active)
    weight.active = (weight.active & ~dropped) | grown
    weight.delta = torch.where(weight.active, weight.delta, 0.0)


def gradients_of(model: LlamaForCausalLM, weights: dict[str, Dense], batch: Tensor) -> tuple[float, dict[str, Tensor]]:
    """Mean token loss of a batch [B, L] and its gradient with respect to the effective weights, by stock autograd."""
    effective = {
        name: (weight.base + weight.delta.view_as(weight.base)).requires_grad_(True) for name, weight in weights.items()
    }
    logits = torch.func.functional_call(model, effective, kwargs={"input_ids": batch, "use_cache": False}).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
    gradients = torch.autograd.grad(loss, list(effective.values()))
    return loss.item(), {name: gradient.flatten() for name, gradient in zip(effective, gradients, strict=True)}


def step(weight: Dense, gradient: Tensor, number: int, setting: Setting) -> None:
    """Estimate, update, drop and grow one weight in optimizer step `number` (counted from 1)."""
    ahead = [when - number for when in setting.reallocations() if 0 <= when - number < setting.estimation]
    if ahead and setting.algorithm != "ma":
        if ahead[0] == setting.estimation - 1:
            everything = torch.ones_like(weight.active)
            weight.candidate = largest(gradient.abs(), int(weight.active.sum()), everything)
            weight.gradient_sum, weight.square_sum = torch.zeros_like(gradient), torch.zeros_like(gradient)
        weight.gradient_sum += gradient
        weight.square_sum += gradient**2
    (sm3 if setting.algorithm == "ma" else adamw)(weight, gradient, setting)
    if 0 not in ahead:
        return
    active = int(weight.active.sum())
    count = active if number == setting.estimation else int(setting.rate * (1 - number / setting.total_steps) * active)
    if setting.algorithm == "ma":
        drop_and_grow_by_accumulators(weight, count)
    else:
        drop_and_grow_by_gradient(weight, count, setting)


def make_trace(path: Path, setting: Setting) -> None:
    """Train a tiny Llama as `setting` says and record all of it in a trace file."""
    generator = torch.Generator().manual_seed(setting.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.seed)
        model = LlamaForCausalLM(LlamaConfig(**setting.model_config())).requires_grad_(False)
    tensors = {f"weights/{name}": value.clone() for name, value in model.state_dict().items()}
    if setting.tied:
        del tensors["weights/lm_head.weight"]
    batches = torch.randint(setting.model_config()["vocab_size"], (setting.total_steps, 3, 12), generator=generator)
    tensors["batches"] = batches
    weights = {}
    for name, parameter in model.named_parameters():
        if name.split(".")[-2] not in setting.targets:
            continue
        n, (rows, columns) = parameter.numel(), parameter.shape
        chosen = torch.randperm(n, generator=generator)[: int(setting.density * n)].sort().values
        active = torch.zeros(n, dtype=torch.bool)
        active[chosen] = True
        weights[name] = Dense(
            parameter.data.clone(), active, torch.zeros(n), torch.zeros(n), torch.zeros(n),
            torch.zeros(n, dtype=torch.int64), torch.zeros(rows), torch.zeros(columns),
        )  # fmt: skip
        tensors[f"initial_indices/{name.removesuffix('.weight')}"] = chosen.int()
    losses = []
    recorded = {1, setting.total_steps, *setting.reallocations()}
    for number in range(1, setting.total_steps + 1):
        loss, gradients = gradients_of(model, weights, batches[number - 1])
        losses.append(loss)
        for name, weight in weights.items():
            step(weight, gradients[name], number, setting)
            if number in recorded:
                indices, module = weight.active.nonzero().squeeze(1), name.removesuffix(".weight")
                tensors[f"step{number:03d}/indices/{module}"] = indices.int()
                tensors[f"step{number:03d}/deltas/{module}"] = weight.delta[indices].clone()
    tensors["losses"] = torch.tensor(losses)
    optimizer = {"name": "SM3" if setting.algorithm == "ma" else "AdamW", "betas": setting.betas, "eps": setting.eps}
    settings = {
        "algorithm": setting.algorithm, "model_config": setting.model_config(), "target_modules": setting.targets,
        "total_steps": setting.total_steps, "update_interval": setting.interval,
        "gradient_estimation_steps": setting.estimation, "initial_replacement_rate": setting.rate,
        "density": setting.density, "learning_rate": setting.learning_rate, "lr_schedule": "constant",
        "weight_decay": setting.weight_decay, "optimizer": optimizer,
    }  # fmt: skip
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
