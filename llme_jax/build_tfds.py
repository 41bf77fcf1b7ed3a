"""Turns JSON lines into ArrayRecord splits of TFDS, which pods read from a bucket.

    python -m llme_jax.build_tfds --name nq --train_data train.json --eval_data test.json \\
        --corpus corpus.json --data_dir DIR

The names that it prints stand for the files in every other command, with TFDS_DATA_DIR=DIR, or
with the bucket that DIR was copied to.
"""

import argparse
import os

from llme_jax.config import cli
from llme_jax.config.data import DATA_ROOT, DATA_ROOT_HELP
from llme_jax.errors import InputError
from llme_jax.files.storage import check_writable
from llme_jax.sources.resolve import Files


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m llme_jax.build_tfds",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--name", required=True, help="Of the dataset, as in nq.")
    parser.add_argument("--train_data", nargs="+", default=[], help="Files of the split train.")
    parser.add_argument("--eval_data", help="File of the split test.")
    parser.add_argument("--corpus", help="File of the split corpus of {name}_corpus.")
    parser.add_argument("--key_template", default="{title} {text}", help="Fields of the corpus.")
    parser.add_argument("--data_dir", default=os.environ.get("TFDS_DATA_DIR"), help="Local folder.")
    parser.add_argument("--data_root", default=DATA_ROOT, help=DATA_ROOT_HELP)
    given = parser.parse_args(argv)
    if not (given.train_data or given.eval_data or given.corpus):
        raise InputError("nothing to build: give --train_data, --eval_data or --corpus")
    if not given.data_dir or "://" in given.data_dir:
        raise InputError(
            f"--data_dir {given.data_dir or 'is missing'}: give a local folder, and copy it to the "
            "bucket when it is built"
        )
    check_writable("--data_dir", given.data_dir)
    files = Files({"data_root": given.data_root})
    train_data = files.expanded(given.train_data)
    eval_data, corpus = (
        name and str(files.local(name)) for name in (given.eval_data, given.corpus)
    )
    try:
        from llme_jax.sources.tfds_builder import build
    except ImportError as error:
        raise InputError(f"{error}: pip install 'llme_jax[tfds]'") from None
    names = build(given.name, given.data_dir, train_data, eval_data, corpus, given.key_template)
    print(f"built in {given.data_dir}:", *names, sep="\n")
    return 0


if __name__ == "__main__":
    cli.run(main)
