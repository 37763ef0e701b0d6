"""A released weight and a script's hooks on saved tensors (`torch.autograd.graph.save_on_cpu`).

Transformer Engine hands the weight to `save_for_backward`, though it multiplies with quantized values. A hook is given
bare memory, past the Parameter's own reads, and of a released weight (O3) there is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def passed_by_hooks(weight: torch.Tensor) -> Iterator[None]:
    """Within, hooks on saved tensors get everything but `weight`, which the backward finds as it is."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None:
        yield
        return
    pack, unpack = hooks
    own = weight.untyped_storage()._cdata

    def pack_others(tensor: torch.Tensor) -> Any:
        return weight if tensor.untyped_storage()._cdata == own else (pack(tensor),)

    def unpack_others(packed: Any) -> torch.Tensor:
        return unpack(packed[0]) if isinstance(packed, tuple) else packed

    with torch.autograd.graph.saved_tensors_hooks(pack_others, unpack_others):
        yield
