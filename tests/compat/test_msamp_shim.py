"""The shim for `msamp`: found where Accelerate looks, honest about what it lacks, gone when asked."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys

import pytest
import torch
from torch import nn

from ds_fp8 import compat
from ds_fp8.errors import DsFp8Error
from ds_fp8.optim import ScaledAdamW


@pytest.fixture
def msamp():
    from ds_fp8 import engine

    was_active = engine.is_active()
    compat.install()
    import msamp

    yield msamp
    compat.uninstall()
    if not was_active:
        engine.deactivate()


def test_found_as_module_and_as_distribution(msamp):
    """Accelerate asks for the module and for the distribution `ms-amp`."""
    assert importlib.util.find_spec("msamp") is not None
    assert importlib.metadata.metadata("ms-amp")["Version"] == msamp.__version__


def test_deepspeed_is_deepspeed(msamp):
    """`from msamp import deepspeed` gives DeepSpeed's own names; activation teaches them our sections."""
    import deepspeed as real
    from msamp import deepspeed

    from ds_fp8 import engine

    assert deepspeed.initialize is real.initialize
    assert deepspeed.add_config_arguments is real.add_config_arguments
    assert engine.is_active()


@pytest.mark.parametrize(
    ("config", "section"),
    [
        ({"train_batch_size": 1}, {"enabled": True, "opt_level": "O2"}),
        ({"msamp": {"enabled": True, "opt_level": "O3"}}, {"enabled": True, "opt_level": "O3"}),
        ({"fp8": {"enabled": True}}, None),
    ],
)
def test_accelerates_recipe_counts_where_the_json_says_nothing(msamp, monkeypatch, config, section):
    """`Accelerator(kwargs_handlers=[MSAMPRecipeKwargs("O2")])` writes no section itself: the job would train in
    bf16.
    """
    import types

    import deepspeed as real

    given = []
    monkeypatch.setattr(real, "initialize", lambda **kwargs: given.append(kwargs["config_params"]))
    accelerator = types.SimpleNamespace(msamp_recipe_handler=types.SimpleNamespace(opt_level="O2"))
    names = {"__name__": "accelerate.accelerator", "msamp_deepspeed": msamp.deepspeed}
    exec("def prepare(self, config):\n    msamp_deepspeed.initialize(config_params=config)", names)
    before = dict(config)
    names["prepare"](accelerator, config)
    assert given[0].get("msamp") == section and config == before


@pytest.mark.parametrize("opt_level", ("O1", "O2"))
def test_initialize_without_deepspeed(msamp, opt_level):
    """FP8 layers and quantized states on a torch model; the loss falls, the parameters stay the same objects."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))
    params = list(model.parameters())
    model, optimizer = msamp.initialize(model, torch.optim.AdamW(model.parameters(), lr=1e-2), opt_level=opt_level)
    assert isinstance(optimizer, ScaledAdamW)
    assert [id(p) for p in model.parameters()] == [id(p) for p in params]
    assert any(type(module) is not nn.Linear and "Linear" in type(module).__name__ for module in model.modules())
    x, y = torch.randn(64, 32), torch.randn(64, 16)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        msamp.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_what_is_missing_is_named(msamp):
    with pytest.raises(AttributeError, match=r"msamp\.nn"):
        msamp.nn
    with pytest.raises(DsFp8Error, match="use_fsdp"):
        msamp.initialize(nn.Linear(16, 16), use_fsdp=True)
    with pytest.raises(ValueError, match="O9"):
        msamp.initialize(nn.Linear(16, 16), opt_level="O9")


def test_refused_beside_the_real_package(tmp_path, monkeypatch):
    """A package of that name on the path wins, and the message says which."""
    (tmp_path / "msamp.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(DsFp8Error, match=r"msamp\.py"):
        compat.install()
    assert "msamp" not in sys.modules


def test_uninstall_leaves_nothing():
    from ds_fp8 import engine

    was_active = engine.is_active()
    compat.install()
    compat.uninstall()
    if not was_active:
        engine.deactivate()
    assert not compat.is_installed()
    assert importlib.util.find_spec("msamp") is None
