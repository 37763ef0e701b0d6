"""`fp8.compile`: torch.compile for a model's repeated blocks, in place, once its layers are converted.

Why blocks and not the whole model: equal blocks share one compilation, so starting takes seconds and not minutes; and a
compiled block meets attention as its model calls it. (Traced as a whole, transformers' models make a mask tensor, for
which torch has slower attention kernels only.) What a model does once stays as it is, embeddings and head; but its loss
over a vocabulary is compiled by itself (`compiled_loss`).

What is compiled is how a module is called, as `nn.Module.compile` does it, and nothing else: names, parameters, hooks
and the module itself stay. A block of Transformers' that checkpoints its activations calls `torch.utils.checkpoint` in
its own forward, where torch.compile stops; there the function that is checkpointed is compiled instead
(`CompiledInside`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config.settings import CompileSettings
from ..errors import BackendError
from .compiled_forms import CALL, as_scripted, give_form, remove_forms
from .compiled_loss import compile_losses

CHECKPOINT = "_gradient_checkpointing_func"
"""Where Transformers keeps what a block checkpoints its activations with."""


@dataclass(frozen=True)
class CompiledInside:
    """A block's `_gradient_checkpointing_func` whose function is compiled first; `checkpoint` is Transformers'."""

    checkpoint: Callable[..., Any]
    mode: str | None
    dynamic: bool | None

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if isinstance(function, functools.partial):  # of the block's forward and its named arguments
            function = functools.partial(
                _compiled(function.func, self.mode, self.dynamic), *function.args, **function.keywords
            )
        return self.checkpoint(function, *args, **kwargs)


@functools.cache
def _compiled(function: Callable[..., Any], mode: str | None, dynamic: bool | None) -> Callable[..., Any]:
    return torch.compile(function, mode=mode, dynamic=dynamic)


def compile_blocks(model: nn.Module, how: CompileSettings, converted: set[str], fp8_state: Any) -> None:
    """Compile the blocks of `model` that hold converted layers; the model itself where nothing repeats.

    converted  full names of the converted layers
    fp8_state  of the engine that asks: the compiled forms are its own (`compiled_forms`)
    A block that its owner has compiled already stays as it is. Raises BackendError where torch.compile does not run.
    """
    if not torch._dynamo.is_dynamo_supported():
        raise BackendError(
            f"fp8/compile: torch {torch.__version__} cannot compile on this Python or platform.\n  Set fp8/compile to "
            "false."
        )
    blocks = repeated_blocks(model, converted) if how.regional else {}
    mode = None if how.mode == "default" else how.mode
    for block in blocks.values() if blocks else (model,):
        before = as_scripted(block, CALL)
        if before not in ((), (None,)):
            continue
        checkpointing = _checkpointing(block)
        for module in checkpointing:
            inside = CompiledInside(as_scripted(module, CHECKPOINT)[0], mode, how.dynamic)
            give_form(module, fp8_state, CHECKPOINT, inside)
        if not checkpointing:
            block.compile(mode=mode, dynamic=how.dynamic)
            give_form(block, fp8_state, CALL, vars(block).get(CALL), before=before, is_whole=block is model)
    if blocks and how.loss:
        compile_losses(model, how, fp8_state)


def _checkpointing(block: nn.Module) -> list[nn.Module]:
    """The modules that checkpoint in their forward: the block, or layers in it (T5's two stacks are siblings of one
    class; their layers checkpoint).
    """
    inside = [module for module in block.modules() if _checkpoints_inside(module)]
    layers = [] if block in inside and _is_layer(block) else [module for module in inside if _is_layer(module)]
    return layers or [module for module in inside if module is block]


def _is_layer(module: nn.Module) -> bool:
    """Of Transformers' class whose forward checkpoints; by name, for it may not be installed."""
    return any(cls.__name__ == "GradientCheckpointingLayer" for cls in type(module).__mro__)


def _checkpoints_inside(module: nn.Module) -> bool:
    """Older Transformers checkpoint around a block's call, where `nn.Module.compile` reaches."""
    return (
        type(module).__call__ is nn.Module.__call__
        and getattr(module, "gradient_checkpointing", False)
        and bool(as_scripted(module, CHECKPOINT))
    )


def release_blocks(model: nn.Module, fp8_state: Any | None) -> None:
    """Undo `compile_blocks` of the engine of `fp8_state`; None: of every engine."""
    for module in model.modules():
        remove_forms(module, fp8_state)


def repeated_blocks(model: nn.Module, converted: set[str]) -> dict[str, nn.Module]:
    """The outermost modules that have a sibling of their class and hold converted layers: decoder layers, pipeline
    layers.
    """
    found: dict[str, nn.Module] = {}

    def holds(name: str) -> bool:
        return any(layer.startswith(f"{name}.") for layer in converted)

    def look(prefix: str, parent: nn.Module) -> None:
        children = [(f"{prefix}{name}", child) for name, child in parent.named_children()]
        kinds = [type(child) for name, child in children if holds(name)]
        for name, child in children:
            if not holds(name):
                continue
            if kinds.count(type(child)) > 1 and not isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                found[name] = child
            else:
                look(f"{name}.", child)

    look("", model)
    return found
