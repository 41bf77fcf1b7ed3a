"""What opens a gate and what shuts it, on files written by hand."""

import json
from pathlib import Path

import pytest

from llme_jax.config import HaveNegatives, NotBelow, Stage, UsefulScores
from llme_jax.errors import InputError
from llme_jax.stages.gates import check
from llme_jax.stages.plan import Planned


def stage(folder: Path, name: str, **files) -> Planned:
    """A stage whose folder holds these files; a list becomes JSON lines."""
    (folder / name).mkdir()
    for file, content in files.items():
        rows = content if isinstance(content, list) else [content]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name / f"{file.replace('_', '.')}.json").write_text(text)
    return Planned(Stage(name, "retrieve", ""), folder / name, [], None)


@pytest.mark.parametrize(
    ("by", "is_open", "said"),
    [
        (0.02, True, "ndcg@10 0.6900, first has 0.7000"),
        (0.005, False, "ndcg@10 0.6900, first has 0.7000: below it by more than 0.005; look at"),
    ],
)
def test_not_below(tmp_path, by, is_open, said):
    first = stage(tmp_path, "first", test_metrics={"ndcg@10": 0.7})
    second = stage(tmp_path, "second", test_metrics={"ndcg@10": 0.69})
    found = check(NotBelow("ndcg@10", "first", by), second, {"first": first})
    assert found[0] == is_open and found[1].startswith(said)
    with pytest.raises(InputError, match="stage second: mrr@10 is not among what it measures, ndc"):
        check(NotBelow("mrr@10", "first"), second, {"first": first})


def test_have_negatives(tmp_path):
    rows = [{"query": "q", "neg": ["a"]}] * 8 + [{"query": "q", "neg": []}] * 2
    mined = stage(tmp_path, "mined", train_neg_x=rows)
    assert check(HaveNegatives(0.8), mined, {}) == (True, "80.0% of 10 rows have negatives")
    is_open, said = check(HaveNegatives(0.9), mined, {})
    assert not is_open and "80.0% of 10 rows have negatives, less than 90%: look at --hits" in said


@pytest.mark.parametrize(("best", "is_open"), [(0, True), (1, False)])
def test_useful_scores(tmp_path, best, is_open):
    scores = [0.0, 0.0, 0.0, 0.0]
    scores[best] = 1.0
    row = {"query": "q", "pos": ["a"], "neg": ["b", "c", "d"], "teacher_scores": scores}
    scored = stage(tmp_path, "scored", train_scored_x=[row] * 3)
    found = check(UsefulScores(), scored, {})
    share = "100.0%" if is_open else "0.0%"
    assert found[0] == is_open
    assert found[1].startswith(f"best key is a labelled positive in {share}, by chance 25.0%")
    with pytest.raises(InputError, match=r"has no \*\.neg\*\.json, which the gate of this stage"):
        check(HaveNegatives(), scored, {})
