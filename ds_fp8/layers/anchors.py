"""Anchors: a compiled graph names a layer by a tensor, because a Python object would be guarded.

torch.compile turns attributes of modules into constants of the graph, and compiles anew for each layer and whenever one
changes. Tensors are inputs instead. So each layer owns one small tensor: its address is the layer's name at run time,
looked up without reading the device; a copy, which some tools make of all inputs, is known by its value. Equal layers
then share one compilation, and what changes from step to step stays behind the name.

For CUDA graphs the address is declared as one that stays. When what a layer does changes for good (`start_step` is
reached, a history has begun), it gets another anchor: torch then records the graph once more, without compiling.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch

from ..errors import LayerError

_by_address: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_by_number: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


def make_anchor(layer_state: Any, device: torch.device) -> torch.Tensor:
    """A new name for `layer_state` (a LayerFp8State, or the state of experts): int64 [1] on `device`. The caller keeps
    it, and all earlier ones, for as long as `layer_state` lives.
    """
    number = next(_numbers)
    with torch.inference_mode(False):
        anchor = torch.full((1,), number, dtype=torch.int64, device=device)
    if device.type != "meta":
        torch._dynamo.mark_static_address(anchor)
        _by_address[anchor.data_ptr()] = layer_state
        _by_number[number] = layer_state
    return anchor


def layer_state_of(anchor: torch.Tensor) -> Any:
    """The layer state that `anchor` names. Raises LayerError when its model is gone."""
    layer_state = _by_address.get(anchor.data_ptr())
    if layer_state is None and not (anchor.is_cuda and torch.cuda.is_current_stream_capturing()):
        layer_state = _by_number.get(int(anchor))  # waits for the device
    if layer_state is None:
        raise LayerError(
            "a compiled FP8 layer was run after its model was gone, or in a CUDA graph with a copy of its anchor.\n"
            "  Compile the model again after moving, copying or exporting it."
        )
    return layer_state
