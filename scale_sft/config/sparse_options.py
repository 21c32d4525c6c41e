"""The options of the sparse deltas: which method, how many entries, which of them, and how they move."""

from __future__ import annotations

from dataclasses import dataclass

from .fields import a_density, at_least, between, option


@dataclass(frozen=True, kw_only=True)
class SparseConfig:
    """The sparse deltas: which method, how many, where, and how they move."""

    method: str = option(
        "random",
        "random: choose once from the seed alone, then keep; static: choose once by gradients (sampled by balanced "
        "score^0.5 of 20 batches), then keep; columns: train whole columns, chosen once from the seed or by "
        "selection_batches, then keep (least memory for activations); ag: the paper's SFT-AG, which drops and grows by "
        "accumulated gradients; ma: its SFT-MA, which grows by SM3's accumulators and has the least state.",
        choices=("random", "static", "columns", "ag", "ma"),
    )
    score: str = option(
        "gradient",
        "How much an entry promises: gradient (|mean gradient|), snr (mean over rms of batches), balanced (gradient "
        "over sqrt(rms of row x rms of column): spread), weight (|weight|), gradient_weight (|gradient x weight|), "
        "random, or one of your own (docs/selection.md). With method static: balanced.",
    )
    draw: str = option(
        "top",
        "top: train the entries with the highest scores; sample: draw them in proportion to score^temperature. With "
        "method static: sample.",
        choices=("top", "sample"),
    )
    temperature: float = option(
        1.0,
        "With draw sample: 0 draws uniformly; the higher, the closer to draw top (other than in generation). With "
        "method static: 0.5.",
        check=between(0, 1e6),
    )
    selection_batches: int = option(
        0,
        "Global batches whose gradients choose the entries before the first update. 0: as in the paper, start from "
        "random entries and replace all of them after estimation_steps updates. Until the choice the ranks together "
        "hold 4 bytes (snr: 12) per entry that is looked at: see selection_pool. With method static: 20.",
        check=at_least(0),
    )
    selection_pool: float | None = option(
        None,
        "Entries that selection_batches looks at, in units of the budget: a sample spread over each weight, drawn from "
        "the seed, which saves memory. Default: all entries; with method static: 8, unless tiles or quotas are asked "
        "for, which need all.",
        check=at_least(1),
    )
    budget: str = option(
        "weight",
        "How entries are divided over the weights: weight (each as density, tunable_weights or rank_equivalent says), "
        "rank (the same total, in proportion to rows + columns, as LoRA would), global (the same total, one ranking of "
        "all entries; needs selection_batches).",
        choices=("weight", "rank", "global"),
    )
    budget_floor: float = option(
        0.1, "With budget global: each weight keeps this fraction of its own share.", check=between(0, 1)
    )
    row_quota: float | None = option(
        None,
        "No row gets more than this many times the mean of all rows (first choice by selection_batches). Default: no "
        "quota.",
        check=at_least(1),
    )
    column_quota: float | None = option(None, "The same for columns.", check=at_least(1))
    granularity: str = option(
        "auto",
        "What is trained whole or not at all: entry (single entries), column (all weights of one input), row (all of "
        "one output), block (squares of block_size). method ag moves entries, columns and rows; blocks must stay "
        "(random, or static with selection_batches). auto: column with method columns, otherwise entry.",
        choices=("auto", "entry", "column", "row", "block"),
    )
    block_size: int = option(
        16, "With granularity block: rows and columns of a block; must divide each weight.", check=at_least(1)
    )
    density: float | None = option(
        None,
        "Fraction of each target weight that is trained. Exactly one budget must be given (none is needed with "
        "start_from).",
        check=a_density,
        on_resume="by_effect",
    )
    tunable_weights: int | None = option(
        None,
        "Total number of trained entries, spread evenly over the target weights.",
        check=at_least(1),
        on_resume="by_effect",
    )
    rank_equivalent: int | None = option(
        None,
        "As many trained entries as LoRA of this rank would have: r * (rows + columns).",
        check=at_least(1),
        on_resume="by_effect",
    )
    start_from: str | None = option(
        None,
        "Folder of a finished adapter to train further in a new run: its indices and deltas are the initial state, its "
        "entries per weight the budget. Base and targets must be its own; optimizer state starts fresh. ag and ma move "
        "its indices from the first reallocation on, the other methods keep them.",
        on_resume="by_effect",
        path=True,
    )
    target_modules: tuple[str, ...] | str | None = option(
        None,
        "Layers to train: names ('q_proj,v_proj'; a module path or its end) or one regular expression for the whole "
        "path. Default: all linear layers inside the transformer blocks.",
        on_resume="by_effect",
    )
    exclude_modules: tuple[str, ...] | str | None = option(
        None, "Layers not to train, written like target_modules, which it overrides.", on_resume="by_effect"
    )
    train_embeddings: str = option(
        "none",
        "Train the input embedding, the output layer or both, in addition to the other layers: for new tokens. Tied "
        "ones are one weight, trained by both of its uses. target_modules may also name them (embed_tokens, lm_head).",
        choices=("none", "input", "output", "both"),
        on_resume="by_effect",
    )
    update_interval_steps: int = option(20, "S: optimizer steps between reallocations.", check=at_least(1))
    estimation_steps: int = option(
        5, "G: steps over which candidates are estimated before a reallocation.", check=at_least(1)
    )
    initial_replacement_fraction: float = option(
        0.2, "a: fraction of the active entries replaced at first; it falls to 0 over the run.", check=between(0, 1)
    )
    replacement_schedule: str = option("linear", "How the fraction falls to 0.", choices=("linear", "cosine"))
    candidate_ratio: float = option(
        1.0, "Candidates for growth per active entry (SFT-AG).", check=between(0, 100, open_low=True)
    )
    drop_criterion: str = option(
        "magnitude",
        "Drop the smallest |delta| (magnitude), the smallest change since the last reallocation (change) or the "
        "smallest |delta| per step since the entry was grown (age).",
        choices=("magnitude", "change", "age"),
    )
    exchange_if_better: bool = option(
        False, "Replace an entry only by a candidate whose gradient (or key) is larger than its own (ag, static)."
    )
    seed_moments: bool = option(
        True,
        "Start AdamW's moments of grown entries from the estimates that chose them, as in the paper; or from 0, as "
        "those of grown columns and rows always do.",
    )
    growth_warmup_steps: int = option(
        0, "Let the rate of grown entries rise over this many updates (ag, static).", check=at_least(0)
    )
    rate_scaling: str = option(
        "none",
        "counts: scale each entry's updates by (entries in its row x entries in its column)^-1/4, with mean 1 in each "
        "weight, so that crowded rows and columns move less. Takes 8 bytes per entry for the time of an update.",
        choices=("none", "counts"),
    )
    delta_dtype: str = option(
        "float32",
        "Dtype of the deltas; bfloat16 saves 2 bytes per entry and loses updates that are small compared with their "
        "delta. The update itself is computed in float32.",
        choices=("float32", "bfloat16"),
    )
    proposal_batch_size: int | None = option(
        None,
        "Sequences of the global batch whose gradient proposes candidates (SFT-AG, static); default: the first "
        "micro-step of all ranks. If set, candidates do not depend on how batches are cut into micro-batches.",
        check=at_least(1),
    )

    @property
    def trains_whole(self) -> str:
        """The granularity in effect: entry, column, row or block."""
        if self.granularity != "auto":
            return self.granularity
        return "column" if self.method == "columns" else "entry"

    @property
    def proposes(self) -> bool:
        """True if gradients propose what grows at any time: estimation phases, or the only one of `static`."""
        chosen = self.start_from is not None or self.selection_batches > 0
        return self.method == "ag" or (self.method == "static" and not chosen)
