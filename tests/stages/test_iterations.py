"""The stages that a recipe becomes: order, what each reads, every teacher."""

import pytest

from llme_jax.stages.iterations import Iterations, Recipe, last_counts
from llme_jax.stages.plan import plan


class Small(Iterations):
    recipe = Recipe(
        train_data="llm-embedder:qa/train.json",
        eval_data="test.json",
        corpus="corpus.json",
        mining_corpus="seen.json",
        texts="--query_max_length 8",
        encoder="--pooling_method mean",
        metrics="--metrics ndcg",
        bm25="--hits 5",
        mine="--hits 6",
        retriever="--max_steps 3 --distill_weight 0",
        distil="--distill_weight 1",
        ranker="--max_steps 4",
        lm="--context_max_length 99",
    )


def planned(**settings):
    config = Small()
    for name, value in settings.items():
        setattr(config.pipeline, name, value)
    return plan(config)


TEACHERS = {
    "ranker": ["ranker", "ranker-test", "scores"],
    "lm": ["scores"],
    "yes-no": ["scores"],
}


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("iterations", [2, 4])
def test_the_last_retriever_is_distilled(teacher, iterations):
    stages = planned(teacher=teacher, iterations=iterations)
    names = ["untrained", "bm25"]
    for i in range(1, iterations):
        names += [f"r{i}", f"r{i}-test", f"r{i}-mine"]
    last = f"r{iterations}"
    names += [f"{last}-{part}" for part in TEACHERS[teacher]] + [last, f"{last}-test"]
    assert [*stages] == names
    assert stages["r1"].after == ["bm25"] and stages[last].after == [f"{last}-scores"]
    assert stages[last].settings.loss.distill_weight == 1
    assert stages["r1"].settings.loss.distill_weight == 0
    for one in stages.values():
        if one.stage.command == "train":  # always from the pre-trained encoder
            assert one.settings.encoder.query_encoder == "BAAI/bge-base-en"


@pytest.mark.parametrize("teacher", TEACHERS)
def test_with_refresh_every_retriever_is(teacher):
    stages = planned(teacher=teacher, refresh=True)
    assert [f"r{i}-scores" in stages for i in (1, 2, 3)] == [True] * 3
    for i, mined in ((1, "bm25"), (2, "r1-mine"), (3, "r2-mine")):
        assert mined in stages[f"r{i}-scores"].after
        assert stages[f"r{i}"].after == [f"r{i}-scores"]
        assert stages[f"r{i}"].settings.loss.distill_weight == 1
    assert "r1-ranker-test" not in stages  # there are no hits yet to order


def test_what_each_reads():
    stages = planned(teacher="lm", seed=7)
    assert stages["bm25"].settings.data.corpus == "seen.json"
    assert stages["r2-mine"].settings.data.corpus == "seen.json"
    assert stages["r2-test"].settings.data.corpus == "corpus.json"
    assert stages["r3-scores"].settings.lm.context_max_length == 99
    assert stages["r1"].settings.training.seed == 7
    (rows,) = stages["r3"].settings.data.train_data
    assert rows.endswith("/r3-scores/train.neg.r2.scored.lm.json")


def test_a_trial_takes_few_steps():
    for one in planned(trial=True).values():
        if one.stage.command in ("train", "rank") and one.settings.data.train_data:
            assert one.settings.training.max_steps == 4


def test_of_two_the_same_the_last_counts():
    assert last_counts("--a 1 2 --b --a -3 --c 'x y'") == "--a -3 --b --c 'x y'"
