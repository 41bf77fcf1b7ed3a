"""Reranking with a language model that answers yes or no, against transformers."""
# ruff: noqa: F811

import json

import numpy as np
import pytest
import tiny
import torch
import transformers
from test_rank import arguments, candidates, cross, output, rows  # noqa: F401

from llme_jax import rank
from llme_jax.errors import InputError


def test_a_language_model_that_answers_yes_or_no(arguments, rows, tmp_path):
    """Against transformers, prompt by prompt; the key's end is cut."""
    folder = tiny.save_llama(tmp_path / "llama")
    limit = ["--query_max_length", "100", "--key_max_length", "100"]
    given = ["--ranker", str(folder), "--ranker_method", "yes-no", "--yes_no_instruction", "Find."]
    rank.main([*arguments, *given, *limit])
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    system = (
        "Judge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".'
    )

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def one(query, key):
        prompt = encode(f"<Instruct>: Find.\n<Query>: {query}\n<Document>: {key}")[:200]
        ids = encode(f"<system>{system}\n<user>") + prompt + encode("\n<answer>")
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        (yes,), (no,) = encode("yes"), encode("no")
        return float(logs[yes] - logs[no])

    for row, given in zip(output(tmp_path, "scored"), rows, strict=True):
        want = [one(given["query"], key) for key in candidates(given)[0]]
        np.testing.assert_allclose(row["teacher_scores"], want, atol=1e-5)


def test_what_a_language_model_lacks_is_said(arguments, tmp_path):
    folder = tiny.save_llama(tmp_path / "llama")
    given = [*arguments, "--ranker", str(folder), "--ranker_method", "yes-no"]
    with pytest.raises(InputError, match="llama reads 1024; give less"):
        rank.main([*given, "--key_max_length", "1000"])
    vocabulary = folder / "tokenizer.json"
    tokenizer = json.loads(vocabulary.read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:2]
    vocabulary.write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="llama: writes yes in 3 tokens; give a model with one"):
        rank.main(given)
    for path in (folder / "tokenizer_config.json", folder / "chat_template.jinja"):
        if path.exists() and path.suffix == ".jinja":
            path.unlink()
        elif path.exists():
            config = json.loads(path.read_text())
            config.pop("chat_template", None)
            path.write_text(json.dumps(config))
    with pytest.raises(InputError, match="llama: has no chat template, which --ranker_method"):
        rank.main(given)
