"""What torch.compile must be told when a Parameter changes its class and its memory where it stands.

Dynamo takes a dict of parameters that nobody has written to since for one whose tensors are as they were, and then
leaves their guards out (torch 2.11: `use_recursive_dict_tags_for_guards`). A weight that is released, or gets its
16 bits back, changes inside of such a dict.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

_layers: Any = WeakIdKeyDictionary()
"""Parameter -> its layer, weakly both, of those that were released once."""


def put_in_again(module: nn.Module, param: nn.Parameter) -> None:
    """Write `param` to its places in `module`, so that the next call looks at its guards; order and names stay."""
    held = module._parameters
    for name in [name for name, one in held.items() if one is param]:
        held[name] = None
        held[name] = param
    _layers[param] = weakref.ref(module)


def memory_changed(param: Any) -> None:
    """The same for a caller that has the Parameter alone; nothing for one that was never put in again."""
    layer = _layers.get(param, lambda: None)()
    if layer is not None:
        put_in_again(layer, param)
