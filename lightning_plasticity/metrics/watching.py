"""Watching a network run: which activation functions does it call, where, and does what they return feed a layer?"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from torchmetrics import Metric

from lightning_plasticity.batches import tensors_in
from lightning_plasticity.metrics.compiled import without_wrappers

Function = Callable[..., Any]


def _functions(names: str) -> set[Function]:
    """Every form in which torch has them: ``F.relu``, ``torch.relu``, ``Tensor.relu``."""
    return {getattr(place, name) for name in names.split() for place in (F, torch, Tensor) if hasattr(place, name)}


ACTIVATIONS = _functions(
    "relu relu_ relu6 leaky_relu leaky_relu_ prelu rrelu rrelu_ elu elu_ celu celu_ selu selu_ gelu silu silu_ "
    "mish mish_ glu softplus softsign tanh tanh_ sigmoid sigmoid_ hardtanh hardtanh_ hardswish hardsigmoid hardshrink "
    "softshrink tanhshrink threshold threshold_"
)
"""Functions whose results are activations."""

_CONVOLUTIONS = {getattr(F, f"{kind}{dims}d"): dims for kind in ("conv", "conv_transpose") for dims in (1, 2, 3)}
_MATRIX_PRODUCTS = _functions("linear matmul __matmul__ __rmatmul__ mm bmm addmm baddbmm einsum")
_LAYERS = {*_CONVOLUTIONS, *_MATRIX_PRODUCTS, F.bilinear, F.multi_head_attention_forward}
"""Functions that feed on activations, whether or not their weights are parameters."""

_STARTING = {*ACTIVATIONS, *_CONVOLUTIONS, *_MATRIX_PRODUCTS}
"""Functions whose results have something to be remembered, whatever goes in."""

_REARRANGING = _functions("transpose permute movedim moveaxis swapaxes swapdims t view reshape unflatten")
"""Functions after which units may be counted by another dimension."""

_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
"""Modules that return activations and call their activation functions where nobody sees it."""


class Observer(Protocol):
    """Who is told of the activations."""

    def wants(self, name: str) -> bool:
        """Whether the activations of this name are of interest."""

    def observe(self, activations: Tensor, channel_dim: int | None) -> Any:
        """What is to be known of them, taken before anyone can change them in place."""

    def report(self, name: str, observed: Any) -> None:
        """They belong to a hidden layer."""

    def forgives(self, error: Exception) -> bool:
        """Whether the network goes on although one of these has failed."""


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


@dataclass
class _Activations:
    """What was observed of one result of an activation function, until it is known to belong to a hidden layer."""

    name: str
    observed: Any
    reported: bool = False


@dataclass
class _Origin:
    """What is known of a tensor: which dimension counts units, and the activations in it that no layer has seen yet."""

    channel_dim: int | None = None
    activations: tuple[_Activations, ...] = ()


class Watch(TorchFunctionMode):
    """While started, reports what the activation functions of a network return.

    Activations belong to a hidden layer if they flow into a further layer: a matrix product, a convolution, or any
    function of a parameter. Those of the output layer do not, nor do those on the way to the loss.

    Activations are called by the path of their module, those of functions by the path of the module that calls it and
    the name of the function; what has the same name in one call of a module is numbered.

    Args:
        root: The network.
        observer: Who is told.
        chosen: Paths of modules whose results are reported too, whatever becomes of them.
    """

    def __init__(self, root: nn.Module, observer: Observer, chosen: Collection[str]) -> None:
        super().__init__()
        self.saw_activations = False
        self.saw_compiled_code = False
        self._observer = observer
        self._chosen = chosen
        self._origins: dict[int, tuple[weakref.ref[Tensor], _Origin]] = {}
        self._calls = [_Call(root, "")]
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
            self._hooks.append(module.register_forward_pre_hook(self._enter_module))
            self._hooks.append(module.register_forward_hook(self._leave_module, always_call=True))
        TorchFunctionMode.__enter__(self)

    def stop(self) -> None:
        """Ends it: nothing is left in the network."""
        TorchFunctionMode.__exit__(self, None, None, None)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._origins.clear()

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.compiler.is_compiling():  # nothing of what follows can be compiled
            self.saw_compiled_code = True
        elif isinstance(result, Tensor | tuple | list) and (self._origins or func in _STARTING) and not _in_backward():
            self._follow(func, [*tensors_in((args, kwargs))], [*tensors_in(result)])
        return result

    def _follow(self, func: Function, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        origins = [(tensor, origin) for tensor in inputs if (origin := self._origin(tensor)) is not None]
        activations = tuple(activation for _, origin in origins for activation in origin.activations)
        if activations and (func in _LAYERS or any(isinstance(tensor, nn.Parameter) for tensor in inputs)):
            for activation in activations:
                self._report(activation)
            activations = ()
        for output in outputs:
            channel_dim = _channel_dim(func, output, origins)
            if activations or channel_dim is not None:
                self._remember(output, _Origin(channel_dim, activations))
        if func in ACTIVATIONS and outputs and not isinstance(inputs[0], nn.Parameter):
            call = self._calls[-1]
            call.calls_activation = True
            if not _is_activation(call.module):
                name = getattr(func, "__name__", "activation").rstrip("_")
                self._observe(call, f"{call.path}.{name}" if call.path else name, outputs[0])

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
            activations = self._look(name, output)
            if activations is not None:
                self._report(activations)
        elif isinstance(module, _RECURRENT):
            self._observe(caller, call.path, output, numbered=False)
            origin = self._origin(output)
            for state in tensors_in(result):  # a head on the last state feeds on the same units
                if origin is not None and state is not output:
                    self._remember(state, _Origin(None, origin.activations))
        elif call.calls_activation and _is_activation(module):
            self._observe(caller, call.path, output)

    def _observe(self, caller: _Call, base: str, output: Tensor, *, numbered: bool = True) -> None:
        """Keeps what is to be known of activations with the tensor, to be reported when a layer takes it."""
        self.saw_activations = True
        name = caller.number(base) if numbered else base
        if caller.of_a_metric or not self._observer.wants(name):
            return
        activations = self._look(name, output)
        if activations is not None:
            origin = self._origin(output) or _Origin()
            self._remember(output, _Origin(origin.channel_dim, (*origin.activations, activations)))

    def _look(self, name: str, output: Tensor) -> _Activations | None:
        if torch._C._functorch.is_functorch_wrapped_tensor(output):  # inside torch.func: one sample, or a tangent
            return None
        origin = self._origin(output)
        channel_dim = origin.channel_dim if origin else None
        with torch.no_grad(), torch._C.DisableTorchFunction():  # what the observer does is no part of the network
            tensor = output.detach()
            if tensor.ndim == 1 and channel_dim == 0:  # one sample without a batch
                tensor, channel_dim = tensor[None], 1
            if tensor.ndim < 2 or not tensor.numel() or not tensor.is_floating_point():
                return None
            try:
                return _Activations(name, self._observer.observe(tensor, channel_dim))
            except Exception as error:
                if not self._observer.forgives(error):
                    raise
                return None

    def _report(self, activations: _Activations) -> None:
        if not activations.reported:
            activations.reported = True
            with torch._C.DisableTorchFunction():
                try:
                    self._observer.report(activations.name, activations.observed)
                except Exception as error:
                    if not self._observer.forgives(error):
                        raise
            activations.observed = None  # the tensor may live on

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


def _channel_dim(func: Function, output: Tensor, origins: list[tuple[Tensor, _Origin]]) -> int | None:
    """The dimension that counts units, where it is known and not the one that the shape suggests."""
    if func in _CONVOLUTIONS:
        unbatched = output.ndim == _CONVOLUTIONS[func] + 1
        return 0 if unbatched else 1 if output.ndim == 3 else None
    if func in _MATRIX_PRODUCTS:
        return output.ndim - 1 if output.ndim not in (2, 3) else None
    if func in _REARRANGING or getattr(func, "__name__", None) == "__get__":  # the latter: x.T and the like
        return None
    for tensor, origin in origins:
        dim = origin.channel_dim
        if dim is not None and output.ndim == tensor.ndim and output.shape[dim] == tensor.shape[dim]:
            return dim
    return None


def _in_backward() -> bool:
    """Whether a backward pass is running: an activation checkpoint then repeats what was seen before."""
    return torch._C._current_graph_task_id() != -1
