"""Define loggers for services, with a record in place of the service."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import pytest
from lightning.pytorch.loggers import CometLogger, MLFlowLogger, WandbLogger

from tests.helpers.modules import MemoryLogger


class Record:
    """Stands for the object of a service: keeps the calls of its methods."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, method: str) -> Any:
        return lambda *args, **kwargs: self.calls.append((method, args, kwargs))

    def of(self, method: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Return the arguments of all calls of a method."""
        return [(args, kwargs) for name, args, kwargs in self.calls if name == method]


class Unreachable:
    """Stands for the object of a service that fails in every call."""

    def __getattr__(self, method: str) -> Any:
        raise ConnectionError(f"no route for {method}")


class _Recording(MemoryLogger):
    """Keeps numbers in memory, and calls of its service in a record."""

    experiment: Any = None
    run_id = "run"
    save_dir = None

    def __init__(self, experiment: Any = None) -> None:
        # The loggers themselves raise where their packages are not installed.
        self.rows = []
        self.experiment = Record() if experiment is None else experiment

    def finalize(self, status: str) -> None:
        pass

    def log_graph(self, *_: Any, **__: Any) -> None:
        pass


class RecordingWandb(_Recording, WandbLogger):
    pass


class RecordingMLFlow(_Recording, MLFlowLogger):
    pass


class RecordingComet(_Recording, CometLogger):
    pass


class Media:
    """Stands for an object of a service that holds what it is given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs


class Counts:
    """Stands for ``comet_ml.Histogram``."""

    def add(self, values: Any, counts: Any) -> None:
        self.values, self.counts = values, counts


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the packages of the services, which need not be installed."""
    contents: Mapping[str, dict[str, type]] = {
        "wandb": {"Histogram": Media, "Table": Media, "Image": Media},
        "comet_ml": {"Histogram": Counts},
    }
    for name, names in contents.items():
        package = ModuleType(name)
        vars(package).update(names)
        monkeypatch.setitem(sys.modules, name, package)
