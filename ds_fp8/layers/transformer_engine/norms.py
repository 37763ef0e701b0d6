"""te.LayerNorm and te.RMSNorm in place of torch's: high precision, fused kernels, the same Parameters.

Neither computes in FP8; Transformer Engine's kernels are only faster, and are what its fused layers build on. They
always have a weight, a LayerNorm also a bias, over the last dimensions: the plan keeps norms that lack one. torch's
RMSNorm has `eps=None` for the epsilon of the input's dtype, which te.RMSNorm cannot follow from call to call, so it is
resolved from the weight's dtype here.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from ...errors import BackendError
from .names import load


@functools.cache
def norm_class(kind: str) -> type[nn.Module]:
    """Our subclass of the installed te.LayerNorm or te.RMSNorm, whose state_dict has torch's names only."""
    base = getattr(load().pytorch, kind)
    members = {"get_extra_state": nn.Module.get_extra_state, "set_extra_state": nn.Module.set_extra_state}
    return type(f"TE{kind}", (base,), members | {"__module__": __name__, "__qualname__": f"TE{kind}"})


def make_norm(source: Any) -> nn.Module:
    """The Transformer Engine norm with the Parameters of `source`, an nn.LayerNorm or nn.RMSNorm.

    Raises BackendError when it has no weight, or a LayerNorm no bias: Transformer Engine cannot represent that.
    """
    kind = type(source).__name__
    needed = ("weight", "bias") if kind == "LayerNorm" else ("weight",)
    lacking = [name for name in needed if source._parameters.get(name) is None]
    if lacking:
        raise BackendError(f"te.{kind} always has {' and '.join(needed)}; this one lacks {' and '.join(lacking)}.")
    weight = source._parameters["weight"]
    assert weight is not None
    eps = source.eps
    if eps is None:
        eps = torch.finfo(weight.dtype).eps
    layer = norm_class(kind)(source.normalized_shape, eps=eps, device="meta", dtype=weight.dtype)
    for name in needed:
        layer._parameters[name] = source._parameters[name]
    layer.__dict__["norm_arguments"] = (tuple(source.normalized_shape), source.eps)
    return layer.train(source.training)


def restore_norm(layer: Any) -> nn.Module:
    """torch's norm again, with the same Parameters."""
    kind = nn.LayerNorm if "bias" in layer._parameters else nn.RMSNorm
    shape, eps = layer.__dict__["norm_arguments"]
    unmodified = kind(shape, eps=eps, device="meta")
    for name in unmodified._parameters:
        unmodified._parameters[name] = layer._parameters[name]
    return unmodified.train(layer.training)


def __getattr__(name: str) -> Any:
    """`TELayerNorm` and `TERMSNorm` by name, for copy and pickle."""
    if name in ("TELayerNorm", "TERMSNorm"):
        return norm_class(name[2:])
    raise AttributeError(name)
