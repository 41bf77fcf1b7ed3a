"""What teacher scores are worth, before anybody distils them."""

from pathlib import Path

import numpy as np

from llme_jax.data.rows import BadRows, parse_row, read_lines
from llme_jax.errors import InputError
from llme_jax.plots import draw_histograms

ONE_HOT = 0.95  # weight of the best key from which a row teaches little but its first place
HALF = 0.5  # weight of the best key in the median row at the suggested temperature


class Report:
    """Statistics of the rows that have two scored keys or more.

    Attributes:
        best: weight of the best key in softmax(scores), one a row.
        keys: exp(entropy) of the softmax, how many keys share its weight; from 1 to all.
        spread: highest score less lowest.
        right, chance: of rows with positives and others, how often the best key is a positive,
            and how often a random one would be.
    """

    def __init__(self, scores: list[np.ndarray], positives: list[int]):
        rows = [(s, p) for s, p in zip(scores, positives, strict=True) if len(s) > 1]
        self._scores = [s for s, _ in rows]
        self.best, self.keys = self._softmax(1.0)
        self.spread = np.array([np.ptp(s) for s in self._scores])
        labelled = [(s, p) for s, p in rows if 0 < p < len(s)]
        self.right = np.mean([s.argmax() < p for s, p in labelled]) if labelled else None
        self.chance = np.mean([p / len(s) for s, p in labelled]) if labelled else None

    def _softmax(self, temperature: float) -> tuple[np.ndarray, np.ndarray]:
        best, keys = [], []
        for scores in self._scores:
            p = np.exp((scores - scores.max()) / temperature)
            p /= p.sum()
            best.append(p.max())
            keys.append(np.exp(-(p * np.log(np.maximum(p, 1e-30))).sum()))
        return np.array(best), np.array(keys)

    @property
    def useful(self) -> bool:
        """Whether the best key is a positive clearly more often than by chance, where one knows."""
        return self.right is None or self.right >= 1.5 * self.chance or self.chance >= 0.5

    def temperature(self) -> float:
        """At which the best key of the median row has half of the weight, by bisection."""
        low, high = 1e-3, 1e3
        for _ in range(40):
            middle = (low * high) ** 0.5
            colder = np.median(self._softmax(middle)[0]) > HALF
            low, high = (middle, high) if colder else (low, middle)
        return low

    def margin(self) -> float:
        """That a tenth of the rows do not reach."""
        return float(np.quantile(self.spread, 0.1))

    def __str__(self) -> str:
        size = np.array([len(s) for s in self._scores])
        low, middle, high = np.quantile(self.keys, [0.1, 0.5, 0.9])
        lines = [
            f"teacher scores: {len(size)} rows with {np.median(size):.0f} keys in the median",
            f"keys that share the weight of softmax(scores), 10% / median / 90% of rows: "
            f"{low:.1f} / {middle:.1f} / {high:.1f}",
            f"nearly one-hot: in {np.mean(self.best > ONE_HOT):.1%} of rows the best key has more "
            f"than {ONE_HOT} of the weight",
        ]
        if self.right is not None:
            lines.append(
                f"best key is a labelled positive: {self.right:.1%} (by chance {self.chance:.1%})"
            )
            if not self.useful:
                lines.append("these scores hardly know the positives: do not distil them unseen")
        lines += [
            f"suggested: --teacher_temperature {self.temperature():.2g} (the median row then gives "
            "its best key half of the weight)",
            f"           --teacher_scores_margin {self.margin():.2g} (leaves out the tenth of the "
            "rows whose scores differ least)",
        ]
        return "\n".join(lines)


def report_on(path: Path) -> int:
    """Prints the report on a scored file and draws it beside the file; returns the exit code.

    Raises:
        InputError: see `read_report`.
    """
    show_report(read_report(path), path)
    return 0


def read_report(path: Path) -> Report:
    """The report on a scored file.

    Raises:
        InputError: the file is missing, a row is invalid, or no row has scores to compare.
    """
    if not path.is_file():
        raise InputError(f"--eval_data {path}: there is no such file")
    scores, positives = [], []
    for _, row in read_lines(str(path), parse_row, BadRows()):
        scores.append(np.array(row.teacher_scores or [], np.float64))
        positives.append(row.positives)
    if not any(len(s) > 1 for s in scores):
        raise InputError(f"{path}: no row has teacher_scores for two keys; score the file first")
    return Report(scores, positives)


def show_report(report: Report, path: Path) -> None:
    """Prints a report on the scores in `path`, and draws it beside that file."""
    png = path.with_suffix(".png")
    draw_histograms(
        {
            "weight of the best key": report.best,
            "keys that share the weight": report.keys,
            "highest score less lowest": report.spread,
        },
        png,
    )
    print(f"{report}\nhistograms: {png}")
