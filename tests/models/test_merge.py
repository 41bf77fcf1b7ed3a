"""Averages against torch over the same files; what sentence-transformers makes of the result."""

import json
import re

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

from llme_jax import merge
from llme_jax.config import EncoderConfig
from llme_jax.errors import InputError
from llme_jax.models.dual_encoder import load_dual_encoder, save_dual_encoder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base as others publish it, and an encoder of ours that was made from it."""
    folder = tmp_path_factory.mktemp("models")
    tiny.save_bert(folder / "base")
    config = EncoderConfig(query_encoder=str(folder / "base"), pooling_method=["mean", "dense"])
    encoder, params, tokenizer = load_dual_encoder(config)
    rng = np.random.default_rng(1)
    params = {
        "encoder": _moved(params["encoder"], rng),
        "dense_pooler": params["dense_pooler"],
    }
    lengths = {"query_max_length": 24, "key_max_length": 32, "prompts": {"query": "w1 "}}
    save_dual_encoder(folder / "dense", encoder, params, tokenizer, **lengths)
    config.pooling_method = ["mean"]
    encoder, _, _ = load_dual_encoder(config)
    save_dual_encoder(
        folder / "tuned", encoder, {"encoder": params["encoder"]}, tokenizer, **lengths
    )
    tiny.save_bert(folder / "wider", width=64)
    (folder / "tuned/encoder/README.md").write_text("what it was trained on")
    return folder


def _moved(tree, rng):
    if isinstance(tree, dict):
        return {name: _moved(leaf, rng) for name, leaf in tree.items()}
    return (tree + rng.normal(0, 0.1, tree.shape)).astype(np.float32)


def weights(folder) -> dict[str, torch.Tensor]:
    return dict(AutoModel.from_pretrained(folder, add_pooling_layer=False).state_dict())


@pytest.mark.parametrize("share", [0.5, 0.3])
def test_each_weight_is_the_average(models, tmp_path, share, capsys):
    both = [str(models / "tuned/encoder"), str(models / "base")]
    flags = ["--weights", str(share), str(1 - share)] if share != 0.5 else []
    merge.main([*both, *flags, "--output_dir", str(tmp_path)])
    assert capsys.readouterr().out == f"encoder: {tmp_path}/encoder\n"
    tuned, base, found = map(weights, (*both, tmp_path / "encoder"))
    assert found.keys() == base.keys()
    for name in base:  # rounded to float32 once
        torch.testing.assert_close(
            found[name], share * tuned[name] + (1 - share) * base[name], rtol=1e-6, atol=1e-7
        )


def test_the_rest_is_the_first_ones(models, tmp_path):
    merge.main([str(models / "tuned/encoder"), str(models / "base"), "--output_dir", str(tmp_path)])
    first = SentenceTransformer(str(models / "tuned/encoder"))
    found = SentenceTransformer(str(tmp_path / "encoder"))
    assert [type(m) for m in found] == [type(m) for m in first] and found.prompts == first.prompts
    assert found.max_seq_length == first.max_seq_length == 32
    assert not (tmp_path / "encoder/README.md").exists()
    vectors = found.encode(["w1 w2 w3", "w4"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_a_dense_pooler_is_averaged_too(models, tmp_path):
    dense = str(models / "dense/encoder")
    merge.main([dense, dense, "--output_dir", str(tmp_path)])
    for path in ("model.safetensors", "2_Dense/model.safetensors"):
        before, after = (load_file(f"{folder}/{path}") for folder in (dense, tmp_path / "encoder"))
        for name in before:
            torch.testing.assert_close(after[name], before[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["base"], "name two encoders or more"),
        (["base", "wider"], "wider: another architecture than base; give encoders of one base"),
        (["base", "dense/encoder"], "other layers behind pooling than base"),
        (["base", "base", "--weights", "1"], "--weights 1.0: give 2, one for each model"),
        (["base", "base", "--weights", "1", "1"], "--weights 1.0 1.0: they add up to 2, not to 1"),
        (["base", "./nowhere"], "./nowhere: no such folder"),
    ],
)
def test_bad_input(models, argv, said, monkeypatch):
    monkeypatch.chdir(models)
    with pytest.raises(InputError, match=re.escape(said)):
        merge.main([*argv, "--output_dir", "out"])
    assert not (models / "out").exists()


def test_no_model_is_written_into_or_over(models, tmp_path, monkeypatch):
    monkeypatch.chdir(models)
    (tmp_path / "file").mkdir()
    (tmp_path / "file/encoder").write_text("mine")
    before = sorted(models.rglob("*"))
    merged = ["base", "tuned/encoder"]
    places = "base tuned base/inside tuned/encoder/x dense dense/encoder wider".split()
    for out in (*places, tmp_path / "file"):
        with pytest.raises(InputError, match=f"^--output_dir {out}: .*: give another folder$"):
            merge.main([*merged, "--output_dir", str(out)])
    assert sorted(models.rglob("*")) == before
    assert [*tmp_path.rglob("*")] == [tmp_path / "file", tmp_path / "file/encoder"]
    for _ in range(2):  # its own result is replaced
        merge.main([*merged, "--output_dir", str(tmp_path / "out")])
    with pytest.raises(InputError, match=r"--output_dir .*/out: .*which is merged"):
        merge.main(["base", str(tmp_path / "out/encoder"), "--output_dir", str(tmp_path / "out")])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"encoder", "merge.json"}


def test_another_vocabulary_is_refused(models, tmp_path, monkeypatch):
    monkeypatch.chdir(models)
    tiny.save_bert(tmp_path / "other")
    tokenizer = json.loads((tmp_path / "other/tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["w0"], vocabulary["w1"] = vocabulary["w1"], vocabulary["w0"]
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="another vocabulary than base"):
        merge.main(["base", str(tmp_path / "other"), "--output_dir", str(tmp_path / "out")])
