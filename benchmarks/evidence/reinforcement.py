"""Swing up pendulums by proximal policy optimization (Schulman et al. 2017); their dynamics change from task to task.

A batch holds observations ``(n, 3)``, and actions, the logarithms of their probabilities, advantages, targets of the
critic and rewards, each ``(n,)``. The reward (1 + cos θ) / 2 of a step stands in the place of an accuracy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from typing_extensions import override

from benchmarks.evidence.stream import Batch, Stream, seeded

PENDULUMS, STEPS, TIME_STEP = 32, 64, 0.1
ROLLOUTS, EPOCHS, BATCH_SIZE = 12, 4, 256
DISCOUNT, TRACE, CLIP, VALUE_WEIGHT, ENTROPY_WEIGHT = 0.97, 0.95, 0.2, 0.5, 0.01


@dataclass(frozen=True)
class Dynamics:
    """The dynamics of a task, θ'' = gravity · sin θ + torque · u − friction · θ', with u in {−1, 0, 1}.

    Args:
        gravity: The pull away from θ = 0, which is upright.
        torque: The effect of an action, of either sign.
        friction: The damping.
        seed: The seed of first states and actions.
    """

    gravity: float
    torque: float
    friction: float
    seed: int


def changing_pendulums(seed: int) -> Iterator[Dynamics]:
    """Yield dynamics with random gravity, friction, and strength and sign of the torque."""
    g = seeded(seed)
    while True:
        gravity, strength, friction, sign = torch.rand(4, generator=g).tolist()
        torque = (3 + 9 * strength) * (1 if sign < 0.5 else -1)
        yield Dynamics(2 + 6 * gravity, torque, 0.5 * friction, int(torch.randint(2**31, (), generator=g)))


class ActorCritic(nn.Module):
    """Two networks: one for the logits of the three actions ``(n, 3)``, one for the value of a state ``(n,)``."""

    def __init__(self) -> None:
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
        self.critic = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

    @override
    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        return self.actor(observations), self.critic(observations).squeeze(-1)


class Experience(IterableDataset[Batch]):
    """The batches that a network meets in a task: it acts, and then learns from it for a few epochs, in turn."""

    def __init__(self, dynamics: Dynamics, network: nn.Module) -> None:
        self._dynamics = dynamics
        self._network = network

    def __len__(self) -> int:
        # Lightning fetches ahead what has no length: the network would act before its last step.
        return ROLLOUTS * EPOCHS * (PENDULUMS * STEPS // BATCH_SIZE)

    @override
    def __iter__(self) -> Iterator[Batch]:
        g = seeded(self._dynamics.seed)
        for _ in range(ROLLOUTS):
            samples = rollout(self._dynamics, self._network, g)
            for _ in range(EPOCHS):
                for chosen in torch.randperm(PENDULUMS * STEPS, generator=g).split(BATCH_SIZE):
                    yield tuple(values[chosen] for values in samples)


@torch.no_grad()
def rollout(dynamics: Dynamics, network: nn.Module, generator: torch.Generator) -> Batch:
    """Let a network act on pendulums from random states, and return all samples as a batch."""
    angle = (2 * torch.rand(PENDULUMS, generator=generator) - 1) * torch.pi
    velocity = 2 * torch.rand(PENDULUMS, generator=generator) - 1
    steps: list[Batch] = []
    for _ in range(STEPS):
        observation = torch.stack([angle.cos(), angle.sin(), velocity / 4], 1)
        logits, value = network(observation)
        log_probabilities = F.log_softmax(logits, 1)
        action = torch.multinomial(log_probabilities.exp(), 1, generator=generator)
        acceleration = (
            dynamics.gravity * angle.sin() + dynamics.torque * (action[:, 0] - 1) - dynamics.friction * velocity
        )
        velocity = (velocity + TIME_STEP * acceleration).clamp(-8, 8)
        angle = angle + TIME_STEP * velocity
        reward = (1 + angle.cos()) / 2
        steps.append((observation, action[:, 0], log_probabilities.gather(1, action)[:, 0], value, reward))
    observations, actions, log_probability, values, rewards = map(torch.stack, zip(*steps, strict=True))
    _, last = network(torch.stack([angle.cos(), angle.sin(), velocity / 4], 1))
    advantages = generalized_advantages(rewards, torch.cat([values, last[None]]))
    normalized = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    samples = (observations, actions, log_probability, normalized, advantages + values, rewards)
    return tuple(each.flatten(0, 1) for each in samples)


def generalized_advantages(rewards: Tensor, values: Tensor) -> Tensor:
    """Return the advantages Σ_k (γλ)^k (r_{t+k} + γ v_{t+k+1} − v_{t+k}) (Schulman et al. 2016).

    Args:
        rewards: ``(T, n)``.
        values: ``(T + 1, n)``, those of the last states included.
    """
    errors = rewards + DISCOUNT * values[1:] - values[:-1]
    advantages = torch.zeros_like(errors)
    advantage = torch.zeros_like(errors[0])
    for step in range(len(errors) - 1, -1, -1):
        advantage = errors[step] + DISCOUNT * TRACE * advantage
        advantages[step] = advantage
    return advantages


class PendulumStream(Stream):
    """A stream of dynamics."""

    @property
    @override
    def live_metric(self) -> None:
        # Both networks would be compared on what one of them did.
        return None

    @override
    def batches(self, task: Dynamics, network: nn.Module) -> Experience:
        return Experience(task, network)

    @override
    def evaluate(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss of actor and critic, and the mean reward."""
        observations, actions, log_probability, advantages, targets, rewards = batch
        logits, values = network(observations)
        log_probabilities = F.log_softmax(logits, 1)
        ratio = (log_probabilities.gather(1, actions[:, None])[:, 0] - log_probability).exp()
        gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages).mean()
        entropy = -(log_probabilities.exp() * log_probabilities).sum(1).mean()
        return VALUE_WEIGHT * F.mse_loss(values, targets) - gain - ENTROPY_WEIGHT * entropy, rewards.mean()
