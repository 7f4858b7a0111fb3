"""Test the units of networks of other packages. The table of docs/units.md has those of more and larger ones."""

import pytest
import torch
from torch import nn

from benchmarks.units import CASES, Case, measure


def _small(name: str, model: str, **sizes: int) -> tuple[nn.Module, torch.Tensor]:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = getattr(transformers, f"{name}Config")(vocab_size=50, bos_token_id=0, eos_token_id=1, **sizes)
    return getattr(transformers, model)(config), torch.randint(50, (2, 12))


def _llama() -> tuple[nn.Module, torch.Tensor]:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return _small("Llama", "LlamaForCausalLM", num_key_value_heads=2, **sizes)


def _gpt2() -> tuple[nn.Module, torch.Tensor]:
    return _small("GPT2", "GPT2LMHeadModel", n_embd=32, n_layer=2, n_head=4)


@pytest.mark.parametrize(
    ("build", "groups"),
    [(_llama, {"v_proj": 2, "gate_proj": 48}), (_gpt2, {"c_attn": 4, "c_fc": 128})],
    ids=["Llama", "GPT-2"],
)
def test_dead_units_of_transformers_reset_bit_equal(build, groups) -> None:  # type: ignore[no-untyped-def]
    def network() -> object:
        model, words = build()
        return model, lambda model: model(words).logits

    row = measure(Case("small", "transformers", network, ()))  # type: ignore[arg-type]
    assert {layer.split(".")[-1]: group.num_units for layer, group in row.units.groups.items()} == groups
    assert len(row.units.groups) == 4
    assert row.unchanged
    assert row.reset == 2 * sum(-(-count // 3) for count in groups.values())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_known_network_is_served_within_20_seconds(case: Case) -> None:
    if case.package == "torchvision":
        from benchmarks.real_modules import declare_operators

        declare_operators()
    if case.package:
        pytest.importorskip(case.package, reason=f"{case.package} is not installed")
    row = measure(case)
    for part in case.finds:
        assert any(part in layer for layer in row.units.groups), part
    assert row.unchanged
    assert row.reset
    assert row.seconds < 20
