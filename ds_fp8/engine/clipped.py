"""One line, once, when delayed scaling has clipped a tensor far beyond its range (`layers/clipped.py`).

cost      two numbers on the device for each step, until the line is out; on a GPU they are read a step later, so
          nothing waits
all ranks the amaxes are those of all ranks (`reduce_amax`), so rank 0 speaks for them
"""

from __future__ import annotations

from typing import Any

import torch

from ..layers.clipped import WORTH_A_WORD, ClippedColumns
from ..zero.touched import touched
from .printing import print_rank_0

TOUCHED = {"Engine": touched(reads="global_steps")}

ROLES = "input", "weight"


class ClippedReport:
    """Looks at the steps of one attached engine until there is something to say."""

    def __init__(self, engine: Any, fp8_state: Any):
        self.engine, self.fp8_state = engine, fp8_state
        self._columns = ClippedColumns()
        self._before: tuple[torch.Tensor, Any, int] | None = None
        fp8_state.before_update = self.look

    def stop(self) -> None:
        self.fp8_state.before_update = None

    def look(self) -> None:
        """Before the amaxes of a step go into the histories."""
        found, step = self._columns.largest(self.fp8_state.tensors), self.engine.global_steps + 1
        if found.device.type != "cuda":
            self._read(found, step)
            return
        on_host = torch.empty(found.shape, dtype=found.dtype, device="cpu", pin_memory=True)
        on_host.copy_(found, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        before, self._before = self._before, (on_host, event, step)
        if before is not None:
            before[1].synchronize()
            self._read(before[0], before[2])

    def _read(self, found: torch.Tensor, step: int) -> None:
        excess, column = found.tolist()
        if WORTH_A_WORD < excess < float("inf"):
            self.stop()
            print_rank_0(f"WARNING: {self.text(excess, int(column), step)}")

    def text(self, excess: float, column: int, step: int) -> str:
        names, split = self.fp8_state.names, 2 * len(self.fp8_state.names)
        name = names[column // 2 if column < split else column - split] or "the model itself"
        role = ROLES[column % 2] if column < split else "grad_output"
        return (
            f"step {step}: the {role} of {name} was {excess:.0f} times as large as its history lets pass (recipe "
            "delayed), and was clipped: what was computed from it is wrong.\n"
            "  Where a script does something else with a model than train it (gradients of another thing than the "
            "loss, batches of another kind), use fp8/recipe current, or do it in eval mode. Said once."
        )
