"""Under Transformer Engine's backend a Conv1D and stacked experts are ours, beside its layers, with the same FP8
state.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layers.small_models import settings
from torch import nn

from ds_fp8.config.settings import LayerSettings
from ds_fp8.layers import restore_layers, swap_layers
from ds_fp8.layers.fused_rms_norm import FusedRmsNorm
from ds_fp8.plan import make_plan
from ds_fp8.recipe import Recipe

transformers = pytest.importorskip("transformers")


class Mixed(nn.Module):
    """A Linear, a Conv1D and two experts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(32, 48), transformers.pytorch_utils.Conv1D(32, 48)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_local_experts": 2, "num_hidden_layers": 1}
        config = transformers.MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, vocab_size=32)
        self.experts = transformers.models.mixtral.modeling_mixtral.MixtralExperts(config)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(torch.relu(self.up(x)))
        index = torch.arange(len(x))[:, None] % 2
        return self.experts(x, index, torch.ones(len(x), 1))


@pytest.mark.parametrize("kind", ["delayed", "current"])
def test_both_backends_compute_the_same(te, kind):
    found = []
    for backend in ("torch", "transformer_engine"):
        model = Mixed()
        plan = make_plan(model, settings(Recipe(kind=kind, amax_history_len=4)))
        swap_layers(model, replace(plan, fp8=replace(plan.fp8, backend=backend)))
        for step in range(2):
            model.zero_grad()
            x = torch.randn(16, 32, generator=torch.Generator().manual_seed(step)).requires_grad_()
            model(x).square().sum().backward()
        found.append((x.grad, model.up.weight.grad, model.down.weight.grad, model.experts.down_proj.grad))
        assert type(model.down).__name__ == "Fp8Conv1D" and type(model.experts).__name__ == "Fp8MixtralExperts"
        restore_layers(model)
        assert (type(model.up), type(model.down).__name__) == (nn.Linear, "Conv1D")
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6) and ours.any()


def test_a_library_norm_runs_torchs_kernel_beside_te(te):
    """Transformer Engine's norms replace nn.RMSNorm alone; `library_norms` is done for both backends."""
    norm = transformers.models.llama.modeling_llama.LlamaRMSNorm(32)
    model = nn.Sequential(norm, nn.Linear(32, 48))
    plan = make_plan(model, settings(layers=LayerSettings(library_norms=True)))
    swap_layers(model, replace(plan, fp8=replace(plan.fp8, backend="transformer_engine")))
    assert model[0] is norm and isinstance(norm, FusedRmsNorm)
    assert type(model[1]).__name__ == "TELinear"
    assert model(torch.randn(16, 32)).shape == (16, 48)
    restore_layers(model)
    assert not isinstance(norm, FusedRmsNorm) and type(model[1]) is nn.Linear
