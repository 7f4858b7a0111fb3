"""Compute, with their graph, the weights that forward hooks of torch compute from other parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


@dataclass(frozen=True)
class HookedWeight:
    """A weight that a forward hook computes.

    Args:
        sources: The parameters that it is computed from.
        compute: Computes it, with its graph and without side effects, as the next forward pass would. The attribute of
            the layer is the one of the last forward pass, before the last optimizer step.
    """

    sources: list[nn.Parameter]
    compute: Callable[[], Tensor]


def weights_from_hooks(layer: nn.Module) -> dict[str, HookedWeight]:
    """Return the weights that hooks of torch compute in a layer, by name.

    Hooks are those of :mod:`torch.nn.utils.prune`, and of the old ``weight_norm`` and ``spectral_norm``, whose power
    iteration does not advance.

    Example:
        >>> import torch
        >>> from torch.nn.utils import prune
        >>> layer = prune.custom_from_mask(nn.Linear(2, 1), "weight", torch.tensor([[1, 0]]))
        >>> [weight] = weights_from_hooks(layer).values()
        >>> weight.compute().count_nonzero().item()
        1
    """
    result = {
        key.removesuffix("_orig"): HookedWeight([original], partial(_masked, layer, key.removesuffix("_orig")))
        for key, original in layer.named_parameters(recurse=False)
        if f"{key.removesuffix('_orig')}_mask" in layer._buffers
    }
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            sources = [layer.get_parameter(f"{hook.name}_{part}") for part in "gv"]
            result[hook.name] = HookedWeight(sources, partial(hook.compute_weight, layer))
        elif isinstance(hook, SpectralNorm):
            compute = partial(hook.compute_weight, layer, do_power_iteration=False)
            result[hook.name] = HookedWeight([layer.get_parameter(f"{hook.name}_orig")], compute)
    return result


def _masked(layer: nn.Module, name: str) -> Tensor:
    original, mask = layer.get_parameter(f"{name}_orig"), layer.get_buffer(f"{name}_mask")
    return original * mask.to(original.dtype)
