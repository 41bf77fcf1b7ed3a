"""The figure of a run."""

import json

import numpy as np
import pytest

from llme_jax.data.instructions import RECIPES
from llme_jax.plots import BINS, COLORS, _bins, draw_curves
from llme_jax.training.metrics_log import read_metrics


def test_draw_curves(tmp_path):
    lines = [{"step": s, "loss": 1 / s, "loss_kl": 0.1, "learning_rate": 1e-5} for s in (1, 2, 3)]
    lines += [{"step": s, "eval_ndcg@10": 0.5, "eval_mrr@1": 0.1 * s} for s in (0, 2)]
    metrics, png = tmp_path / "metrics.jsonl", tmp_path / "curves.png"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_curves(read_metrics(metrics), png)
    both = png.read_bytes()
    assert both.startswith(b"\x89PNG")
    # The header has the width and the height: one panel is half as wide as two.
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines[:3]))
    draw_curves(read_metrics(metrics), png)
    one = png.read_bytes()
    assert int.from_bytes(both[16:20]) == 2 * int.from_bytes(one[16:20])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_sets_have_a_panel_of_their_own(tmp_path):
    sizes = []
    for more in ({}, {f"eval_s{i}/ndcg@10": 0.1 * i for i in range(9)}):
        draw_curves([{"step": 1, "eval_ndcg@10": 0.5} | more], tmp_path / "curves.png")
        sizes.append(int.from_bytes((tmp_path / "curves.png").read_bytes()[16:20]))
    assert sizes[1] == 2 * sizes[0]


def test_nothing_to_draw(tmp_path):
    draw_curves(read_metrics(tmp_path / "missing.jsonl"), tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_every_task_has_a_colour():
    assert len(set(COLORS)) == len(COLORS) >= max(map(len, RECIPES.values()))


@pytest.mark.parametrize("values", [[15, 15], [0, 1, 3], [2, 500], [*range(1000)]])
def test_bins_hold_equally_many_whole_numbers(values):
    edges = _bins(np.array(values))
    assert len(edges) <= BINS + 2 and len(set(np.diff(edges))) == 1 and np.diff(edges)[0] % 1 == 0
    assert edges[0] % 1 == 0.5 and edges[0] < min(values) and edges[-1] > max(values)
    assert np.histogram(values, edges)[0].sum() == len(values)
