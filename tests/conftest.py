"""Tests run on 8 virtual CPU devices; shapes in annotations are checked while they run."""

import atexit
import json
import os
import shutil
import tempfile
from collections import Counter

# Tiny models spend all their time in the compiler: level 0 halves it.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nor do threads of torch help tiny models: those of both workers wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where libtpu is installed a command would look for the other hosts of a pod.
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
# No test needs the hub: a name that is no folder is refused at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import pytest
from jaxtyping import install_import_hook

# Tests start the same commands: what one has compiled the next one loads, in both workers.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="programs-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
install_import_hook(
    [
        "llme_jax.models",
        "llme_jax.training.losses",
        "llme_jax.training.rank_losses",
        "llme_jax.retrieval.metrics",
    ],
    "beartype.beartype",
)


# Files that take a minute and more. They start first, so that no worker is left alone with one at
# the end; the option --no-loadscope-reorder keeps xdist from putting those with most tests first.
LONG = (
    "test_train.py", "test_step.py", "test_dry_run.py", "test_storage.py", "test_guide.py",
    "test_docs.py", "test_pipeline.py", "test_rank_train.py", "test_multitask.py", "test_rank.py",
    "test_score.py", "test_sigterm.py", "test_second_task.py", "test_rank_trajectory.py",
    "test_accidents.py", "test_folders.py", "test_asking.py", "test_llama.py", "test_api.py",
)  # fmt: skip


# Of tests with many like parameters every n-th runs; -m large runs the others.
EVERY = {
    "test_hidden_states_and_gradients_are_those_of_padded_texts": 3,
    "test_packed_texts_are_as_padded_ones": 3,
    "test_vectors_are_theirs_before_and_after_training": 2,
    "test_an_encoder_gives_the_same": 3,
    "test_sub_batches_give_the_gradient_of_the_whole_batch": 2,
    "test_loss_and_gradient_do_not_depend_on_the_devices": 2,
    "test_in_pieces_it_reads_the_same": 3,
    "test_logits_are_those_of_transformers": 2,
    "test_values_and_gradients_are_those_of_transformers": 2,
    "test_bfloat16_stays_close": 4,
    "test_equals_a_sort": 2,
    "test_scores_and_gradients_are_those_of_transformers": 2,
    "test_a_bit_flips_in_what_is_left": 2,
    "test_twins_end_with_the_same_files_or_say_why": 2,
    "test_killed_while_it_publishes": 2,
    "test_ctrl_c_at_any_moment": 2,
    "test_mteb_measures_what_we_measure": 2,
    "test_every_situation_works_or_is_one_sentence": 4,
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: [*LONG, item.path.name].index(item.path.name))
    seen = Counter()
    for item in items:
        name = item.originalname
        if seen[item.path, name] % EVERY.get(name, 1):
            item.add_marker(pytest.mark.large)
        seen[item.path, name] += 1


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """What one run of a command compiles the next one loads, however small."""
    import jax

    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def make_tokenizer():
    from tiny import letter_tokenizer  # only now: what it imports has to pass the hook

    return letter_tokenizer


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer):
    return make_tokenizer()


@pytest.fixture
def write_rows(tmp_path):
    """write_rows(name, rows): a JSON-lines file; strings are written as they are."""

    def write(name: str, rows: list) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def prepared(tmp_path, tokenizer):
    """prepared(paths, loss, **data settings): TrainData with its cache in the test's folder."""

    def call(paths, loss=None, *, seed=0, tokenizer=tokenizer, bad_rows=None, **settings):
        from llme_jax.config import DataConfig, LossConfig
        from llme_jax.data.rows import BadRows
        from llme_jax.data.train_data import prepare
        from llme_jax.sources.resolve import Files

        paths = [paths] if isinstance(paths, str) else paths
        defaults = {
            "train_group_size": 3,
            "query_max_length": 16,
            "key_max_length": 24,
            "truncation_side": "right",
            "dataset_cache_dir": str(tmp_path / "cache"),
        }
        data = DataConfig(train_data=paths, **(defaults | settings))
        loss = loss or LossConfig()
        bad_rows = bad_rows or BadRows(data.max_bad_rows)
        files = Files(vars(data))
        how = files.training, files.cache, data, loss, tokenizer
        return prepare(*how, seed=seed, bad_rows=bad_rows)

    return call
