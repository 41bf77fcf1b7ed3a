"""Charts as SVG inside a page: they take its colours, light and dark, and its width.

Colours are classes (`c0` to `c5`), which the page's style sheet fills in.
"""

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 14, 34
SERIES = 6  # colours there are
POINTS = 400  # of a line: more cannot be told apart


class Axis:
    """A scale from values to places on the page, with round ticks."""

    def __init__(self, low: float, high: float, start: float, end: float):
        if not high > low:
            margin = max(0.5, 1e-3 * abs(low))  # a large number less 0.5 is the same
            low, high = low - margin, high + margin
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, about: int = 5) -> list[float]:
        raw = (self.high - self.low) / about
        power = 10 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [i * step for i in range(first, last + 1)]


def lines(curves: dict[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str) -> str:
    """Curves over one axis, each (xs, ys), with a legend."""
    every_x = [v for xs, _ in curves.values() for v in xs]
    every_y = [v for _, ys in curves.values() for v in ys]
    across = Axis(min(every_x), max(every_x), LEFT, WIDTH - RIGHT)
    up = Axis(min(0.0, *every_y), max(every_y), HEIGHT - BOTTOM, TOP)
    parts = [*_frame(across, up, x, y)]
    for i, (xs, ys) in enumerate(curves.values()):
        step = max(1, -(-len(xs) // POINTS))
        points = " ".join(
            f"{across(a)},{up(b)}" for a, b in zip(xs[::step], ys[::step], strict=True)
        )
        parts.append(f'<polyline class="line s{i % SERIES}" points="{points}"/>')
    return _svg(parts, f"{y} over {x}") + _legend([*curves])


def bars(series: dict[str, Sequence[float]], edges: Sequence[float], x: str, y: str) -> str:
    """Histograms with the same bins, one behind the other, each as shares of its own sum."""
    shares = {n: [v / max(1, sum(values)) for v in values] for n, values in series.items()}
    across = Axis(edges[0], edges[-1], LEFT, WIDTH - RIGHT)
    up = Axis(0.0, max(max(values) for values in shares.values()), HEIGHT - BOTTOM, TOP)
    parts = [*_frame(across, up, x, y)]
    for i, values in enumerate(shares.values()):
        for left, right, value in zip(edges[:-1], edges[1:], values, strict=True):
            if value:
                a, b, top = across(left), across(right), up(value)
                parts.append(f'<rect class="bar f{i % SERIES}" x="{a}" y="{top}" '
                             f'width="{max(b - a, 0.5):.1f}" '
                             f'height="{up(0) - top:.1f}"/>')  # fmt: skip
    return _svg(parts, f"{y} over {x}") + _legend([*series])


def intervals(rows: dict[str, tuple[float, float, float]], x: str) -> str:
    """A dot with its interval (value, low, high) a row, and a line at 0."""
    low = min(0.0, *(v[1] for v in rows.values()))
    high = max(0.0, *(v[2] for v in rows.values()))
    margin = 0.05 * (high - low or 1)
    label, height = 150, 30 * len(rows) + TOP + BOTTOM
    across = Axis(low - margin, high + margin, label, WIDTH - RIGHT)
    base = height - BOTTOM
    parts = _ticks_across(across, base, x)
    parts.append(f'<line class="zero" x1="{across(0)}" y1="{TOP}" x2="{across(0)}" y2="{base}"/>')
    for i, (name, (value, lower, upper)) in enumerate(rows.items()):
        y = TOP + 30 * i + 15
        parts += [
            f'<text class="name" x="{label - 10}" y="{y + 4}">{escape(name)}</text>',
            f'<line class="line s0" x1="{across(lower)}" y1="{y}" x2="{across(upper)}" y2="{y}"/>',
            f'<circle class="f0" cx="{across(value)}" cy="{y}" r="5"/>',
        ]
    return _svg(parts, x, height)


def _frame(across: Axis, up: Axis, x: str, y: str) -> list[str]:
    parts = _ticks_across(across, HEIGHT - BOTTOM, x)
    for tick in up.ticks():
        at = up(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{at}" x2="{WIDTH - RIGHT}" y2="{at}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 6}" y="{at + 4}">{tick:g}</text>')
    parts.append(f'<text class="tick" x="{LEFT}" y="{TOP - 3}">{escape(y)}</text>')
    return parts


def _ticks_across(across: Axis, base: float, label: str) -> list[str]:
    parts = []
    for tick in across.ticks():
        at = across(tick)
        parts.append(f'<line class="grid" x1="{at}" y1="{TOP}" x2="{at}" y2="{base}"/>')
        parts.append(f'<text class="tick mid" x="{at}" y="{base + 14}">{tick:g}</text>')
    at = (across.start + across.end) / 2
    parts.append(f'<text class="tick mid" x="{at}" y="{base + 29}">{escape(label)}</text>')
    return parts


def _svg(parts: list[str], label: str, height: float = HEIGHT) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def _legend(names: list[str]) -> str:
    if len(names) < 2:
        return ""
    items = (
        f'<span><i class="b{i % SERIES}"></i>{escape(name)}</span>' for i, name in enumerate(names)
    )
    return f'<p class="legend">{"".join(items)}</p>'
