"""What torch's functions do with a tensor that they get: read its values, write to it, or ask for something else of it.

`weights_released.py` gives a released Parameter decoded values where values are read, and refuses writes; so every
function has to be told apart. What is not listed reads values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def _accessors(names: str) -> Iterator[Any]:
    for name in names.split():
        found = getattr(Tensor, name, None)
        for kind in ("__get__", "__set__", "__delete__"):
            if hasattr(found, kind) and not callable(found):
                yield getattr(found, kind)


def _methods(names: str) -> Iterator[Any]:
    for name in names.split():
        for home in (Tensor, torch):
            if hasattr(home, name):
                yield getattr(home, name)


GET_DATA, SET_DATA = Tensor.data.__get__, Tensor.data.__set__  # type: ignore[attr-defined]
OWN = frozenset(
    (
        *_accessors(
            "shape dtype device layout ndim itemsize nbytes requires_grad is_leaf grad _grad grad_fn grad_dtype "
            "retains_grad output_nr _version _backward_hooks _post_accumulate_grad_hooks name names is_cuda is_cpu "
            "is_meta is_sparse is_sparse_csr is_quantized is_nested is_mkldnn is_xla is_xpu is_hpu is_mps is_mtia "
            "is_maia is_ipu is_vulkan"
        ),
        *_methods(
            "size dim ndimension numel nelement element_size get_device is_floating_point is_complex is_signed "
            "is_inference is_neg is_conj is_same_size _is_view requires_grad_ register_hook "
            "register_post_accumulate_grad_hook retain_grad has_names __len__ sym_numel sym_size backward"
        ),
        torch.autograd.grad,
        torch.autograd.backward,
    )
)
"""They ask for what is the Parameter's own, whatever memory it has."""

LAYOUT = frozenset(_methods("stride is_contiguous storage_offset is_coalesced dim_order"))
"""They ask how dense values would lie."""

ADDRESS = frozenset(_methods("data_ptr untyped_storage storage _typed_storage __array__ __cuda_array_interface__"))
"""They ask where the values lie."""

_ITEM_WRITERS = frozenset(
    f"__{name}__"
    for name in (
        "setitem", "iadd", "isub", "imul", "itruediv", "idiv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor",
        "ilshift", "irshift", "imatmul", "set", "delete",
    )
)  # fmt: skip


def written_by(func: Any, args: tuple, kwargs: dict[str, Any]) -> Iterator[Any]:
    """The arguments that `func` writes to."""
    out = kwargs.get("out")
    if out is not None:
        yield from out if isinstance(out, (tuple, list)) else (out,)
    schema = getattr(func, "_schema", None)
    if schema is not None:  # an operator of torch.ops
        for place, argument in enumerate(schema.arguments):
            if argument.is_write:
                value = args[place] if place < len(args) else kwargs.get(argument.name)
                yield from value if isinstance(value, (tuple, list)) else (value,)
        return
    name = getattr(func, "__name__", "")
    writes = name in _ITEM_WRITERS or (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace") is True
    if writes and func not in OWN:
        value = args[0] if args else next(iter(kwargs.values()), None)
        yield from value if isinstance(value, (tuple, list)) else (value,)
