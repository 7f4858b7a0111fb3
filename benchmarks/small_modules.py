"""Train small modules of our own, one for each kind of loss and output that is not in the packages."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.models import mlp
from benchmarks.training import BATCH, SAMPLES, TASKS, Cases, Module, fit, images, two

CASES = Cases()


def _regression(outputs: int = 1) -> tuple[Tensor, Tensor]:
    return torch.randn(SAMPLES, 16), torch.randn(SAMPLES, outputs)


@CASES.add("own", "variational autoencoder")
def variational_autoencoder(callbacks: list[Callback]) -> nn.Module:
    """Train with a reconstruction error and the KL divergence of a sampled code."""

    class VariationalAutoencoder(Module):
        def __init__(self) -> None:
            super().__init__(mlp(64, 64, 16))
            self.decoder = mlp(8, 64, 64)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            mean, log_variance = self.net(batch[0]).chunk(2, dim=1)
            code = mean + (log_variance / 2).exp() * torch.randn_like(mean)
            reconstruction = F.binary_cross_entropy_with_logits(self.decoder(code), batch[0], reduction="sum")
            divergence = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum()
            return (reconstruction + divergence) / len(batch[0])

    return fit(VariationalAutoencoder(), two(lambda: (torch.rand(SAMPLES, 64),)), callbacks)


@CASES.add("own", "PPO, clipped ratio")
def clipped_ratio(callbacks: list[Callback]) -> nn.Module:
    """Train a policy with the clipped ratio to an earlier one, and an entropy bonus."""

    class Policy(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            state, action, earlier, advantage = batch
            policy = torch.distributions.Categorical(logits=self.net(state))
            ratio = (policy.log_prob(action) - earlier).exp()
            gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            return -gain.mean() - 0.01 * policy.entropy().mean()

    def draw() -> tuple[Tensor, ...]:
        action, advantage = torch.randint(4, (SAMPLES,)), torch.randn(SAMPLES)
        return torch.randn(SAMPLES, 16), action, torch.full((SAMPLES,), 0.25).log(), advantage

    return fit(Policy(mlp(16, 64, 64, 4)), two(draw), callbacks)


@CASES.add("own", "actor and critic")
def actor_critic(callbacks: list[Callback]) -> nn.Module:
    """Train a policy and a value function with one loss."""

    class ActorCritic(Module):
        def __init__(self) -> None:
            super().__init__(nn.Sequential(mlp(16, 64, 64), nn.ReLU()))
            self.actor, self.critic = nn.Linear(64, 4), nn.Linear(64, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            state, action, gain = batch
            features = self.net(state)
            value = self.critic(features).squeeze(1)
            policy = torch.distributions.Categorical(logits=self.actor(features))
            of_actor = -(policy.log_prob(action) * (gain - value.detach())).mean()
            return of_actor + 0.5 * (gain - value).pow(2).mean()

    def draw() -> tuple[Tensor, ...]:
        return torch.randn(SAMPLES, 16), torch.randint(4, (SAMPLES,)), torch.randn(SAMPLES)

    return fit(ActorCritic(), two(draw), callbacks)


@CASES.add("own", "CTC")
def connectionist(callbacks: list[Callback]) -> nn.Module:
    """Train a recurrent network with the CTC loss."""

    class Recogniser(Module):
        def __init__(self) -> None:
            super().__init__(nn.GRU(8, 32, batch_first=True))
            self.head = nn.Linear(32, 6)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            sound, labels = batch
            log_probabilities = self.head(self.net(sound)[0]).log_softmax(2).transpose(0, 1)
            times, letters = (torch.full((len(sound),), each.shape[1]) for each in (sound, labels))
            return F.ctc_loss(log_probabilities, labels, times, letters)

    return fit(Recogniser(), two(lambda: (torch.randn(SAMPLES, 20, 8), torch.randint(1, 6, (SAMPLES, 5)))), callbacks)


@CASES.add("own", "Gaussian NLL, learned variance")
def gaussian(callbacks: list[Callback]) -> nn.Module:
    """Train a network that predicts mean and variance."""

    class Gaussian(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            mean, log_variance = self.net(batch[0]).chunk(2, dim=1)
            return F.gaussian_nll_loss(mean, batch[1], log_variance.exp())

    return fit(Gaussian(mlp(16, 64, 64, 2)), two(_regression), callbacks)


@CASES.add("own", "learned weights of two losses")
def learned_weights(callbacks: list[Callback]) -> nn.Module:
    """Train a classifier that also regresses, with weights of the two losses that are parameters."""

    class TwoTasks(Module):
        def __init__(self) -> None:
            super().__init__(mlp(16, 64, 64, 5))
            self.log_variances = nn.Parameter(torch.zeros(2))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            outputs = self.net(batch[0])
            losses = torch.stack([F.cross_entropy(outputs[:, :4], batch[2]), F.mse_loss(outputs[:, 4:], batch[1])])
            return (losses * (-self.log_variances).exp() + self.log_variances).sum()

    return fit(TwoTasks(), two(lambda: (*_regression(), torch.randint(4, (SAMPLES,)))), callbacks)


@CASES.add("own", "GAN, manual optimisation")
def generative_adversarial(callbacks: list[Callback]) -> nn.Module:
    """Train a generator and a discriminator with an optimizer each."""

    class GenerativeAdversarial(Module):
        def __init__(self) -> None:
            super().__init__(mlp(8, 64, 16))
            self.discriminator = mlp(16, 64, 1)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for_generator, for_discriminator = self.optimizers()  # type: ignore[misc, union-attr]
            fake = self.net(torch.randn(len(batch[0]), 8))
            for_generator.zero_grad()
            self.manual_backward(F.softplus(-self.discriminator(fake)).mean())
            for_generator.step()
            scores = self.discriminator(batch[0]), self.discriminator(fake.detach())
            for_discriminator.zero_grad()
            self.manual_backward(F.softplus(-scores[0]).mean() + F.softplus(scores[1]).mean())
            for_discriminator.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.Adam(each.parameters(), 1e-3) for each in (self.net, self.discriminator)]

    return fit(GenerativeAdversarial(), two(lambda: (torch.randn(SAMPLES, 16),)), callbacks)


@CASES.add("own", "autoencoder of images")
def autoencoder(callbacks: list[Callback]) -> nn.Module:
    """Train a network with as many outputs as inputs."""

    class Autoencoder(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.mse_loss(self.net(batch[0]), batch[0])

    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 16, 2, stride=2),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 3, 2, stride=2),
    )
    return fit(Autoencoder(net), two(lambda: images()[:1]), callbacks)


class UNet(nn.Module):
    """Two resolutions with a connection between them."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.bottom = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of four classes for each pixel."""
        high = self.down(x)
        return self.head(torch.cat([high, self.up(self.bottom(high))], dim=1))


@CASES.add("own", "U-Net, 4×32×32 outputs")
def u_net(callbacks: list[Callback]) -> nn.Module:
    """Train with the cross-entropy of each pixel."""

    class Segmenter(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

    loaders = two(lambda: (torch.randn(64, 3, 32, 32), torch.randint(4, (64, 32, 32))), batch_size=8)
    return fit(Segmenter(UNet()), loaders, callbacks)


@CASES.add("own", "detection: classes and boxes of cells")
def detection(callbacks: list[Callback]) -> nn.Module:
    """Train with the focal cross-entropy of each cell, and the absolute error of the boxes in cells with an object."""

    class Detector(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            image, labels, boxes = batch
            outputs = self.net(image).permute(0, 2, 3, 1)
            each = F.cross_entropy(outputs[..., :5].flatten(0, 2), labels.flatten(), reduction="none")
            found = labels > 0
            of_classes = ((1 - (-each).exp()) ** 2 * each).mean()
            return of_classes + F.smooth_l1_loss(outputs[..., 5:][found], boxes[found])

    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 9, 1),
    )

    def draw() -> tuple[Tensor, ...]:
        labels = torch.randint(5, (SAMPLES, 8, 8)) * (torch.rand(SAMPLES, 8, 8) < 0.3)
        return torch.randn(SAMPLES, 3, 32, 32), labels, torch.rand(SAMPLES, 8, 8, 4)

    return fit(Detector(net), two(draw), callbacks)


@CASES.add("own", "batch-hard triplets")
def triplets(callbacks: list[Callback]) -> nn.Module:
    """Train embeddings with the farthest of the same class and the nearest of another one in the batch."""

    class Embedding(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            features = F.normalize(self.net(batch[0]), dim=1)
            distances = (2 - 2 * features @ features.T).clamp(min=1e-6).sqrt()
            same = batch[1][:, None] == batch[1]
            farthest = distances.masked_fill(~same, 0).amax(1)
            nearest = distances.masked_fill(same, 4).amin(1)
            return F.relu(farthest - nearest + 0.2).mean()

    return fit(Embedding(mlp(16, 64, 64, 8)), two(lambda: (_regression()[0], torch.randint(4, (SAMPLES,)))), callbacks)


@CASES.add("own", "penalty on weights, written out")
def penalty(callbacks: list[Callback]) -> nn.Module:
    """Train with a squared error that is written out, and a term of the weights alone."""

    class Regression(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            norm = sum(parameter.pow(2).sum() for parameter in self.net.parameters())
            return ((self.net(batch[0]) - batch[1]) ** 2).mean() + 1e-4 * norm

    return fit(Regression(mlp(16, 64, 64, 1)), two(_regression), callbacks)


@CASES.add("own", "batches of one")
def single_samples(callbacks: list[Callback]) -> nn.Module:
    """Train a classifier on one sample at a time."""

    class Classifier(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

    loaders = two(lambda: (torch.randn(SAMPLES, 16), torch.randint(4, (SAMPLES,))), batch_size=1)
    return fit(Classifier(mlp(16, 64, 64, 4)), loaders, callbacks)


@CASES.add("own", "small first batch")
def small_first_batch(callbacks: list[Callback]) -> nn.Module:
    """Train a classifier on batches of 32 after a first one of 4."""

    class Classifier(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

    def loader() -> DataLoader[Any]:
        first, *others = torch.arange(SAMPLES + 4).split([4, *[BATCH] * (SAMPLES // BATCH)])
        data = TensorDataset(torch.randn(SAMPLES + 4, 16), torch.randint(4, (SAMPLES + 4,)))
        return DataLoader(data, batch_sampler=[first.tolist(), *(each.tolist() for each in others)])

    return fit(Classifier(mlp(16, 64, 64, 4)), [loader() for _ in TASKS], callbacks)
