"""Verify on random weights that a group of units is complete and that each of its units is separate."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plasticity.interventions.units.groups import Forward, NotResettableError, UnitGroup, unit_mask
from lightning_plasticity.interventions.units.layer_statistics import recorded_inputs
from lightning_plasticity.isolation.state import probe_mode
from lightning_plasticity.layers import BATCH_NORMS, input_channel_dim

_TOLERANCE = 1e-4
"""Difference, relative and absolute, up to which two samples count as equal. Genuine differences are of order one."""

_Observation = tuple[list[Tensor], dict[str, Tensor]]
"""The outputs of a forward pass, and the inputs of the consumers by name."""


@contextlib.contextmanager
def randomized_weights(model: nn.Module) -> Iterator[None]:
    """Give the model random, trainable weights; restore the weights on exit.

    Trained weights may hide dependencies. With the random ones no unit is dead: biases and scales are positive, and
    running statistics are those of a new network.

    Raises:
        ValueError: If the model has lazy layers without weights.
    """
    parameters = [(parameter, parameter.data, parameter.requires_grad) for parameter in model.parameters()]
    if any(isinstance(parameter, nn.parameter.UninitializedParameter) for parameter, _, _ in parameters):
        raise ValueError(f"{type(model).__name__} has lazy layers that were never called: call it once first")
    with probe_mode(model):
        try:
            _seed()
            for module in model.modules():
                if isinstance(module, BATCH_NORMS):
                    module.reset_running_stats()
            for parameter, value, _ in parameters:
                if value.is_floating_point():
                    parameter.data = _random_like(value)
                    parameter.requires_grad_(True)
            yield
        finally:
            for parameter, value, trainable in parameters:
                parameter.data = value
                parameter.requires_grad_(trainable)


def verify_group(model: nn.Module, forward: Forward, tensors: Mapping[str, Tensor], group: UnitGroup) -> None:
    """Check by forward passes that the units of a group can be reset one by one.

    Each half of the units is changed in turn, and the channels of the other half must stay the same.

    Args:
        model: The model, with random weights.
        forward: Runs one forward pass.
        tensors: Parameters and buffers of the model by name.
        group: The units, as the dependency graph describes them.

    Raises:
        NotResettableError: If the outputs depend on the units by other paths than the consumers, or the consumers'
            inputs are not one separate channel (or block of channels) for each unit.
    """

    def observe() -> _Observation:
        _seed()
        with torch.no_grad(), recorded_inputs(model, group.consumers) as inputs:
            outputs = model_outputs(model, forward)
        return outputs, inputs

    order = torch.randperm(group.num_units, generator=torch.Generator().manual_seed(0))
    for units in (order[::2], order[1::2]):
        if len(units):
            _verify_units(model, observe, tensors, group, units)


def _verify_units(
    model: nn.Module,
    observe: Callable[[], _Observation],
    tensors: Mapping[str, Tensor],
    group: UnitGroup,
    units: Tensor,
) -> None:
    """Check some units of a group, by observations with their columns at zero and with their rows at zero."""
    random_incoming = {name: _random_like(tensors[name]) for name in group.incoming}
    zero_rows = {
        name: torch.zeros_like(tensors[name]) for name in group.incoming if name.rpartition(".")[0] == group.layer
    }
    zero_columns = {name: torch.zeros_like(tensors[name]) for name in group.outgoing}
    with _replaced_entries(tensors, group.outgoing, units, zero_columns):
        outputs, inputs = observe()
        with _replaced_entries(tensors, group.incoming, units, random_incoming):
            new_outputs, new_inputs = observe()
    with _replaced_entries(tensors, group.incoming, units, zero_rows):
        _, silent_inputs = observe()
    if not all(bool(torch.isfinite(output).all()) for output in outputs if output.is_floating_point()):
        raise NotResettableError("could not be tested: forward(model) is not finite with random weights")
    for name, unit_index in group.consumers.items():
        dim = input_channel_dim(model.get_submodule(name))
        selected = torch.isin(unit_index, units).to(inputs[name].device)
        channels, other_channels = selected.nonzero().flatten(), (~selected).nonzero().flatten()
        before, after = (x.index_select(dim, other_channels) for x in (inputs[name], new_inputs[name]))
        if not torch.equal(before, after):
            raise NotResettableError(f"its units are mixed, or reordered, before {name!r} reads them")
        silent = silent_inputs[name].index_select(dim, channels)
        batched = silent.ndim > -dim
        if batched and not torch.allclose(silent, silent[:1].expand_as(silent), rtol=_TOLERANCE, atol=_TOLERANCE):
            raise NotResettableError(f"{name!r} reads more than its units: a residual stream, a gate or noise")
    if len(outputs) != len(new_outputs) or not all(map(torch.equal, outputs, new_outputs)):
        raise NotResettableError(
            f"its units reach the output by other ways than {', '.join(map(repr, group.consumers))}"
        )


@contextlib.contextmanager
def _replaced_entries(
    tensors: Mapping[str, Tensor], unit_index: Mapping[str, Tensor], units: Tensor, values: Mapping[str, Tensor]
) -> Iterator[None]:
    """Replace the entries of some units by those of ``values``; restore them on exit."""
    before = {name: tensors[name].data for name in values}
    for name, value in values.items():
        mask = unit_mask(unit_index[name], units, value.shape).to(value.device)
        tensors[name].data = torch.where(mask, value, before[name])
    try:
        yield
    finally:
        for name, value in before.items():
            tensors[name].data = value


def _seed() -> None:
    # torch.manual_seed would also seed a GPU that is initialised only later.
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)


def _random_like(value: Tensor) -> Tensor:
    """Draw weights of variance 1 / fan-in, and uniform biases and scales in [0.5, 1.5)."""
    if value.ndim > 1:
        fan_in = value[0].numel()
        return torch.randn(value.shape).div(fan_in**0.5).to(value)
    return torch.rand(value.shape).add(0.5).to(value)


def model_outputs(model: nn.Module, forward: Forward) -> list[Tensor]:
    """Run a forward pass and return the tensors that ``forward`` returns and those that the model returns in it."""
    outputs: list[Tensor] = []
    handle = model.register_forward_hook(lambda _, args, output: outputs.extend(nested_tensors(output)))
    try:
        outputs.extend(nested_tensors(forward(model)))
    finally:
        handle.remove()
    return list({id(tensor): tensor for tensor in outputs}.values())


def nested_tensors(value: Any) -> list[Tensor]:
    """Return the tensors in nested sequences, mappings, dataclasses and packed sequences."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, nn.utils.rnn.PackedSequence):
        return [value.data]
    if isinstance(value, Mapping):
        value = list(value.values())
    elif dataclasses.is_dataclass(value):
        value = list(vars(value).values())
    return [tensor for item in value for tensor in nested_tensors(item)] if isinstance(value, list | tuple) else []
