"""Amaxes, histories and scales of many tensors, in a few contiguous fp32 tensors; and `Scales`, what one step casts
with.

Contiguous, because then one collective reduces all amaxes and one small computation renews all scales, whatever the
number of layers. Columns:

    [0, 2n)   input and weight of layer 0, of layer 1, ...     e4m3
    [2n, 3n)  grad_output of layer 0, of layer 1, ...          e5m2 (HYBRID) or e4m3

A cast raises its column of `pending` to its amax. That may happen any number of times in a step (micro-batches,
recompute): a maximum does not mind. `update` takes `pending` into the histories, renews the scales and zeroes
`pending`.

Two copies of the scales are handed out, because two kinds of reader want opposite things:

    slots    at one address for ever, rewritten by each update: what a CUDA graph or a compiled forward reads
    current  a `Scales` that is never rewritten: what an eager forward keeps for its backward, however late that comes
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from ..formats import Format
from ..kernels import library_for
from ..numerics.scaling import scale_from_amax
from ..recipe import Recipe
from .amax_history import AmaxHistory, counts

WIDTH, SHOWN = 8, 4
"""fp32 per column of `slots`, and the place of the second scale_inv (in `kernels/triton/operands.py`, too). cuBLASLt
reads a scale only at multiples of 16 bytes.
"""

OUTGROWN = 2.0
"""How many times its scale's range a weight must have to be cast by its own (in `kernels/triton/weights.py`, too)."""


class Scales:
    """Scales of one step, never written again.

    frozen   [columns, 8] fp32: scale_inv, then scale; at SHOWN scale_inv again, which a GPU's cast of a gradient that
             is not finite turns into NaN for the rest of the step
    unknown  columns whose tensor has not been seen, or was all zeros whenever it was: no history tells their scale
    mask     [columns] bool on the device, false for those in `unknown`; None when there are none
    own      [columns, 2] int32, zeros: where a GPU's casts of weights measure (`kernels/triton/weights.py`)
    """

    def __init__(
        self,
        frozen: torch.Tensor,
        unknown: frozenset[int],
        mask: torch.Tensor | None,
        margin: int,
        own: torch.Tensor | None = None,
    ):
        self.frozen = frozen
        self.own = own
        self.margin = margin
        self.unknown = unknown
        self._mask = mask

    @cached_property
    def scale_inv(self) -> tuple[torch.Tensor, ...]:
        """0-d fp32 each."""
        return self.frozen.select(1, 0).unbind(0)

    @cached_property
    def scale(self) -> tuple[torch.Tensor, ...]:
        """0-d fp32 each."""
        return self.frozen.select(1, 1).unbind(0)

    @cached_property
    def shown(self) -> tuple[torch.Tensor, ...]:
        """0-d fp32 each: scale_inv, or NaN since a gradient was not finite."""
        return self.frozen.select(1, SHOWN).unbind(0)

    def of_weight(self, column: int, amax: torch.Tensor, fmt: Format) -> torch.Tensor:
        """The scale of a known column for a weight of this amax: its own where it is more than twice what the column's
        can take. No optimizer step does that, a script's write does.
        """
        known = self.scale[column]
        outgrown = torch.isfinite(amax) & (amax * known > OUTGROWN * fmt.max)
        if amax.device.type == "cpu" and not outgrown:
            return known
        return torch.where(outgrown, self.of_tensor(column, amax, fmt, given=True), known)

    def of_weights(self, columns: Sequence[int], amaxes: torch.Tensor, fmt: Format) -> list[torch.Tensor]:
        """`of_weight` of many weights at once."""
        known = torch.stack([self.scale[column] for column in columns])
        own = scale_from_amax(amaxes, fmt, margin=self.margin, previous=known)
        outgrown = torch.isfinite(amaxes) & (amaxes * known > OUTGROWN * fmt.max)
        return list(torch.where(outgrown, own, known).unbind(0))

    def of_tensor(self, column: int, amax: torch.Tensor, fmt: Format, *, given: bool = False) -> torch.Tensor:
        """The scale of a column in `unknown`: from the tensor's own amax, as if it had been seen a step ago.

        given  the history is another tensor's, whatever it tells
        """
        own = scale_from_amax(amax, fmt, margin=self.margin, previous=self.scale[column])
        # The host learns a step later than the device which columns are known (see `ScaleTensors`).
        return own if self._mask is None or given else torch.where(self._mask[column], self.scale[column], own)


class ScaleTensors:
    """What delayed scaling remembers of n layers.

    scales   [3n] fp32
    pending  [3n] fp32, amaxes since the last update
    slots    [3n, 8] fp32: scale_inv, scale, and scale_inv at SHOWN
    exact    Transformer Engine's rules to the bit: a tensor without history has scale 1, non-finite amaxes are
             remembered
    """

    def __init__(self, layers: int, recipe: Recipe, *, exact: bool, device: torch.device):
        self.layers, self.recipe, self.exact = layers, recipe, exact
        self._allocate(device)

    def _allocate(self, device: torch.device) -> None:
        count, split = 3 * self.layers, 2 * self.layers
        recipe = self.recipe
        self.device = device
        self.scales = torch.ones(count, dtype=torch.float32, device=device)
        self.pending = torch.zeros(count, dtype=torch.float32, device=device)
        self.slots = torch.ones(count, WIDTH, dtype=torch.float32, device=device)
        self.known = torch.zeros(count, dtype=torch.bool, device=device)
        self.own = torch.zeros(count, 2, dtype=torch.int32, device=device)
        self.forward = AmaxHistory(recipe, recipe.forward_format, self.scales[:split], keeps_non_finite=self.exact)
        self.backward = AmaxHistory(recipe, recipe.backward_format, self.scales[split:], keeps_non_finite=self.exact)
        self.pending_slots = self.pending.unbind(0)
        self.kernels = library_for(device) if device.type == "cuda" else None
        self._unknown = frozenset() if self.exact else frozenset(range(count))
        self._report: tuple[torch.Tensor, Any] | None = None
        self._take_snapshot(None)

    def to(self, device: torch.device) -> None:
        """Follow the model to its device; addresses change."""
        if device == self.device or device.type == "meta":
            return
        kept, pending, updates = self.tensors(), self.pending, (self.forward.updates, self.backward.updates)
        self._allocate(device)
        self.fill(kept, *updates)
        self.pending.copy_(pending)

    @property
    def standing(self) -> Scales:
        """The scales of every step at one address, for what a CUDA graph replays; whoever takes it does not outlive
        a step.
        """
        return Scales(self.slots, self._unknown, self.known if self._unknown else None, self.recipe.margin, self.own)

    # -- the update --------------------------------------------------------------------------------------------------

    def update(self) -> None:
        """Take `pending` into histories and scales, and zero it."""
        self._learn_known()
        if self.kernels is None:
            split = 2 * self.layers
            self.forward.update(self.pending[:split])
            self.backward.update(self.pending[split:])
            self.pending.zero_()
            self._take_snapshot(None)
            return
        frozen = torch.empty_like(self.slots)
        history, forward, backward = self.kernels.history, self.forward, self.backward
        history.update_scales(
            self.pending,
            self.scales,
            frozen,
            history.Half(forward.history, forward.spare, forward.format.max, forward.renews),
            history.Half(backward.history, backward.spare, backward.format.max, backward.renews),
            margin=self.recipe.margin,
            most_recent=self.recipe.amax_compute_algo == "most_recent",
            keeps_non_finite=self.exact,
        )
        forward.take_spare()
        backward.take_spare()
        self._take_snapshot(frozen)

    def _take_snapshot(self, frozen: torch.Tensor | None) -> None:
        if frozen is None:
            frozen = torch.empty_like(self.slots)
            frozen[:, 1] = self.scales
            torch.reciprocal(self.scales, out=frozen[:, 0])
            frozen[:, SHOWN] = frozen[:, 0]
        self.slots.copy_(frozen)
        mask = self.known.clone() if self._unknown else None
        self.current = Scales(frozen, self._unknown, mask, self.recipe.margin, self.own)

    def _learn_known(self) -> None:
        """Columns with an amax in `pending` have a history from now on.

        The host needs to know it to choose a one-pass cast. On a GPU it asks without waiting and reads the answer at
        the next update; until then the device chooses (`Scales.of_tensor`), so the numbers do not depend on when it
        learns.
        """
        if not self._unknown:
            return
        if self._report is not None:
            report, done = self._report
            done.synchronize()
            self._read(report)
        seen, split = counts(self.pending), 2 * self.layers
        # Where `interval` lets the scales stand, a column goes on without one.
        for half, renews in ((seen[:split], self.forward.renews), (seen[split:], self.backward.renews)):
            if not renews:
                half.zero_()
        torch.logical_or(self.known, seen, out=self.known)
        if self.device.type != "cuda":
            self._read(self.known)
            return
        report = torch.empty(self.known.shape, dtype=torch.bool, device="cpu", pin_memory=True)
        report.copy_(self.known, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        self._report = (report, done)

    def _read(self, known: torch.Tensor) -> None:
        self._unknown = frozenset(column for column, is_known in enumerate(known.tolist()) if not is_known)

    # -- state -------------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps, beside the numbers of updates and what is pending."""
        return {
            "scales": self.scales,
            "known": self.known,
            "forward_history": self.forward.history,
            "backward_history": self.backward.history,
        }

    def fill(self, tensors: dict[str, torch.Tensor], forward_updates: int, backward_updates: int) -> None:
        """Take over `tensors()` of the same layout; nothing is pending then."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])
        self.forward.updates, self.backward.updates = forward_updates, backward_updates
        self.pending.zero_()
        self._report = None
        if not self.exact:
            self._read(self.known)
        self._take_snapshot(None)
