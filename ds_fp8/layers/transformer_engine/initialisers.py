"""Initial values as nn.Linear and nn.LayerNorm draw them, in functions that pickle finds by name.

Transformer Engine keeps an initialiser for each parameter, and its own are functions made inside of functions: they
draw other values than the module that was replaced, and `torch.save` of a whole model refuses them.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from torch import nn


def set_initialisers(layer: Any) -> None:
    """Of `layer`, a te.Linear or te.LayerNormLinear of ours; `layer.reset_parameters()` draws from them."""
    bound = max(layer.in_features, 1) ** -0.5  # nn.Linear's for weight and bias
    for name, kept in list(layer.param_init_meta.items()):
        if name.startswith("layer_norm"):
            draw: Any = nn.init.ones_ if name.endswith("weight") else nn.init.zeros_
        else:
            draw = functools.partial(nn.init.uniform_, a=-bound, b=bound)
        layer.param_init_meta[name] = replace(kept, init_fn=draw)
