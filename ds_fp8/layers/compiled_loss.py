"""`fp8.compile.loss`: torch.compile for the loss over a vocabulary that a Hugging Face model calls itself.

With 128256 words and 8192 tokens the logits are 2.1 GB in bf16. Written out, the loss copies them to fp32, shifts,
takes the log-softmax, and does as much again backward: some 38 GB move. Compiled it reads the logits twice, writes
their gradient once, and no fp32 copy lies in memory. The sums are those of fp32 in another order.

Such a model calls `self.loss_function(logits=..., labels=..., vocab_size=...)`: a property of its class, which gives a
function, and which a script may set on the model. What a script has set stays as it is; so do losses without a
vocabulary, which are small and call what no compiler reads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..config.settings import CompileSettings
from .compiled_forms import as_scripted, give_form

PLACE = "_loss_function"
"""Attribute in which transformers keeps a `loss_function` that was set (4.48 to 5.24)."""


class CompiledLoss:
    """`function` under torch.compile; itself where a compiler traces the model around it. Copied and pickled as what it
    was made of.
    """

    def __init__(self, function: Callable[..., torch.Tensor], dynamic: bool | None):
        self.function, self.dynamic = function, dynamic
        # Not in the mode of the blocks: a CUDA graph would first copy the logits to a place of its own.
        self._compiled = torch.compile(function, dynamic=dynamic)

    def __call__(self, *args: Any, **named: Any) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return self.function(*args, **named)
        # A backward that gives its buffers away runs once: `loss.backward(retain_graph=True)` would be refused.
        with torch._functorch.config.patch(donated_buffer=False):
            found: torch.Tensor = self._compiled(*args, **named)
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return CompiledLoss, (self.function, self.dynamic)


def compile_losses(model: nn.Module, how: CompileSettings, fp8_state: Any) -> None:
    """Compile the losses over a vocabulary that modules of `model` call, for the engine of `fp8_state`."""
    for module in model.modules():
        function = _own_loss(module)
        if function is not None and "vocab_size" in inspect.signature(function).parameters:
            give_form(module, fp8_state, PLACE, CompiledLoss(function, how.dynamic))


def _own_loss(module: nn.Module) -> Callable[..., torch.Tensor] | None:
    """The function that the property `loss_function` of the module's class gives; None where a script has set
    another.
    """
    given = inspect.getattr_static(type(module), "loss_function", None)
    if not isinstance(given, property) or given.fset is None or as_scripted(module, PLACE):
        return None
    # A model without a head has the property, calls no loss, and warns when it is asked. (GPT2LMHeadModel's name tells
    # transformers no type, and it calls the default one.)
    if not isinstance(getattr(module, "loss_type", None), str) and module.get_output_embeddings() is None:  # type: ignore[operator]
        return None
    function: Any = module.loss_function
    if isinstance(function, CompiledLoss):  # another engine's
        function = function.function
    return function if inspect.isfunction(function) else None
