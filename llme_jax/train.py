"""Fine-tunes a dual encoder on queries with positive and negative keys.

    python -m llme_jax.train --config quickstart.py
    python -m llme_jax.train --train_data train.json --output_dir out --max_steps 2000

The same command again continues where the run was stopped.
"""

import logging
import os

from llme_jax import cli
from llme_jax.config import validate


def main(argv: list[str]) -> int:
    config = cli.parse(argv, "train", __doc__)
    validate(config)

    # Only now, so that --help and a misspelt flag are answered before jax is loaded.
    import jax
    from tqdm.contrib.logging import logging_redirect_tqdm

    from llme_jax.loop import train

    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        jax.distributed.initialize(
            num_processes=int(os.environ["JAX_NUM_PROCESSES"]),
            process_id=int(os.environ["JAX_PROCESS_ID"]),
        )
    # Our own logger only: jax, orbax and transformers have much to say.
    logger = logging.getLogger("llme_jax")
    logger.setLevel(logging.INFO if jax.process_index() == 0 else logging.WARNING)
    logger.addHandler(logging.StreamHandler())
    logger.propagate = False
    with logging_redirect_tqdm([logger]):
        return train(config)


if __name__ == "__main__":
    cli.run(main)
