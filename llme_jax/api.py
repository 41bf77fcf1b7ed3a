"""For notebooks and other programs: texts in memory through what the commands use.

Settings are keyword arguments of `load`, with the names and defaults of the flags. Every call works
on the devices of this process, takes texts or numpy arrays and returns numpy arrays. Shapes are of
few sizes: calls that follow compile nothing new. `progress` shows a bar. What cannot be used, be it
an argument, a setting or a model, is an InputError.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from functools import cache, partial
from typing import Literal

import jax
import numpy as np
from tqdm import tqdm

from llme_jax.config import EncoderConfig, EvalConfig, LMConfig, RankConfig, TextConfig
from llme_jax.config.identity import decisive
from llme_jax.config.setting import Group, SettingError, unknown
from llme_jax.config.validate import check_batch_size, check_encoder
from llme_jax.data.candidates import CandidateRow
from llme_jax.data.instructions import instruction_of, with_model_texts
from llme_jax.data.rows import ScoringRow
from llme_jax.data.tokens import whole_tokens
from llme_jax.data.widths import fine_width
from llme_jax.devices.sharding import make_mesh
from llme_jax.errors import InputError
from llme_jax.hugging_face.reading import Cutter
from llme_jax.hugging_face.texts import NO_LIMIT
from llme_jax.lm import likelihood
from llme_jax.lm.prompts import TEMPLATES, Pair, PromptMaker
from llme_jax.lm.scoring import open_lm
from llme_jax.models.causal_lm import load_causal_lm
from llme_jax.models.dual_encoder import DualEncoder, load_dual_encoder
from llme_jax.models.space import encoder_texts
from llme_jax.rerank.run import open_ranking
from llme_jax.retrieval import exact
from llme_jax.retrieval.encode import encode, on_every_device

# Of the settings of data, those that are none of files.
TEXTS = [n for n in decisive(TextConfig(), "queries", "keys", "texts") if n != "key_template"]
_USED_IN: dict[str, int] = {}  # the process that has
ROUNDING = 1e-5  # by which the length of a vector may differ from 1


class Encoder:
    """Texts to vectors, as `llme_jax.retrieve` makes them.

    Attributes:
        width: D, the numbers of a vector.
        metric: what their similarity is, for `search`.
    """

    def __init__(self, data: TextConfig, encoder: DualEncoder, params: dict, tokenizer):
        self._data, self._encoder, self._tokenizer = data, encoder, tokenizer
        self._mesh = make_mesh(devices=jax.local_devices())
        self._params = on_every_device(params, self._mesh)
        # Copies of a tokenizer take longer than a question does.
        self._cutting = cache(partial(Cutter, tokenizer, side=data.truncation_side))
        self.width: int = encoder.truncate_dim or encoder.width
        self.metric: Literal["cos", "ip", "l2"] = encoder.metric

    @classmethod
    def load(cls, model: str | os.PathLike, **settings) -> "Encoder":
        """
        Args:
            model: a folder or a name of the Hub.
            settings: flags of `llme_jax.retrieve` of the encoder (pooling_method, dense_metric,
                dtype, attention, model_cache_dir; key_encoder with tie_encoders=False) and of texts
                (TEXTS). Without a version, texts get the folder's own prompts, where it has some.
        """
        config, data = EncoderConfig(), TextConfig()
        _set(_of(config) | dict.fromkeys(TEXTS, data), settings, query_encoder=model)
        check_encoder(config)
        encoder, params, tokenizer = load_dual_encoder(config, new_dense=False)
        own = encoder_texts(config, tokenizer, encoder.max_length)
        if "version" not in settings:
            data.version = "model"
            data.add_instruction = data.add_instruction and bool(own.prompts)
        data = with_model_texts(data, config.query_encoder, own)
        return cls(data, encoder, params, tokenizer)

    def encode(
        self,
        texts: Iterable[str],
        *,
        kind: Literal["query", "key"],
        task: str | None = None,
        batch_size: int = EvalConfig.batch_size,
        max_length: int | None = None,
        progress: bool = False,
    ) -> np.ndarray:
        """Vectors of n texts, float32[n, D]; of length 1 where the metric is cos.

        Numbers that are not finite are a RunError.

        Args:
            kind: what they are; it decides the instruction, and the encoder where there are two.
            task: whose instruction of the version goes in front, as qa.
            batch_size: texts at a time, over all devices; vectors depend on it by rounding only.
            max_length: tokens of the longest text [query_max_length or key_max_length].
        """
        texts = _texts("texts", texts)
        _check_choice("kind", kind, ("query", "key"))
        EvalConfig(batch_size=batch_size)  # is it in range?
        data, name = self._data, f"{kind}_max_length"
        if max_length is not None:
            data = replace(data, **{name: max_length})
        length = getattr(data, name)
        self._encoder.check_lengths(**{"query_max_length": 1, "key_max_length": 1, name: length})
        if not isinstance(task, str | None):
            raise InputError(f"task is {_shown(task)}: give a string, as in qa")
        if task is not None and data.version == "model":
            raise InputError(
                f"task {_shown(task)}: all texts get the prompts of the model's folder; load it "
                "with a version that has instructions by task, as version='llm-embedder'"
            )
        before = getattr(instruction_of(data, task), kind)
        if not texts:
            return np.zeros((0, self.width), np.float32)
        pad_id = self._tokenizer.pad_token_id or 0
        return encode(
            self._encoder,
            self._params,
            whole_tokens([(before, text) for text in texts], self._cutting(length)),
            field=kind,
            batch_size=batch_size,
            pad_id=pad_id,
            mesh=self._mesh,
            max_length=length if length < NO_LIMIT else None,
            progress=progress,
        )


def search(
    queries: np.ndarray,
    keys: np.ndarray,
    hits: int = 10,
    metric: Literal["cos", "ip", "l2"] = "cos",
    *,
    batch_size: int = EvalConfig.batch_size,
    progress: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """The best keys of every query, by exact search on the devices, in fp32.

    Args:
        queries: float32[n, D].
        keys: float32[C, D]; of another number of keys, another program is compiled.
        metric: cos, ip (inner product) or l2 (negative squared distance).
        batch_size: queries searched at a time.

    Returns:
        scores float32[n, hits], best first, and indices int32[n, hits]; -inf and -1 fill up where
        there are fewer keys.
    """
    _check_choice("metric", metric, ("cos", "ip", "l2"))
    hits, batch_size = (int(n) if isinstance(n, np.integer) else n for n in (hits, batch_size))
    EvalConfig(hits=hits, batch_size=batch_size)  # are they in range?
    queries, keys = _vectors("queries", queries, metric), _vectors("keys", keys, metric)
    count = len(queries)
    if not count or not len(keys):
        return np.full((count, hits), -np.inf, np.float32), np.full((count, hits), -1, np.int32)
    if queries.shape[1] != keys.shape[1]:
        raise InputError(
            f"queries have {queries.shape[1]} numbers each, keys {keys.shape[1]}: give vectors of "
            "one encoder"
        )
    rows = min(1 << (count - 1).bit_length(), batch_size)
    queries = np.pad(queries, ((0, max(rows - count, 0)), (0, 0)), mode="edge")
    how = {"mesh": make_mesh(devices=jax.local_devices()), "progress": progress}
    scores, indices = exact.search(queries, keys, hits, metric, batch_size=batch_size, **how)
    return scores[:count], indices[:count]


class Reranker:
    """Scores of queries with keys, as `llme_jax.rank` gives them."""

    def __init__(self, tokens: Callable, score: Callable):
        self._tokens, self._score = tokens, score

    @classmethod
    def load(cls, model: str | os.PathLike, **settings) -> "Reranker":
        """
        Args:
            model: a folder or a name of the Hub.
            settings: flags of `llme_jax.rank`: of the ranker (ranker_method, yes_no_instruction,
                dtype, attention, tensor, fsdp, model_cache_dir), batch_size, and of texts (TEXTS).
        """
        config = RankConfig()
        groups = _of(config.ranker) | dict.fromkeys(TEXTS, config.data)
        groups |= {"batch_size": config.evaluation, "fsdp": config.training}
        _set(groups, settings, ranker=model)
        _, scoring = open_ranking(config)
        return cls(scoring.tokens, scoring.load())

    def score(
        self, pairs: Iterable[tuple[str, str]], *, task: str | None = None, progress: bool = False
    ) -> np.ndarray:
        """Raw scores of n pairs of query and key, float32[n]; a higher one is better.

        Args:
            task: whose instructions go in front, with add_instruction.
        """
        rows = [
            CandidateRow(query, task, [key], [0], [], [], False, "key", None)
            for query, key in _tuples(pairs, "query", "key")
        ]
        if not rows:
            return np.zeros(0, np.float32)
        return _with_bar("Reranking", self._score, self._tokens(rows), len(rows), progress)


class Scorer:
    """Log-probabilities of answers by a language model, as `llme_jax.score` gives them."""

    def __init__(self, prompts: PromptMaker, score: likelihood.Scorer):
        self._prompts, self._score = prompts, score

    @classmethod
    def load(cls, model: str | os.PathLike, **settings) -> "Scorer":
        """
        Args:
            model: a folder or a name of the Hub.
            settings: flags of `llme_jax.score` of the language model (lm_dtype, lm_batch_size,
                context_max_length, key_max_length, tensor, fsdp, model_cache_dir).
        """
        config = LMConfig()
        if isinstance(rows := settings.get("lm_batch_size"), int) and not isinstance(rows, bool):
            settings["lm_batch_size"] = str(rows)  # the flag may say auto, too
        _set(_of(config), settings, model_name_or_path=model)
        check_batch_size(config)
        mesh = make_mesh(config.fsdp, config.tensor, devices=jax.local_devices())
        lm, folder, tokenizer = open_lm(config)
        limits = config.key_max_length, config.context_max_length
        prompts = PromptMaker(tokenizer, key_max_length=limits[0], context_max_length=limits[1])
        widths = sorted({fine_width(n, limits[1]) for n in range(1, limits[1] + 1)})
        params = load_causal_lm(lm, folder, mesh)
        return cls(prompts, likelihood.Scorer(lm, params, mesh, widths, config.rows))

    def score(
        self, pairs: Iterable[tuple[str, ...]], *, task: str | None = None, progress: bool = False
    ) -> np.ndarray:
        """Mean log-probability of a token of each of n answers, float32[n].

        Args:
            pairs: a prompt, which is read as it is, and the answer; with a task the key, the query
                and the answer. What is too long loses the beginning of the prompt, or the key's
                end.
            task: whose template joins the three, as qa.
        """
        if task is not None:
            _check_choice("task", task, TEMPLATES)
        parts = ("prompt", "answer") if task is None else ("key", "query", "answer")
        found = []
        for i, (*before, answer) in enumerate(_tuples(pairs, *parts)):
            if not answer.strip():
                raise InputError(f"pairs[{i}]: its answer is {answer!r}, there is nothing to score")
            key, query = ("", *before)[-2:]
            # lrlm's template adds nothing.
            row = ScoringRow(task or "lrlm", query, [key], 0, [answer])
            found.append(Pair(row, 0, 0, f"pairs[{i}]"))
        if not found:
            return np.zeros(0, np.float32)
        return _with_bar("Scoring", self._score, self._prompts(found), len(found), progress)


def _set(groups: dict[str, Group], settings: dict, **model) -> None:
    """Gives settings to the groups that have them, by name; `model` is one more."""
    for name, value in dict(**settings, **model).items():
        if name not in groups:
            raise SettingError(unknown("load", name, groups))
        setattr(groups[name], name, os.fspath(value) if isinstance(value, os.PathLike) else value)


def _of(group: Group) -> dict[str, Group]:
    return {f.name: group for f in fields(group)}


def _check_choice(name: str, value, choices: Iterable[str]) -> None:
    known = [*choices]
    if not isinstance(value, str) or value not in known:
        raise InputError(f"{name} is {_shown(value)}: choose from {', '.join(known)}")


def _list(name: str, values, wanted: str) -> list:
    _check_process()
    try:
        if not isinstance(values, str | bytes | dict):
            return list(values)
    except TypeError:
        pass
    raise InputError(f"{name} is {_shown(values)}: give a list of {wanted}")


def _check_process() -> None:
    """
    Raises:
        InputError: this is a child of a process that has used JAX, whose threads it lacks.
    """
    if _USED_IN.setdefault("process", os.getpid()) != os.getpid():
        raise InputError(
            "this process was forked from one that has used JAX, and would hang: start it with "
            "multiprocessing.get_context('spawn')"
        )


def _texts(name: str, texts) -> list[str]:
    texts = _list(name, texts, "strings")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"{name}[{i}] is {_shown(text)}: give a string")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(f"{name}[{i}] has half a surrogate pair: remove it") from None
    return texts


def _tuples(pairs, *parts: str) -> list[list[str]]:
    wanted = f"({', '.join(parts)})"
    pairs = [_list(f"pairs[{i}]", p, wanted) for i, p in enumerate(_list("pairs", pairs, wanted))]
    for i, pair in enumerate(pairs):
        if len(pair) != len(parts):
            raise InputError(f"pairs[{i}] is {_shown(pair)}: give {wanted}")
    return [_texts(f"pairs[{i}]", pair) for i, pair in enumerate(pairs)]


def _vectors(name: str, vectors, metric: str) -> np.ndarray:
    """float32[n, D]; where the metric is cos, of length 1 but for ROUNDING."""
    _check_process()
    try:
        if np.iscomplexobj(vectors) or np.ma.isMaskedArray(vectors):
            raise TypeError("would lose a part")
        found = np.asarray(vectors, np.float32)
    except (TypeError, ValueError):
        found = np.float32(0)
    if found.shape == (0,):
        return found[:, None]
    if found.ndim != 2:
        raise InputError(f"{name} is {_shown(vectors)}: give an array [n, D] of numbers")
    squares = np.einsum("nd,nd->n", found, found)
    if len(wrong := np.flatnonzero(~np.isfinite(squares))):
        raise InputError(f"{name}[{wrong[0]}] has numbers that are not finite: leave it out")
    lengths = np.sqrt(squares)
    others = (np.abs(lengths - 1) > ROUNDING) & (lengths > 0)
    if metric == "cos" and others.any():
        found = found / np.where(others, lengths, 1)[:, None]
    return found


def _with_bar(desc: str, score: Callable, tokens, count: int, shown: bool) -> np.ndarray:
    with tqdm(total=count, desc=desc, unit=" pairs", leave=False, disable=not shown) as bar:
        return score(tokens, lambda pairs, _: bar.update(pairs))


def _shown(value) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
