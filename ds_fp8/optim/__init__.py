"""The optimizer station: a few algorithms, many codecs.

    codecs                    how exp_avg and exp_avg_sq lie in `optimizer.state`, and their way to fp32 and back
    masters                   the same for the master
    algorithm                 checks of options, numbers and gradients that all algorithms share
    scaled_optimizer          what they share: a torch.optim.Optimizer over flat partitions or separate parameters
    pieces                    a gradient that a step takes chunk by chunk, and frees
    scaled_adam, scaled_lion  the algorithms: which states, and the step
    checkpointing             exact quantized values in a state_dict, validated before anything is touched
    client_optimizer          a client's optimizer becomes ours, with hyper-parameters, groups and state

The arithmetic is in `numerics.adam` and `numerics.lion`; `kernels.adam_step` and `lion_step` do it in one pass over
memory, wherever the tensors are.
"""

from __future__ import annotations

from .client_optimizer import algorithm_of, client_states, replace_client_optimizer
from .scaled_adam import ScaledAdam, ScaledAdamW
from .scaled_lion import ScaledLion
from .scaled_optimizer import SEED, ScaledOptimizer

ALGORITHMS: dict[str, type[ScaledOptimizer]] = {
    "adam": ScaledAdam,
    "adamw": ScaledAdamW,
    "lion": ScaledLion,
}
"""The class of every algorithm in `ds_fp8.algorithms`."""

__all__ = [
    "ALGORITHMS",
    "SEED",
    "ScaledAdam",
    "ScaledAdamW",
    "ScaledLion",
    "ScaledOptimizer",
    "algorithm_of",
    "client_states",
    "replace_client_optimizer",
]
