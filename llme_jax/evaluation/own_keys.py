"""Keys that a row brings itself: turns of a conversation, chunks of a document."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llme_jax.config.evaluation import EvaluateConfig
from llme_jax.config.identity import identity, name_of
from llme_jax.data.instructions import find_eval_instruction, with_model_texts
from llme_jax.data.tokens import tokenize
from llme_jax.devices.sharding import make_mesh
from llme_jax.evaluation.task import rng_of
from llme_jax.files.atomic import digest
from llme_jax.hugging_face.tokenizer import fingerprint
from llme_jax.models.dual_encoder import load_dual_encoder
from llme_jax.models.space import encoder_texts
from llme_jax.retrieval.encode import encode

KINDS = {"query": "queries", "key": "keys"}
Texts = Sequence[Sequence[str]]  # those of each row


def nearest(
    config: EvaluateConfig,
    cache: Path,
    task: str,
    path: Path,
    queries: Texts,
    keys: Texts,
    most: int,
) -> list[list[np.ndarray]]:
    """For each query of each row, the places of the nearest of the row's keys, the best first.

    Args:
        cache: where tokens are kept.
        task: whose instructions are put before the texts.
        path: of the rows, for messages.
        most: fewer where a row has fewer keys.
    """
    data = config.data
    encoder, params, tokenizer = load_dual_encoder(config.encoder, new_dense=False)
    own = encoder_texts(config.encoder, tokenizer, encoder.max_length)
    data = with_model_texts(data, config.encoder.query_encoder, own)
    encoder.check_lengths(data.query_max_length, data.key_max_length)
    instruction = find_eval_instruction(data, path, task)
    if not any(keys) or not any(queries):
        return [[np.zeros(0, np.int64) for _ in row] for row in queries]
    mesh, vectors = make_mesh(), []
    for field, of_rows in (("query", queries), ("key", keys)):
        before = getattr(instruction, field)
        texts = [(before, text) for row in of_rows for text in row]
        facts = {"content": digest(texts), "tokenizer": fingerprint(tokenizer)}
        length, side = getattr(data, f"{field}_max_length"), data.truncation_side
        store = tokenize(
            texts,
            tokenizer,
            max_length=length,
            truncation_side=side,
            name=name_of(identity(data, KINDS[field], "texts", **facts)),
            cache=cache,
            total=len(texts),
            desc=f"Tokenising {path.name}",
        )
        how = {"batch_size": config.evaluation.batch_size, "pad_id": tokenizer.pad_token_id or 0}
        found = encode(encoder, params, store, field=field, mesh=mesh, **how)
        vectors.append(np.split(found, np.cumsum([len(row) for row in of_rows])[:-1]))
    return [
        [_order(q, of_keys, encoder.metric)[:most] for q in of_queries]
        for of_queries, of_keys in zip(*vectors, strict=True)
    ]


def drawn(
    seed: int, queries: Sequence[int], keys: Sequence[int], most: int
) -> list[list[np.ndarray]]:
    """The same by chance: a function of seed and row.

    Args:
        queries, keys: how many each row has.
    """
    rngs = (rng_of(seed, row) for row in range(len(keys)))
    return [
        [rng.permutation(count)[:most] for _ in range(asked)]
        for rng, asked, count in zip(rngs, queries, keys, strict=True)
    ]


def _order(query: np.ndarray, keys: np.ndarray, metric: str) -> np.ndarray:
    """Places of the keys, the nearest first; of equal ones the first."""
    scores = -((keys - query) ** 2).sum(1) if metric == "l2" else keys @ query
    return np.argsort(-scores, kind="stable")
