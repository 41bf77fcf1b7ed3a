"""A teacher encoder: its vectors of all training texts, computed once before training.

They are in the cache, named by everything they depend on: a killed run continues at the shard it
was in, and later runs on the same texts compute nothing.
"""

import logging
import sys
from dataclasses import replace
from functools import cache as once
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np
from jax.sharding import Mesh

from llme_jax.config import Config
from llme_jax.data.instructions import with_model_prompts
from llme_jax.data.rows import BadRows
from llme_jax.data.tokens import TokenStore
from llme_jax.data.train_data import TrainData
from llme_jax.data.train_store import TeacherVectors, open_store
from llme_jax.errors import InputError
from llme_jax.hugging_face.tokenizer import fingerprint
from llme_jax.hugging_face.weights import fingerprint_params
from llme_jax.models.dual_encoder import DualEncoder, load_dual_encoder
from llme_jax.models.space import encoder_texts
from llme_jax.retrieval.embeddings import encode_to_disk
from llme_jax.retrieval.encode import encode, on_every_device

logger = logging.getLogger(__name__)


class Teacher:
    """Gives vectors of texts as its own folder says: tokenizer, pooling, prompts, similarity.

    Texts are cut at the student's lengths, in its own tokens, or at what it can read.

    Attributes:
        width: E, the numbers of a vector.

    Raises:
        InputError: it cannot be found, read or served, or its vectors are not as wide as the
            student's.
    """

    def __init__(self, config: Config, cache: Path, student: DualEncoder):
        name = config.loss.teacher_encoder
        own = {"pooling_method": None, "dense_metric": None, "truncate_dim": None}
        settings = replace(config.encoder, query_encoder=name, tie_encoders=True, **own)
        encoder, self._params, tokenizer = load_dual_encoder(
            settings, weights=not config.planning.plan
        )
        self._encoder = replace(encoder, truncate_dim=None)  # all numbers, whatever its folder says
        self.width = self._encoder.width
        _check_vectors(name, self._encoder, student, config.loss.matryoshka_dims)
        self._cache, self._tokenizer = cache, tokenizer
        self._batch_size = config.evaluation.batch_size
        longest = self._encoder.max_length
        prompts = encoder_texts(settings, tokenizer, longest).prompts
        data = replace(
            config.data,
            version="model",
            add_instruction=prompts is not None,
            query_instruction=None,
            key_instruction=None,
            query_max_length=min(config.data.query_max_length, longest),
            key_max_length=min(config.data.key_max_length, longest),
        )
        self._data = with_model_prompts(data, name, prompts)

    @cached_property
    def facts(self) -> dict[str, str]:
        """What its vectors depend on beside the texts."""
        return {
            "encoder": str(replace(self._encoder, remat=False)),
            "params": fingerprint_params(self._params),
            "tokenizer": fingerprint(self._tokenizer),
        }

    def teach(self, data: TrainData, mesh: Mesh) -> None:
        """Gives `data` the vectors of all its texts, for its batches.

        All processes call this together, once: then the weights are let go.
        """
        folder, facts = self._cache, self.facts
        # On the devices from the first text that is not in the cache.
        params = once(partial(on_every_device, self._params, mesh))
        longest = max(self._data.query_max_length, self._data.key_max_length)

        def vectors(field: Literal["query", "key"], store: TokenStore) -> np.ndarray:
            return encode(
                *(self._encoder, params(), store),
                field=field,
                batch_size=self._batch_size,
                pad_id=self._tokenizer.pad_token_id or 0,
                mesh=mesh,
                max_length=longest,
            )

        for path, students in data.stores.items():
            bad_rows = BadRows(sys.maxsize)  # the student has counted them
            how = self._data, self._tokenizer, facts["tokenizer"], folder, bad_rows
            store = open_store(path, *how)
            logger.info("--teacher_encoder reads %s", path)
            of_fields = (
                encode_to_disk(
                    *(folder / "teacher", tokens, facts | {"texts": f"{store.name}/{field}"}),
                    partial(vectors, field),
                )[0]
                for field, tokens in (("query", store.queries), ("key", store.keys))
            )
            students.teacher = TeacherVectors(store, *of_fields)
        self._params = None


def _check_vectors(
    name: str, teacher: DualEncoder, student: DualEncoder, dims: list[int] | None
) -> None:
    """Refuses a teacher whose vectors cannot be compared with the student's."""
    said = f"--teacher_encoder {name}: has vectors of {teacher.width} numbers"
    if dims and max(dims) > teacher.width:
        raise InputError(
            f"{said}, --matryoshka_dims asks for {max(dims)}: give {teacher.width} or less, or "
            "another teacher"
        )
    if not dims and teacher.width != student.width:
        raise InputError(
            f"{said}, the encoder that is trained has {student.width}: give a teacher of "
            f"{student.width}, or --matryoshka_dims, which compares the first numbers of both"
        )
    if student.normalizes and not teacher.normalizes:
        logger.warning(
            "--teacher_encoder %s: its vectors have any length (%s), those of the encoder that is "
            "trained have length 1 (cos) and cannot come near; give --dense_metric %s",
            *(name, teacher.metric, teacher.metric),
        )
