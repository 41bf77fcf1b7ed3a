"""Retrieves keys for queries, measures how well, and mines negatives.

    python -m llme_jax.retrieve --eval_data test.json --corpus corpus.json --metrics mrr recall
    python -m llme_jax.retrieve --retrieval_method bm25 --eval_data train.json \\
        --corpus corpus.json --metrics mrr recall collate_neg --save_name bm25
"""

from llme_jax.config import RetrieveConfig, cli
from llme_jax.config.validate import validate_retrieval

WHEN_FULL = "give a lower --batch_size"


def main(argv: list[str]) -> int:
    config = cli.parse(argv, "retrieve", __doc__, RetrieveConfig)
    validate_retrieval(config)

    # Only now, so that --help and a misspelt flag are answered before jax is loaded.
    from llme_jax.devices.runtime import started
    from llme_jax.devices.topology import run_elsewhere
    from llme_jax.retrieval.run import retrieve

    if (code := run_elsewhere(config.planning.topology, "llme_jax.retrieve", argv)) is not None:
        return code
    with started(config.processes, config.data.dataset_cache_dir, WHEN_FULL):
        return retrieve(config)


if __name__ == "__main__":
    cli.run(main)
