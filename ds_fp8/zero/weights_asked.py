"""Who asks for O3's 16-bit weights, and whether all ranks do.

Hooks on the model notice `state_dict()` and `load_state_dict()`. Either may happen on one rank alone, where unmodified
ZeRO 1 and 2 need nobody else. So a rank asks in the store first (`comm.meeting`):

    state_dict, load_state_dict   alone: WeightError, with the ranks that are missing and the ways out
    the end of the engine         alone: the model keeps decoded weights

A forward asks nobody: in eval mode it reads the weights that this rank has. The hooks belong to this model: a copy or a
pickle of it (an average, a teacher) has none of them.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from ..comm.meeting import PATIENCE_S, Meeting
from ..errors import WeightError
from .weights import OwnedWeight

_optimizers = itertools.count()
"""O3 optimizers of this process: the same number on all ranks means the same one."""


class AskedTogether:
    """Meetings of the ranks that have shares of the same weights.

    weights  (process group, weights) of each part that is asked for by itself; a part is known by its index
    moment   steps so far: equal on all ranks that are at the same place of the script
    """

    def __init__(self, weights: Sequence[tuple[Any, Sequence[OwnedWeight]]]):
        self.moment = 0
        number = next(_optimizers)
        self._names = [[weight.name for weight in together] for _, together in weights]
        self._meetings = [
            Meeting(f"weights/engine{number}/group{index}", group) for index, (group, _) in enumerate(weights)
        ]

    def require_all(self, asked: str) -> None:
        """`require` for each part."""
        for index in range(len(self._meetings)):
            self.require(index, asked)

    def require(self, index: int, asked: str) -> None:
        """Return when all ranks of the group ask; raises WeightError when some have not come."""
        absent = self._meetings[index].absent(self.moment)
        if not absent:
            return
        names = self._names[index]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise WeightError(
            f"{asked}: at O3 the 16-bit values of {names[0] if names else 'the weights'}{more} are spread over all "
            f"ranks, but {_ranks(absent)} did not ask for them within {PATIENCE_S:.0f} s.\n"
            "  Call it on every rank (then save on one; a barrier before it if ranks come far apart), or use"
            " engine.save_16bit_model or engine.save_checkpoint, or keep weights in 16 bits: msamp/weight_wire_exclude."
        )

    def ends_together(self, index: int) -> bool:
        """Whether all ranks of the group end the engine."""
        absent = self._meetings[index].absent(self.moment)
        if absent:
            print(
                f"ds_fp8: {_ranks(absent)} did not end this engine; here its model keeps the values of the FP8 weights",
                flush=True,
            )
        return not absent


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) != 1 else ''} {shown}"


class _Hook:
    """One hook on one module of one engine. Copies of the module get a hook that does nothing."""

    __slots__ = ("module", "optimizer")

    def __init__(self, optimizer: Any, module: torch.nn.Module):
        self.optimizer, self.module = weakref.ref(optimizer), weakref.ref(module)

    def __call__(self, module: torch.nn.Module, *args: Any) -> None:
        if torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None:
            return  # what is written into a graph must not change under it
        optimizer = self.optimizer() if module is self.module() else None
        if optimizer is not None:
            self.act(optimizer, module)

    def act(self, optimizer: Any, module: torch.nn.Module) -> None:
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return nothing

    def __reduce__(self) -> Any:
        return _get_nothing, ()


def nothing(*args: Any) -> None:
    """What a hook is in a copied or unpickled module."""


def _get_nothing() -> Any:
    return nothing


class _BeforeStateDict(_Hook):
    def act(self, optimizer: Any, module: torch.nn.Module) -> None:
        optimizer.fp8_restore_if_all_ask("state_dict()")


class _BeforeLoad(_Hook):
    def act(self, optimizer: Any, module: torch.nn.Module) -> None:
        optimizer.fp8_restore_if_all_ask("load_state_dict()")
        optimizer.fp8_weights_replaced()


def watch_modules(optimizer: Any, root: torch.nn.Module, layers: Sequence[torch.nn.Module]) -> list[Any]:
    """Hooks on the root and on each layer with quantized values: state_dict() of any module that holds one is noticed.

    Returns handles that take them off. A hook holds neither the model nor the optimizer.
    """
    handles = []
    for module in dict.fromkeys([root, *layers]):
        handles.append(module.register_state_dict_pre_hook(_BeforeStateDict(optimizer, module)))
        handles.append(module.register_load_state_dict_pre_hook(_BeforeLoad(optimizer, module)))
    return handles
