"""The report on teacher scores against values worked out by hand."""

import numpy as np
import pytest

from llme_jax.lm.teacher_report import Report, show_report


def test_by_hand():
    scores = [np.log([0.5, 0.25, 0.25]), np.log([0.98, 0.01, 0.01]), np.array([1.0])]
    report = Report(scores, [1, 0, 1])  # a row with one key has nothing to compare
    np.testing.assert_allclose(report.best, [0.5, 0.98])
    np.testing.assert_allclose(report.keys[0], 2**1.5)
    assert (report.right, report.chance) == (1.0, 1 / 3)
    np.testing.assert_allclose(report.spread, [np.log(2), np.log(98)])
    assert "nearly one-hot: in 50.0% of rows" in str(report)


def test_the_suggested_temperature_gives_the_best_key_half():
    rng = np.random.default_rng(0)
    scores = [rng.normal(size=8) * 0.1 for _ in range(101)]
    temperature = Report(scores, [1] * 101).temperature()
    assert np.median(Report([s / temperature for s in scores], [1] * 101).best) == pytest.approx(
        0.5, abs=1e-3
    )
    assert Report(scores, [1] * 101).margin() == np.quantile([np.ptp(s) for s in scores], 0.1)


def test_scores_without_signal_are_called_so():
    rng = np.random.default_rng(0)
    report = Report([rng.normal(size=10) for _ in range(300)], [1] * 300)
    assert "hardly know the positives" in str(report)


def test_masked_keys_have_the_lowest_score_of_float32(tmp_path, capsys):
    lowest = float(np.finfo(np.float32).min)
    report = Report([np.array([0.9, 0.1, lowest])] * 3, [1] * 3)
    show_report(report, tmp_path / "rows.json")
    assert "best key is a labelled positive: 100.0%" in capsys.readouterr().out
    assert (tmp_path / "rows.png").stat().st_size > 1000
