"""Scores candidates with a language model: how likely is the answer after each of them?

    python -m llme_jax.score --eval_data train.json --model_name_or_path folder --save_name teacher
    python -m llme_jax.score --eval_data train.scored.teacher.json --report

The scores are the teacher_scores that llme_jax.train distils. The same command again continues
where it was stopped.
"""

from llme_jax.config import ScoreConfig, cli
from llme_jax.config.validate import validate_scoring

WHEN_FULL = "give a lower --lm_batch_size, or --tensor N to spread the model over N devices"


def main(argv: list[str]) -> int:
    config = cli.parse(argv, "score", __doc__, ScoreConfig)
    validate_scoring(config)

    # Only now, so that --help and a misspelt flag are answered before jax is loaded.
    from llme_jax.devices.runtime import started
    from llme_jax.devices.topology import run_elsewhere
    from llme_jax.lm.scoring import score

    if (code := run_elsewhere(config.planning.topology, "llme_jax.score", argv)) is not None:
        return code
    with started(config.processes, None, WHEN_FULL):
        return score(config)


if __name__ == "__main__":
    cli.run(main)
