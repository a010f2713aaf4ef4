"""Charts as inline SVG. Their colours are the page's CSS variables, so they follow light and dark mode."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

INK, MUTED, LINE = "#1d2327", "#626b73", "#dfe2e1"
BEFORE, AFTER, THIRD = "#a3adb6", "#2c6e9b", "#b7812f"
_CSS = {INK: "ink", MUTED: "muted", LINE: "line", BEFORE: "before", AFTER: "after", THIRD: "third"}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it is searchable and uses the page's font
    "text.parse_math": False,  # names come from outside; "$" is a letter
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": LINE,
    "grid.linewidth": 1,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "legend.labelcolor": MUTED,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}
_WIDTH = 984
"""Width of the page's text column in CSS pixels."""
_COLUMNS, _PANEL_WIDTH, _PANEL_HEIGHT = 3, 328, 220
_SMOOTHED_FROM = 40
"""Series of at least this many points get a running mean over the raw line."""

_LINES, _DASHES = (BEFORE, AFTER, THIRD), ("-", "--", ":")
_MOST_BINS, _FEWEST_IN_PART = 40, 5


class Panel(NamedTuple):
    """One small chart of a training run: `series` maps a legend label to a key of the metrics rows."""

    title: str
    series: dict[str, str]
    x: str = "step"
    x_label: str = "step"


TRAINING_PANELS = (
    Panel("Loss", {"loss": "loss"}),
    Panel("Token accuracy", {"token accuracy": "mean_token_accuracy"}),
    Panel("Gradient norm", {"gradient norm": "grad_norm"}),
    Panel("Reward margin", {"chosen − rejected": "rewards/margins"}),
    Panel("Reward accuracy", {"chosen above rejected": "rewards/accuracies"}),
    Panel("Held-out loss", {"loss": "held_out/loss"}),
    Panel("Held-out reward margin", {"chosen − rejected": "held_out/margin"}),
    Panel("Held-out reward accuracy", {"chosen above rejected": "held_out/accuracy"}),
    Panel("Implicit rewards", {"chosen": "rewards/chosen", "rejected": "rewards/rejected"}),
    Panel("Log-probability of chosen", {"nats": "logps/chosen"}),
    Panel("Reward", {"reward": "reward"}),
    Panel("Reward for facts", {part: f"rewards/{part}/mean" for part in ("asked", "clean", "form")}),
    Panel("Reward by rule or judge", {part: f"rewards/{part}/mean" for part in ("wer", "choice", "judge")}),
    Panel("Reward by kind", {kind: f"reward/kind/{kind}" for kind in ("closed", "one_word", "check")}),
    Panel("Reward by kind", {kind: f"reward/kind/{kind}" for kind in ("absent", "describe")}),
    Panel("Groups of equal rewards", {"share": "frac_reward_zero_std"}),
    Panel("Entropy", {"nats per token": "entropy"}),
    Panel("Clipped ratios", {"share": "clip_ratio/region_mean"}),
    Panel("Completion length", {"tokens": "completions/mean_length"}),
    Panel("Truncated completions", {"share": "completions/clipped_ratio"}),
    Panel("KL to the reference", {"nats per token": "kl"}),
    Panel("KL on dev (nats per answer)", {"KL": "dev/kl"}),
    Panel("Words per answer, dev", {"words": "dev/words"}),
)
_QUALITY = {
    "factuality": "dev/factuality",
    "behaviour": "dev/behaviour",
    "over-abstention": "dev/over_abstention",
}
OVEROPTIMISATION_PANELS = (
    Panel("Dev quality over steps", _QUALITY),
    Panel("Dev quality against KL", _QUALITY, "dev/kl", "KL to the reference (nats per answer)"),
    Panel("Dev score against KL", {"score": "dev/score"}, "dev/kl", "KL to the reference (nats per answer)"),
)


def training(
    rows: Sequence[Mapping[str, float]], stage_metrics: Mapping[str, float]
) -> dict[str, Any] | None:
    """Steps, curves and dev quality of a training stage; None for a stage that logged no loss.

    Args:
        rows: metrics of optimizer steps.
        stage_metrics: the finished stage's; `chosen_step` says whose checkpoint is used.
    """
    if not any("loss" in row for row in rows):
        return None
    return {
        "steps": int(max(row["step"] for row in rows)),
        "curves": curves(rows, TRAINING_PANELS),
        "quality": curves(rows, OVEROPTIMISATION_PANELS, stage_metrics.get("chosen_step")),
    }


def curves(
    rows: Sequence[Mapping[str, float]], panels: Sequence[Panel], mark_step: float | None = None
) -> Markup:
    """Small multiples of a training run's metrics; panels without data are left out.

    Args:
        rows: metrics of optimizer steps, each with "step", in any order.
        panels: what to draw.
        mark_step: the step whose checkpoint is used, drawn as a line where dev quality is shown.
    """
    rows = sorted(rows, key=lambda row: row["step"])
    drawn = [
        panel for panel in panels if any(_points(rows, panel.x, key)[0].size for key in panel.series.values())
    ]
    if not drawn:
        return Markup("")
    columns = min(_COLUMNS, len(drawn))
    n_rows = -(-len(drawn) // columns)
    with matplotlib.rc_context(_STYLE):
        figure = _figure(columns * _PANEL_WIDTH, n_rows * _PANEL_HEIGHT)
        axes = figure.subplots(n_rows, columns, squeeze=False).ravel()
        for axis, panel in zip(axes, drawn, strict=False):
            _draw_panel(axis, panel, rows, mark_step)
        for axis in axes[len(drawn) :]:
            axis.set_axis_off()
        return _svg(figure, "curves: " + ", ".join(panel.title for panel in drawn))


def _draw_panel(
    axis: Axes, panel: Panel, rows: Sequence[Mapping[str, float]], mark_step: float | None
) -> None:
    on_dev = any(key.startswith("dev/") for key in panel.series.values())
    for colour, (label, key) in zip((AFTER, THIRD, BEFORE), panel.series.items(), strict=False):
        x, y = _points(rows, panel.x, key)
        smooth = x.size >= _SMOOTHED_FROM and not on_dev
        axis.plot(x, y, color=colour, alpha=0.3 if smooth else 1, marker="o" if on_dev else "", markersize=4,
                  linewidth=1 if smooth else 1.8, label="_raw" if smooth else label)  # fmt: skip
        if smooth:
            axis.plot(x, _running_mean(y), color=colour, label=label)
    marked = [row[panel.x] for row in rows if row["step"] == mark_step and panel.x in row and "dev/kl" in row]
    if on_dev and marked:
        axis.axvline(marked[0], color=MUTED, linewidth=1, linestyle=(0, (3, 3)), label="checkpoint used")
    axis.set_title(panel.title)
    axis.set_xlabel(panel.x_label, fontsize=11)
    axis.locator_params(axis="y", nbins=5)
    axis.locator_params(axis="x", nbins=6)
    if len(panel.series) > 1 or (on_dev and marked):
        axis.legend(loc="best", handlelength=1.2)


def _points(rows: Sequence[Mapping[str, float]], x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(row[x], row[y]) for row in rows if row.get(x) is not None and row.get(y) is not None]
    values = np.array(points, dtype=float).reshape(-1, 2)
    return values[:, 0], values[:, 1]


def _running_mean(y: np.ndarray) -> np.ndarray:
    """Mean over a centred window of an eighth of the series, shorter at the ends."""
    half = max(1, y.size // 16)
    return np.array([np.nanmean(y[max(0, i - half) : i + half + 1]) for i in range(y.size)])


def lengths(policies: Mapping[str, Sequence[tuple[int, float]]]) -> Markup:
    """Lengths of policies' answers, and mean scores by length.

    Args:
        policies: label -> (words, score) of each answer that was scored.
    """
    words = np.array([n for answers in policies.values() for n, _ in answers])
    if not words.size:
        return Markup("")
    last = int(np.quantile(words, 0.995)) + 1
    edges = np.unique(np.linspace(0, last, min(last, _MOST_BINS) + 1).round())
    parts = np.unique(np.quantile(words, np.linspace(0, 1, 6)).round())
    with matplotlib.rc_context(_STYLE):
        figure = _figure(_WIDTH, 270)
        share, mean = figure.subplots(1, 2)
        for index, (label, answers) in enumerate(policies.items()):
            table = np.array(answers, dtype=float).reshape(-1, 2)
            how: dict[str, Any] = {
                "color": _LINES[index % 3],
                "linestyle": _DASHES[index // 3 % 3],
                "label": label,
            }
            counts = np.histogram(np.minimum(table[:, 0], last), edges)[0]
            share.stairs(100 * counts / max(1, len(table)), edges, linewidth=1.8, **how)
            mean.plot(*_mean_by_part(table, parts), marker="o", markersize=4, **how)
        share.set_title("Answers by words (%)")
        mean.set_title("Mean score by words")
        for axis in (share, mean):
            axis.set_xlabel("words per answer", fontsize=11)
            axis.locator_params(axis="y", nbins=5)
        mean.legend(loc="best", handlelength=1.6)
        return _svg(figure, "lengths of answers, and scores by length")


def _mean_by_part(table: np.ndarray, ends: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean words and mean score of the answers whose words lie in (end, next end], where there are enough."""
    of = np.searchsorted(ends, table[:, 0])
    means = [
        table[of == part].mean(axis=0) for part in np.unique(of) if (of == part).sum() >= _FEWEST_IN_PART
    ]
    return [float(words) for words, _ in means], [float(score) for _, score in means]


def _figure(width_px: int, height_px: int) -> Figure:
    figure = Figure(
        figsize=(width_px / 72, height_px / 72), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    )
    FigureCanvasAgg(figure)
    return figure


def _svg(figure: Figure, title: str) -> Markup:
    """The figure as inline SVG: one unit is one CSS pixel, colours are CSS variables, ids are its own."""
    written = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": title}):
        figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)  # the same in every figure; nothing refers to them
    for colour, variable in _CSS.items():
        svg = svg.replace(f": {colour}", f": var(--{variable})")
    width, height = (round(72 * inches) for inches in figure.get_size_inches())
    opening = Markup(
        '<svg class="chart" role="img" aria-label="{}" viewBox="0 0 {} {}" width="{}" '
        'preserveAspectRatio="xMinYMin meet">'
    ).format(title, width, height, width)
    return opening + Markup(svg[svg.index(">") + 1 :])  # noqa: S704
