"""What is left of a vector that is cut: trained for it (Matryoshka), and not.

    python benchmarks/matryoshka.py        # in 2 CPU cores' time about 4 minutes a seed

The data is that of distil.py. Two retrievers train from MiniLM with the same rows, batches and
steps, one with the contrastive loss at full width, one with its sum over several widths. Then both
search with the first numbers of their vectors (`--truncate_dim`).
"""

import json
from pathlib import Path

from distil import flags, report, retriever, run, write_small
from side_by_side import make_parser

WIDTHS = (32, 64, 128, 384)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--folder", type=Path, default=Path("data/distil"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("--passages", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    write_small(args.folder, args.passages)
    widths = " ".join(map(str, WIDTHS))
    for seed in args.seeds:
        for name, more in (("plain", ""), ("matryoshka", f"--matryoshka_dims {widths}")):
            out = args.folder / f"{seed}/{name}"
            base, test, train = flags(args, seed, out)
            rows = f"--train_data {args.folder}/small/train.json --contrastive_weight 1"
            retriever(f"{train} {rows} {more}", out)
            encoder = out / f"checkpoint-{args.steps}/encoder"
            for width in WIDTHS:
                run("retrieve", f"{base} {test} --query_encoder {encoder} --output_dir {out} "
                    f"--truncate_dim {width} --save_name {width}")  # fmt: skip
                metrics = json.loads((out / f"test.metrics.{width}.json").read_text())
                report(seed, f"{name} {width}", metrics)


if __name__ == "__main__":
    main()
