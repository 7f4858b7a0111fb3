"""Record the calls of layer functions, and which tensors are computed from parameters alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_plasticity.curvature.autograd_graph import Edge, edge_of
from lightning_plasticity.curvature.exact.layer_calls import Computed, LayerCall
from lightning_plasticity.curvature.exact.layer_rules import (
    BROADCASTING_FUNCTIONS,
    IN_PLACE_FUNCTIONS,
    LAYER_RULES,
    broadcast,
)
from lightning_plasticity.curvature.exact.operations import OperationRecorder
from lightning_plasticity.isolation.batches import tensors_in

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Tracked:
    """The tracked arguments of a call, before it can change them in place.

    Args:
        parameters: The tracked parameters.
        computed: The tensors computed from such, by ``id``.
    """

    parameters: list[Tensor]
    computed: dict[int, Computed]

    def __bool__(self) -> bool:
        return bool(self.parameters or self.computed)


class LayerRecorder:
    """A recorder of the layer calls of one forward pass.

    Args:
        parameters: The parameters to track, by name.
        operations: The recorder of all operations, which knows what is computed from weights alone.
    """

    def __init__(self, parameters: Mapping[str, Tensor], operations: OperationRecorder) -> None:
        self.calls: list[LayerCall] = []
        self.other_uses: dict[str, set[str]] = {}
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._operations = operations
        # These tensors are held, so that no other tensor gets their id.
        self._computed: dict[int, Computed] = {}

    def tracked(self, tensors: Iterable[Tensor]) -> Tracked:
        """Return those tensors that are tracked parameters, or computed from such and not changed since."""
        parameters, computed = [], {}
        for tensor in tensors:
            if id(tensor) in self._names:
                parameters.append(tensor)
            elif (source := self._computed.get(id(tensor))) is not None and source.edge == edge_of(tensor):
                computed[id(tensor)] = source
        return Tracked(parameters, computed)

    def expand_parameters(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Expand the tracked arguments of a broadcasting function to the common shape, as a layer call of its own."""
        if not self._names or not torch.is_grad_enabled():
            return args, kwargs
        if func is F.scaled_dot_product_attention:
            return self._with_expanded_mask(*args, **kwargs)
        if func not in BROADCASTING_FUNCTIONS:
            return args, kwargs
        tensors = [argument for argument in (*args, *kwargs.values()) if isinstance(argument, Tensor)]
        # A number of another dtype or device is converted, but a tensor of the common shape is not.
        kinds = {(tensor.dtype, tensor.device) for tensor in tensors if tensor.is_floating_point()}
        if len(kinds) > 1 or not self.tracked(tensors):
            return args, kwargs
        weights_only = self._operations.is_weights_only(func, args, tensors)
        shape = torch.broadcast_shapes(*[tensor.shape for tensor in tensors])

        def expand(argument: Any) -> Any:
            # Where all is computed from weights, only an expansion can introduce samples.
            if not isinstance(argument, Tensor) or (weights_only and argument.shape == shape):
                return argument
            return self._expand(argument, shape)

        first = int(func in IN_PLACE_FUNCTIONS)
        expanded = (*args[:first], *[expand(argument) for argument in args[first:]])
        return expanded, {name: expand(value) for name, value in kwargs.items()}

    def record(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
        tracked: Tracked,
        edges: Mapping[int, Edge],
        *,
        weights_only: bool,
    ) -> Any:
        """Record a call with tracked arguments, and return its result for the model.

        Args:
            func: The function.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            result: The value that it returned, with a graph.
            tracked: Its tracked arguments.
            edges: The edges of all of its arguments that require gradients, by ``id``, before the call.
            weights_only: Whether the result is computed from the tensors of the model alone.
        """
        call = LAYER_RULES[func](result, *args, **kwargs) if func in LAYER_RULES else None
        covered: set[int] = set()
        if call is not None:
            # An in-place change of a view would rewrite the graph around the recorded edge.
            if result._is_view():
                result = result.clone()
                call.output = edge_of(result)
            covered = self._record_layer(call, tracked, edges, output_is_computed=weights_only)
        if weights_only:
            for tensor in tensors_in(result):
                if tensor.requires_grad:
                    self._record_computed(tensor, tracked, call)
            return result
        sources = [source for key, source in tracked.computed.items() if key not in covered]
        roots = [root for source in sources for root in source.roots()]
        for parameter in [*tracked.parameters, *roots]:
            if id(parameter) not in covered:
                name = getattr(func, "__name__", repr(func))
                self.other_uses.setdefault(self._names[id(parameter)], set()).add(name)
        return result

    def _with_expanded_mask(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Arguments:
        if attn_mask is not None:
            attn_mask = self._expand(attn_mask, torch.Size((*query.shape[:-1], key.shape[-2])))
        return (query, key, value, attn_mask, *args), kwargs

    def _expand(self, tensor: Tensor, shape: torch.Size) -> Tensor:
        """Expand a tensor and record this, if it is tracked."""
        tracked = self.tracked([tensor])
        if not tracked:
            return tensor
        edge = edge_of(tensor)
        result = tensor.expand(shape)
        call = broadcast(result, tensor)
        self._record_layer(call, tracked, {id(tensor): edge}, output_is_computed=True)
        self._record_computed(result, tracked, call)
        self._operations.record(Tensor.expand, [edge], result, weights_only=True)
        return result

    def _record_layer(
        self, call: LayerCall, tracked: Tracked, edges: Mapping[int, Edge], *, output_is_computed: bool
    ) -> set[int]:
        """Record the call and return the ids of the tracked arguments whose use has a closed form."""
        keys = {*map(id, tracked.parameters), *tracked.computed}
        call.uses = [use for use in call.uses if id(use.parameter) in keys]
        covered = {id(use.parameter) for use in call.uses}
        call.inputs = [edge for key, edge in edges.items() if key not in covered]
        call.computed = tracked.computed
        call.output_is_computed = output_is_computed
        if call.uses:
            self.calls.append(call)
        return covered

    def _record_computed(self, tensor: Tensor, tracked: Tracked, call: LayerCall | None) -> None:
        sources = list(tracked.computed.values())
        self._computed[id(tensor)] = Computed(tensor, edge_of(tensor), tracked.parameters, sources, call)
