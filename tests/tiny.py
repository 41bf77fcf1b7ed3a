"""A BERT and a Llama small enough for tests, and texts and batches for them."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, BertConfig, BertTokenizerFast, PreTrainedTokenizerFast

from llme_jax.data.batch import Batch, pack_padded
from llme_jax.devices import sharding
from llme_jax.hugging_face.config_keys import FAMILIES
from llme_jax.hugging_face.weights import load_params, save_params
from llme_jax.models.bert import abstract_params
from llme_jax.models.encoder import Architecture
from llme_jax.models.families import ENCODERS, read_config
from llme_jax.models.packing import padded

WORDS = [f"w{i}" for i in range(200)]
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<answer>"
LETTERS = [*"abcdefghijklmnopqrstuvwxyz", "query", "passage", ":", "represent", "this"]


def save_word_tokenizer(folder: Path, words: list[str], **settings) -> int:
    """Writes a BERT tokenizer with one token a word; returns how many tokens it knows."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(folder / "vocab.txt"), **settings).save_pretrained(folder)
    return len(vocabulary)


def save_bert(
    folder: Path,
    *,
    dropout: float = 0.0,
    seed: int = 0,
    width: int = 32,
    positions: int = 64,
    layers: int = 2,
) -> Path:
    """Writes a Hugging Face folder: random weights, one token a word of WORDS."""
    folder.mkdir(parents=True)
    config = BertConfig(
        architectures=["BertModel"],
        vocab_size=save_word_tokenizer(folder, WORDS),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=positions,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    config.save_pretrained(folder)
    rng = np.random.default_rng(seed)

    def random(path, leaf):
        name = sharding.path_name(path)
        if name.endswith(("kernel", "embedding")):
            # So large that texts are far apart and losses have something to say.
            return rng.normal(0, 0.2, leaf.shape).astype(np.float32)
        return np.full(leaf.shape, name.endswith("scale"), np.float32)

    shapes = abstract_params(read_config(folder, ENCODERS))
    save_params(folder / "model.safetensors", jax.tree_util.tree_map_with_path(random, shapes))
    return folder


def save_encoder(folder: Path, model_type: str, **changes) -> Path:
    """Writes a Hugging Face folder of any family: random weights, one token a word of WORDS."""
    import torch  # here only: some tests run where there is none
    from transformers import AutoModel

    folder.mkdir(parents=True)
    special = {
        f"{name}_token_id": i for name, i in (("bos", 2), ("cls", 2), ("eos", 3), ("sep", 3))
    }
    settings = special | {
        "vocab_size": save_word_tokenizer(folder, WORDS),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **settings | changes)
    AutoModel.from_config(config).save_pretrained(folder)
    keep_own_fields(folder)
    return folder


def keep_own_fields(folder: Path) -> None:
    """transformers writes whatever it was given into config.json, also keys of other families."""
    path = folder / "config.json"
    given = json.loads(path.read_text())
    known = FAMILIES[given["model_type"]]
    known = {*known.served, *known.only, *known.harmless}
    path.write_text(json.dumps({name: value for name, value in given.items() if name in known}))


def save_llama(
    folder: Path, *, ends: bool = False, seed: int = 0, model_type: str = "llama", **changes
) -> Path:
    """Writes a Hugging Face folder: 2 layers, random weights, about a token a byte behind <s>.

    Args:
        ends: does the tokenizer put </s> behind every text?
        model_type: of another family that config.json has, with `changes`.
    """
    import torch  # here only: some tests run where there is none
    from transformers import AutoModelForCausalLM

    characters = [*pre_tokenizers.ByteLevel.alphabet()]
    merges = [("a", "n"), ("Ġ", "a"), ("n", "o"), ("y", "e"), ("ye", "s")]
    vocabulary = ["<s>", "</s>", *sorted(characters), *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<s> $A{' </s>' if ends else ''}", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=CHAT
    ).save_pretrained(folder)
    settings = {
        "vocab_size": 264,  # a few more than tokens, so that 8 devices can share them
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,
    }
    config = AutoConfig.for_model(model_type, **settings | changes)
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


# Of `save_llama`: families that go on a text in ways of their own, with texts up to 60 tokens.
GEMMA2 = {
    "model_type": "gemma2", "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 20,
    "attn_logit_softcapping": 3.0, "final_logit_softcapping": 8.0, "eos_token_id": 1,
}  # fmt: skip
PHI3 = {
    "model_type": "phi3", "pad_token_id": 0, "eos_token_id": 1, "sliding_window": 30,
    "original_max_position_embeddings": 40,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4,
        "short_factor": [1.0, 1.5], "long_factor": [1.5, 8.0],
    },
}  # fmt: skip


def letter_tokenizer(extra_words: int = 0) -> PreTrainedTokenizerFast:
    """WordPiece over single letters, digits and a few words, [CLS] text [SEP]."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *LETTERS, *"0123456789"]
    pieces += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    pieces += [f"word{i}" for i in range(extra_words)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    # As in some published tokenizers: padding and truncation are on, and must not matter.
    backend.enable_padding(length=40)
    backend.enable_truncation(40)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, sep_token="[SEP]", **special)


def random_batch(
    num_queries: int,
    group: int,
    seed: int = 0,
    query_length: int = 12,
    key_length: int = 16,
    *,
    devices: int = 1,
    rows: slice = slice(None),
    blocks: bool = False,
) -> Batch:
    """Texts of all lengths, teacher scores for three rows of four, keys that repeat, a teacher's
    vectors of save_bert's width.

    Args:
        rows: the queries to keep, with their keys.
        blocks: see `pack_padded`.
    """
    rng = np.random.default_rng(seed)

    def texts(count, width):
        ids = rng.integers(5, 5 + len(WORDS), (count, width), dtype=np.int32)
        lengths = rng.integers(2, width + 1, count, dtype=np.int32)
        return np.where(np.arange(width) < lengths[:, None], ids, 0).astype(np.int32), lengths

    names = rng.integers(0, num_queries * group * 2, num_queries * group)
    key_hash = np.stack([names, names * 7], 1).astype(np.uint32).reshape(num_queries, group, 2)
    has_scores = np.arange(num_queries) % 4 != 1
    scores = rng.normal(size=(num_queries, group)).astype(np.float32)
    queries = [x[rows] for x in texts(num_queries, query_length)]
    keys = texts(num_queries * group, key_length)
    keys = [x.reshape(num_queries, group, *x.shape[1:])[rows] for x in keys]
    keys = [x.reshape(-1, *x.shape[2:]) for x in keys]
    return Batch(
        {"texts": pack_padded({"query": queries, "key": keys}, devices, blocks=blocks)},
        np.where(has_scores[:, None], scores, 0).astype(np.float32)[rows],
        has_scores[rows],
        key_hash[rows].reshape(-1, 2),
        key_hash[rows, :1],
        rng.normal(size=(num_queries, 1 + group, 32)).astype(np.float32)[rows],
    )


def load_encoder(folder: Path) -> tuple[Architecture, dict]:
    """Configuration and parameters of an encoder of any family."""
    config = read_config(folder, ENCODERS)
    shapes = ENCODERS[config.model_type].abstract_params(config)
    return config, load_params(folder, shapes, config.names)


def random_ids(
    lengths: np.ndarray, width: int, *, pad: int = 1, vocab: int = 101
) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded token ids [B, width] of texts, and which of them are not padding."""
    ids = np.random.default_rng(0).integers(5, vocab, (len(lengths), width)).astype(np.int32)
    inside = np.arange(width) < lengths[:, None]
    return np.where(inside, ids, pad), inside


def rewrite(path: Path, **changes) -> None:
    """Changes fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def on_padded(
    hidden_states, config, dtype, remat, params, ids, lengths, key=None, second=None, first=False
):
    """A family's hidden states [B, _, D] of right-padded texts."""
    packing = padded(lengths, ids.shape[1], second, jnp.arange(len(ids)))
    hidden = hidden_states(
        config, dtype, remat, "plain", params, ids.reshape(-1), packing, key, first
    )
    return hidden.reshape(len(ids), -1, hidden.shape[-1])


def gradients_as_files(gradient, names, model, folder: Path) -> tuple[dict, dict]:
    """Ours and those of a torch model by the names that files have: transformers renames and splits
    some tensors when it loads them, and puts them back together."""
    for parameter in model.parameters():
        parameter.data = parameter.new_zeros(parameter.shape) + (
            0 if parameter.grad is None else parameter.grad
        )
    model.save_pretrained(folder / "gradient")
    save_params(folder / "ours.safetensors", gradient, names)
    ours = load_file(folder / "ours.safetensors")
    return ours, load_file(folder / "gradient" / "model.safetensors")


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).open()]


def text(rng: np.random.Generator, least: int = 2, most: int = 12) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(least, most + 1)))
