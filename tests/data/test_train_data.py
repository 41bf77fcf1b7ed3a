"""From files to batches: stores, recipes, errors before training, assembling."""

import logging
import os

import jax
import numpy as np
import pytest
from samples import assert_same, hash_of, in_order, make_rows, plan_rows

from llme_jax.config import LossConfig
from llme_jax.data import train_store
from llme_jax.data.instructions import RECIPES, TASK_INSTRUCTIONS
from llme_jax.data.plan import Plan
from llme_jax.data.rows import BadRows
from llme_jax.errors import InputError

TASKS = ("qa", "convsearch", "chat", "lrlm", "icl", "tool")


def test_a_batch_is_what_the_tokenizer_makes_of_the_rows(write_rows, prepared, tokenizer):
    rows = make_rows(12)
    path = write_rows("qa/train.json", rows)
    data = prepared(
        path, version="llm-embedder", select_negative="first", train_group_size=4, key_max_length=20
    )
    order = [7, 0, 3, 11, 4]
    batch = data.assemble(plan_rows(order))
    instruction = TASK_INSTRUCTIONS["llm-embedder"]["qa"]
    queries, keys, scores, has_scores, hashes, positives = [], [], [], [], [], []
    for i in order:
        row = rows[i]
        picks = [0] + [len(row["pos"]) + k % len(row["neg"]) for k in range(3)]
        texts = [(row["pos"] + row["neg"])[j] for j in picks]
        queries.append(instruction.query + row["query"])
        keys += [instruction.key + text for text in texts]
        scores.append([row["teacher_scores"][j] if "teacher_scores" in row else 0 for j in picks])
        has_scores.append("teacher_scores" in row)
        hashes += [hash_of(text) for text in texts]
        positives.append({tuple(hash_of(text)) for text in row["pos"]})
    for texts, field, first, limit in ((queries, "query", 0, 16), (keys, "key", 5, 20)):
        expected = tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
        numbers = list(range(first, first + len(texts)))
        assert in_order(batch.texts["texts"], field) == (expected, numbers)
    np.testing.assert_array_equal(batch.teacher_scores, np.array(scores, np.float32))
    assert batch.has_scores.tolist() == has_scores
    assert batch.key_hash.tolist() == hashes
    assert [set(map(tuple, p)) for p in batch.positive_hash.tolist()] == positives
    assert {leaf.dtype.name for leaf in jax.tree.leaves(batch.texts)} == {"int32"}
    targets = [leaf.dtype.name for leaf in jax.tree.leaves(batch[1:])]
    assert targets == ["float32", "bool", "uint32", "uint32"] and batch.teacher_vectors is None


def test_fields_that_nobody_reads_are_named(write_rows, prepared, caplog):
    rows = [row | {"type": "normal", "negatives": ["n"], "query_id": 3} for row in make_rows(3)]
    path = write_rows("t.json", rows)
    for _ in range(2):  # also when the tokens are there already
        prepared(path)
        assert f"{path}: training does not read these fields: negatives, type" in caplog.text
        caplog.clear()
    prepared(write_rows("t.json", make_rows(3)))
    assert "does not read" not in caplog.text


def test_a_key_taken_by_the_teacher_counts_as_positive(write_rows, prepared):
    rows = [
        {"query": "q", "pos": ["p"], "neg": ["n", "m"], "teacher_scores": [0, 3, 1]},
        {"query": "q", "history": ["a", "b", "c"], "teacher_scores": [0, 1, 3]},
        {"query": "q", "pos": ["p", "r"], "neg": ["n"]},
    ]
    data = prepared(write_rows("t.json", rows), select_positive="teacher", select_negative="first")
    batch = data.assemble(plan_rows([0, 1, 2]))
    hashes = [[tuple(h) for h in row] for row in batch.positive_hash.tolist()]
    expected = [["p", "n"], ["c", "c"], ["p", "r"]]
    assert hashes == [[tuple(hash_of(t)) for t in row] for row in expected]
    taken = ["n", "m", "m", "c", "a", "b", "p", "n", "n"]
    assert batch.key_hash.tolist() == [hash_of(t) for t in taken]
    assert batch.teacher_scores.tolist() == [[3, 1, 1], [3, 0, 1], [0, 0, 0]]


def test_the_width_of_positives_hardly_changes(write_rows, prepared):
    """Another width is another program to compile."""
    rows = [{"query": "q", "pos": ["p"] * n, "neg": ["n"]} for n in (1, 3, 2, 20)]
    few = prepared(write_rows("few.json", rows[:3]))
    assert {few.assemble(plan_rows([i])).positive_hash.shape[1] for i in range(3)} == {4}
    many = prepared(write_rows("many.json", rows))
    assert [many.assemble(plan_rows([i])).positive_hash.shape[1] for i in (0, 3)] == [8, 32]


def test_negatives_change_with_the_epoch_only(write_rows, prepared):
    data = prepared(write_rows("t.json", make_rows(40)), seed=5)
    first, again, other = (data.assemble(plan_rows(range(40), epoch=e)) for e in (0, 0, 1))
    np.testing.assert_array_equal(first.key_hash, again.key_hash)
    assert (first.key_hash != other.key_hash).any()


def test_names_sizes_and_repeats(write_rows, prepared):
    a, b = write_rows("nq/a.json", make_rows(5)), write_rows("msmarco/b.json", make_rows(7))
    data = prepared([a, b, a, a])
    assert data.names == ["nq", "msmarco", "nq_1", "nq_2"]
    assert data.sizes == [5, 7, 5, 5] and data.paths == [a, b, a, a]
    assert data.tasks == ["qa"] * 4
    plan = Plan(tuple(data.sizes), 4, "epoch", seed=0)
    for step in range(plan.steps_per_epoch):
        assert len(data.assemble(plan(step)).texts["texts"].place["query"]) == 4


@pytest.mark.parametrize("method", [None, "epoch", "random"])
def test_files_that_fill_no_batch_are_named(write_rows, prepared, caplog, method):
    files = [write_rows(f"{n}/t.json", make_rows(size)) for n, size in (("nq", 9), ("chat", 3))]
    data = prepared([*files, files[1]], inbatch_same_dataset=method, seed=5)
    assert data.plan(8) == Plan((9, 3, 3), 8, method, seed=5)
    data.plan(16)
    words = "has {} rows, less than a batch of {}: its rows are repeated to fill one"
    small = [("chat", 3, 8), ("chat_1", 3, 8), ("nq", 9, 16), ("chat", 3, 16), ("chat_1", 3, 16)]
    expected = [("the data", 15, 16)] if method is None else small
    assert caplog.messages == [f"{name} {words.format(*of)}" for name, *of in expected]


def test_key_texts_are_stored_once(write_rows, prepared, monkeypatch):
    rows = [{"query": f"q{i}", "pos": ["p"], "neg": ["n", f"n{i % 3}"]} for i in range(30)]
    path = write_rows("t.json", rows)
    (dataset,) = prepared(path)._datasets
    assert len(dataset.store.keys) == len(dataset.store.key_hash) == 5
    before = prepared(path).assemble(plan_rows(range(30)))
    monkeypatch.setattr(train_store, "REMEMBERED_TEXTS", 2)
    forgetful = prepared(path, dataset_cache_dir=str(path) + ".cache")
    assert len(forgetful._datasets[0].store.keys) > 5
    after = forgetful.assemble(plan_rows(range(30)))
    assert_same(before, after)


def test_a_warm_start_builds_and_reads_nothing(write_rows, prepared, monkeypatch, tmp_path):
    path = write_rows("t.json", make_rows(10))
    cold = prepared(path)
    leftover = tmp_path / "cache/train/.0123.89abcdef.tmp"  # of a killed process
    leftover.mkdir()

    def refuse(*_):
        raise AssertionError("built again")

    with monkeypatch.context() as patch:
        patch.setattr(train_store, "_build", refuse)
        patch.setattr(train_store, "blake2b", refuse)  # the file's hash is remembered
        warm = prepared(path, select_negative="first", max_sample_num=4)  # settings of the load
        assert warm.sizes == [4]
        warm = prepared(path)
    planned = plan_rows(range(10))
    assert_same(cold.assemble(planned), warm.assemble(planned))


@pytest.mark.parametrize(
    "change",
    [
        {"version": "e5"},
        {"add_instruction": False},
        {"query_instruction": "own "},
        {"key_instruction": "own "},
        {"query_max_length": 8},
        {"key_max_length": 8},
        {"truncation_side": "left"},
    ],
)
def test_what_changes_tokens_makes_another_store(write_rows, prepared, tmp_path, change):
    path = write_rows("t.json", make_rows(4))
    prepared(path)
    prepared(path, **change)
    assert len([p for p in (tmp_path / "cache/train").iterdir() if p.is_dir()]) == 2


def test_a_changed_file_and_another_tokenizer_make_another_store(
    write_rows, prepared, tmp_path, make_tokenizer
):
    path = write_rows("t.json", make_rows(4))
    prepared(path)
    prepared(path, tokenizer=make_tokenizer(1))
    write_rows("t.json", make_rows(5))
    assert prepared(path).sizes == [5]
    write_rows("copy.json", make_rows(5))  # the same content under another name
    prepared(str(tmp_path / "copy.json"))
    (tmp_path / "cache/train/files.json").write_text("{half")  # only a memory of hashes
    os.utime(path)
    prepared(path)
    assert len([p for p in (tmp_path / "cache/train").iterdir() if p.is_dir()]) == 3


def test_rows_are_filtered_and_sampled(write_rows, prepared, caplog):
    rows = [
        {"query": f"q{i}", "pos": ["p"], "neg": ["n"], "teacher_scores": [i, 0]} for i in range(60)
    ]
    path = write_rows("t.json", rows)
    with caplog.at_level(logging.INFO):
        data = prepared(path, teacher_scores_min=10, teacher_scores_margin=20)
    assert data.describe(plan_rows(range(40))) == [f"{path}:{i + 1}" for i in range(20, 60)]
    assert "of 60 rows are 10 by teacher_scores_min, 10 by teacher_scores_margin" in caplog.text
    sampled = [prepared(path, max_sample_num=8, seed=seed) for seed in (0, 0, 1)]
    lines = [data.describe(plan_rows(range(8))) for data in sampled]
    assert lines[0] == lines[1] != lines[2]
    assert len(set(lines[0])) == 8
    assert lines[0] != [f"{path}:{i}" for i in range(1, 9)]


def test_bad_rows_are_skipped_and_listed_again_on_a_warm_start(write_rows, prepared):
    path = write_rows("t.json", ["nonsense", *make_rows(4), '{"query": 1}'])
    for _ in range(2):
        bad_rows = BadRows(2)
        data = prepared([path, path], bad_rows=bad_rows)
        assert data.sizes == [4, 4]
        assert [(file, line) for file, line, _ in bad_rows.found] == [(path, 1), (path, 6)]
    assert data.describe(plan_rows([0])) == [f"{path}:2"]
    with pytest.raises(InputError, match=r"t.json:6: query is 1"):
        prepared(path, max_bad_rows=1)


def test_recipes_of_the_tasks(write_rows, prepared):
    loss = LossConfig(cos_temperature=0.02)
    paths = [
        write_rows(
            f"{task}/train.json", [r for r in make_rows(12, task=task) if "teacher_scores" in r]
        )
        for task in TASKS
    ]
    data = prepared(
        paths,
        loss,
        version="llm-embedder",
        use_train_config=True,
        inbatch_same_dataset="epoch",
        max_sample_num=3,
    )
    assert data.tasks == list(TASKS)
    for i, task in enumerate(TASKS):
        recipe = data.recipe(i)
        assert recipe is data.recipes[i]
        assert recipe.cos_temperature == 0.02
        for name, value in RECIPES["llm-embedder"][task].items():
            assert getattr(recipe, name, value) == value
        how = data._datasets[i].selection
        assert how.positive == RECIPES["llm-embedder"][task]["select_positive"]
        assert how.stable_distill == (task in ("qa", "icl"))
    lrlm = TASKS.index("lrlm")
    assert data._datasets[lrlm].selection.scores_margin == 0.1
    assert [size == 3 for size in data.sizes] == [task != "lrlm" for task in TASKS]  # 10000 there
    with pytest.raises(InputError, match=r"different losses.*give --inbatch_same_dataset epoch"):
        prepared(paths, loss, version="llm-embedder", use_train_config=True)


def test_files_with_and_without_scores_may_be_mixed(write_rows, prepared):
    plain = write_rows("plain/t.json", make_rows(6, scores=False))
    scored = write_rows("scored/t.json", make_rows(6))
    data = prepared([plain, scored])
    assert [r.distill_weight for r in data.recipes] == [0.0, 1.0]
    assert data.recipe(None) == LossConfig() and data.recipe(0).distill_weight == 0.0
    batch = data.assemble(plan_rows([0, 8, 1, 7]))
    assert batch.has_scores.tolist() == [False, True, False, True]
    assert not batch.teacher_scores[[0, 2]].any() and batch.teacher_scores[[1, 3]].all()
    assert prepared(plain).recipe(None).distill_weight == 0.0


def test_pairs_alone_have_the_negatives_of_their_batch(write_rows, prepared):
    rows = [{"query": f"q{i}", "pos": [f"p{i}"], "neg": []} for i in range(5)]
    rows.append(rows[0] | {"query": "scored", "neg": ["n"], "teacher_scores": [1, 0]})
    data = prepared(write_rows("t.json", rows), train_group_size=1)
    assert data.sizes == [6] and data.recipe(None) == LossConfig(distill_weight=0.0)
    batch = data.assemble(plan_rows([0, 3, 5]))
    assert len(batch.key_hash) == 3 and batch.teacher_scores.shape == (3, 1)


PLAIN = {"query": "q", "pos": ["p"], "neg": ["n"]}
HISTORY = {"query": "q", "history": ["a", "b"]}
SCORED = HISTORY | {"teacher_scores": [1.0, 0.0]}


@pytest.mark.parametrize(
    ("rows", "settings", "loss", "message"),
    [
        ([], {}, {}, "t.json: there are no rows in this file: leave it out"),
        (
            [PLAIN, SCORED],
            {},
            {},
            "t.json:2: the row has no positive and select_positive is first: "
            "give --select_positive teacher, which needs teacher_scores",
        ),
        ([SCORED], {"select_positive": "random"}, {}, "t.json:1: the row has no positive"),
        ([SCORED], {"select_positive": "teacher-pos"}, {}, "t.json:1: the row has no positive"),
        (
            [HISTORY],
            {"select_positive": "teacher"},
            {},
            "t.json:1: the row has no positive and select_positive is teacher: score the row",
        ),
        (
            [PLAIN],
            {},
            {"stable_distill": True},
            "t.json: no row has teacher_scores and stable_distill leaves nothing",
        ),
        (
            [PLAIN],
            {},
            {"contrastive_weight": 0},
            "t.json: no row has teacher_scores and contrastive_weight 0 leaves nothing",
        ),
        (
            [PLAIN | {"neg": []}, PLAIN | {"teacher_scores": [0, 1]}],
            {"teacher_scores_min": 2},
            {},
            "t.json: none of the 2 rows is left, dropped are 1 by teacher_scores_min, "
            "1 by no negatives",
        ),
        (
            [PLAIN | {"task": "qa"}, PLAIN | {"task": "cooking"}],
            {"version": "llm-embedder"},
            {},
            "t.json:2: task 'cooking' is unknown, --version llm-embedder knows qa, convsearch, "
            "chat, lrlm, icl, tool",
        ),
        ([PLAIN], {"version": "instructor"}, {}, "t.json:1: task is missing, --version instructor"),
        (
            [SCORED | PLAIN | {"history": None}],
            {"train_group_size": 1},
            {"contrastive_weight": 0.0},
            "t.json: --train_group_size 1 takes no key to compare with and contrastive_weight 0 "
            "leaves nothing else to train on: give --train_group_size 2 or more",
        ),
        (
            [PLAIN],
            {"use_train_config": True},
            {},
            "--version bge has no training recipes, give --version llm-embedder",
        ),
        (
            [PLAIN | {"task": "x"}],
            {"use_train_config": True, "version": "llm-embedder", "add_instruction": False},
            {},
            "t.json:1: task 'x' is unknown",
        ),
        (
            [PLAIN | {"task": "qa"}, PLAIN | {"task": "tool"}],
            {"use_train_config": True, "version": "llm-embedder"},
            {},
            "t.json: rows are of the tasks qa, tool, --use_train_config has one recipe a file",
        ),
    ],
)
def test_errors_before_training(write_rows, prepared, rows, settings, loss, message):
    with pytest.raises(InputError) as error:
        prepared(write_rows("t.json", rows), LossConfig(**loss), **settings)
    assert message in str(error.value)


def test_no_data_and_missing_files(write_rows, prepared, tmp_path):
    with pytest.raises(InputError, match="there is no file"):
        prepared([write_rows("t.json", make_rows(3)), "missing.json"])
    assert not (tmp_path / "cache").exists()  # nothing was done before
