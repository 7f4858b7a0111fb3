"""Remedies that watch the units of a model while it is trained, and recycle some after an optimizer step."""

from __future__ import annotations

import warnings
import weakref
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity._validation import check_seed
from lightning_plasticity.interventions.base import StepIntervention
from lightning_plasticity.interventions.units.dependency_graph import describe_units
from lightning_plasticity.interventions.units.groups import UnitGroup, Units
from lightning_plasticity.interventions.units.layer_statistics import LayerStatistics, Statistic, UnitStatistics
from lightning_plasticity.interventions.units.unit_reset import fresh_incoming, plan_reset_from
from lightning_plasticity.interventions.weights.initialization import PicklableGenerator
from lightning_plasticity.interventions.weights.updates import RepairReport, WeightUpdate, apply_update, tensors_of

Record = dict[str, Tensor]
"""What a remedy remembers of a layer. Never changed in place."""


class UnitReplacement(StepIntervention):
    """Watches what the consumers of each unit read in training, and recycles the units that a rule chooses.

    One record a layer is kept, and updated once an optimizer step from all forward passes in training mode with
    gradients since the last one: the micro-batches of a step count as one batch, as do those of steps that were not
    taken (by a gradient scaler, say), and those of all processes. A layer that was not called since, or read values
    that are not finite, stays as it is. Where several layers read a unit, those that were called count. The records are
    in the state; what was heard since the last step is not, as little as the gradients that came with it.

    Those to come implement :meth:`new_record`, :meth:`updated` and :meth:`restarted`.

    Args:
        statistic: What is summed up of the consumers' inputs: a function of a module, not a method, since copies of
            the model copy their hooks and all that these hold.
        seed: Of the random numbers that new weights are drawn with.
        initial: Initial parameters and buffers by name, to draw from; by default each layer's ``reset_parameters``.
    """

    def __init__(self, statistic: Statistic, seed: int, initial: Mapping[str, Tensor] | None) -> None:
        self._statistic = statistic
        self._records: dict[str, Record] = {}
        self._fresh = _FreshUnits(seed, initial)
        self._watch: _Watch | None = None
        self._traced: _Traced | None = None

    @override
    def start(
        self,
        model: nn.Module,
        *,
        forward: Callable[[nn.Module], object] | None = None,
        make_copy: Callable[[], nn.Module] | None = None,
    ) -> None:
        units = self._units(model, forward, make_copy)
        if self._watch is not None and self._watch.model() is model and self._watch.units is units:
            self._adopt(units)
            return
        self.stop()
        self._adopt(units)
        consumers = {name: len(owner) for site in units.groups.values() for name, owner in site.consumers.items()}
        activity = UnitStatistics(model, consumers, self._statistic)
        self._watch = _Watch(weakref.ref(model), _shape(model), units, activity)

    @override
    def stop(self) -> None:
        if self._watch is not None:
            self._watch.activity.stop()
        self._watch = None

    @override
    def after_step(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer] = (),
        *,
        forward: Callable[[nn.Module], object] | None = None,
        make_copy: Callable[[], nn.Module] | None = None,
    ) -> RepairReport | None:
        watch = self._watch
        if watch is None or watch.model() is not model:
            raise RuntimeError(
                f"{self.name}.after_step(model) comes before start(model, forward=lambda model: model(inputs)), which "
                "must be called once for this model, before the first training step"
            )
        heard = watch.activity.reduce()
        if watch.activity.hooks_never_ran(model, heard):
            raise RuntimeError(
                f"{self.name} hears nothing of {type(model).__name__} while it is trained. Its hooks are not called in "
                "code that torch.compile compiled before they were there (torch.compiler.reset() has it compiled anew),"
                " and do not listen in evaluation mode (model.train() ends it); or these layers are not in use, and "
                "only something else changes them"
            )
        records, chosen = {}, {}
        for layer, site in watch.units.groups.items():
            called = {name: heard[name] for name in site.consumers if name in heard}
            if not all(bool(one.sums.isfinite().all()) for one in called.values()):
                warnings.warn(f"{self.name}: {layer!r} is passed over, values are not finite", stacklevel=2)
            elif called:
                records[layer], chosen[layer] = self.updated(model, site, self._records[layer], called)
        report = self._replace(watch.units, model, optimizers, records, chosen)
        self._records.update(records)
        watch.activity.reset()
        return report

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"layers": {layer: dict(record) for layer, record in self._records.items()}, **self._fresh.state_dict()}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._records = {layer: dict(record) for layer, record in state["layers"].items()}
        self._fresh.load_state_dict(state)
        if self._watch is not None:
            self._adopt(self._watch.units)
            self._watch.activity.reset()

    def __getstate__(self) -> dict[str, Any]:
        """A copy watches no model: it has seen none, and references to one cannot be pickled."""
        return {**vars(self), "_watch": None, "_traced": None}

    @abstractmethod
    def new_record(self, site: UnitGroup) -> Record:
        """The record of a layer whose units are all new."""

    @abstractmethod
    def updated(
        self, model: nn.Module, site: UnitGroup, record: Record, heard: Mapping[str, LayerStatistics]
    ) -> tuple[Record, Tensor]:
        """The record after a step, and the units to recycle.

        Args:
            model: The model, after the step.
            site: The layer.
            record: Its record before the step.
            heard: What its consumers have read, those that were called.
        """

    @abstractmethod
    def restarted(self, site: UnitGroup, record: Record, units: Tensor) -> Record:
        """The record after some units became new."""

    def changes(
        self, model: nn.Module, units: Units, records: Mapping[str, Record], chosen: Mapping[str, Tensor]
    ) -> WeightUpdate:
        """What is done to the model to recycle the chosen units."""
        return plan_reset_from(model, units, chosen, self._fresh.take(model, units, chosen))

    def _replace(
        self,
        units: Units,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        records: dict[str, Record],
        chosen: Mapping[str, Tensor],
    ) -> RepairReport | None:
        chosen = {layer: some for layer, some in chosen.items() if len(some)}
        if not chosen:
            return None
        before = self._fresh.state_dict()
        try:
            report = apply_update(self.name, self.changes(model, units, records, chosen), optimizers)
        except BaseException:
            self._fresh.load_state_dict(before)
            raise
        for layer, some in chosen.items():
            records[layer] = self.restarted(units.groups[layer], records[layer], some)
        return report

    def _units(
        self,
        model: nn.Module,
        forward: Callable[[nn.Module], object] | None,
        make_copy: Callable[[], nn.Module] | None,
    ) -> Units:
        """The units of the model: as last traced, if it has the same parameters and cannot be run."""
        if forward is None:
            traced = self._traced
            if traced is not None and traced.model() is model and traced.shape == _shape(model):
                return traced.units
            raise ValueError(
                f"{self.name} needs to see the model run: start(model, forward=lambda model: model(inputs))"
            )
        units = describe_units(model if make_copy is None else make_copy(), forward)
        if not units.groups:
            reasons = "; ".join(f"{layer!r}: {reason}" for layer, reason in units.excluded.items())
            raise ValueError(
                f"{self.name}: {type(model).__name__} has no units to recycle ({reasons or 'it has no layers'})"
            )
        self._traced = _Traced(weakref.ref(model), _shape(model), units)
        return units

    def _adopt(self, units: Units) -> None:
        """Every layer with units has a record that fits."""
        records = dict(self._records)  # also of layers that are frozen for now
        for layer, site in units.groups.items():
            new = self.new_record(site)
            old = self._records.get(layer, {})
            fits = {key: value.shape for key, value in old.items()} == {key: v.shape for key, v in new.items()}
            records[layer] = old if fits else new
        self._records = records


@dataclass(frozen=True)
class _Traced:
    """The units of a model, and what its parameters were when they were found."""

    model: weakref.ref[nn.Module]
    shape: object
    units: Units


@dataclass(frozen=True)
class _Watch(_Traced):
    activity: UnitStatistics


def _shape(model: nn.Module) -> object:
    return [(name, parameter.shape, parameter.requires_grad) for name, parameter in model.named_parameters()]


class _FreshUnits:
    """Incoming values for one unit after the other, from draws of whole layers: each unit of a draw is used once.

    Layers say how to draw themselves, not how to draw one unit, and a draw costs as much as a few training steps. The
    values are kept on the CPU: as much memory as the incoming weights of all layers with units.
    """

    def __init__(self, seed: int, initial: Mapping[str, Tensor] | None) -> None:
        check_seed(seed)
        if initial is not None and not isinstance(initial, Mapping):
            raise ValueError(f"initial={initial!r} must be a state_dict(), or None")
        # A state_dict() shares its tensors with the model, which is going to be trained.
        self._initial = None if initial is None else {name: v.detach().cpu().clone() for name, v in initial.items()}
        self._generator = PicklableGenerator()
        self._generator.manual_seed(seed)
        self._before = self._generator.get_state()
        self._values: dict[str, Tensor] = {}
        self._used: dict[str, Tensor] = {}

    def take(self, model: nn.Module, units: Units, chosen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values by name of the tensor, in which the chosen units are new."""
        tensors = tensors_of(model)
        names = {name for layer in chosen for name in units.groups[layer].incoming}
        if any(name not in self._values or self._values[name].shape != tensors[name].shape for name in names):
            # The first time, after a checkpoint was loaded, or when a layer is new or has grown: those that were there
            # before get the same values again.
            self._generator.set_state(self._before)
            self._draw(model, units)
        none = torch.tensor([], dtype=torch.long)
        if any(bool(torch.isin(some, self._used.get(layer, none)).any()) for layer, some in chosen.items()):
            self._used = {}
            self._before = self._generator.get_state()
            self._draw(model, units)
        self._used = self._used | {
            layer: torch.cat([self._used.get(layer, none), some]) for layer, some in chosen.items()
        }
        return self._values

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._before, "used": self._used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._before = state["generator"].cpu()
        self._generator.set_state(self._before)
        self._used = dict(state["used"])
        self._values = {}  # drawn again, the same, when needed

    def _draw(self, model: nn.Module, units: Units) -> None:
        # One number for a draw, however much is drawn: which heads are in use must not show in the next draw.
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=self._generator)))
        self._values = fresh_incoming(model, units, units.groups, generator, self._initial)
