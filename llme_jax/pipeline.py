"""Mine, train, score, distil, and again: the stages of an experiment, one after the other.

    python -m llme_jax.pipeline --config msmarco.py --output_dir out
    python -m llme_jax.pipeline --config msmarco.py --dry_run

Each stage is a command of this package, run as a process; --dry_run prints them. The same command
again does what is not done yet, and again what a changed setting or file has an effect on.
"""

from llme_jax.config import PipelineConfig, cli


def main(argv: list[str]) -> int:
    config = cli.parse(argv, "pipeline", __doc__, PipelineConfig)

    from llme_jax.stages.run import run  # only now, so that --help is answered at once

    return run(config)


if __name__ == "__main__":
    cli.run(main)
