"""List the torch functions that are activation functions or layers, and classify their calls."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plasticity.activations.origins import Origin
from lightning_plasticity.activations.unit_axes import (
    CONVOLUTIONS,
    EINSUM,
    MAKERS,
    NORMS,
    PRODUCTS,
    Function,
    functions,
    is_weight,
    scales_elements,
)

ACTIVATIONS = functions(
    "relu relu_ relu6 leaky_relu leaky_relu_ prelu rrelu rrelu_ elu elu_ celu celu_ selu selu_ gelu silu silu_ "
    "mish mish_ glu softplus softsign tanh tanh_ sigmoid sigmoid_ hardtanh hardtanh_ hardswish hardsigmoid hardshrink "
    "softshrink tanhshrink threshold threshold_"
)
"""Activation functions."""

CLAMPS = functions("clamp clamp_ clamp_min clamp_min_ clip clip_")
"""Activation functions if they clamp at zero from below."""

_MAXIMA = functions("maximum fmax max")
"""Activation functions if one of two arguments is a tensor of zeros."""

COMPARISONS = functions("gt __gt__ ge __ge__ lt __lt__ le __le__ greater greater_equal less less_equal")
"""Functions that make masks."""

MULTIPLICATIONS = functions("mul mul_ __mul__ __rmul__ __imul__ multiply multiply_")

_SELECTIONS = {*MULTIPLICATIONS, *functions("where masked_fill masked_fill_")}
"""Activation functions if one argument is a mask made by comparing units: ``where(x > 0, x, 0.1 * x)``."""

ACTIVATION_NAMES = {f.__name__.strip("_") for f in ACTIVATIONS | _MAXIMA | _SELECTIONS} | {"clamp"}
"""Names of activation functions in the names of layers whose weights have no owner."""

MATRIX_PRODUCTS = PRODUCTS - EINSUM

LAYERS = {*CONVOLUTIONS, F.linear, F.bilinear, F.multi_head_attention_forward}
"""Functions that are layers whether or not their weights are parameters."""

PASSING_ON = {
    *ACTIVATIONS,
    *CLAMPS,
    *_MAXIMA,
    *COMPARISONS,
    *_SELECTIONS,
    *NORMS,
    *functions(
        "add add_ __radd__ __iadd__ sub sub_ __rsub__ __isub__ rsub div div_ "
        "__rdiv__ __rtruediv__ __itruediv__ divide true_divide pow pow_ __rpow__ __pow__ addcmul addcdiv lerp "
        "minimum cat concat stack expand_as broadcast_tensors normal eq __eq__ ne __ne__"
    ),
}
"""Functions that are no layer even if a parameter takes part: a learned temperature, shift or token."""

ZEROS = functions("zeros zeros_like new_zeros")
"""Functions that make tensors of zeros, which may be an argument of ``maximum``."""

READS_SHAPE_ONLY = functions(
    "empty_like full_like ones_like rand_like randn_like randint_like "
    "new_empty new_empty_strided new_full new_ones new_tensor"
)
"""Functions that read only the shape, dtype or device of a tensor."""

STARTS_TRACKING = {*ACTIVATIONS, *MAKERS}
"""Functions whose outputs are followed whatever their inputs are."""


def is_activation_function(
    func: Function, args: Sequence[Any], kwargs: Mapping[str, Any], origins: Sequence[Origin]
) -> bool:
    """Return whether a call of a function computes activations.

    Args:
        func: The function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        origins: The known origins of its inputs.
    """
    if func in ACTIVATIONS:
        return not isinstance(args[0] if args else kwargs.get("input"), nn.Parameter)
    if func in CLAMPS:
        low = kwargs.get("min", args[1] if len(args) > 1 else None)
        cuts_at_zero = isinstance(low, int | float) and low == 0
    else:
        cuts_at_zero = (func in _SELECTIONS and any(origin.is_mask for origin in origins)) or (
            func in _MAXIMA and any(origin.is_zero for origin in origins)
        )
    return cuts_at_zero and any(origin.has_units for origin in origins)


def is_layer(func: Function, args: Sequence[Any], inputs: Sequence[Tensor], followed: Collection[int]) -> bool:
    """Return whether a function is a layer with weights; a product is one unless both factors come from the input."""
    if func in EINSUM and args and scales_elements(args[0], inputs, followed):
        return False
    if func in PRODUCTS:
        return any(is_weight(tensor) or id(tensor) not in followed for tensor in inputs)
    return func in LAYERS or (func not in PASSING_ON and any(is_weight(tensor) for tensor in inputs))
