"""Show a saved run, or the units of a network, on the command line: ``python -m lightning_plasticity``."""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_plasticity.interventions import describe_units
from lightning_plasticity.reporting.page import report_page, summary
from lightning_plasticity.reporting.saved_runs import UnreadableRunError, read_checkpoint, read_runs


class CommandError(ValueError):
    """An argument of the command line that cannot be used."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit status: 0, or 1 after an error, of which one sentence is printed.

    Args:
        arguments: The command and its arguments; by default those of the process.
    """
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except (CommandError, UnreadableRunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lightning_plasticity", description=__doc__.partition(":")[0] + ".")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    report = commands.add_parser(
        "report", help="show the numbers, alarms and repairs of a run", description=_report.__doc__
    )
    report.add_argument("path", type=Path, metavar="LOGDIR_OR_CHECKPOINT")
    report.add_argument("--output", type=Path, metavar="FILE", help="write an HTML page, too, such as report.html")
    report.set_defaults(command=_report)
    units = commands.add_parser("units", help="show the units that can be reset", description=_units.__doc__)
    units.add_argument("module", metavar="MODULE:CLASS", help="a LightningModule, such as my_project.models:Classifier")
    units.add_argument("--checkpoint", type=Path, required=True, metavar="FILE")
    units.add_argument(
        "--input-shape",
        metavar="N,...",
        help="shape of a batch of random inputs, such as 2,3,32,32; by default example_input_array of the module",
    )
    units.set_defaults(command=_units)
    for command in (report, units):
        command.add_argument(
            "--trust",
            action="store_true",
            help="load objects other than tensors and plain Python, too: a checkpoint can then run code",
        )
    return parser


def _report(options: argparse.Namespace) -> None:
    """Show a run from its checkpoint, the newest checkpoint in a directory, or TensorBoard's files in it."""
    runs = read_runs(options.path, trust=options.trust)
    for run in runs:
        print("" if run.name is None else f"{run.name}: ", f"from {run.source}", sep="")
        print(run.history)
        print(summary(run.history))
    if options.output is not None:
        try:
            options.output.write_text(report_page(runs), encoding="utf-8")
        except OSError as error:
            raise CommandError(f"--output {options.output} cannot be written: {error.strerror}") from error
        print(f"written to {options.output}")


def _units(options: argparse.Namespace) -> None:
    """Show which units of a network can be reset one by one, and why others cannot."""
    kind = _module_class(options.module)
    shape = None if options.input_shape is None else _shape(options.input_shape)
    # The error for a file that is not trusted, or no checkpoint, is raised before any code of it could run.
    read_checkpoint(options.checkpoint, trust=options.trust)
    module = _load(kind, options.checkpoint, trust=options.trust)
    inputs = (
        module.example_input_array if shape is None else torch.randn(shape, generator=torch.Generator().manual_seed(0))
    )
    if inputs is None:
        raise CommandError(
            f"{options.module} has no example_input_array: pass the shape of a batch, as --input-shape 2,3,32,32"
        )
    try:
        print(describe_units(module, forward=lambda module: _call(module, inputs)))
    except Exception as error:
        source = "example_input_array" if shape is None else f"--input-shape {options.input_shape}"
        raise CommandError(f"{options.module} does not run on {source}: {_on_one_line(error)}") from error


def _module_class(path: str) -> Any:
    """Return the class at an import path such as ``my_project.models:Classifier``."""
    name, _, attribute = path.partition(":")
    if not (name and attribute):
        raise CommandError(f"{path!r} must be MODULE:CLASS, such as my_project.models:Classifier")
    try:
        kind: Any = getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError) as error:
        raise CommandError(f"{path!r} cannot be imported: {error}") from error
    # That of pytorch_lightning has the same methods, but is another class.
    if not (isinstance(kind, type) and issubclass(kind, nn.Module) and hasattr(kind, "load_from_checkpoint")):
        raise CommandError(f"{path!r} must be a class that derives from LightningModule, not {kind!r}")
    return kind


def _shape(text: str) -> list[int]:
    sizes = text.split(",")
    if not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
        raise CommandError(
            f"--input-shape {text!r} must be positive numbers with commas between them, such as 2,3,32,32"
        )
    return [int(size) for size in sizes]


def _load(kind: Any, path: Path, *, trust: bool) -> LightningModule:
    arguments: dict[str, Any] = {"map_location": "cpu"}
    # Releases before 2.6 have no such argument, and load everything.
    if "weights_only" in inspect.signature(kind.load_from_checkpoint).parameters:
        arguments["weights_only"] = not trust
    try:
        module: LightningModule = kind.load_from_checkpoint(path, **arguments)
    except Exception as error:
        raise CommandError(f"{path} does not fit {kind.__qualname__}: {_on_one_line(error)}") from error
    return module


def _call(module: nn.Module, inputs: Any) -> Any:
    """Call the module as Lightning does with its example inputs."""
    if isinstance(inputs, dict):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, tuple) else module(inputs)


def _on_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


if __name__ == "__main__":
    sys.exit(main())
