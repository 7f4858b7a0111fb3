"""Configure all tests."""

import pytest
import torch

# Asserts in the shared helpers show their values too.
pytest.register_assert_rewrite("tests.helpers")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
