"""Measure the hidden layers of a network while it runs: one metric over all of them."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics.utilities.data import dim_zero_cat
from torchmetrics.utilities.prints import rank_zero_warn
from typing_extensions import Self, override

from lightning_plasticity._validation import check_choice, check_positive_ints, is_int, is_str_list
from lightning_plasticity.activations.compiled import compiled_modules, compiler_is_loaded, uncompiled
from lightning_plasticity.activations.layer_names import may_match, module_paths, possible_names
from lightning_plasticity.activations.tracker import ActivationTracker
from lightning_plasticity.diagnostics import DIAGNOSTICS, diagnostics_of
from lightning_plasticity.functional.layouts import rows_of, sample_count
from lightning_plasticity.functional.ranks import (
    SRANK_DELTA,
    entropy_rank,
    leading_count,
    second_moments,
    singular_values_of_moments,
    squared_ratio,
)
from lightning_plasticity.functional.units import (
    CLONED_THRESHOLD,
    DORMANT_THRESHOLD,
    cloned_share,
    cloned_share_of_rows,
    dormant_share,
    magnitude_sums,
    norm_sum,
    unit_sums,
    valid_threshold,
)
from lightning_plasticity.metrics.base import PlasticityMetric, finite_or_nan

MEASURES = tuple(diagnostic.name for diagnostic in diagnostics_of(["features"]))
"""All measures of a monitor, in the order in which they are reported."""

_RANKS = ("effective_rank", "stable_rank", "srank")

_CLONES_SAMPLES = 128
"""Number of samples of a wide layer that its units are compared on: chance hardly correlates so many by 0.95."""


@dataclass(frozen=True)
class MonitoredLayer:
    """The size of one layer and of its samples.

    Args:
        units: Number of units.
        samples: Number of samples; every position or token is one.
        ranked_samples: Number of samples that the ranks are computed from, 0 if no rank is measured. A rank cannot
            exceed it.
        ranks_are_estimates: Whether the ranks are those of a part of the samples, or of random sums of units.
        units_are_assumed: Whether the dimension that counts units is the usual one for the shape, since no layer before
            or behind determines it.
    """

    units: int
    samples: int
    ranked_samples: int
    ranks_are_estimates: bool
    units_are_assumed: bool = False


@dataclass(frozen=True)
class _Statistics:
    """The addends of one batch to the states of a layer."""

    units: int
    sums: dict[str, Tensor | float]
    rows: Tensor | None


class PlasticityMonitor(PlasticityMetric):
    """Dormant units, ranks and feature norms of the hidden layers of a network, measured while it runs.

    Hidden layers are the outputs of activation functions that flow into a further layer with weights. Activation
    functions are recognized as modules, as functions (``F.relu``, ``clamp(min=0)``, ``maximum`` with zeros,
    ``where(x > 0, x, 0)``, ``x * (x > 0)``) and in recurrent layers. So the output layer does not count, whatever its
    activation function, nor do activations on the way to the loss. Of a gate, ``h * sigmoid(h)`` or ``silu(a) * b``,
    the product counts, which the next layer reads. For other hand-written functions, name the module that returns the
    activations in ``layers``. The network holds hooks of the monitor only while it is attached:

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> monitor = PlasticityMonitor(model, measures=["dormant_fraction"])
    >>> with monitor:
    ...     output = model(torch.randn(64, 4))
    >>> list(monitor.compute())
    ['dormant_fraction', 'dormant_fraction/0']

    To measure a training step, :meth:`attach` before it and :meth:`detach` after it. Nothing runs twice, and
    no number in the network changes, except that Transformers in evaluation mode without gradients leave torch's fast
    path, which rounds differently. Modes stay as they are: in training mode, batch norm uses the statistics of the
    batch, and dropout before an activation function is active.

    A layer has the path of the module that owns its weights, as in
    :func:`~lightning_plasticity.interventions.describe_units`: the last linear, convolution, recurrent or attention
    layer before the activation function, with norm layers, dropout, pooling and arithmetic between them. This is
    ``"0"`` above, and ``"block.fc1"`` for ``F.relu(self.fc1(x))``. A sum has the name of the summand whose layer ran
    last, and a gate that of the layer in its activation function. Further activation functions on one output are
    numbered, ``"block.fc1-2"``. A layer that runs twice in one pass is one layer with twice the samples.

    A parameter that is not called ``weight`` names its layer itself, ``"block.w1"``. Where no layer with weights of the
    network comes before the activation function, the layer has the path of the activation module, or the path of the
    module that calls the function and the function's name, ``"block.relu"``; further ones in the same call are
    numbered. Functions called outside of all modules of the network are not seen, except in the ``training_step`` of a
    LightningModule. (Call a network, not its ``forward``.)

    Args:
        module: The network; can also be given to :meth:`attach`. It does not become a part of the metric, of its
            ``state_dict`` or of its pickle.
        layers: Names or patterns with ``*`` of the layers to be measured, all by default. The exact path of any other
            module, such as an activation module or a layer without an activation function, measures what this module
            returns.
        dormant_threshold: Units of at most this share of the layer's mean magnitude are dormant, in [0, 1].
        measures: The measures to compute, among ``dormant_fraction``, ``dead_fraction``, ``cloned_fraction``,
            ``effective_rank``, ``stable_rank``, ``srank`` and ``feature_norm``; all by default. The ranks cost most.
        channel_dim: The dimension that counts units, in all layers. By default it is inferred from the last layer that
            made the activations, else from the first that reads them. If neither determines it, it is taken from the
            shape, as by :func:`~lightning_plasticity.functional.layouts.channel_dim_of`, with a warning.
        compiled: Handling of modules compiled by ``torch.compile``, whose activations hooks cannot observe:
            ``"raise"`` an error, or run them uncompiled while attached (``"eager"``), which changes results by rounding
            and takes longer.
        max_samples: Layers of at most that many units have exact ranks of all samples. Of wider ones that many samples
            are kept (by each process), at random from the batches that come first; the first 128 of them tell which
            units are clones.
        max_units: Wider layers have ranks of that many random signed sums of units instead, and no cloned fraction.
        prefix: Comes before every name: with ``"plasticity/"`` all are one group in TensorBoard.
        kwargs: The arguments of :class:`torchmetrics.Metric`.

    Raises:
        TypeError: If ``module`` is no module, ``prefix`` no string, or ``layers`` or ``measures`` a single one.
        ValueError: If an argument is out of range; if a layer has another number of units than before; when it is
            attached to a network in which one of ``layers`` can match nothing.
        RuntimeError: When it is attached to a compiled module and ``compiled="raise"``, to a scripted one, or to one
            on the meta device.

    Shape:
        ``compute()`` returns a dictionary of float64 numbers: ``<measure>`` over all layers (dormant, dead and cloned
        units as a share of all units, otherwise the mean of the layers), and ``<measure>/<layer>``. NaN where
        activations were not finite, and where no layer was measured. Log it by
        ``self.log_dict(monitor.compute())``, then ``monitor.reset()``.

    References:
        As in :mod:`lightning_plasticity.functional`.
    """

    # Which samples of a wide layer are kept depends on the earlier ones.
    full_state_update = True

    def __init__(
        self,
        module: nn.Module | None = None,
        layers: Sequence[str] | None = None,
        dormant_threshold: float = DORMANT_THRESHOLD,
        *,
        measures: Sequence[str] = MEASURES,
        channel_dim: int | None = None,
        compiled: Literal["raise", "eager"] = "raise",
        max_samples: int = 512,
        max_units: int = 4096,
        prefix: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        _check_names(layers=layers, measures=measures)
        if not is_str_list(measures) or any(measure not in MEASURES for measure in measures):
            raise ValueError(f"measures={measures!r} must be one or more of {list(MEASURES)}")
        if layers is not None and not is_str_list(layers):
            raise ValueError(f"layers={layers!r} must be a list of names, one or more, or None for all")
        if channel_dim is not None and not is_int(channel_dim):
            raise ValueError(f"channel_dim={channel_dim!r} must be a whole number, or None")
        check_choice(("raise", "eager"), compiled=compiled)
        check_positive_ints(max_samples=max_samples, max_units=max_units)
        if not isinstance(prefix, str):
            raise TypeError(f"prefix={prefix!r} must be a string")
        self.patterns = None if layers is None else list(layers)
        self.left_out: Collection[str] = ()
        """Names of modules whose layers are not measured, unless ``layers`` names them."""
        self.dormant_threshold = valid_threshold(dormant_threshold, "dormant_threshold")
        self.measures = [measure for measure in MEASURES if measure in measures]
        self.channel_dim = channel_dim
        self.compiled = compiled
        self.max_samples = max_samples
        self.max_units = max_units
        self.prefix = prefix
        self.suppress_errors = False
        self.errors: list[str] = []
        # A list, so that the network does not become a submodule of the metric.
        self._network = [] if module is None else [_check_module(module)]
        self._attachment: ExitStack | None = None
        self._tracker: ActivationTracker | None = None
        self._is_persistent = False
        self._offered: set[str] = set()
        self._assumed: set[str] = set()
        self._rejected: dict[str, str] = {}
        self._warned: set[str] = set()

    def attach(self, module: nn.Module | None = None) -> Self:
        """Start to measure the network; also as ``with monitor.attach(module): ...``.

        Several monitors may be attached at a time and detached in any order. Copies and pickles of the network made
        meanwhile are not measured.

        Args:
            module: The network; by default the one that the monitor was made for.

        Raises:
            RuntimeError: If it is attached already, has no network, or the network cannot be observed.
            ValueError: If one of ``layers`` can match nothing in the network.
        """
        if self._attachment is not None:
            raise RuntimeError("the monitor is attached already: detach() it first")
        if module is None and not self._network:
            raise RuntimeError("the monitor has no network to measure: PlasticityMonitor(module), or attach(module)")
        network = self._network[0] if module is None else _check_module(module)
        if isinstance(network, nn.parallel.DistributedDataParallel):
            network = network.module
        self._check_network(network)
        chosen = module_paths(network).intersection(self.patterns or ())
        self._offered = set(chosen)
        tracker = ActivationTracker(network, self, chosen)
        with ExitStack() as stack:
            if self.compiled == "eager" and compiler_is_loaded():
                stack.enter_context(uncompiled())
            stack.callback(self._warn_gaps, tracker)
            stack.callback(tracker.stop)
            tracker.start()
            self._attachment, self._tracker = stack.pop_all(), tracker
        return self

    def _check_network(self, network: nn.Module) -> None:
        compiled = compiled_modules(network)
        if compiled and self.compiled == "raise":
            raise RuntimeError(
                f"PlasticityMonitor cannot observe compiled modules ({', '.join(compiled)}): "
                "PlasticityMonitor(compiled='eager') runs them uncompiled while it is attached, which changes results "
                "by rounding; or attach it to an uncompiled copy"
            )
        if any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers())):
            raise RuntimeError("the network is on the meta device, where there are no numbers to measure")
        names = possible_names(network)
        impossible = [pattern for pattern in self.patterns or () if not may_match(pattern, names)]
        if impossible:
            raise ValueError(
                f"layers={impossible!r} can match nothing in {type(network).__name__}, which is made of "
                f"{[name for name, _ in network.named_children()]}: names are paths within the network that is measured"
            )

    @property
    def attached(self) -> bool:
        """``True`` if the monitor is attached to a network."""
        return self._attachment is not None

    def detach(self) -> None:
        """Stop to measure, and remove all hooks from the network. Without effect if the monitor is not attached.

        Warns:
            UserWarning: If activations were missed in compiled code, a pattern has matched none, no hidden layer was
                seen although several layers ran, or no layer determined which dimension of another counts units.
        """
        attachment, self._attachment, self._tracker = self._attachment, None, None
        if attachment is not None:
            attachment.close()

    def __enter__(self) -> Self:
        return self if self._attachment is not None else self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    @property
    def layers(self) -> dict[str, MonitoredLayer]:
        """The layers measured since the last :meth:`reset`, by name."""
        layers = {}
        for layer in self._layers_with_data():
            units, samples = len(self._state(layer, "magnitude_sum")), int(self._state(layer, "samples"))
            rows = self._rows(layer)
            ranked = samples if rows is None else len(rows)
            layers[layer] = MonitoredLayer(
                units=units,
                samples=samples,
                ranked_samples=ranked if self._ranks else 0,
                ranks_are_estimates=self._ranks and (ranked < samples or (rows is not None and units > self.max_units)),
                units_are_assumed=layer in self._assumed,
            )
        return layers

    @override
    def update(self, activations: Mapping[str, Tensor | _Statistics]) -> None:
        """Add activations by the name of their layer. While the monitor is attached, it calls this itself.

        Args:
            activations: ``(N, d)``, ``(N, T, d)`` or ``(N, C, H, W)``.
        """
        for layer, value in activations.items():
            statistics = value if isinstance(value, _Statistics) else self.observe(value.detach(), None)
            self._add_layer(layer, statistics.units)
            state = self._state(layer, "magnitude_sum")
            if state.ndim and len(state) != statistics.units:
                raise ValueError(
                    f"layer {layer!r} had {len(state)} units and has {statistics.units} now: reset() the monitor when "
                    "the network changes, give channel_dim= if it counts samples, or leave the layer out by "
                    "layers=[...]"
                )
            self._accumulate(**{f"{layer}|{name}": addend for name, addend in statistics.sums.items()})
            if statistics.rows is not None:
                rows = self._state(layer, "rows")
                free = self.max_samples - sum(len(part) for part in rows)
                if free > 0:
                    rows.append(self._narrow(statistics.rows[:free]))

    @override
    def compute(self) -> dict[str, Tensor]:
        """Return all measures, over all layers and of each layer."""
        by_layer = {layer: self._measure(layer) for layer in self._layers_with_data()}
        estimated = [name for name, layer in self.layers.items() if layer.ranks_are_estimates]
        if estimated:
            rank_zero_warn(
                f"the ranks of {', '.join(estimated)} are estimates, from {self.max_samples} samples of at most "
                f"{self.max_units} units: raise max_samples or max_units for exact ones",
                category=UserWarning,
            )
        result = {self.prefix + measure: self._aggregate(measure, by_layer) for measure in self.measures}
        for measure in self.measures:
            result |= {
                f"{self.prefix}{measure}/{layer}": values[measure]
                for layer, values in by_layer.items()
                if measure in values
            }
        return result

    def selects(self, name: str) -> bool:
        """Return whether to measure a layer."""
        self._offered.add(name)
        if self.patterns is None:
            return not any(name == module or name.startswith(f"{module}.") for module in self.left_out)
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)

    def observe(self, activations: Tensor, channel_dim: int | None) -> _Statistics:
        """Return the statistics of the activations of one layer."""
        dim = channel_dim if self.channel_dim is None else self.channel_dim
        magnitudes = magnitude_sums(activations, dim)
        sums: dict[str, Tensor | float] = {"magnitude_sum": magnitudes, "samples": sample_count(activations, dim)}
        if "feature_norm" in self.measures:
            sums["norm_sum"] = norm_sum(activations, dim)
        units, rows = len(magnitudes), None
        if self._needs_moments and units <= self.max_samples:
            sums["moment_sum"] = second_moments(activations, dim)
            if self._clones:
                sums["unit_sum"] = unit_sums(activations, dim)
        elif self._needs_moments:
            rows = rows_of(activations, dim)
            # Random samples, since every n-th one could be the same token of each sequence.
            generator = torch.Generator().manual_seed(len(rows))
            chosen = torch.randperm(len(rows), generator=generator, device="cpu")[: self.max_samples]
            rows = rows[chosen.to(rows.device)].double()
        return _Statistics(units, sums, rows)

    def tolerates(self, error: Exception) -> bool:
        """Return whether the forward pass continues after an error, which is then stored in ``errors``."""
        if self.suppress_errors:
            self.errors.append(str(error))
        return self.suppress_errors

    def report(self, name: str, observed: _Statistics, *, assumed: bool, certain: bool) -> None:
        """Add the statistics of a layer. An error that a wrong guess of its units may cause is stored for a warning."""
        if assumed:
            self._assumed.add(name)
        try:
            self.update({name: observed})
        except ValueError as error:
            if certain and name not in self._assumed:
                raise
            self._rejected[name] = str(error)

    @override
    def persistent(self, mode: bool = False) -> None:
        """Set whether the states are saved in the ``state_dict``, those of layers measured later included."""
        self._is_persistent = mode
        super().persistent(mode)

    @override
    def reset(self) -> None:
        """Reset the states of all layers."""
        super().reset()
        self._assumed.clear()

    @property
    def _ranks(self) -> bool:
        return any(rank in self.measures for rank in _RANKS)

    @property
    def _clones(self) -> bool:
        return "cloned_fraction" in self.measures

    @property
    def _needs_moments(self) -> bool:
        return self._ranks or self._clones

    def _state(self, layer: str, name: str) -> Any:
        return getattr(self, f"{layer}|{name}", None)

    def _add_layer(self, layer: str, units: int) -> None:
        """Add the states of a layer, unless there are any."""
        sums = ["magnitude_sum", "samples"]
        sums += ["norm_sum"] if "feature_norm" in self.measures else []
        if self._needs_moments and units <= self.max_samples:
            sums += ["moment_sum", "unit_sum"] if self._clones else ["moment_sum"]
        self._add_sums(*(name for name in (f"{layer}|{sum_}" for sum_ in sums) if name not in self._defaults))
        if self._needs_moments and units > self.max_samples and f"{layer}|rows" not in self._defaults:
            self.add_state(f"{layer}|rows", [], dist_reduce_fx="cat")
        self._persistent = dict.fromkeys(self._persistent, self._is_persistent)

    def _layers_with_data(self) -> list[str]:
        if self._tracker is not None:
            self._tracker.report_pending()
        layers = dict.fromkeys(state.rpartition("|")[0] for state in self._defaults)
        return [layer for layer in layers if self._state(layer, "magnitude_sum").ndim]

    def _measure(self, layer: str) -> dict[str, Tensor]:
        magnitudes, samples = self._state(layer, "magnitude_sum"), self._state(layer, "samples")
        values = {
            "dormant_fraction": dormant_share(magnitudes, self.dormant_threshold),
            "dead_fraction": dormant_share(magnitudes, 0.0),
        }
        if self._clones and len(magnitudes) <= self.max_units:
            values["cloned_fraction"] = self._cloned_share(layer)
        if self._ranks:
            singular_values = singular_values_of_moments(self._moments(layer))
            values["effective_rank"] = entropy_rank(singular_values)
            values["stable_rank"] = squared_ratio(singular_values)
            values["srank"] = leading_count(singular_values, SRANK_DELTA)
        if "feature_norm" in self.measures:
            values["feature_norm"] = finite_or_nan(self._state(layer, "norm_sum") / samples)
        return values

    def _cloned_share(self, layer: str) -> Tensor:
        rows = self._rows(layer)
        if rows is None:
            moments, sums = self._state(layer, "moment_sum"), self._state(layer, "unit_sum")
            return cloned_share(moments, sums, self._state(layer, "samples"), CLONED_THRESHOLD)
        return cloned_share_of_rows(rows[:_CLONES_SAMPLES], CLONED_THRESHOLD)

    def _rows(self, layer: str) -> Tensor | None:
        """Return the samples kept of a layer that is too wide for second moments."""
        parts = self._state(layer, "rows")
        # A list of parts; a tensor after a synchronization.
        return dim_zero_cat(parts) if parts is not None and len(parts) else None

    def _moments(self, layer: str) -> Tensor:
        rows = self._rows(layer)
        if rows is None:
            moments: Tensor = self._state(layer, "moment_sum")
            return moments
        # Both products have the same nonzero eigenvalues.
        return rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows

    def _aggregate(self, measure: str, by_layer: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        by_layer = {layer: values for layer, values in by_layer.items() if measure in values}
        if not by_layer:
            return torch.tensor(torch.nan, dtype=torch.float64, device=self.device)
        stacked = torch.stack([values[measure] for values in by_layer.values()])
        if not DIAGNOSTICS[measure].is_fraction:
            return stacked.mean()
        units = stacked.new_tensor([len(self._state(layer, "magnitude_sum")) for layer in by_layer])
        return (stacked * units).sum() / units.sum()

    def _narrow(self, rows: Tensor) -> Tensor:
        """Return random signed sums of units, at most ``max_units``, with the same inner products on average."""
        units = rows.shape[1]
        if units <= self.max_units:
            return rows
        # The signs are the same for every batch and in every process.
        generator = torch.Generator().manual_seed(units)
        signs = torch.randint(2, (units,), generator=generator).to(rows) * 2 - 1
        padded = torch.nn.functional.pad(rows * signs, (0, -units % self.max_units))
        return padded.reshape(len(rows), -1, self.max_units).sum(1)

    def _warn_gaps(self, tracker: ActivationTracker) -> None:
        if tracker.saw_compiled_code:
            rank_zero_warn(
                "code compiled by torch.compile has run while PlasticityMonitor was attached, and its activations were "
                "not seen: PlasticityMonitor(compiled='eager') runs it uncompiled, which changes results by rounding",
                category=UserWarning,
            )
        unmatched = [p for p in self.patterns or () if not any(fnmatchcase(name, p) for name in self._offered)]
        if unmatched and tracker.saw_activations:
            rank_zero_warn(
                f"layers={unmatched!r} match none of the activations seen: {sorted(self._offered)}",
                category=UserWarning,
            )
        elif len(tracker.layers_with_weights) > 1 and not (
            tracker.saw_hidden_layer or tracker.saw_compiled_code or self.errors
        ):
            rank_zero_warn(
                "PlasticityMonitor found no hidden layer, although several layers with weights ran: attention and "
                "some hand-written activation functions are not recognized: name the modules that return them, "
                "PlasticityMonitor(layers=[...])",
                category=UserWarning,
            )
        for error in self._rejected.values():
            rank_zero_warn(f"some activations were left out: {error}", category=UserWarning)
        self._rejected.clear()
        unclear = sorted(self._assumed - self._warned)
        self._warned.update(unclear)
        if unclear:
            rank_zero_warn(
                f"no layer before or behind {', '.join(unclear)} determines which dimension counts units: it is taken "
                "to be the last of three, the second of more. Give channel_dim=, or leave them out by layers=[...]",
                category=UserWarning,
            )

    @override
    def _sync_shapes(self, group: Any | None) -> None:
        local = {layer: len(self._state(layer, "magnitude_sum")) for layer in self._layers_with_data()}
        by_rank: list[dict[str, int]] = [{} for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(by_rank, local, group=group)
        for layer, units in sorted((layer, units) for layers in by_rank for layer, units in layers.items()):
            self._add_layer(layer, units)
            rows = self._state(layer, "rows")
            if rows is not None and not rows:
                rows.append(torch.empty(0, min(units, self.max_units), dtype=torch.float64, device=self.device))
        super()._sync_shapes(group)
        # Every rank must gather the states in the same order.
        self._reductions = dict(sorted(self._reductions.items()))

    @override
    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load the states of the saved layers, replacing all accumulated ones."""
        start, end = prefix, "|magnitude_sum"
        saved = [name for name in state_dict if name.startswith(start) and name.endswith(end)]
        if saved:
            self.reset()
            # compute() would warn that update() was never called.
            self._update_count = 1
        for name in saved:
            layer = name[len(start) : -len(end)]
            if state_dict[name].ndim:
                self._add_layer(layer, len(state_dict[name]))
            keys = [prefix + key for key in self._defaults if key.rpartition("|")[0] == layer]
            missing_keys += [key for key in keys if key not in state_dict]
            # A copy, so that further samples are not appended to the saved list.
            state_dict.update({key: list(value) for key in keys if isinstance(value := state_dict.get(key), list)})
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_network": [], "_attachment": None, "_tracker": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        other.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        # The network is shared, unless it is being copied too.
        other._network = [memo.get(id(module), module) for module in self._network]
        return other


def _check_names(**arguments: object) -> None:
    for argument, names in arguments.items():
        if isinstance(names, str):
            raise TypeError(f"{argument}={names!r} must be a list of names: [{names!r}]")


def _check_module(module: nn.Module) -> nn.Module:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module={module!r} must be a torch.nn.Module")
    return module
