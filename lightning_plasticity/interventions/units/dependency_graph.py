"""Find the resettable units of a model in the dependency graph of torch-pruning."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.ops import OPTYPE

from lightning_plasticity.interventions.units.groups import Forward, NotResettableError, UnitGroup, Units
from lightning_plasticity.interventions.units.verification import (
    model_outputs,
    nested_tensors,
    randomized_weights,
    verify_group,
)
from lightning_plasticity.layers import (
    CONVOLUTIONS,
    EMBEDDINGS,
    NORM_LAYERS,
    RECURRENT_LAYERS,
    TRANSPOSED_CONVOLUTIONS,
    broadcast_inputs,
    weight_output_dim,
)

_LAYERS = (OPTYPE.LINEAR, OPTYPE.CONV)
"""Layers that compute new units from those they read."""

_PER_UNIT = (OPTYPE.BN, OPTYPE.IN, OPTYPE.DEPTHWISE_CONV, OPTYPE.PRELU)
"""Layers with weights of their own for each unit, which belong to the units before them."""

_WITHOUT_WEIGHTS = (
    OPTYPE.ELEMENTWISE,
    OPTYPE.RESHAPE,
    OPTYPE.CONCAT,
    OPTYPE.SPLIT,
    OPTYPE.SLICE,
    OPTYPE.UNBIND,
    OPTYPE.EXPAND,
)
"""Operations that torch-pruning follows from unit to channel and that have nothing to reset."""


def describe_units(model: nn.Module, forward: Forward) -> Units:
    """Find the units of a model that can be reset one by one, with all their weights, and explain why others cannot.

    A unit is an output of a linear layer or a channel of a convolution: a row of the layer's weight and its bias, its
    entries in norm layers, and the columns of *all* layers that read it. The dependency graph of torch-pruning proposes
    the columns, and forward passes with random weights verify them. A layer has resettable units only if

    * with the outgoing columns of some units at zero, no change of their incoming weights changes any bit of what
      ``forward`` returns (no other path leads from the units to the outputs), and
    * such a change moves the consumers' inputs in the columns of these units and nowhere else (no norm layer mixes
      them, and the columns are the right ones), and
    * with their incoming weights at zero, these columns are the same for every sample (they carry nothing else).

    Therefore a reset of dead units, whose columns are zero on all data, does not change any bit of the network's
    output. This excludes the logits; residual streams and gates, whose units are shared by several layers; layers read
    by a LayerNorm or GroupNorm, since their mean over units would change; recurrent and attention layers; shared, tied,
    computed and frozen weights.

    Args:
        model: Any module. Its parameters, gradients, buffers, modes and random numbers are restored. (What its
            ``forward`` itself writes to plain attributes is not undone.)
        forward: ``forward(model)`` runs one forward pass, in evaluation mode and with gradients. The tensors that it
            returns, and those that the model returns in it, must stay the same; return the outputs rather than a loss.
            Use more than one sample: residual streams and gates show in the differences between samples.

    Returns:
        The units; ``print`` shows them as a table.

    Raises:
        ValueError: If ``forward`` returns no tensor with a graph, torch-pruning cannot follow the model, the model has
            lazy layers that were never called, or it is on the meta device.

    References:
        The dependency graph: Fang et al. 2023, arXiv 2301.12900.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
        >>> print(describe_units(model, forward=lambda model: model(torch.randn(2, 1, 6, 6))))
        layer  units  drawn anew                                                                       set to zero
        0          4  0.weight, 0.bias, 1.weight, 1.bias, 1.running_mean, 1.running_var                4.weight
        4          –  logits: no layer reads it
    """
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    attention = {id(part) for m in model.modules() if isinstance(m, nn.MultiheadAttention) for part in m.modules()}
    units = Units()
    with randomized_weights(model):
        trace = _Trace.record(model, forward, frozen)
        for name, module in model.named_modules():
            if not _computes_units(module):
                continue
            try:
                if id(module) in attention:
                    raise NotResettableError("attention: its units are shared by the heads' queries, keys and values")
                units.groups[name] = trace.unit_group(name, module)
            except NotResettableError as reason:
                units.excluded[name] = str(reason)
    return units


def _computes_units(module: nn.Module) -> bool:
    """Return whether a module has a weight matrix; norm layers belong to the units before them."""
    if isinstance(module, NORM_LAYERS):
        return False
    # The weight of a parametrized layer is a parameter of another module.
    if isinstance(module, nn.Linear | CONVOLUTIONS):
        return True
    return any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))


class _Opaque(torch.autograd.Function):
    """The identity on an output, as one node of the graph with the given tensors as its inputs."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *_: Tensor) -> Tensor:
        return output.view_as(output)


@contextlib.contextmanager
def _opaque_recurrent_layers(model: nn.Module) -> Iterator[None]:
    """Replace the graph inside each recurrent layer by one node, since torch-pruning may fail to follow the inside."""

    def hide(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        sources = [*nested_tensors([args, kwargs]), *layer.parameters()]

        def opaque(value: Any) -> Any:
            if isinstance(value, Tensor):
                return _Opaque.apply(value.detach(), *sources) if value.requires_grad else value  # type: ignore[no-untyped-call]
            if isinstance(value, nn.utils.rnn.PackedSequence):
                return nn.utils.rnn.PackedSequence(opaque(value.data), *value[1:])
            return tuple(map(opaque, value)) if isinstance(value, tuple) else value

        return opaque(output)

    layers = [layer for layer in model.modules() if isinstance(layer, RECURRENT_LAYERS)]
    handles = [layer.register_forward_hook(hide, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Trace:
    """The record of one forward pass.

    Args:
        model: The model.
        forward: The forward pass.
        graph: The dependency graph of torch-pruning.
        tensors: Parameters and buffers of the model by name; shared ones under each of their names.
        use_counts: Number of operations in the graph of the outputs that read each parameter, by its ``id``.
        frozen: Names of parameters that are not trained.
    """

    model: nn.Module
    forward: Forward
    graph: Any
    tensors: Mapping[str, Tensor]
    use_counts: Mapping[int, int]
    frozen: set[str]

    @classmethod
    def record(cls, model: nn.Module, forward: Forward, frozen: set[str]) -> _Trace:
        """Run a forward pass and build the dependency graph of its outputs.

        Raises:
            ValueError: If no output has a graph, or torch-pruning cannot follow the model.
        """
        graph = tp.DependencyGraph()
        use_counts: Counter[int] = Counter()

        def differentiable_outputs(model: nn.Module, _: object) -> list[Tensor]:
            outputs = [tensor for tensor in model_outputs(model, forward) if tensor.grad_fn is not None]
            if not outputs:
                raise ValueError(
                    "forward(model) must run the model with gradients, and return its outputs: no tensor with a "
                    "graph came out of it"
                )
            use_counts.update(_count_uses(outputs))
            return outputs

        # torch-pruning does not document which exceptions it raises.
        try:
            with _opaque_recurrent_layers(model):
                graph.build_dependency(model, None, forward_fn=differentiable_outputs, verbose=False)
        except Exception as error:
            # Without counts, the error is one of the forward pass, not of torch-pruning.
            if not use_counts:
                raise
            raise ValueError(
                f"torch-pruning cannot follow {type(model).__name__}: {type(error).__name__}: {error}"
            ) from error
        parameters = dict(model.named_parameters(remove_duplicate=False))
        return cls(model, forward, graph, {**parameters, **dict(model.named_buffers())}, use_counts, frozen)

    def unit_group(self, name: str, module: nn.Module) -> UnitGroup:
        """Return the verified units of a layer.

        Raises:
            NotResettableError: If they cannot be reset one by one.
        """
        self._check_layer(name, module)
        group = self._candidate(name, module)
        for tensor_name in {**group.incoming, **group.outgoing}:
            if isinstance(self.tensors[tensor_name], nn.Parameter):
                self._check_parameter(tensor_name)
        verify_group(self.model, self.forward, self.tensors, group)
        return group

    def _check_layer(self, name: str, module: nn.Module) -> None:
        """Check the kind of a layer, and how the forward pass uses it."""
        if isinstance(module, RECURRENT_LAYERS):
            raise NotResettableError("recurrent: its units feed themselves")
        if isinstance(module, EMBEDDINGS):
            raise NotResettableError("embedding: its rows are tokens, not units")
        if not isinstance(module, nn.Linear | CONVOLUTIONS):
            raise NotResettableError(f"{type(module).__name__}: only linear and convolution layers have units")
        if not isinstance(module._parameters.get("weight"), nn.Parameter):
            raise NotResettableError("its weight is computed from other parameters")
        self._check_parameter(f"{name}.weight" if name else "weight")
        if isinstance(module, TRANSPOSED_CONVOLUTIONS) and module.groups != 1:
            raise NotResettableError("transposed convolution in groups")
        if tp.ops.module2type(module) == OPTYPE.DEPTHWISE_CONV:
            raise NotResettableError("depthwise convolution: belongs to the units before it")
        if module not in self.graph.module2node:
            raise NotResettableError("not called as a layer in forward(model)")
        if (reader := self._recurrent_reader(module)) is not None:
            raise NotResettableError(f"recurrent layer {self._module_name(reader)!r} reads it")

    def _check_parameter(self, name: str) -> None:
        """Check that a parameter is trained and used once."""
        uses = self.use_counts[id(self.tensors[name])]
        if name in self.frozen:
            raise NotResettableError(f"{name!r} is frozen")
        if uses == 0:
            raise NotResettableError(f"what forward(model) returns has no gradient by {name!r}")
        if uses > 1:
            raise NotResettableError(f"shared or tied: {name!r} is used {uses} times")

    def _recurrent_reader(self, module: nn.Module) -> nn.Module | None:
        """Return a recurrent layer that reads a layer's output, if there is one.

        The search is needed because torch-pruning puts no recurrent layers but LSTMs into its groups.
        """
        stack, seen = list(self.graph.module2node[module].outputs), set()
        while stack:
            node = stack.pop()
            if node in seen or node.type in _LAYERS:
                continue
            seen.add(node)
            stack += node.outputs
            for source in [node, *node.inputs]:
                holder = self._module_of(source.module) if source.type == OPTYPE.PARAMETER else source.module
                if isinstance(holder, RECURRENT_LAYERS):
                    return holder
        return None

    def _candidate(self, name: str, module: nn.Module) -> UnitGroup:
        """Return the units of a layer as torch-pruning sees them."""
        num_units = self.graph.get_out_channels(module)
        prune = self.graph.get_pruner_of_module(module).prune_out_channels
        # torch-pruning does not document which exceptions it raises.
        try:
            members = self.graph.get_pruning_group(module, prune, list(range(num_units)))
        except Exception as error:
            raise NotResettableError(f"torch-pruning cannot follow its output ({type(error).__name__})") from error
        self._check_not_joined(module, members)
        incoming = self._output_entries(module, torch.arange(num_units))
        group = UnitGroup(name, num_units, incoming, outgoing={}, consumers={})
        for member in members:
            if member.dep.target.module is not module and member.dep.target.type not in _WITHOUT_WEIGHTS:
                self._add_member(group, member)
        if not group.consumers:
            raise NotResettableError("logits: no layer reads it")
        return group

    def _check_not_joined(self, module: nn.Module, members: Iterable[Any]) -> None:
        """Check that no other layer computes the same units, as in a sum or a product of two layers' outputs."""
        joined = [
            repr(self._module_name(member.dep.target.module))
            for member in members
            if member.dep.target.module is not module and member.dep.target.type in _LAYERS and not self._reads(member)
        ]
        if joined:
            raise NotResettableError(f"residual stream or gate: joined with the units of {', '.join(joined)}")

    def _reads(self, member: Any) -> bool:
        """Return whether a member of a group reads the units, rather than computing them."""
        return bool(member.dep.handler == self.graph.get_pruner_of_module(member.dep.target.module).prune_in_channels)

    def _add_member(self, group: UnitGroup, member: Any) -> None:
        """Add the entries that a layer after the units has for each of them."""
        target, kind = member.dep.target.module, member.dep.target.type
        self._check_member(target, kind)
        name, num_channels = self._module_name(target), self.graph.get_in_channels(target) or 0
        # A PReLU with one slope for all units has no channels.
        if not num_channels:
            return
        # torch-pruning follows units through an LSTM with projections to channels that its reader does not have.
        if max(member.idxs, default=0) >= num_channels:
            raise NotResettableError(f"torch-pruning cannot follow its output to {name!r}")
        unit_index = torch.full((num_channels,), -1)
        unit_index[member.idxs] = torch.tensor(member.root_idxs)
        if kind in _LAYERS:
            group.consumers[name] = unit_index
            group.outgoing[f"{name}.weight"] = broadcast_inputs(target, unit_index)
        else:
            group.incoming.update(self._output_entries(target, unit_index))

    def _check_member(self, target: Any, kind: OPTYPE) -> None:
        """Check that a reset can take account of everything that a member of a group does with the units."""
        if kind == OPTYPE.OUTPUT:
            raise NotResettableError("an output of the model")
        if kind == OPTYPE.PARAMETER:
            raise NotResettableError(self._effect_of_parameter(target))
        name = self._module_name(target)
        if kind not in (*_LAYERS, *_PER_UNIT):
            raise NotResettableError(f"{type(target).__name__} {name!r} mixes its units")
        if "weight" not in target._parameters:
            raise NotResettableError(
                f"the weight of {name!r}, which belongs to its units, is computed from other parameters"
            )

    def _effect_of_parameter(self, parameter: Tensor) -> str:
        holder = self._module_of(parameter)
        if isinstance(holder, NORM_LAYERS):
            return f"{type(holder).__name__} {self._module_name(holder)!r} mixes its units"
        name = self._tensor_name(parameter)
        return f"{name!r}, a parameter of {type(holder).__name__}, acts on its units in a way that is not known"

    def _output_entries(self, module: nn.Module, unit_index: Tensor) -> dict[str, Tensor]:
        """Return the unit index of each tensor of a layer, from the unit index of its output channels."""
        prefix = self._module_name(module)
        entries = {}
        for key, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is not None and tensor.ndim > 0:
                shape = [1] * tensor.ndim
                shape[weight_output_dim(module) if key == "weight" else 0] = -1
                entries[f"{prefix}.{key}" if prefix else key] = unit_index.view(shape)
        return entries

    def _module_of(self, parameter: Tensor) -> nn.Module:
        return self.model.get_submodule(self._tensor_name(parameter).rpartition(".")[0])

    def _module_name(self, module: nn.Module) -> str:
        names: Iterator[str] = (name for name, other in self.model.named_modules() if other is module)
        return next(names)

    def _tensor_name(self, tensor: Tensor) -> str:
        return next(name for name, other in self.tensors.items() if other is tensor)


def _count_uses(outputs: Iterable[Tensor]) -> Counter[int]:
    """Return how many operations of a graph read each of its leaves, by ``id`` of the leaf."""
    uses: Counter[int] = Counter()
    stack: list[Any] = [output.grad_fn for output in outputs]
    seen = set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        for input_node, _ in node.next_functions:
            if input_node is not None:
                if hasattr(input_node, "variable"):
                    uses[id(input_node.variable)] += 1
                stack.append(input_node)
    return uses
