"""Run a model with its layers cut apart, and observe which channels of a layer reach which channels of the next one."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plasticity.interventions.units.groups import Forward
from lightning_plasticity.interventions.units.layer_statistics import layer_input, other_dims
from lightning_plasticity.interventions.units.verification import (
    TOLERANCE,
    model_outputs,
    nested_tensors,
    seed_generators,
)
from lightning_plasticity.layers import (
    BATCH_NORMS,
    RECURRENT_LAYERS,
    has_units,
    input_channel_dim,
    is_depthwise,
    is_grouped_transposed,
)


@dataclass(frozen=True)
class Call:
    """One call of a layer in the forward pass: the shapes of its inputs, and its output."""

    input_shapes: list[torch.Size]
    output: Any


class Numbering:
    """Numbers the channels of several layers consecutively.

    Args:
        sizes: Number of channels of each layer, by name.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = dict(sizes)
        self.total = sum(sizes.values())

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """Split one value per channel, ``(total,)``, by layer."""
        return dict(zip(self.sizes, values.split(list(self.sizes.values())), strict=True))

    def join(self, values: Mapping[str, Tensor]) -> Tensor:
        """Concatenate values by layer; layers without values get zeros."""
        parts = [values.get(name, torch.zeros(size, dtype=torch.bool)) for name, size in self.sizes.items()]
        return torch.cat([torch.zeros(0, dtype=torch.bool), *parts])


class CutNetwork:
    """A model in which the output of each layer is a random tensor, whatever its input.

    So a layer reads only what the operations between the layers make of these tensors. Both directions can be asked:
    which outputs give a channel of an input its value (:meth:`sources`, by derivatives), and which channels of inputs
    change with a channel of an output (:meth:`targets`, by another forward pass). Neither depends on which operations
    these are, and neither computes a layer: a pass costs less than one of the model.

    Besides the layers, which have units or could have them, there are *barriers* (recurrent and attention layers, and
    others that read all their channels at once), whose outputs are fixed, and *passages* (norms, PReLU, depthwise
    convolutions), which are run, and whose outputs are observed.

    Args:
        model: The model, with random weights.
        forward: Runs one forward pass.

    Attributes:
        calls: The calls of layers and barriers in the forward pass of the whole network.
        use_counts: Number of operations in the graph of the outputs that read each parameter, by its ``id``.
        readers: Numbering of the input channels of layers; a barrier has one channel.
        producers: Numbering of the output channels of layers.
        passages: Numbering of the output channels of passages.
        output_producers: The layers whose outputs reach those of the model without passing another layer.

    Raises:
        ValueError: If no output has a graph.
    """

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        self.model, self.forward = model, forward
        modules = dict(model.named_modules())
        self.layers = {name: module for name, module in modules.items() if has_units(module)}
        self.barriers = {name: module for name, module in modules.items() if _is_barrier(module)}
        self._passages = {name: module for name, module in modules.items() if _is_passage(module)}
        self.calls: dict[str, list[Call]] = defaultdict(list)
        self.use_counts = self._run_whole()
        generator = torch.Generator().manual_seed(0)
        self._values = {
            name: [tuple(_random_output(call.output, self._dim(name), generator) for _ in range(2)) for call in calls]
            for name, calls in self.calls.items()
            if name in self.layers
        }
        self._run_reference()

    def sources(self, channels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the channels of producers, and those of passages, from which input channels get their values.

        Args:
            channels: The input channels, a boolean mask over :attr:`readers`.

        Returns:
            Boolean masks over :attr:`producers` and :attr:`passages`.
        """
        inputs, weights = [], []
        for name, mask in self.readers.split(channels).items():
            if mask.any():
                for x, noise in zip(self._inputs[name], self._noise[name], strict=True):
                    if x.requires_grad:
                        inputs.append(x)
                        weights.append(noise * self._broadcast(name, mask, x))
        producers, passages = torch.zeros(self.producers.total).bool(), torch.zeros(self.passages.total).bool()
        if not inputs:
            return producers, passages
        found = self._reached(inputs, weights)
        return self.producers.join(found), self.passages.join(found)

    def targets(self, channels: Tensor) -> Tensor:
        """Return the input channels of layers that change with some output channels.

        Args:
            channels: The output channels, a boolean mask over :attr:`producers`.

        Returns:
            A boolean mask over :attr:`readers`.
        """
        perturbed = {name: mask for name, mask in self.producers.split(channels).items() if mask.any()}
        changed = {name: torch.zeros(size, dtype=torch.bool) for name, size in self.readers.sizes.items()}

        def compare(name: str, number: int, inputs: list[Tensor]) -> None:
            if name in changed and not self._sources[name].isdisjoint(perturbed):
                changed[name] |= self._changed(name, number, inputs)

        # With gradients: without, nn.TransformerEncoderLayer does not call its layers.
        with self._cut(compare, lambda name, number: self._perturbed(name, number, perturbed)):
            self._run()
        return self.readers.join(changed)

    def silent(self, channels: Tensor, producers: Collection[str]) -> Tensor:
        """Return whether input channels are the same for all samples where some layers and what follows them are zero.

        Args:
            channels: The input channels, a boolean mask over :attr:`readers`.
            producers: The layers whose outputs are set to zero, as are those of passages that no other layer reaches.

        Returns:
            A boolean mask over :attr:`readers`, false outside of ``channels``.
        """
        silent = {name: mask.clone() for name, mask in self.readers.split(channels).items()}

        def compare(name: str, number: int, inputs: list[Tensor]) -> None:
            if name in silent and name in self.layers and inputs[0].ndim > -self._dim(name):
                x = inputs[0].detach().movedim(self._dim(name), 0)
                close = torch.isclose(x, x[:, :1], rtol=TOLERANCE, atol=TOLERANCE)
                silent[name] &= close.flatten(1).all(1).cpu()

        def output(name: str, number: int) -> Tensor:
            value: Tensor = self._values[name][number][0]
            return torch.zeros_like(value) if name in producers else value.clone()

        handles = [
            module.register_forward_hook(lambda _, args, output: torch.zeros_like(output))
            for name, module in self._passages.items()
            if name in self._tapped and self.producers_of_passage(name) <= set(producers)
        ]
        try:
            with self._cut(compare, output):
                self._run()
        finally:
            for handle in handles:
                handle.remove()
        return self.readers.join(silent)

    def producers_of(self, name: str) -> set[str]:
        """Return the layers whose outputs reach the input of a layer or barrier."""
        return self._sources[name]

    def producers_of_passage(self, name: str) -> set[str]:
        """Return the layers whose outputs reach a passage."""
        return self._connected(self._tapped[name])

    def is_called_again(self, name: str) -> bool:
        """Return whether a passage is called more than once in a forward pass."""
        return len(self._tapped[name]) > 1

    def _run_whole(self) -> Counter[int]:
        """Run the whole network, record the calls, and count the uses of parameters."""

        def record(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                shapes = [x.shape for x in _inputs(name in self.barriers, args, kwargs)]
                self.calls[name].append(Call(shapes, _map_tensors(output, Tensor.detach)))

            return hook

        hooked = {**self.layers, **self.barriers}
        handles = [m.register_forward_hook(record(name), with_kwargs=True) for name, m in hooked.items()]
        try:
            outputs = [tensor for tensor in self._run() if tensor.grad_fn is not None]
        finally:
            for handle in handles:
                handle.remove()
        if not outputs:
            raise ValueError(
                "forward(model) must run the model with gradients, and return its outputs: no tensor with a graph came "
                "out of it"
            )
        return _count_uses(outputs)

    def _run_reference(self) -> None:
        """Run the cut network and store what its layers read, with the graph."""
        self._inputs: dict[str, list[Tensor]] = defaultdict(list)
        self._leaves: dict[str, list[Tensor]] = defaultdict(list)
        self._tapped: dict[str, list[Tensor]] = defaultdict(list)

        def store(name: str, number: int, inputs: list[Tensor]) -> None:
            # A copy: later operations may change the input in place.
            self._inputs[name] += [x.clone() for x in inputs]

        def leaf(name: str, number: int) -> Tensor:
            value: Tensor = self._values[name][number][0].clone().requires_grad_()
            self._leaves[name].append(value)
            return value.clone()

        def tap(name: str) -> Callable[..., Tensor | None]:
            def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
                if not (isinstance(output, Tensor) and output.requires_grad):
                    return None
                self._tapped[name].append(output)
                return output.clone()

            return hook

        handles = [module.register_forward_hook(tap(name)) for name, module in self._passages.items()]
        try:
            with self._cut(store, leaf):
                outputs = [output for output in self._run() if output.requires_grad]
        finally:
            for handle in handles:
                handle.remove()
        seed_generators()
        self._noise = {name: [torch.randn_like(x) for x in inputs] for name, inputs in self._inputs.items()}
        self.readers = Numbering(
            {
                name: 1 if name in self.barriers else inputs[0].shape[input_channel_dim(self.layers[name])]
                for name, inputs in self._inputs.items()
                if any(x.requires_grad for x in inputs)
            }
        )
        self.producers = Numbering({name: x[0].shape[self._dim(name)] for name, x in self._leaves.items()})
        widths = {name: {_size(x, self._dim(name)) for x in outputs} for name, outputs in self._tapped.items()}
        # Nothing in a passage belongs to one unit if the passage follows layers of several widths.
        self._tapped = {name: self._tapped[name] for name, found in widths.items() if len(found) == 1 and all(found)}
        self.passages = Numbering({name: x[0].shape[self._dim(name)] for name, x in self._tapped.items()})
        self._sources = {name: self._connected(self._inputs[name]) for name in self.readers.sizes}
        self.output_producers = self._connected(outputs)

    def _run(self) -> list[Tensor]:
        seed_generators()
        return model_outputs(self.model, self.forward)

    @contextlib.contextmanager
    def _cut(
        self, observe: Callable[[str, int, list[Tensor]], None], output: Callable[[str, int], Tensor]
    ) -> Iterator[None]:
        """Replace what layers and barriers compute.

        Args:
            observe: Called with the name of the layer, the number of the call and the inputs.
            output: Returns the output of a layer in the call of that number.
        """
        made: Counter[str] = Counter()

        def replacement(name: str, module: nn.Module) -> Callable[..., Any]:
            compute = module.forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                inputs, number = _inputs(name in self.barriers, args, kwargs), made[name]
                made[name] += 1
                observe(name, number, inputs)
                calls = self.calls[name]
                if number >= len(calls) or [x.shape for x in inputs] != calls[number].input_shapes:
                    return _map_tensors(compute(*args, **kwargs), Tensor.detach)
                if name in self.layers:
                    return output(name, number)
                return _map_tensors(calls[number].output, Tensor.clone)

            return forward

        modules = {**self.layers, **self.barriers}
        own = {name: module.__dict__["forward"] for name, module in modules.items() if "forward" in module.__dict__}
        try:
            for name, module in modules.items():
                module.forward = replacement(name, module)
            yield
        finally:
            for name, module in modules.items():
                module.__dict__.pop("forward", None)
                if name in own:
                    module.forward = own[name]

    def _perturbed(self, name: str, number: int, perturbed: Mapping[str, Tensor]) -> Tensor:
        value, other = self._values[name][number]
        if name not in perturbed:
            return value.clone()
        mask = self._broadcast(name, perturbed[name], value)
        return torch.where(mask.bool(), other, value)

    def _changed(self, name: str, number: int, inputs: list[Tensor]) -> Tensor:
        """Return the channels of the input of a call that differ from those of the reference run."""
        per_call = len(inputs)
        before = self._inputs[name][number * per_call : (number + 1) * per_call]
        if [x.shape for x in before] != [x.shape for x in inputs]:
            return torch.ones(self.readers.sizes[name], dtype=torch.bool)
        if name in self.barriers:
            return torch.tensor([any(bool(_differs(x, y).any()) for x, y in zip(before, inputs, strict=True))])
        differs = _differs(before[0].detach(), inputs[0])
        return differs.any(other_dims(differs, self._dim(name))).cpu() if differs.ndim > 1 else differs.cpu()

    def _dim(self, name: str) -> int:
        """Return the dimension of the output of a layer or passage that counts channels, from either end."""
        if name in self.layers:
            return input_channel_dim(self.layers[name])
        return passage_channel_dim(self._passages[name])

    def _broadcast(self, name: str, values: Tensor, x: Tensor) -> Tensor:
        """Reshape one value per channel so that it broadcasts to a tensor of that layer."""
        shape = [1] * x.ndim
        if name not in self.barriers:
            shape[self._dim(name)] = -1
        return values.to(x.device).view(shape)

    def _reached(self, tensors: list[Tensor], weights: list[Tensor]) -> dict[str, Tensor]:
        """Return the channels with a derivative that is not zero, by layer or passage."""
        places = [(name, x) for part in (self._leaves, self._tapped) for name, xs in part.items() for x in xs]
        gradients = self._gradients(tensors, [x for _, x in places], weights)
        found: dict[str, Tensor] = {}
        for (name, x), gradient in zip(places, gradients, strict=True):
            if gradient is not None:
                nonzero = gradient != 0
                dims = other_dims(x, self._dim(name))
                mask = (nonzero.any(dims) if dims else nonzero).cpu()
                found[name] = found[name] | mask if name in found else mask
        return found

    def _connected(self, tensors: list[Tensor]) -> set[str]:
        """Return the layers whose outputs are in the graph of some tensors."""
        floating = [x for x in tensors if x.requires_grad]
        if not floating:
            return set()
        places = [(name, x) for name, xs in self._leaves.items() for x in xs]
        gradients = self._gradients(floating, [x for _, x in places], list(map(torch.ones_like, floating)))
        return {name for (name, _), gradient in zip(places, gradients, strict=True) if gradient is not None}

    def _gradients(
        self, outputs: list[Tensor], inputs: list[Tensor], weights: list[Tensor]
    ) -> tuple[Tensor | None, ...]:
        """Differentiate in the graph of the reference run; ``None`` where there is no path."""
        if not inputs:
            return ()
        # An activation checkpoint calls its layers again.
        with self._cut(lambda *_: None, lambda name, number: self._values[name][number][0].clone().requires_grad_()):
            return torch.autograd.grad(outputs, inputs, weights, retain_graph=True, allow_unused=True)


def passage_channel_dim(passage: nn.Module) -> int:
    """Return the dimension of the output of a norm, PReLU or depthwise convolution that counts channels."""
    if is_depthwise(passage):
        return input_channel_dim(passage)
    return 1 if isinstance(passage, (BATCH_NORMS, nn.GroupNorm, nn.PReLU)) else -1


def _is_barrier(module: nn.Module) -> bool:
    return isinstance(module, (*RECURRENT_LAYERS, nn.MultiheadAttention)) or is_grouped_transposed(module)


def _is_passage(module: nn.Module) -> bool:
    return is_depthwise(module) or isinstance(module, nn.PReLU) or is_norm(module)


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a norm layer, by its name where it is of another package."""
    return "Norm" in type(module).__name__ and next(module.children(), None) is None


def _inputs(is_barrier: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return nested_tensors([args, kwargs]) if is_barrier else [layer_input(args, kwargs)]


def _size(x: Tensor, dim: int) -> int:
    """Return the size of a tensor in a dimension, 0 if it has no such dimension."""
    return x.shape[dim] if -x.ndim <= dim < x.ndim else 0


def _random_output(output: Tensor, channel_dim: int, generator: torch.Generator) -> Tensor:
    """Draw an output in which no unit is dead: positive in the first sample, negative in the second, else normal."""
    values = torch.randn(output.shape, generator=generator)
    # A single sample may come without a batch dimension.
    samples = values[None] if values.ndim == -channel_dim else values
    for sample, sign in zip(samples, (1, -1), strict=False):
        sample.copy_(sign * (torch.rand(sample.shape, generator=generator) + 0.5))
    return values.to(output)


def _differs(x: Tensor, y: Tensor) -> Tensor:
    differs = x != y
    # Two NaNs do not differ.
    return differs & ~(x.isnan() & y.isnan()) if bool(differs.any()) else differs


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to the tensors in nested tuples and packed sequences."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, nn.utils.rnn.PackedSequence):
        return nn.utils.rnn.PackedSequence(function(value.data), *value[1:])
    return tuple(_map_tensors(item, function) for item in value) if isinstance(value, tuple) else value


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
