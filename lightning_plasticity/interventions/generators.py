"""Random numbers that go where their intervention goes."""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import override


class SendableGenerator(torch.Generator):
    """A generator on the CPU that can be sent to a spawned process.

    torch's own is pickled with a tensor that nobody keeps: it is gone before the other process can open it.
    """

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        return _with_state, (self.get_state().numpy(),)


def _with_state(state: Any) -> SendableGenerator:
    generator = SendableGenerator()
    generator.set_state(torch.from_numpy(state))
    return generator
