"""Figures: the curves of a run over its steps, histograms."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from llme_jax.files.atomic import atomic_write

# As many as LLM-Embedder has tasks, and one; told apart by the colour-blind too (Okabe and Ito).
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
STYLES = ("-", "--", "-.", ":")
BINS = 40
Curves = dict[str, tuple[list[int], list[float]]]


def draw_curves(lines: list[dict], png: Path) -> None:
    """Draws the lines of a metrics.jsonl: loss, loss by task, evaluation metrics, also by set.

    A panel without data is left out; lines without either give no figure.
    """
    measured = _curves(lines, "eval_")
    panels = {
        "training loss": _curves(lines, "loss"),
        "training loss by task": _curves(lines, "", "/loss"),
        "retrieval on the evaluation data": {k: c for k, c in measured.items() if "/" not in k},
        "retrieval by evaluation set": {k: c for k, c in measured.items() if "/" in k},
    }
    panels = {title: curves for title, curves in panels.items() if curves}
    if not panels:
        return
    _save(panels, _draw, png)


def draw_histograms(
    panels: dict[str, np.ndarray],
    png: Path,
    counted: str = "rows",
    limits: dict[str, tuple[str, float]] | None = None,
) -> None:
    """One panel for each array of values, under its title.

    Args:
        counted: what a value is of.
        limits: by title, a name and a value that the panel marks.
    """

    def draw(ax, title: str, values: np.ndarray) -> None:
        if np.issubdtype(
            values.dtype, np.floating
        ):  # of fp32 numbers nearly alike no bins are made
            values = values.astype(np.float64)
        ax.hist(values, bins=_bins(values), color=COLORS[0])
        if np.issubdtype(values.dtype, np.integer):
            _whole_numbers(ax)
        ax.set_xlabel(title)
        ax.set_ylabel(counted)
        if limits and title in limits:
            name, limit = limits[title]
            ax.axvline(limit, color=COLORS[1], linestyle="--", label=f"{name} {limit:g}")
            ax.legend(frameon=False, fontsize=8)

    _save(panels, draw, png)


def _bins(values: np.ndarray) -> int | np.ndarray:
    """Of whole numbers each bin holds as many; the outermost are empty, so that one is a bar."""
    if not np.issubdtype(values.dtype, np.integer):
        low, high = values.min(), values.max()
        if high - low > 1e-9 * max(abs(low), abs(high)):
            return BINS
        margin = 0.01 * abs(high) or 0.5  # all alike, maybe as large as float32 goes
        return np.linspace(low - margin, high + margin, BINS + 1)
    low, high = int(values.min()) - 1, int(values.max()) + 1
    width = -(-(high - low + 1) // BINS)
    return np.arange(low, high + width + 1, width) - 0.5


def _save(panels: dict, draw: Callable, png: Path) -> None:
    """Panels side by side, each drawn by `draw(ax, title, content)`."""
    # Heavy, and needed at the end of a run only. The canvas works without a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(panels), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, content) in zip(axes, panels.items(), strict=True):
        draw(ax, title, content)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    with atomic_write(png) as beside:
        figure.savefig(beside, format="png", dpi=150)


def _curves(lines: list[dict], prefix: str, suffix: str = "") -> Curves:
    """(steps, values) of every number whose name begins and ends so."""
    curves: Curves = {}
    for line in lines:
        for name in line:
            if not (name.startswith(prefix) and name.endswith(suffix)):
                continue
            label = name.removeprefix("eval_").removesuffix("/loss")
            steps, values = curves.setdefault(label, ([], []))
            steps.append(line["step"])
            values.append(line[name])
    return curves


def _draw(ax, title: str, curves: Curves) -> None:
    """One panel: a colour for every metric, a line style for every cutoff of it."""
    families: dict[str, list[str]] = {}
    for name in curves:
        families.setdefault(name.split("@")[0], []).append(name)
    for i, names in enumerate(families.values()):
        for j, name in enumerate(names):
            steps, values = curves[name]
            ax.plot(
                steps,
                values,
                color=COLORS[i % len(COLORS)],
                linestyle=STYLES[(j + i // len(COLORS)) % len(STYLES)],
                linewidth=1.7,
                marker="o" if len(steps) <= 40 else None,
                markersize=3,
                label=name.replace("_", " "),
            )
    ax.set_title(title, fontsize=11)
    ax.set_xlabel("step")
    _whole_numbers(ax)
    if len(curves) > 3:  # beside the panel, where it hides no curve
        ax.legend(
            frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), handlelength=3
        )
    elif len(curves) > 1:
        ax.legend(frameon=False, fontsize=8)


def _whole_numbers(ax) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
