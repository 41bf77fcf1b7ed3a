"""--push_to_hub: what is uploaded, what is refused before training, what a failure says."""

from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants
from sentence_transformers import SentenceTransformer
from small_run import EVALUATION, arguments, write_data

from llme_jax import rank, train
from llme_jax.errors import InputError, RunError
from llme_jax.training.hub import push


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def hub(monkeypatch):
    """Calls of HfApi, which goes nowhere, and a token."""
    calls = []

    class Api:
        def create_repo(self, repo, **how):
            calls.append((repo, how))
            return f"https://huggingface.co/{repo}"

        def create_commit(self, repo, operations, commit_message):
            calls.append((repo, {o.path_in_repo: Path(o.path_or_fileobj) for o in operations}))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_mine")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return calls


def test_the_best_model_in_one_commit(data, tmp_path, hub, monkeypatch, capsys):
    out = tmp_path / "out"
    argv = arguments(data, out, *EVALUATION, "--max_steps", "4", "--eval_steps", "2")
    argv += ["--metric_for_best_model", "ndcg@10", "--push_to_hub", "me/mine"]

    def down(*_, **__):
        raise ConnectionError("no route\nto host")

    with monkeypatch.context() as broken:
        broken.setattr(huggingface_hub.HfApi, "create_commit", down)
        with pytest.raises(RunError) as error:
            train.main(argv)
    best = (out / "best").resolve()
    assert str(error.value) == (
        f"--push_to_hub me/mine: ConnectionError: no route; the model is in {best}: give the same "
        f"command again, or run `hf upload me/mine {best}/encoder . --private`"
    )
    before = {path: path.stat().st_mtime_ns for path in out.glob("checkpoint-*/state/**/*")}
    hub.clear()
    assert before and train.main(argv) == 0  # trains nothing again
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("checkpoint-*/state/**/*")}
    assert "hub:     https://huggingface.co/me/mine\n" in capsys.readouterr().out

    (made, how), (committed, files) = hub
    assert made == committed == "me/mine" and how == {"private": True, "exist_ok": True}
    encoder = best / "encoder"
    assert {*files.values()} == {path for path in encoder.rglob("*") if path.is_file()}
    for at, path in files.items():  # as they would be downloaded
        (tmp_path / "there" / at).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "there" / at).write_bytes(path.read_bytes())
    there, here = (SentenceTransformer(str(f), device="cpu") for f in (tmp_path / "there", encoder))
    np.testing.assert_array_equal(there.encode(["w1 w2"]), here.encode(["w1 w2"]))
    card = files["README.md"].read_text()
    assert 'SentenceTransformer("me/mine")' in card and str(out) not in card


def test_where_folders_go(tmp_path, hub):
    for name in ("encoder", "adapter", "query_encoder", "key_encoder", "state", "ranker"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
        (tmp_path / name / "README.md").write_text(name)
    for exports, want in {
        ("ranker",): {"README.md": "ranker", "config.json": "ranker"},
        ("encoder", "adapter"): {
            "README.md": "encoder", "config.json": "encoder",
            "adapter/README.md": "adapter", "adapter/config.json": "adapter",
        },
        ("query_encoder", "key_encoder"): {
            "README.md": "query_encoder",
            "query_encoder/README.md": "query_encoder", "key_encoder/README.md": "key_encoder",
            "query_encoder/config.json": "query_encoder", "key_encoder/config.json": "key_encoder",
        },
    }.items():  # fmt: skip
        hub.clear()
        push(tmp_path, exports, "me/mine", private=False)
        assert hub[0] == ("me/mine", {"private": False, "exist_ok": True})
        assert {at: path.read_text() for at, path in hub[1][1].items()} == want


@pytest.mark.parametrize(
    "repo", ["mine", "me/my model", "me/mine/too", "me/a--b", "https://hf.co/me"]
)
def test_a_name_that_is_none(data, tmp_path, hub, repo):
    argv = arguments(data, tmp_path / "out", "--push_to_hub", repo, "--train_data", "nowhere.json")
    with pytest.raises(InputError, match=rf"^--push_to_hub {repo}: give OWNER/NAME, of"):
        train.main(argv)
    assert not (tmp_path / "out").exists() and not hub


def test_what_is_missing_is_said_before_training(data, tmp_path, hub, monkeypatch):
    argv = arguments(data, tmp_path / "out", "--push_to_hub", "me/mine")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(InputError, match="me/mine: there is no token, run `hf auth login` or set"):
        train.main(argv)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="me/mine: HF_HUB_OFFLINE is set, unset it"):
        train.main(argv)
    with pytest.raises(InputError, match="--push_to_hub: uploads what was trained, give --train_d"):
        rank.main("--ranker x --eval_data x.json --push_to_hub me/mine".split())
    assert not (tmp_path / "out").exists() and not hub
