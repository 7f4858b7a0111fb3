"""Record the activations of a network's hidden layers while it runs, by the name of the layer that owns the weights.

The tracker follows torch functions rather than hooks on layers. A forward pre-hook on each layer with weights sees what
the layer reads: the same numbers in an MLP, but pooled activations, channels flattened with their positions, residual
streams, and only the last state of a recurrent layer. The dormant fraction of Sokar 2023 is defined on the outputs of
activation functions, and code that calls functions instead of modules has no layers to hook.
"""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils.hooks import RemovableHandle
from torchmetrics import Metric

from lightning_plasticity.activations.compiled import without_wrappers
from lightning_plasticity.activations.unit_axes import (
    CONVOLUTIONS,
    EINSUM,
    MAKERS,
    NORMS,
    PRODUCTS,
    Axes,
    Function,
    axes_after,
    counting_units,
    factors_of,
    functions,
    infer_unit_dim,
    is_weight,
    last_counts_units,
    new_axes,
    weighs_numbers,
)
from lightning_plasticity.functional.layouts import channel_dim_of
from lightning_plasticity.isolation.batches import tensors_in
from lightning_plasticity.layers import LINEAR_LAYERS, RECURRENT_LAYERS

ACTIVATIONS = functions(
    "relu relu_ relu6 leaky_relu leaky_relu_ prelu rrelu rrelu_ elu elu_ celu celu_ selu selu_ gelu silu silu_ "
    "mish mish_ glu softplus softsign tanh tanh_ sigmoid sigmoid_ hardtanh hardtanh_ hardswish hardsigmoid hardshrink "
    "softshrink tanhshrink threshold threshold_"
)
"""Activation functions."""

_CLAMPS = functions("clamp clamp_ clamp_min clamp_min_ clip clip_")
"""Activation functions if they clamp at zero from below."""

_MAXIMA = functions("maximum fmax max")
"""Activation functions if one of two arguments is a tensor of zeros."""

_COMPARISONS = functions("gt __gt__ ge __ge__ lt __lt__ le __le__ greater greater_equal less less_equal")

_MULTIPLICATIONS = functions("mul mul_ __mul__ __rmul__ __imul__ multiply multiply_")

_SELECTIONS = {*_MULTIPLICATIONS, *functions("where masked_fill masked_fill_")}
"""Activation functions if one argument is a mask made by comparing units: ``where(x > 0, x, 0.1 * x)``."""

ACTIVATION_NAMES = {f.__name__.strip("_") for f in ACTIVATIONS | _MAXIMA | _SELECTIONS} | {"clamp"}
"""Names of activation functions in the names of layers whose weights have no owner."""

_MATRIX_PRODUCTS = PRODUCTS - EINSUM

_LAYERS = {*CONVOLUTIONS, F.linear, F.bilinear, F.multi_head_attention_forward}
"""Functions that are layers whether or not their weights are parameters."""

_PASSING_ON = {
    *ACTIVATIONS,
    *_CLAMPS,
    *_MAXIMA,
    *_COMPARISONS,
    *_SELECTIONS,
    *NORMS,
    *functions(
        "add add_ __radd__ __iadd__ sub sub_ __rsub__ __isub__ rsub div div_ "
        "__rdiv__ __rtruediv__ __itruediv__ divide true_divide pow pow_ __rpow__ __pow__ addcmul addcdiv lerp "
        "minimum cat concat stack expand_as broadcast_tensors normal eq __eq__ ne __ne__"
    ),
}
"""Functions that are no layer even if a parameter takes part: a learned temperature, shift or token."""

_ZEROS = functions("zeros zeros_like new_zeros")

_OF_THE_SHAPE_ALONE = functions(
    "empty_like full_like ones_like rand_like randn_like randint_like "
    "new_empty new_empty_strided new_full new_ones new_tensor"
)
"""Functions that read nothing of a tensor but its shape, dtype or device."""

_STARTING = {*ACTIVATIONS, *MAKERS}
"""Functions whose outputs are followed whatever their inputs are."""


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
        return _numbered(base, self.uses[base])


@dataclass(eq=False)
class _LayerCall:
    """A call of a layer with weights.

    Attributes:
        owner: The path of the module that owns the weights.
        index: The position of the call among all calls.
        num_activations: The number of activation functions that its output has gone through.
    """

    owner: str
    index: int
    num_activations: int = 0


@dataclass(eq=False)
class _Activations:
    """The statistics of a tensor, kept until the tensor turns out to belong to a hidden layer.

    Attributes:
        name: Name of the layer.
        axes: The axes of the tensor.
        observed: The statistics by the dimension that may count units; the first one is assumed.
        certain: Whether that dimension was known when they were observed.
        reported: Whether they were reported, or replaced by the product that they are a factor of.
    """

    name: str
    axes: Sequence[Axes]
    observed: dict[int, Any]
    certain: bool
    reported: bool = False


@dataclass
class _Origin:
    """Where a tensor comes from.

    Attributes:
        axes: The axes that its dimensions stand for.
        activations: The activations in it that no layer has read yet.
        result: Those of them that the tensor itself is.
        layer_call: The last call of a layer with weights that it comes from.
        is_mask: Whether it was made by comparing units.
        is_zero: Whether it was made as a tensor of zeros.
    """

    axes: Sequence[Axes] = ()
    activations: tuple[_Activations, ...] = ()
    result: _Activations | None = None
    layer_call: _LayerCall | None = None
    is_mask: bool = False
    is_zero: bool = False

    @property
    def is_followed(self) -> bool:
        """Whether it comes from units of the network."""
        return bool(self.axes or self.activations)


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
        # By id, since tensors compare elementwise. The weak reference shows that the id was not reused.
        self._origins: dict[int, tuple[weakref.ref[Tensor], _Origin]] = {}
        self._undecided: dict[str, _Activations] = {}
        self._chosen_outputs: dict[str, _Activations] = {}
        self._calls = [_ModuleCall(root, "")]
        # Lightning calls training_step without calling the module.
        self._has_training_step = hasattr(root, "training_step")
        self._layer_calls = itertools.count()
        self._places: dict[str, tuple[str, int]] = {}
        self._hooks: list[RemovableHandle] = []
        self._modules = list(root.modules())
        metrics = [module for module in self._modules if isinstance(module, Metric)]
        self._in_metrics = {id(module) for metric in metrics for module in metric.modules()}
        self._paths: dict[int, list[str]] = {}
        for path, module in root.named_modules(remove_duplicate=False):
            self._paths.setdefault(id(module), []).append(without_wrappers(path))
        self._owners: dict[Tensor, str] = {p: parameter_owner(name) for name, p in root.named_parameters()}

    def start(self) -> None:
        """Start to track the network."""
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
        elif not (self._origins or func in _STARTING) or func in _OF_THE_SHAPE_ALONE or _in_backward():
            pass
        elif func in _ZEROS:
            self._remember(result, _Origin(is_zero=True))
        elif isinstance(result, Tensor | tuple | list):
            self._follow(func, args, kwargs or {}, [*tensors_in(result)])
        elif func is Tensor.__setitem__:
            self._follow_assignment(args[0], args[2])
        return result

    def _follow_assignment(self, tensor: Tensor, part: Any) -> None:
        """Add the activations that were written into a part of a tensor to those of the tensor."""
        written = self._origin(part) if isinstance(part, Tensor) else None
        if written is not None and isinstance(tensor, Tensor):
            before = self._origin(tensor)
            if before is None or before.is_zero:
                before = _Origin(written.axes if part.ndim == tensor.ndim else ())
            activations = tuple(dict.fromkeys((*before.activations, *written.activations)))
            self._remember(tensor, _Origin(before.axes, activations, layer_call=_latest_layer_call([before, written])))

    def _follow(self, func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any], outputs: list[Tensor]) -> None:
        """Derive the origins of a function's outputs from those of its inputs, and report what a layer reads."""
        inputs = [*tensors_in((args, kwargs))]
        all_origins = [(tensor, origin) for tensor in inputs if (origin := self._origin(tensor)) is not None]
        origins = [(tensor, origin) for tensor, origin in all_origins if origin.is_followed]
        axes = [(tensor, origin.axes) for tensor, origin in origins if len(origin.axes) == tensor.ndim]
        infer_unit_dim(func, args, kwargs, inputs, axes)
        if func in _LAYERS and not self._calls[-1].in_metric:
            self.layers_with_weights.update(id(tensor) for tensor in inputs[1:2])
        activations = tuple(dict.fromkeys(a for _, origin in origins for a in origin.activations if not a.reported))
        followed = {id(tensor) for tensor, _ in origins}
        if activations and _is_layer(func, args, inputs, followed):
            for activation in activations:
                self._report(activation)
            activations = ()
        layer_call = self._layer_call(func, inputs, all_origins, followed)
        is_mask = func in _COMPARISONS and len(origins) > 0
        for output in outputs:
            after = axes_after(func, args, kwargs, inputs, output, axes)
            # A scalar holds no activations but is a loss: the sum of losses over steps would keep all activations.
            is_loss_or_weight = not output.ndim or is_weight(output)
            passed_on = () if is_loss_or_weight else activations
            made_by = None if is_loss_or_weight else layer_call
            if passed_on or after or made_by:
                self._remember(output, _Origin(after, passed_on, layer_call=made_by, is_mask=is_mask))
        if outputs and not (func in _MULTIPLICATIONS and self._join_gates(origins, outputs[0])):
            self._observe_function(func, args, kwargs, inputs, all_origins, outputs[0])

    def _layer_call(
        self,
        func: Function,
        inputs: Sequence[Tensor],
        origins: Sequence[tuple[Tensor, _Origin]],
        followed: Collection[int],
    ) -> _LayerCall | None:
        """Return the last call of a layer with weights that a function's output comes from."""
        reads_units = func in PRODUCTS or (len(followed) > 0 and func not in _PASSING_ON)
        if func in _LAYERS or (reads_units and any(is_weight(tensor) for tensor in inputs)):
            return self._new_layer_call(self._owner(inputs[1:] if func in _LAYERS else inputs))
        if func in _MATRIX_PRODUCTS:
            # The columns of a product are those of its right factor.
            right = factors_of(func, inputs)[1]
            origins = [(tensor, origin) for tensor, origin in origins if tensor is right]
        return _latest_layer_call(origin for _, origin in origins)

    def _new_layer_call(self, owner: str | None) -> _LayerCall | None:
        return _LayerCall(owner, next(self._layer_calls)) if owner else None

    def _owner(self, inputs: Sequence[Tensor]) -> str | None:
        """Return the name of the layer that is being called, or else that of the owner of the weights it reads."""
        caller = self._calls[-1].module
        if isinstance(caller, LINEAR_LAYERS):
            return self._first_path(caller)
        matrices = [tensor for tensor in inputs if is_weight(tensor) and tensor.ndim > 1]
        parameters = [matrix if isinstance(matrix, nn.Parameter) else matrix._base for matrix in matrices]
        return next((self._owners[p] for p in parameters if p in self._owners), None)

    def _observe_function(
        self,
        func: Function,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        inputs: Sequence[Tensor],
        origins: Sequence[tuple[Tensor, _Origin]],
        output: Tensor,
    ) -> None:
        """Observe the output of a function if it is an activation function that no activation module calls."""
        if not _is_activation_function(func, args, kwargs, inputs, [origin for _, origin in origins]):
            return
        call = self._calls[-1]
        call.calls_activation = True
        outside_root = len(self._calls) == 1 and not self._has_training_step
        if not outside_root and not _is_activation_module(call.module):
            name = "clamp" if func in _CLAMPS else getattr(func, "__name__", "activation").strip("_")
            self._observe(call, f"{call.path}.{name}" if call.path else name, output)

    def _join_gates(self, origins: Sequence[tuple[Tensor, _Origin]], product: Tensor) -> bool:
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

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        caller = self._calls[-1]
        in_metric = caller.in_metric or id(module) in self._in_metrics
        self._calls.append(_ModuleCall(module, self._path(module, caller.path), in_metric))

    def _leave_module(self, module: nn.Module, args: Any, result: Any) -> None:
        call = self._calls[-1]
        if call.module is not module:
            # The module was never entered: another pre-hook raised before this tracker's.
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
        elif call.calls_activation and _is_activation_module(module):
            self._observe(caller, call.path, output)

    def _choose(self, caller: _ModuleCall, call: _ModuleCall, output: Tensor) -> None:
        """Report the output of a chosen module; that of a layer waits, since activations may get its name."""
        origin = self._origin(output) or _Origin()
        if _is_activation_module(call.module):
            activations = self._keep(caller.number(call.path), output, origin.layer_call)
        elif next(call.module.parameters(recurse=False), None) is None and not isinstance(call.module, LINEAR_LAYERS):
            activations = self._keep(call.path, output, origin.layer_call)
        else:
            self._report_chosen_output(call.path)
            if (activations := self._observe_tensor(call.path, output)) is not None:
                self._chosen_outputs[call.path] = activations
                self._remember(output, dataclasses.replace(origin, axes=activations.axes))
            return
        if activations is not None:
            self._report(activations)

    def _report_chosen_output(self, name: str) -> None:
        if (activations := self._chosen_outputs.pop(name, None)) is not None:
            self._report(activations)

    def _follow_recurrent(
        self, caller: _ModuleCall, call: _ModuleCall, output: Tensor, outputs: Sequence[Tensor]
    ) -> None:
        """Observe the output of a recurrent layer; a head that reads the last state reads the same units."""
        layer_call = self._new_layer_call(self._first_path(call.module))
        self._remember(output, _Origin(last_counts_units(output.ndim), layer_call=layer_call))
        self._observe(caller, call.path, output)
        origin = self._origin(output)
        for state in outputs:
            if origin is not None and state is not output:
                axes = last_counts_units(state.ndim)
                self._remember(state, _Origin(axes, origin.activations, layer_call=layer_call))
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
        layer_call = origin.layer_call if (origin := self._origin(output)) else None
        name = call.number(place) if layer_call is None else self._name(layer_call, place, output)
        if not call.in_metric and self._sink.selects(name):
            self._keep(name, output, layer_call)

    def _name(self, layer_call: _LayerCall, place: str, output: Tensor) -> str:
        """Return the name of activations by the owner of the weights.

        Further activation functions behind the same call are numbered, and so is a place that has another number of
        units than the first place of the same name.
        """
        origin = self._origin(output)
        dim = counting_units(origin.axes) if origin else None
        units = output.shape[-1 if dim is None else dim]
        while True:
            layer_call.num_activations += 1
            name = _numbered(layer_call.owner, layer_call.num_activations)
            first_place, first_units = self._places.setdefault(name, (place, units))
            if place == first_place or units == first_units:
                return name

    def _keep(self, name: str, output: Tensor, layer_call: _LayerCall | None) -> _Activations | None:
        activations = self._observe_tensor(name, output)
        if activations is not None:
            earlier = origin.activations if (origin := self._origin(output)) else ()
            kept = _Origin(activations.axes, (*earlier, activations), activations, layer_call)
            self._remember(output, kept)
        return activations

    def _observe_tensor(self, name: str, output: Tensor) -> _Activations | None:
        if not _is_measurable(output):
            return None
        axes = origin.axes if (origin := self._origin(output)) else ()
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
                return _Activations(name, axes, observed, certain=known is not None)
            except Exception as error:
                if not self._sink.tolerates(error):
                    raise
                return None

    def _report(self, activations: _Activations) -> None:
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

    def _emit(self, activations: _Activations) -> None:
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

    def _origin(self, tensor: Tensor) -> _Origin | None:
        reference, origin = self._origins.get(id(tensor), (None, None))
        return origin if reference is not None and reference() is tensor else None

    def _remember(self, tensor: Tensor, origin: _Origin) -> None:
        key, origins = id(tensor), self._origins
        self._origins[key] = weakref.ref(tensor, lambda _: origins.pop(key, None)), origin

    def _first_path(self, module: nn.Module) -> str | None:
        """Return the path of a module as in ``named_modules``; ``None`` if it was added after the start."""
        return self._paths.get(id(module), [None])[0]

    def _path(self, module: nn.Module, caller: str) -> str:
        """Return the path by which a module is called here: the same module may have several."""
        # A module added after the start is named after its class.
        paths = self._paths.get(id(module), [type(module).__name__.lower()])
        for path in paths:
            if path.rpartition(".")[0] == caller:
                return path
        inside = [path for path in paths if not caller or path.startswith(f"{caller}.")]
        if not inside and _is_activation_module(module):
            return f"{caller}.{paths[0].rpartition('.')[2]}"
        return (inside or paths)[0]


def parameter_owner(name: str) -> str:
    """Return the name of the layer whose weight is the parameter of this name.

    It is the path of the module, if the parameter is its ``weight``. Other parameters name their layer themselves,
    since a module may have several.

    Example:
        >>> parameter_owner("block.fc.weight"), parameter_owner("block.fc.parametrizations.weight.original")
        ('block.fc', 'block.fc')
        >>> parameter_owner("block.w1"), parameter_owner("weight")
        ('block.w1', 'weight')
    """
    path, parametrized, inner = without_wrappers(name).partition(".parametrizations.")
    if parametrized:
        key = inner.partition(".")[0]
    else:
        path, _, key = path.rpartition(".")
    return path if path and key == "weight" else f"{path}.{key}".lstrip(".")


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}-{number}"


def _latest_layer_call(origins: Iterable[_Origin]) -> _LayerCall | None:
    calls = [origin.layer_call for origin in origins if origin.layer_call is not None]
    return max(calls, key=lambda call: call.index, default=None)


def _is_measurable(tensor: Tensor) -> bool:
    """Return whether a tensor may hold samples of units; inside torch.func it is a single sample, or a tangent."""
    in_transform = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    is_dense = tensor.layout is torch.strided and not tensor.is_nested
    return is_dense and tensor.is_floating_point() and not in_transform


def _is_activation_module(module: nn.Module) -> bool:
    """Return whether a module that calls an activation function is an activation module: its own output counts."""
    in_torch = type(module).__module__ == nn.ReLU.__module__
    return not module._modules and (in_torch or next(module.parameters(), None) is None)


def _is_activation_function(
    func: Function,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    inputs: Sequence[Tensor],
    origins: Sequence[_Origin],
) -> bool:
    if func in ACTIVATIONS:
        return not isinstance(inputs[0], nn.Parameter)
    if not any(origin.is_followed for origin in origins):
        return False
    if func in _CLAMPS:
        low = kwargs.get("min", args[1] if len(args) > 1 else None)
        return isinstance(low, int | float) and low == 0
    if func in _SELECTIONS:
        return any(origin.is_mask for origin in origins)
    return func in _MAXIMA and any(origin.is_zero for origin in origins)


def _is_layer(func: Function, args: Sequence[Any], inputs: Sequence[Tensor], followed: Collection[int]) -> bool:
    """Return whether a function is a layer with weights; a product is one unless both factors come from the input."""
    if func in EINSUM and args and weighs_numbers(args[0], inputs, followed):
        return False
    if func in PRODUCTS:
        return any(is_weight(tensor) or id(tensor) not in followed for tensor in inputs)
    return func in _LAYERS or (func not in _PASSING_ON and any(is_weight(tensor) for tensor in inputs))


def _in_backward() -> bool:
    """Return whether a backward pass is running: an activation checkpoint repeats the forward pass there."""
    return torch._C._current_graph_task_id() != -1
