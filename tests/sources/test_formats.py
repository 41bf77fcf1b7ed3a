"""Other formats become JSON lines: the same rows, once, wherever a data file is named."""

import bz2
import datetime
import gzip
import json
import os
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from named import expand_paths, is_made, local_file
from samples import make_rows

from llme_jax.data.corpus import Corpus
from llme_jax.data.rows import BadRows, parse_row, read_lines
from llme_jax.errors import InputError

ROWS = make_rows(20)
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLME_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def table() -> pyarrow.Table:
    """Every row has every column; what it lacks is null."""
    columns = dict.fromkeys(name for row in ROWS for name in row)
    return pyarrow.Table.from_pylist([columns | row for row in ROWS])


def write_arrow(path, opened):
    with opened(path, table().schema) as out:
        out.write_table(table(), max_chunksize=7)


WRITE = {
    "t.json.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "t.json.zst": lambda path: path.write_bytes(zstandard.compress(LINES)),
    "packed.json": lambda path: path.write_bytes(gzip.compress(LINES)),
    "t.parquet": lambda path: pyarrow.parquet.write_table(table(), path),
    "whole.arrow": lambda path: write_arrow(path, pyarrow.ipc.new_file),
    "stream.arrow": lambda path: write_arrow(path, pyarrow.ipc.new_stream),
}


@pytest.mark.parametrize("name", WRITE)
def test_the_same_rows(name, tmp_path):
    WRITE[name](tmp_path / name)
    assert is_made(name, "/nowhere")
    path = local_file(name, "/nowhere")
    assert Path(path).name == name.split(".")[0] + ".json"
    rows = [row for _, row in read_lines(path, dict, BadRows())]
    assert rows == ROWS
    made = os.stat(path).st_mtime_ns
    assert local_file(str(tmp_path / name), "/nowhere") == path
    assert os.stat(path).st_mtime_ns == made  # once


def test_made_again_when_the_file_changes(tmp_path):
    (tmp_path / "t.json.gz").write_bytes(gzip.compress(LINES))
    first = local_file("t.json.gz", "/nowhere")
    (tmp_path / "t.json.gz").write_bytes(gzip.compress(LINES * 2))
    assert Path(local_file("t.json.gz", "/nowhere")).read_bytes() == LINES * 2
    assert Path(first).read_bytes() == LINES


def test_globs_and_data_root(tmp_path):
    for name in ("a.json.gz", "b.json"):
        (tmp_path / name).write_bytes(gzip.compress(LINES) if name.endswith("gz") else LINES)
    paths = expand_paths(["llm-embedder:*.json*"], str(tmp_path))
    assert [Path(path).name for path in paths] == ["a.json", "b.json"]
    assert all(len(list(read_lines(path, parse_row, BadRows()))) == 20 for path in paths)
    assert not is_made("llm-embedder:b.json", str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(LINES)[:200], "this gzip file cannot be read"),
        (zstandard.compress(LINES)[:50] + b"\0" * 9, "this zstd file cannot be read"),
        (b"PAR1\x15\x04" + bytes(range(200, 256)), "this parquet file cannot be read"),
        (bz2.compress(LINES), "is a bzip2 file; unpack it, and give JSON lines"),
    ],
)
def test_what_cannot_be_read(content, message, tmp_path):
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(InputError, match=f"^t: {message}"):
        local_file("t", "/nowhere")
    assert not [path for path in tmp_path.rglob("*.json")]


@pytest.mark.parametrize(
    ("module", "name"), [("pyarrow", "t.parquet"), ("zstandard", "t.json.zst")]
)
def test_packages_that_are_missing(module, name, tmp_path, monkeypatch):
    WRITE[name](tmp_path / name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=f"takes {module}: pip install 'llme_jax.formats.'$"):
        local_file(name, "/nowhere")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('[{"query": "a"}, {"query": "b"}]', "one JSON array"),
        ('[\n  {"query": "a"}\n]', "one JSON array"),
        ('{\n  "query": "a"\n}', "one JSON object over many lines"),
        ("query,pos\na,b", "CSV"),
        ("query\tpos\na\tb", "a table with tabs"),
    ],
)
def test_text_of_another_format_is_called_so(tmp_path, text, kind):
    path = tmp_path / "t.json"
    path.write_text(text)
    said = rf"t.json: is {kind} instead of JSON lines: write one object a line"
    with pytest.raises(InputError, match=said):
        [*read_lines(str(path), dict, BadRows(9))]
    with pytest.raises(InputError, match=said):
        Corpus(path, "{query}")


def test_bytes_are_text_and_times_are_said(tmp_path, monkeypatch):
    monkeypatch.setenv("LLME_JAX_CACHE", str(tmp_path / "cache"))
    when = datetime.date(2026, 12, 1)
    path = tmp_path / "t.parquet"
    write = lambda text: pyarrow.parquet.write_table(  # noqa: E731
        pyarrow.table({"query": pyarrow.array([text], pyarrow.binary()), "when": [when]}), path
    )
    write("é".encode())
    row = json.loads(Path(local_file(str(path))).read_text())
    assert row == {"query": "é", "when": "2026-12-01"}
    write(b"\xff")
    with pytest.raises(InputError, match=r"t\.parquet: has a value that is no text"):
        local_file(str(path))
