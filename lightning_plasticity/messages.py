"""Warnings and errors addressed to users."""

from __future__ import annotations

import warnings

import torch


class PlasticityWarning(UserWarning):
    """The network is losing its ability to learn, or could not be measured."""


class MisconfigurationError(ValueError):
    """The arguments do not fit the model, its loss or its batch.

    :class:`~lightning_plasticity.SpectralCollapseCallback` raises it as Lightning's ``MisconfigurationException``.
    """


def rank_zero_warn(message: str, *, stacklevel: int = 3) -> None:
    """Issue a :class:`PlasticityWarning` on the first rank of a distributed run.

    Args:
        message: The text of the warning.
        stacklevel: The frame that the warning is attributed to; by default the caller of the calling function.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_rank() == 0:
        warnings.warn(message, PlasticityWarning, stacklevel=stacklevel)
