"""Adapters that peft saved, beside weights or alone: its vectors, or a refusal."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import peft
import pytest
import tiny
import torch
import transformers
from folder_edits import edit, tally
from safetensors.numpy import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from llme_jax import Encoder, Reranker
from llme_jax.config import Config
from llme_jax.errors import InputError
from llme_jax.lm.generation import stop_tokens
from llme_jax.models.causal_lm import open_causal_lm
from llme_jax.sources.resolve import Files
from llme_jax.training.dual import open_dual

TEXTS = ["w1 w2 w3", "w7", " ".join(f"w{i}" for i in range(20)), "a [PAD] b"]
BASE = {
    "bert": partial(tiny.save_bert, positions=96),
    "llama": partial(tiny.save_llama, is_causal=False),
}
LINEAR = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}
CONFIG = "adapter_config.json"
LORA = {
    "usual": {},
    "all layers": {"target_modules": "all-linear"},
    "rank-stabilised": {"use_rslora": True, "r": 9},
    "ranks by pattern": {"rank_pattern": {"query": 2, "v_proj": 5}, "lora_alpha": 3},
    "alphas by pattern": {"alpha_pattern": {"value": 2, r"layers.1.self_attn.q_proj": 5}},
    "one module": {"target_modules": r".*1.*(query|q_proj)"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "weight-decomposed": {"use_dora": True},
    "biases": {"bias": "all"},
    "a bias of its own": {"lora_bias": True},
    "words": {"target_modules": ["word_embeddings", "embed_tokens"]},
    "words saved whole": {"modules_to_save": ["word_embeddings", "embed_tokens"]},
    "a layer saved whole": {"modules_to_save": ["LayerNorm", "norm"]},
    "dropout": {"lora_dropout": 0.5},
}
OTHERS = {
    "ia3": lambda kind: peft.IA3Config(
        target_modules=LINEAR[kind], feedforward_modules=[], task_type="FEATURE_EXTRACTION"),
    "loha": lambda kind: peft.LoHaConfig(target_modules=LINEAR[kind]),
    "prefix": lambda kind: peft.PrefixTuningConfig(
        task_type="FEATURE_EXTRACTION", num_virtual_tokens=3),
}  # fmt: skip
EDITS = {
    "unknown key": edit(CONFIG, my_lora_scale=2.0),
    "older": lambda folder: _keep(folder / CONFIG, "base_model_name_or_path peft_type r lora_alpha "
                                  "target_modules lora_dropout bias task_type"),
    "no base": edit(CONFIG, base_model_name_or_path=None),
    "base of another place": edit(CONFIG, base_model_name_or_path="/no/such/base"),
    "a half is missing": lambda folder: _without(folder, "lora_A"),
    "no weights": lambda folder: (folder / "adapter_model.safetensors").unlink(),
}  # fmt: skip
CASES = [*LORA, *OTHERS, *EDITS]
MUST_BE_SERVED = {"usual", "all layers", "rank-stabilised", "ranks by pattern", "older", "dropout",
                  "alphas by pattern", "one module", "a layer saved whole"}  # fmt: skip


def _keep(path: Path, names: str) -> None:
    given = json.loads(path.read_text())
    path.write_text(json.dumps({name: given[name] for name in names.split()}))


def _without(folder: Path, part: str) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if part not in n}, path)


def save_adapter(model: torch.nn.Module, config: peft.PeftConfig, out: Path) -> None:
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(out)


def vectors(base: Path, adapter: Path | None = None) -> np.ndarray | None:
    """The last token's; None where peft cannot open the adapter."""
    model = transformers.AutoModel.from_pretrained(base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    try:
        model = peft.PeftModel.from_pretrained(model, adapter) if adapter else model
        with torch.no_grad():
            inputs = [tokenizer(text, return_tensors="pt") for text in TEXTS]
            return np.stack([model.eval()(**i).last_hidden_state[0, -1].numpy() for i in inputs])
    except Exception:
        return None


def check(tmp: Path, kind: str, name: str, beside: bool) -> str:
    """`same` or `refused`; fails where something else is computed."""
    base, out = BASE[kind](tmp / "base"), tmp / "adapter"
    model = transformers.AutoModel.from_pretrained(base)
    lora = {"target_modules": LINEAR[kind], "r": 4, "lora_alpha": 8} | LORA.get(name, {})
    config = OTHERS[name](kind) if name in OTHERS else peft.LoraConfig(**lora)
    save_adapter(model, config, out)
    if beside:
        shutil.copytree(base, out, dirs_exist_ok=True)
    if name in EDITS:
        EDITS[name](out)
    wanted = vectors(base, out)
    try:
        how = {"pooling_method": ["last_token"], "dense_metric": "ip", "query_max_length": 96}
        encoder = Encoder.load(out, dtype="fp32", **how)
        found = encoder.encode(TEXTS, kind="query")
    except InputError as error:
        assert "\n" not in str(error) and str(out) in str(error)
        assert name not in MUST_BE_SERVED, error
        return "refused"
    assert wanted is not None, "peft refuses it"
    np.testing.assert_allclose(found, wanted, atol=1e-5 * max(1, np.abs(wanted).max()))
    assert np.abs(found - vectors(base)).max() > 1e-3
    return "same"


@pytest.mark.parametrize(
    "kind, name, beside",
    [("bert", "ranks by pattern", False), ("llama", "rank-stabilised", True),
     ("bert", "weight-decomposed", True), ("llama", "a layer saved whole", False)],
)  # fmt: skip
def test_an_adapter_counts(tmp_path, kind, name, beside):
    check(tmp_path, kind, name, beside)


@pytest.mark.slow
@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("kind", BASE)
def test_every_adapter_counts_or_is_refused(tmp_path, kind, beside):
    seen = tally(check, ((tmp_path / name, kind, name, beside) for name in CASES))
    assert seen["same"] > 8 and seen["refused"] > 8


def test_a_folder_of_sentence_transformers_with_an_adapter_alone(tmp_path):
    """Its modules are in the adapter's folder, the weights elsewhere."""
    base, out = tiny.save_bert(tmp_path / "base", positions=96), tmp_path / "out"
    how = [Transformer(str(base), max_seq_length=30), Pooling(32, "mean")]
    model = SentenceTransformer(modules=how, device="cpu", prompts={"query": "w9 "})
    model.save(str(out), create_model_card=False)
    for name in ("config.json", "model.safetensors"):
        (out / name).unlink()
    whole = transformers.AutoModel.from_pretrained(base)
    save_adapter(whole, peft.LoraConfig(target_modules=["query"]), out)
    whole = peft.PeftModel.from_pretrained(transformers.AutoModel.from_pretrained(base), out)
    how[0].model = whole.merge_and_unload()
    wanted = np.stack([model.encode_query(text, normalize_embeddings=True) for text in TEXTS])
    how = {"dtype": "fp32", "version": "model", "add_instruction": True}
    found = Encoder.load(out, **how).encode(TEXTS, kind="query")
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    config = Config()
    config.encoder.query_encoder, config.training.lora_rank = str(out), 2
    with pytest.raises(InputError, match=r"^--lora_rank: .*out has an adapter already, .* merge"):
        open_dual(config, Files({}))


def test_a_classifier_with_its_head(tmp_path):
    """What LoRA leaves of a reranker: adapters, and a head that was trained whole."""
    base = tiny.save_bert(tmp_path / "base", positions=96)
    kind = transformers.AutoModelForSequenceClassification
    model = kind.from_pretrained(base, num_labels=1)
    model.save_pretrained(base)  # with the pooler, which is not an adapter's
    save_adapter(model, peft.LoraConfig("SEQ_CLS", target_modules=["key"]), tmp_path / "out")
    shutil.copytree(base, tmp_path / "out", dirs_exist_ok=True)
    pairs = [("w1 w2", "w3"), ("w4", "w5 w6 w7")]
    whole = peft.PeftModel.from_pretrained(kind.from_pretrained(base, num_labels=1),
                                           tmp_path / "out").eval()  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    with torch.no_grad():
        wanted = [whole(**tokenizer(*pair, return_tensors="pt")).logits.item() for pair in pairs]
    found = Reranker.load(
        tmp_path / "out", dtype="fp32", query_max_length=40, key_max_length=40
    ).score(pairs)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_language_model_with_an_adapter_of_an_adapter(tmp_path):
    base = tiny.save_llama(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    save_adapter(model, peft.LoraConfig(target_modules=["q_proj"]), tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    edit(CONFIG, base_model_name_or_path=str(tmp_path / "first"))(tmp_path / "second")
    edit("generation_config.json", eos_token_id=7)(base)
    lm, folder, tokenizer = open_causal_lm(str(tmp_path / "first"), dtype="fp32", cache_dir=None)
    assert stop_tokens(folder, tokenizer, lm.config.vocab_size)[7]
    with pytest.raises(InputError, match=r"first is an adapter itself, .* merge that one into"):
        open_causal_lm(str(tmp_path / "second"), dtype="fp32", cache_dir=None)
