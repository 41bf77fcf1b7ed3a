"""Averages encoders: the answer to a tuned model that is worse on everything else.

    python -m llme_jax.merge out/best/encoder BAAI/bge-base-en --weights 0.5 0.5 --output_dir merged

Folders or names of the Hub, of one base, stand in front of the flags. The result is an encoder like
the first one, in {output_dir}/encoder.
"""

from llme_jax.config import MergingConfig, cli
from llme_jax.config.validate import validate_merging


def main(argv: list[str]) -> int:
    argv = cli.names_in_front(argv, "models")
    settings = cli.parse(argv, "merge", __doc__, MergingConfig)
    validate_merging(settings)

    from pathlib import Path

    from llme_jax.files.storage import check_writable
    from llme_jax.models.merge import merge_encoders  # only now, so that --help comes at once

    merge = settings.merge
    check_writable("--output_dir", merge.output_dir)
    out = Path(merge.output_dir).expanduser()
    print(f"encoder: {merge_encoders(merge.models, merge.weights, out, merge.model_cache_dir)}")
    return 0


if __name__ == "__main__":
    cli.run(main)
