"""Rerankers' folders of sentence-transformers, file by file and key by key: its raw scores, or a
refusal; and what is trained here opens there.

Each pair is scored alone there, so that no padding counts.
"""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import transformers
from commands import flags
from folder_edits import BERT, DROP, MODEL, TOKENIZER, also, edit, modules, older, tally
from sentence_transformers import CrossEncoder
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    LayerNorm,
    Pooling,
    Transformer,
)

from llme_jax import Reranker, rank
from llme_jax.errors import InputError

PAIRS = [
    ("w1 w2", "w3 w4 w5"), ("w7", "W9 w10"), ("w4 [SEP] w5", "w6 [PAD] w8 [MASK]"), ("", "w1"),
    ("w3", ""), ("w1  w2\n", "東京 w3 für"), (" ".join(f"w{i}" for i in range(30)), "w1 w2 w3"),
    ("w1 w2 w3", " ".join(f"w{i}" for i in range(60))), ("a </s> b", "</s>"),
]  # fmt: skip
ROUNDING = 1e-5
PROMPT = {"prompts": {"query": "w20 w21 ", "other": "w22 "}, "default_prompt_name": "query"}


def classifier(folder: Path, **changes) -> None:
    """Makes a sequence classifier of one label of the configuration in a folder."""
    config = transformers.AutoConfig.from_pretrained(folder, num_labels=1, **changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)


def saved(root: Path, kind: str) -> Path:
    """A folder as sentence-transformers saves it."""
    folder, base = root / kind, root / f"base {kind}"
    if folder.is_dir():
        return folder
    torch.manual_seed(0)
    if kind in ("llama", "qwen3", "template"):
        of_type = "llama" if kind == "template" else kind
        tiny.save_llama(base, model_type=of_type, max_position_embeddings=256)
        edit(TOKENIZER, pad_token="</s>")(base)
        if kind != "template":
            (base / "chat_template.jinja").unlink()
        classifier(base, pad_token_id=1)
    elif kind == "modernbert":
        special = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
        tiny.save_encoder(base, "modernbert", pad_token_id=0, max_position_embeddings=96, **special)
        classifier(base)
    else:
        tiny.save_bert(base, positions=96)
        if kind == "bert":
            classifier(base)
    if kind == "modular":
        layers = [Dense(32, 20, activation_function=torch.nn.GELU()), LayerNorm(20),
                  Dense(20, 1, activation_function=torch.nn.Identity(),
                        module_output_name="scores")]  # fmt: skip
        first = [Transformer(str(base), max_seq_length=40), Pooling(32, "cls")]
        model = CrossEncoder(modules=[*first, *layers], device="cpu", num_labels=1)
    else:
        model = CrossEncoder(str(base), device="cpu", max_length=60, num_labels=1)
    model.save_pretrained(str(folder))
    return folder


def without(*names: str):
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


CONFIG = "config.json"
ALONE = without("modules.json", BERT, MODEL)
OF_ANY = {
    "as saved": lambda folder: None,
    "older": older(),
    "lower case": edit(BERT, do_lower_case=True),
    "unknown key": edit(BERT, reading="aloud"),
    "query length": edit(BERT, query_length=5),
    "cut at the left": edit(TOKENIZER, truncation_side="left", model_max_length=14),
    "cut at the left by arguments": edit(BERT, processor_kwargs={"truncation_side": "left"}),
    "short": edit(TOKENIZER, model_max_length=14),
    "prompt": edit(MODEL, **PROMPT),
    "prompt of no one": edit(MODEL, prompts=PROMPT["prompts"]),
    "prompt missing": edit(MODEL, default_prompt_name="mine"),
    "sigmoid": edit(MODEL, activation_fn="torch.nn.modules.activation.Sigmoid"),
    "unknown key of the model": edit(MODEL, query_prefix="w1"),
    "unknown key of the configuration": edit(CONFIG, score_scale=2.0),
    "task": edit(BERT, transformer_task="text-generation"),
    "messages": edit(BERT, modality_config={"message": {"method": "forward"}}),
    "image": edit(BERT, modality_config={"image": {"method": "forward"}}),
    "module of others": modules(lambda m: [m[0] | {"type": "mine.Transformer"}, *m[1:]]),
    "a second module": modules(
        lambda m: [*m, {"idx": 9, "name": "9", "path": "9_N",
                        "type": "sentence_transformers.models.Normalize"}]
    ),
}  # fmt: skip
SCORES = "4_Dense/config.json"
OF_KIND = {
    "bert": {
        "of transformers alone": ALONE,
        "no token types": edit(TOKENIZER, model_input_names=["input_ids", "attention_mask"]),
        "dropout": edit(CONFIG, classifier_dropout=0.5),
        "causal": edit(CONFIG, is_decoder=True),
    },
    "modernbert": {
        "of transformers alone": ALONE,
        **{f"activation {name}": edit(CONFIG, classifier_activation=name)
           for name in ("relu", "silu", "tanh", "gelu_new", "mish")},
        **{f"pooling {name}": edit(CONFIG, classifier_pooling=name)
           for name in ("mean", "cls", "max", DROP)},
        "a bias that is missing": edit(CONFIG, classifier_bias=True),
    },
    "modular": {
        **{f"pooling {name}": edit("1_Pooling/config.json", pooling_mode=name)
           for name in ("mean", "lasttoken", "max")},
        **{f"activation {name}": edit(
               "2_Dense/config.json", activation_function=f"torch.nn.modules.activation.{name}")
           for name in ("Tanh", "ReLU", "Hardswish")},
        "last activation": edit(
            SCORES, activation_function="torch.nn.modules.activation.Sigmoid"),
        "not called scores": edit(SCORES, module_output_name="sentence_embedding"),
        "of tokens": edit(SCORES, module_input_name="token_embeddings"),
        "residual": edit(SCORES, use_residual=True),
        "no norm": modules(lambda m: [*m[:3], *m[4:]]),
        "norm last": modules(lambda m: [*m[:3], m[4], m[3]]),
        "no dense": modules(lambda m: m[:2]),
        "prompt apart": edit("1_Pooling/config.json", include_prompt=False),
        "prompt apart, with one": also(
            edit("1_Pooling/config.json", include_prompt=False, pooling_mode="mean"),
            edit(MODEL, **PROMPT)),
    },
    "llama": {
        "of transformers alone": ALONE,
        "bos": edit(BERT, processor_kwargs={"add_bos_token": False}),
    },
    "qwen3": {
        "of transformers alone": ALONE,
        "no padding token": edit(CONFIG, pad_token_id=None),
        "another padding token": edit(CONFIG, pad_token_id=5),
        "padding is common": also(ALONE, edit(CONFIG, pad_token_id=89)),  # a letter
    },
    "template": {
        "template and prompt": also(edit(MODEL, **PROMPT), edit(BERT, max_seq_length=40)),
        "template of transformers": ALONE,
        "template without roles": lambda folder: (folder / "chat_template.jinja").write_text(
            "{% for m in messages %}{{ m.content }} {% endfor %}"),
        "template of users": lambda folder: (folder / "chat_template.jinja").write_text(
            "{% for m in messages if m.role == 'user' %}{{ m.content }} {% endfor %}"),
    },
}  # fmt: skip
CASES = [(kind, name) for kind, own in OF_KIND.items() for name in [*OF_ANY, *own]]
SAMPLE = CASES[::13]
MUST_BE_SERVED = {
    "as saved", "of transformers alone", "lower case", "cut at the left", "short", "prompt",
    "prompt of no one", "sigmoid", "no token types", "dropout", "activation relu", "pooling mean",
    "pooling cls", "activation Tanh", "no norm", "another padding token", "template and prompt",
    "template of transformers",
}  # fmt: skip


def of_theirs(folder: Path) -> np.ndarray | None:
    try:
        model, raw = CrossEncoder(str(folder), device="cpu"), torch.nn.Identity()
        return np.array([model.predict([pair], activation_fn=raw)[0] for pair in PAIRS])
    except Exception:
        return None


def length_of(folder: Path) -> int:
    """Tokens of the longest pair, as sentence-transformers cuts it."""
    return CrossEncoder(str(folder), device="cpu").max_length or 96


def of_ours(folder: Path, length: int, **settings) -> np.ndarray:
    half = length // 2
    lengths = {"query_max_length": half, "key_max_length": length - half}
    return Reranker.load(folder, dtype="fp32", **lengths, **settings).score(PAIRS)


def check(root: Path, out: Path, kind: str, name: str) -> str:
    shutil.copytree(saved(root, kind), out)
    (OF_ANY | OF_KIND[kind])[name](out)
    wanted = of_theirs(out)
    try:
        found = of_ours(out, length_of(out) if wanted is not None else 40)
    except InputError as error:
        assert "\n" not in str(error)
        assert name not in MUST_BE_SERVED, error
        return "refused"
    assert wanted is not None, "sentence-transformers refuses it"
    np.testing.assert_allclose(found, wanted, atol=ROUNDING * max(1, np.abs(wanted).max()))
    return "same"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("saved")


@pytest.mark.parametrize("kind, name", SAMPLE)
def test_a_reranker_is_what_it_says(root, tmp_path, kind, name):
    check(root, tmp_path / "model", kind, name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OF_KIND)
def test_every_reranker_is_what_it_says(root, tmp_path, kind):
    names = [name for of, name in CASES if of == kind]
    seen = tally(check, ((root, tmp_path / str(i), kind, name) for i, name in enumerate(names)))
    assert seen["same"] > 6 and seen["refused"] > 6


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in OF_KIND if kind != "modular"]


@pytest.mark.parametrize("kind", ["modular", *SLOW])
def test_trained_here_it_opens_there(root, tmp_path, kind, caplog):
    """With its prompt, cut at the left, after 5 steps."""
    folder = tmp_path / "model"
    shutil.copytree(saved(root, kind), folder)
    edit(MODEL, **PROMPT)(folder)
    edit(TOKENIZER, truncation_side="left", model_max_length=40)(folder)
    rows = [
        {"query": f"w{i} w2", "pos": [f"w{i} w7"], "neg": [f"w{i + 1} w9", f"w{i + 2} w1"]}
        for i in range(16)
    ]
    tiny.write_lines(tmp_path / "train.json", rows)
    out, data = tmp_path / "out", tmp_path / "train.json"
    settings = {
        "train_data": data, "ranker": folder, "output_dir": out, "max_steps": 5, "dtype": "fp32",
        "train_group_size": 3, "per_device_train_batch_size": 1, "learning_rate": 1e-2,
        "dataset_cache_dir": tmp_path / "cache", "log_path": tmp_path / "log",
    }  # fmt: skip
    with caplog.at_level(logging.WARNING):
        rank.main(flags(settings))
    assert "random" not in caplog.text
    trained = out / "checkpoint-5/ranker"
    before, after = of_theirs(folder), of_theirs(trained)
    assert length_of(trained) == length_of(folder) == 40
    assert np.abs(after - before).max() > 0.1
    np.testing.assert_allclose(
        of_ours(trained, 40), after, atol=ROUNDING * max(1, np.abs(after).max())
    )
