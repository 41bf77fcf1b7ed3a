"""Folders of sentence-transformers, file by file and key by key: its vectors, or a refusal.

Each text is encoded alone there, so that no padding counts.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from folder_edits import (
    BERT,
    DROP,
    MODEL,
    POOLED,
    TOKENIZER,
    also,
    edit,
    modules,
    older,
    pooled,
    renamed,
    tally,
    tokenizer_file,
)
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    LayerNorm,
    Normalize,
    Pooling,
    StaticEmbedding,
    Transformer,
)
from tokenizers import Tokenizer

from llme_jax import Encoder
from llme_jax.errors import InputError

TEXTS = [
    "w1 w2 w3", "w7", "W9 w10 W11", "w4 [SEP] w5 [PAD] w6 [MASK] w8", "w1  w2\tw3\n", "other w3",
    " ".join(f"w{i % 200}" for i in range(90)), "", "def f(x): return w1", "東京 w3 für", "w3 " * 9,
]  # fmt: skip
PROMPTS = {"query": "w20 w21 ", "document": "w22: ", "passage": "w23 "}
ROUNDING = 1e-5


def saved(root: Path, kind: str) -> Path:
    """A folder as sentence-transformers saves it."""
    folder = root / kind
    if folder.is_dir():
        return folder
    base = root / f"base {kind}"
    if kind == "llama":
        tiny.save_llama(base, max_position_embeddings=96)
        edit(TOKENIZER, pad_token="</s>")(base)
    elif kind == "roberta":
        tiny.save_encoder(base, "roberta", pad_token_id=0, max_position_embeddings=97)
    elif kind == "mpnet":
        tiny.save_encoder(base, "mpnet", max_position_embeddings=97)
    else:
        tiny.save_bert(base, positions=96)
    if kind == "static":
        tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
        table = np.random.default_rng(0).normal(size=(tokenizer.get_vocab_size(), 32))
        first = [StaticEmbedding(tokenizer, embedding_weights=table.astype(np.float32))]
    else:
        first = [Transformer(str(base), max_seq_length=40)]
        first.append(Pooling(32, "lasttoken" if kind == "llama" else "mean"))
    torch.manual_seed(0)
    more = {"bert": [Normalize()], "layers": [Dense(32, 20), LayerNorm(20), Normalize()]}
    model = SentenceTransformer(
        modules=[*first, *more.get(kind, [])], device="cpu", prompts={**PROMPTS}
    )
    model.save(str(folder), create_model_card=False)
    return folder


TRUNCATION = {"max_length": 12, "stride": 0, "strategy": "LongestFirst", "direction": "Left"}
PADDING = {
    "strategy": {"Fixed": 60}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
    "pad_type_id": 0, "pad_token": "[PAD]",
}  # fmt: skip
MESSAGE = {"method": "forward", "method_output_name": "last_hidden_state"}
OF_ANY = {
    "as saved": lambda folder: None,
    "older": older(),
    "older length": older(max_seq_length=9),
    "no length": older(max_seq_length=None),
    "own kind of file": also(older(), renamed(BERT, "sentence_roberta_config.json")),
    "lower case": older(do_lower_case=True),
    "lower": edit(BERT, do_lower_case=True),
    "query and document length": edit(BERT, query_length=6, document_length=14),
    "query expansion": edit(BERT, query_expansion={"strategy": "fixed", "length": 32}),
    "unknown key": edit(BERT, sliding=3),
    "wrong type": edit(BERT, do_lower_case="yes"),
    "length of 0": older(max_seq_length=0),
    "cut at the left": older(tokenizer_args={"truncation_side": "left"}, max_seq_length=12),
    "length by the tokenizer": older(tokenizer_args={"model_max_length": 10}, max_seq_length=DROP),
    "tokenizer in words": edit(BERT, processor_kwargs={"truncation_side": "left"}),
    "tokenizer unknown": older(tokenizer_args={"gguf_file": "x"}),
    "fast tokenizer": older(tokenizer_args={"use_fast": True, "padding_side": "left"}),
    "model arguments": older(model_args={"attn_implementation": "eager"}),
    "model type": older(model_args={"torch_dtype": "float32"}),
    "model unknown": older(model_args={"num_labels": 3}),
    "fewer layers": older(config_args={"num_hidden_layers": 1}),
    "config unknown": older(config_args={"my_scale": 2.0}),
    "another tokenizer": older(tokenizer_name_or_path="bert-base-uncased"),
    "unpadded": edit(BERT, unpad_inputs=False),
    "image": edit(BERT, modality_config={"image": MESSAGE}),
    "text and image": edit(BERT, modality_config={"text": MESSAGE, "image": MESSAGE}),
    "features": edit(BERT, modality_config={"text": MESSAGE | {"method": "get_text_features"}}),
    "task": edit(BERT, transformer_task="fill-mask"),
    "padded text": edit(BERT, processing_kwargs={"text": {"padding": "max_length"}}),
    "no processing": edit(BERT, processing_kwargs={"audio": {"padding": True}, "text": {}}),
    "longer than its positions": older(max_seq_length=4000),
    "mean": pooled("mean_tokens"),
    "first": pooled("cls_token"),
    "last": pooled("lasttoken"),
    "no mode": pooled(),
    "maximum": pooled("max_tokens"),
    "two modes": pooled("cls_token", "mean_tokens"),
    "weighted": pooled("weightedmean_tokens"),
    "pooling unknown": edit(POOLED, temperature=2),
    **{
        f"{mode}, prompt apart": edit(POOLED, pooling_mode=mode, include_prompt=False)
        for mode in ("mean", "cls", "lasttoken")
    },
    "prompt apart, cut": also(edit(POOLED, include_prompt=False), older(max_seq_length=5)),
    "prompt apart, cut at the left": also(
        edit(POOLED, include_prompt=False), edit(TOKENIZER, truncation_side="left")
    ),
    "prompt apart in older words": pooled("mean_tokens", include_prompt=False),
    "prompt apart as a word": edit(POOLED, include_prompt="no"),
    "one mode in a list": edit(POOLED, pooling_mode=["mean"]),
    "modes in a list": edit(POOLED, pooling_mode=["mean", "cls"]),
    **{
        f"similarity {name}": edit(MODEL, similarity_fn_name=name)
        for name in ("cosine", "dot", "euclidean", "manhattan", None)
    },
    "dot, truncated": edit(MODEL, similarity_fn_name="dot", truncate_dim=5),
    "truncated": edit(MODEL, truncate_dim=6),
    "no prompts": edit(MODEL, prompts={}),
    "a passage": edit(MODEL, prompts={"passage": "w30 "}),
    "default prompt": edit(MODEL, default_prompt_name="passage"),
    "default query": edit(MODEL, prompts={"query": "w30 "}, default_prompt_name="query"),
    "default missing": edit(MODEL, default_prompt_name="other"),
    "prompt of null": edit(MODEL, prompts={"query": None, "document": "w1 "}),
    "model unknown key": edit(MODEL, query_prefix="w1"),
    "sparse": edit(MODEL, model_type="SparseEncoder"),
    "version": edit(MODEL, __version__={"sentence_transformers": "5.1.0"}),
    "left": edit(TOKENIZER, truncation_side="left"),
    "tokenizer length": edit(TOKENIZER, model_max_length=7),
    "tokenizer file cuts": tokenizer_file(truncation=TRUNCATION),
    "tokenizer file pads": tokenizer_file(padding=PADDING),
    "custom module": modules(
        lambda m: [m[0] | {"type": "custom_st.Transformer"}, *m[1:]]
    ),
    "module with words": modules(lambda m: [m[0] | {"kwargs": ["task"]}, *m[1:]]),
    "module unknown key": modules(lambda m: [m[0] | {"revision": "x"}, *m[1:]]),
    "without pooling": modules(lambda m: m[:1]),
    "pooling twice": modules(lambda m: [*m[:2], m[1] | {"idx": 9, "name": "9"}, *m[2:]]),
    "a dropout": modules(
        lambda m: [*m[:2], m[1] | {"type": "sentence_transformers.models.Dropout", "name": "9"}]
    ),
}  # fmt: skip
CHAT = {"message": MESSAGE | {"format": "flat"}}


def _messages(how: str) -> dict:
    return {"text": MESSAGE, "message": MESSAGE | {"format": how}}


OF_KIND = {
    "bert": {
        "normalized twice": modules(lambda m: [*m, m[-1] | {"idx": 3, "name": "3"}]),
        "cased tokenizer": edit(TOKENIZER, do_lower_case=False),
        "accents": older(tokenizer_args={"strip_accents": False, "do_lower_case": False}),
        "normalize tokens": edit("2_Normalize/config.json", module_input_name="token_embeddings"),
        "literal names as text": edit(TOKENIZER, split_special_tokens=True),
        "message without template": edit(BERT, modality_config=CHAT),
    },
    "layers": {
        **{
            f"dense {name}": edit(
                "2_Dense/config.json", activation_function=f"torch.nn.modules.activation.{name}"
            )
            for name in ("GELU", "ReLU", "SiLU", "Sigmoid", "Softsign")
        },
        "own activation": edit("2_Dense/config.json", activation_function="mine.GELU"),
        "no activation": edit("2_Dense/config.json", activation_function=DROP),
        "residual": edit("2_Dense/config.json", use_residual=True),
        "of tokens": edit("2_Dense/config.json", module_input_name="token_embeddings"),
        "dense unknown key": edit("2_Dense/config.json", scale=2.0),
        "norm unknown key": edit("3_LayerNorm/config.json", eps=1e-3),
        "norm of another width": edit("3_LayerNorm/config.json", dimension=21),
    },
    "llama": {
        "no template": edit(BERT, modality_config={"text": MESSAGE}),
        **{name: edit(BERT, modality_config=_messages(name)) for name in ("auto", "structured")},
        "messages alone": edit(BERT, modality_config=CHAT),
        "messages, mean": edit(POOLED, pooling_mode="mean"),
        "messages, mean, prompt apart": edit(POOLED, pooling_mode="mean", include_prompt=False),
        "messages, cut": edit(TOKENIZER, model_max_length=20),
        "messages, cut short": edit(TOKENIZER, model_max_length=6),
        "messages, end lost": also(
            edit(TOKENIZER, model_max_length=20),
            edit(BERT, processing_kwargs={"chat_template": {"restore_suffix": False}}),
        ),
        "asks for more": edit(
            BERT, processing_kwargs={"chat_template": {"add_generation_prompt": True}}
        ),
        "template's length": edit(BERT, processing_kwargs={"chat_template": {"max_length": 3}}),
        "ends": older(tokenizer_args={"add_eos_token": True, "add_bos_token": True}),
        "ends in newer words": older(processor_kwargs={"add_eos_token": True}),
        "begins with a blank": older(tokenizer_args={"add_prefix_space": True}),
        "not causal": older(config_args={"is_causal": False}),
    },
    "static": {
        "static cuts": tokenizer_file(truncation=TRUNCATION),
        "static pads": tokenizer_file(padding=PADDING),
    },
    "roberta": {},
    "mpnet": {},
}
NOT_OF_STATIC = {name for name in OF_ANY if name not in (
    "as saved", "similarity dot", "similarity euclidean", "truncated", "dot, truncated",
    "no prompts", "a passage", "custom module", "module with words",
)}  # fmt: skip
CASES = [
    (kind, name)
    for kind, own in OF_KIND.items()
    for name in [*OF_ANY, *own]
    if not (kind == "static" and name in NOT_OF_STATIC)
]
SAMPLE = CASES[::17]
MUST_BE_SERVED = {
    "as saved", "older", "older length", "no length", "lower case", "cut at the left", "first",
    "no mode", "mean, prompt apart", "cls, prompt apart", "similarity dot", "similarity euclidean",
    "dot, truncated", "a passage", "left", "tokenizer length", "structured", "auto",
    "messages, mean", "messages, cut", "ends", "query and document length",
    "tokenizer file cuts", "prompt apart, cut", "messages, mean, prompt apart",
}  # fmt: skip


def of_theirs(folder: Path, texts: list[str]) -> dict[str, np.ndarray] | None:
    try:
        model = SentenceTransformer(str(folder), device="cpu")
        encode = {"query": model.encode_query, "key": model.encode_document}
        return {kind: np.stack([f([text])[0] for text in texts]) for kind, f in encode.items()}
    except Exception:
        return None


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def check(root: Path, out: Path, kind: str, name: str) -> str:
    shutil.copytree(saved(root, kind), out)
    (OF_ANY | OF_KIND[kind])[name](out)
    # Of a text without any token there is no vector here; a warning says so.
    texts = TEXTS if kind != "static" else [text for text in TEXTS if text]
    wanted = of_theirs(out, texts)
    try:
        encoder = Encoder.load(str(out), dtype="fp32")
        found = {field: encoder.encode(texts, kind=field) for field in ("query", "key")}
    except InputError as error:
        assert "\n" not in str(error)
        causal = kind == "llama" and name in (
            "first",
            "cls, prompt apart",
        )  # the same vector always
        assert causal or name not in MUST_BE_SERVED, error
        return "refused"
    assert wanted is not None, "sentence-transformers refuses it"
    for field, of_field in found.items():
        theirs = unit(wanted[field]) if encoder.metric == "cos" else wanted[field]
        limit = ROUNDING * max(1, np.abs(theirs).max())
        np.testing.assert_allclose(of_field, theirs, atol=limit, err_msg=field)
    return "same"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("saved")


@pytest.mark.parametrize("kind, name", SAMPLE)
def test_a_folder_is_what_it_says(root, tmp_path, kind, name):
    check(root, tmp_path / "model", kind, name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OF_KIND)
def test_every_folder_is_what_it_says(root, tmp_path, kind):
    names = [name for of, name in CASES if of == kind]
    seen = tally(check, ((root, tmp_path / str(i), kind, name) for i, name in enumerate(names)))
    assert seen["same"] > 3
