"""Every option of a run: name, default, unit, meaning and check, each written once.

A recipe is YAML with one section per dataclass below. Every key is also a command-line option, which wins over the
recipe. `load` reports all mistakes together, before anything heavy is imported.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any

from scale_sft.errors import UserError

from .fields import a_pattern, above, at_least, between, option, two_betas
from .objective_options import ObjectiveConfig
from .sparse_options import SparseConfig as SparseConfig

DEMO = "demo"
"""As `base`, `train_data`, `eval_data`: the small pretrained model and the task that ship with the package."""
DEMO_PREFERENCES = "demo_preferences"
"""As `train_data`, `eval_data`: the shipped pairs of answers, also for sft; other objectives read them as `demo`."""
DEMO_CHAT = "demo_chat"
"""As `train_data`, `eval_data`: some of the shipped task's rows as conversations."""


class ConfigError(UserError):
    """Options that are wrong; the message names each with its value, what was expected and a remedy."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The frozen base model."""

    base: str = option(
        DEMO,
        "Base model: a local folder, a hub id, or 'demo' for the small model that ships.",
        on_resume="by_effect",
        path=True,
    )
    revision: str | None = option(None, "Revision (branch, tag or commit) of a hub model.", on_resume="by_effect")
    dtype: str = option(
        "auto",
        "Dtype of the base and of the computation. auto: as the model is stored (float16 becomes bfloat16); for a "
        "quantised base on a GPU, bfloat16 if the GPU supports it.",
        choices=("auto", "bfloat16", "float32"),
    )
    quantization: str = option(
        "none",
        "Keep the base in 4 bits (nf4, fp4) or 8 bits (int8) and add the deltas to the dequantised weights; none: keep "
        "it as it is stored. A base that is stored quantised by bitsandbytes stays quantised.",
        choices=("none", "nf4", "fp4", "int8"),
    )
    double_quantization: bool = option(True, "Quantise the scales of a 4-bit base too: 0.05 bytes less per weight.")
    base_placement: str = option(
        "auto",
        "Where the base is kept: replicate (whole on every rank), shard (DeepSpeed ZeRO-3), or auto: replicate if it "
        "fits the device, otherwise shard.",
        choices=("auto", "replicate", "shard"),
        on_resume="free",
    )
    ds_config: str | None = option(
        None,
        "DeepSpeed configuration (JSON) for base_placement shard; default: the launcher's, or the shipped ZeRO-3.",
        on_resume="free",
        path=True,
    )
    gradient_checkpointing: bool = option(
        False, "Recompute each block in the backward pass: less memory, more time.", on_resume="free"
    )
    attention: str = option(
        "auto",
        "Attention implementation. auto: sdpa where the model has it, otherwise eager; on a CPU in bfloat16 eager up "
        "to 256 tokens, which is faster.",
        choices=("auto", "sdpa", "eager", "flash_attention_2", "flex_attention"),
        on_resume="by_effect",
    )
    allow_randomness: bool = option(
        False,
        "Train a base whose forward pass is random in training mode and cannot be made otherwise (sampling routers): "
        "its runs do not repeat, nor do they resume bit for bit.",
        on_resume="free",
    )
    compile: str = option(
        "off",
        "blocks: torch.compile each decoder block in training; not with a base in shards. The first step takes longer.",
        choices=("off", "blocks"),
    )
    trust_remote_code: bool = option(
        False, "Run model code that comes with the base. Only for sources that you trust.", on_resume="free"
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The update of the deltas: AdamW, or SM3 for ma."""

    learning_rate: float | None = option(
        None,
        "Peak learning rate; sparse deltas need far higher ones than dense weights. Default: by the budget and the "
        "depth, 0.005 x (8 / r)^(5/6) x (32 / blocks)^(1/2), where LoRA of rank r has as many parameters; with "
        "ag unless it samples a tenth of it, as its entries crowd; with ma two fifths. The run says which.",
        check=between(0, 1e6, open_low=True),
        on_resume="by_effect",
    )
    betas: tuple[float, float] = option(
        (0.8, 0.999),
        "AdamW's decay rates of the two moments. At 0.9, which is usual, sparse deltas learned less.",
        check=two_betas,
    )
    eps: float = option(1e-8, "Added to the denominator (AdamW) or under the root (SM3).", check=above(0))
    weight_decay: float = option(0.0, "Decoupled decay of the deltas towards the pretrained model.", check=at_least(0))
    max_grad_norm: float | None = option(
        None, "Clip the norm of the gradient of all active entries to this; default: no clipping.", check=above(0)
    )
    moments: str = option(
        "auto",
        "How AdamW's two moments are stored: float32 (8 bytes per entry), mixed (bfloat16 and float32: 6) or int8 "
        "(bitsandbytes, blocks of 256: 2). auto: mixed if gradients are computed in 16 bits.",
        choices=("auto", "float32", "mixed", "int8"),
    )
    gradient_dtype: str = option(
        "float32",
        "Dtype in which the entries' gradients are summed over micro-batches and ranks; bfloat16 saves 2 bytes per "
        "entry and half of the traffic between ranks, and loses what is small compared with the sum.",
        choices=("float32", "bfloat16"),
    )
    warmup_fraction: float | None = option(
        None,
        "Fraction of the steps over which the learning rate rises. Default: 0.03, but at least 10 steps, or a quarter "
        "of a run under 40.",
        check=between(0, 1),
        on_resume="by_effect",
    )
    lr_schedule: str = option(
        "linear", "How the learning rate falls after warm-up.", choices=("linear", "cosine", "constant")
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data: what to learn from, and what to hold out."""

    train_data: tuple[str, ...] | str = option(
        DEMO,
        "Training examples: a file (.jsonl, .json, .csv, .parquet, .txt), a folder of them, a hub data set, or 'demo'; "
        "separate several with commas. Details as NAME?key=value&key=value: subset, split, revision, weight (uses per "
        "epoch), keep (COLUMN:VALUE), format, and the names of columns.",
        on_resume="by_effect",
        path=True,
    )
    eval_data: tuple[str, ...] | str | None = option(
        None,
        "Held-out examples, evaluated before, during and after training; written like train_data.",
        on_resume="by_effect",
        path=True,
    )
    max_length: int | None = option(
        None,
        "Longest example in tokens; longer ones are cut at the end. Default: 2048, or the base's number of positions.",
        check=at_least(2),
    )
    loss_on: str = option(
        "completion",
        "Tokens that count: completion (what follows the prompt; in conversations all assistant turns), assistant (all "
        "assistant turns, those of a prompt too) or all.",
        choices=("completion", "assistant", "all"),
    )
    chat_template: str | None = option(
        None,
        "Chat template of conversations: tulu, chatml or a Jinja file; default: the tokenizer's own (bases have none).",
        on_resume="by_effect",
        path=True,
    )
    packing: bool = option(
        False,
        "Put several examples into each row of max_length tokens; none sees another. micro_batch_size counts rows.",
    )
    streaming: bool = option(
        False,
        "Read no more of the data than the first max_train_examples (max_eval_examples) of each source.",
        on_resume="free",
    )
    preprocess_workers: int | None = option(
        None,
        "Processes that tokenise; default: one per 20,000 examples, at most one per core.",
        check=at_least(1),
        on_resume="free",
    )
    cache_dir: str | None = option(
        None, "Folder of tokenised data; default: scale_sft/ in the Hugging Face cache.", on_resume="free", path=True
    )
    max_train_examples: int | None = option(None, "Use only this many training examples, the first.", check=at_least(1))
    max_eval_examples: int | None = option(None, "Use only this many held-out examples, the first.", check=at_least(1))
    exact_match_examples: int = option(
        0,
        "How many held-out examples to answer by greedy generation and compare with the reference.",
        check=at_least(0),
    )
    answer_pattern: str | None = option(
        None,
        "Regular expression that finds the answer in generated and reference text (the first group of its last match); "
        "'gsm8k' for what follows ####. Default: the whole text.",
        check=a_pattern,
        on_resume="free",
    )
    generation_samples: int = option(
        0,
        "How many held-out prompts to answer at every evaluation; answers go to metrics.jsonl and to the tracker.",
        check=at_least(0),
        on_resume="free",
    )
    max_new_tokens: int = option(64, "Longest generated answer in tokens.", check=at_least(1))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run: its length, its batches and its files."""

    steps: int | None = option(None, "Optimizer steps; give this or epochs.", check=at_least(1), on_resume="by_effect")
    epochs: float | None = option(
        None, "Passes over the training data; default 1 if steps is not given.", check=above(0), on_resume="by_effect"
    )
    global_batch_size: int = option(
        16, "Sequences per optimizer step, over all ranks and micro-steps.", check=at_least(1)
    )
    micro_batch_size: int | None = option(
        None,
        "Sequences per forward pass of one rank; default: the whole share of the rank.",
        check=at_least(1),
        on_resume="free",
    )
    eval_batch_size: int = option(
        16,
        "Sequences per forward pass of one rank in evaluation; no effect on the held-out loss of preferences.",
        check=at_least(1),
        on_resume="free",
    )
    seed: int = option(0, "Seed of the initial indices and of the data order.", check=at_least(0))
    output_dir: str = option(
        "runs/sft", "Folder of the run: a new one, or that of a run to resume.", on_resume="free", path=True
    )
    eval_every_steps: int | None = option(
        None,
        "Also evaluate every this many steps; default: only at the start and at the end.",
        check=at_least(1),
        on_resume="free",
    )
    keep_best: bool = option(
        True,
        "With eval_every_steps: also keep the adapter of the lowest held-out loss, in best_adapter/.",
        on_resume="free",
    )
    early_stopping_steps: int | None = option(
        None,
        "Stop when the held-out loss has not fallen for this many steps (needs eval_every_steps).",
        check=at_least(1),
        on_resume="free",
    )
    log_every_steps: int = option(
        10, "Steps between records in metrics.jsonl and on the console.", check=at_least(1), on_resume="free"
    )
    save_every_steps: int | None = option(
        100,
        "Save a checkpoint every this many steps and after the last; none: only when a signal stops the run.",
        check=at_least(1),
        on_resume="free",
    )
    keep_last: int = option(
        2, "Complete checkpoints to keep; older ones are removed.", check=at_least(1), on_resume="free"
    )
    on_save_failure: str = option(
        "stop",
        "If a checkpoint cannot be written (disk full): stop with an error, or continue without it.",
        choices=("stop", "continue"),
        on_resume="free",
    )
    resume: str = option(
        "auto",
        "auto: resume from the newest complete checkpoint in output_dir, if any; never: refuse a folder that holds a "
        "run; or the folder of a checkpoint (or of a run) to resume from.",
        on_resume="free",
        path=True,
    )
    skip_nonfinite_steps: int = option(
        0,
        "How many steps with a NaN or infinite loss or gradient to skip before stopping.",
        check=at_least(0),
        on_resume="free",
    )
    collective_timeout_seconds: float = option(
        1800.0,
        "End the run when a rank makes no progress for this long; more than any step, evaluation batch or merge takes.",
        check=above(0),
        on_resume="free",
    )
    kernels: str = option(
        "auto",
        "auto: on a GPU with Triton, pick the needed entries of weight gradients, and update and write the deltas, in "
        "one pass each; on a CPU with a C compiler, compute only the needed entries, and update and write in one pass. "
        "cpu: the same on a CPU, plain torch on a GPU. off: plain torch.",
        choices=("off", "cpu", "auto"),
    )
    deterministic: bool = option(
        False,
        "Make a run on a GPU repeat and resume bit for bit, by deterministic algorithms, which take longer. On a CPU "
        "runs do so anyway.",
    )
    save_merged: bool = option(
        False, "At the end, also write the merged model, a plain transformers folder.", on_resume="free"
    )
    tracker: str | None = option(
        None,
        "Experiment tracker: tensorboard, or any other that accelerate knows (wandb, mlflow, ...).",
        on_resume="free",
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    """All options of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    sparse: SparseConfig = field(default_factory=SparseConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    run: RunConfig = field(default_factory=RunConfig)


SECTIONS: dict[str, Any] = typing.get_type_hints(Config)
OPTIONS: dict[str, str] = {f.name: section for section, kind in SECTIONS.items() for f in dataclasses.fields(kind)}
"""Section of every option by its name; names are unique over all sections."""

MAY_CHANGE = frozenset(
    f.name for kind in SECTIONS.values() for f in dataclasses.fields(kind) if f.metadata["on_resume"] != "fixed"
)
"""Options that a resumed run need not repeat: those that do not matter, and those that are compared by effect."""

FREE = frozenset(
    f.name for kind in SECTIONS.values() for f in dataclasses.fields(kind) if f.metadata["on_resume"] == "free"
)
"""Options that a resumed run may change as it likes."""
