"""The four hooks around each module in ZeRO 3: before and after its forward, and a node on each side of its backward.

They call what DeepSpeed's hooks call, `pre_sub_module_forward_function` and its like of the offload object, and leave
out the rest (`hooks_stage3.py` says what, and puts them in the place of DeepSpeed's). Whatever is rarer goes to
DeepSpeed's own hook, one call at a time: functorch, compilers, unusual outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active
from torch.compiler import is_compiling

from .coordinator_stage3 import is_empty


def _is_eager() -> bool:
    return not (is_compiling() or _are_functorch_transforms_active())


def before_forward(offload: Any, original: Callable) -> Callable:
    """The hook that brings a module's parameters; `original` is DeepSpeed's, for calls that Dynamo traces."""

    def hook(module: nn.Module, inputs: Any) -> Any:
        if is_compiling():
            return original(module, inputs)
        offload.pre_sub_module_forward_function(module)
        return None

    return hook


def after_forward(offload: Any, original: Callable) -> Callable:
    """The hook that lets a module's parameters go; `original` is DeepSpeed's, for outputs that are parameters."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        if is_compiling() or not (_is_plain(output) or (type(output) is tuple and all(map(_is_plain, output)))):
            return original(module, inputs, output)
        FWD_MODULE_STACK.pop()
        offload.post_sub_module_forward_function(module)
        return None

    return hook


def _is_plain(value: Any) -> bool:
    """A tensor that is no parameter and stands for none; None."""
    return value is None or (type(value) is Tensor and not hasattr(value, "ds_param_alias"))


def around_backward(offload: Any, function: Any, original: Callable, *, counts: bool) -> Callable:
    """The hook that puts the node that starts, or ends, a module's backward behind its outputs, or before its inputs.

    function  DeepSpeed's torch.autograd.Function of that node
    original  DeepSpeed's hook, for calls that functorch or a compiler traces, and for unusual values
    counts    it is before the inputs, and DeepSpeed counts how many of them are left
    """
    # `Function.apply` binds arguments to signatures before it gets here.
    apply = super(torch.autograd.function.Function, function).apply

    def node(value: Any) -> Any:
        return apply(value) if value.requires_grad else value

    def hook(module: nn.Module, inputs: Any, output: Any = None) -> Any:
        if offload.fp8_skips and is_empty(module):  # whoever runs this: Dynamo may trace one of the two hooks alone
            return None
        values = inputs if counts else output
        if not _is_eager():
            return original(module, inputs) if counts else original(module, inputs, output)
        if counts:
            module.__dict__["ds_grads_remaining"] = 0
        if type(values) is Tensor:
            return node(values)
        if type(values) is tuple and all(value is None or type(value) is Tensor for value in values):
            return tuple(value if value is None else node(value) for value in values)
        return original(module, inputs) if counts else original(module, inputs, output)

    return hook
