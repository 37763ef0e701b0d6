"""`deepspeed.zero.GatheredParameters` on weights that O3 has released in ZeRO 1 and 2.

DeepSpeed's context asks a parameter for `ds_id`, which only ZeRO 3 gives it; on others it does nothing, since in ZeRO 1
and 2 every rank has every weight. At O3 it has quantized values. So while an optimizer with released weights lives, the
context does for them what it does in ZeRO 3: inside it the 16-bit weights are whole, and it is collective.

    modifier_rank None   writes to released weights go when the context closes, as in ZeRO 3
    modifier_rank r      r's values reach all ranks, the 16-bit weights and the masters. The quantized values are
                         dropped: until the next step layers cast the new weights themselves, to the same values

Elements that nobody wrote keep the low bits of their master. Parameters of other engines, and jobs without O3, meet
DeepSpeed's own context.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import GatheredParameters

_optimizers: weakref.WeakSet[Any] = weakref.WeakSet()
_originals: dict[str, Callable] = {}


def watch(optimizer: Any) -> None:
    """Let GatheredParameters know this optimizer, for as long as it lives."""
    _optimizers.add(optimizer)
    weakref.finalize(optimizer, _restore_when_idle)
    if not _originals:
        for name, make in {"__init__": _collecting, "__enter__": _entering, "__exit__": _leaving}.items():
            _originals[name] = original = getattr(GatheredParameters, name)
            setattr(GatheredParameters, name, functools.wraps(original)(make(original)))


def unwatch(optimizer: Any) -> None:
    """Its weights are whole from now on."""
    _optimizers.discard(optimizer)
    _restore_when_idle()


def _restore_when_idle() -> None:
    """The class as DeepSpeed wrote it, once no optimizer is left that needs more."""
    if not list(_optimizers):
        for name, original in _originals.items():
            setattr(GatheredParameters, name, original)
        _originals.clear()


def _collecting(original: Callable) -> Callable:
    def init(
        self: Any, params: Any, modifier_rank: int | None = None, fwd_module: Any = None, enabled: bool = True
    ) -> None:
        if isinstance(params, Iterable) and not isinstance(params, torch.Tensor):
            params = list(params)  # a generator can be read once only
        original(self, params, modifier_rank, fwd_module, enabled)
        listed = params if isinstance(params, list) else [params]
        self.fp8_owners = _owners(listed, modifier_rank) if enabled else []
        self.fp8_open = ExitStack()

    return init


def _owners(params: list[Any], modifier_rank: int | None) -> list[Callable]:
    """For each optimizer that owns some of `params`: what makes its context, in an order equal on all ranks."""
    place = {id(param): number for number, param in enumerate(params)}
    found = []
    for optimizer in _optimizers:
        own = [param for param in optimizer.fp8_stored_params() if id(param) in place]
        if own:
            first = min(place[id(param)] for param in own)
            found.append((first, functools.partial(optimizer.fp8_gathered, own, modifier_rank)))
    return [make for _, make in sorted(found, key=lambda pair: pair[0])]


def _entering(original: Callable) -> Callable:
    def enter(self: Any) -> Any:
        result = original(self)
        for make in self.fp8_owners:
            self.fp8_open.enter_context(make())
        return result

    return enter


def _leaving(original: Callable) -> Callable:
    def leave(self: Any, *exc: Any) -> Any:
        self.fp8_open.__exit__(*exc)
        return original(self, *exc)

    return leave
