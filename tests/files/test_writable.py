"""Where nothing can be written is one sentence, before any work, and nothing is left behind."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from commands import finish, start
from small_run import EVALUATION, arguments, write_data

from llme_jax import build_tfds, rank, retrieve, score, train
from llme_jax.doctor import __main__ as doctor
from llme_jax.errors import InputError
from llme_jax.files import storage
from llme_jax.files.atomic import atomic_dir, atomic_write
from llme_jax.files.cache import check_cache
from llme_jax.files.storage import check_writable


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """refused(main, argv): what the command says; in its folder, only `afile` may be found."""
    monkeypatch.chdir(tmp_path)
    Path("afile").touch()

    def call(main, argv) -> str:
        with pytest.raises(InputError) as error:
            main([str(word) for word in argv])
        assert "\n" not in str(error.value)
        assert [*tmp_path.rglob("*")] == [tmp_path / "afile"]
        return str(error.value)

    return call


@pytest.fixture
def read_only(monkeypatch):
    """No folder can be written to, as for a user without permission."""

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(storage, "TemporaryFile", refuse)


proc = pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc")
BELOW = ["afile/x", "afile", pytest.param("/proc/x/y", marks=proc)]


@pytest.mark.parametrize("path", BELOW)
@pytest.mark.parametrize("flag", ["--output_dir", "--dataset_cache_dir", "--log_path"])
@pytest.mark.parametrize("main", [train.main, retrieve.main])
def test_folders_of_a_run(data, tmp_path, refused, main, flag, path):
    if main is train.main:
        argv = arguments(data, tmp_path / "out", *EVALUATION)
    else:
        argv = ["--data_root", data, *EVALUATION[:4], "--query_encoder", data / "bert"]
    argv += ["--dataset_cache_dir", tmp_path / "cache", flag, path]
    if flag == "--log_path" and path == "afile":  # a log grows
        path = tmp_path
        argv[-1] = path
    assert refused(main, argv).startswith(f"{flag} {path}: ")


def test_the_plan_of_a_run_says_it_too(data, refused):
    argv = ["--train_data", data / "train.json", "--query_encoder", data / "bert", "--plan"]
    assert refused(train.main, [*argv, "--output_dir", "afile/x"]).startswith("--output_dir afile")


def test_the_cache_that_a_variable_names(data, refused, monkeypatch):
    monkeypatch.setenv("LLME_JAX_CACHE", "afile/x")
    argv = ["--train_data", data / "train.json", "--query_encoder", data / "bert"]
    assert refused(train.main, argv).startswith("LLME_JAX_CACHE afile/x: ")


@pytest.mark.parametrize("path", BELOW)
def test_the_folder_of_a_dataset(data, refused, path):
    argv = ["--name", "nq", "--train_data", data / "train.json", "--data_dir", path]
    assert refused(build_tfds.main, argv).startswith(f"--data_dir {path}: ")


@pytest.mark.parametrize("path", ["afile/x", ".", pytest.param("/proc/x", marks=proc)])
@pytest.mark.parametrize("flag", ["--json", "--plot"])
def test_files_of_the_doctor(data, refused, capsys, flag, path):
    argv = [data / "train.json", "--query_encoder", data / "bert", flag, path]
    assert refused(doctor.main, argv).startswith(f"{flag} {path}: ")
    assert not capsys.readouterr().out


def test_what_goes_beside_the_data(data, refused, read_only):
    argv = ["--eval_data", data / "test.json"]
    said = refused(score.main, [*argv, "--model_name_or_path", "none"])
    assert said.startswith(f"--eval_data {data}: ") and "give an --output_dir" in said
    argv += ["--corpus", data / "corpus.json", "--metrics", "collate_neg", "--load_result"]
    said = refused(retrieve.main, argv)
    assert said.startswith(f"--eval_data {data}: ") and said.endswith("give --save_to_output")


def test_nothing_is_left_of_a_check(tmp_path):
    for path, is_file in (("new/folder", False), ("", False), ("new.json", True), ("a/b", True)):
        check_writable("--flag", tmp_path / path, is_file=is_file)
    (tmp_path / "there.json").write_text("kept")
    check_writable("--flag", tmp_path / "there.json", is_file=True)
    assert [path.name for path in tmp_path.iterdir()] == ["there.json"]
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(InputError, match="link is no folder, give another path"):
        check_writable("--flag", tmp_path / "link")


def test_a_cache_that_is_there_may_be_read_only(tmp_path, read_only):
    check_cache(str(tmp_path))
    with pytest.raises(InputError, match=r"nothing can be written in .* \(Permission denied\)"):
        check_cache(str(tmp_path / "new"))


@pytest.mark.parametrize("publish", [atomic_dir, atomic_write])
def test_what_is_refused_later_is_one_sentence_too(tmp_path, publish):
    (tmp_path / "afile").touch()
    path = tmp_path / "afile/x"
    with pytest.raises(InputError, match=f"^{path}: cannot be written"), publish(path):
        pass


def test_a_log_that_is_a_pipe_is_refused(data, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    words = "--retrieval_method random --eval_data {0}/test.json --corpus {0}/corpus.json"
    with pytest.raises(InputError, match=r"--log_path .*pipe: is no file"):
        argv = [*words.format(data).split(), "--output_dir", str(tmp_path / "out")]
        retrieve.main([*argv, "--log_path", str(tmp_path / "pipe")])


@pytest.fixture
def measuring(data, tmp_path):
    words = ["--eval_data", str(data / "test.json"), "--corpus", str(data / "corpus.json")]
    words += ["--retrieval_method", "random", "--metrics", "mrr"]
    words += ["--output_dir", str(tmp_path / "out"), "--log_path", str(tmp_path / "log")]
    return [sys.executable, "-m", "llme_jax.retrieve", *words]


def test_a_full_disk_is_one_sentence(measuring):
    """/dev/full takes nothing: as a log, and as what is printed to."""
    done = subprocess.run([*measuring, "--log_path", "/dev/full"], capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith("error: the disk is full")
    with open("/dev/full", "w") as full:
        done = subprocess.run(measuring, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: the disk is full" in done.stderr


@pytest.mark.parametrize(
    ("command", "size"),
    [
        ("train", 40_000),
        pytest.param("train --lora_rank 2", 20_000, marks=pytest.mark.slow),
        ("rank", 1000),
    ],
)
def test_a_file_that_may_not_be_so_large(data, tmp_path, command, size):
    """In the state, in the model, in kept scores, which numpy writes."""
    command, *more = command.split()
    argv = arguments(data, tmp_path / "out", *more)
    if command == "rank":
        texts = ["--query_max_length", "24", "--key_max_length", "32", "--ranker", data / "bert"]
        argv = [*map(str, texts), "--eval_data", str(data / "train.json"), "--save_to_output"]
        argv += ["--metrics", "mrr", "--output_dir", str(tmp_path / "out")]
    process = start(argv, 1, command)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))
    said = finish(process, 1)
    assert said.count("Traceback") == said.count("ERROR:") == 0
    assert said.splitlines()[-1].startswith("error: the disk is full, or what you or one file may")
    assert not (tmp_path / "out/best").exists()


def test_a_reader_that_has_left_is_one_sentence(measuring):
    process = subprocess.Popen(measuring, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait() == 1 and "Traceback" not in said and "BrokenPipe" not in said
    assert said.splitlines()[-1] == "error: nobody reads what is printed any more"


@pytest.mark.parametrize("command", ["train", "retrieve", "rank"])
def test_files_are_looked_for_before_a_model(data, tmp_path, command):
    """The model does not exist either: it would be fetched, which takes long where it can be."""
    words = ["--eval_data", "nowhere.json", "--corpus", str(data / "corpus.json")]
    words += ["--output_dir", str(tmp_path / "out"), "--log_path", str(tmp_path / "log")]
    main = {"train": train.main, "retrieve": retrieve.main, "rank": rank.main}[command]
    model = "--ranker" if command == "rank" else "--query_encoder"
    if command == "train":
        words += ["--train_data", str(data / "train.json")]
    with pytest.raises(InputError, match=r"--eval_data nowhere.json: there is no such file"):
        main([*words, model, "nobody/nothing"])
    if command == "train":
        with pytest.raises(InputError, match=r"there is no file nowhere.json"):
            main([*words, model, "nobody/nothing", "--train_data", "nowhere.json"])
