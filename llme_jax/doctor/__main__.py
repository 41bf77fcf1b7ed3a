"""Checks and describes training files before anybody pays for a chip; needs no accelerator.

    python -m llme_jax.doctor train.json more.json --query_encoder FOLDER --key_max_length 128
    python -m llme_jax.doctor train.json --eval_data test.json --corpus corpus.json --plot data.png
    python -m llme_jax.doctor --config qa.py

Files stand in front of the flags, or behind --train_data. The exit code is 1 when training would
stop at these files, else 0.
"""

from llme_jax.config import DoctorConfig, cli
from llme_jax.config.validate import validate_doctor


def main(argv: list[str]) -> int:
    argv = cli.names_in_front(argv, "train_data")
    config = cli.parse(argv, "doctor", __doc__, DoctorConfig)
    validate_doctor(config)

    from llme_jax.doctor.examine import examine  # only now: transformers takes a second

    return examine(config)


if __name__ == "__main__":
    cli.run(main)
