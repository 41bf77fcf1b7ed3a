"""Trains a reranker, or puts candidates in order with one.

    python -m llme_jax.rank --ranker google/electra-base-discriminator \\
        --train_data train.neg.json --output_dir out
    python -m llme_jax.rank --ranker out/best/ranker --eval_data train.neg.json \\
        --metrics mrr recall collate_score --save_name ranker

With --train_data it trains; without, it reranks --eval_data, and collate_score writes the scores
as the teacher_scores that llme_jax.train distils. The same command again continues where it was
stopped.
"""

from llme_jax.config import RankConfig, cli
from llme_jax.config.validate import validate_ranking

WHEN_FULL = (
    "give a lower --batch_size to rerank; to train, the same command with --plan says which of "
    "--sub_batch_size, --gradient_checkpointing, --fsdp and a smaller "
    "--per_device_train_batch_size is enough"
)


def main(argv: list[str]) -> int:
    config = cli.parse(argv, "rank", __doc__, RankConfig)
    validate_ranking(config)

    # Only now, so that --help and a misspelt flag are answered before jax is loaded.
    from llme_jax.devices.runtime import started
    from llme_jax.devices.topology import run_elsewhere
    from llme_jax.rerank.run import rerank
    from llme_jax.training.cross import open_cross
    from llme_jax.training.loop import train

    if (code := run_elsewhere(config.planning.topology, "llme_jax.rank", argv)) is not None:
        return code
    with started(config.processes, config.data.dataset_cache_dir, WHEN_FULL):
        return train(config, open_cross) if config.data.train_data else rerank(config)


if __name__ == "__main__":
    cli.run(main)
