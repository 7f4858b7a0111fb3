"""Find the resettable units of a model by trial, and explain why others cannot be reset."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_plasticity.interventions.units.cut_network import CutNetwork, is_norm
from lightning_plasticity.interventions.units.groups import Forward, NotResettableError, UnitGroup, Units
from lightning_plasticity.interventions.units.partition import partition_channels
from lightning_plasticity.interventions.units.verification import Candidate, randomized_weights, verify_groups
from lightning_plasticity.layers import (
    BATCH_NORMS,
    CONVOLUTIONS,
    EMBEDDINGS,
    NORM_LAYERS,
    RECURRENT_LAYERS,
    broadcast_inputs,
    has_units,
    is_depthwise,
    is_grouped_transposed,
    weight_output_dim,
)
from lightning_plasticity.messages import listed


def describe_units(model: nn.Module, forward: Forward) -> Units:
    """Find the units of a model that can be reset one by one, with all their weights, and explain why others cannot.

    A unit is the smallest set of outputs of layers that can be reset alone, with all weights that compute them, and the
    columns of *all* layers that read them:

    * an output of a linear layer or a channel of a convolution: a row of the layer's weight and its bias, its entries
      in norm layers, PReLU and depthwise convolutions, and a column of each layer that reads it (behind a flatten,
      several);
    * where layers are multiplied (SwiGLU, squeeze-excite), the rows of all of them, under the name of the one that
      turns the unit off;
    * a head of attention: its rows of queries, keys and values, and its columns of the layer after it;
    * before a pixel shuffle, the channels that become one; before a GroupNorm, the channels of a group.

    The layers are cut apart: each gets a random output, and derivatives and further forward passes show which of its
    channels reach which inputs of other layers, whatever the operations in between. Forward passes of the whole network
    with random weights verify the result. A layer has resettable units only if

    * with the outgoing columns of some units at zero, no change of their incoming weights changes any bit of what
      ``forward`` returns (no other path leads from the units to the outputs), and
    * such a change moves the consumers' inputs in the columns of these units and nowhere else, and
    * with their incoming weights at zero, these columns are the same for every sample (they carry nothing else).

    Therefore a reset of dead units, whose columns are zero on all data, does not change any bit of the network's
    output. This excludes the logits; residual streams; layers read by a LayerNorm or RMSNorm, since their statistics
    over units would change; recurrent layers and ``nn.MultiheadAttention``; tied, computed and frozen weights; layers
    that share a norm, or whose samples are chosen by other layers, as experts.

    The work is bounded: the number of passes is in proportion to the logarithm of the number of units, and a layer
    whose units could not be told apart by then is left out.

    Args:
        model: Any module. Its parameters, gradients, buffers, modes and random numbers are restored. (What its
            ``forward`` itself writes to plain attributes is not undone.)
        forward: ``forward(model)`` runs one forward pass, in evaluation mode and with gradients. The tensors that it
            returns, and those that the model returns in it, must stay the same; return the outputs rather than a loss.
            Use more than one sample: residual streams and gates show in the differences between samples.

    Returns:
        The units; ``print`` shows them as a table.

    Raises:
        ValueError: If ``forward`` returns no tensor with a graph, the model has lazy layers that were never called, or
            it is on the meta device.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
        >>> print(describe_units(model, forward=lambda model: model(torch.randn(2, 1, 6, 6))))
        layer  units  drawn anew                                                                       set to zero
        0          4  0.weight, 0.bias, 1.weight, 1.bias, 1.running_mean, 1.running_var                4.weight
        4          –  logits: no layer reads it
    """
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    units = Units()
    with randomized_weights(model):
        discovery = _Discovery(model, forward, frozen)
        for name, module in model.named_modules():
            if not _computes_units(module):
                continue
            try:
                group = discovery.group_of(name, module)
                if group.layer != name:
                    raise NotResettableError(f"part of the units of {group.layer!r}, reset with them")
                units.groups[name] = group
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


class _JoinedError(NotResettableError):
    """Several layers compute the units, and none of them turns them off."""


@dataclass(frozen=True)
class _Bundle:
    """Layers that compute units together.

    Args:
        producers: The layers, by name, with the unit of each of their outputs.
        unit_numbers: The units in the numbering of the partition.
    """

    producers: dict[str, Tensor]
    unit_numbers: Tensor


class _Discovery:
    """The units of a model, by trial on random weights.

    Args:
        model: The model, with random weights.
        forward: Runs one forward pass.
        frozen: Names of parameters that are not trained.
    """

    def __init__(self, model: nn.Module, forward: Forward, frozen: set[str]) -> None:
        self.model, self.frozen = model, frozen
        self.network = CutNetwork(model, forward)
        self.partition = partition_channels(self.network)
        self.attention_parts = {
            id(part) for m in model.modules() if isinstance(m, nn.MultiheadAttention) for part in m.modules()
        }
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.tensors: dict[str, Tensor] = {**parameters, **dict(model.named_buffers())}
        bundles = {tuple(bundle.producers): bundle for bundle in map(self._bundle, self.partition.producers) if bundle}
        self._results: dict[tuple[str, ...], UnitGroup | NotResettableError] = {}
        candidates: dict[tuple[str, ...], Candidate] = {}
        for layers, bundle in bundles.items():
            try:
                candidates[layers] = self._candidate(bundle)
            except NotResettableError as reason:
                self._results[layers] = reason
        reasons = verify_groups(model, forward, self.tensors, list(candidates.values()))
        for layers, candidate in candidates.items():
            layer = candidate.group.layer
            self._results[layers] = NotResettableError(reasons[layer]) if layer in reasons else candidate.group

    def group_of(self, name: str, module: nn.Module) -> UnitGroup:
        """Return the verified units that a layer computes, or helps to compute.

        Raises:
            NotResettableError: If they cannot be reset one by one.
        """
        self._check_layer(name, module)
        bundle = self._bundle(name)
        if bundle is None:
            raise NotResettableError("logits: no layer reads it")
        layers = tuple(bundle.producers)
        result = self._results[layers]
        if isinstance(result, _JoinedError):
            others = listed(layer for layer in layers if layer != name)
            raise NotResettableError(f"residual stream or gate: joined with the units of {others}")
        if isinstance(result, NotResettableError):
            raise result
        return result

    def _check_layer(self, name: str, module: nn.Module) -> None:
        """Check the kind of a layer, and how the forward pass uses it."""
        if id(module) in self.attention_parts:
            raise NotResettableError(
                "attention: nn.MultiheadAttention computes its heads in one function, where they are not seen"
            )
        if isinstance(module, RECURRENT_LAYERS):
            raise NotResettableError("recurrent: its units feed themselves")
        if isinstance(module, EMBEDDINGS):
            raise NotResettableError("embedding: its rows are tokens, not units")
        if is_depthwise(module):
            raise NotResettableError("depthwise convolution: belongs to the units before it")
        if is_grouped_transposed(module):
            raise NotResettableError("transposed convolution in groups")
        if not has_units(module):
            raise NotResettableError(f"{type(module).__name__}: only linear and convolution layers have units")
        weight = module._parameters.get("weight")
        if not isinstance(weight, nn.Parameter):
            raise NotResettableError("its weight is computed from other parameters")
        if not weight.numel():
            raise NotResettableError("its weight has no entries")
        if name not in self.network.calls:
            raise NotResettableError("not called as a layer in forward(model)")
        if name not in self.network.producers.sizes:
            raise NotResettableError("whether it is called, or on which samples, depends on what other layers return")
        self._check_parameter(f"{name}.weight" if name else "weight")

    def _check_parameter(self, name: str) -> None:
        """Check that a parameter is trained, and used by its layer alone."""
        uses, layer = self.network.use_counts[id(self.tensors[name])], name.rpartition(".")[0]
        if name in self.frozen:
            raise NotResettableError(f"{name!r} is frozen")
        if uses == 0:
            raise NotResettableError(f"what forward(model) returns has no gradient by {name!r}")
        if uses > max(1, len(self.network.calls.get(layer, ()))):
            raise NotResettableError(f"shared or tied: {name!r} is used {uses} times")

    def _check_passages(self, bundle: _Bundle) -> None:
        """Check that no norm, PReLU or depthwise convolution has entries for these units and for others at once."""
        for name, units in self.partition.passages.items():
            if not self.network.is_called_again(name) or not self._passage_entries(name, units):
                continue
            producers = self.network.producers_of_passage(name)
            if not producers.isdisjoint(bundle.producers) and (others := producers - bundle.producers.keys()):
                raise NotResettableError(f"shared or tied: {name!r} also follows {listed(sorted(others))}")

    def _bundle(self, name: str) -> _Bundle | None:
        """Return the layers that have units in common with a layer, and all their units; ``None`` if it has none."""
        producers = self.partition.producers
        layers, units = [name], torch.zeros(0, dtype=torch.long)
        while True:
            new_units = torch.cat([producers[layer] for layer in layers]).unique()
            new_units = new_units[new_units >= 0]
            if len(new_units) == len(units):
                break
            units = new_units
            layers = [other for other, channels in producers.items() if bool(torch.isin(channels, units).any())]
        if not len(units):
            return None
        return _Bundle({layer: producers[layer] for layer in layers}, units)

    def _candidate(self, bundle: _Bundle) -> Candidate:
        """Return the units of layers that compute them together, to be verified.

        Raises:
            NotResettableError: If they cannot be reset one by one.
        """
        network, several = self.network, len(bundle.producers) > 1
        inputs = self.partition.readers
        readers = [name for name, units in inputs.items() if bool(torch.isin(units, bundle.unit_numbers).any())]
        # A layer with all units may turn them off; of a residual stream, each layer computes a part.
        count = len(bundle.unit_numbers)
        whole = [layer for layer, units in bundle.producers.items() if len(units[units >= 0].unique()) == count]
        is_mixed = count == 1 and max(map(len, bundle.producers.values())) > 1
        reaches_outputs = not network.output_producers.isdisjoint(bundle.producers)
        if several and (is_mixed or reaches_outputs or not whole):
            raise _JoinedError
        if reaches_outputs:
            raise NotResettableError("an output of the model")
        for reader in readers:
            if reader in network.barriers:
                raise NotResettableError(f"{_kind_of_barrier(network.barriers[reader])} {reader!r} reads it")
        if not self.partition.unresolved.isdisjoint(bundle.unit_numbers.tolist()):
            raise NotResettableError("too many units: they could not be told apart in the number of passes allowed")
        if is_mixed:
            raise NotResettableError(self._mixing(bundle, readers))
        for layer in bundle.producers:
            self._check_layer(layer, network.layers[layer])
        self._check_passages(bundle)
        is_read = torch.cat([torch.isin(units, bundle.unit_numbers) for units in inputs.values()])
        switches = [layer for layer in whole if not several or bool(network.silent(is_read, {layer})[is_read].all())]
        if not switches:
            raise _JoinedError
        # The units have the name of the layer that turns them off, as in a product and not in a sum.
        group = self._group(bundle, switches[0], readers)
        for name in {**group.incoming, **group.outgoing}:
            if isinstance(self.tensors[name], nn.Parameter):
                self._check_parameter(name)
        return Candidate(group, {name for name in group.incoming if self._producers_of(name) == {switches[0]}})

    def _producers_of(self, tensor_name: str) -> set[str]:
        """Return the layers whose outputs a tensor acts on: its own layer, or those before a passage."""
        module = tensor_name.rpartition(".")[0]
        return {module} if module in self.network.layers else self.network.producers_of_passage(module)

    def _group(self, bundle: _Bundle, layer: str, readers: Iterable[str]) -> UnitGroup:
        """Return units under the name of a layer, numbered in the order of its outputs."""
        in_order = bundle.producers[layer][bundle.producers[layer] >= 0]
        number_of = torch.full((int(bundle.unit_numbers.max()) + 1,), -1)
        for unit in in_order.tolist():
            if number_of[unit] < 0:
                number_of[unit] = int(number_of.max()) + 1

        def renumbered(units: Tensor) -> Tensor:
            known = torch.isin(units, bundle.unit_numbers)
            return torch.where(known, number_of[units.clamp(0, len(number_of) - 1)], -1)

        incoming: dict[str, Tensor] = {}
        for producer in (layer, *(other for other in bundle.producers if other != layer)):
            incoming |= self._output_entries(producer, renumbered(bundle.producers[producer]))
        for passage, units in self.partition.passages.items():
            unit_index = renumbered(units)
            if bool((unit_index >= 0).any()):
                incoming |= self._passage_entries(passage, unit_index)
        outgoing, consumers = {}, {}
        for reader in readers:
            consumers[reader] = renumbered(self.partition.readers[reader])
            module = self.network.layers[reader]
            if not isinstance(module._parameters.get("weight"), nn.Parameter):
                raise NotResettableError(
                    f"the weight of {reader!r}, which belongs to its units, is computed from other parameters"
                )
            outgoing[f"{reader}.weight" if reader else "weight"] = broadcast_inputs(module, consumers[reader])
        return UnitGroup(layer, len(bundle.unit_numbers), incoming, outgoing, consumers)

    def _passage_entries(self, name: str, unit_index: Tensor) -> dict[str, Tensor]:
        """Return the unit index of each tensor of a norm, PReLU or depthwise convolution after the units."""
        module = self.model.get_submodule(name)
        if not isinstance(module, (BATCH_NORMS, nn.GroupNorm, nn.PReLU)) and not is_depthwise(module):
            # Other norms have one entry for many units.
            return {}
        if is_depthwise(module) and "weight" not in module._parameters:
            raise NotResettableError(
                f"the weight of {name!r}, which belongs to its units, is computed from other parameters"
            )
        return self._output_entries(name, unit_index)

    def _output_entries(self, name: str, unit_index: Tensor) -> dict[str, Tensor]:
        """Return the unit index of each tensor of a layer, from the unit index of its output channels."""
        module = self.model.get_submodule(name)
        entries = {}
        for key, tensor in {**module._parameters, **module._buffers}.items():
            dim = weight_output_dim(module) if key == "weight" else 0
            # A PReLU may have one slope for all units.
            if tensor is not None and tensor.ndim > dim and tensor.shape[dim] == len(unit_index):
                shape = [1] * tensor.ndim
                shape[dim] = -1
                entries[f"{name}.{key}" if name else key] = unit_index.view(shape)
        return entries

    def _mixing(self, bundle: _Bundle, readers: list[str]) -> str:
        """Return the reason why the outputs of a layer are one unit."""
        for name, units in self.partition.passages.items():
            module = self.model.get_submodule(name)
            if is_norm(module) and bool(torch.isin(units, bundle.unit_numbers).any()):
                return f"{type(module).__name__} {name!r} mixes its units"
        return f"its units are mixed before {listed(readers)} reads them"


def _kind_of_barrier(module: nn.Module) -> str:
    return "recurrent layer" if isinstance(module, RECURRENT_LAYERS) else type(module).__name__
