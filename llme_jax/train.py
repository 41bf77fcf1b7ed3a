"""Fine-tunes a dual encoder on queries with positive and negative keys.

    python -m llme_jax.train --config quickstart.py
    python -m llme_jax.train --train_data train.json --output_dir out --max_steps 2000

The same command again continues where the run was stopped.
"""

from llme_jax.config import cli
from llme_jax.config.validate import validate

WHEN_FULL = (
    "the same command with --plan says which of --sub_batch_size, --gradient_checkpointing, "
    "--fsdp and a smaller --per_device_train_batch_size is enough"
)


def main(argv: list[str]) -> int:
    config = cli.parse(argv, "train", __doc__)
    validate(config)

    # Only now, so that --help and a misspelt flag are answered before jax is loaded.
    from llme_jax.devices.runtime import started
    from llme_jax.devices.topology import run_elsewhere
    from llme_jax.training.dual import open_dual
    from llme_jax.training.loop import train

    if (code := run_elsewhere(config.planning.topology, "llme_jax.train", argv)) is not None:
        return code
    with started(config.processes, config.data.dataset_cache_dir, WHEN_FULL):
        return train(config, open_dual)


if __name__ == "__main__":
    cli.run(main)
