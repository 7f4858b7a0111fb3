"""Record the activations of a network's hidden layers while it runs, by the name of the layer that owns the weights.

The tracker follows torch functions rather than hooks on layers. A forward pre-hook on each layer with weights sees what
the layer reads: the same numbers in an MLP, but pooled activations, channels flattened with their positions, residual
streams, and only the last state of a recurrent layer. The dormant fraction of Sokar 2023 is defined on the outputs of
activation functions, and code that calls functions instead of modules has no layers to hook.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils.hooks import RemovableHandle
from torchmetrics import Metric

from lightning_plasticity.activations.layer_names import LayerNames, is_activation_module, numbered
from lightning_plasticity.activations.origins import Activations, LayerCall, Origin, Origins, latest_layer_call
from lightning_plasticity.activations.torch_functions import (
    CLAMPS,
    COMPARISONS,
    LAYERS,
    MATRIX_PRODUCTS,
    MULTIPLICATIONS,
    PASSING_ON,
    READS_SHAPE_ONLY,
    STARTS_TRACKING,
    ZEROS,
    is_activation_function,
    is_layer,
)
from lightning_plasticity.activations.unit_axes import (
    PRODUCTS,
    Function,
    axes_after,
    counting_units,
    factors_of,
    infer_unit_dim,
    is_weight,
    last_counts_units,
    new_axes,
)
from lightning_plasticity.functional.layouts import channel_dim_of
from lightning_plasticity.isolation.batches import tensors_in
from lightning_plasticity.isolation.state import probe_depth
from lightning_plasticity.layers import LINEAR_LAYERS, RECURRENT_LAYERS


class ActivationSink(Protocol):
    """An object that an :class:`ActivationTracker` reports activations to."""

    channel_dim: int | None
    """The dimension that counts units, if the user gave it."""

    def selects(self, name: str) -> bool:
        """Return whether the layer of this name is to be reported."""

    def observe(self, activations: Tensor, channel_dim: int | None) -> Any:
        """Return the statistics of the activations; later code may change the tensor in place."""

    def report(self, name: str, observed: Any, *, assumed: bool, certain: bool) -> None:
        """Take the statistics of a hidden layer.

        Args:
            name: Name of the layer.
            observed: What :meth:`observe` returned.
            assumed: Whether the dimension that counts units is a guess among several.
            certain: Whether a layer before or behind determined that dimension. Of a matrix, the last dimension is
                neither assumed nor certain.
        """

    def tolerates(self, error: Exception) -> bool:
        """Return whether the network goes on although one of these methods raised this error."""


class _Hook:
    """A hook that does nothing in copies and pickles of the network."""

    def __init__(self, act: Callable[..., None]) -> None:
        self._act = act

    def __call__(self, *args: Any) -> None:
        self._act(*args)

    def __reduce__(self) -> tuple[type[_NoHook], tuple[()]]:
        return _NoHook, ()


class _NoHook:
    """The copy of a :class:`_Hook`."""

    def __call__(self, *args: Any) -> None:
        pass


@dataclass
class _ModuleCall:
    """A running call of a module."""

    module: nn.Module
    path: str
    in_metric: bool = False
    calls_activation: bool = False
    uses: Counter[str] = field(default_factory=Counter)

    def number(self, base: str) -> str:
        """Return a name that is new in this call: the second ``relu`` is ``relu-2``."""
        self.uses[base] += 1
        return numbered(base, self.uses[base])


class ActivationTracker(TorchFunctionMode):
    """A torch function mode that reports the activations of a network's hidden layers.

    Activations belong to a hidden layer if they flow into a further layer with weights: a linear one, a convolution, a
    product with a matrix that comes from elsewhere, or any function of a parameter other than arithmetic and
    normalization. Activations of the output layer do not, nor do those on the way to the loss. Of a gate,
    ``h * sigmoid(h)``, the product counts, since the next layer reads it.

    A layer has the path of the module that owns the weights: the last layer with weights before the activation
    function. Where the weights have no owner, it has the path of the activation module, or the path of the module that
    calls the activation function followed by the function's name.

    Args:
        root: The network.
        sink: The object that the activations are reported to.
        chosen: Paths of modules whose outputs are reported too, whether or not a layer reads them. The output of a
            module with weights is reported only if no activations have its name.
    """

    def __init__(self, root: nn.Module, sink: ActivationSink, chosen: Collection[str]) -> None:
        super().__init__()
        self.saw_activations = False
        self.saw_hidden_layer = False
        self.layers_with_weights: set[int] = set()
        self.saw_compiled_code = False
        self._sink = sink
        self._chosen = chosen
        self._origins = Origins()
        self._undecided: dict[str, Activations] = {}
        self._chosen_outputs: dict[str, Activations] = {}
        self._calls = [_ModuleCall(root, "")]
        # Lightning calls training_step without calling the module.
        self._has_training_step = hasattr(root, "training_step")
        self._probe_depth = 0
        self._names = LayerNames(root)
        self._hooks: list[RemovableHandle] = []
        self._modules = list(root.modules())
        metrics = [module for module in self._modules if isinstance(module, Metric)]
        self._in_metrics = {id(module) for metric in metrics for module in metric.modules()}

    def start(self) -> None:
        """Start to track the network. Probes that run meanwhile, also of copies of the network, are not tracked."""
        self._probe_depth = probe_depth()
        for module in self._modules:
            self._hooks.append(module.register_forward_pre_hook(_Hook(self._enter_module)))
            self._hooks.append(module.register_forward_hook(_Hook(self._leave_module), always_call=True))
        TorchFunctionMode.__enter__(self)

    def stop(self) -> None:
        """Stop, and remove everything from the network."""
        self._leave_mode_stack()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._origins.clear()
        self.report_pending()

    def _leave_mode_stack(self) -> None:
        """Remove this mode from torch's stack, also if modes entered later are still active."""
        later: list[TorchFunctionMode] = []
        if self in _get_current_function_mode_stack():
            while (mode := _pop_mode()) is not self:
                later.append(mode)
        for mode in reversed(later):
            _push_mode(mode)

    def report_pending(self) -> None:
        """Report the layers whose unit dimension is still undecided, and the chosen outputs."""
        for name in [*self._chosen_outputs]:
            self._report_chosen_output(name)
        while self._undecided:
            self._emit(self._undecided.popitem()[1])

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.compiler.is_compiling():
            # The compiler cannot trace the code below.
            self.saw_compiled_code = True
        elif (
            not (self._origins or func in STARTS_TRACKING)
            or func in READS_SHAPE_ONLY
            or _in_backward()
            or self._is_in_probe()
        ):
            pass
        elif func in ZEROS:
            self._origins[result] = Origin(is_zero=True)
        elif isinstance(result, Tensor | tuple | list):
            self._follow(func, args, kwargs or {}, [*tensors_in(result)])
        elif func is Tensor.__setitem__:
            self._follow_assignment(args[0], args[2])
        return result

    def _follow_assignment(self, tensor: Tensor, part: Any) -> None:
        """Add the activations that were written into a part of a tensor to those of the tensor."""
        written = self._origins.get(part) if isinstance(part, Tensor) else None
        if written is not None and isinstance(tensor, Tensor):
            before = self._origins.get(tensor)
            if before is None or before.is_zero:
                before = Origin(written.axes if part.ndim == tensor.ndim else ())
            activations = tuple(dict.fromkeys((*before.activations, *written.activations)))
            self._origins[tensor] = Origin(before.axes, activations, layer_call=latest_layer_call([before, written]))

    def _follow(self, func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any], outputs: list[Tensor]) -> None:
        """Derive the origins of a function's outputs from those of its inputs, and report what a layer reads."""
        inputs = [*tensors_in((args, kwargs))]
        all_origins = [(tensor, origin) for tensor in inputs if (origin := self._origins.get(tensor)) is not None]
        if not all_origins and func not in STARTS_TRACKING:
            return
        origins = [(tensor, origin) for tensor, origin in all_origins if origin.has_units]
        axes = [(tensor, origin.axes) for tensor, origin in origins if len(origin.axes) == tensor.ndim]
        infer_unit_dim(func, args, kwargs, inputs, axes)
        if func in LAYERS and not self._calls[-1].in_metric:
            self.layers_with_weights.update(id(tensor) for tensor in inputs[1:2])
        activations = tuple(dict.fromkeys(a for _, origin in origins for a in origin.activations if not a.reported))
        followed = {id(tensor) for tensor, _ in origins}
        if activations and is_layer(func, args, inputs, followed):
            for activation in activations:
                self._report(activation)
            activations = ()
        layer_call = self._layer_call(func, inputs, all_origins, followed)
        is_mask = func in COMPARISONS and len(origins) > 0
        for output in outputs:
            after = axes_after(func, args, kwargs, inputs, output, axes)
            # A scalar holds no activations but is a loss: the sum of losses over steps would keep all activations.
            is_loss_or_weight = not output.ndim or is_weight(output)
            passed_on = () if is_loss_or_weight else activations
            made_by = None if is_loss_or_weight else layer_call
            if passed_on or after or made_by:
                self._origins[output] = Origin(after, passed_on, layer_call=made_by, is_mask=is_mask)
        if outputs and not (func in MULTIPLICATIONS and self._join_gates(origins, outputs[0])):
            self._observe_function(func, args, kwargs, [origin for _, origin in all_origins], outputs[0])

    def _layer_call(
        self,
        func: Function,
        inputs: Sequence[Tensor],
        origins: Sequence[tuple[Tensor, Origin]],
        followed: Collection[int],
    ) -> LayerCall | None:
        """Return the last call of a layer with weights that a function's output comes from."""
        reads_units = func in PRODUCTS or (len(followed) > 0 and func not in PASSING_ON)
        if func in LAYERS or (reads_units and any(is_weight(tensor) for tensor in inputs)):
            return self._names.call_of_layer(self._calls[-1].module, inputs[1:] if func in LAYERS else inputs)
        if func in MATRIX_PRODUCTS:
            # The columns of a product are those of its right factor.
            right = factors_of(func, inputs)[1]
            origins = [(tensor, origin) for tensor, origin in origins if tensor is right]
        return latest_layer_call(origin for _, origin in origins)

    def _observe_function(
        self,
        func: Function,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        origins: Sequence[Origin],
        output: Tensor,
    ) -> None:
        """Observe the output of a function if it is an activation function that no activation module calls."""
        if not is_activation_function(func, args, kwargs, origins):
            return
        call = self._calls[-1]
        call.calls_activation = True
        outside_root = len(self._calls) == 1 and not self._has_training_step
        if not outside_root and not is_activation_module(call.module):
            name = "clamp" if func in CLAMPS else getattr(func, "__name__", "activation").strip("_")
            self._observe(call, f"{call.path}.{name}" if call.path else name, output)

    def _join_gates(self, origins: Sequence[tuple[Tensor, Origin]], product: Tensor) -> bool:
        """Replace the activations that are factors of a product by the product; return whether there are any."""
        factors = [origin for tensor, origin in origins if tensor.shape == product.shape]
        gates = [(f.result, f.layer_call) for f in factors if f.result is not None and not f.result.reported]
        if len(factors) != 2 or not gates:
            return False
        for gate, _ in gates:
            gate.reported = True
            gate.observed.clear()
        first, layer_call = gates[0]
        self._keep(first.name, product, layer_call)
        return True

    def _is_in_probe(self) -> bool:
        return probe_depth() != self._probe_depth

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        if self._is_in_probe():
            return
        caller = self._calls[-1]
        in_metric = caller.in_metric or id(module) in self._in_metrics
        self._calls.append(_ModuleCall(module, self._names.path_of_call(module, caller.path), in_metric))

    def _leave_module(self, module: nn.Module, args: Any, result: Any) -> None:
        call = self._calls[-1]
        if self._is_in_probe() or call.module is not module:
            # The module was never entered: it runs in a probe, or another pre-hook raised before this tracker's.
            return
        self._calls.pop()
        output = next(tensors_in(result), None)
        if output is None or _in_backward() or torch.compiler.is_compiling():
            return
        caller = self._calls[-1]
        if isinstance(module, RECURRENT_LAYERS):
            self._follow_recurrent(caller, call, output, [*tensors_in(result)])
        elif call.path in self._chosen:
            self._choose(caller, call, output)
        elif call.calls_activation and is_activation_module(module):
            self._observe(caller, call.path, output)

    def _choose(self, caller: _ModuleCall, call: _ModuleCall, output: Tensor) -> None:
        """Report the output of a chosen module; that of a layer waits, since activations may get its name."""
        module, origin = call.module, self._origins.get(output) or Origin()
        is_activation = is_activation_module(module)
        name = caller.number(call.path) if is_activation else call.path
        has_weights = isinstance(module, LINEAR_LAYERS) or next(module.parameters(recurse=False), None) is not None
        if has_weights and not is_activation:
            self._report_chosen_output(name)
            if (activations := self.observe_output(name, output)) is not None:
                self._chosen_outputs[name] = activations
                self._origins[output] = dataclasses.replace(origin, axes=activations.axes)
        elif (activations := self._keep(name, output, origin.layer_call)) is not None:
            self._report(activations)

    def _report_chosen_output(self, name: str) -> None:
        if (activations := self._chosen_outputs.pop(name, None)) is not None:
            self._report(activations)

    def _follow_recurrent(
        self, caller: _ModuleCall, call: _ModuleCall, output: Tensor, outputs: Sequence[Tensor]
    ) -> None:
        """Observe the output of a recurrent layer; a head that reads the last state reads the same units."""
        layer_call = self._names.call_of_layer(call.module)
        self._origins[output] = Origin(last_counts_units(output.ndim), layer_call=layer_call)
        self._observe(caller, call.path, output)
        origin = self._origins.get(output)
        for state in outputs:
            if origin is not None and state is not output:
                axes = last_counts_units(state.ndim)
                self._origins[state] = Origin(axes, origin.activations, layer_call=layer_call)
        if origin is not None and origin.result is not None and call.path in self._chosen:
            self._report(origin.result)

    def _observe(self, call: _ModuleCall, place: str, output: Tensor) -> None:
        """Keep the statistics of activations with their tensor, to be reported when a layer reads it.

        Args:
            call: The call of the module around the activation function.
            place: The path of the activation module, or that of the module around it and the function's name.
            output: The activations.
        """
        self.saw_activations = True
        if not _is_measurable(output):
            return
        origin = self._origins.get(output) or Origin()
        layer_call, dim = origin.layer_call, counting_units(origin.axes)
        if layer_call is None:
            name = call.number(place)
        else:
            name = self._names.activations(layer_call, place, units=output.shape[-1 if dim is None else dim])
        if not call.in_metric and self._sink.selects(name):
            self._keep(name, output, layer_call)

    def _keep(self, name: str, output: Tensor, layer_call: LayerCall | None) -> Activations | None:
        activations = self.observe_output(name, output)
        if activations is not None:
            earlier = origin.activations if (origin := self._origins.get(output)) else ()
            kept = Origin(activations.axes, (*earlier, activations), activations, layer_call)
            self._origins[output] = kept
        return activations

    def observe_output(self, name: str, output: Tensor) -> Activations | None:
        """Return the statistics of a tensor as the activations of a layer; ``None`` if it cannot be measured."""
        if not _is_measurable(output):
            return None
        axes = origin.axes if (origin := self._origins.get(output)) else ()
        # The sink's own operations are no part of the network.
        with torch.no_grad(), torch._C.DisableTorchFunction():
            tensor = output.detach()
            known = counting_units(axes) if self._sink.channel_dim is None else self._sink.channel_dim
            if tensor.ndim == 1 and known == 0:
                # One sample without a batch dimension.
                tensor, known = tensor[None], 1
            if tensor.ndim < 2 or not tensor.numel():
                return None
            dims = [channel_dim_of(tensor) if known is None else known]
            if known is None and tensor.ndim > 2:
                axes = new_axes(axes, (1, tensor.ndim - 1), tensor.ndim)
                dims += [dim for dim, names in enumerate(axes) if names and dim != dims[0]]
            try:
                observed = {dim: self._sink.observe(tensor, dim) for dim in dims}
                return Activations(name, axes, observed, certain=known is not None)
            except Exception as error:
                if not self._sink.tolerates(error):
                    raise
                return None

    def _report(self, activations: Activations) -> None:
        if activations.reported:
            return
        activations.reported = True
        self._chosen_outputs.pop(activations.name, None)
        if (earlier := self._undecided.pop(activations.name, None)) is not None:
            # At most one is kept for each layer, so that memory is bounded.
            self._emit(earlier)
        if len(activations.observed) > 1 and counting_units(activations.axes) is None:
            self._undecided[activations.name] = activations
        else:
            self._emit(activations)

    def _emit(self, activations: Activations) -> None:
        observed, dim = activations.observed, counting_units(activations.axes)
        assumed = len(observed) > 1 and dim is None
        statistics = next(iter(observed.values())) if dim not in observed else observed[dim]
        certain = activations.certain or dim is not None
        self.saw_hidden_layer = True
        with torch._C.DisableTorchFunction():
            try:
                self._sink.report(activations.name, statistics, assumed=assumed, certain=certain)
            except Exception as error:
                if not self._sink.tolerates(error):
                    raise
        # The tensor may outlive the report.
        observed.clear()


def _is_measurable(tensor: Tensor) -> bool:
    """Return whether a tensor may hold samples of units; inside torch.func it is a single sample, or a tangent."""
    in_transform = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    is_dense = tensor.layout is torch.strided and not tensor.is_nested
    return is_dense and tensor.is_floating_point() and not in_transform


def _in_backward() -> bool:
    """Return whether a backward pass is running: an activation checkpoint repeats the forward pass there."""
    return torch._C._current_graph_task_id() != -1
