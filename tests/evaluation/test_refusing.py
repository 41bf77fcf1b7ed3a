"""The evaluate command refuses in one sentence what cannot be."""

import pytest
from tiny import read_lines, write_lines

from llme_jax import evaluate
from llme_jax.errors import InputError


@pytest.mark.parametrize(
    ("task", "settings", "said"),
    [
        ("mmlu", {"chunk_size": 8}, "--chunk_size 8: has no meaning for --task mmlu"),
        ("mmlu", {"retrieval_method": "recent"}, "--retrieval_method recent: --task mmlu has"),
        ("msc", {"retrieval_method": "bm25"}, "--retrieval_method bm25: --task msc has dense"),
        ("qrecc", {"retrieval_method": "no"}, "--retrieval_method no: --task qrecc measures the"),
        ("msc", {"retrieval_method": "oracle", "key_num": 2}, "--key_num 2: --retrieval_method or"),
        ("lrlm", {"chunk_size": 100}, "--context_window_size 2048: give a multiple of --chunk_siz"),
        ("lrlm", {}, "--context_window_size 2048: 4096 tokens are read"),
        ("qa", {"context_max_length": 2048}, "--context_max_length 2048: .* reads 1024 tokens"),
        ("qa", {"context_max_length": 30}, "--context_max_length 30: leaves no room"),
        ("qa", {"context_max_length": 50, "few_shot": 0}, r"qa.json:\d: the question is \d+ "),
        ("icl", {"task_names": "sst2"}, "--task_names sst2: .* has multirc, rte, squad_v1"),
        ("mmlu", {"train_data": "none.json", "few_shot": 1}, "--train_data none.json: there is no"),
    ],
)  # fmt: skip
def test_what_cannot_be(arguments, task, settings, said):
    given = {"retrieval_method": "no"} if task not in ("msc", "lrlm", "qrecc") else {}
    with pytest.raises(InputError, match=said):
        evaluate.main(arguments(task, **(given | settings)))


@pytest.mark.parametrize(
    ("task", "change", "said"),
    [
        ("mmlu", {"choices": ["a"]}, "choices has 1 texts: give 4"),
        ("mmlu", {"key": "x"}, 'key is "x": give a list of strings'),
        ("mmlu", {"answer": 4}, "answer is 4: give 0 to 3"),
        ("popqa", {"possible_answers": "a"}, 'possible_answers is "a": give a list'),
        ("popqa", {"prop_id": None}, "prop_id is missing: give the relation's number"),
        ("qa", {"answers": []}, "answers is \\[\\]: give a list of texts"),
        ("icl", {"options": ["", "b"]}, "options is .*: give a list of texts, none empty"),
        ("icl", {"answers": ["7"]}, 'answers\\[0\\] is "7": give the number'),
        ("icl", {"task_name": "x"}, 'task_name is "x": give one of arc_c'),
        ("msc", {"history": "x"}, 'history is "x": give a list of strings'),
        ("lrlm", {"text": None}, "text is missing: give a string"),
    ],
)
def test_wrong_rows(arguments, files, tmp_path, task, change, said):
    rows = read_lines(files / f"{task}.json")
    rows[1] |= change
    path = write_lines(tmp_path / "wrong.json", rows)
    sizes = {"context_window_size": 64, "target_length": 16} if task == "lrlm" else {}
    with pytest.raises(InputError, match=rf"wrong.json:2: {said}"):
        evaluate.main(arguments(task, eval_data=path, retrieval_method="no", **sizes))
