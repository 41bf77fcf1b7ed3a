"""README and map tell the truth: every file is named, the commands are those that CI runs."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text()
MAPPED = ("llme_jax", "configs", "scripts", "benchmarks", "docs", "tests")


def files_in_map() -> set[str]:
    """Paths of the tree in docs/architecture.md: names, two spaces a folder, and a phrase."""
    tree = ARCHITECTURE.split("## Map")[1].split("```")[1]
    found, parents = set(), []
    for line in tree.strip("\n").splitlines():
        match = re.fullmatch(r"( *)(\S+/|\S+  +\S.*)", line)
        assert match, f"a name and a phrase, please: {line!r}"
        depth, name = len(match[1]) // 2, match[2].split()[0]
        parents[depth:] = [name.rstrip("/")]
        if not name.endswith("/"):
            found.add("/".join(parents))
    return found


def test_the_map_names_every_file():
    on_disk = {
        str(path.relative_to(ROOT))
        for folder in MAPPED
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".sh", ".md", ".json", ".npz")
        and path.name != "__init__.py"
        and "goldens" not in path.parts
    }
    on_disk |= {"setup.py", "README.md"}
    assert files_in_map() == on_disk


def test_ci_runs_the_second_command():
    commands = re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)
    assert len(commands) == 2
    assert commands[0].endswith("-m llme_jax.train --config quickstart.py")
    assert commands[1].endswith("-m pytest")
    assert commands[1] in (ROOT / ".ci/run").read_text()


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
