"""One table for each JSON file of a model folder: what is done with every key that it may have.

A key of no table, or with a value that is not served, is refused by name: were it ignored, the
vectors or scores would be others without a word. docs/models.md lists the tables.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from llme_jax.errors import InputError


class Keys(NamedTuple):
    """The keys of one file.

    Attributes:
        served: read; they decide what is computed.
        only: those of which some values are served, the usual one first.
        harmless: they change no vector and no score.
    """

    served: frozenset[str]
    only: Mapping[str, tuple]
    harmless: frozenset[str]

    def check(self, path: Path, given: dict) -> None:
        """Refuses what would be computed otherwise elsewhere; null is as good as no key.

        Raises:
            InputError: names the file, the key, its value and the remedy.
        """
        for key, value in given.items():
            if value is None or key.startswith("_") or key in self.served | self.harmless:
                continue
            if key not in self.only:
                raise InputError(
                    f"{path}: {key} {_shown(value)} is not known here; if nothing that is computed "
                    "depends on it, take it out of the file, else give another model"
                )
            if value not in self.only[key]:
                usual = " or ".join(map(json.dumps, self.only[key])) or "null"
                raise InputError(
                    f"{path}: {key} {_shown(value)} is not served; give a model with {usual}"
                )


def keys(served: str, only: Mapping[str, tuple] | None = None, harmless: str = "") -> Keys:
    """A table; names are separated by blanks."""
    return Keys(frozenset(served.split()), only or {}, frozenset(harmless.split()))


def _shown(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


# modules.json: the keys of each module.
MODULES = keys("type path", harmless="idx name kwargs")

# config_sentence_transformers.json.
MODEL = keys(
    "model_type prompts default_prompt_name similarity_fn_name truncate_dim",
    harmless="__version__ activation_fn keep_in_fp32_modules requirements",
)

# sentence_bert_config.json, of a Transformer. Under two names each are what goes to transformers'
# classes of the tokenizer and of config.json, whose own tables follow.
TRANSFORMER = keys(
    "max_seq_length do_lower_case transformer_task modality_config module_output_name "
    "processing_kwargs query_length document_length tokenizer_args processor_kwargs config_args "
    "config_kwargs model_args model_kwargs",
    {"query_expansion": (), "tokenizer_name_or_path": ()},
    harmless="unpad_inputs backend",
)
# What the tokenizer is opened with.
TOKENIZER_ARGUMENTS = keys(
    "add_bos_token add_eos_token add_prefix_space additional_special_tokens bos_token "
    "cls_token do_lower_case eos_token extra_special_tokens mask_token model_max_length pad_token "
    "sep_token strip_accents tokenize_chinese_chars truncation_side unk_token",
    {"split_special_tokens": (False,)},
    harmless="clean_up_tokenization_spaces legacy local_files_only padding_side revision token "
    "trust_remote_code use_fast",
)
# What the model is opened with: all of it is read in float32.
MODEL_ARGUMENTS = keys(
    "",
    harmless="add_pooling_layer attn_implementation device_map dtype local_files_only "
    "low_cpu_mem_usage revision token torch_dtype trust_remote_code use_safetensors",
)
# What the chat template and the tokenizer are called with.
PROCESSING = keys("chat_template", harmless="audio image video")

# config.json of Pooling.
POOLING = keys(
    "pooling_mode include_prompt pooling_mode_cls_token pooling_mode_mean_tokens "
    "pooling_mode_lasttoken pooling_mode_max_tokens pooling_mode_mean_sqrt_len_tokens "
    "pooling_mode_weightedmean_tokens",
    harmless="embedding_dimension word_embedding_dimension",
)
# Of Dense and LayerNorm. The score of a reranker is what its last Dense puts out.
DENSE = keys(
    "in_features out_features bias activation_function",
    {
        "module_input_name": ("sentence_embedding",),
        "module_output_name": ("sentence_embedding", "scores"),
        "use_residual": (False,),
    },
)
LAYER_NORM = keys("dimension")
NORMALIZE = keys(
    "",
    {
        "module_input_name": ("sentence_embedding",),
        "module_output_name": ("sentence_embedding",),
    },
)

# tokenizer_config.json: transformers' own class of the tokenizer reads all of it, as elsewhere; of
# its attributes these are used.
TOKENIZER = keys(
    "tokenizer_class truncation_side model_max_length chat_template",
    {"split_special_tokens": (False,)},
)

# adapter_config.json.
ADAPTER = keys(
    "base_model_name_or_path r lora_alpha use_rslora rank_pattern alpha_pattern",
    {
        "peft_type": ("LORA",),
        # Others start from changed weights of the base.
        "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
        "bias": ("none",),
        "use_dora": (False,),
        "lora_bias": (False,),
        "layer_replication": (),
        "megatron_config": (),
        "trainable_token_indices": (),
        "target_parameters": (),
        "use_qalora": (False,),
        "arrow_config": (),
        "alora_invocation_tokens": (),
        "use_bdlora": (),
        "monteclora_config": (),
        "velora_config": (),
        "kasa_config": (),
    },
    # Which modules have adapters, their file says.
    harmless="auto_mapping corda_config ensure_weight_tying eva_config exclude_modules "
    "fan_in_fan_out inference_mode layers_pattern layers_to_transform loftq_config lora_dropout "
    "lora_ga_config megatron_core modules_to_save peft_version qalora_group_size revision "
    "runtime_config target_modules task_type",
)
