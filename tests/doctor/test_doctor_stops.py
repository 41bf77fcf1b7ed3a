"""Where training would stop, the data doctor says so, in the same words."""

import pytest

from llme_jax.config import EvalConfig
from llme_jax.data.corpus import EvalData
from llme_jax.errors import InputError

GOOD = {"query": "a b", "pos": ["p"], "neg": ["n", "o"]}


@pytest.mark.parametrize(
    ("rows", "flags", "sentence"),
    [
        ([], "", "there are no rows in this file"),
        ([GOOD | {"neg": []}], "", "none of the 1 rows is left, dropped are 1 by no negatives"),
        ([GOOD | {"pos": []}], "", ":1: the row has no positive and select_positive is first"),
        ([GOOD], "--stable_distill", "no row has teacher_scores and stable_distill leaves nothing"),
        ([GOOD], "--version llm-embedder --add_instruction false --use_train_config",
         ":1: task is missing, --version llm-embedder knows"),
    ],
)  # fmt: skip
def test_what_training_would_stop_at(found, write_rows, rows, flags, sentence):
    path = write_rows("train.json", rows)
    code, report = found(path, *flags.split())
    assert code == 1
    (stop,) = report["stops_training"]
    assert stop.startswith(path) and sentence in stop


def test_files_that_cannot_share_a_batch(found, prepared, write_rows):
    scored = GOOD | {"teacher_scores": [2, 1, 0]}
    files = [write_rows(f"{t}.json", [scored | {"task": t}]) for t in ("tool", "qa", "convsearch")]
    flags = {"version": "llm-embedder", "use_train_config": True}
    words = "--version llm-embedder --use_train_config".split()
    with pytest.raises(InputError, match="different losses") as error:
        prepared(files, **flags)
    code, report = found(*files, *words)
    assert (code, report["stops_training"]) == (1, [str(error.value)])
    assert found(*files, *words, "--inbatch_same_dataset", "epoch")[0] == 0
    for same in ([files[0], files[2]], [files[1]] * 2):  # the losses of tool and convsearch are one
        assert prepared(same, **flags) and found(*same, *words)[0] == 0


@pytest.mark.parametrize(
    ("rows", "flags"),
    [
        ([{"query": "q"}], ""),
        ([{"query": "q", "pos_index": [4]}], ""),
        ([{"query": "q", "pos_index": [-1]}], "--metrics nq recall"),
        ([{"query": "q", "pos_index": 1}], ""),
        ([{"query": 3, "pos_index": [1]}], ""),
        ([{"query": "q", "pos_index": [1]}], "--metrics nq"),
        ([{"query": "q", "pos_index": [1], "query_id": 7}] * 2, ""),
        ([{"query": "q", "pos_index": [1], "query_id": 1.5}], ""),
        ([{"query": "q", "pos_index": [1], "task": t} for t in ("qa", "tool")], ""),
    ],
)
def test_what_an_evaluation_would_stop_at(found, write_rows, rows, flags):
    train, test = write_rows("train.json", [GOOD]), write_rows("test.json", rows)
    corpus = write_rows("corpus.json", [{"title": "", "text": ""}] * 4)
    metrics = flags.split()[1:] or EvalConfig().metrics
    with pytest.raises(InputError) as error:
        EvalData(test, metrics=metrics, corpus_size=4)
    code, report = found(train, "--eval_data", test, "--corpus", corpus, *flags.split())
    (stop,) = report["stops_training"]
    where, said = str(error.value).removeprefix(f"{test}:").split(": ", 1)
    assert code == 1 and stop.endswith(f"1 line is invalid: correct them\n  line {where}: {said}")


def test_what_only_other_metrics_need_may_be_missing(found, write_rows):
    train = write_rows("train.json", [GOOD])
    corpus = write_rows("corpus.json", [{"title": "", "text": ""}] * 4)
    odd = {"query": "q", "answers": ["a"], "pos_index": [9, [], 1]}
    for row, metrics in ((odd, "nq"), ({"query": "q", "pos_index": [1]}, "mrr")):
        test = write_rows("test.json", [row])
        flags = ["--eval_data", test, "--corpus", corpus, "--metrics", metrics]
        code, report = found(train, *flags)
        assert code == 0 and report["files"][0]["eval"]["queries_with_positives"] == 1


def test_an_evaluation_without_an_instruction(found, write_rows):
    train = write_rows("train.json", [GOOD | {"task": "qa"}])
    test = write_rows("test.json", [{"query": "q", "pos_index": [1]}])
    flags = [train, "--eval_data", test, "--version", "llm-embedder"]
    code, report = found(*flags)
    (stop,) = report["stops_training"]
    assert code == 1 and stop.startswith(f"{test}: task is missing, --version llm-embedder knows")
    assert found(*flags, "--add_instruction", "false")[0] == 0
