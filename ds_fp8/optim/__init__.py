"""The optimizer station: one Adam, many codecs.

    codecs        how exp_avg and exp_avg_sq lie in `optimizer.state`, and their way to fp32 and back
    masters       the same for the master
    algorithm     which Adam: options that mean something here, and options that are refused by name
    scaled_adam   ScaledAdam and ScaledAdamW, torch.optim.Optimizers over flat partitions or ordinary parameters
    checkpointing       exact codes in a state_dict, validated before anything is touched
    client_optimizer    a client's Adam becomes ours, with hyper-parameters, groups and state

The arithmetic is in `numerics.adam`; `kernels.adam_step` does it in one pass over memory, wherever the tensors are.
"""

from __future__ import annotations

from .client_optimizer import client_states, take_over
from .scaled_adam import ScaledAdam, ScaledAdamW

__all__ = ["ScaledAdam", "ScaledAdamW", "client_states", "take_over"]
