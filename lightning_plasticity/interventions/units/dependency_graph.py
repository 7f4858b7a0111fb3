"""Finds the sites of a model in the dependency graph of torch-pruning, and puts each to the test on random weights."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.ops import OPTYPE

from lightning_plasticity.interventions.units.groups import Forward, UnitGroup, Units, unit_mask
from lightning_plasticity.isolation.state import probe_mode
from lightning_plasticity.layers import (
    BATCH_NORMS,
    CONVOLUTIONS,
    EMBEDDINGS,
    NORM_LAYERS,
    RECURRENT_LAYERS,
    TRANSPOSED_CONVOLUTIONS,
    input_channel_dim,
)

_LAYERS = (OPTYPE.LINEAR, OPTYPE.CONV)
_ONE_ENTRY_A_UNIT = (OPTYPE.BN, OPTYPE.IN, OPTYPE.DEPTHWISE_CONV, OPTYPE.PRELU)
_PASSES_UNITS_ON = (
    OPTYPE.ELEMENTWISE,
    OPTYPE.RESHAPE,
    OPTYPE.CONCAT,
    OPTYPE.SPLIT,
    OPTYPE.SLICE,
    OPTYPE.UNBIND,
    OPTYPE.EXPAND,
)
_SAME = 1e-4
"""Relative difference up to which two samples say the same; what is sought is of order one."""


class _NotResettable(Exception):  # noqa: N818 (an answer, not an error)
    """Why a layer is no site."""


def trace_units(model: nn.Module, forward: Forward) -> Units:
    """See :func:`~lightning_plasticity.interventions.units.groups.describe_units`."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    units = Units()
    with _randomized_weights(model):
        trace = _Trace.of(model, forward, frozen)
        attention = {id(part) for m in model.modules() if isinstance(m, nn.MultiheadAttention) for part in m.modules()}
        for name, module in model.named_modules():
            matrices = any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))
            if isinstance(module, NORM_LAYERS) or not (matrices or isinstance(module, nn.Linear | CONVOLUTIONS)):
                continue  # belongs to the units before it, or has none
            try:
                if id(module) in attention:
                    raise _NotResettable("attention: its units are shared by the heads' queries, keys and values")
                units.groups[name] = trace.site(name, module)
            except _NotResettable as reason:
                units.excluded[name] = str(reason)
    return units


@contextlib.contextmanager
def _randomized_weights(model: nn.Module) -> Iterator[None]:
    """Lends the model with random weights, all trainable: trained ones may hide what depends on what.

    Nothing is dead in it: biases and gains are positive, running statistics those of a new network.
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


def _seed() -> None:
    torch.default_generator.manual_seed(0)  # not torch.manual_seed: that would wake the GPU up
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)


def _random_like(value: Tensor) -> Tensor:
    fan_in = value[0].numel() if value.ndim > 1 else 1
    drawn = torch.randn(value.shape) / fan_in**0.5 if value.ndim > 1 else torch.rand(value.shape) + 0.5
    return drawn.to(value)


class _Opaque(torch.autograd.Function):
    """The output of a layer, in a graph that knows no more than what it was made of."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *_: Tensor) -> Tensor:
        return output.view_as(output)


@contextlib.contextmanager
def _opaque_recurrent_layers(model: nn.Module) -> Iterator[None]:
    """Hides what recurrent layers do inside, such as to concatenate, which torch-pruning may not be able to follow."""

    def hide(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        sources = [*_tensors([args, kwargs]), *layer.parameters()]

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
    """What one forward pass showed.

    Args:
        model: The model.
        forward: The forward pass.
        graph: torch-pruning's.
        tensors: Parameters and buffers of the model by name; those with several names under each.
        uses: How often each parameter appears in the graph of the outputs, by ``id``.
        frozen: Names of parameters that are not trained.
    """

    model: nn.Module
    forward: Forward
    graph: Any
    tensors: Mapping[str, Tensor]
    uses: Mapping[int, int]
    frozen: set[str]

    @classmethod
    def of(cls, model: nn.Module, forward: Forward, frozen: set[str]) -> _Trace:
        graph = tp.DependencyGraph()
        uses: Counter[int] = Counter()

        def outputs(model: nn.Module, _: object) -> list[Tensor]:
            found = [tensor for tensor in _outputs(model, forward) if tensor.grad_fn is not None]
            if not found:
                raise ValueError(
                    "forward(model) must run the model with gradients, and return its outputs: no tensor with a "
                    "graph came out of it"
                )
            uses.update(_uses(found))
            return found

        try:
            with _opaque_recurrent_layers(model):
                graph.build_dependency(model, None, forward_fn=outputs, verbose=False)
        except Exception as error:  # of whatever kind: torch-pruning does not say which it raises
            if not uses:
                raise  # in the forward pass
            raise ValueError(
                f"torch-pruning cannot follow {type(model).__name__}: {type(error).__name__}: {error}"
            ) from error
        parameters = dict(model.named_parameters(remove_duplicate=False))
        return cls(model, forward, graph, {**parameters, **dict(model.named_buffers())}, uses, frozen)

    def site(self, name: str, module: nn.Module) -> UnitGroup:
        """The site of a layer.

        Raises:
            _NotResettable: If it is none.
        """
        site = self._candidate(name, module)
        for tensor_name in {**site.incoming, **site.outgoing}:
            if isinstance(self.tensors[tensor_name], nn.Parameter):
                self._check_parameter(tensor_name)
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(site.num_units, generator=generator)
        for some in (order[::2], order[1::2]):
            if len(some):
                self._test(site, some)
        return site

    def _candidate(self, name: str, module: nn.Module) -> UnitGroup:
        """What torch-pruning's graph says."""
        if isinstance(module, RECURRENT_LAYERS):
            raise _NotResettable("recurrent: its units feed themselves")
        if isinstance(module, EMBEDDINGS):
            raise _NotResettable("embedding: its rows are tokens, not units")
        if not isinstance(module, nn.Linear | CONVOLUTIONS):
            raise _NotResettable(f"{type(module).__name__}: only linear and convolution layers have units")
        if not isinstance(module._parameters.get("weight"), nn.Parameter):
            raise _NotResettable("its weight is computed from other parameters")
        self._check_parameter(f"{name}.weight" if name else "weight")
        if isinstance(module, TRANSPOSED_CONVOLUTIONS) and module.groups != 1:
            raise _NotResettable("transposed convolution in groups")
        if tp.ops.module2type(module) == OPTYPE.DEPTHWISE_CONV:
            raise _NotResettable("depthwise convolution: belongs to the units before it")
        if module not in self.graph.module2node:
            raise _NotResettable("not called as a layer in forward(model)")
        if (reader := self._recurrent_reader(module)) is not None:
            raise _NotResettable(f"recurrent layer {self._name(reader)!r} reads it")
        num_units = self.graph.get_out_channels(module)
        prune = self.graph.get_pruner_of_module(module).prune_out_channels
        try:
            group = self.graph.get_pruning_group(module, prune, list(range(num_units)))
        except Exception as error:  # of whatever kind: torch-pruning does not say which it raises
            raise _NotResettable(f"torch-pruning cannot follow its output ({type(error).__name__})") from error
        return self._site_of_group(name, module, num_units, group)

    def _site_of_group(self, name: str, module: nn.Module, num_units: int, group: Any) -> UnitGroup:
        incoming = self._rows(module, torch.arange(num_units))
        outgoing: dict[str, Tensor] = {}
        consumers: dict[str, Tensor] = {}
        targets = [(item, item.dep.target.module, item.dep.target.type) for item in group]
        joined = [
            repr(self._name(target))
            for item, target, kind in targets
            if target is not module and kind in _LAYERS and not self._is_input(item)
        ]
        if joined:
            raise _NotResettable(f"residual stream or gate: joined with the units of {', '.join(joined)}")
        for item, target, kind in targets:
            if target is module or kind in _PASSES_UNITS_ON:
                continue
            if kind == OPTYPE.OUTPUT:
                raise _NotResettable("an output of the model")
            if kind == OPTYPE.PARAMETER:
                raise _NotResettable(self._reason_of_parameter(target))
            name_of_target = self._name(target)
            if kind in (*_LAYERS, *_ONE_ENTRY_A_UNIT) and "weight" not in target._parameters:
                raise _NotResettable(
                    f"the weight of {name_of_target!r}, which belongs to its units, is computed from other parameters"
                )
            if kind not in _LAYERS and kind not in _ONE_ENTRY_A_UNIT:
                raise _NotResettable(f"{type(target).__name__} {name_of_target!r} mixes its units")
            owner = torch.full((self.graph.get_in_channels(target) or 0,), -1)
            if not len(owner):
                continue  # a PReLU with one slope for all
            if max(item.idxs, default=0) >= len(owner):  # as of the cells of an LSTM with projections
                raise _NotResettable(f"torch-pruning cannot follow its output to {name_of_target!r}")
            owner[item.idxs] = torch.tensor(item.root_idxs)
            if kind in _LAYERS:
                consumers[name_of_target] = owner
                outgoing[f"{name_of_target}.weight"] = _columns(target, owner)
            else:
                incoming |= self._rows(target, owner)
        if not consumers:
            raise _NotResettable("logits: no layer reads it")
        return UnitGroup(name, num_units, incoming, outgoing, consumers)

    def _is_input(self, item: Any) -> bool:
        return bool(item.dep.handler == self.graph.get_pruner_of_module(item.dep.target.module).prune_in_channels)

    def _recurrent_reader(self, module: nn.Module) -> nn.Module | None:
        """The recurrent layer that reads a layer's output, if one does: torch-pruning follows none but LSTMs."""
        stack, seen = list(self.graph.module2node[module].outputs), set()
        while stack:
            node = stack.pop()
            if node in seen or node.type in _LAYERS:
                continue
            seen.add(node)
            stack += node.outputs
            for source in [node, *node.inputs]:
                owner = self._owner(source.module) if source.type == OPTYPE.PARAMETER else source.module
                if isinstance(owner, RECURRENT_LAYERS):
                    return owner
        return None

    def _owner(self, parameter: Tensor) -> nn.Module:
        name = next(name for name, other in self.tensors.items() if other is parameter)
        return self.model.get_submodule(name.rpartition(".")[0])

    def _rows(self, module: nn.Module, owner: Tensor) -> dict[str, Tensor]:
        """Owners of the tensors of a layer that have an entry, row or kernel for each of its outputs."""
        name = self._name(module)
        owners = {}
        for key, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is not None and tensor.ndim > 0:
                dim = 1 if isinstance(module, TRANSPOSED_CONVOLUTIONS) and key == "weight" else 0
                owners[f"{name}.{key}" if name else key] = owner.view(
                    [-1 if d == dim else 1 for d in range(tensor.ndim)]
                )
        return owners

    def _name(self, module: nn.Module) -> str:
        found: str = next(name for name, other in self.model.named_modules() if other is module)
        return found

    def _reason_of_parameter(self, parameter: Tensor) -> str:
        owner = self._owner(parameter)
        name = next(name for name, other in self.tensors.items() if other is parameter)
        if isinstance(owner, NORM_LAYERS):
            return f"{type(owner).__name__} {self._name(owner)!r} mixes its units"
        return f"{name!r}, a parameter of {type(owner).__name__}, acts on its units in a way that is not known"

    def _check_parameter(self, name: str) -> None:
        uses = self.uses[id(self.tensors[name])]
        if name in self.frozen:
            raise _NotResettable(f"{name!r} is frozen")
        if uses == 0:
            raise _NotResettable(f"what forward(model) returns has no gradient by {name!r}")
        if uses > 1:
            raise _NotResettable(f"shared or tied: {name!r} is used {uses} times")

    def _test(self, site: UnitGroup, units: Tensor) -> None:
        """Whether nothing but the consumers' columns of some units depends on their incoming weights, and vice versa.

        Raises:
            _NotResettable: If it is not so.
        """
        drawn = {name: _random_like(self.tensors[name]) for name in site.incoming}
        own_names = [name for name in site.incoming if name.rpartition(".")[0] == site.layer]
        nothing = {name: torch.zeros_like(self.tensors[name]) for name in own_names}
        silent = {name: torch.zeros_like(self.tensors[name]) for name in site.outgoing}
        with self._with(site.outgoing, units, silent):
            outputs, inputs = self._observe(site)
            with self._with(site.incoming, units, drawn):
                new_outputs, new_inputs = self._observe(site)
        with self._with(site.incoming, units, nothing):
            _, mute = self._observe(site)
        if not all(bool(torch.isfinite(output).all()) for output in outputs if output.is_floating_point()):
            raise _NotResettable("could not be tested: forward(model) is not finite with random weights")
        for name, owner in site.consumers.items():
            dim = input_channel_dim(self.model.get_submodule(name))
            theirs = torch.isin(owner, units).to(inputs[name].device)
            others = (~theirs).nonzero().flatten()
            if not torch.equal(*(x.index_select(dim, others) for x in (inputs[name], new_inputs[name]))):
                raise _NotResettable(f"its units are mixed, or reordered, before {name!r} reads them")
            own = mute[name].index_select(dim, theirs.nonzero().flatten())
            if own.ndim > -dim and not torch.allclose(own, own[:1].expand_as(own), rtol=_SAME, atol=_SAME):
                raise _NotResettable(f"what {name!r} reads is more than its units: a residual stream, a gate or noise")
        same = len(outputs) == len(new_outputs) and all(map(torch.equal, outputs, new_outputs))
        if not same:
            raise _NotResettable(
                f"its units reach the output by other ways than {', '.join(map(repr, site.consumers))}"
            )

    @contextlib.contextmanager
    def _with(self, owners: Mapping[str, Tensor], units: Tensor, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Gives the entries of some units other values."""
        before = {name: self.tensors[name].data for name in values}
        for name, value in values.items():
            mask = unit_mask(owners[name], units, value.shape).to(value.device)
            self.tensors[name].data = torch.where(mask, value, before[name])
        try:
            yield
        finally:
            for name, value in before.items():
                self.tensors[name].data = value

    def _observe(self, site: UnitGroup) -> tuple[list[Tensor], dict[str, Tensor]]:
        """What comes out, and what the consumers read."""
        _seed()
        with torch.no_grad(), recorded_inputs(self.model, site.consumers) as inputs:
            outputs = _outputs(self.model, self.forward)
        return outputs, inputs


def _columns(consumer: nn.Module, owner: Tensor) -> Tensor:
    """Owners of a consumer's weight, from those of its input channels."""
    weight: Any = consumer.weight
    if isinstance(consumer, TRANSPOSED_CONVOLUTIONS):
        return owner.view(-1, *[1] * (weight.ndim - 1))
    groups: Any = getattr(consumer, "groups", 1)
    rows = owner.view(groups, -1).repeat_interleave(weight.shape[0] // groups, dim=0) if groups > 1 else owner[None]
    return rows.reshape(*rows.shape, *[1] * (weight.ndim - 2))


@contextlib.contextmanager
def recorded_inputs(model: nn.Module, layers: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """The input of each of these layers in its last call, by name; filled while layers are called."""
    inputs: dict[str, Tensor] = {}

    def record(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs[name] = args[0] if args else kwargs["input"]

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(record(name), with_kwargs=True) for name in layers]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def _outputs(model: nn.Module, forward: Forward) -> list[Tensor]:
    """The tensors that ``forward`` returns, and those that the model returned in it."""
    found: list[Tensor] = []
    handle = model.register_forward_hook(lambda _, args, output: found.extend(_tensors(output)))
    try:
        found.extend(_tensors(forward(model)))
    finally:
        handle.remove()
    return list({id(tensor): tensor for tensor in found}.values())


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, nn.utils.rnn.PackedSequence):
        return [value.data]
    if isinstance(value, Mapping):
        value = list(value.values())
    elif dataclasses.is_dataclass(value):
        value = list(vars(value).values())
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, list | tuple) else []


def _uses(outputs: Iterable[Tensor]) -> Counter[int]:
    """How many operations of a graph read each of its leaves, by ``id`` of the leaf."""
    uses: Counter[int] = Counter()
    stack: list[Any] = [output.grad_fn for output in outputs]
    seen = set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            if following is not None:
                if hasattr(following, "variable"):
                    uses[id(following.variable)] += 1
                stack.append(following)
    return uses
