"""Which calls of a layer FP8 casts can take.

The casts are kernels that read memory. torch has many ways to call a layer with something else: transforms that hand
over tensors with a hidden axis, derivatives that travel with a tensor, tracers that write down what is called. A layer
takes such a call in high precision, as the layer that it was.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd import forward_ad

_MODES = torch._C._TorchDispatchModeKey


def is_ordinary(input: torch.Tensor, *params: torch.Tensor | None) -> bool:
    """Whether FP8 casts can take a call with this input, and these weights and biases.

    Not inside transforms of torch.func (vmap, grad, jvp, jacrev), nor where the input or a parameter carries a
    forward-mode derivative: both ask an operator for rules of its own. Not under torch.jit.trace and make_fx. Not for
    tensors that are no dense memory: nested (jagged and strided), sparse, subclasses.
    """
    if type(input) is not torch.Tensor and type(input) is not nn.Parameter:
        return False
    if tracing() is not None or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if input.is_nested or input.layout != torch.strided:
        return False
    return forward_ad._current_level < 0 or not any(map(_has_tangent, (input, *params)))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def in_transform() -> bool:
    """For code that torch.compile traces, which guards both facts itself: inside a transform of torch.func, or where
    forward-mode derivatives travel.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def tracing() -> str | None:
    """What writes down the operators that are called now, instead of only calling them. Not torch.compile and
    torch.export, which ask a layer by `torch.compiler.is_compiling()`.
    """
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace"
    if torch._C._len_torch_dispatch_stack() and not torch.compiler.is_compiling():
        if torch._C._get_dispatch_mode(_MODES.PROXY) is not None:
            return "make_fx"
        if torch._C._get_dispatch_mode(_MODES.FAKE) is not None and torch._guards.TracingContext.try_get() is None:
            return "FakeTensorMode"
    return None


def _has_tangent(tensor: torch.Tensor | None) -> bool:
    if tensor is None:
        return False
    with torch._C.DisableTorchFunctionSubclass():  # a released weight (O3) has none, and is not to be decoded for that
        return forward_ad.unpack_dual(tensor).tangent is not None
