"""The moment of change: DeepSpeed's finished wrapper becomes ours, in place.

`configure_optimizer` runs DeepSpeed's own `_configure_optimizer` with three things different, on this engine alone and
for the length of the call: the basic optimizer is ours, masters have the base dtype, and the fp32-copying wrappers of
stage 0 are not built. Then `specialize` changes the class of what DeepSpeed has built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero import utils as zero_utils
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from .. import optim
from ..errors import PlanError
from ..layers import ModelFp8State
from ..plan import Plan
from . import wire
from .adapters import adapters
from .states import ScaledStates
from .states_bf16 import StatesBF16
from .states_client import ClientStates
from .states_optimizer import build_optimizer, replace_client_optimizer
from .states_stage0 import Stage0Optimizer
from .states_stage0_scale import LossScale
from .states_stage3 import StatesStage3
from .states_stage12 import StatesStage12
from .touched import check_instance, touched
from .weights_stage3 import WeightsStage3
from .weights_stage12 import WeightsStage12
from .wire_stage3 import WireStage3
from .wire_stage12 import WireStage12

TOUCHED = {
    "Engine": touched(
        overrides=(
            "_configure_basic_optimizer _configure_bf16_optimizer _configure_fp16_optimizer _configure_zero_optimizer"
        ),
        reads="basic_optimizer gradient_clipping mpu optimizer optimizer_params",
        writes="bf16_master_weights_and_gradients bf16_optimizer_states fp16_master_weights_and_gradients optimizer",
    ),
    "ZeroOptimizer": touched(overrides="_configure_master_weights", writes="_configure_master_weights"),
}


@dataclass(frozen=True)
class Served:
    """One of DeepSpeed's optimizer wrappers, and what serves it.

    wrapper    DeepSpeed's class
    kind       what adapters and declarations call it
    states     the mixin for states in 8 bits
    gradients  the mixin for the gradient wire; None where the engine's all-reduce is the place (`wire_engine`)
    weights    the mixin for weights gathered in quantized form; None where no weights are gathered
    """

    wrapper: type
    kind: str
    states: type[ScaledStates]
    gradients: type | None
    weights: type | None


SERVED = (
    Served(DeepSpeedZeroOptimizer, "ZeroStage12", StatesStage12, WireStage12, WeightsStage12),
    Served(DeepSpeedZeroOptimizer_Stage3, "ZeroStage3", StatesStage3, WireStage3, WeightsStage3),
    Served(BF16_Optimizer, "Bf16", StatesBF16, None, None),
)
"""The one place that says which mixins serve which of DeepSpeed's classes."""


def served(zero_optimizer: Any) -> Served:
    """The row of a wrapper that DeepSpeed has built; PlanError for one that nothing here serves."""
    for row in SERVED:
        if isinstance(zero_optimizer, row.wrapper):
            return row
    raise PlanError(
        f"msamp does not know DeepSpeed's optimizer wrapper {type(zero_optimizer).__name__}; it knows "
        f"{', '.join(row.wrapper.__name__ for row in SERVED)}.\n  Remove the msamp section, or what brings this "
        "wrapper."
    )


def compose(zero_optimizer: Any, mixins: Sequence[type], kind: str | None = None) -> None:
    """Change the class of `zero_optimizer` to `mixins`, then the adapters for this DeepSpeed, then its own class."""
    base = type(zero_optimizer)
    kind = kind or served(zero_optimizer).kind
    bases = (*mixins, *adapters(kind, deepspeed.__version__), base)
    zero_optimizer.__class__ = type("Fp8" + base.__name__, bases, {"__module__": __name__})
    zero_optimizer.fp8_adapt()
    check_instance(zero_optimizer, kind, base)


def configure_optimizer(
    original: Callable,
    engine: Any,
    client_optimizer: Any,
    model_parameters: Any,
    plan: Plan,
    fp8_state: ModelFp8State | None = None,
) -> None:
    """DeepSpeed's `_configure_optimizer` with our Adam, states and wire. `engine.optimizer` is set afterwards."""
    plan = wire.settle_scope(plan)
    client, given = None, ClientStates({})
    if client_optimizer is not None:
        client, given = replace_client_optimizer(engine, client_optimizer, model_parameters, plan)
    layout = fp32_layout(engine, client_optimizer)

    def basic(parameters: Any) -> Any:
        return build_optimizer(engine, parameters, plan) if client is None else client

    def partitioned(configure: Callable) -> Callable:
        def configured(optimizer: Any) -> Any:
            made = configure(optimizer)
            try:
                return specialize(engine, made, plan, fp8_state, layout=layout, given=given)
            except BaseException:
                engine.optimizer = made  # whoever gives the model back finds what hangs on it
                raise

        return configured

    def fp16(optimizer: Any, low_precision_dtype: torch.dtype) -> Any:
        return _stage0(engine, optimizer, low_precision_dtype, layout)

    hooks: dict[str, Callable] = {
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
        _attach_wire(engine, engine.optimizer, plan, fp8_state)


def specialize(
    engine: Any,
    zero_optimizer: Any,
    plan: Plan,
    fp8_state: ModelFp8State | None = None,
    *,
    layout: str = "fused",
    given: ClientStates | None = None,
) -> Any:
    """Graft states and wire onto an optimizer wrapper of DeepSpeed; the same object comes back. Twice is once.

    layout  of checkpoints, as `fp32_layout` tells it
    given   states of a client's optimizer, cut to the partitions here
    """
    if isinstance(zero_optimizer, (ScaledStates, Stage0Optimizer)):
        return zero_optimizer
    row = served(zero_optimizer)
    kind = type(zero_optimizer)
    if kind is not row.wrapper:
        raise PlanError(
            f"msamp knows DeepSpeed's {row.wrapper.__name__}, and {kind.__name__} changes it in ways that"
            " it does not know.\n  Remove the msamp section, or what brings this wrapper."
        )
    zero_optimizer.fp8_engine, zero_optimizer.fp8_plan, zero_optimizer.fp8_layers_state = engine, plan, fp8_state
    zero_optimizer.fp8_torch_step = layout == "unfused"
    compose(zero_optimizer, (*wire_mixins(row, plan), row.states))
    zero_optimizer.fp8_shrink_masters()
    zero_optimizer.fp8_alias_masters()
    if given is not None:
        given.import_states(zero_optimizer)
    _attach_wire(engine, zero_optimizer, plan, fp8_state)
    return zero_optimizer


def wire_mixins(row: Served, plan: Plan) -> tuple[type, ...]:
    """What the plan's wire puts in front of the states; may be empty."""
    found: list[type | None] = []
    if plan.comm is not None and plan.comm.weight_wire != "none" and plan.comm.fp8_weights:
        if row.weights is None:
            raise PlanError(
                f"msamp/weight_wire is {plan.comm.weight_wire}, but {row.wrapper.__name__} is not one of ZeRO's "
                "optimizers for stages 1, 2 and 3, so no gathered weights travel in quantized form.\n  Set weight_wire "
                "to none (or opt_level to O2), or remove data_types/grad_accum_dtype so that DeepSpeed uses its ZeRO "
                "optimizer."
            )
        found.append(row.weights)
    if plan.comm is not None and plan.comm.gradient_wire != "none":
        found.append(row.gradients)
    return tuple(mixin for mixin in found if mixin is not None)


def _attach_wire(engine: Any, optimizer: Any, plan: Plan, fp8_state: ModelFp8State | None) -> None:
    wire.attach(engine, optimizer, plan, fp8_state)


def register_optimizers() -> None:
    """Tell DeepSpeed that ZeRO may partition ours (an exact type test against a list)."""
    for cls in optim.ALGORITHMS.values():
        if cls not in zero_utils.ZERO_SUPPORTED_OPTIMIZERS:
            zero_utils.ZERO_SUPPORTED_OPTIMIZERS.append(cls)


def fp32_layout(engine: Any, client_optimizer: Any) -> str:
    """Whose form a checkpoint would have without us: `unfused` with torch's Adam, `fused` with DeepSpeed's own."""
    if client_optimizer is not None:
        return "fused" if type(client_optimizer).__name__ in ("FusedAdam", "FusedLion") else "unfused"
    return "unfused" if (engine.optimizer_params() or {}).get("torch_adam", False) else "fused"


def _stage0(engine: Any, optimizer: Any, dtype: torch.dtype, layout: str) -> Stage0Optimizer:
    bases = (Stage0Optimizer, *adapters("Stage0", deepspeed.__version__), FP16_UnfusedOptimizer)
    cls = type("Fp8" + FP16_UnfusedOptimizer.__name__, bases, {"__module__": __name__})
    found = cls(
        optimizer,
        engine,
        loss_scale=LossScale.of(engine, dtype),
        clip_grad=engine.gradient_clipping(),
        mpu=engine.mpu,
        layout=layout,
    )
    check_instance(found, "Stage0", FP16_UnfusedOptimizer)
    return found


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
    if not hasattr(ZeROOptimizer, "_configure_master_weights"):
        yield  # `adapters/until_0_18_2.py`
        return
    original = ZeROOptimizer._configure_master_weights

    def configure(self: Any, *args: Any, **kwargs: Any) -> torch.dtype:
        if not isinstance(self.optimizer, optim.ScaledOptimizer):
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
