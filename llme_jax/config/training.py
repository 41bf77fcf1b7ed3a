"""Settings of training: the loss, the optimizer, checkpoints, logging."""

from dataclasses import dataclass
from typing import Literal

from llme_jax.config.setting import Group, setting

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
REPORTS = ("none", "tensorboard", "wandb", "trackio")


@dataclass(unsafe_hash=True)
class DistillConfig(Group):
    """What is minimised: learning from the positive, from teacher scores, or from both."""

    title = "loss"

    contrastive_weight: float = setting(
        0.2, "Weight of the contrastive loss.", decides="weights", least=0
    )
    distill_weight: float = setting(
        1.0, "Weight of the distillation loss.", decides="weights", least=0
    )
    stable_distill: bool = setting(
        False,
        "Distil by contrastive terms, ranked by the teacher, instead of KL divergence.",
        decides="weights",
    )
    distill_loss: Literal["kl", "margin_mse"] = setting(
        "kl",
        "How teacher scores are distilled without --stable_distill: kl compares distributions; "
        "margin_mse by how much the positive scores above each negative.",
        decides="weights",
    )
    teacher_temperature: float = setting(1.0, "Divides teacher scores.", decides="weights", above=0)
    student_temperature: float = setting(
        1.0, "Divides the model's scores when distilling.", decides="weights", above=0
    )


@dataclass
class LossConfig(DistillConfig):
    """What is minimised over the global batch; one for every dataset (its recipe)."""

    cos_temperature: float = setting(
        0.01, "Divides cosine similarities.", decides="weights", above=0
    )
    negative_cross_device: bool = setting(
        True,
        "Use the keys of all devices as negatives; false: only the device's own.",
        decides="weights",
    )
    mask_false_negatives: bool = setting(
        True,
        "Do not count a query's known positives among its in-batch negatives.",
        decides="weights",
    )
    contrastive_directions: list[str] = setting(
        ["query_to_doc"],
        "What the pair of query and positive is told from: the query with other keys "
        "(query_to_doc, always) or other queries (query_to_query), the positive with other queries "
        "(doc_to_query) or their keys (doc_to_doc).",
        decides="weights",
        choices=DIRECTIONS,
    )
    partition_mode: Literal["joint", "per_direction"] = setting(
        "joint",
        "One softmax over all --contrastive_directions, or one for each and the mean of the losses "
        "(for query_to_doc and doc_to_query only).",
        decides="weights",
    )
    false_negative_margin: float | None = setting(
        None,
        "Take keys that score above (the query's positive - this) for known positives; scores are "
        "the model's, before --cos_temperature.",
        decides="weights",
    )
    hardness_mode: Literal["in_batch_negatives", "hard_negatives", "all_negatives"] | None = (
        setting(
            None,
            "Which negatives weigh more the higher they score: other queries' keys, the query's "
            "own, or both.",
            decides="weights",
        )
    )
    hardness_strength: float = setting(
        0.0,
        "What a negative's score is multiplied with, and added to its logit.",
        decides="weights",
        least=0,
    )
    spread_weight: float = setting(
        0.0,
        "Weight of a term that spreads the queries' vectors, and the keys', over the sphere.",
        decides="weights",
        least=0,
    )
    teacher_encoder: str | None = setting(
        None,
        "Hub name or folder of an encoder whose vectors of queries and keys are to be learnt.",
        decides="weights",
        unit="MODEL",
        reads="model",
    )
    embedding_weight: float = setting(
        0.0,
        "Weight of the mean squared difference from the vectors of --teacher_encoder.",
        decides="weights",
        least=0,
    )
    matryoshka_dims: list[int] | None = setting(
        None,
        "Train the first numbers of the vectors, as many as each of these says, to do alone "
        "(Matryoshka): the loss is the sum over them [all numbers].",
        decides="weights",
        unit="NUMBERS",
        least=1,
    )
    matryoshka_weights: list[float] | None = setting(
        None,
        "Weight of each of --matryoshka_dims in the sum [1].",
        decides="weights",
        unit="WEIGHT",
        above=0,
    )

    def __hash__(self) -> int:  # lists have none
        return hash(repr(self))


@dataclass
class OutputConfig(Group):
    """Where results go, and what chance decides."""

    output_dir: str = setting(
        "data/outputs/",
        "Where results, checkpoints and metrics go.",
        decides="nothing",
        unit="FOLDER",
        may_change=True,
    )
    seed: int = setting(
        42,
        "Seeds everything random: data order, keys, dropout, random hits.",
        decides=("hits", "weights"),
        least=-(2**63),
        most=2**63 - 1,  # of 64 bits, as jax takes them
    )


@dataclass
class TrainConfig(OutputConfig):
    """Optimisation, checkpoints, logging."""

    title = "training"

    max_steps: int = setting(
        -1,
        "Optimizer steps; -1: as many as --num_train_epochs makes.",
        decides="weights",
        unit="STEPS",
        least=-1,
    )
    num_train_epochs: float = setting(
        3.0, "Passes over the data.", decides="weights", unit="EPOCHS", least=0
    )
    early_exit_steps: int | None = setting(
        None,
        "Stop after this step; the learning rate's schedule stays as it is.",
        decides="weights",
        unit="STEPS",
        least=1,
        may_change=True,
    )
    per_device_train_batch_size: int = setting(
        16,
        "Queries a device has in one batch.",
        decides="weights",
        unit="QUERIES",
        least=1,
        may_change=True,
    )
    gradient_accumulation_steps: int = setting(
        1,
        "Batches whose gradients are averaged into one step.",
        decides="weights",
        unit="BATCHES",
        least=1,
    )
    sub_batch_size: int | None = setting(
        None,
        "Encode this many texts a device at a time (GradCache): the same gradient in less memory.",
        decides="nothing",
        unit="TEXTS",
        least=1,
        may_change=True,
    )
    sub_batch_tokens: int | None = setting(
        None,
        "As --sub_batch_size, by tokens, padding counted: many short texts or few long ones at a "
        "time.",
        decides="nothing",
        unit="TOKENS",
        least=1,
        may_change=True,
    )
    gradient_checkpointing: bool = setting(
        False,
        "Recompute activations in the backward pass: less memory, more time.",
        decides="nothing",
        may_change=True,
    )
    fsdp: int = setting(
        1,
        "Spread parameters and optimizer state over this many devices.",
        decides="nothing",
        unit="DEVICES",
        least=1,
        may_change=True,
    )
    lora_rank: int | None = setting(
        None,
        "Train adapters of this rank beside frozen weights (LoRA) [all weights are trained].",
        decides="weights",
        least=1,
    )
    lora_alpha: float = setting(
        16.0, "Adapters count alpha / rank times.", decides="weights", above=0
    )
    lora_target: list[str] | None = setting(
        None,
        "Modules that get an adapter, by the ends of their names, as q_proj v_proj [all linear "
        "maps].",
        decides="weights",
        unit="MODULE",
    )
    learning_rate: float = setting(5e-6, "Peak learning rate.", decides="weights", above=0)
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = setting(
        "linear", "Learning rate after the warm-up.", decides="weights"
    )
    warmup_ratio: float = setting(
        0.1, "Share of the steps that warms up.", decides="weights", least=0, most=1
    )
    weight_decay: float = setting(
        0.01,
        "AdamW's decay; biases and LayerNorm weights do not decay.",
        decides="weights",
        least=0,
    )
    adam_beta1: float = setting(0.9, "AdamW's beta 1.", decides="weights", least=0, below=1)
    adam_beta2: float = setting(0.999, "AdamW's beta 2.", decides="weights", least=0, below=1)
    adam_epsilon: float = setting(1e-8, "AdamW's epsilon.", decides="weights", above=0)
    max_grad_norm: float = setting(
        1.0, "Clip gradients to this global norm; 0: do not clip.", decides="weights", least=0
    )
    save_steps: int = setting(
        2000, "Steps between checkpoints.", decides="files", unit="STEPS", least=1, may_change=True
    )
    save_total_limit: int | None = setting(
        None,
        "Keep this many checkpoints, the newest, and the best besides [all].",
        decides="files",
        unit="CHECKPOINTS",
        least=1,
        may_change=True,
    )
    eval_steps: int | None = setting(
        None,
        "Steps between evaluations [save_steps].",
        decides="files",
        unit="STEPS",
        least=1,
        may_change=True,
    )
    eval_on_start: bool = setting(
        False, "Evaluate before the first step too.", decides="files", may_change=True
    )
    metric_for_best_model: str | None = setting(
        None,
        "Metric that picks the best checkpoint [ndcg@10, else the first one measured].",
        decides="files",
        unit="METRIC",
        may_change=True,
    )
    logging_steps: int = setting(
        100,
        "Steps between lines of metrics.jsonl.",
        decides="nothing",
        unit="STEPS",
        least=1,
        may_change=True,
    )
    report_to: list[str] = setting(
        ["none"],
        "Where else metrics go, one or several.",
        decides="nothing",
        choices=REPORTS,
        may_change=True,
    )
    push_to_hub: str | None = setting(
        None,
        "Upload the best (else the last) model to the Hugging Face Hub when training has ended.",
        decides="files",
        unit="OWNER/NAME",
        may_change=True,
    )
    hub_private: bool = setting(
        True, "A repository that --push_to_hub makes is private.", decides="files", may_change=True
    )
