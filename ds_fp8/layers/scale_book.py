"""The scale book: amax histories and scales of all FP8 layers of a model, in a few contiguous fp32 tensors.

One book per model, one page per layer. Contiguous, because then one collective reduces all amaxes and one small
computation renews all scales, whatever the number of layers. Columns of the scales:

    [0, 2n)   input and weight of layer 0, of layer 1, ...     e4m3
    [2n, 3n)  grad_output of layer 0, of layer 1, ...          e5m2 (HYBRID) or e4m3

Life of an amax: a cast records it into `pending` (MAX); when the next region opens, or `fold()` is called, pending is
MAX-reduced over the data-parallel group (`reduce_amax`), folded into the histories, and zeroed. The state is kept here
and not in the model's state_dict, which stays the plain model's; `checkpoint` saves `state_dict()` beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..kernels import library_for
from ..plan import Fp8Plan
from .amax_history import AmaxHistory
from .opaque import opaque
from .page import Call, Page
from .regions import Region, in_backward, tensors_of

VERSION = 1


class ScaleBook:
    """Scales of all FP8 layers of one model.

    names   fqn of the layers, in model order
    plan    the layers' part of the plan
    group   process group whose ranks share one history; None is the whole world
    steps   optimizer steps so far (see `weights_changed`)
    """

    def __init__(self, names: Sequence[str], plan: Fp8Plan, *, device: torch.device | str = "cpu", group: Any = None):
        self.names = tuple(names)
        self.plan = plan
        self.recipe = plan.recipe
        self.kind, self.is_delayed = plan.recipe.kind, plan.recipe.is_delayed
        self.forward_format, self.backward_format = plan.recipe.forward_format, plan.recipe.backward_format
        self.group = group
        self.steps = 0
        self.weights_version = 0
        self.pages = tuple(Page(self, index, fqn) for index, fqn in enumerate(self.names))
        self._by_name = dict(zip(self.names, self.pages, strict=True))
        self._depth = 0
        self._latest: Region | None = None
        self._in_backward: Region | None = None
        self._forward_pending = self._backward_pending = False
        self._allocate(torch.device(device))

    def page(self, fqn: str) -> Page:
        return self._by_name[fqn]

    # -- memory ------------------------------------------------------------------------------------------------------

    def _allocate(self, device: torch.device) -> None:
        count, split = 3 * len(self.names), 2 * len(self.names)
        self.scales = torch.ones(count, dtype=torch.float32, device=device)
        self.pending = torch.zeros(count, dtype=torch.float32, device=device)
        self.forward = AmaxHistory(self.recipe, self.recipe.forward_format, self.scales[:split])
        self.backward = AmaxHistory(self.recipe, self.recipe.backward_format, self.scales[split:])
        self._slots = self.pending.unbind(0)
        self._kernels = library_for(device) if torch.device(device).type == "cuda" else None

    def _move(self, device: torch.device) -> None:
        """Follow the model: DeepSpeed moves it to its device after the layers were swapped."""
        kept, pending, forward, backward = self._tensors(), self.pending, self.forward, self.backward
        self._allocate(device)
        self._fill(kept, forward.folds, backward.folds)
        self.pending.copy_(pending)
        self._latest = self._in_backward = None

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {
            "scales": self.scales,
            "forward_history": self.forward.history,
            "backward_history": self.backward.history,
        }

    def _fill(self, tensors: dict[str, torch.Tensor], forward_folds: int, backward_folds: int) -> None:
        for name, tensor in self._tensors().items():
            tensor.copy_(tensors[name])
        self.forward.folds, self.backward.folds = forward_folds, backward_folds

    # -- regions -----------------------------------------------------------------------------------------------------

    def watch(self, root: torch.nn.Module) -> None:
        """Open a region at each forward of `root`. Only delayed scaling needs to know where a forward begins."""
        if self.recipe.is_delayed:
            root.register_forward_pre_hook(self._before_root, prepend=True)
            root.register_forward_hook(self._after_root, always_call=True)

    def unwatch(self, root: torch.nn.Module) -> None:
        """Take our hooks off, by owner and not by handle: a copied model has hooks without handles."""
        for hooks in (root._forward_pre_hooks, root._forward_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                del hooks[key]
                root._forward_hooks_always_called.pop(key, None)

    @opaque
    def _before_root(self, root: torch.nn.Module, args: Any) -> None:
        if in_backward():
            return
        self._depth += 1
        if self._depth == 1:
            self._open(records=torch.is_grad_enabled() and root.training)

    @opaque
    def _after_root(self, root: torch.nn.Module, args: Any, output: Any) -> None:
        if in_backward() or self._depth == 0:
            return
        self._depth -= 1
        region = self._latest
        if self._depth or region is None or not torch.is_grad_enabled():
            return
        for tensor in tensors_of(output):
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient, region=region: self._enter_backward(region))

    def _enter_backward(self, region: Region) -> None:
        self._in_backward = region

    def _open(self, *, records: bool, implicit: bool = False) -> Region:
        frozen = torch.empty(3 * len(self.names), 4, dtype=torch.float32, device=self.scales.device)
        self._fold(frozen)
        self._latest = Region(frozen, records, implicit)
        self._in_backward = None
        return self._latest

    def _region_of(self, page: Page, training: bool) -> tuple[Region, bool]:
        """(region of a layer call happening now, whether it records)."""
        if in_backward():
            region = self._in_backward or self._latest or self._open(records=False, implicit=True)
            return region, False
        region = self._latest
        if self._depth > 0 and region is not None:
            return region, region.records
        stale = region is None or not region.implicit or region.saw_backward or page.index in region.seen
        if region is None or stale or region.records != training:
            region = self._open(records=training, implicit=True)
        region.seen.add(page.index)
        return region, region.records

    def call(self, page: Page, *, training: bool, device: torch.device) -> Call | None:
        """What a layer needs for one forward; None when it is to compute in high precision.

        A step before `start_step` is in high precision too, but fills the histories, so that FP8 starts with scales
        that fit.
        """
        if not (training or self.plan.eval):
            return None
        warming = self.steps < self.plan.start_step
        if not self.is_delayed:
            return None if warming else Call(page, None, False, False)
        if self.scales.device != device and device.type != "meta":
            self._move(device)
        region, records = self._region_of(page, training)
        if warming and not region.records:
            return None
        return Call(page, region, records, warming)

    def record(self, region: Region, column: int, amax: torch.Tensor) -> None:
        """MAX one amax (0-d fp32; inf stands for NaN) into what the next fold takes."""
        slot = self.raised_slot(region, column)
        torch.maximum(slot, amax, out=slot)

    def raised_slot(self, region: Region, column: int) -> torch.Tensor:
        """0-d fp32 slot of a column, which the caller raises to its amax on the device."""
        if column < 2 * len(self.names):
            self._forward_pending = True
        else:
            self._backward_pending = True
            region.saw_backward = True
        return self._slots[column]

    def expect(self, region: Region, *, forward: bool, backward: bool) -> None:
        """Somebody will write amaxes into the slots by himself (Transformer Engine's casts)."""
        self._forward_pending |= forward
        self._backward_pending |= backward
        # The write itself is not seen; an implicit region ends with the pass that may write.
        region.saw_backward |= backward and in_backward()

    def slot(self, column: int) -> torch.Tensor:
        """fp32 [1], a view into the pending amaxes."""
        return self._slots[column].reshape(1)

    def fold(self) -> None:
        """Bring recorded amaxes into histories and scales. Collective over `group` if `reduce_amax`: all ranks call it."""
        self._fold(None)

    def _fold(self, frozen: torch.Tensor | None) -> None:
        """Fold what is pending; then leave scale_inv and scale in `frozen`, if given (see `Region`)."""
        pending = self._forward_pending or self._backward_pending
        if pending and self.recipe.reduce_amax and _world_size(self.group) > 1:
            torch.distributed.all_reduce(self.pending, op=torch.distributed.ReduceOp.MAX, group=self.group)
        if self._kernels is not None:
            if pending or frozen is not None:
                self._fold_in_one_launch(frozen, pending)
        elif pending:
            split = 2 * len(self.names)
            if self._forward_pending:
                self.forward.fold(self.pending[:split])
            if self._backward_pending:
                self.backward.fold(self.pending[split:])
            self.pending.zero_()
        if frozen is not None and self._kernels is None:
            frozen[:, 1] = self.scales
            torch.reciprocal(self.scales, out=frozen[:, 0])
        self._forward_pending = self._backward_pending = False

    def _fold_in_one_launch(self, frozen: torch.Tensor | None, pending: bool) -> None:
        """All columns at once: to those of a half without amaxes (they are zero) nothing happens."""
        forward, backward, recipe = self.forward, self.backward, self.recipe
        history = self._kernels.history
        history.open_region(
            self.pending,
            self.scales,
            frozen,
            history.Half(forward.history, forward.spare, forward.format.max, forward.renews),
            history.Half(backward.history, backward.spare, backward.format.max, backward.renews),
            margin=recipe.margin,
            most_recent=recipe.amax_compute_algo == "most_recent",
            fold=pending,
        )
        if pending:
            forward.take_spare(folded=self._forward_pending)
            backward.take_spare(folded=self._backward_pending)

    # -- weights -----------------------------------------------------------------------------------------------------

    def weights_changed(self) -> None:
        """An optimizer step was taken, or weights were loaded: cached weight codes are stale, a step is counted."""
        self.steps += 1
        self.weights_version += 1
        for page in self.pages:
            page.cached_weight = page.ready = None  # a byte per parameter that nobody will read again

    def weight_scale(self, layer: torch.nn.Module | str) -> torch.Tensor:
        """0-d scale with which the layer would cast its weight in the next region (delayed scaling).

        Folds what is pending, so on several ranks call `fold()` on all of them first.
        """
        self.fold()
        return self.scales[self._page_of(layer).weight_column].clone()

    def record_weight_amax(self, layer: torch.nn.Module | str, amax: torch.Tensor) -> None:
        """The amax of a weight that somebody else cast for the layer (O3); recorded when the layer next uses it."""
        self._page_of(layer).staged_weight_amax = amax

    def _page_of(self, layer: torch.nn.Module | str) -> Page:
        return self._by_name[layer] if isinstance(layer, str) else layer.page

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and values, on CPU. Folds first, so it is collective like `fold`: call it on all ranks."""
        self.fold()
        return {
            "version": VERSION,
            "names": list(self.names),
            "recipe": self.recipe.kind,
            "steps": self.steps,
            "forward_folds": self.forward.folds,
            "backward_folds": self.backward.folds,
            **{name: tensor.detach().cpu().clone() for name, tensor in self._tensors().items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> list[str]:
        """Take over a saved state, by layer name; returns one line for each thing that did not fit.

        Layers that the state does not know start fresh; a history of another length keeps its newest entries. Raises
        CheckpointError, before anything is changed, when the state is not one of ours or is damaged.
        """
        from .book_state import match_state

        tensors, notes = match_state(state, self)
        self._fill(tensors, int(state["forward_folds"]), int(state["backward_folds"]))
        self.steps = int(state["steps"])
        self.weights_version += 1
        self.pending.zero_()
        self._forward_pending = self._backward_pending = False
        self._latest = self._in_backward = None
        for page in self.pages:
            page.forget_weight()
        return notes

    # -- copies ------------------------------------------------------------------------------------------------------

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles carry scales and histories. Codes are made again; a process group cannot be pickled."""
        kept = (self._tensors(), self.pending, self.forward.folds, self.backward.folds, self.steps)
        return _rebuild, (self.names, self.plan, *kept, self._forward_pending, self._backward_pending)

    def __deepcopy__(self, memo: dict[int, Any]) -> ScaleBook:
        """A copied model (an EMA, say) gets a book of its own, and shares the process group."""
        rebuild, arguments = self.__reduce__()
        twin = rebuild(*arguments)
        twin.group = self.group
        memo[id(self)] = twin
        return twin


def _rebuild(
    names: tuple[str, ...],
    plan: Fp8Plan,
    tensors: dict[str, torch.Tensor],
    pending: torch.Tensor,
    forward_folds: int,
    backward_folds: int,
    steps: int,
    forward_pending: bool,
    backward_pending: bool,
) -> ScaleBook:
    book = ScaleBook(names, plan, device=pending.device)
    book._fill(tensors, forward_folds, backward_folds)
    book.pending.copy_(pending)
    book.steps = steps
    book._forward_pending, book._backward_pending = forward_pending, backward_pending
    return book


def _world_size(group: Any) -> int:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    return torch.distributed.get_world_size(group)
