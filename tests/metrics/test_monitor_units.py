"""The dimension that counts units, inferred from the layers around the activations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plasticity import PlasticityMonitor
from tests.helpers.monitored import Functional, Step, X, chained
from tests.metrics.test_functional import numpy_dormant, numpy_effective_rank


class Around(nn.Module):
    """An activation, and what comes before and after it."""

    def __init__(self, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.before, self.after = before, after

    def hidden(self, x: Tensor) -> Tensor:
        return F.relu(self.before(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.hidden(x))


def identity(x: Tensor) -> Tensor:
    return x


def transpose(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def shuffle_channels(x: Tensor) -> Tensor:
    return x.view(len(x), 2, 3, -1).transpose(1, 2).reshape(x.shape)


def read_in_channels() -> nn.Module:
    return nn.Conv1d(6, 2, 1)


def read_in_last() -> nn.Module:
    return nn.Linear(6, 2)


@pytest.mark.parametrize(
    ("layer", "shape", "units", "samples"),
    [
        (nn.Conv1d(3, 7, 3, padding=1), (5, 3, 11), 7, 55),
        (nn.Sequential(nn.Conv1d(3, 7, 3, padding=1), nn.BatchNorm1d(7), nn.Dropout(0.1)), (5, 3, 11), 7, 55),
        (nn.ConvTranspose1d(3, 7, 1), (5, 3, 11), 7, 55),
        (nn.Conv2d(3, 7, 3, padding=1), (5, 3, 4, 6), 7, 120),
        (nn.Conv2d(3, 7, 3, padding=1), (3, 4, 6), 7, 24),
        (nn.Conv3d(3, 7, 1), (2, 3, 4, 2, 3), 7, 48),
        (nn.Linear(3, 7), (5, 3), 7, 5),
        (nn.Linear(3, 7), (3,), 7, 1),
        (nn.Linear(3, 7), (5, 11, 3), 7, 55),
        (nn.Linear(3, 7), (5, 4, 6, 3), 7, 120),
    ],
)
def test_units_are_those_of_the_layer_that_made_them(
    layer: nn.Module, shape: tuple[int, ...], units: int, samples: int
) -> None:
    class Similarity(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prototype = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return F.cosine_similarity(x, self.prototype, dim=-1)

    model = nn.Sequential(layer, nn.ReLU(), Similarity())
    monitor = PlasticityMonitor(model)
    with monitor:
        model(torch.randn(shape))
    (layer_seen,) = monitor.layers.values()
    assert (layer_seen.units, layer_seen.samples) == (units, samples)


@pytest.mark.parametrize(
    ("before", "after", "dim"),
    [
        # Determined by the layer before.
        (nn.Conv1d(6, 6, 1), identity, 1),
        (chained(nn.Conv1d(6, 6, 1), transpose), identity, 2),
        (chained(nn.Linear(6, 6), transpose), identity, 1),
        (chained(nn.Linear(6, 6), lambda x: x.permute(0, 2, 1).contiguous()), identity, 1),
        (chained(nn.Linear(6, 6), lambda x: x.mT), identity, 1),
        (chained(nn.Conv1d(6, 12, 1), lambda x: x.chunk(2, 1)[1]), identity, 1),
        (chained(nn.Conv1d(6, 12, 1), lambda x: x[:, 3:9]), identity, 1),
        (chained(nn.Conv1d(6, 12, 1), lambda x: x.narrow(1, 2, 6)), identity, 1),
        (chained(nn.Conv1d(6, 12, 1), nn.GLU(dim=1)), identity, 1),
        (chained(nn.Conv1d(6, 3, 1), lambda x: torch.cat([x, -x], 1)), identity, 1),
        (chained(nn.Conv1d(6, 6, 1), shuffle_channels), identity, 1),
        (chained(nn.Conv1d(6, 6, 1), lambda x: x.roll(1, 2) * torch.arange(5.0)[:, None, None]), identity, 1),
        (chained(nn.Conv1d(6, 6, 1), nn.MaxPool1d(1), nn.Dropout(0.0)), identity, 1),
        (
            chained(lambda x: x[:, None], nn.Conv2d(1, 6, (1, 6)), lambda x: x[..., 0], lambda x: F.pad(x, (0, 0))),
            identity,
            1,
        ),
        (chained(lambda x: x[:, None], nn.Conv2d(1, 6, (6, 1)), lambda x: x.squeeze(2)), identity, 1),
        (chained(lambda x: x[:, None], nn.Conv2d(1, 6, (6, 1)), lambda x: x.mean(2)), identity, 1),
        (chained(lambda x: x[:, None], nn.Conv2d(1, 6, 1), lambda x: x.flatten(2)), identity, 1),
        (chained(lambda x: x[:, None], nn.Conv2d(1, 6, 1), lambda x: x.flatten(2).transpose(1, 2)), identity, 2),
        (nn.BatchNorm1d(6), identity, 1),
        (nn.LayerNorm(6), identity, 2),
        (chained(nn.LayerNorm(6), transpose), identity, 1),
        # A norm over tokens.
        (chained(nn.Linear(6, 6), nn.BatchNorm1d(6)), identity, 2),
        # A norm over positions.
        (chained(nn.Conv1d(6, 6, 1), nn.LayerNorm(6)), identity, 1),
        # Determined by the layer behind.
        (identity, read_in_channels(), 1),
        (identity, read_in_last(), 2),
        (lambda x: torch.eye(6) @ x, read_in_channels(), 1),
        (chained(nn.Linear(6, 6), lambda x: torch.eye(6) @ x), identity, 2),
        (identity, chained(transpose, read_in_channels()), 2),
        (identity, chained(transpose, read_in_last()), 1),
        (identity, chained(nn.BatchNorm1d(6), nn.Flatten(), nn.Linear(36, 2)), 1),
        (identity, chained(nn.MaxPool1d(2), nn.Flatten(), nn.Linear(18, 2)), 1),
        (identity, chained(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 2)), 1),
        (identity, chained(lambda x: x.mean(-1), nn.Linear(6, 2)), 1),
        (identity, chained(lambda x: x.mean(1), nn.Linear(6, 2)), 2),
        (identity, chained(lambda x: x[:, -1], nn.Linear(6, 2)), 2),
        (identity, chained(lambda x: x[:, :, -1], nn.Linear(6, 2)), 1),
        (identity, chained(shuffle_channels, read_in_channels()), 1),
        (identity, chained(lambda x: torch.cat([x, x], 1).chunk(2, 1)[0], read_in_channels()), 1),
        (identity, chained(nn.GLU(dim=2), lambda x: x + x.roll(1, 0), read_in_channels()), 1),
        (chained(nn.Linear(6, 36), lambda x: x[:, 0].view(-1, 6, 6)), read_in_channels(), 1),
        (chained(nn.Linear(6, 36), lambda x: x[:, 0].unflatten(1, (6, 6))), read_in_last(), 2),
    ],
)
def test_layers_before_and_behind_determine_the_dimension(
    before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor], dim: int
) -> None:
    torch.manual_seed(0)
    prototype = nn.Parameter(torch.ones(1, 1, 1))
    # Cosine similarity with a parameter is a layer that determines no dimension.
    if after is identity:
        after = Step(lambda x: F.cosine_similarity(x, prototype))
    model, x = Around(before, after), torch.randn(5, 6, 6)
    with PlasticityMonitor(model, dormant_threshold=0.9) as monitor:
        model(x)
    f = model.hidden(x).detach().movedim(dim, -1).double().numpy()
    f = f.reshape(-1, f.shape[-1])
    name = "relu" if "relu" in monitor.layers else [*monitor.layers][-1]
    layer = monitor.layers[name]
    assert layer.units == f.shape[-1]
    assert not layer.units_are_assumed
    values = monitor.compute()
    assert values[f"effective_rank/{name}"].item() == pytest.approx(numpy_effective_rank(f), rel=1e-6)
    assert values[f"dormant_fraction/{name}"].item() == pytest.approx(numpy_dormant(f, 0.9))


def test_unknown_dimension_warns_once() -> None:
    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.out = Functional(torch.relu), nn.Linear(30, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(x).flatten(1))

    model, x = Unknown(), torch.randn(4, 5, 6)
    monitor = PlasticityMonitor(model, measures=["feature_norm"])
    monitor.attach()
    model(x)
    assert monitor.layers["tanh"].units_are_assumed
    with pytest.warns(UserWarning, match="no layer before or behind tanh determines which dimension counts units"):
        monitor.detach()
    expected = torch.tanh(x).norm(dim=2).mean().item()
    assert monitor.compute()["feature_norm/tanh"].item() == pytest.approx(expected, rel=1e-6)
    # The warning comes once.
    with monitor:
        model(x)
    assert monitor.layers["tanh"].samples == 2 * 4 * 5
    with PlasticityMonitor(model, channel_dim=1, measures=["feature_norm"]) as known:
        model(x)
    assert (known.layers["tanh"].units, known.layers["tanh"].units_are_assumed) == (5, False)
    assert known.compute()["feature_norm/tanh"].item() == pytest.approx(torch.tanh(x).norm(dim=1).mean().item())


def test_functions_that_make_new_dimensions_determine_nothing() -> None:
    fold = chained(nn.Conv1d(6, 24, 1), lambda x: F.fold(x, (4, 6), 2, stride=2), nn.ReLU(), nn.Conv2d(6, 2, 1))
    with PlasticityMonitor(fold) as monitor:
        fold(torch.randn(5, 6, 6))
    assert (monitor.layers["0"].units, monitor.layers["0"].samples) == (6, 5 * 24)
    real = chained(nn.Linear(6, 4), lambda x: torch.view_as_real(torch.fft.fft(x, dim=1)), nn.ReLU(), nn.Linear(2, 2))
    with PlasticityMonitor(real) as monitor:
        real(torch.randn(5, 3, 6))
    assert (monitor.layers["0"].units, monitor.layers["0"].samples) == (2, 5 * 3 * 4)


def test_any_of_four_dimensions_may_count_units() -> None:
    model = chained(nn.ReLU(), lambda x: x[:, None] - 0.3, nn.ReLU(), lambda x: x.squeeze(1), nn.Conv1d(6, 2, 1))
    with PlasticityMonitor(model, measures=["feature_norm"]) as monitor:
        model(x := torch.randn(5, 6, 7))
    assert {name: (layer.units, layer.samples) for name, layer in monitor.layers.items()} == {
        "0": (6, 35),
        "2": (6, 35),
    }
    expected = F.relu(F.relu(x) - 0.3).norm(dim=1).mean().item()
    assert monitor.compute()["feature_norm/2"].item() == pytest.approx(expected, rel=1e-6)


def test_changing_numbers_of_nodes_do_not_raise() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(6, 1), nn.Linear(6, 1), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.w(x)
            return self.out(F.leaky_relu(self.a(h) + self.b(h).T).softmax(1) @ h)

    model = Attention()
    monitor = PlasticityMonitor(model).attach()
    for nodes in (5, 8):
        model(X[:nodes])
    with pytest.warns(UserWarning, match="left out: layer 'b' had 5 units and has 8 now: "):
        monitor.detach()
    assert monitor.layers["b"].samples == 5


def test_layer_behind_determines_channels_last_images() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Linear(6, 2))
    with PlasticityMonitor(model) as monitor:
        model(torch.randn(2, 3, 4, 6))
    assert (monitor.layers["0"].units, monitor.layers["0"].samples) == (6, 24)


@pytest.mark.parametrize("known", [True, False])
def test_sequences_of_changing_length_do_not_raise(known: bool) -> None:
    reader = nn.Conv1d(6, 2, 1) if known else nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4, 2))
    model = nn.Sequential(nn.ReLU(), reader)
    monitor = PlasticityMonitor(model, measures=["dead_fraction"])
    monitor.attach()
    lengths = (6, 9, 4)
    for length in lengths:
        model(torch.randn(5, 6, length))
    if known:
        monitor.detach()
        assert (monitor.layers["0"].units, monitor.layers["0"].samples) == (6, 5 * sum(lengths))
    else:
        with (
            pytest.warns(UserWarning, match="no layer before or behind 0 determines"),
            pytest.warns(UserWarning, match="left out: layer '0' had 6 units and has 4 now: "),
        ):
            monitor.detach()
        assert monitor.layers["0"].samples == 5 * 6, "what does not fit is left out"


def test_products_and_einsum_determine_their_dimension() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Parameter(torch.randn(6, 7)), nn.Parameter(torch.randn(7, 2))
            self.product = self.einsum

        def einsum(self, x: Tensor) -> Tensor:
            return torch.einsum("nct,cd->ndt", F.relu(torch.einsum("nct,cd->ndt", x, self.one)), self.two)

        def before(self, x: Tensor) -> Tensor:
            return self.two.T @ F.relu(self.one.t() @ x)

        def behind(self, x: Tensor) -> Tensor:
            return F.relu(x.mT @ self.one) @ self.two

        def only_read(self, x: Tensor) -> Tensor:
            return torch.einsum("nct,cd->ndt", F.relu(x), self.one)

        def forward(self, x: Tensor) -> Tensor:
            return self.product(x)

    model, x = Products(), torch.randn(4, 6, 5)
    for product, units, name in (
        ("einsum", 7, "one"),
        ("before", 7, "one"),
        ("behind", 7, "one"),
        ("only_read", 6, "relu"),
    ):
        model.product = getattr(model, product)
        with PlasticityMonitor(model) as monitor:
            model(x)
        assert (monitor.layers[name].units, monitor.layers[name].samples) == (units, 20), product


def test_units_are_followed_through_a_transposition() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.out = nn.Conv1d(3, 7, 1), nn.Linear(7, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.relu(self.conv(x).transpose(1, 2)))

    model = Transposed()
    nn.init.constant_(model.conv.bias[:2], -100.0)
    monitor = PlasticityMonitor(model)
    with monitor:
        # There are as many positions as channels.
        model(torch.randn(5, 3, 7))
    assert monitor.compute()["dead_fraction/conv"].item() == 2 / 7


def test_reader_determines_the_dimension_of_a_chosen_module() -> None:
    model = nn.Sequential(Step(lambda x: torch.fft.fft(x).real), nn.Conv1d(6, 2, 1))
    x = torch.randn(5, 6, 7)
    with PlasticityMonitor(model, layers=["0"], measures=["feature_norm"]) as monitor:
        model(x)
    assert monitor.layers["0"].units == 6
    expected = torch.fft.fft(x).real.norm(dim=1).mean().item()
    assert monitor.compute()["feature_norm/0"].item() == pytest.approx(expected, rel=1e-6)
