"""Draw the pictures of preference tuning: rewards and their margin, accuracy, distance from the reference."""

import math

from matplotlib.figure import Figure

from .plots import Plot
from .records import Run
from .style import BLUE, GREEN, ORANGE, PERCENT, PURPLE, figure_over_steps


def rewards(run: Run) -> Figure | str:
    """Draw the rewards of chosen and rejected answers, and the share of pairs in which the chosen one is larger."""
    if not _points(run, "reward_chosen"):
        return "no step with rewards has been logged"
    paired = bool(_points(run, "reward_accuracy"))
    figure, axes = figure_over_steps(run, 5.2 if paired else 3.2, rows=2 if paired else 1)
    for key, color, label in (("reward_chosen", GREEN, "chosen"), ("reward_rejected", PURPLE, "rejected")):
        _draw(axes[0], run, key, color, label)
    axes[0].set_ylabel("reward")
    axes[0].legend(loc="upper left", ncols=2)
    if paired:
        _draw(axes[1], run, "reward_accuracy", BLUE, "training")
        axes[1].set_ylim(0, 1.05)
        axes[1].yaxis.set_major_formatter(PERCENT)
        axes[1].set_ylabel("accuracy")
        axes[1].legend(loc="lower right", ncols=2)
    return figure


def distance(run: Run) -> Figure | str:
    """Draw the distance from the reference per token, and the cross entropy of the chosen answers."""
    if not _points(run, "kl_per_token"):
        return "the objective has no reference"
    figure, axes = figure_over_steps(run, 4.4, rows=2)
    _draw(axes[0], run, "kl_per_token", BLUE, "training")
    axes[0].set_ylabel("log reference - log model\n(nats per token)")
    axes[0].legend(loc="upper left", ncols=2)
    _draw(axes[1], run, "chosen_nll", GREEN, "training")
    axes[1].set_ylabel("cross entropy of chosen\n(nats per token)")
    axes[1].legend(loc="upper left", ncols=2)
    return figure


def _points(run: Run, key: str) -> list[tuple[int, float]]:
    return [(step, value) for step, value in zip(run.at, run.values(key), strict=True) if math.isfinite(value)]


def _draw(ax, run: Run, key: str, color: str, label: str) -> None:
    """Draw a value of the steps as a line, and of the evaluations as marks."""
    ax.plot(*zip(*_points(run, key), strict=True), color=color, label=label)
    held_out = [(e["step"], e[key]) for e in run.evaluations if e.get(key) is not None]
    if held_out:
        ax.plot(*zip(*held_out, strict=True), "D", color=color, markersize=5, markeredgecolor=ORANGE, linestyle="none",
                label=f"{label}, held out")  # fmt: skip


PREFERENCE_PLOTS: list[Plot] = [
    Plot("rewards", "Rewards",
         "Beta times the log-ratio to the reference, of chosen and rejected (good and bad) answers; below it the share "
         "of pairs in which the chosen one has more.", rewards),
    Plot("distance", "Distance from the reference",
         "How much less likely than under the reference the answers of the data have become, and how likely the chosen "
         "ones are.", distance),
]  # fmt: skip
