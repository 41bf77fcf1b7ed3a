"""AdamW, its schedule and clipping as the Hugging Face trainer sets them."""

import math
import re

import jax
import optax

from llme_jax.config import TrainConfig
from llme_jax.devices.sharding import path_name

NOT_DECAYED = r"(bias|scale)$"  # biases and LayerNorm weights


def schedule(config: TrainConfig, max_steps: int) -> optax.Schedule:
    """Learning rate of update n (from 0): linear warm-up from 0, then lr_scheduler_type.

    Update 0 has rate 0, as in transformers' get_linear_schedule_with_warmup.
    """
    peak = config.learning_rate
    if config.lr_scheduler_type == "constant":
        return optax.constant_schedule(peak)
    warmup = math.ceil(max_steps * config.warmup_ratio)
    after = max(max_steps - warmup, 1)
    decay = {
        "linear": optax.linear_schedule(peak, 0.0, after),
        "cosine": optax.cosine_decay_schedule(peak, after),
        "constant_with_warmup": optax.constant_schedule(peak),
    }[config.lr_scheduler_type]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


def make_optimizer(config: TrainConfig, max_steps: int) -> optax.GradientTransformation:
    """AdamW with clipping at max_grad_norm and no decay on biases and LayerNorm weights."""
    adamw = optax.adamw(
        schedule(config, max_steps),
        b1=config.adam_beta1,
        b2=config.adam_beta2,
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        mask=decayed,
    )
    if config.max_grad_norm <= 0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw)


def decayed(params):
    """True for every parameter that weight decay acts on."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not re.search(NOT_DECAYED, path_name(path)), params
    )
