"""A job whose loss is no number stops with the reason, instead of running on and reporting 0.0.

DeepSpeed skips a step whose gradients overflow where it looks (fp16 always, bf16 by default). A step that it takes with
a loss or a gradient norm that is not finite has destroyed the weights of all ranks, and nothing says so: Transformers'
Trainer logs NaN as 0.0. So each step leaves one flag, and after `fp8/max_nonfinite_steps` bad steps in a row the job
ends.

    skipped steps    neither count nor break the row; in bf16 as many of them in a row are reported once
    cost             one flag on the device for each step; on a GPU it is read a step later, so nothing waits
    all ranks alike  the norm is the same everywhere, and a loss that is no number makes it none; where DeepSpeed
                     computes no norm (fp32 without ZeRO and without clipping) ranks exchange the flag
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import NonFiniteError
from ..zero.touched import touched
from .heard_losses import hear_losses
from .printing import print_rank_0

TOUCHED = {
    "Engine": touched(reads="device fp16_enabled global_steps optimizer"),
    "AnyWrapper": touched(reads="_global_grad_norm overflow"),
}

SHOWN = 4
"""Parameters and layers named in the error."""


class NonFiniteGuard:
    """Counts bad steps of one attached engine."""

    def __init__(self, engine: Any, model: Any, limit: int):
        self.engine, self.model, self.limit = engine, model, limit
        self.count = self.skipped = 0
        self._losses: list[torch.Tensor] = []
        self._pending: tuple[torch.Tensor, Any] | None = None

    def listen(self) -> None:
        """Note the losses of a step as long as the engine lives."""
        hear_losses(self.engine, self._note_loss)

    def _note_loss(self, loss: torch.Tensor) -> None:
        self._losses.append(loss)

    def after_step(self) -> None:
        """Raises NonFiniteError when the limit is reached."""
        losses, self._losses = self._losses, []
        if bool(getattr(self.engine.optimizer, "overflow", False)):
            self._report_skips()
            return
        self.skipped = 0
        flag = self._flag(losses)
        if flag is None:
            return
        on_host = flag
        if flag.device.type != "cpu":
            on_host = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=flag.is_cuda)
        event = None
        if on_host is not flag:
            on_host.copy_(flag, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        before, self._pending = self._pending, (on_host, event)
        # On a host nothing has to be waited for: this step counts now.
        self._count(self._pending if event is None else before)

    def _report_skips(self) -> None:
        """In fp16 the loss scale falls until it fits; elsewhere nothing changes from one skipped step to the next."""
        self.skipped += 1
        if self.skipped == self.limit and not self.engine.fp16_enabled():
            print_rank_0(
                f"WARNING: step {self.engine.global_steps}: DeepSpeed has skipped {self.skipped} steps in a row, as "
                "the gradients are not finite; without a loss scale nothing will cure that"
            )

    def _flag(self, losses: list[torch.Tensor]) -> torch.Tensor | None:
        """0-d bool: this step was bad; None where there is nothing to look at."""
        norm = getattr(self.engine, "_global_grad_norm", None)
        values = [loss.float() for loss in losses]
        if norm is not None:
            device = values[0].device if values else self.engine.device
            values.append(torch.as_tensor(norm, dtype=torch.float32, device=device).reshape(()))
        flag = ~torch.isfinite(torch.stack(values)).all() if values else None
        if norm is None:
            flag = self._exchange(flag)
        return flag

    def _exchange(self, flag: torch.Tensor | None) -> torch.Tensor:
        import deepspeed.comm as dist

        own = torch.zeros((), dtype=torch.float32, device=self.engine.device) if flag is None else flag.float()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(own, op=dist.ReduceOp.MAX)
        return own > 0

    def _count(self, found: tuple[torch.Tensor, Any] | None) -> None:
        if found is None:
            return
        flag, event = found
        if event is not None:
            event.synchronize()
        self.count = self.count + 1 if bool(flag) else 0
        if self.count >= self.limit:
            raise NonFiniteError(self._reason())

    def _reason(self) -> str:
        bad = [name for name, value in self.model.named_parameters() if value.numel() and not _is_finite(value)]
        more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        weights = (
            f"weights that are no numbers any more: {', '.join(bad[:SHOWN])}{more}"
            if bad
            else "all weights here are finite"
        )
        return (
            f"step {self.engine.global_steps}: the loss or the gradient norm was not finite in {self.count} steps in a "
            f"row, and DeepSpeed took these steps; {weights}.\n"
            "  Go back to a checkpoint from before, and look at the data, the learning rate and gradient_clipping; in "
            "bf16, bf16/check_grad_overflow true skips such steps.\n"
            "  fp8/max_nonfinite_steps says after how many steps a job stops (0: never)."
        )


def _is_finite(value: torch.Tensor) -> bool:
    try:
        return bool(torch.isfinite(value.detach()).all())
    except RuntimeError:  # a weight that only its layer may read
        return True
