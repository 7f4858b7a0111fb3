"""Record statistics of a model's units during training, and re-initialise some after an optimizer step."""

from __future__ import annotations

import warnings
import weakref
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity._validation import check_seed
from lightning_plasticity.interventions.base import InterventionContext, StepIntervention
from lightning_plasticity.interventions.remembered_weights import RemembersInitialWeights
from lightning_plasticity.interventions.selection import Patterns
from lightning_plasticity.interventions.units.discovery import describe_units
from lightning_plasticity.interventions.units.groups import UnitGroup, Units
from lightning_plasticity.interventions.units.layer_statistics import (
    LayerStatistics,
    PooledUnits,
    Statistic,
    UnitStatistics,
)
from lightning_plasticity.interventions.units.selected_units import select_units
from lightning_plasticity.interventions.units.unit_reset import plan_reset
from lightning_plasticity.interventions.weights.initial_distribution import InitialDistribution
from lightning_plasticity.interventions.weights.initialization import PicklableGenerator
from lightning_plasticity.interventions.weights.updates import RepairReport, WeightUpdate, apply_update
from lightning_plasticity.isolation.weights import named_tensors

Record = dict[str, Tensor]
"""The stored state of one layer's units. Never changed in place."""


class UnitReplacement(RemembersInitialWeights, StepIntervention):
    """An intervention that records the inputs of each unit's consumers, and re-initialises the units that a rule picks.

    Each layer has one record. It is updated once per optimizer step, from all forward passes in training mode with
    gradients since the last one. All micro-batches since then count as one batch: those of all processes, and those of
    steps that were skipped, such as by a gradient scaler. The record of a layer stays as it is if the layer was not
    called since, if it or a consumer is frozen, or if its consumers read values that are not finite. Where several
    layers read a unit, those that were called count. The records are part of the state; statistics since the last step
    are not, like gradients.

    Subclasses implement :meth:`new_record`, :meth:`update_records` and :meth:`restart_record`.

    Args:
        statistic: The statistic of the consumers' inputs to sum up: a function of a module, not a method, since copies
            of the model copy their hooks and everything that these refer to.
        seed: Seed of the random numbers that new weights are drawn with.
        initial: Initial parameters and buffers by name, to draw from, as for
            :class:`~lightning_plasticity.interventions.ReDo`.
        include: Names of the layers whose units are replaced, with wildcards; by default all.
        exclude: Names of layers whose units stay as they are.
        with_gradients: Whether the statistic takes the gradients with respect to these inputs, too.
    """

    runs_model = False

    def __init__(
        self,
        statistic: Statistic,
        seed: int,
        initial: Mapping[str, Tensor] | None,
        include: Patterns,
        exclude: Patterns,
        *,
        with_gradients: bool = False,
    ) -> None:
        super().__init__(include, exclude)
        check_seed(seed, self.name)
        self.seed = seed
        self.remember_given(initial)
        self._statistic = statistic
        self._with_gradients = with_gradients
        self._records: dict[str, Record] = {}
        self._generator = PicklableGenerator()
        self._generator.manual_seed(seed)
        self._distributions: dict[str, InitialDistribution] = {}
        self._hooked: _HookedModel | None = None
        self._traced: _TracedModel | None = None
        self._pooled: tuple[object, PooledUnits] | None = None

    @override
    def prepare(self, model: nn.Module, context: InterventionContext) -> None:
        units = self._find_units(model, context)
        if self._hooked is not None and self._hooked.model() is model and self._hooked.units is units:
            self._add_records(units)
            return
        self.stop()
        self._add_records(units)
        tensors = named_tensors(model)
        names = dict.fromkeys(name for group in units.groups.values() for name in group.incoming)
        self.remember({name: tensors[name] for name in names}, context)
        channels = {name: len(index) for group in units.groups.values() for name, index in group.consumers.items()}
        statistics = UnitStatistics(model, channels, self._statistic, with_gradients=self._with_gradients)
        is_trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        trained = {
            layer: [name for name in {**group.incoming, **group.outgoing} if is_trained.get(name)]
            for layer, group in units.groups.items()
        }
        self._hooked = _HookedModel(weakref.ref(model), _parameter_shapes(model), units, statistics, trained)

    @override
    def stop(self) -> None:
        if self._hooked is not None:
            self._hooked.statistics.stop()
        self._hooked = None

    @override
    def step(self, model: nn.Module, context: InterventionContext) -> RepairReport | None:
        hooked = self._hooked
        if hooked is None or hooked.model() is not model:
            raise RuntimeError(
                f"{self.name}.after_step(model) comes before start(model, forward=lambda model: model(inputs)), which "
                "must be called once for this model, before the first training step"
            )
        if not hooked.units.groups:
            return None
        statistics = hooked.statistics.reduce()
        if hooked.statistics.hooks_never_ran(model, statistics):
            raise RuntimeError(
                f"{self.name} recorded no activations of {type(model).__name__} although its weights changed. Hooks do "
                "not run in code that torch.compile compiled before they were registered (torch.compiler.reset() "
                "discards it), and record nothing in evaluation mode (model.train() ends it); or these layers are not "
                "used, and their weights change for another reason"
            )
        frozen = hooked.frozen_layers(model)
        groups = [group for layer, group in hooked.units.groups.items() if layer not in frozen]
        observed = [group for group in groups if self._is_observed(group, statistics)]
        records, chosen = self.update_records(model, observed, self._records, statistics) if observed else ({}, {})
        report = self._replace_units(hooked.units, model, context, records, chosen)
        self._records.update(records)
        hooked.statistics.reset()
        return report

    @override
    def state_dict(self) -> dict[str, Any]:
        layers = {layer: dict(record) for layer, record in self._records.items()}
        return {"layers": layers, "generator": self._generator.get_state(), **super().state_dict()}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._records = {layer: dict(record) for layer, record in state["layers"].items()}
        self._generator.set_state(state["generator"].cpu())
        super().load_state_dict(state)
        if self._hooked is not None:
            self._add_records(self._hooked.units)
            self._hooked.statistics.reset()

    def __getstate__(self) -> dict[str, Any]:
        """Exclude the model from copies: they have no hooks on it, and weak references cannot be pickled."""
        return {**vars(self), "_hooked": None, "_traced": None, "_pooled": None, "_distributions": {}, "_of_run": None}

    @abstractmethod
    def new_record(self, group: UnitGroup) -> Record:
        """Return the record of a layer whose units are all new."""

    @abstractmethod
    def update_records(
        self,
        model: nn.Module,
        groups: Sequence[UnitGroup],
        records: Mapping[str, Record],
        statistics: Mapping[str, LayerStatistics],
    ) -> tuple[dict[str, Record], dict[str, Tensor]]:
        """Return the records after a step, and the units to re-initialise, each by name of the layer.

        Args:
            model: The model, after the step.
            groups: The layers of which at least one consumer was called.
            records: The records of all layers before the step, by name.
            statistics: Statistics of the inputs of the consumers that were called, by name.
        """

    @abstractmethod
    def restart_record(self, group: UnitGroup, record: Record, units: Tensor) -> Record:
        """Return the record after some units were re-initialised."""

    def plan_replacement(
        self,
        model: nn.Module,
        units: Units,
        records: Mapping[str, Record],
        chosen: Mapping[str, Tensor],
        initial: Mapping[str, Tensor] | None,
    ) -> WeightUpdate:
        """Return the new weights of the chosen units; change nothing in the model."""
        return plan_reset(model, units, chosen, self._generator, initial, self._distributions)

    def pool(self, groups: Sequence[UnitGroup], called: Collection[str]) -> PooledUnits:
        """Return the units of the given layers, read by the consumers of these names; the last result is kept."""
        key = [*groups], [*called]
        if self._pooled is None or self._pooled[0] != key:
            self._pooled = key, PooledUnits(groups, called)
        return self._pooled[1]

    def _is_observed(self, group: UnitGroup, statistics: Mapping[str, LayerStatistics]) -> bool:
        """Return whether a consumer of the layer was called, and all that were read finite values."""
        called = [statistics[name] for name in group.consumers if name in statistics]
        is_finite = all(inputs.is_finite for inputs in called)
        if not is_finite:
            warnings.warn(f"{self.name}: {group.layer!r} is skipped, values are not finite", stacklevel=4)
        return bool(called) and is_finite

    def _replace_units(
        self,
        units: Units,
        model: nn.Module,
        context: InterventionContext,
        records: dict[str, Record],
        chosen: Mapping[str, Tensor],
    ) -> RepairReport | None:
        chosen = {layer: replaced for layer, replaced in chosen.items() if len(replaced)}
        if not chosen:
            return None
        generator_before = self._generator.get_state()
        try:
            update = self.plan_replacement(model, units, records, chosen, self.initial_weights(context))
            report = apply_update(self.name, update, context.optimizers)
        except BaseException:
            self._generator.set_state(generator_before)
            raise
        for layer, replaced in chosen.items():
            records[layer] = self.restart_record(units.groups[layer], records[layer], replaced)
        return report

    def _find_units(self, model: nn.Module, context: InterventionContext) -> Units:
        """Return the units of the model: as last traced, if it has the same parameters and cannot be run."""
        if context.forward is None and self._traced is not None:
            traced = self._traced
            if traced.model() is model and traced.shapes == _parameter_shapes(model):
                return traced.units
        forward = context.require_forward(self.name, "start")
        units = select_units(self, describe_units(context.model_to_run(model), forward), model, context)
        if units.groups:
            self.rests_because = None
        else:
            self._rest(model, units.excluded)
        self._traced = _TracedModel(weakref.ref(model), _parameter_shapes(model), units)
        return units

    def _add_records(self, units: Units) -> None:
        """Add a new record for every layer with units whose record is missing or has other shapes."""
        # Keep the records of all other layers, which may be frozen now.
        records = dict(self._records)
        for layer, group in units.groups.items():
            new = self.new_record(group)
            old = self._records.get(layer, {})
            same_shapes = {key: v.shape for key, v in old.items()} == {key: v.shape for key, v in new.items()}
            records[layer] = old if same_shapes else new
        self._records = records


@dataclass(frozen=True)
class _TracedModel:
    """The units of a model, and the parameters that it had when they were found."""

    model: weakref.ref[nn.Module]
    shapes: object
    units: Units


@dataclass(frozen=True)
class _HookedModel(_TracedModel):
    """A traced model with hooks on it."""

    statistics: UnitStatistics
    trained: dict[str, list[str]]
    """Names of the parameters of each layer's units that were trained at the start."""

    def frozen_layers(self, model: nn.Module) -> list[str]:
        """Return the layers of whose units a parameter has been frozen since the start."""
        return [
            layer
            for layer, names in self.trained.items()
            if not all(model.get_parameter(name).requires_grad for name in names)
        ]


def _parameter_shapes(model: nn.Module) -> object:
    return [(name, parameter.shape, parameter.requires_grad) for name, parameter in model.named_parameters()]
