"""For tools of torch that read a layer's class instead of calling it.

torch.fx           traces into every module that is not torch's own, by the name of its class's file, and could not
                   trace an FP8 layer: told that it is, it leaves one call in its graph, and that stays in FP8
torch.jit.script   compiles the source of the class: refused with a way out. (A counterpart of the original class
                   could be handed to it, but torch 2.13 puts that into the script's own model for good.)
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import LayerError

ORIGINAL = "_ds_fp8_original"
"""Attribute that remembers the class a layer had."""

HOME = "__module__"
"""Attribute that torch.fx asks for; in the instance it hides the class's own."""


def show_home(module: nn.Module) -> None:
    """torch.fx takes a layer for what it was."""
    original = module.__dict__.get(ORIGINAL)
    if original is not None:
        module.__dict__[HOME] = original.__module__


def refuse_script(layer: Any) -> nn.Module:
    """What torch.jit.script calls before it compiles, by the name `__prepare_scriptable__`. Raises LayerError."""
    raise LayerError(
        f"torch.jit.script cannot compile {type(layer).__name__}. Script the unmodified model:\n"
        "  torch.jit.script(ds_fp8.layers.restore_layers(copy.deepcopy(engine.module))), or engine.module after"
        " engine.destroy()."
    )
