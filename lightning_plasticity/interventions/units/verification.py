"""Verify on random weights that a group of units is complete and that each of its units is separate."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plasticity.interventions.units.groups import Forward, NotResettableError, UnitGroup, unit_mask
from lightning_plasticity.interventions.units.layer_statistics import recorded_inputs
from lightning_plasticity.isolation.state import probe_mode
from lightning_plasticity.layers import BATCH_NORMS, input_channel_dim

TOLERANCE = 1e-4
"""Difference, relative and absolute, up to which two samples count as equal. Genuine differences are of order one."""

_Observation = tuple[list[Tensor], dict[str, list[Tensor]]]
"""The outputs of a forward pass, and the inputs of all calls of the consumers by name."""


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
            generator = torch.Generator().manual_seed(0)
            for module in model.modules():
                if isinstance(module, BATCH_NORMS):
                    module.reset_running_stats()
            for parameter, value, _ in parameters:
                if value.is_floating_point():
                    parameter.data = _random_like(value, generator)
                    parameter.requires_grad_(True)
            yield
        finally:
            for parameter, value, trainable in parameters:
                parameter.data = value
                parameter.requires_grad_(trainable)


def verify_groups(
    model: nn.Module, forward: Forward, tensors: Mapping[str, Tensor], candidates: Sequence[Candidate]
) -> dict[str, str]:
    """Check by forward passes that the units of groups can be reset one by one.

    Each half of the units is changed in turn, and the channels of the other half must stay the same. All groups are
    changed at once; if the check fails, it is repeated with each half of them.

    Args:
        model: The model, with random weights.
        forward: Runs one forward pass.
        tensors: Parameters and buffers of the model by name.
        candidates: The groups, as they were found.

    Returns:
        The reasons against groups, by name of the layer: the outputs depend on the units by other paths than the
        consumers, or the consumers' inputs are not one separate channel (or block of channels) for each unit.
    """
    if not candidates:
        return {}
    try:
        for half in (0, 1):
            chosen = [
                torch.randperm(candidate.group.num_units, generator=torch.Generator().manual_seed(number))[half::2]
                for number, candidate in enumerate(candidates)
            ]
            _verify_units(model, forward, tensors, candidates, chosen)
    except NotResettableError as reason:
        if len(candidates) == 1:
            return {candidates[0].group.layer: str(reason)}
        middle = len(candidates) // 2
        parts = (candidates[:middle], candidates[middle:])
        reasons = [verify_groups(model, forward, tensors, part) for part in parts]
        return {**reasons[0], **reasons[1]}
    return {}


@dataclass(frozen=True)
class Candidate:
    """A group of units to verify.

    Args:
        group: The units.
        switch: Names of the incoming tensors that turn the units off where they are zero.
    """

    group: UnitGroup
    switch: Collection[str]


def _verify_units(
    model: nn.Module,
    forward: Forward,
    tensors: Mapping[str, Tensor],
    candidates: Sequence[Candidate],
    chosen: Sequence[Tensor],
) -> None:
    """Check some units of each group, by observations with their columns at zero and with their rows at zero."""
    groups = [candidate.group for candidate in candidates]
    consumers = dict.fromkeys(name for group in groups for name in group.consumers)

    def masks(unit_indices: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        for unit_index, units in zip(unit_indices, chosen, strict=True):
            for name, index in unit_index.items():
                mask = unit_mask(index, units, tensors[name].shape)
                result[name] = result[name] | mask if name in result else mask
        return result

    def observe() -> _Observation:
        seed_generators()
        with torch.no_grad(), recorded_inputs(model, consumers) as inputs:
            outputs = model_outputs(model, forward)
        return outputs, inputs

    # Not the seed that the weights were drawn with.
    generator = torch.Generator().manual_seed(1)
    rows, columns = masks(group.incoming for group in groups), masks(group.outgoing for group in groups)
    switches = masks(
        {name: index for name, index in candidate.group.incoming.items() if name in candidate.switch}
        for candidate in candidates
    )
    random_rows = {name: _random_like(tensors[name], generator) for name in rows}
    with _replaced_entries(tensors, switches):
        _, silent_inputs = observe()
    # Where the columns of one unit cross the row of another, the zeros win.
    with _replaced_entries(tensors, columns):
        outputs, inputs = observe()
    with _replaced_entries(tensors, rows, random_rows), _replaced_entries(tensors, columns):
        new_outputs, new_inputs = observe()
    if not all(bool(torch.isfinite(output).all()) for output in outputs if output.is_floating_point()):
        raise NotResettableError("could not be tested: forward(model) is not finite with random weights")
    selected = {name: torch.zeros(0) for name in consumers}
    for group, units in zip(groups, chosen, strict=True):
        for name, unit_index in group.consumers.items():
            mask = torch.isin(unit_index, units)
            selected[name] = selected[name] | mask if len(selected[name]) else mask
    for name, mask in selected.items():
        dim = input_channel_dim(model.get_submodule(name))
        channels, other_channels = mask.nonzero().flatten(), (~mask).nonzero().flatten()
        for silent, before, after in zip(silent_inputs[name], inputs[name], new_inputs[name], strict=True):
            if not torch.equal(*(x.index_select(dim, other_channels.to(x.device)) for x in (before, after))):
                raise NotResettableError(f"its units are mixed, or reordered, before {name!r} reads them")
            if not _same_for_all_samples(silent.index_select(dim, channels.to(silent.device)), dim):
                raise NotResettableError(f"{name!r} reads more than its units: a residual stream, a gate or noise")
    if len(outputs) != len(new_outputs) or not all(map(torch.equal, outputs, new_outputs)):
        raise NotResettableError(f"its units reach the output by other ways than {', '.join(map(repr, consumers))}")


def _same_for_all_samples(x: Tensor, channel_dim: int) -> bool:
    """Return whether all samples of an input are equal; one without a batch dimension is."""
    return x.ndim == -channel_dim or torch.allclose(x, x[:1].expand_as(x), rtol=TOLERANCE, atol=TOLERANCE)


@contextlib.contextmanager
def _replaced_entries(
    tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor], values: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """Replace entries of tensors, by those of ``values`` or by zero; restore them on exit."""
    before = {name: tensors[name].data for name in masks}
    for name, mask in masks.items():
        value = torch.zeros_like(before[name]) if values is None else values[name]
        tensors[name].data = torch.where(mask.to(value.device), value, before[name])
    try:
        yield
    finally:
        for name, value in before.items():
            tensors[name].data = value


def seed_generators() -> None:
    """Seed torch's generators, so that every forward pass draws the same random numbers."""
    # torch.manual_seed would also seed a GPU that is initialised only later.
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)


def _random_like(value: Tensor, generator: torch.Generator) -> Tensor:
    """Draw weights of variance 1 / fan-in, and uniform biases and scales in [0.5, 1.5)."""
    if value.ndim > 1:
        fan_in = value.shape[1:].numel()
        return torch.randn(value.shape, generator=generator).div(fan_in**0.5).to(value)
    return torch.rand(value.shape, generator=generator).add(0.5).to(value)


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
