"""Dense retrieval: queries and passages as vectors, the nearest passages by exact search."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from llme_jax.config import RetrievalConfig, TextConfig
from llme_jax.config.identity import identity, name_of
from llme_jax.data.corpus import Corpus, EvalData
from llme_jax.data.instructions import find_eval_instruction, instruction_of
from llme_jax.data.tokens import Prompted, TokenStore, tokenize
from llme_jax.devices.agree import everywhere
from llme_jax.errors import InputError
from llme_jax.hugging_face.tokenizer import fingerprint
from llme_jax.hugging_face.weights import fingerprint_params
from llme_jax.models.dual_encoder import DualEncoder
from llme_jax.retrieval.embeddings import encode_to_disk, forget, in_use
from llme_jax.retrieval.encode import encode, on_every_device
from llme_jax.retrieval.exact import search
from llme_jax.retrieval.faiss_index import (
    build_index,
    empty_index,
    index_path,
    open_index,
    save_index,
    search_index,
)


class Extent(NamedTuple):
    """What the shapes of a retrieval's programs are chosen by; a larger one's serve as well."""

    queries: int
    keys: int
    query_length: int  # tokens of the longest
    key_length: int


def query_text(config: TextConfig, eval_data: EvalData, i: int) -> Prompted:
    """Query i and its instruction."""
    instruction = instruction_of(config, eval_data.task, eval_data.prompts[i])
    return instruction.query, eval_data.texts[i]


class DenseRetriever:
    """Retrieves with an encoder as often as wanted; texts are tokenised once, when it is built.

    Args:
        encoder: the static part of the encoder; its parameters come with every call.
        cache: where tokens are kept.
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
        cache: Path,
        mesh: Mesh | None = None,
    ):
        self._config, self._encoder, self._mesh, self._cache = config, encoder, mesh, cache
        self._pad_id = tokenizer.pad_token_id or 0
        instruction = find_eval_instruction(config, eval_data.path, eval_data.task)
        queries = (query_text(config, eval_data, i) for i in range(len(eval_data)))
        self._queries, _ = self._tokens(tokenizer, "query", eval_data, queries, instruction.query)
        keys = ((instruction.key, text) for text in corpus)
        self._keys, self._keys_name = self._tokens(tokenizer, "key", corpus, keys, instruction.key)

    @property
    def extent(self) -> Extent:
        stores = self._queries, self._keys
        return Extent(*map(len, stores), *(int(store.lengths.max()) for store in stores))

    def __call__(
        self,
        params,
        *,
        hits: int,
        batch_size: int,
        largest: Extent | None = None,
        known: dict[str, np.ndarray] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and ids of every query's hits, as `index.search` returns them.

        Args:
            largest: of the retrievals that are to share this one's programs; None: there is no
                other.
            known: vectors of the passages of the retrieval before, with the same parameters; those
                of this one afterwards.
        """
        encode, known = self._encoding(params, batch_size, largest), {} if known is None else known
        if self._keys_name not in known:
            known.clear()
            known[self._keys_name] = encode("key", self._keys)
        return self._search(encode, known[self._keys_name], hits, batch_size, largest)

    def from_disk(
        self, params, how: RetrievalConfig, *, hits: int, batch_size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """As a call, but the corpus is encoded into `{output_dir}/{embedding_name}`.

        It is searched from there, exactly or with the faiss index that is asked for. Memory does
        not grow with the corpus (a faiss index does), and a killed run continues at the shard it
        was in.

        Args:
            params: on the host.

        Raises:
            InputError: embeddings or an index are to be loaded and there are none; faiss is
                missing or cannot make the index.
        """
        folder, factory = Path(how.output_dir) / how.embedding_name, how.faiss_index_factory
        dim = self._encoder.truncate_dim
        described = identity(
            None,
            encoder=str(replace(self._encoder, remat=False)),
            truncate_dim=dim,
            params=fingerprint_params(params),
            texts=self._keys_name,
        )
        saved = index_path(folder, name_of(described), factory)
        index = open_index(saved)
        (there,) = everywhere([index is not None])
        if how.load_index and not there:
            raise InputError(
                f"--load_index: {folder} has no {factory} index of this corpus by this encoder; "
                "make it with --save_index"
            )
        if factory != "Flat":  # is it one that faiss can make? Now, not after hours of encoding
            empty_index(dim or self._encoder.width, factory, self._encoder.metric)
        encode = self._encoding(params, batch_size)
        if there:
            return search_index(index, encode("query", self._queries), hits, batch_size)
        with in_use(folder, self._keys, described, must_exist=how.load_encode):
            keys, made = encode_to_disk(
                folder, self._keys, described, partial(encode, "key"), must_exist=how.load_encode
            )
            if factory == "Flat":
                found = self._search(encode, keys, hits, batch_size)
            else:
                index = build_index(keys, factory, self._encoder.metric, how.seed)
                if how.save_index:
                    save_index(index, saved)
                found = search_index(index, encode("query", self._queries), hits, batch_size)
            if made and not how.save_encode:
                forget(made)
            return found

    def _encoding(self, params, batch_size: int, largest: Extent | None = None):
        """`encode(field, store)` with these parameters."""

        def on_mesh(field: str, store: TokenStore) -> np.ndarray:
            return encode(
                self._encoder,
                params,
                store,
                field=field,
                batch_size=batch_size,
                pad_id=self._pad_id,
                mesh=self._mesh,
                max_length=largest and getattr(largest, f"{field}_length"),
            )

        params = on_every_device(params, self._mesh)
        return on_mesh

    def _search(
        self, encode, keys, hits: int, batch_size: int, largest: Extent | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        return search(
            *(encode("query", self._queries), keys, hits, self._encoder.metric),
            batch_size=batch_size,
            mesh=self._mesh,
            largest=largest and largest[:2],
        )

    def _tokens(
        self,
        tokenizer,
        field: str,
        source: Corpus | EvalData,
        texts: Iterable[Prompted],
        prefix: str,
    ) -> tuple[TokenStore, str]:
        """The tokens of all texts, and a name for everything they depend on.

        Args:
            prefix: the instruction in front of them, where a row has none of its own.
        """
        length = getattr(self._config, f"{field}_max_length")
        side = self._config.truncation_side
        kinds = {"query": "queries", "key": "keys"}
        facts = {"content": source.digest, "tokenizer": fingerprint(tokenizer), "prefix": prefix}
        name = name_of(identity(self._config, kinds[field], "texts", **facts))
        store = tokenize(
            texts,
            tokenizer,
            max_length=length,
            truncation_side=side,
            name=name,
            cache=self._cache,
            total=len(source),
            desc=f"Tokenising {source.path.name}",
        )
        return store, name
