"""Stacked experts that compute in FP8: a module's class is changed in place, its parameters and names are not.

An implementation of transformers' registry (`config._experts_implementation`) would not do: one configuration is shared
by experts that are converted and experts that are kept, is read when a model generates, and is saved with it. Where FP8
is off (eval, before `start_step`) the module computes as it would have: by whatever implementation its configuration
names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import has_torch_function_unary

from ..errors import BackendError
from ..plan import ModuleDecision
from ..plan.expert_rules import rule_of
from . import compiled_experts
from .as_original import ORIGINAL
from .experts_forward import StackedLinear, forward_of
from .experts_state import STATE, ExpertsState
from .once import once_for_each
from .opaque import opaque
from .ordinary import in_transform, is_ordinary

if TYPE_CHECKING:
    from .fp8_state import ModelFp8State


class Fp8Experts:
    """Mixed into the class of a converted module, in front of it."""

    def forward(self, *args: Any, **named: Any) -> Any:
        state: ExpertsState = self._ds_fp8_experts  # type: ignore[assignment, attr-defined]
        if torch.compiler.is_compiling() and state.traces and state.is_whole(self):  # type: ignore[arg-type]
            training = self.training or (state.trains_in_eval and torch.is_grad_enabled())  # type: ignore[attr-defined]
            if (training or state.runs_in_eval) and not in_transform():
                return compiled_experts.forward(self, state, *args, **named)
            if not has_torch_function_unary(getattr(self, state.rule.weights[0])):  # released (O3)
                return super().forward(*args, **named)  # type: ignore[misc]
        return self._run(*args, **named)

    @opaque
    def _run(self, *args: Any, **named: Any) -> Any:
        state: ExpertsState = self.__dict__[STATE]
        active = state.is_active(self)  # type: ignore[arg-type]
        special = active and not _is_ordinary(self, args, named)  # type: ignore[arg-type]
        if special or not active:
            if state.ran is not None:
                state.ran.called, state.ran.special = True, state.ran.special or special
            with _readable(self, state):  # type: ignore[arg-type]
                return state.original.forward(self, *args, **named)
        return forward_of(state)(self, StackedLinear(self, state), *args, **named)  # type: ignore[arg-type]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """`to`, `cuda` and their like: the name for compiled graphs follows."""
        super()._apply(fn, recurse)  # type: ignore[misc]
        self.__dict__[STATE].settle(getattr(self, self.__dict__[STATE].rule.weights[0]).device)
        return self

    def extra_repr(self) -> str:
        state = self.__dict__[STATE]
        numerics = state.fp8_state.recipe.of_experts(whole=state.decision.whole_experts)
        return f"{super().extra_repr()} {numerics}".strip()  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copied and pickled as the module it was, and converted again: the class itself exists in this process
        only.
        """
        attributes = {name: value for name, value in self.__dict__.items() if name != STATE}
        return _rebuilt, (self.__dict__[STATE].original, self.__dict__[STATE], attributes)


def _is_ordinary(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Whether FP8 casts can take a call with these arguments; else the class computes as it did before."""
    tensors = [one for one in (*args, *named.values()) if isinstance(one, torch.Tensor)]
    return all(is_ordinary(one, *module._parameters.values()) for one in tensors)


def convert(module: nn.Module, decision: ModuleDecision, fp8_state: ModelFp8State) -> ExpertsState:
    """Turn `module` into FP8 experts, in place; its state. Raises BackendError if it is none of a known kind."""
    rule = rule_of(module)
    if rule is None:
        raise BackendError(f"{decision.fqn}: {type(module).__name__} holds no experts of a known kind; plan again.")
    state = ExpertsState(fp8_state, rule, type(module), decision)
    take_state(module, state)
    return state


def take_state(module: nn.Module, state: ExpertsState | None) -> None:
    """Compute by `state` from now on; None: as the class computed before, though the module stays ours."""
    if state is None:
        module.__class__ = module.__dict__[STATE].original
        return
    module.__class__ = fp8_class(state.original)
    module.__dict__[STATE] = state
    state.settle(module.get_parameter(state.rule.weights[0]).device)


@contextmanager
def _readable(module: nn.Module, state: ExpertsState) -> Iterator[None]:
    """Released weights as the values that they read as, decoded once: a loop over experts reads them again and again.
    Their gradients go to the Parameters.
    """
    released = {name: module._parameters[name] for name in state.rule.weights if name in module._parameters}
    released = {name: weight for name, weight in released.items() if has_torch_function_unary(weight)}
    for name, weight in released.items():
        assert weight is not None
        module._parameters[name] = weight.view_as(weight)  # type: ignore[assignment]
    try:
        yield
    finally:
        module._parameters.update(released)


def restore(module: nn.Module) -> nn.Module:
    """The unmodified module again, in place."""
    module.__class__ = module.__dict__.pop(STATE).original
    module.__dict__.pop(ORIGINAL, None)
    return module


@once_for_each
def fp8_class(original: type[nn.Module]) -> type[nn.Module]:
    """The FP8 version of a class of experts."""
    return type(f"Fp8{original.__name__}", (Fp8Experts, original), {"__module__": __name__})


def _rebuilt(original: type[nn.Module], state: ExpertsState, attributes: dict[str, Any]) -> nn.Module:
    module = original.__new__(original)
    module.__dict__.update(attributes)
    take_state(module, state)
    return module
