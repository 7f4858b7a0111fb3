"""Watching a network run: which activation functions does it call, where, and does what they return feed a layer?"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
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
    functions,
    infer_unit_dim,
    is_weight,
    last_counts_units,
    new_axes,
    weighs_numbers,
)
from lightning_plasticity.functional.layouts import channel_dim_of
from lightning_plasticity.isolation.batches import tensors_in
from lightning_plasticity.layers import RECURRENT_LAYERS

ACTIVATIONS = functions(
    "relu relu_ relu6 leaky_relu leaky_relu_ prelu rrelu rrelu_ elu elu_ celu celu_ selu selu_ gelu silu silu_ "
    "mish mish_ glu softplus softsign tanh tanh_ sigmoid sigmoid_ hardtanh hardtanh_ hardswish hardsigmoid hardshrink "
    "softshrink tanhshrink threshold threshold_"
)
"""Functions whose results are activations."""

ACTIVATION_NAMES = {function.__name__.rstrip("_") for function in ACTIVATIONS} | {"clamp"}
"""What they are called."""

_LAYERS = {*CONVOLUTIONS, F.linear, F.bilinear, F.multi_head_attention_forward}
"""Functions that feed on activations, whether or not their weights are parameters."""

_CLAMPS = functions("clamp clamp_ clamp_min clamp_min_ clip clip_")
"""Functions whose results are activations if they cut off what is below zero."""

_MULTIPLICATIONS = functions("mul mul_ __mul__ __rmul__ __imul__ multiply multiply_")

_PASSING_ON = {
    *ACTIVATIONS,
    *_CLAMPS,
    *_MULTIPLICATIONS,
    *NORMS,
    *functions(
        "add add_ __radd__ __iadd__ sub sub_ __rsub__ __isub__ rsub div div_ "
        "__rdiv__ __rtruediv__ __itruediv__ divide true_divide pow pow_ __rpow__ __pow__ addcmul addcdiv lerp "
        "maximum minimum where cat concat stack expand_as broadcast_tensors masked_fill masked_fill_ normal "
        "gt __gt__ ge __ge__ lt __lt__ le __le__ eq __eq__ ne __ne__"
    ),
}
"""Functions that are no layer even if a parameter takes part: a learned temperature, shift or token."""

_OF_THE_SHAPE_ALONE = functions(
    "empty_like full_like ones_like zeros_like rand_like randn_like randint_like "
    "new_empty new_empty_strided new_full new_ones new_tensor new_zeros"
)
"""Functions that take nothing from a tensor but its shape, dtype or device."""

_STARTING = {*ACTIVATIONS, *MAKERS}
"""Functions whose results have something to be remembered, whatever goes in."""


class ActivationSink(Protocol):
    """Who is told of the activations."""

    channel_dim: int | None
    """The dimension that counts units, if somebody has said so."""

    def selects(self, name: str) -> bool:
        """Whether the activations of this name are of interest."""

    def observe(self, activations: Tensor, channel_dim: int | None) -> Any:
        """What is to be known of them, taken before anyone can change them in place."""

    def report(self, name: str, observed: Any, *, assumed: bool, certain: bool) -> None:
        """They belong to a hidden layer.

        Whether the dimension that counts its units is but one of several, and whether anything has told it: of two
        dimensions the last one is no assumption, and still not certain.
        """

    def tolerates(self, error: Exception) -> bool:
        """Whether the network goes on although one of these has failed."""


class _Hook:
    """A hook that does nothing any more in a copy of the network, or when it was pickled."""

    def __init__(self, act: Callable[..., None]) -> None:
        self._act = act

    def __call__(self, *args: Any) -> None:
        self._act(*args)

    def __reduce__(self) -> tuple[type[_NoHook], tuple[()]]:
        return _NoHook, ()


class _NoHook:
    """What is left of it there."""

    def __call__(self, *args: Any) -> None:
        pass


@dataclass
class _Call:
    """A call of a module that is going on."""

    module: nn.Module
    path: str
    of_a_metric: bool = False
    calls_activation: bool = False
    times: Counter[str] = field(default_factory=Counter)

    def number(self, base: str) -> str:
        """A name that is new in this call: the second ``relu`` is ``relu-2``."""
        self.times[base] += 1
        return base if self.times[base] == 1 else f"{base}-{self.times[base]}"


@dataclass(eq=False)
class _Activations:
    """What was observed of one result of an activation function, until it is known to belong to a hidden layer.

    ``observed`` is by the dimension that may count units: the first is the one that is assumed. ``certain`` is whether
    it was known when they were observed.
    """

    name: str
    axes: Sequence[Axes]
    observed: dict[int, Any]
    certain: bool
    reported: bool = False


@dataclass
class _Origin:
    """What is known of a tensor: what its dimensions stand for, and its activations that no layer has seen yet.

    ``result`` are those of them that the tensor itself is.
    """

    axes: Sequence[Axes] = ()
    activations: tuple[_Activations, ...] = ()
    result: _Activations | None = None


class ActivationTracker(TorchFunctionMode):
    """While started, reports what the activation functions of a network return.

    Activations belong to a hidden layer if they flow into a further layer with weights: a linear one, a convolution, a
    product with a matrix that comes from elsewhere, or any function of a parameter but arithmetic and normalisation.
    Those of the output layer do not, nor do those on the way to the loss. Of a gate, ``h * sigmoid(h)``, the product is
    what counts: the next layer reads it.

    Activations are called by the path of their module, those of functions by the path of the module that calls it and
    the name of the function; what has the same name in one call of a module is numbered.

    Args:
        root: The network.
        observer: Who is told.
        chosen: Paths of modules whose results are reported too, whatever becomes of them.
    """

    def __init__(self, root: nn.Module, observer: ActivationSink, chosen: Collection[str]) -> None:
        super().__init__()
        self.saw_activations = False
        self.saw_hidden_layer = False
        self.layers_with_weights: set[int] = set()
        self.saw_compiled_code = False
        self._observer = observer
        self._chosen = chosen
        self._origins: dict[int, tuple[weakref.ref[Tensor], _Origin]] = {}
        self._undecided: dict[str, _Activations] = {}
        self._calls = [_Call(root, "")]
        self._trains_itself = hasattr(root, "training_step")  # which is no call of a module
        self._hooks: list[RemovableHandle] = []
        self._modules = list(root.modules())
        metrics = [module for module in self._modules if isinstance(module, Metric)]
        self._of_metrics = {id(module) for metric in metrics for module in metric.modules()}
        self._paths: dict[int, list[str]] = {}
        for path, module in root.named_modules(remove_duplicate=False):
            self._paths.setdefault(id(module), []).append(without_wrappers(path))

    def start(self) -> None:
        """Begins to watch."""
        for module in self._modules:
            self._hooks.append(module.register_forward_pre_hook(_Hook(self._enter_module)))
            self._hooks.append(module.register_forward_hook(_Hook(self._leave_module), always_call=True))
        TorchFunctionMode.__enter__(self)

    def stop(self) -> None:
        """Ends it: nothing is left in the network."""
        self._leave_stack()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._origins.clear()
        self.decide()

    def _leave_stack(self) -> None:
        """Ends to be told of functions, also if others have begun to be told later and have not ended it yet."""
        later: list[TorchFunctionMode] = []
        if self in _get_current_function_mode_stack():
            while (mode := _pop_mode()) is not self:
                later.append(mode)
        for mode in reversed(later):
            _push_mode(mode)

    def decide(self) -> None:
        """Reports the layers of which nothing has told yet which dimension counts units."""
        while self._undecided:
            self._tell(self._undecided.popitem()[1])

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.compiler.is_compiling():  # nothing of what follows can be compiled
            self.saw_compiled_code = True
        elif not (self._origins or func in _STARTING) or func in _OF_THE_SHAPE_ALONE or _in_backward():
            pass
        elif isinstance(result, Tensor | tuple | list):
            self._follow(func, args, kwargs or {}, [*tensors_in(result)])
        elif func is Tensor.__setitem__:
            self._take_in(args[0], args[2])
        return result

    def _take_in(self, tensor: Tensor, part: Any) -> None:
        """What was written into a tensor is a part of it."""
        written = self._origin(part) if isinstance(part, Tensor) else None
        if written is not None and isinstance(tensor, Tensor):
            before = self._origin(tensor) or _Origin(written.axes if part.ndim == tensor.ndim else ())
            activations = tuple(dict.fromkeys((*before.activations, *written.activations)))
            self._remember(tensor, _Origin(before.axes, activations))

    def _follow(self, func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any], outputs: list[Tensor]) -> None:
        inputs = [*tensors_in((args, kwargs))]
        origins = [(tensor, origin) for tensor in inputs if (origin := self._origin(tensor)) is not None]
        axes = [(tensor, origin.axes) for tensor, origin in origins if len(origin.axes) == tensor.ndim]
        infer_unit_dim(func, args, kwargs, inputs, axes)
        if func in _LAYERS and not self._calls[-1].of_a_metric:
            self.layers_with_weights.update(id(tensor) for tensor in inputs[1:2])
        activations = tuple(dict.fromkeys(a for _, origin in origins for a in origin.activations if not a.reported))
        if activations and _is_layer(func, args, inputs, {id(tensor) for tensor, _ in origins}):
            for activation in activations:
                self._report(activation)
            activations = ()
        for output in outputs:
            after = axes_after(func, args, kwargs, inputs, output, axes)
            # A scalar is no activations any more, but a loss: added up over steps it would keep all there ever were.
            passed_on = () if not output.ndim or is_weight(output) else activations
            if passed_on or after:
                self._remember(output, _Origin(after, passed_on))
        if not outputs:
            return
        if func in _MULTIPLICATIONS:
            self._join_gates(origins, outputs[0])
        of_clamp = func in _CLAMPS and len(origins) > 0 and _cuts_at_zero(args, kwargs)
        if of_clamp or (func in ACTIVATIONS and not isinstance(inputs[0], nn.Parameter)):
            call = self._calls[-1]
            call.calls_activation = True
            elsewhere = len(self._calls) == 1 and not self._trains_itself
            if not elsewhere and not _is_activation(call.module):
                name = "clamp" if of_clamp else getattr(func, "__name__", "activation").rstrip("_")
                self._observe(call, f"{call.path}.{name}" if call.path else name, outputs[0])

    def _join_gates(self, origins: list[tuple[Tensor, _Origin]], product: Tensor) -> None:
        """Puts a product in the place of the activations that are its factors."""
        factors = [origin.result for tensor, origin in origins if tensor.shape == product.shape]
        gates = [gate for gate in factors if gate is not None and not gate.reported]
        if len(factors) == 2 and gates:
            for gate in gates:
                gate.reported = True
                gate.observed.clear()
            self._keep(gates[0].name, product)

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        caller = self._calls[-1]
        of_a_metric = caller.of_a_metric or id(module) in self._of_metrics
        self._calls.append(_Call(module, self._path(module, caller.path), of_a_metric))

    def _leave_module(self, module: nn.Module, args: Any, result: Any) -> None:
        call = self._calls[-1]
        if call.module is not module:  # it was never entered: a hook of somebody else's failed before ours
            return
        self._calls.pop()
        output = next(tensors_in(result), None)
        if output is None or _in_backward() or torch.compiler.is_compiling():
            return
        caller = self._calls[-1]
        if call.path in self._chosen:
            name = caller.number(call.path) if _is_activation(module) else call.path
            activations = self._keep(name, output)
            if activations is not None:
                self._report(activations)
        elif isinstance(module, RECURRENT_LAYERS):
            self._remember(output, _Origin(last_counts_units(output.ndim)))
            self._observe(caller, call.path, output, numbered=False)
            origin = self._origin(output)
            for state in tensors_in(result):  # a head on the last state feeds on the same units
                if origin is not None and state is not output:
                    self._remember(state, _Origin(last_counts_units(state.ndim), origin.activations))
        elif call.calls_activation and _is_activation(module):
            self._observe(caller, call.path, output)

    def _observe(self, caller: _Call, base: str, output: Tensor, *, numbered: bool = True) -> None:
        """Keeps what is to be known of activations with the tensor, to be reported when a layer takes it."""
        self.saw_activations = True
        name = caller.number(base) if numbered else base
        if caller.of_a_metric or not self._observer.selects(name):
            return
        self._keep(name, output)

    def _keep(self, name: str, output: Tensor) -> _Activations | None:
        activations = self._look(name, output)
        if activations is not None:
            earlier = origin.activations if (origin := self._origin(output)) else ()
            self._remember(output, _Origin(activations.axes, (*earlier, activations), activations))
        return activations

    def _look(self, name: str, output: Tensor) -> _Activations | None:
        if torch._C._functorch.is_functorch_wrapped_tensor(output):  # inside torch.func: one sample, or a tangent
            return None
        if output.layout is not torch.strided or output.is_nested:
            return None
        axes = origin.axes if (origin := self._origin(output)) else ()
        with torch.no_grad(), torch._C.DisableTorchFunction():  # what the observer does is no part of the network
            tensor = output.detach()
            known = counting_units(axes) if self._observer.channel_dim is None else self._observer.channel_dim
            if tensor.ndim == 1 and known == 0:  # one sample without a batch
                tensor, known = tensor[None], 1
            if tensor.ndim < 2 or not tensor.numel() or not tensor.is_floating_point():
                return None
            dims = [channel_dim_of(tensor) if known is None else known]
            if known is None and tensor.ndim > 2:
                axes = new_axes(axes, (1, tensor.ndim - 1), tensor.ndim)
                dims += [dim for dim, names in enumerate(axes) if names and dim != dims[0]]
            try:
                observed = {dim: self._observer.observe(tensor, dim) for dim in dims}
                return _Activations(name, axes, observed, certain=known is not None)
            except Exception as error:
                if not self._observer.tolerates(error):
                    raise
                return None

    def _report(self, activations: _Activations) -> None:
        if not activations.reported:
            activations.reported = True
            earlier = self._undecided.pop(activations.name, None)
            if earlier is not None:  # nobody will decide about it any more
                self._tell(earlier)
            if len(activations.observed) > 1 and counting_units(activations.axes) is None:
                self._undecided[activations.name] = activations
            else:
                self._tell(activations)

    def _tell(self, activations: _Activations) -> None:
        observed, decided = activations.observed, counting_units(activations.axes)
        assumed = len(observed) > 1 and decided is None
        statistics = next(iter(observed.values())) if decided not in observed else observed[decided]
        certain = activations.certain or decided is not None
        self.saw_hidden_layer = True
        with torch._C.DisableTorchFunction():
            try:
                self._observer.report(activations.name, statistics, assumed=assumed, certain=certain)
            except Exception as error:
                if not self._observer.tolerates(error):
                    raise
        observed.clear()  # the tensor may live on

    def _origin(self, tensor: Tensor) -> _Origin | None:
        reference, origin = self._origins.get(id(tensor), (None, None))
        return origin if reference is not None and reference() is tensor else None

    def _remember(self, tensor: Tensor, origin: _Origin) -> None:
        key, origins = id(tensor), self._origins
        self._origins[key] = weakref.ref(tensor, lambda _: origins.pop(key, None)), origin

    def _path(self, module: nn.Module, caller: str) -> str:
        """The path by which the module is called here: the same one may be in several places."""
        paths = self._paths.get(id(module), [type(module).__name__.lower()])  # added after the start: by its class
        for path in paths:
            if path.rpartition(".")[0] == caller:
                return path
        inside = [path for path in paths if not caller or path.startswith(f"{caller}.")]
        if not inside and _is_activation(module):
            return f"{caller}.{paths[0].rpartition('.')[2]}"
        return (inside or paths)[0]


def _is_activation(module: nn.Module) -> bool:
    """Whether a module that calls an activation function is one itself: then its own result is what counts."""
    own = type(module).__module__ == nn.ReLU.__module__
    return not module._modules and (own or next(module.parameters(), None) is None)


def _cuts_at_zero(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether these are the arguments of a clamp at zero from below."""
    low = kwargs.get("min", args[1] if len(args) > 1 else None)
    return isinstance(low, int | float) and low == 0


def _is_layer(func: Function, args: Sequence[Any], inputs: Sequence[Tensor], followed: Collection[int]) -> bool:
    """Whether a function is a layer with weights; a matrix product is one if they do not come from its input too."""
    if func in EINSUM and args and weighs_numbers(args[0], inputs, followed):
        return False
    if func in PRODUCTS:
        return any(is_weight(tensor) or id(tensor) not in followed for tensor in inputs)
    return func in _LAYERS or (func not in _PASSING_ON and any(is_weight(tensor) for tensor in inputs))


def _in_backward() -> bool:
    """Whether a backward pass is running: an activation checkpoint then repeats what was seen before."""
    return torch._C._current_graph_task_id() != -1
