"""Compute a loss once, with everything that a measurement of its curvature needs."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn

from lightning_plasticity.curvature.autograd_graph import edge_of, leaves, reached
from lightning_plasticity.curvature.cost import Cost, ForwardCounter
from lightning_plasticity.curvature.double_backward import composed_weight_norm, double_backward_ready
from lightning_plasticity.curvature.exact.loss_derivatives import LossDerivatives
from lightning_plasticity.curvature.exact.outputs import UnsupportedModelError
from lightning_plasticity.curvature.exact.recording import Recording
from lightning_plasticity.curvature.problem import (
    Batch,
    LossFunction,
    check_loss,
    full_precision,
    trainable_parameters,
)
from lightning_plasticity.isolation.batches import batch_size
from lightning_plasticity.isolation.state import probe_mode


@dataclass(frozen=True, eq=False)
class RecordedLoss:
    """A loss with its graph, the recording of its forward pass, and what the pass costs.

    Args:
        loss: The loss.
        recording: The recording.
        derivatives: Its derivatives with respect to the network outputs.
        parameters: The parameters to differentiate the outputs with respect to, by name.
        names: The names of all parameters of the model, by ``id``.
        num_samples: Number of samples :math:`n` that the loss averages over.
        cost: The cost of the forward pass.
    """

    loss: Tensor
    recording: Recording
    derivatives: LossDerivatives
    parameters: dict[str, nn.Parameter]
    names: dict[int, str]
    num_samples: int
    cost: Cost

    @property
    def num_outputs(self) -> int:
        """Number of network outputs :math:`m` on the batch."""
        return sum(output.shape.numel() for output in self.derivatives.outputs)

    @property
    def num_parameters(self) -> int:
        """Number of parameters :math:`P`."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def select(self, names: Collection[str]) -> RecordedLoss:
        """Return the same loss, to be differentiated with respect to some of its parameters only.

        Args:
            names: The names of these parameters.
        """
        return replace(self, parameters={name: self.parameters[name] for name in self.parameters if name in names})

    @property
    def depends_on_parameters(self) -> bool:
        """Whether the network outputs are computed from any of the parameters."""
        used = {id(leaf) for leaf in leaves([output.edge for output in self.derivatives.outputs], {})}
        return any(id(parameter) in used for parameter in self.parameters.values())


@contextlib.contextmanager
def recorded_loss(
    model: nn.Module,
    batch: Batch,
    loss_fn: LossFunction[Batch],
    *,
    parameters: str | Collection[str] | None = None,
    samples: int | None = None,
) -> Iterator[RecordedLoss]:
    """Compute a loss with a graph that can be differentiated twice within this context.

    Args:
        model: The model. Its mode and buffers are restored on exit.
        batch: The batch.
        loss_fn: Computes the mean loss.
        parameters: A name or pattern of parameters, or several.
        samples: Number of samples; by default the first dimension of the outputs.

    Raises:
        UnsupportedModelError: If the model uses reentrant checkpoints.
        ValueError: If the loss is not a finite scalar that depends on the parameters.
    """
    selected = trainable_parameters(model, parameters)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    with probe_mode(model), double_backward_ready(model):
        recording, counter = Recording(model, selected), ForwardCounter()
        with differentiation_mode(), counter, recording:
            loss = loss_fn(model, batch)
        check_loss(loss)
        if any(node.name() == "CheckpointFunctionBackward" for node in reached([edge_of(loss)], {})):
            raise UnsupportedModelError(
                "the model uses torch.utils.checkpoint with use_reentrant=True, which hides the parameters inside from "
                "everything but loss.backward(): pass use_reentrant=False"
            )
        derivatives = LossDerivatives(loss, recording, names, samples or batch_size(batch))
        cost = Cost(
            counter.flops,
            counter.calls,
            next(iter(selected.values())).device,
            sum(parameter.numel() for parameter in selected.values()),
        )
        num_samples = samples or derivatives.outputs[0].num_samples
        yield RecordedLoss(loss, recording, derivatives, selected, names, num_samples, cost)


@contextlib.contextmanager
def differentiation_mode() -> Iterator[None]:
    """Enter the function modes for building a graph, and for products with it.

    Products recompute checkpointed blocks. Outside of them the modes only slow arithmetic down.
    """
    with composed_weight_norm(), full_precision():
        yield
