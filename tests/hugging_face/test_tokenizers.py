"""Tokenizers of all families and classes against transformers' AutoTokenizer: the same ids."""

import json
from itertools import product
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from llme_jax.errors import InputError
from llme_jax.hugging_face.config_keys import FAMILIES
from llme_jax.hugging_face.tokenizer import load_tokenizer

TEXTS = [
    "ab cab", "  ab", "ab</s> cab", "<s>ab", "a\nb\tc", "ABC Äb", "", "</s>  ab", "[SEP]ab",
    "東京 ab",
]  # fmt: skip
LETTERS = [*"abcdefghijklmnopqrstuvwxyz"]
SPECIAL = {
    "bert": {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
             "mask_token": "[MASK]"},
    "llama": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "bytes": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
    "roberta": {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>",
                "pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"},
}  # fmt: skip
CLASSES = [
    None, "BertTokenizer", "BertTokenizerFast", "RobertaTokenizer", "XLMRobertaTokenizerFast",
    "MPNetTokenizer", "LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast",
    "PreTrainedTokenizer", "TokenizersBackend", "Qwen2Tokenizer", "GemmaTokenizerFast",
    "GPT2Tokenizer", "DebertaV2Tokenizer", "CamembertTokenizer",
]  # fmt: skip


def wordpiece() -> Tokenizer:
    words = [*SPECIAL["bert"].values(), *LETTERS, *(f"##{x}" for x in LETTERS), "ab", "##ab"]
    backend = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return backend


def sentencepiece() -> Tokenizer:
    """As Llama 2's: a blank before the text, bytes for what is unknown."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *LETTERS, "ab"]
    model = models.BPE(
        {w: i for i, w in enumerate(words)}, [("a", "b")],
        unk_token="<unk>", byte_fallback=True, fuse_unk=True,
    )  # fmt: skip
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return backend


def byte_level() -> Tokenizer:
    words = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    backend = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def unigram() -> Tokenizer:
    words = ["<s>", "<pad>", "</s>", "<unk>", "▁", *LETTERS, "▁ab", "<mask>"]
    scores = [(word, -float(i)) for i, word in enumerate(words)]
    backend = Tokenizer(models.Unigram(scores, unk_id=3))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return backend


MADE = {
    "bert": wordpiece,
    "llama": sentencepiece,
    "bytes": byte_level,
    "roberta": unigram,
}


def ids(tokenizer) -> list[list[int]]:
    return [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder for each way of cutting texts, as transformers saves it."""
    root = tmp_path_factory.mktemp("tokenizers")
    for name, make in MADE.items():
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=make(), **SPECIAL[name])
        tokenizer.save_pretrained(root / name)
    return root


def folder_of(saved: Path, name: str, cls: str | None, model_type: str) -> Path:
    folder = saved / name
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("tokenizer_class", None)
    path.write_text(json.dumps(settings | ({"tokenizer_class": cls} if cls else {})))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


@pytest.mark.parametrize("model_type", [t for t in FAMILIES if t not in (
    "static_embedding", "model2vec", "new")])  # fmt: skip
def test_ids_are_those_of_auto_tokenizer(saved, model_type):
    wrong, seen = [], 0
    for name, cls in product(MADE, CLASSES):
        folder = folder_of(saved, name, cls, model_type)
        try:
            found = ids(load_tokenizer(folder))
        except InputError:
            continue
        try:
            wanted = ids(transformers.AutoTokenizer.from_pretrained(folder))
        except Exception as error:
            wanted = type(error).__name__
        seen += 1
        if found != wanted:
            wrong.append((name, cls, found, wanted))
    assert not wrong, "\n".join(map(str, wrong))
    assert seen > 20
