"""The alternatives to sparse deltas, trained by a plain loop with the same batches, loss and schedule."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from scale_sft.distributed.cluster import Cluster
from scale_sft.errors import UserError
from scale_sft.model.loading import load_base
from scale_sft.model.loss import token_loss_sum
from scale_sft.model.targets import Target, targets_of
from scale_sft.spiel.schedules import LearningRateSchedule
from scale_sft.spiel.seeding import seeded_generator
from scale_sft.training.inputs import Inputs


def require_peft() -> None:
    """Raise UserError if PEFT is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError:
        raise UserError(
            "bench: LoRA and IA3 need peft: pip install 'scale_sft[bench]', or choose --methods without"
        ) from None


def build(kind: str, inputs: Inputs, cluster: Cluster) -> tuple[nn.Module, list[nn.Parameter]]:
    """Load the base and set up the parameters that `kind` (peft-..., full) trains; all else is frozen.

    Raises:
        UserError: PEFT is missing, or the base is quantised and cannot be trained densely.
    """
    config = inputs.config
    model = load_base(config.model, inputs.model_config, cluster.device, inputs.quantization)
    targets = targets_of(model, config.sparse)
    if kind == "full":
        if inputs.quantization:
            raise UserError(f"full: a base in {config.model.quantization} cannot be trained densely")
        for target in targets:
            target.weight.requires_grad_(True)
    else:
        model = _with_peft(kind, model, targets, config.sparse.rank_equivalent, config.run.seed)
    return model, [weight for weight in model.parameters() if weight.requires_grad]


def _with_peft(kind: str, model: nn.Module, targets: list[Target], rank: int | None, seed: int) -> nn.Module:
    """Add LoRA to the same linear layers, without dropout, or IA3 where PEFT puts it.

    LoRA's update is scaled by 2 (alpha twice the rank), rank-stabilised by sqrt(rank) (alpha the rank).
    """
    require_peft()
    from peft import IA3Config, LoraConfig, get_peft_model

    if kind.startswith("peft-lora"):
        if rank is None:
            raise UserError("rank_equivalent: got none, expected LoRA's rank. Fix: give rank_equivalent")
        experts = [target.name for target in targets if target.fused is not None]
        if experts:
            raise UserError(
                f"lora: got {len(experts):,} experts of fused parameters ('{experts[0]}', ...), expected layers, which "
                "PEFT can wrap. Fix: leave out lora and lora-rs, or name other layers by target_modules"
            )
        layers = [target.name.removesuffix(".weight") for target in targets]
        stabilised = kind == "peft-lora-rs"
        alpha = rank if stabilised else 2 * rank
        adapter = LoraConfig(
            r=rank, lora_alpha=alpha, use_rslora=stabilised, target_modules=layers, task_type="CAUSAL_LM"
        )
    else:
        adapter = IA3Config(task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT still uses an older name of transformers
        torch.manual_seed(seeded_generator(seed, "adapter").initial_seed())
        return get_peft_model(model, adapter)


def train_peer(
    model: nn.Module,
    weights: list[nn.Parameter],
    inputs: Inputs,
    cluster: Cluster,
    record: Callable[[int, float], None],
) -> None:
    """Train `weights` for `inputs.steps` steps of `torch.optim.AdamW`; `record` receives each step's loss.

    Global batches, token-weighted loss and learning-rate schedule are those of `train.py`; weights that are not fp32
    have fp32 copies, which are updated and rounded back.

    Raises:
        UserError: the loss or the gradient is NaN or infinite, or no learning rate is given.
    """
    options, peak = inputs.config.optimizer, inputs.config.optimizer.learning_rate
    if peak is None:
        raise UserError("learning_rate: got none, expected a number: the default is for sparse deltas. Fix: give one")
    schedule = LearningRateSchedule(
        peak=peak,
        total_steps=inputs.steps,
        warmup_fraction=options.warmup_fraction,
        decay=options.lr_schedule,
    )
    masters = [weight if weight.dtype is torch.float32 else weight.detach().float() for weight in weights]
    optimizer = torch.optim.AdamW(
        masters, lr=peak, betas=options.betas, eps=options.eps, weight_decay=options.weight_decay
    )
    for step in range(1, inputs.steps + 1):
        batch = inputs.order.batch(step)
        target_tokens = inputs.train.target_tokens(batch)
        total = torch.zeros((), device=cluster.device)
        for micro_batch in inputs.micro_batches(batch, cluster):
            share = token_loss_sum(model, micro_batch, target_tokens)
            share.backward()
            total += share.detach()
        loss = float(total)
        norm = float(nn.utils.clip_grad_norm_(weights, options.max_grad_norm or math.inf))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            rate = f"{schedule.at(step):.3g}"
            raise UserError(f"step {step}: the loss is {loss} and the gradient norm {norm} at learning rate {rate}")
        optimizer.param_groups[0]["lr"] = schedule.at(step)
        _update(optimizer, weights, masters)
        record(step, loss)


@torch.no_grad()
def _update(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], masters: list[Tensor]) -> None:
    """Do one step on the masters with the gradients of the weights, and free these."""
    for weight, master in zip(weights, masters, strict=True):
        if master is not weight and weight.grad is not None:
            master.grad = weight.grad.float()
    optimizer.step()
    for weight, master in zip(weights, masters, strict=True):
        if master is not weight:
            weight.copy_(master)
        weight.grad = None
