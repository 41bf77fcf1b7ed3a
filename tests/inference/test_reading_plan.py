"""--plan of what only reads: what is said is what runs; nothing is written, no weight is read."""

import re
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
import transformers
from tiny import write_lines

from llme_jax import rank, retrieve, score
from llme_jax.errors import InputError
from llme_jax.models.causal_lm import open_causal_lm
from llme_jax.retrieval import encode


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows with candidates and answers, passages, and models without their weights."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    corpus = [tiny.text(rng, 2, 40) for _ in range(300)]
    rows = [
        {"query": tiny.text(rng), "pos_index": [i], "pos": [corpus[i]], "task": "qa",
         "neg": [corpus[i + 1], corpus[i + 2]], "answers": ["an answer"]}
        for i in range(40)
    ]  # fmt: skip
    write_lines(folder / "rows.json", rows)
    write_lines(folder / "corpus.json", [{"text": text} for text in corpus])
    tiny.save_bert(folder / "bert")
    for name, save in (("bare-bert", tiny.save_bert), ("bare-llama", tiny.save_llama)):
        (save(folder / name) / "model.safetensors").unlink()
    return folder


@pytest.fixture
def commands(data, tmp_path):
    """What each command needs."""
    out = ["--eval_data", str(data / "rows.json"), "--output_dir", str(tmp_path / "out")]
    limits = ["--query_max_length", "24", "--key_max_length", "40", "--metrics", "mrr"]
    lm = str(data / "bare-llama")
    cache = ["--dataset_cache_dir", str(tmp_path / "cache")]
    return {
        "retrieve": (retrieve.main, [*out, *limits, *cache, "--corpus", str(data / "corpus.json"),
                                     "--key_template", "{text}", "--add_instruction", "false",
                                     "--query_encoder", str(data / "bare-bert")]),
        "rank": (rank.main, [*out, *limits, *cache, "--ranker", str(data / "bare-bert")]),
        "yes-no": (rank.main, [*out, *limits, *cache, "--ranker", lm,
                               "--ranker_method", "yes-no"]),
        "score": (score.main, [*out, "--model_name_or_path", lm, "--context_max_length", "256"]),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["retrieve", "rank", "yes-no", "score"])
def test_it_says_what_fits_and_what_would(commands, name, tmp_path, capsys):
    main, argv = commands[name]
    assert main([*argv, "--plan"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^parameters +[\d,]+; [\d.]+ GiB on each of \d devices$", said, re.M)
    assert "no limit is known here: --device_memory GIB" in said
    texts = {"retrieve": "keys +300", "score": "prompts +120", "yes-no": "prompts +120"}
    assert re.search(f"^{texts.get(name, 'pairs +120')}, ", said, re.M)
    assert main([*argv, "--plan", "--device_memory", "1"]) == 0
    assert "it fits: a device has 1.00 GiB" in capsys.readouterr().out
    assert main([*argv, "--plan", "--device_memory", "1e-7"]) == 1
    assert "none of the settings that were tried" in capsys.readouterr().out
    assert not [*tmp_path.rglob("*.json"), *tmp_path.rglob("*.bin")]


def test_remedies_do_fit(commands, capsys):
    """Weights of all devices take less where --tensor spreads them, a batch where it is smaller."""
    for name, more, enough, flags in (
        ("score", ["--lm_batch_size", "64"], 0.006, {"--lm_batch_size"}),
        ("retrieve", ["--batch_size", "4096"], 0.0007, {"--batch_size"}),
    ):
        main, argv = commands[name]
        argv = [*argv, "--plan", *more, "--device_memory", str(enough)]
        assert main(argv) == 1
        remedies = re.findall(r"^  (--.*): [\d.]+ GiB$", capsys.readouterr().out, re.M)
        assert {remedy.split()[0] for remedy in remedies} >= flags
        for remedy in remedies:
            assert main([*argv, *remedy.split()]) == 0, remedy
            assert "it fits" in capsys.readouterr().out


def test_the_programs_are_those_that_are_compiled(commands, data, capsys):
    main, argv = commands["retrieve"]
    assert main([*argv, "--plan"]) == 0
    said = capsys.readouterr().out
    # Of one encoder: programs of queries may be those of keys.
    queries, keys = map(int, re.findall(r"^programs +(\d+);", said, re.M))
    encode._forward.clear_cache()
    argv[argv.index(str(data / "bare-bert"))] = str(data / "bert")
    assert main(argv) == 0
    assert max(queries, keys) <= encode._forward._cache_size() <= queries + keys


def test_operations_are_those_of_the_linear_layers_and_of_attention(tmp_path):
    folder = tiny.save_llama(tmp_path / "llama")
    lm, _, _ = open_causal_lm(str(folder), dtype="fp32", cache_dir=None)
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    linear = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    config, length = model.config, 50
    wide = config.num_attention_heads * lm.config.head_dim
    seen = sum(range(1, length + 1)) * config.num_hidden_layers
    want = 2 * length * sum(m.weight.numel() for m in linear) + 4 * wide * seen
    assert lm.flops(3 * length, 3 * length**2) == 3 * want


@pytest.mark.tpu_compile
@pytest.mark.parametrize("name", ["retrieve", "rank", "yes-no", "score"])
def test_it_compiles_for_devices_that_are_not_here(commands, name):
    main, argv = commands[name]
    command = [sys.executable, "-m", main.__module__, *argv, "--plan", "--topology", "v5e:2x4"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search("time of it +[0-9.]+ ms", done.stdout)
    assert "it fits: a device has 15.75 GiB" in done.stdout


def test_what_is_not_read_has_no_plan(commands):
    for name, more, message in (
        ("retrieve", ["--retrieval_method", "bm25"], "give --retrieval_method dense"),
        ("score", ["--report"], "leave out --report and --load_score"),
        ("score", ["--topology", "v5e:2x4"], "--topology: says for which devices --plan compiles"),
    ):
        main, argv = commands[name]
        plan = [] if "--topology" in more else ["--plan"]
        with pytest.raises(InputError, match=message):
            main([*argv, *more, *plan])
