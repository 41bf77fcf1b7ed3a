"""The Python API: the numbers of the commands and of others, devices, few programs, bad input."""

import os
import re
import subprocess
import sys
from contextlib import contextmanager

import jax
import numpy as np
import pytest
import tiny
import torch
import transformers
from commands import ROOT, finish, flags, start
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tiny import read_lines, write_lines

import llme_jax
from llme_jax import Encoder, Reranker, Scorer, rank, retrieve, score, search
from llme_jax.errors import InputError

SHORT = {"query_max_length": 24, "key_max_length": 32}
PAIR = {"query_max_length": 24, "key_max_length": 24}
PROMPTS = {"query": "w1 w2 ", "document": "w3 "}
# fp32 sums of other shapes, of vectors of length 1 and of scores around 1.
SAME = {"rtol": 0, "atol": 2e-6}


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    return [tiny.text(rng, 1, 20) for _ in range(150)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """An encoder that has prompts, a cross-encoder, a language model."""
    folder = tmp_path_factory.mktemp("models")
    bert = Transformer(str(tiny.save_bert(folder / "bert", positions=512)), max_seq_length=32)
    pooling = Pooling(bert.get_embedding_dimension(), "mean")
    parts = [bert, pooling, Normalize()]
    SentenceTransformer(modules=parts, device="cpu", prompts=PROMPTS).save(str(folder / "encoder"))
    tiny.save_bert(folder / "cross", layers=1, seed=1, positions=512)
    torch.manual_seed(0)
    config = transformers.BertConfig.from_pretrained(folder / "cross", num_labels=1)
    model = transformers.BertForSequenceClassification(config)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder / "cross")
    tiny.save_llama(folder / "lm")
    return folder


@pytest.fixture(scope="module")
def encoder(models):
    return Encoder.load(models / "encoder", **SHORT)


@pytest.fixture(scope="module")
def reranker(models):
    return Reranker.load(models / "cross", **PAIR)


@pytest.fixture(scope="module")
def scorer(models):
    return Scorer.load(models / "lm", context_max_length=512)


@contextmanager
def compiled():
    """Yields a list that grows with every program."""
    programs = []

    def listen(event: str, _: float, **about):
        if event.endswith("backend_compile_duration"):
            programs.append(about)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield programs
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ("--version model", {}),
        ("--version llm-embedder", {"version": "llm-embedder"}),
        ("--add_instruction false --truncate_dim 9", {"add_instruction": False, "truncate_dim": 9}),
        ("--dense_metric l2 --pooling_method cls", {"version": "bge", "dense_metric": "l2"}),
    ],
)
def test_vectors_and_hits_are_those_of_the_command(models, texts, tmp_path, words, settings):
    corpus, queries, out = texts[:100], texts[100:], tmp_path / "out"
    write_lines(tmp_path / "corpus.json", [{"text": text} for text in corpus])
    rows = [{"query": text, "pos_index": [0], "task": "qa"} for text in queries]
    files = {"eval_data": write_lines(tmp_path / "test.json", rows), "output_dir": out}
    files |= {"corpus": tmp_path / "corpus.json", "query_encoder": models / "encoder"}
    files |= {"dataset_cache_dir": tmp_path / "cache", "key_template": "{text}", "hits": 15} | SHORT
    retrieve.main([*flags(files), *words.split(), "--save_encode", "--log_path", f"{out}/log"])
    (shard,) = out.glob("embeddings/*/0*.npy")

    if "dense_metric" in settings:
        settings["pooling_method"] = ["cls"]
    ours = Encoder.load(models / "encoder", **SHORT, **settings)
    task = "qa" if settings.get("version") == "llm-embedder" else None
    keys = ours.encode(corpus, kind="key", task=task)
    assert (keys.dtype, keys.shape) == (np.float32, (100, ours.width))
    np.testing.assert_allclose(keys, want := np.load(shard), rtol=0, atol=2e-6 * np.abs(want).max())
    vectors = ours.encode(queries, kind="query", task=task)
    scores, indices = search(vectors, keys, 15, ours.metric)
    results = read_lines(out / "test.result.json")
    largest = np.abs(scores).max()
    np.testing.assert_allclose(scores, [r["score"] for r in results], rtol=0, atol=4e-6 * largest)
    assert np.mean(indices == [r["pred"] for r in results]) > 0.99  # others nearly tie


def test_vectors_are_those_of_sentence_transformers(models, encoder, texts):
    theirs = SentenceTransformer(str(models / "encoder"), device="cpu")
    for kind, want in (
        ("query", theirs.encode_query(texts)),
        ("key", theirs.encode_document(texts)),
    ):
        limit = {"max_length": 32}  # the folder's own, for both
        assert (encoder.encode(texts, kind=kind, **limit) * want).sum(1).min() >= 0.99999
    bare = Encoder.load(models / "encoder", add_instruction=False)
    found = bare.encode(texts, kind="query", max_length=32)
    assert (found * theirs.encode(texts, prompt="")).sum(1).min() >= 0.99999
    own = Encoder.load(models / "encoder", query_instruction="w9 ")
    found = own.encode(texts, kind="query", max_length=32)
    assert (found * theirs.encode(texts, prompt="w9 ")).sum(1).min() >= 0.99999


def test_two_encoders_of_one_space(models, texts):
    given = {"key_encoder": str(models / "bert"), "tie_encoders": False, "pooling_method": ["mean"]}
    pair = Encoder.load(models / "encoder", **given, **SHORT)
    alone = [
        Encoder.load(models / name, pooling_method=["mean"], add_instruction=False, **SHORT)
        for name in ("encoder", "bert")
    ]
    for kind, one in zip(("query", "key"), alone, strict=True):
        found = pair.encode(texts[:9], kind=kind)
        np.testing.assert_allclose(found, one.encode(texts[:9], kind=kind), **SAME)


def test_scores_are_those_of_cross_encoder_and_of_the_command(models, reranker, texts, tmp_path):
    pairs = [*zip(texts[:60], texts[60:120], strict=True)]
    found = reranker.score(pairs)
    assert (found.dtype, found.shape) == (np.float32, (60,))
    theirs = CrossEncoder(
        str(models / "cross"), max_length=48, device="cpu", activation_fn=torch.nn.Identity()
    )
    np.testing.assert_allclose(found, theirs.predict(pairs), rtol=0, atol=1e-5)
    rows = [{"query": query, "key": [key]} for query, key in pairs]
    files = {"eval_data": write_lines(tmp_path / "test.json", rows), "output_dir": tmp_path}
    files |= {"ranker": models / "cross", "dataset_cache_dir": tmp_path / "cache"} | PAIR
    rank.main([*flags(files), "--metrics", "collate_score"])
    scored = [row["teacher_scores"][0] for row in read_lines(tmp_path / "test.scored.json")]
    np.testing.assert_allclose(found, scored, rtol=0, atol=1e-5)


def test_a_language_model_reranks(models, texts, tmp_path):
    settings = {"query_max_length": 100, "key_max_length": 100, "ranker_method": "yes-no"}
    found = Reranker.load(models / "lm", **settings)
    found = found.score([*zip(texts[:9], texts[9:18], strict=True)])
    rows = [{"query": q, "key": [key]} for q, key in zip(texts[:9], texts[9:18], strict=True)]
    files = {"eval_data": write_lines(tmp_path / "test.json", rows), "output_dir": tmp_path}
    files |= {"ranker": models / "lm", "dataset_cache_dir": tmp_path / "cache"} | settings
    rank.main([*flags(files), "--metrics", "collate_score"])
    scored = [row["teacher_scores"][0] for row in read_lines(tmp_path / "test.scored.json")]
    np.testing.assert_allclose(found, scored, rtol=0, atol=1e-5)


def test_log_probabilities_are_those_of_transformers_and_of_the_command(
    models, scorer, texts, tmp_path
):
    pairs = [(f" {texts[i]} ", texts[20 + i]) for i in range(20)]
    found = scorer.score(pairs)
    assert (found.dtype, found.shape) == (np.float32, (20,))
    model = transformers.LlamaForCausalLM.from_pretrained(models / "lm", dtype=torch.float32)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(models / "lm")
    for (before, answer), mean in zip(pairs, found, strict=True):
        ids = tokenizer(before + answer, return_offsets_mapping=True)
        first = next(i for i, (_, end) in enumerate(ids["offset_mapping"]) if end > len(before))
        with torch.no_grad():
            logs = model(torch.tensor([ids["input_ids"]])).logits[0].log_softmax(-1)
        want = [logs[i - 1, ids["input_ids"][i]].item() for i in range(first, len(logs))]
        assert mean == pytest.approx(np.mean(want), abs=2e-5)

    rows = [
        {"task": "qa", "query": query, "answers": [answer], "pos": [key], "neg": []}
        for key, query, answer in zip(texts[:9], texts[9:18], texts[18:27], strict=True)
    ]
    path = write_lines(tmp_path / "train.json", rows)
    words = {"eval_data": path, "model_name_or_path": models / "lm", "save_name": "s"}
    score.main([*flags(words), "--context_max_length", "512"])
    scored = [row["teacher_scores"][0] for row in read_lines(tmp_path / "train.scored.s.json")]
    triples = [(row["pos"][0], row["query"], row["answers"][0]) for row in rows]
    np.testing.assert_allclose(scorer.score(triples, task="qa"), scored, rtol=0, atol=1e-5)


# What a program does with the models in a folder; its numbers go into out.npz.
PROGRAM = """
import sys
import numpy as np
from llme_jax import Encoder, Reranker, Scorer, search
folder, *texts = sys.argv[1:]
encoder = Encoder.load(f"{folder}/encoder", query_max_length=24, key_max_length=32)
keys = encoder.encode(texts[:100], kind="key")
queries = encoder.encode(texts[100:], kind="query")
pairs = list(zip(texts[:20], texts[20:40]))
np.savez(
    "out.npz",
    keys=keys,
    found=search(queries, keys, 5)[0],
    pairs=Reranker.load(f"{folder}/cross", query_max_length=24, key_max_length=24).score(pairs),
    answers=Scorer.load(f"{folder}/lm", context_max_length=512).score(pairs),
)
assert "torch" not in sys.modules
"""


def test_devices_and_batches_change_nothing(models, encoder, reranker, scorer, texts, tmp_path):
    argv = [str(models), *texts]
    finish(start(argv, devices=1, code=PROGRAM, cwd=tmp_path, PYTHONPATH=str(ROOT)))
    alone = np.load(tmp_path / "out.npz")
    keys = encoder.encode(texts[:100], kind="key")
    found, _ = search(encoder.encode(texts[100:], kind="query"), keys, 5)
    pairs = [*zip(texts[:20], texts[20:40], strict=True)]
    np.testing.assert_allclose(keys, alone["keys"], **SAME)
    np.testing.assert_allclose(found, alone["found"], **SAME)
    np.testing.assert_allclose(reranker.score(pairs), alone["pairs"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(scorer.score(pairs), alone["answers"], rtol=0, atol=1e-5)
    for size in (1, 7, 64):
        again = encoder.encode(texts[:100], kind="key", batch_size=size)
        np.testing.assert_allclose(again, keys, **SAME)
        again, _ = search(keys[:30], keys, 5, batch_size=size)
        np.testing.assert_allclose(again, search(keys[:30], keys, 5)[0], **SAME)
        small = Reranker.load(models / "cross", batch_size=size, **PAIR)
        np.testing.assert_allclose(small.score(pairs), alone["pairs"], rtol=0, atol=1e-5)
        small = Scorer.load(models / "lm", context_max_length=512, lm_batch_size=str(size))
        np.testing.assert_allclose(small.score(pairs), alone["answers"], rtol=0, atol=1e-5)


def test_further_calls_compile_nothing(encoder, reranker, scorer, texts):
    def work(count: int, least: int, most: int):
        some = [" ".join(rng.choice(words, rng.integers(least, most + 1))) for _ in range(count)]
        search(encoder.encode(some, kind="query"), keys)
        reranker.score([*zip(some, some[::-1], strict=True)])
        scorer.score([(text, "w1 w2") for text in some])

    rng, words = np.random.default_rng(1), tiny.WORDS[100:]  # of one length
    keys = encoder.encode(texts, kind="key")
    for count in (2, 4, 8, 16):
        work(count, 14, 14)
        work(count, 1, 1)
    with compiled() as programs:
        for count in (2, 3, 5, 7, 11, 16):
            work(count, 13, 14)
            work(count, 1, 2)
    assert not programs
    with compiled() as programs:
        search(encoder.encode(texts[:3], kind="query"), keys[:50])
    assert programs  # the counter counts


@pytest.mark.parametrize("metric", ["cos", "ip", "l2"])
def test_search_is_exact_for_any_vectors(metric):
    rng = np.random.default_rng(0)
    queries, keys = rng.normal(size=(5, 8)) * 3, rng.normal(size=(40, 8)).astype(np.float32)
    keys[3] = 0
    scores, indices = search(queries, keys, 4, metric)
    want = queries @ keys.T
    if metric == "cos":
        lengths = np.linalg.norm(keys, axis=1)
        want = want / np.linalg.norm(queries, axis=1)[:, None] / np.where(lengths, lengths, 1)
    if metric == "l2":
        want = -((queries[:, None] - keys) ** 2).sum(2)
    order = np.argsort(-want, axis=1)[:, :4]
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_allclose(scores, np.take_along_axis(want, order, 1), rtol=1e-5, atol=1e-5)
    assert keys[0, 0] == np.random.default_rng(0).normal(size=(45, 8)).astype("f4")[5, 0]
    scores, indices = search(queries, keys[:2], 4, metric)
    assert (indices[:, 2:] == -1).all() and (scores[:, 2:] == -np.inf).all()


def test_nothing_gives_nothing(encoder, reranker, scorer):
    none = encoder.encode([], kind="key")
    assert (none.dtype, none.shape) == (np.float32, (0, 32))
    for scores in (reranker.score([]), scorer.score([]), scorer.score([], task="qa")):
        assert (scores.dtype, scores.shape) == (np.float32, (0,))
    for queries in ([], none):
        scores, indices = search(queries, np.eye(3), 2)
        assert (scores.shape, scores.dtype, indices.dtype) == ((0, 2), np.float32, np.int32)
    assert search(np.eye(3), none, 2)[1].tolist() == [[-1, -1]] * 3


def test_bars_are_shown_on_request(encoder, reranker, scorer, capsys):
    def work(**how):
        vectors = encoder.encode(["w1"], kind="key", **how)
        search(vectors, vectors, **how)
        reranker.score([("w1", "w2")], **how)
        scorer.score([("w1", "w2")], **how)
        return "".join(capsys.readouterr())

    assert work() == ""
    shown = work(progress=True)
    for name in ("Encoding keys", "Searching", "Reranking", "Scoring"):
        assert name in shown


# Of an encoder, a reranker and a language model's scorer.
BAD = {
    "texts is 'w1': give a list of strings": lambda e, r, s: e.encode("w1", kind="key"),
    "texts is 5: give a list of strings": lambda e, r, s: e.encode(5, kind="key"),
    "texts[1] is None: give a string": lambda e, r, s: e.encode(["w1", None], kind="key"),
    "texts is array(3): give a list": lambda e, r, s: e.encode(np.array(3), kind="key"),
    "kind is ['key']: choose from query": lambda e, r, s: e.encode([], kind=["key"]),
    "task is ['qa']: give a string": lambda e, r, s: e.encode(["w1"], kind="key", task=["qa"]),
    "metric is array(['cos']": lambda *_: search(np.eye(2), np.eye(2), metric=np.array(["cos"])),
    "queries is array([[1.+0.j": lambda *_: search(np.eye(2) + 0j, np.eye(2)),
    "keys is masked_array(": lambda *_: search(np.eye(2), np.ma.masked_equal(np.eye(2), 1)),
    "texts[0] has half a surrogate": lambda e, r, s: e.encode(["\ud800"], kind="key"),
    "kind is 'passage': choose from query, key": lambda e, r, s: e.encode([], kind="passage"),
    "task 'qa': all texts get": lambda e, r, s: e.encode(["w1"], kind="key", task="qa"),
    "--batch_size 0: give 1 or": lambda e, r, s: e.encode(["w1"], kind="key", batch_size=0),
    "--key_max_length 513: the encoder": lambda e, r, s: e.encode([], kind="key", max_length=513),
    "--query_max_length 2.5: give a": lambda e, r, s: e.encode([], kind="query", max_length=2.5),
    "2 tokens leaves no room": lambda e, r, s: e.encode(["w1"], kind="key", max_length=2),
    "pairs[1] is 'w1': give a list of (query, key)": lambda e, r, s: r.score([("a", "b"), "w1"]),
    "pairs[0] is ['w1']: give (query, key)": lambda e, r, s: r.score([("w1",)]),
    "pairs[0][1] is 3: give a string": lambda e, r, s: r.score([("w1", 3)]),
    "pairs[0]: its answer is ' '": lambda e, r, s: s.score([("w1", " ")]),
    "pairs[1]: the answer has 1200 tokens": lambda e, r, s: s.score(
        [("a", "b"), ("a", "w1" * 600)]
    ),
    "pairs[0] is ['a', 'b']: give (key, query": lambda e, r, s: s.score([("a", "b")], task="qa"),
    "task is 'quiz': choose from qa,": lambda e, r, s: s.score([], task="quiz"),
    "--hits 0: give 1 or more": lambda e, r, s: search(np.eye(2), np.eye(2), 0),
    "metric is 'dot': choose from": lambda e, r, s: search(np.eye(2), np.eye(2), metric="dot"),
    "queries is ['w1']: give an array": lambda e, r, s: search(["w1"], np.eye(2)),
    "keys[1] has numbers that are not": lambda e, r, s: search(np.eye(2), [[0, 1], [np.nan, 1]]),
    "queries have 2 numbers each, keys 3": lambda e, r, s: search(np.eye(2), np.eye(3)),
    "load has no pooling: did you mean pooling_method?": lambda *_: Encoder.load(
        "x", pooling="cls"
    ),
    "--dtype fp16: use bf16": lambda *_: Reranker.load("x", dtype="fp16"),
    "--query_encoder 5: give a text": lambda *_: Encoder.load(5),
    "--lm_batch_size 0: give auto": lambda *_: Scorer.load("x", lm_batch_size="0"),
    "./x: no such folder": lambda *_: Encoder.load("./x"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_sentence(encoder, reranker, scorer, message):
    with pytest.raises(InputError) as error:
        BAD[message](encoder, reranker, scorer)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_forked_child_is_told_to_be_spawned(encoder):
    encoder.encode(["w1"], kind="key")
    child = os.fork()
    if not child:
        try:
            encoder.encode(["w1"], kind="key")
        except InputError as error:
            os._exit(7 if "multiprocessing.get_context('spawn')" in str(error) else 1)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_the_package_loads_nothing_before_it_is_asked():
    code = "import sys, llme_jax; sys.exit(str({'jax', 'numpy', 'transformers'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "set()\n"
    assert llme_jax.Encoder is Encoder
    with pytest.raises(AttributeError, match="module 'llme_jax' has no attribute 'Decoder'"):
        _ = llme_jax.Decoder


def test_the_page_runs(models, tmp_path, monkeypatch):
    names = {"out/best/encoder": "encoder", "BAAI/llm-embedder": "bert"}
    names |= {"BAAI/bge-reranker-base": "cross", "HuggingFaceTB/SmolLM2-135M-Instruct": "lm"}
    for name, folder in names.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(models / folder)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/python.md").read_text()
    examples, said = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S), {}
    for example in examples:
        exec(example, said)
    assert len(examples) == 4
    assert said["keys"].shape == (3, 32) and said["indices"].shape == (2, 2)
    assert said["history"].shape == (2, 32) and said["turn"].shape == (1, 32)
    assert sorted(said["best_first"]) == sorted(said["found"][0])
    assert said["capitals"].shape == (2,) and said["teacher_scores"].shape == (3,)
