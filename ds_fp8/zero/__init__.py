"""Mixins for DeepSpeed's ZeRO: quantized states instead of fp32 ones, FP8 instead of 16 bits on the wire.

DeepSpeed builds its own optimizer wrapper, with its own constructor and its own partitions; afterwards the finished
*instance* is specialised: `optimizer.__class__ = type("Fp8" + name, (mixins..., type(optimizer)), {})`. No constructor
is copied, so a new argument in DeepSpeed needs no change here. The mixins come from two families:

    states_*   masters share storage with the 16-bit partition; clip and unscale are applied in the step; checkpoints
               are written and read as fp32 flats (`states_view.py`), the exact quantized values beside them
    wire*      gradients are reduced to their owners as FP8 values; weights are gathered in quantized form (O3)

Contract for `engine` (one hook is enough, `DeepSpeedEngine._configure_optimizer`):

    configure_optimizer(original, engine, client_optimizer, model_parameters, plan, fp8_state) -> None
        Calls `original(engine, ...)` with our optimizer in place of the JSON's or the client's, and leaves a
        specialised `engine.optimizer`. During the call DeepSpeed's choice of master dtype is ours, and the wrappers of
        stage 0 are replaced by `Stage0Optimizer`; nothing stays patched afterwards. Call it only when `plan.optim` is
        not None.

    build_optimizer(engine, model_parameters, plan) -> ScaledAdam       from DeepSpeed's own `optimizer` section
    replace_client_optimizer(engine, client_optimizer, model_parameters, plan) -> ScaledAdam, ClientStates
        client Adam/AdamW (others refused by name), and what it has in its states
    specialize(engine, zero_optimizer, plan, fp8_state, given=ClientStates) -> zero_optimizer
        the same object; twice is once

    `configure_optimizer` uses these three; they are public for tests and for callers that bring their own order.

Which mixins serve which class of DeepSpeed is said once, in `specializing.SERVED`. `specialize` composes, first to
last, the wire's mixins (weights, gradients; as the plan asks), the states mixin, the adapters for the installed release
(`adapters`), DeepSpeed's class; afterwards it calls `wire.attach(engine, zero_optimizer, plan, fp8_state)`. Facts the
wire may rely on:

    optimizer.fp8_plan, .fp8_layers_state, .fp8_engine        set before any mixin method runs
    optimizer.fp8_masters: list[Tensor]                       this rank's partitions in the base dtype, one per group
        (`single_partition_of_fp32_groups` in stages 1 and 2, `fp32_partitioned_groups_flat` in stage 3); each shares
        its storage with the rank's own slice of the 16-bit weights, so nothing is copied back. Where states are
        offloaded it has its own storage instead, and at O3 in stages 1 and 2 from the first release of the 16-bit
        weights on.
    The step takes gradients in the base dtype or in fp32 (`averaged_gradients`), and multiplies by 1 / combined_scale
    inside ScaledAdam; gradients are never rescaled in place.
    After a load or a setter call `optimizer.fp8_weights_changed()` runs: O3 overrides it to gather its quantized values
    again.
"""

from __future__ import annotations

from typing import Any

__all__ = ["build_optimizer", "configure_optimizer", "replace_client_optimizer", "specialize"]


def __getattr__(name: str) -> Any:
    """Loaded when first asked for: `private_names` must import under any DeepSpeed, to say what is different there."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import specializing

    return getattr(specializing, name)
