"""Configure all tests."""

import pytest
import torch

# Asserts in the shared helpers show their values too.
pytest.register_assert_rewrite("tests.helpers")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _short_fit_tests(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take 3 steps in fit tests of the default length, where a test is about something else: the suite stays fast."""
    if "full_fit_test" not in request.keywords:
        monkeypatch.setattr("lightning_plasticity.fit_test._STEPS", 3)
