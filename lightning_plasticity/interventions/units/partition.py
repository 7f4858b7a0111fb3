"""Partition the channels of a model's layers into units: the smallest sets of channels that nothing connects."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_plasticity.interventions.units.cut_network import CutNetwork

_ROUNDS = 8
"""Bound on the work, in rounds of at most a dozen questions. Models that are known to us take one or two."""

_QUESTIONS = 8
"""Random sets of channels in each round but the first."""

_PASSES = 4
"""Passes back and forth that find all channels of a unit. Two do for attention heads; more are not known to occur."""

NONE = -1
"""Instead of a unit: the channel belongs to none."""


@dataclass(frozen=True)
class Partition:
    """The units of a cut network, by number.

    Args:
        readers: The unit of each input channel of the layers.
        producers: The unit of each output channel of the layers, or ``NONE``.
        passages: The same for the passages.
        unresolved: The units that may consist of several, since the bound on the work was reached.
    """

    readers: dict[str, Tensor]
    producers: dict[str, Tensor]
    passages: dict[str, Tensor]
    unresolved: frozenset[int]


def partition_channels(network: CutNetwork) -> Partition:
    """Find the connected components of the relation "gives its value to" between output and input channels.

    Only sets of channels can be asked, but in all layers at once: which units does a set of input channels have a
    channel of? Units that get different answers are told apart. The first sets are the binary digits of the number of
    an input, which tell units of one input each apart. After that they are random, and as large as the size of one unit
    suggests. When the unit of one channel of each class is the whole class, the classes are the units.
    """
    generator = torch.Generator().manual_seed(0)
    number_in_layer = torch.cat([torch.zeros(0), *(torch.arange(size) for size in network.readers.sizes.values())])
    number_in_layer = number_in_layer.long() + 1
    digits = int(number_in_layer.max()).bit_length() if len(number_in_layer) else 0
    classes = _Classes(network)
    open_channels = torch.ones(network.readers.total, dtype=torch.bool)
    for round_number in range(_ROUNDS):
        representatives = _one_of_each(classes.readers, generator) & open_channels
        reached = classes.ask(representatives)
        sizes = classes.readers.bincount()
        unit_sizes = classes.readers[reached].bincount(minlength=len(sizes))
        open_channels &= (unit_sizes < sizes)[classes.readers]
        share = (0.7 / unit_sizes.clamp(min=1)).clamp(max=0.5)[classes.readers]
        classes.split()
        if not open_channels.any():
            break
        for question in range(_QUESTIONS if round_number else digits):
            random = torch.rand(len(share), generator=generator) < share
            chosen = random if round_number else (number_in_layer >> question) % 2 == 1
            classes.ask(chosen & open_channels)
            classes.split()
    return Partition(
        network.readers.split(classes.readers),
        network.producers.split(classes.producers),
        network.passages.split(classes.passages),
        frozenset(classes.readers[open_channels].unique().tolist()),
    )


class _Classes:
    """Classes of channels that have got the same answers, with one numbering for inputs and outputs.

    At first, each set of layers that are connected is a class.

    Args:
        network: The cut network.
    """

    def __init__(self, network: CutNetwork) -> None:
        self._network = network
        of_reader, of_producer = _connected_layers(network)
        # A passage that no layer reads, as at the end of the network, belongs to no class.
        of_passage = {
            name: next(
                (of_producer[layer] for layer in network.producers_of_passage(name) if layer in of_producer), NONE
            )
            for name in network.passages.sizes
        }
        self._labels = [
            torch.tensor([labels.get(name, NONE) for name, size in side.sizes.items() for _ in range(size)]).long()
            for side, labels in (
                (network.readers, of_reader),
                (network.producers, of_producer),
                (network.passages, of_passage),
            )
        ]
        self._answer = [torch.zeros(len(labels), dtype=torch.bool) for labels in self._labels]

    @property
    def readers(self) -> Tensor:
        """The class of each input channel."""
        return self._labels[0]

    @property
    def producers(self) -> Tensor:
        """The class of each output channel of a layer, or ``NONE``."""
        return self._known(self._labels[1])

    @property
    def passages(self) -> Tensor:
        """The class of each output channel of a passage, or ``NONE``."""
        return self._known(self._labels[2])

    def ask(self, channels: Tensor) -> Tensor:
        """Return all input channels of the units that some input channels belong to."""
        for _ in range(_PASSES):
            producers, passages = self._network.sources(channels)
            reached = channels | self._network.targets(producers)
            self._answer = [reached, producers, passages]
            if torch.equal(reached, channels):
                break
            channels = reached
        return channels

    def split(self) -> None:
        """Split the classes by the last answer."""
        asked = torch.cat([2 * labels + answer for labels, answer in zip(self._labels, self._answer, strict=True)])
        numbers = asked.unique(return_inverse=True)[1]
        self._labels = list(numbers.split(list(map(len, self._labels))))

    def _known(self, labels: Tensor) -> Tensor:
        return torch.where(torch.isin(labels, self.readers), labels, NONE)


def _one_of_each(classes: Tensor, generator: torch.Generator) -> Tensor:
    """Choose a random channel of each class."""
    order = torch.randperm(len(classes), generator=generator)
    chosen = torch.full((int(classes.max()) + 1 if len(classes) else 0,), -1)
    chosen[classes[order]] = order
    return torch.zeros(len(classes), dtype=torch.bool).index_fill(0, chosen[chosen >= 0], True)


def _connected_layers(network: CutNetwork) -> tuple[dict[str, int], dict[str, int]]:
    """Return the number of the set of connected layers that each reader and each producer is in."""
    sets: list[tuple[set[str], set[str]]] = []
    for reader in network.readers.sizes:
        producers, readers = network.producers_of(reader), {reader}
        for other in [other for other in sets if other[0] & producers]:
            sets.remove(other)
            producers, readers = producers | other[0], readers | other[1]
        sets.append((producers, readers))
    of_producer = {layer: number for number, (producers, _) in enumerate(sets) for layer in producers}
    of_reader = {layer: number for number, (_, readers) in enumerate(sets) for layer in readers}
    return of_reader, of_producer
