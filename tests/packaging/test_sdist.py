"""Check that the documentation names paths that exist, and that the sdist holds them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

import lightning_plasticity

ROOT = Path(__file__).parents[2]

DOCUMENTS = [
    *["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "Makefile"],
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))),
]

# Hatchling always adds these.
ALWAYS_INCLUDED = {"README.md", "LICENSE", "pyproject.toml", ".gitignore"}

# Environments, caches and outputs, which `make clean` removes.
GENERATED = re.compile(r"(\.venv|demo-output|evidence-output|lightning_logs|build|dist|\.\w+_cache|\.hypothesis)\b")


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def named_paths(document: str) -> Iterator[Path]:
    """Yield the files and folders of the repository that a document names, relative to the root."""
    text = re.sub(r"https?://\S+", "", (ROOT / document).read_text(encoding="utf-8"))
    bases = [Path(), Path("lightning_plasticity"), Path(document).parent]
    words = re.findall(r"(?:\.\.?/)?[\w.-]+(?:/[\w.-]+)*/?(?![<\"])", text)
    modules = [f"{word.replace('.', '/')}.py" for word in re.findall(r"(?<!\w)(benchmarks(?:\.\w+)+)", text)]
    for word in dict.fromkeys([*words, *modules]):
        path = word.rstrip(".")
        is_path = path.endswith("/") or re.search(r"\w\.(py|md|png|yaml|toml|txt|cff)$", path)
        if not is_path or GENERATED.match(path):
            continue
        existing = [base / path for base in bases if (ROOT / base / path).exists()]
        assert existing, f"{document} names {path}, which does not exist"
        yield Path((ROOT / existing[0]).resolve().relative_to(ROOT.resolve()))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_sdist_holds_the_paths_that_documents_name(document: str, pyproject: dict[str, Any]) -> None:
    include = pyproject["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    held = {entry.lstrip("/") for entry in include} | ALWAYS_INCLUDED
    missing = {str(path) for path in [Path(document), *named_paths(document)] if held.isdisjoint([path.parts[0]])}
    assert not missing


def test_sdist_includes_only_what_exists(pyproject: dict[str, Any]) -> None:
    include = pyproject["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert [entry for entry in include if not (ROOT / entry.lstrip("/")).exists()] == []


def test_version_is_written_in_one_place(pyproject: dict[str, Any]) -> None:
    assert pyproject["project"]["dynamic"] == ["version"]
    source = ROOT / pyproject["tool"]["hatch"]["version"]["path"]
    assert source == Path(lightning_plasticity.__file__)
    assert f'__version__ = "{lightning_plasticity.__version__}"' in source.read_text(encoding="utf-8")
    assert not re.search(r"^version:", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
