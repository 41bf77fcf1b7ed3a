"""The data doctor, as a person starts it."""

import json

import pytest

from llme_jax.doctor.__main__ import main


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, make_tokenizer) -> str:
    folder = tmp_path_factory.mktemp("encoder")
    make_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    return str(folder)


@pytest.fixture
def doctor(encoder, capsys):
    """doctor("a.json --flag ..."): exit code, what was printed."""

    def call(*argv: str) -> tuple[int, str]:
        code = main([*argv, "--query_encoder", encoder])
        return code, capsys.readouterr().out

    return call


@pytest.fixture
def found(doctor):
    """found("a.json --flag ..."): exit code, what --json says."""

    def call(*argv: str) -> tuple[int, dict]:
        code, printed = doctor(*argv, "--json", "-")
        return code, json.loads(printed)

    return call
