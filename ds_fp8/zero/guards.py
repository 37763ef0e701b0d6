"""What torch.compile must be told when a Parameter changes its class and its memory where it stands.

Dynamo takes a dict of parameters that nobody has written to since for one whose tensors are as they were, and then
leaves their guards out (torch 2.11: `use_recursive_dict_tags_for_guards`). A weight that is released, or gets its
16 bits back, changes inside of such a dict.
"""

from __future__ import annotations

from torch import nn


def put_in_again(module: nn.Module, param: nn.Parameter) -> None:
    """Write `param` to its places in `module`, so that the next call looks at its guards; order and names stay."""
    held = module._parameters
    for name in [name for name, one in held.items() if one is param]:
        held[name] = None
        held[name] = param
