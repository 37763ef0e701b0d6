"""RMS norms of model libraries: known by what they compute, faster in place, the same model otherwise."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from ds_fp8.capabilities import Host
from ds_fp8.config.settings import LayerSettings
from ds_fp8.layers import restore_layers
from ds_fp8.plan import make_plan
from ds_fp8.plan.known_norms import RmsNorm, rms_norm_of
from tests.layers.small_models import settings, swapped

transformers = pytest.importorskip("transformers")


def norms() -> dict[str, nn.Module]:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    torch.manual_seed(0)
    made = {
        "llama": LlamaRMSNorm(32, eps=1e-5),
        "qwen3": Qwen3RMSNorm(32),
        "t5": T5LayerNorm(32),
        "gemma": GemmaRMSNorm(32),
    }
    for norm in made.values():
        nn.init.uniform_(norm.weight, -1, 1)
    return made


class Half(nn.Module):
    """Looks like one of them, and adds eps outside the root."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(32)), 1e-3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.eps) * self.weight


class Model(nn.Module):
    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm, self.up = norm, nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.norm(x))


def test_known_by_what_they_compute():
    found = {name: rms_norm_of(norm) for name, norm in norms().items()}
    assert found == {
        "llama": RmsNorm(1e-5, False),
        "qwen3": RmsNorm(1e-6, False),
        "t5": RmsNorm(1e-6, False),
        "gemma": RmsNorm(1e-6, True),
    }
    assert rms_norm_of(Half()) is None
    assert rms_norm_of(nn.LayerNorm(32)) is None
    assert rms_norm_of(nn.Embedding(4, 32)) is None


class Grouped(nn.Module):
    """RMS norm of each group; of the whole row where there is one."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.weight, self.eps, self.groups = nn.Parameter(torch.ones(32)), 1e-5, groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = x.unflatten(-1, (self.groups, -1))
        return nn.functional.rms_norm(parts, parts.shape[-1:], eps=self.eps).flatten(-2) * self.weight


def test_what_only_looks_like_one_in_a_single_call_stays():
    """Falcon-H1's norm takes a gate too; and equal classes of equal size may compute different things."""
    from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RMSNormGated

    assert rms_norm_of(FalconH1RMSNormGated(32)) is None
    assert [rms_norm_of(Grouped(groups)) for groups in (1, 2, 1)] == [RmsNorm(1e-5, False), None, RmsNorm(1e-5, False)]
    patched = norms()["llama"]
    patched.forward = lambda hidden_states: hidden_states  # type: ignore[method-assign]
    assert rms_norm_of(patched) is None


@pytest.mark.parametrize("name", ["llama", "qwen3", "t5", "gemma"])
def test_the_fused_norm_is_the_same_function(name):
    """fp32: to its rounding. bf16: to one rounding, since the library's own rounds twice; gradients likewise."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2**-7)):
        results = []
        for fused in (False, True):
            model = Model(norms()[name]).to(dtype)
            if fused:
                swapped(model, layers=LayerSettings(library_norms=True))
                assert type(model.norm).__name__.startswith("Fp8")
            x = torch.randn(4, 32, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
            y = model.norm(x)
            y.float().pow(2).sum().backward()
            assert y.dtype == dtype
            results.append([one.float() for one in (y.detach(), x.grad, model.norm.weight.grad)])
        for baseline, ours in zip(*results):
            assert (baseline - ours).abs().max() <= 4 * tolerance * baseline.abs().max()


def test_the_model_stays_what_it_was():
    """Names, Parameters, copies, pickles; and the library's class comes back."""
    model = Model(norms()["llama"])
    cls, weight, names = type(model.norm), model.norm.weight, list(model.state_dict())
    swapped(model, layers=LayerSettings(library_norms=True))
    assert isinstance(model.norm, cls) and model.norm.weight is weight and list(model.state_dict()) == names
    x = torch.randn(2, 32)
    for copied in (copy.deepcopy(model.norm), pickle.loads(pickle.dumps(model.norm))):
        assert type(copied) is type(model.norm) and torch.equal(copied(hidden_states=x), model.norm(x))
    restore_layers(model)
    assert type(model.norm) is cls and not [name for name in vars(model.norm) if name.startswith("_ds_fp8")]


def test_one_graph_under_torch_compile():
    model = Model(norms()["gemma"])
    swapped(model, layers=LayerSettings(library_norms=True))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 32)
    assert torch.equal(compiled(x), model(x))


def test_without_the_key_the_norm_stays():
    model = Model(norms()["llama"])
    cls = type(model.norm)
    swapped(model)
    assert type(model.norm) is cls


def test_auto_replaces_them_on_a_gpu_only():
    """Whichever backend: Transformer Engine's norms replace torch's alone."""
    model = Model(norms()["llama"])
    for backend in ("torch", "transformer_engine"):
        host = Host("cuda", "NVIDIA H100", (9, 0), "2.20.2", "")
        targets = {module.fqn: module.target for module in make_plan(model, settings(backend=backend), host=host).swaps}
        assert targets["norm"] == "Fp8RMSNorm"
        layers = LayerSettings(library_norms=False)
        assert "norm" not in [
            one.fqn for one in make_plan(model, settings(backend=backend, layers=layers), host=host).swaps
        ]
    assert "norm" not in [one.fqn for one in make_plan(model, settings(), host=Host()).swaps]
