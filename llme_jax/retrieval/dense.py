"""Dense retrieval: queries and passages as vectors, the nearest passages by exact search."""

from collections.abc import Iterable

import numpy as np
from jax.sharding import Mesh

from llme_jax.config import TextConfig
from llme_jax.data.arrays import digest
from llme_jax.data.corpus import Corpus, EvalData
from llme_jax.data.instructions import NO_INSTRUCTION, Instruction, find_instruction
from llme_jax.data.tokens import TokenStore, cache_dir, fingerprint, tokenize
from llme_jax.errors import InputError
from llme_jax.models.dual_encoder import DualEncoder
from llme_jax.retrieval.encode import encode
from llme_jax.retrieval.index import search


class DenseRetriever:
    """Retrieves with an encoder as often as wanted; texts are tokenised once, when it is built.

    Args:
        encoder: the static part of the encoder; its parameters come with every call.
        mesh: with axes (data, fsdp); the first device alone when None.

    Raises:
        InputError: --version has no instruction for the queries' task.
    """

    def __init__(
        self,
        config: TextConfig,
        encoder: DualEncoder,
        tokenizer,
        corpus: Corpus,
        eval_data: EvalData,
        mesh: Mesh | None = None,
    ):
        self._config, self._encoder, self._mesh = config, encoder, mesh
        self._pad_id = tokenizer.pad_token_id
        instruction = self._instruction(eval_data)
        self._queries = self._tokens(
            tokenizer, "query", eval_data, eval_data.texts, instruction.query
        )
        self._keys = self._tokens(tokenizer, "key", corpus, corpus, instruction.key)

    def __call__(self, params, *, hits: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and ids of every query's hits, as `index.search` returns them."""
        queries, keys = (
            encode(
                self._encoder,
                params,
                store,
                field=field,
                batch_size=batch_size,
                pad_id=self._pad_id,
                mesh=self._mesh,
            )
            for field, store in (("query", self._queries), ("key", self._keys))
        )
        metric = self._encoder.metric
        return search(queries, keys, hits, metric, batch_size=batch_size, mesh=self._mesh)

    def _instruction(self, eval_data: EvalData) -> Instruction:
        if not self._config.add_instruction:
            return NO_INSTRUCTION
        try:
            return find_instruction(self._config.version, eval_data.task)
        except InputError as error:
            raise InputError(f"{eval_data.path}: {error}") from None

    def _tokens(
        self, tokenizer, field: str, source: Corpus | EvalData, texts: Iterable[str], prefix: str
    ) -> TokenStore:
        length = getattr(self._config, f"{field}_max_length")
        template = self._config.key_template if field == "key" else None
        side = self._config.truncation_side
        return tokenize(
            (prefix + text for text in texts),
            tokenizer,
            max_length=length,
            truncation_side=side,
            key=digest(
                field, source.digest, template, prefix, fingerprint(tokenizer), length, side
            ),
            cache=cache_dir(self._config.dataset_cache_dir),
            total=len(source),
            desc=f"Tokenising {source.path.name}",
        )
