"""A teacher's vectors: what sentence-transformers makes of the rows, computed once, learnt."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from commands import finish, patient, start_together
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from small_run import arguments

from llme_jax import train
from llme_jax.config import cli
from llme_jax.data.instructions import find_instruction
from llme_jax.data.rows import BadRows
from llme_jax.data.train_data import prepare
from llme_jax.devices.sharding import make_mesh
from llme_jax.errors import InputError
from llme_jax.retrieval import embeddings
from llme_jax.sources.resolve import Files
from llme_jax.training import dual, teacher
from llme_jax.training.metrics_log import read_metrics

ROWS, KEYS, WIDTH = 16, 3, 32
PROMPTS = {"query": "w5 w6 ", "document": "w7 "}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Keys that rows of two tasks share, a row with a prompt of its own, and one that is skipped.

    The teacher has other tokens, pooling and prompts than the student, and reads shorter texts.
    """
    folder = tmp_path_factory.mktemp("data")
    tiny.save_bert(folder / "bert", layers=1)
    tiny.save_bert(folder / "wide", width=64, layers=1)
    bert = tiny.save_bert(folder / "teacher-bert", seed=1, positions=16, layers=1)
    tiny.save_word_tokenizer(bert, tiny.WORDS[::-1])
    save(folder / "teacher", bert, "mean", 16, prompts=PROMPTS)
    rng = np.random.default_rng(0)
    texts = [tiny.text(rng, 1, 18) for _ in range(12)]
    rows = []
    for i in range(ROWS):
        pos, *neg = rng.choice(texts, KEYS, replace=False)
        task = "tool" if i % 2 else "qa"
        rows.append({"query": tiny.text(rng, 1, 18), "pos": [pos], "neg": neg, "task": task})
    rows[3]["prompt"] = "w9 "
    (folder / "rows.json").write_text(json.dumps(rows))
    no_task = {"query": "w1", "pos": ["w2"], "neg": ["w3"]}
    tiny.write_lines(folder / "train.json", [*rows[:5], no_task, *rows[5:]])
    return folder


def save(folder, bert, pooling: str, length: int, **more) -> SentenceTransformer:
    parts = Transformer(str(bert), max_seq_length=length), Pooling(WIDTH, pooling_mode=pooling)
    model = SentenceTransformer(modules=[*parts, Normalize()], device="cpu", **more)
    model.save(str(folder))
    return model


def command(data, out, *more: str) -> list[str]:
    words = (
        f"--teacher_encoder {data}/teacher --embedding_weight 32 --contrastive_weight 0 "
        f"--version llm-embedder --max_bad_rows 1 --train_group_size {KEYS} "
        "--per_device_train_batch_size 2 --save_steps 100 --query_max_length 32"
    )
    return arguments(data, out, *words.split(), *more)


def vectors(data, model: SentenceTransformer) -> np.ndarray:
    """Of all rows [ROWS, 1 + KEYS, WIDTH], by sentence-transformers."""
    found = []
    for row in json.loads((data / "rows.json").read_text()):
        of_task = find_instruction("llm-embedder", row["task"])
        query, key = PROMPTS.values() if model.prompts["query"] else of_task
        texts = [row.get("prompt", query) + row["query"]]
        found.append(model.encode([*texts, *(key + k for k in row["pos"] + row["neg"])]))
    return np.array(found)


def test_the_student_comes_near(data, tmp_path):
    out = tmp_path / "out"
    assert train.main(command(data, out)) == 0
    losses = [line["loss"] for line in read_metrics(out / "metrics.jsonl")]
    student = vectors(data, save(tmp_path / "student", data / "bert", "cls", 32))
    wanted = vectors(data, SentenceTransformer(str(data / "teacher"), device="cpu"))
    # A batch is all rows: the first loss is that of sentence-transformers' vectors, in fp32.
    assert losses[0] == pytest.approx(WIDTH * np.mean((student - wanted) ** 2), rel=1e-5)
    assert losses[-1] < 0.8 * losses[0]
    card = (out / "checkpoint-8/encoder/README.md").read_text()
    assert "teacher_encoder teacher, embedding_weight 32.0" in card


def test_killed_it_continues_and_later_runs_encode_nothing(data, tmp_path, monkeypatch):
    config = cli.parse(command(data, tmp_path / "out"), "train", "")
    config.data.dataset_cache_dir = str(tmp_path / "cache")
    monkeypatch.setattr(embeddings, "SHARD", 7)
    encode, sizes = teacher.encode, []

    def watched(encoder, params, store, **how):
        if len(sizes) == 2 and kill:
            raise KeyboardInterrupt
        sizes.append(len(store))
        return encode(encoder, params, store, **how)

    def teach():
        files = Files(config.flat())
        task, *_ = dual.open_dual(config, files)
        read = files.training, files.cache, task.config.data, config.loss, task.tokenizer
        width = task.teacher.width
        found = prepare(*read, seed=0, bad_rows=BadRows(1), teacher_width=width)
        task.teacher.teach(found, make_mesh())
        (store,) = found.stores.values()
        return store.teacher

    monkeypatch.setattr(teacher, "encode", watched)
    kill = True
    with pytest.raises(KeyboardInterrupt):
        teach()
    kill = False
    first = teach()
    assert sizes == [7, 7, 3, 7, 7]  # 17 queries and 14 keys, as the teacher reads them
    again = teach()
    assert len(sizes) == 5
    for one, other in zip(first[1:], again[1:], strict=True):
        np.testing.assert_array_equal(one[:], other[:])


@pytest.mark.slow
def test_a_plan_needs_no_vectors(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(teacher, "encode", None)
    assert train.main(command(data, tmp_path / "out", "--plan", "--device_memory", "1")) == 0
    assert "it fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--teacher_encoder {data}/wide", "has vectors of 64 numbers, the encoder that is trained "
         "has 32: give a teacher of 32, or --matryoshka_dims, which compares the first numbers of"),
        ("--query_encoder {data}/wide --matryoshka_dims 8 48",
         "/teacher: has vectors of 32 numbers, --matryoshka_dims asks for 48: give 32 or less"),
        ("--teacher_encoder ./nowhere", "./nowhere: no such folder"),
        ("--embedding_weight 0", "/teacher, --embedding_weight 0.0: give both, the weight above 0"),
    ],
)  # fmt: skip
def test_what_cannot_teach_is_refused(data, tmp_path, more, message):
    with pytest.raises(InputError) as error:
        train.main(command(data, tmp_path / "out", *more.format(data=data).split()))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_all_numbers_are_learnt_whatever_its_folder_keeps(data, tmp_path):
    cut = shutil.copytree(data / "teacher", tmp_path / "cut")
    tiny.rewrite(cut / "config_sentence_transformers.json", truncate_dim=8)
    facts = []
    for more in (["--teacher_encoder", str(cut)], []):
        config = cli.parse(command(data, tmp_path / "out", *more), "train", "")
        facts.append(dual.open_dual(config, Files(config.flat())).task.teacher.facts)
    assert facts[0] == facts[1]


def test_vectors_that_cannot_come_near_are_named(caplog):
    raw, unit = (SimpleNamespace(width=8, metric=m, normalizes=m == "cos") for m in ("ip", "cos"))
    teacher._check_vectors("t", raw, unit, None)
    assert "have length 1 (cos) and cannot come near; give --dense_metric ip" in caplog.text


@pytest.mark.slow
@patient
def test_two_processes(data, tmp_path):
    argv = command(data, tmp_path / "out", "--max_steps", "2")
    assert train.main(command(data, tmp_path / "one", "--max_steps", "2")) == 0
    for process in start_together(argv, processes=2, devices=4):
        finish(process)
    ours, want = (
        [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("out", "one")
    )
    np.testing.assert_allclose(ours, want, rtol=1e-5)
