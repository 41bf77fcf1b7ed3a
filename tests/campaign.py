"""Generated situations over all commands: each one works, for a reason, or is one sentence.

    python tests/campaign.py [--only WORDS] [--list]

Situations are what people's files, folders and flags may hold: each field of each file with each
kind of value, files in other encodings and formats, damaged models, damaged files of an earlier
run, paths that cannot be written. A situation fails when it ends in a traceback or takes longer
than a minute, when a refused one leaves a half-written file, and when a situation is accepted that
no rule here says why. `--list` prints every accepted one with its reason. pytest -m slow runs a
part of it (test_accidents.py): all takes 20 minutes on two cores (`--part 0/2` and `--part 1/2` at
once).
"""

import argparse
import contextlib
import faulthandler
import io
import os
import re
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

os.environ["JAX_PLATFORMS"], os.environ["HF_HUB_OFFLINE"] = "cpu", "1"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import jax  # noqa: E402
import numpy as np  # noqa: E402
import tiny  # noqa: E402
from situations import (  # noqa: E402
    DAMAGE,
    Situation,
    file_situations,
    model_situations,
    path_situations,
    row_situations,
    source_situations,
)
from situations_left import (  # noqa: E402
    left_behind_situations,
    merge_situations,
    pipeline_situations,
)

from llme_jax import evaluate, merge, pipeline, rank, report, retrieve, score, train  # noqa: E402
from llme_jax.config import cli  # noqa: E402
from llme_jax.doctor import __main__ as doctor  # noqa: E402

LIMIT = 60  # seconds
# ---------------------------------------------------------------- the commands, and what they read


def lay_out(folder: Path) -> None:
    """Models and data of every command, small."""
    tiny.save_bert(folder / "bert", layers=1, width=16)
    tiny.save_bert(folder / "other", layers=1, width=16, seed=1)
    tiny.save_llama(folder / "llama")
    rng = np.random.default_rng(0)
    corpus = [{"title": f"w{i}", "text": tiny.text(rng)} for i in range(12)]
    texts = [f"{row['title']} {row['text']}" for row in corpus]
    rows = []
    for i in range(4):
        positive, *negatives = rng.permutation(12)[:4].tolist()
        rows.append(
            {
                "query": tiny.text(rng, 1, 4),
                "pos": [texts[positive]],
                "neg": [texts[n] for n in negatives],
                "pos_index": [positive],
                "neg_index": negatives,
                "teacher_scores": rng.normal(size=4).tolist(),
                "answers": ["w1"],
                "task": "qa",
                "query_id": i,
            }
        )
    for name in ("train", "test"):
        tiny.write_lines(folder / f"{name}.json", rows)
    tiny.write_lines(folder / "corpus.json", corpus)
    (folder / "notes").touch()


def command_line(command: str) -> list[str]:
    cache = ["--dataset_cache_dir", "cache"]
    lengths = ["--query_max_length", "16", "--key_max_length", "24", "--log_path", "out/log"]
    test = ["--eval_data", "test.json", "--corpus", "corpus.json"]
    training = ["--train_data", "train.json", "--max_steps", "2", "--train_group_size", "2"]
    training += ["--per_device_train_batch_size", "2", "--logging_steps", "1", "--save_steps", "1"]
    encoder = ["--query_encoder", "bert", *cache, *lengths, "--output_dir", "out"]
    ranker = ["--ranker", "bert", *cache, *lengths, "--output_dir", "out"]
    return {
        "train": [*encoder, *training, "--contrastive_weight", "1"],
        "train+eval": [*encoder, *training, *test, "--contrastive_weight", "1"],
        "retrieve": [*encoder, *test, "--metrics", "mrr", "collate_neg", "--hits", "5"],
        "rank": [*ranker, "--eval_data", "test.json", "--metrics", "mrr", "collate_score"],
        "rank train": [*ranker, *training],
        "score": ["--model_name_or_path", "llama", "--eval_data", "test.json", "--output_dir",
                  "out", "--lm_batch_size", "4"],
        "doctor": ["train.json", *test, *cache, "--query_encoder", "bert",
                   "--train_group_size", "2"],
        "merge": ["bert", "other", "--output_dir", "out"],
        "report": ["run", "--output_dir", "said"],
        "compare": ["--compare", "a.json", "b.json"],
        "evaluate": ["--task", "qa", "--few_shot", "0", "--retrieval_method", "no", *test[:2],
                     "--model_name_or_path", "llama", "--context_max_length", "512",
                     "--max_new_tokens", "2", "--output_dir", "out", "--log_path", "out/log"],
        "pipeline": ["--config", "p.py", "--output_dir", "out", "--dry_run"],
    }[command]  # fmt: skip


MAINS = {
    **dict.fromkeys(("train", "train+eval"), train.main),
    **dict.fromkeys(("rank", "rank train"), rank.main),
    "retrieve": retrieve.main,
    "score": score.main,
    "doctor": doctor.main,
    "merge": merge.main,
    "report": report.main,
    **dict.fromkeys(("evaluate", "compare"), evaluate.main),
    "pipeline": pipeline.main,
}


# ------------------------------------------------------------------------ what an earlier run left


def left_situations() -> Iterator[Situation]:
    for command in ("train", "train+eval", "rank train", "retrieve", "rank", "score"):
        for kind in ("empty", "half", "binary", "{}", "missing", "flipped"):
            for which in range(14):

                def spoil(folder, command=command, kind=kind, which=which):
                    quietly(MAINS[command], [*command_line(command), *keeping(command)])
                    files = sorted(
                        p for place in ("out", "cache") for p in (folder / place).rglob("*")
                        if p.is_file() and not p.is_symlink() and p.name != ".lock"
                    )  # fmt: skip
                    path = files[which * len(files) // 14]
                    spoil.path = path
                    if kind == "flipped":
                        content = bytearray(path.read_bytes() or b"x")
                        content[len(content) // 2] ^= 1
                        path.write_bytes(content)
                    else:
                        DAMAGE[kind](path)
                    return keeping(command)

                right = "is made again, or says nothing about what is done"
                name = f"{command}: file {which} of an earlier run is {kind}"
                yield Situation(name, command, spoil, right)


def keeping(command: str) -> list[str]:
    return ["--save_encode"] if command == "retrieve" else []


# ------------------------------------------------------------------------------------ the campaign


class Hanging(BaseException):
    """No command may catch it."""


def hanging(*_):
    raise Hanging


def quietly(main, argv) -> str:
    """What a command says; its exceptions go on."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(argv)
    return f"exit {code or 0}"


def outcome(situation: Situation) -> tuple[str, str]:
    """accepted, refused or FAILED, and what was said."""
    here = Path.cwd()
    with contextlib.redirect_stderr(io.StringIO()):
        argv = [*command_line(situation.command), *situation.spoil(here)]
    before = {path for path in here.rglob("*")}
    signal.alarm(LIMIT)
    faulthandler.dump_traceback_later(2 * LIMIT, exit=True)  # where no signal gets through
    errors = io.StringIO()
    sys.argv = ["", *argv]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            cli.run(MAINS[situation.command])
        said, kind = "does not leave", "FAILED: leaves"
    except SystemExit as end:
        lines = re.split(r"[\r\n]+", errors.getvalue().rstrip("\n"))  # bars write \r
        said, kind = f"exit {end.code}", "accepted"
        if end.code and lines[-1].startswith("error: "):
            said, kind = lines[-1], "refused"
        elif end.code and situation.command != "doctor":
            said, kind = lines[-1], "FAILED: not one sentence"
    except Hanging:
        said, kind = f"over {LIMIT} s", "FAILED: hangs"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        said, kind = f"{type(error).__name__}: {error}", "FAILED: traceback"
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
    new = {path for path in here.rglob("*")} - before
    if half := [str(p.relative_to(here)) for p in new if p.name.endswith((".tmp", ".old"))]:
        return "FAILED: half-written", ", ".join(half)
    if kind == "accepted" and situation.right is None:
        kind = "FAILED: accepted"
    return kind, said


KINDS = {
    "rows": row_situations,
    "files": file_situations,
    "models": model_situations,
    "paths": path_situations,
    "left": left_situations,
    "sources": source_situations,
    "left_behind": left_behind_situations,
    "pipelines": pipeline_situations,
    "merges": merge_situations,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], help="words in the names of situations")
    parser.add_argument("--list", action="store_true", help="print those accepted, and why")
    parser.add_argument("--part", default="0/1", help="i/n: every n-th situation, from the i-th")
    parser.add_argument("--kinds", nargs="+", default=[*KINDS], choices=KINDS)
    args = parser.parse_args()
    part, parts = map(int, args.part.split("/"))
    made = (s for kind in args.kinds for s in KINDS[kind]())
    wanted = [s for s in made if all(word in s.name for word in args.only)]
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, hanging)
    counts, failed = Counter(), []
    with tempfile.TemporaryDirectory() as temporary:
        base, here = Path(temporary, "base"), Path(temporary, "here")
        base.mkdir()
        lay_out(base)
        # Most situations compile the same programs.
        jax.config.update("jax_compilation_cache_dir", str(Path(temporary, "programs")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        for i, situation in enumerate(wanted[part::parts]):
            shutil.rmtree(here, ignore_errors=True)
            shutil.copytree(base, here)
            os.chdir(here)
            print(f"\r\033[K{i + 1}: {situation.name}", end="", file=sys.stderr, flush=True)
            kind, said = outcome(situation)
            counts[kind.partition(":")[0]] += 1
            if kind.startswith("FAILED"):
                failed.append(situation.name)
                print(f"{kind}  {situation.name}: {said[:300]}", flush=True)
            elif args.list and kind == "accepted":
                print(f"accepted  {situation.name}: {situation.right}", flush=True)
        os.chdir("/")
    print(", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
