"""The moment of change: DeepSpeed's finished wrapper becomes ours, in place.

`configure_optimizer` runs DeepSpeed's own `_configure_optimizer` with three things different, on this engine alone and
for the length of the call: the basic optimizer is ours, masters have the base dtype, and the fp32-copying wrappers of
stage 0 are not built. Then `specialize` changes the class of what DeepSpeed has built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero import utils as zero_utils
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from .. import optim
from ..errors import PlanError
from . import wire
from .states import ScaledStates
from .states_bf16 import StatesBF16
from .states_client import ClientStates
from .states_optimizer import build_optimizer, refuse_unsupported, take_over
from .states_stage0 import Stage0Optimizer
from .states_stage3 import StatesStage3
from .states_stage12 import StatesStage12

STATES: dict[type, type[ScaledStates]] = {
    DeepSpeedZeroOptimizer: StatesStage12,
    DeepSpeedZeroOptimizer_Stage3: StatesStage3,
    BF16_Optimizer: StatesBF16,
}


def configure_optimizer(
    original: Callable, engine: Any, client_optimizer: Any, model_parameters: Any, plan: Any, book: Any = None
) -> None:
    """DeepSpeed's `_configure_optimizer` with our Adam, states and wire. `engine.optimizer` is set afterwards."""
    refuse_unsupported(engine)
    client, given = None, ClientStates({})
    if client_optimizer is not None:
        client, given = take_over(engine, client_optimizer, model_parameters, plan)
    layout = plain_layout(engine, client_optimizer)

    def basic(parameters: Any) -> Any:
        return build_optimizer(engine, parameters, plan) if client is None else client

    def partitioned(configure: Callable) -> Callable:
        return lambda optimizer: specialize(engine, configure(optimizer), plan, book, layout=layout, given=given)

    def fp16(optimizer: Any, low_precision_dtype: torch.dtype) -> Any:
        return _stage0(engine, optimizer, low_precision_dtype, layout)

    hooks = {
        "_configure_basic_optimizer": basic,
        "_configure_fp16_optimizer": fp16,
        "_configure_zero_optimizer": partitioned(engine._configure_zero_optimizer),
        "_configure_bf16_optimizer": partitioned(engine._configure_bf16_optimizer),
    }
    register_optimizers()
    with _on_this_engine(engine, hooks), base_dtype_masters():
        # DeepSpeed refuses client optimizers under offload for their speed; ours is its own CPU optimizer.
        original(engine, None, model_parameters)
    if engine.optimizer is engine.basic_optimizer:
        engine.optimizer = _stage0(engine, engine.basic_optimizer, torch.float32, "bare")
    if isinstance(engine.optimizer, Stage0Optimizer):
        _attach_wire(engine, engine.optimizer, plan, book)


def specialize(
    engine: Any,
    zero_optimizer: Any,
    plan: Any,
    book: Any = None,
    *,
    layout: str = "fused",
    given: ClientStates | None = None,
) -> Any:
    """Graft states and wire onto an optimizer wrapper of DeepSpeed; the same object comes back. Twice is once.

    layout  of checkpoints, as `plain_layout` tells it
    given   states of a client's optimizer, cut to the partitions here
    """
    if isinstance(zero_optimizer, (ScaledStates, Stage0Optimizer)):
        return zero_optimizer
    base = type(zero_optimizer)
    states = STATES.get(base)
    if states is None:
        raise PlanError(
            f"msamp does not know DeepSpeed's optimizer wrapper {base.__name__}; it knows "
            f"{', '.join(known.__name__ for known in STATES)}.\n  Remove the msamp section, or what brings this wrapper."
        )
    zero_optimizer.fp8_engine, zero_optimizer.fp8_plan, zero_optimizer.fp8_book = engine, plan, book
    zero_optimizer.fp8_torch_step = layout == "unfused"
    mixins = (*wire.mixins(zero_optimizer, plan), states)
    zero_optimizer.__class__ = type("Fp8" + base.__name__, (*mixins, base), {"__module__": __name__})
    zero_optimizer.fp8_adopt_masters()
    if given is not None:
        given.adopt(zero_optimizer)
    _attach_wire(engine, zero_optimizer, plan, book)
    return zero_optimizer


def _attach_wire(engine: Any, optimizer: Any, plan: Any, book: Any) -> None:
    wire.attach(engine, optimizer, plan, book)


def register_optimizers() -> None:
    """Tell DeepSpeed that ZeRO may partition ours (an exact type test against a list)."""
    for cls in (optim.ScaledAdam, optim.ScaledAdamW):
        if cls not in zero_utils.ZERO_SUPPORTED_OPTIMIZERS:
            zero_utils.ZERO_SUPPORTED_OPTIMIZERS.append(cls)


def plain_layout(engine: Any, client_optimizer: Any) -> str:
    """Whose form a checkpoint would have without us: `unfused` with torch's Adam, `fused` with DeepSpeed's own."""
    if client_optimizer is not None:
        return "fused" if type(client_optimizer).__name__ == "FusedAdam" else "unfused"
    return "unfused" if (engine.optimizer_params() or {}).get("torch_adam", False) else "fused"


def _stage0(engine: Any, optimizer: Any, dtype: torch.dtype, layout: str) -> Stage0Optimizer:
    # Here and not above: older releases lack it, and there the seams refuse `msamp` with a list of what differs.
    from deepspeed.runtime.fp16.loss_scaler import LossScaleConfig, LossScaleProfile

    loss_scale_config = LossScaleConfig(
        low_precision_dtype=dtype,
        dynamic_loss_scale=engine.dynamic_loss_scale(),
        static_loss_scale=engine.loss_scale(),
        dynamic_loss_args=engine.dynamic_loss_scale_args(),
        profile=LossScaleProfile.FUSED,
        initial_dynamic_scale=engine.initial_dynamic_scale(),
    )
    return Stage0Optimizer(
        optimizer,
        engine,
        loss_scale_config=loss_scale_config,
        clip_grad=engine.gradient_clipping(),
        mpu=engine.mpu,
        layout=layout,
    )


@contextmanager
def _on_this_engine(engine: Any, hooks: dict[str, Callable]) -> Iterator[None]:
    """Methods of one engine replaced for a while; other engines and the class see nothing."""
    for name, hook in hooks.items():
        engine.__dict__[name] = hook
    try:
        yield
    finally:
        for name in hooks:
            engine.__dict__.pop(name, None)


@contextmanager
def base_dtype_masters() -> Iterator[None]:
    """Masters of our optimizers in the parameters' dtype, also under offload; others as DeepSpeed decides.

    DeepSpeed can keep 16-bit masters itself (`bf16_master_weights_and_grads`), but insists on its CPUAdam for offload.
    """
    original = ZeROOptimizer._configure_master_weights

    def configure(self: Any, *args: Any, **kwargs: Any) -> torch.dtype:
        if not isinstance(self.optimizer, (optim.ScaledAdam, optim.ScaledAdamW)):
            return original(self, *args, **kwargs)
        dtype = self.optimizer.param_groups[0]["params"][0].dtype
        self.fp16_master_weights_and_gradients = dtype == torch.float16
        self.bf16_master_weights_and_gradients = dtype == torch.bfloat16
        self.bf16_optimizer_states = dtype == torch.bfloat16
        return dtype

    ZeROOptimizer._configure_master_weights = configure
    try:
        yield
    finally:
        ZeROOptimizer._configure_master_weights = original
