"""Settings of the encoder."""

from dataclasses import dataclass
from typing import Literal

from llme_jax.config.setting import Group, setting

POOLINGS = ("cls", "mean", "last_token", "dense")
DTYPES = {
    "choices": ("auto", "fp32", "bf16"),
    "remedies": (("fp16", "use bf16, as fast and without loss scaling"),),
}
ATTENTION = {
    "help": "What computes attention; auto: flash on TPU, cudnn on GPU (bf16, without dropout), "
    "plain elsewhere. One that is named and cannot is an error.",
    "choices": ("auto", "plain", "cudnn", "flash"),
}
DTYPE_HELP = "What products are computed in; auto: bf16 on TPU and GPU, fp32 on CPU."


@dataclass
class HubConfig(Group):
    """Where models of the Hub go."""

    model_cache_dir: str | None = setting(
        None,
        "Where downloaded models are kept [Hugging Face's own cache].",
        decides="nothing",
        unit="FOLDER",
        local=True,
        may_change=True,
        per_host=True,
    )


@dataclass
class TensorConfig(Group):
    """How the weights of a language model are split."""

    tensor: int = setting(
        1,
        "Tensor parallelism: devices that split each weight matrix.",
        decides="nothing",
        unit="DEVICES",
        least=1,
    )


@dataclass
class EncoderConfig(HubConfig):
    """The encoder: where its weights come from and how texts become vectors."""

    title = "encoder"

    query_encoder: str = setting(
        "BAAI/bge-base-en",
        "Hub name or folder of the encoder, or of the queries'.",
        decides="vectors",
        unit="MODEL",
        reads="model",
    )
    key_encoder: str = setting(
        "BAAI/bge-base-en",
        "Hub name or folder of the key encoder, with --tie_encoders false.",
        decides="vectors",
        unit="MODEL",
        reads="model",
    )
    tie_encoders: bool = setting(True, "Encode keys with the query encoder.", decides="vectors")
    pooling_method: list[str] | None = setting(
        None,
        "How token vectors become one [as the model's folder says, else cls, or last_token of a "
        "language model]; with dense, an extra layer behind it.",
        decides="vectors",
        choices=POOLINGS,
    )
    dense_metric: Literal["cos", "ip", "l2"] | None = setting(
        None,
        "Similarity of query and key: cosine, inner product or negative distance [as the model's "
        "folder says, else cos].",
        decides="vectors",
    )
    truncate_dim: int | None = setting(
        None,
        "Search and evaluate with this many numbers of each vector, the first; of length 1 again "
        "where the similarity is cos [as the model's folder says, else all]. The folder of a "
        "trained encoder says it too.",
        decides="vectors",
        unit="NUMBERS",
        least=1,
        may_change=True,
    )
    dtype: str = setting("auto", DTYPE_HELP, decides="vectors", **DTYPES)
    attention: str = setting("auto", decides="vectors", **ATTENTION)

    @property
    def names(self) -> list[str]:
        """The encoder, or those of queries and of keys."""
        return [self.query_encoder] + ([] if self.tie_encoders else [self.key_encoder])
