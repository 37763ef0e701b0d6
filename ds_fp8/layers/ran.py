"""What an FP8 layer has really done: written where the products run, read once, after the first step.

A plan says which layers shall multiply in FP8. A layer that is never called, or whose weight somebody else multiplies
by (fused losses read `lm_head.weight`), does not, and nothing in the plan can know.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..recipe import HighPrecision
from .experts_state import STATE


class Ran:
    """The products of one layer since it was asked to watch.

    called                    the layer's forward ran, in FP8 or not
    fprop, dgrad, wgrad       ran in FP8, or are in high precision by the plan beside others that ran
    wants_dgrad, wants_wgrad  a forward in FP8 expects them in its backward
    small                     a call had so few rows that all products ran in high precision, as faster
    special                   a call ran in high precision because FP8 casts cannot take it (`ordinary.is_ordinary`)
    """

    __slots__ = ("called", "dgrad", "fprop", "small", "special", "wants_dgrad", "wants_wgrad", "wgrad")

    def __init__(self) -> None:
        self.called = self.fprop = self.dgrad = self.wgrad = self.wants_dgrad = self.wants_wgrad = False
        self.small = self.special = False

    def forward(self, high: HighPrecision, *, dgrad: bool, wgrad: bool) -> None:
        """A forward multiplied; `dgrad`, `wgrad`: products that its backward will be asked for."""
        self.called = True
        if high.fprop and high.dgrad and high.wgrad:
            return  # before `start_step`
        self.fprop = True
        if dgrad and not high.dgrad:
            self.wants_dgrad = True
        if wgrad and not high.wgrad:
            self.wants_wgrad = True

    def backward(self, high: HighPrecision, *, dgrad: bool, wgrad: bool) -> None:
        if dgrad and not high.dgrad:
            self.dgrad = True
        if wgrad and not high.wgrad:
            self.wgrad = True

    def bits(self) -> int:
        """All of it as one number."""
        return sum(int(getattr(self, name)) << place for place, name in enumerate(self.__slots__))


def has(bits: int, name: str) -> bool:
    """Whether `Ran.bits` tells of `name`."""
    return bool(bits >> Ran.__slots__.index(name) & 1)


def note_by_hook(
    ran: Ran, output: torch.Tensor, high: HighPrecision, input: torch.Tensor, weight: torch.Tensor
) -> None:
    """For products that know no layer: they have run forward; a hook on their output tells when they run backward."""
    grad = torch.is_grad_enabled()
    dgrad, wgrad = grad and input.requires_grad, grad and weight.requires_grad
    ran.forward(high, dgrad=dgrad, wgrad=wgrad)
    if output.requires_grad:
        output.register_hook(lambda gradient: ran.backward(high, dgrad=dgrad, wgrad=wgrad))


def _state_of(module: nn.Module) -> Any:
    """The object whose `ran` the products of a layer write to; None for a module that multiplies nothing in FP8."""
    return vars(module).get("layer_state") or vars(module).get(STATE)


def watch(modules: Iterable[nn.Module], *, on: bool) -> list[Ran]:
    """Begin to watch, with nothing done yet; or end it."""
    watched = []
    for module in modules:
        ran = Ran()
        state = _state_of(module)
        if state is not None:
            state.ran = ran if on else None
        watched.append(ran)
    return watched
