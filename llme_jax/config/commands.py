"""Every setting once: its type, its default and its help.

Settings live in groups that commands share; names are unique across the groups of a command, so
each is also a flag (`--max_steps 2000`). Names and defaults are those of LLM-Embedder's
`src/retrieval/args.py` and of the Hugging Face trainer wherever they have one.
"""

from dataclasses import asdict, dataclass, field, fields
from typing import Literal

from llme_jax.errors import InputError

METRICS = ("mrr", "recall", "ndcg", "nq")
COLLATIONS = ("collate_key", "collate_neg")  # written by the retrieve command among its metrics
NQ_CUTOFFS = (1, 5, 10, 20, 100)  # where nq measures answer recall, whatever --cutoffs says
POOLINGS = ("cls", "mean", "dense")
DATA_ROOT = "/data/llm-embedder"
DATA_ROOT_HELP = "Folder that paths beginning with 'llm-embedder:' are relative to."
SOURCES_HELP = "tfds:NAME/CONFIG:SPLIT or gs://bucket/file"
DTYPE_HELP = "Compute in auto (bf16 on TPU/GPU, fp32 on CPU), fp32 or bf16."


def _setting(default, help: str):
    """A dataclass field with a help text; lists are copied for every instance."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class TextConfig:
    """What is retrieved from what, and how texts become tokens."""

    _argument_group_name = "data"

    data_root: str = _setting(DATA_ROOT, DATA_ROOT_HELP)
    eval_data: str | None = _setting(
        None, f"JSON-lines file with the queries to evaluate on; also {SOURCES_HELP}."
    )
    corpus: str | None = _setting(
        None, f"JSON-lines file with the passages to search; also {SOURCES_HELP}."
    )
    key_template: str = _setting(
        "{title} {text}", "How the fields of a corpus line become the text of one key."
    )
    version: Literal["bge", "llm-embedder", "e5", "instructor"] = _setting(
        "bge", "Which table of instructions (and of training recipes) to use."
    )
    add_instruction: bool = _setting(True, "Put the task's instruction before queries and keys?")
    query_max_length: int = _setting(256, "Tokens a query keeps at most, special tokens included.")
    key_max_length: int = _setting(256, "Tokens a key keeps at most, special tokens included.")
    truncation_side: Literal["right", "left"] = _setting("right", "The side that is cut off.")
    dataset_cache_dir: str | None = _setting(
        None, "Folder for tokenised data [~/.cache/llme_jax or $LLME_JAX_CACHE]."
    )


@dataclass
class DataConfig(TextConfig):
    """Which rows to train on, and which keys to take from them."""

    train_data: list[str] | None = _setting(
        None, f"One or more JSON-lines files or globs to train on; also {SOURCES_HELP}."
    )
    train_group_size: int = _setting(8, "Keys a query is trained with: 1 positive, the rest not.")
    select_positive: Literal["first", "random", "teacher", "teacher-pos"] = _setting(
        "first", "Which positive becomes key 0; teacher: the best-scored of pos + neg."
    )
    select_negative: Literal["random", "first", "teacher+", "teacher-"] = _setting(
        "random", "Which negatives fill the group; teacher+/-: highest/lowest scored first."
    )
    teacher_scores_margin: float | None = _setting(
        None, "Drop rows whose best and worst teacher scores differ by less."
    )
    teacher_scores_min: float | None = _setting(
        None, "Drop rows whose best teacher score is lower."
    )
    max_sample_num: int | None = _setting(None, "Train on a seeded sample of so many rows a file.")
    inbatch_same_dataset: Literal["epoch", "epoch-random", "epoch-static", "random"] | None = (
        _setting(None, "Fill every global batch from one file, drawn in this way.")
    )
    use_train_config: bool = _setting(
        False, "Take selection, loss and temperatures from the task's recipe in --version?"
    )
    max_bad_rows: int = _setting(
        0, "Skip up to so many invalid lines (listed in bad_rows.jsonl) instead of stopping."
    )


@dataclass
class EncoderConfig:
    """The encoder: where its weights come from and how texts become vectors."""

    _argument_group_name = "encoder"

    query_encoder: str = _setting("BAAI/bge-base-en", "Hub name or folder of the (query) encoder.")
    key_encoder: str = _setting(
        "BAAI/bge-base-en", "Hub name or folder of the key encoder, when encoders are not tied."
    )
    tie_encoders: bool = _setting(True, "Encode keys with the query encoder?")
    pooling_method: list[str] = _setting(
        ["cls"], f"How token vectors become one; of {', '.join(POOLINGS)} (dense comes on top)."
    )
    dense_metric: Literal["cos", "ip", "l2"] = _setting("cos", "Similarity of query and key.")
    dtype: str = _setting("auto", DTYPE_HELP)
    model_cache_dir: str | None = _setting(None, "Where downloaded models are kept.")


@dataclass(unsafe_hash=True)
class LossConfig:
    """What is minimised over the global batch; one for every dataset (its recipe)."""

    _argument_group_name = "loss"

    contrastive_weight: float = _setting(0.2, "Weight of the contrastive loss.")
    distill_weight: float = _setting(1.0, "Weight of the distillation loss.")
    stable_distill: bool = _setting(False, "Distil by ranked contrastive terms instead of KL?")
    cos_temperature: float = _setting(0.01, "Cosine scores are divided by this.")
    teacher_temperature: float = _setting(1.0, "Teacher scores are divided by this.")
    student_temperature: float = _setting(1.0, "Scores are divided by this when distilling.")
    negative_cross_device: bool = _setting(
        True, "Use the keys of all devices as negatives? Otherwise each device's own."
    )
    mask_false_negatives: bool = _setting(
        True, "Leave a query's known positives out of its in-batch negatives?"
    )


@dataclass
class MetricsConfig:
    """What an evaluation measures, which decides what its rows have to hold."""

    _argument_group_name = "evaluation"

    metrics: list[str] = _setting(
        ["mrr", "recall", "ndcg"],
        f"Of {', '.join(METRICS)}; llme_jax.retrieve also writes {' and '.join(COLLATIONS)}.",
    )


@dataclass
class EvalConfig(MetricsConfig):
    """Evaluation by retrieval."""

    cutoffs: list[int] = _setting([1, 5, 10, 100], "Ranks at which metrics are computed.")
    hits: int = _setting(200, "Keys retrieved for a query.")
    batch_size: int = _setting(1000, "Texts encoded, or queries searched, at a time.")
    save_result: bool = _setting(True, "Save the retrieved keys of every query?")
    save_name: str | None = _setting(None, "Suffix in the names of result files.")
    log_path: str | None = _setting(
        "data/results/performance.log", "Metrics of every evaluation are appended to this file."
    )


@dataclass
class OutputConfig:
    """Where results go, and what chance decides."""

    output_dir: str = _setting("data/outputs/", "Results, checkpoints and metrics go here.")
    seed: int = _setting(42, "Seed of whatever is drawn: data order, keys, dropout, hits.")


@dataclass
class RetrievalConfig(OutputConfig):
    """How keys are retrieved, and where that is written."""

    _argument_group_name = "retrieval"

    retrieval_method: Literal["dense", "bm25", "random", "no"] = _setting(
        "dense", "What finds the keys; random and no are baselines."
    )
    save_encode: bool = _setting(
        False, "Keep the corpus' embeddings in {output_dir}/{embedding_name}, for later runs?"
    )
    load_encode: bool = _setting(False, "Stop when there are no such embeddings to use?")
    faiss_index_factory: str = _setting(
        "Flat", "Flat: exact search on the devices; else an index of faiss, as in IVF1024,PQ32."
    )
    save_index: bool = _setting(False, "Keep the faiss index beside the embeddings?")
    load_index: bool = _setting(False, "Stop when there is no such index to use?")
    embedding_name: str = _setting("embeddings", "Folder of the embeddings in --output_dir.")
    k1: float = _setting(0.82, "BM25's k1.")
    b: float = _setting(0.68, "BM25's b.")
    language: str = _setting("en", "Language of BM25's analyser.")
    threads: int = _setting(32, "Threads that BM25 indexes and searches with.")
    load_result: bool = _setting(False, "Take the hits from the result file of an earlier run?")
    save_to_output: bool = _setting(
        False, "Write collated rows to --output_dir instead of beside --eval_data?"
    )


@dataclass
class MiningConfig:
    """Which hits become negatives (collate_neg)."""

    _argument_group_name = "mining"

    max_neg_num: int = _setting(100, "Negatives a query gets at most.")
    filter_answers: bool = _setting(False, "Leave out passages that contain an answer?")
    range_min: int = _setting(0, "Ranks before this one (from 0) are left out.")
    range_max: int | None = _setting(None, "Ranks from this one on are left out.")
    max_score: float | None = _setting(None, "Passages with a higher score are left out.")
    margin: float | None = _setting(
        None, "Leave out what scores higher than the best positive's score less this."
    )
    relative_margin: float | None = _setting(
        None, "The same, with this share of the best positive's score."
    )
    fuse: list[str] | None = _setting(
        None, "Result files of other runs; all take turns in giving negatives."
    )


@dataclass
class TrainConfig(OutputConfig):
    """Optimisation, checkpoints, logging."""

    _argument_group_name = "training"

    plan: bool = _setting(
        False, "Only say what the run would take: memory, operations, padding, programs?"
    )
    device_memory: float | None = _setting(
        None, "GiB of a device, for --plan [as the device says]."
    )
    max_steps: int = _setting(-1, "Optimizer steps; overrides num_train_epochs when positive.")
    num_train_epochs: float = _setting(3.0, "Passes over the data.")
    early_exit_steps: int | None = _setting(None, "Stop after this step, schedule unchanged.")
    per_device_train_batch_size: int = _setting(16, "Queries a device in one batch.")
    gradient_accumulation_steps: int = _setting(1, "Batches whose gradients make one step.")
    sub_batch_size: int | None = _setting(
        None,
        "Texts a device encodes at a time (GradCache): the same gradient in less memory.",
    )
    gradient_checkpointing: bool = _setting(False, "Recompute activations in the backward pass?")
    fsdp: int = _setting(1, "Devices that parameters and optimizer state are spread over.")
    learning_rate: float = _setting(5e-6, "Peak learning rate.")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = _setting(
        "linear", "Learning rate after the warm-up."
    )
    warmup_ratio: float = _setting(0.1, "Share of the steps that warms up.")
    weight_decay: float = _setting(0.01, "AdamW's decay of all but biases and LayerNorm.")
    adam_beta1: float = _setting(0.9, "AdamW's beta 1.")
    adam_beta2: float = _setting(0.999, "AdamW's beta 2.")
    adam_epsilon: float = _setting(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = _setting(1.0, "Gradients are clipped to this global norm; 0: never.")
    save_steps: int = _setting(2000, "Steps between checkpoints.")
    save_total_limit: int | None = _setting(
        None, "Checkpoints kept: the newest ones, and the best."
    )
    eval_steps: int | None = _setting(None, "Steps between evaluations [save_steps].")
    eval_on_start: bool = _setting(False, "Evaluate before the first step too?")
    metric_for_best_model: str | None = _setting(
        None, "Metric that picks the best checkpoint [ndcg@10, else the first one]."
    )
    logging_steps: int = _setting(100, "Steps between lines of metrics.jsonl.")
    report_to: Literal["none", "tensorboard"] = _setting("none", "Where else metrics go.")


@dataclass
class ScoringConfig:
    """What is scored, and where the scores go."""

    _argument_group_name = "scoring"

    data_root: str = _setting(DATA_ROOT, DATA_ROOT_HELP)
    eval_data: str | None = _setting(
        None,
        "JSON-lines file with task, query, answers and pos and neg, or history; "
        f"also {SOURCES_HELP}.",
    )
    answer_reduction: Literal["first", "max", "mean", "logsumexp"] = _setting(
        "first", "Of several answers: score the first, or all and reduce their scores so."
    )
    save_name: str = _setting(
        "llama2-7b-chat", "Scores go to {eval_data's stem}.scored.{save_name}.json beside it."
    )
    load_score: bool = _setting(False, "Stop when some pairs have no score yet?")
    report: bool = _setting(
        False, "Only report on the teacher_scores that --eval_data has; needs no model."
    )


@dataclass
class LMConfig:
    """The language model, and what it reads at a time."""

    _argument_group_name = "language model"

    model_name_or_path: str = _setting(
        "meta-llama/Llama-2-7b-chat-hf", "Hub name or folder of a llama, mistral, qwen2 or qwen3."
    )
    model_cache_dir: str | None = _setting(None, "Where downloaded models are kept.")
    lm_dtype: str = _setting("auto", DTYPE_HELP)
    key_max_length: int = _setting(512, "Tokens a key keeps at most.")
    context_max_length: int = _setting(
        1024, "Tokens of key, query and answer together; what is too many is cut from the key."
    )
    lm_batch_size: str = _setting(
        "auto", "Prompts on a device at a time; auto: as many as its memory allows."
    )
    tensor: int = _setting(1, "Devices that share every product of the model.")
    fsdp: int = _setting(1, "Devices that parameters are spread over.")


@dataclass
class ProcessConfig:
    """The processes of a run on several hosts; TPU pods and SLURM steps need no flag."""

    _argument_group_name = "processes"

    coordinator_address: str | None = _setting(
        None, "HOST:PORT where process 0 listens [$JAX_COORDINATOR_ADDRESS]."
    )
    num_processes: int | None = _setting(None, "How many there are [$JAX_NUM_PROCESSES].")
    process_id: int | None = _setting(None, "Which one this is, from 0 [$JAX_PROCESS_ID].")


class Groups:
    """Settings of a command, in groups."""

    def groups(self) -> list:
        return [getattr(self, f.name) for f in fields(self)]

    def flat(self) -> dict:
        """Every setting by its flag name."""
        return {name: value for group in self.groups() for name, value in asdict(group).items()}


@dataclass
class Config(Groups):
    """All settings of one training run."""

    data: DataConfig = field(default_factory=DataConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    training: TrainConfig = field(default_factory=TrainConfig)
    processes: ProcessConfig = field(default_factory=ProcessConfig)


@dataclass
class RetrieveConfig(Groups):
    """All settings of one retrieval."""

    data: TextConfig = field(default_factory=TextConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    mining: MiningConfig = field(default_factory=MiningConfig)
    processes: ProcessConfig = field(default_factory=ProcessConfig)


@dataclass
class ScoreConfig(Groups):
    """All settings of one scoring."""

    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    lm: LMConfig = field(default_factory=LMConfig)
    processes: ProcessConfig = field(default_factory=ProcessConfig)


@dataclass
class DoctorSettings:
    """What llme_jax.data writes beside the table."""

    _argument_group_name = "report"

    json: str | None = _setting(
        None, "Write what was found to this file; - prints it instead of the table."
    )
    plot: str | None = _setting(None, "Draw histograms into this PNG.")


@dataclass
class DoctorConfig(Groups):
    """All settings of a look at training files: those of training that decide what it reads."""

    data: DataConfig = field(default_factory=DataConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    evaluation: MetricsConfig = field(default_factory=MetricsConfig)
    report: DoctorSettings = field(default_factory=DoctorSettings)


def shrunk(config: Config, arg: str | None) -> Config:
    """An experiment, or, when `arg` is `runlocal`, what takes seconds of it, in another folder.

    Raises:
        InputError: for any other argument.
    """
    if arg not in (None, "runlocal"):
        raise InputError(f"--config ...:{arg}: the only argument is runlocal")
    if arg:
        training = config.training
        training.output_dir += "-runlocal"
        training.max_steps, training.save_steps, training.logging_steps = 4, 2, 1
        training.per_device_train_batch_size = 2
        config.data.train_group_size = 4
    return config
