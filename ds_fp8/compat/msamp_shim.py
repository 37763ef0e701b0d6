"""The contents of the shim: MS-AMP's public names, done by ds_fp8.

    msamp.initialize(model, optimizer, opt_level, use_te)    FP8 layers and Adam states without DeepSpeed (torch, DDP)
    msamp.deepspeed.*                                        DeepSpeed's own names; its `initialize` reads our sections
    msamp.clip_grad_norm_                                    torch's: gradients are tensors here

What lies deeper (`msamp.optim.LBAdamW`, `msamp.nn.ScalingParameter`, FSDP, Megatron) has no counterpart and says so.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

from ..levels import OPT_LEVELS

VERSION = "0.4.0"
"""The last release of MS-AMP, whose names these are."""


def initialize(model: Any, optimizer: Any = None, opt_level: str = "O1", use_te: bool = False, **unknown: Any) -> Any:
    """FP8 layers in `model`, and an Adam with states in the formats of `opt_level`; returns both.

    The parameters stay the same objects: a DDP wrapper, a scheduler or a reference made before goes on working.
    Without DeepSpeed nothing is partitioned and gradients travel as DDP sends them.
    """
    import torch

    from .. import config, optim
    from ..errors import PlanError
    from ..layers import swap_layers
    from ..plan import make_plan

    if unknown:
        raise PlanError(
            f"msamp.initialize: {', '.join(sorted(unknown))} not supported by the shim.\n"
            "  FSDP and Megatron are not served; under DeepSpeed use the msamp section of the JSON."
        )
    if not isinstance(model, torch.nn.Module):
        raise ValueError("msamp.initialize: model must be an instance of torch.nn.Module")
    if opt_level not in OPT_LEVELS:
        raise ValueError(f"msamp.initialize: opt_level {opt_level!r} is not one of {', '.join(OPT_LEVELS)}")
    base_dtype = _base_dtype(model)
    section: dict[str, Any] = {"enabled": True, "opt_level": opt_level, "use_te": use_te}
    # Nothing is partitioned or gathered here, so O3's weight wire has nothing to carry.
    section |= {"gradient_wire": "none", "weight_wire": "none"}
    settings = config.load(
        {"train_batch_size": 1, "msamp": section, base_dtype: {"enabled": True}}
        if base_dtype != "fp32"
        else {"train_batch_size": 1, "msamp": section},
        where="msamp.initialize",
    )
    plan = make_plan(model, settings, device=next(model.parameters()).device, world_size=1)
    assert plan.optim is not None, "the settings have a msamp section"
    if optimizer is None:
        optimizer = torch.optim.AdamW(model.parameters())
    ours = optim.replace_client_optimizer(optimizer, level=plan.optim.level, base_dtype=base_dtype, seed=optim.SEED)
    fp8_state = swap_layers(model, plan, managed=True)
    if fp8_state is not None:
        ours.register_step_pre_hook(lambda *_: fp8_state.update_scales())
        ours.register_step_post_hook(lambda *_: fp8_state.weights_changed())
    print(plan.banner(), flush=True)
    return model, ours


def _base_dtype(model: Any) -> str:
    names = {"torch.bfloat16": "bf16", "torch.float16": "fp16"}
    return names.get(str(next(model.parameters()).dtype), "fp32")


def clip_grad_norm_(parameters: Any, max_norm: float, norm_type: float = 2.0, **options: Any) -> Any:
    """torch's own."""
    import torch

    return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, **options)


class _DeepSpeed(types.ModuleType):
    """`msamp.deepspeed`: every name of DeepSpeed, looked up when it is used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        import deepspeed

        found = getattr(deepspeed, name)
        level = _level_asked_of_accelerate(sys._getframe(1)) if name == "initialize" else None
        return found if level is None else _with_level(found, level)


def _level_asked_of_accelerate(frame: types.FrameType) -> str | None:
    """`opt_level` of the MSAMPRecipeKwargs that this caller's Accelerator was given.

    Accelerate 1.10 to 1.15 writes a `msamp` section for its plugin's `enable_msamp` and its YAML, and none for this
    handler: without one DeepSpeed would train in bf16 and say nothing.
    """
    if not frame.f_globals.get("__name__", "").startswith("accelerate."):
        return None
    handler = getattr(frame.f_locals.get("self"), "msamp_recipe_handler", None)
    return getattr(handler, "opt_level", None)


def _with_level(initialize: Callable, opt_level: str) -> Callable:
    """DeepSpeed's `initialize` with the section that the handler stands for; sections in the JSON have the last word.

    Accelerate makes such a handler by itself where `mixed_precision: fp8` finds neither torchao nor Transformer Engine.
    """

    @functools.wraps(initialize)
    def with_level(*args: Any, **kwargs: Any) -> Any:
        from ..engine.printing import print_rank_0
        from ..engine.sections import sections_of

        config = kwargs.get("config_params")
        if isinstance(config, dict) and not sections_of(config):
            kwargs["config_params"] = {**config, "msamp": {"enabled": True, "opt_level": opt_level}}
        elif isinstance(config, dict) and "msamp" not in config:
            print_rank_0(
                f"the JSON has an fp8 section and no msamp section: opt_level {opt_level} of Accelerate's "
                "MSAMPRecipeKwargs is not used"
            )
        return initialize(*args, **kwargs)

    return with_level


class _MSAMP(types.ModuleType):
    """`msamp`: what is not here is named."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(
            f"msamp.{name}: not served by the shim of ds_fp8, which has initialize, deepspeed and clip_grad_norm_."
        )


def modules() -> list[types.ModuleType]:
    """Fresh modules `msamp` and `msamp.deepspeed`."""
    package, inner = _MSAMP("msamp", __doc__), _DeepSpeed("msamp.deepspeed", "DeepSpeed with ds_fp8 active.")
    package.__dict__.update(
        initialize=initialize,
        clip_grad_norm_=clip_grad_norm_,
        deepspeed=inner,
        opt_levels=list(OPT_LEVELS),
        ds_fp8_shim=True,
        __version__=VERSION,
        __path__=[],
        __all__=["clip_grad_norm_", "deepspeed", "initialize"],
    )
    inner.__dict__["ds_fp8_shim"] = True
    return [package, inner]
