"""Options of the objective: what a run learns from, answers to imitate or preferences between answers."""

from __future__ import annotations

from dataclasses import dataclass

from .fields import above, at_least, option

OBJECTIVES = ("sft", "dpo", "ipo", "orpo", "kto")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The objective: supervised fine-tuning, or preference tuning against a reference."""

    objective: str = option(
        "sft",
        "sft: imitate the answers. dpo, ipo, orpo: prefer a chosen answer to a rejected one; batches then count pairs. "
        "kto: learn from single answers marked as good or bad.",
        choices=OBJECTIVES,
    )
    beta: float = option(
        0.1,
        "Strength of the preference: the scale of rewards (dpo, kto), the regularisation (ipo), the weight of the odds "
        "ratio (orpo).",
        check=above(0),
    )
    label_smoothing: float = option(
        0.0,
        "Probability that the two sides of a pair are swapped by mistake (dpo; the robust loss of TRL).",
        check=lambda value: None if 0 <= value < 0.5 else "must be in [0, 0.5)",
    )
    sft_weight: float | None = option(
        None,
        "Weight of the cross entropy of the chosen answer, added to the loss (dpo, ipo, orpo). Default: 1 for orpo, "
        "otherwise 0.",
        check=at_least(0),
    )
    length_normalised: bool = option(
        False,
        "Divide log-probabilities by the tokens of the answer (dpo). ipo and orpo always do, kto never does.",
    )
    desirable_weight: float = option(1.0, "Weight of the loss of good answers (kto).", check=at_least(0))
    undesirable_weight: float = option(1.0, "Weight of the loss of bad answers (kto).", check=at_least(0))
    reference: str = option(
        "auto",
        "Log-probabilities of the reference: precomputed (one pass over the data before training, kept in the cache), "
        "swapped (in each step the deltas leave the weights for one forward pass) or none (orpo, which needs none). "
        "auto: precomputed; none for orpo.",
        choices=("auto", "precomputed", "swapped", "none"),
    )
    reference_adapter: str | None = option(
        None,
        "Folder of an adapter that is part of the reference: base + adapter. Default: the base alone. To tune an "
        "adapter, give the same folder as start_from.",
        on_resume="by_effect",
        path=True,
    )
    router_aux_loss: str = option(
        "auto",
        "Add the loss that balances the load of experts to the training loss (sft), with the weight that the base's "
        "configuration gives it: true, false, or auto (true if the configuration says output_router_logits). Held-out "
        "losses are without it.",
        choices=("auto", "true", "false"),
    )
    best_by: str = option(
        "loss",
        "What the best adapter is chosen by, of the held-out pairs: loss, or accuracy (how often the chosen side has "
        "the larger reward). Early stopping follows it too.",
        choices=("loss", "accuracy"),
        on_resume="free",
    )

    @property
    def is_preference(self) -> bool:
        """True for every objective but sft."""
        return self.objective != "sft"

    @property
    def pairs(self) -> bool:
        """True if the examples are pairs of answers."""
        return self.objective in ("dpo", "ipo", "orpo")

    @property
    def reference_kind(self) -> str:
        """Where log-probabilities of the reference come from: precomputed, swapped or none."""
        if self.reference != "auto":
            return self.reference
        return "none" if self.objective in ("sft", "orpo") else "precomputed"

    @property
    def weight_of_sft(self) -> float:
        """Weight of the cross entropy of the chosen answer."""
        return float(self.objective == "orpo") if self.sft_weight is None else self.sft_weight
