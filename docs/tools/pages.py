"""Add pages to the documentation site: those of the root folder, and those that are written from the code."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]

ROOT_PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md"}
"""Files of the root folder, and what they are called on the site."""

EXPORTING = {"curvature": "Curvature", "functional": "Functions", "metrics": "Metrics"}
"""Packages that get a page with all that they export, and its heading."""

KINDS = {
    "Repair": "repair: at a collapse, at a task or every so many steps",
    "StepIntervention": "step intervention: after every optimizer step",
    "Regularizer": "regularizer: a term of the loss",
}
"""The base classes of interventions, each with what it means."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add a page for each intervention to the navigation."""
    (section,) = [entry for entry in config.nav or [] if "Interventions" in entry]
    section["Interventions"] += [{"One by one": ["api/interventions/index.md", *map(_path, interventions())]}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root folder and those of the interventions."""
    for source, target in ROOT_PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, target, content=re.sub(r"\]\((?:docs/)?", "](", text)))
    for name, heading in EXPORTING.items():
        files.append(File.generated(config, f"api/{name}.md", content=_exports(name, heading)))
    found = interventions()
    for name in found:
        files.append(File.generated(config, _path(name), content=_page(name)))
    files.append(File.generated(config, "api/interventions/index.md", content=_index(found)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to files of the root folder lead to their pages."""
    up = "../" * page.file.src_uri.count("/")
    for source, target in ROOT_PAGES.items():
        markdown = re.sub(rf"\]\((?:\.\./)*{re.escape(source)}", f"]({up}{target}", markdown)
    return markdown


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write formulas as MathML, which browsers show without a script."""
    return re.sub(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', _mathml, content, flags=re.DOTALL)


def _mathml(match: re.Match[str]) -> str:
    return convert(html.unescape(match[2]).strip(), display="block" if match[1] == "div" else "inline")


def interventions() -> dict[str, griffe.Class]:
    """Return the concrete classes of interventions that the package exports, by name."""
    package = _package("interventions")
    exported = {str(name): package[str(name)] for name in package.exports}
    return {
        name: value.final_target
        for name, value in sorted(exported.items(), key=lambda item: item[0].lower())
        if value.is_class and _kind(value) and name not in KINDS
    }


def _package(name: str) -> Any:
    """Return a package of this one, read from its sources."""
    return griffe.load("lightning_plasticity", search_paths=[ROOT], resolve_aliases=True)[name]


def _exports(name: str, heading: str) -> str:
    names = sorted(map(str, _package(name).exports), key=str.lower)
    directives = "\n\n".join(f"::: lightning_plasticity.{name}.{each}" for each in names)
    return f"""# {heading}

What `lightning_plasticity.{name}` exports. None of it needs Lightning.

{directives}
"""


def _kind(value: Any) -> str:
    """Return the base class that tells the kind of an intervention; empty if there is none."""
    return next((base.name for base in value.mro() if base.name in KINDS), "")


def _path(name: str) -> str:
    return f"api/interventions/{name}.md"


def _page(name: str) -> str:
    row = next(line for line in _table() if line.startswith(f"| `{name}`"))
    headings, values = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in (_table()[0], row))
    facts = "\n".join(f"| {key} | {value} |" for key, value in list(zip(headings, values, strict=True))[1:])
    return f"""---
title: {name}
---

# {name}

::: lightning_plasticity.interventions.{name}
    options:
      show_root_heading: false
      show_root_toc_entry: false
      members: false

## In brief

| | |
|---|---|
{facts}

[The table of all](../../interventions.md#the-rules) says how the cost was measured, and
[which one to try first](../../interventions.md#which-one-to-try-first) what the evidence says.
"""


def _table() -> list[str]:
    """Return the lines of the table of rules."""
    text = (ROOT / "docs" / "interventions.md").read_text(encoding="utf-8")
    return text[text.index("| name | rule |") :].partition("\n\n")[0].splitlines()


def _index(found: dict[str, griffe.Class]) -> str:
    rows = "\n".join(f"| [`{name}`]({name}.md) | {KINDS[_kind(value)]} |" for name, value in found.items())
    return f"""# All interventions

The classes of `lightning_plasticity.interventions`, listed from the code.

| name | kind |
|---|---|
{rows}
"""
