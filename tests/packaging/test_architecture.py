"""Check the table of packages in docs/architecture.md against the imports of the package."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lightning_plasticity"


def table() -> list[tuple[list[str], bool]]:
    """Return the names in each row of the table, without suffix, and whether they import Lightning."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.partition("## The way of a batch")[0].splitlines()]
    return [
        ([name.removesuffix(".py").rstrip("/") for name in re.findall(r"`([^`]+)`", row[1])], row[3].startswith("yes"))
        for row in rows
        if len(row) == 4 and "`" in row[1]
    ]


def imports(name: str) -> Iterator[str]:
    """Yield the full names of the modules that a module or a subpackage imports."""
    path = PACKAGE / f"{name}.py"
    for file in [path] if path.exists() else sorted((PACKAGE / name).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                is_package = node.module == "lightning_plasticity"
                yield from [f"{node.module}.{alias.name}" for alias in node.names] if is_package else [node.module]
            elif isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)


def test_table_names_every_module_once() -> None:
    names = [name for row, _ in table() for name in row]
    modules = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert sorted(names) == sorted(modules - {"__init__"})


def test_imports_point_downwards() -> None:
    order = {name: place for place, (row, _) in enumerate(table()) for name in row}
    upward = set()
    for name in order:
        for module in imports(name):
            package, _, imported = module.partition(".")
            target = imported.partition(".")[0]
            if package == "lightning_plasticity" and target not in ("", name) and order[target] <= order[name]:
                upward.add((name, imported))
    assert upward == set()


def test_table_marks_what_imports_lightning() -> None:
    packages = {"lightning", "pytorch_lightning"}
    for row, is_marked in table():
        found = any(module.partition(".")[0] in packages for name in row for module in imports(name))
        assert found == is_marked, row
