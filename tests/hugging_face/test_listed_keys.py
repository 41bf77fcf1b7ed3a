"""docs/models.md lists the keys of a folder as the tables have them.

`python tests/hugging_face/test_listed_keys.py` writes the list there.
"""

import json
from pathlib import Path

from llme_jax.hugging_face import keys
from llme_jax.hugging_face.config_keys import FAMILIES, ROPE
from llme_jax.models.families import ENCODERS, LANGUAGE_MODELS

DOC = Path(__file__).parents[2] / "docs/models.md"
START = "## Every key of a folder\n"
INTRODUCTION = """
What a key of these files does here. *Read*: it decides what is computed. *One value*: only the
values that stand there are served, the usual one first, or no key. *No matter*: no vector and no
score depends on it. Any other key, and any other value, is refused by name before work starts: take
the key out if nothing depends on it. `null`, and a key that begins with `_`, are as no key.
"""
FILES = {
    "`modules.json`, each module": keys.MODULES,
    "`config_sentence_transformers.json`": keys.MODEL,
    "`sentence_bert_config.json`": keys.TRANSFORMER,
    "its `tokenizer_args`, `processor_kwargs`": keys.TOKENIZER_ARGUMENTS,
    "its `model_args`, `model_kwargs`": keys.MODEL_ARGUMENTS,
    "its `processing_kwargs`": keys.PROCESSING,
    "`config.json` of Pooling": keys.POOLING,
    "of Dense": keys.DENSE,
    "of LayerNorm": keys.LAYER_NORM,
    "of Normalize": keys.NORMALIZE,
    "`tokenizer_config.json`": keys.TOKENIZER,
    "`adapter_config.json`": keys.ADAPTER,
    "`rope_parameters`, `rope_scaling`": ROPE,
}
REMARKS = """
Keys of `config_args` and `config_kwargs` are those of `config.json`, which has to have them. The
rest of `tokenizer_config.json` and all of `tokenizer.json` is read by transformers and tokenizers
themselves; what `tokenizer.json` says of padding and truncation counts in static embeddings alone,
as in sentence-transformers.

`config.json`, by its `model_type`:
"""


def named(names) -> str:
    return " ".join(f"`{name}`" for name in sorted(names))


def values(only: dict) -> str:
    return ", ".join(
        f"`{name}` {' or '.join(map(json.dumps, only[name])) or 'null'}" for name in sorted(only)
    )


def row(name: str, table: keys.Keys, but: frozenset[str] = frozenset()) -> str:
    only = {key: of for key, of in table.only.items() if key not in but}
    parts = named(table.served), values(only), named(table.harmless - but)
    return f"| {name} | " + " | ".join(parts) + " |"


def listed() -> str:
    families: dict[keys.Keys, list[str]] = {}
    for name, table in FAMILIES.items():
        families.setdefault((table.served, *map(repr, table[1:])), []).append(name)
    of_all = [FAMILIES[name] for name in FAMILIES if name not in ("static_embedding", "model2vec")]
    common = frozenset.intersection(*(table.harmless for table in of_all))
    always = {
        key: of for key, of in of_all[0].only.items() if all(t.only.get(key) == of for t in of_all)
    }
    head = "| read | one value | no matter |\n|---|---|---|---|"
    rows = [
        row(", ".join(f"`{name}`" for name in names), FAMILIES[names[0]], common | always.keys())
        for names in families.values()
    ]
    return "\n".join(
        [
            START + INTRODUCTION,
            "| file " + head,
            *(row(name, table) for name, table in FILES.items()),
            REMARKS,
            "| model_type " + head,
            *rows,
            f"\nIn all of them but static embeddings, one value: {values(always)}. No matter: "
            f"{named(common)}.\n",
        ]
    )


def test_the_document_lists_them():
    text = DOC.read_text(encoding="utf-8")
    assert text[text.index(START) :] == listed(), f"python {Path(__file__).name} writes it anew"


def test_every_family_has_a_table():
    assert {*ENCODERS, *LANGUAGE_MODELS} == {*FAMILIES}


if __name__ == "__main__":
    text = DOC.read_text(encoding="utf-8")
    DOC.write_text(text[: text.find(START)] + listed(), encoding="utf-8")
