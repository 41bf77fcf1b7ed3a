"""The keys of config.json, a table a family: read, served with one value, or harmless."""

from llme_jax.hugging_face.keys import Keys, keys

# Where another type would be taken for a value.
TYPES = {
    **dict.fromkeys(
        """
        attention_bias classifier_bias is_causal mlp_bias norm_bias position_biased_input
        relative_attention share_att_key tie_word_embeddings use_bidirectional_attention
        use_sliding_window
        """.split(),
        bool,
    ),
    **dict.fromkeys("local_attention max_window_layers sliding_window".split(), int),
    **dict.fromkeys(
        """
        attention_dropout classifier_dropout cls_dropout embedding_dropout initializer_range
        mlp_dropout norm_eps pooler_dropout seq_classif_dropout
        """.split(),
        float,
    ),
    **dict.fromkeys("norm_rel_ebd classifier_activation pooler_hidden_act".split(), str),
}

# What transformers writes into any config.json, and has written since its beginnings: names, ids of
# tokens, labels, how texts are written, what else is returned. The weights are read in float32.
_ANY = """
    architectures attn_implementation auto_map bad_words_ids begin_suppress_tokens bos_token
    bos_token_id chunk_size_feed_forward cls_token_id cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token eos_token_id export_model_type
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    gradient_checkpointing id2label label2id language length_penalty mask_token mask_token_id
    matryoshka_dimensions matryoshka_dims max_length max_sequence_length min_length model_max_length
    model_type name no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences
    output_attentions output_hidden_states output_past output_scores pad_token prefix problem_type
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    sbert_ce_default_activation_function sentence_transformers sep_token sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config transformers_version
    typical_p unk_token unk_token_id unsloth_fixed unsloth_version use_bfloat16 use_cache xla_device
    trust_remote_code initializer_factor
"""
_NEVER = {
    "is_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "quantization": (),
    "quantization_config": (),
}
_SIZES = """
    vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size
    max_position_embeddings initializer_range
"""
_BERT = (
    _SIZES
    + """
    hidden_act hidden_dropout_prob attention_probs_dropout_prob layer_norm_eps type_vocab_size
    classifier_dropout
"""
)
_FULL = {  # tokens see all of their text
    "add_cross_attention": (False,),
    "is_causal": (False,),
    "is_decoder": (False,),
    "position_embedding_type": ("absolute",),
}
_POOLER = """
    directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers
    pooler_size_per_head pooler_type tie_word_embeddings
"""
_LLAMA = (
    _SIZES
    + """
    head_dim hidden_act num_key_value_heads rms_norm_eps rope_parameters rope_scaling rope_theta
    is_causal tie_word_embeddings pad_token_id
"""
)
# Dropout is not applied; how products are split changes none.
_OF_LLAMA = """
    attention_dropout is_decoder is_llama_config pretraining_tp rope_interleaved
"""
_ONE_ROPE = {"partial_rotary_factor": (1.0,)}
_OF_GEMMA = _LLAMA.replace("hidden_act", "").replace("is_causal", "")
_GEMMA = """
    attention_bias attn_logit_softcapping final_logit_softcapping hidden_activation layer_types
    query_pre_attn_scalar sliding_window use_bidirectional_attention
"""


def _family(served: str, only: dict | None = None, harmless: str = "") -> Keys:
    only = _NEVER | (only or {})
    named = {*served.split(), *only}
    return keys(served, only, " ".join({*_ANY.split(), *harmless.split()} - named))


_ROBERTA = _family(_BERT + "pad_token_id", _FULL, _POOLER)
_QWEN = _LLAMA + "use_sliding_window sliding_window max_window_layers layer_types"
_NOMIC = _family(
    _BERT
    + """
    pad_token_id rope_parameters rope_scaling rope_theta head_dim n_embd n_layer n_head n_inner
    max_trained_positions layer_norm_epsilon resid_pdrop attn_pdrop activation_function
    rotary_emb_base
    """,
    {
        # Of nomic-ai's own code, which transformers 5 replaces.
        "causal": (False,),
        "layer_norm_type": ("layer_norm",),
        "mlp_fc1_bias": (False,),
        "mlp_fc2_bias": (False,),
        "moe_every_n_layers": (0,),
        "num_experts": (0,),
        "parallel_block": (False,),
        "position_embedding_type": ("absolute", "rotary"),
        "prenorm": (False,),
        "qkv_proj_bias": (False,),
        "rotary_emb_fraction": (1.0,),
        "rotary_emb_interleaved": (False,),
        "rotary_emb_scale_base": (),
        "scale_attn_by_inverse_layer_idx": (False,),
        "scale_attn_weights": (True,),
        "use_rms_norm": (False,),
    }
    | _ONE_ROPE,
    # Beyond max_trained_positions nothing is read.
    """
    dense_seq_output embd_pdrop expert_choice_router ffn_div fused_bias_fc fused_dropout_add_ln
    is_decoder last_layer_subset moe_impl moe_normalize_expert_weights moe_resid_pdrop moe_top_k
    n_positions num_shared_experts pad_vocab_size_multiple parallel_block_tied_norm
    reorder_and_upcast_attn rotary_scaling_factor router_aux_loss_coef summary_activation
    summary_first_dropout summary_proj_to_labels summary_type summary_use_proj tie_word_embeddings
    use_flash_attn use_xentropy
    """,
)
_GTE = (
    _BERT + "pad_token_id rope_parameters rope_scaling rope_theta head_dim",
    {
        # Of Alibaba-NLP's own code, which transformers 5 replaces.
        "layer_norm_type": ("layer_norm",),
        "logn_attention_scale": (False,),
        "pack_qkv": (True,),
        "position_embedding_type": ("rope",),
    }
    | _ONE_ROPE,
    """
    is_decoder logn_attention_clip1 tie_word_embeddings unpad_inputs use_memory_efficient_attention
    """,
)
# rope_parameters or rope_scaling; which of these count depends on the type.
ROPE = keys(
    """
    rope_type type rope_theta factor low_freq_factor high_freq_factor attention_factor beta_fast
    beta_slow long_factor mscale mscale_all_dim original_max_position_embeddings short_factor
    truncate
    """,
    _ONE_ROPE,
    "finetuned",
)
FAMILIES = {
    "bert": _family(_BERT, _FULL, _POOLER + "pad_token_id"),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "electra": _family(
        _BERT + "embedding_size",
        _FULL,
        """
        pad_token_id summary_activation summary_first_dropout summary_last_dropout
        summary_proj_to_labels summary_type summary_use_proj tie_word_embeddings
        """,
    ),
    "distilbert": _family(
        """
        vocab_size dim n_layers n_heads hidden_dim activation dropout attention_dropout
        max_position_embeddings seq_classif_dropout initializer_range
        """,
        {"is_decoder": (False,)},
        # Positions are in the file, however they were made.
        "pad_token_id qa_dropout sinusoidal_pos_embds tie_weights_ tie_word_embeddings",
    ),
    "mpnet": _family(
        _BERT.replace("type_vocab_size", "relative_attention_num_buckets"),
        {"is_decoder": (False,), "position_embedding_type": ("absolute",)},
        "pad_token_id tie_word_embeddings type_vocab_size",
    ),
    "deberta-v2": _family(
        _BERT
        + """
        embedding_size max_relative_positions norm_rel_ebd pooler_dropout pooler_hidden_act
        cls_dropout pos_att_type position_biased_input position_buckets share_att_key
        attention_head_size pooler_hidden_size
        """,
        {"conv_kernel_size": (0,), "is_decoder": (False,), "relative_attention": (True,)},
        "conv_act conv_groups legacy pad_token_id tie_word_embeddings",
    ),
    "modernbert": _family(
        _SIZES
        + """
        hidden_activation norm_eps norm_bias attention_bias mlp_bias layer_types local_attention
        global_attn_every_n_layers global_rope_theta local_rope_theta rope_parameters rope_scaling
        attention_dropout embedding_dropout mlp_dropout classifier_activation classifier_bias
        classifier_dropout classifier_pooling head_dim
        """,
        {"is_causal": (False,), "is_decoder": (False,)},
        """
        decoder_bias deterministic_flash_attn initializer_cutoff_factor layer_norm_eps pad_token_id
        position_embedding_type reference_compile repad_logits_with_grad sparse_pred_ignore_index
        sparse_prediction tie_word_embeddings
        """,
    ),
    "nomic_bert": _NOMIC,
    "gte": _family(*_GTE),
    "new": _family(*_GTE),
    "llama": _family(_LLAMA + "attention_bias mlp_bias", _ONE_ROPE, _OF_LLAMA),
    "mistral": _family(_LLAMA + "sliding_window", _ONE_ROPE, _OF_LLAMA + "attention_bias mlp_bias"),
    "qwen2": _family(
        _QWEN, {"use_mrope": (False,)} | _ONE_ROPE, _OF_LLAMA + "attention_bias mlp_bias"
    ),
    "qwen3": _family(_QWEN + " attention_bias", {"use_mrope": (False,)} | _ONE_ROPE, _OF_LLAMA),
    "phi3": _family(
        _LLAMA + "sliding_window original_max_position_embeddings partial_rotary_factor",
        {"full_attn_mod": (1,), "interpolate_factor": (1,), "lm_head_bias": (False,)},
        _OF_LLAMA + "attention_bias embd_pdrop mlp_bias resid_pdrop",
    ),
    "gemma2": _family(
        _OF_GEMMA + _GEMMA,
        {"is_causal": (), "sliding_window_pattern": (2,)} | _ONE_ROPE,
        _OF_LLAMA + "cache_implementation hidden_act",
    ),
    "gemma3_text": _family(
        _OF_GEMMA
        + _GEMMA.replace("attn_logit_softcapping", "")
        + " rope_local_base_freq sliding_window_pattern",
        {"attn_logit_softcapping": (), "is_causal": ()} | _ONE_ROPE,
        _OF_LLAMA + "cache_implementation hidden_act",
    ),
    "eurobert": _family(
        _LLAMA.replace("is_causal", "") + "attention_bias mlp_bias",
        {"is_causal": (False,)} | _ONE_ROPE,
        _OF_LLAMA + "classifier_pooling clf_pooling",
    ),
    "static_embedding": keys("model_type", harmless="architectures"),
    # https://github.com/MinishLab/model2vec
    "model2vec": keys(
        "model_type normalize max_length",
        harmless="""
        apply_pca apply_zipf architectures embedding_dtype hidden_dim pooling seq_length
        sif_coefficient tokenizer_name vocabulary_quantization
        """,
    ),
}
