"""Does retrieval help a language model? Keys are found, read by the model, its answers measured.

    python -m llme_jax.evaluate --task popqa --query_encoder BAAI/bge-base-en
    python -m llme_jax.evaluate --task popqa --retrieval_method no
    python -m llme_jax.evaluate --compare with/test.output.lm.json without/test.output.lm.json

The same command again continues where it was stopped. --task popqa --help shows that task's
defaults.
"""

from llme_jax.config import cli
from llme_jax.config.evaluation import EvaluateConfig
from llme_jax.config.validate import validate_evaluation

WHEN_FULL = "give a lower --lm_batch_size, or --tensor N to spread the model over N devices"


def main(argv: list[str]) -> int:
    start = EvaluateConfig.of(cli.value_of("task", argv))
    config = cli.parse(argv, "evaluate", __doc__, EvaluateConfig, start)
    validate_evaluation(config)

    # Only now, so that --help and a misspelt flag are answered before jax is loaded.
    if config.task.compare:
        from llme_jax.reports.answers import print_comparison

        print_comparison(*config.task.compare)
        return 0
    from llme_jax.devices.runtime import started
    from llme_jax.evaluation.run import evaluate

    with started(config.processes, config.data.dataset_cache_dir, WHEN_FULL):
        return evaluate(config)


if __name__ == "__main__":
    cli.run(main)
