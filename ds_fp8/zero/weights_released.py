"""A released weight: what O3 puts in place of a Parameter while this rank has only its FP8 data.

The FP8 layer multiplies with quantized data and never looks at its Parameter. Others do: a tied decoder, a fused loss
that takes `lm_head.weight`, a penalty, an average over steps, a norm in a log. For them the Parameter, still the same
object, has the class `ReleasedWeight` for as long as it is released:

    reads     any function of torch, any method: computes with the values that the layer multiplies with, decoded to the
              Parameter's dtype, and its gradient goes to the Parameter
    writes    in place, through `.data`, `out=`, a view: `WeightError` with the name and the cure. One rank has no
              master to write to, and a write to decoded values would vanish
    the rest  shape, dtype, device, grad, hooks: the Parameter's own

`.data`, `.detach()` and views of them are `DecodedWeight`: built-in values that refuse to be written to. Copies and
pickles are unmodified. The memory behind the Parameter itself is one NaN that gives no address to what goes past
torch's dispatch (`__torch_function__`), as an extension in C++ may: see `blank_memory.py`. Transforms of torch.func go
past it too: see `weights_wrapped.py`.
"""

from __future__ import annotations

import contextlib
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import WeightError
from ..layers import QuantizedWeight
from ..layers.once import once_for_each
from ..layers.ordinary import tracing
from .blank_memory import blank, guarded
from .guards import memory_changed
from .tensor_functions import ADDRESS, GET_DATA, LAYOUT, OWN, SET_DATA, written_by

SOURCE = "_ds_fp8_source"
"""Attribute of a released or decoded tensor: where its values come from."""

raw = torch._C.DisableTorchFunctionSubclass
"""Context in which a released weight is what it looks like to C++: for code that only passes it on."""


class Source:
    """The quantized data of one weight, under its name.

    kept     decoded values that somebody holds an address of, until the data changes
    because  why a write is refused
    keep_16  how to have the weight in 16 bits instead
    """

    __slots__ = ("kept", "name", "quantized")
    because = "at O3 it is released: this rank has its FP8 data"
    keep_16 = 'keep this weight in 16 bits: msamp/weight_wire_exclude ["{name}"]'

    def __init__(self, name: str, quantized: QuantizedWeight):
        self.name, self.quantized = name, quantized
        self.kept: Tensor | None = None

    @property
    def unread(self) -> str:
        """What code in C++ is told that asks for the Parameter's address."""
        return (
            f"{self.name} was asked for its address by a function of an extension, but {self.because}."
            f"\n  Give it {self.name}.detach(), which has the values, or {self.keep_16.format(name=self.name)}."
        )

    def values(self, dtype: torch.dtype) -> Tensor:
        """[N, K] in `dtype`, new memory."""
        return self.quantized.values(dtype)

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """The same as a tensor that refuses writes."""
        return _mark(self.values(dtype), self)

    def held(self, dtype: torch.dtype) -> Tensor:
        """The same at an address that stays good until the next step."""
        if self.kept is None:
            self.kept = self.values(dtype)
        return self.kept


class _Decode(torch.autograd.Function):
    """Decoded values of a released weight; the gradient is the weight's own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, source: Source) -> Tensor:  # type: ignore[override]
        return source.values(weight.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


class DecodedWeight(Tensor):
    """Decoded values of a released weight, or a view of them: to be read."""

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        memo[id(self)] = copied = as_tensor(self).clone()
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return as_tensor(self).__reduce_ex__(protocol)


class Released:
    """Mixin over the class that the Parameter had."""

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (
            func in OWN
            or getattr(func, "namespace", "") == "ds_fp8"
            or (func is _VIEW_AS and _asks_for_accumulator(args))
            or _is_looked_at_by_a_compiler()
        ):
            with raw():
                return func(*args, **(kwargs or {}))
        return _call(func, args, kwargs or {})

    def as_subclass(self: Any, cls: type) -> Any:  # C++, which asks no dispatch
        return _decoded(self, {}).as_subclass(cls)

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        memo[id(self)] = copied = torch.nn.Parameter(values_of(self), self.requires_grad)
        return copied

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        return torch._utils._rebuild_parameter, (values_of(self), self.requires_grad, OrderedDict())


_VIEW_AS = Tensor.view_as
_ACCUMULATOR = getattr(getattr(torch.autograd.graph, "_get_grad_fn_or_grad_acc", None), "__code__", None)


def _asks_for_accumulator(args: tuple) -> bool:
    """torch's way to a Parameter's gradient accumulator: the graph behind a view of itself, whose values nobody reads.
    DeepSpeed goes it for every parameter in every backward of ZeRO 3.
    """
    return len(args) == 2 and args[0] is args[1] and sys._getframe(2).f_code is _ACCUMULATOR


def _is_looked_at_by_a_compiler() -> bool:
    """torch.compile's own questions about the inputs of a graph it has traced; what a traced model reads is not
    among them.
    """
    return not torch.compiler.is_dynamo_compiling() and torch._guards.TracingContext.try_get() is not None


@once_for_each
def _released_class(original: type) -> type:
    return type("ReleasedWeight", (Released, original), {"__module__": __name__})


def is_released(param: Any) -> bool:
    return isinstance(param, Released)


def release(param: Any, dtype: torch.dtype, device: torch.device, shape: Sequence[int], source: Source) -> None:
    """Give the memory of `param` up; readers get `source`. Again for new data of a weight that is released already."""
    if is_released(param):
        if param.__dict__[SOURCE].kept is not None:  # `give_memory`
            with raw():
                param.data = guarded(dtype, device, shape, source.unread)
            memory_changed(param)
        param.__dict__[SOURCE] = source
        return
    param.data = guarded(dtype, device, shape, source.unread)
    param.__dict__[SOURCE] = source
    param.__class__ = _released_class(type(param))


def give_memory(param: Any) -> None:
    """Decoded values as the memory of a released Parameter, until its data changes: for readers that no dispatch
    sees.
    """
    with raw(), torch._C._DisableFuncTorch():
        param.data = param.__dict__[SOURCE].held(param.dtype)
    memory_changed(param)


def take_back(param: Any) -> None:
    """The Parameter's own class again; the caller gives it memory."""
    if is_released(param):
        param.__class__ = type(param).__mro__[2]
        del param.__dict__[SOURCE]


def take_back_blank(param: Any) -> None:
    """The same for a caller that passes it on to DeepSpeed, which asks what it frees for its address."""
    if is_released(param):
        take_back(param)
        param.data = blank(param.dtype, param.device, param.shape)


def as_tensor(tensor: Tensor) -> Tensor:
    """A decoded weight without its refusal of writes; shares memory."""
    with raw():
        return tensor.as_subclass(Tensor)


def values_of(param: Any) -> Tensor:
    """Decoded values of a released Parameter, new memory."""
    return param.__dict__[SOURCE].values(param.dtype)


def _mark(values: Tensor, source: Source) -> Tensor:
    values.__class__ = DecodedWeight
    values.__dict__[SOURCE] = source
    return values


# -- one call ----------------------------------------------------------------------------------------------------------


def _call(func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """`func` with decoded values in the place of released weights."""
    for written in written_by(func, args, kwargs):
        source = _source(written)
        if source is not None:
            if func == SET_DATA and _is_what_it_reads(args[0], args[1]):
                return None  # Module.to() where nothing changes
            if (thaw := getattr(source, "thaw", None)) is None:
                raise WeightError(_refusal(func, source))
            thaw(None if is_released(written) else _whole(written))  # a frozen weight (`frozen_weights.py`)
    if (tracer := tracing()) is not None:
        _refuse_trace(tracer, func, args, kwargs)
    first: Any = args[0] if args else None
    if is_released(first):
        if func == GET_DATA or func == Tensor.detach:
            return first.__dict__[SOURCE].decoded(first.dtype)
        if func in LAYOUT:
            with raw():
                return func(torch.empty(first.shape, dtype=first.dtype, device="meta"), *args[1:], **kwargs)
        if func in ADDRESS:
            with raw():
                return func(first.__dict__[SOURCE].held(first.dtype), *args[1:], **kwargs)
    if func in OWN:
        with raw():
            return func(*args, **kwargs)
    sources: dict[int, Source] = {}
    args, kwargs = _decoded(args, sources), _decoded(kwargs, sources)
    with raw():
        return _guarded(func(*args, **kwargs), sources)


def _decoded(found: Any, sources: dict[int, Source]) -> Any:
    """`found` with values for released weights; `sources` notes them by the memory they lie in."""
    if isinstance(found, Tensor):
        source = _source(found)
        if source is None:
            return found
        if is_released(found):
            with raw():
                graph = torch.is_grad_enabled() and found.requires_grad
                found = _Decode.apply(found, source) if graph else source.values(found.dtype)
        else:
            found = as_tensor(found)
        sources[_memory(found)] = source
        return found
    if isinstance(found, (list, tuple)):
        made = [_decoded(one, sources) for one in found]
        return type(found)(*made) if hasattr(found, "_fields") else type(found)(made)
    if isinstance(found, dict):
        return {key: _decoded(value, sources) for key, value in found.items()}
    return found


def _guarded(result: Any, sources: dict[int, Source]) -> Any:
    """Results that lie in a decoded weight's memory refuse writes as it does."""
    if isinstance(result, Tensor):
        if type(result) is Tensor:
            source = sources.get(_memory(result))
            return result if source is None else _mark(result, source)
        return result
    if isinstance(result, (list, tuple)) and any(isinstance(one, Tensor) for one in result):
        made = [_guarded(one, sources) for one in result]
        if isinstance(result, list):
            return made
        return type(result)(made) if type(result) is not tuple else tuple(made)
    return result


def _memory(tensor: Tensor) -> int:
    """What tells one memory from another; 0 for tensors that have none (sparse, functorch's)."""
    with contextlib.suppress(RuntimeError, NotImplementedError):
        return tensor.untyped_storage()._cdata
    return 0


def _source(found: Any) -> Source | None:
    source = found.__dict__.get(SOURCE) if isinstance(found, (Released, DecodedWeight)) else None
    return None if getattr(source, "thawed", False) else source


def _whole(decoded: Tensor) -> Tensor:
    """The whole weight that a decoded tensor, or a view of it, lies in."""
    data: Tensor = decoded.__dict__[SOURCE].quantized.data
    with raw():
        whole = torch.empty(0, dtype=decoded.dtype, device=decoded.device)
        return whole.set_(decoded.untyped_storage(), 0, data.shape)  # type: ignore[call-overload]  # stubs want a stride


def _is_what_it_reads(param: Any, value: Any) -> bool:
    """Whether `param.data = value` changes nothing: `value` are the param's own decoded values, or equal to them, as
    the copy that `Module.to("cpu:0")` makes of them.
    """
    if value.shape != param.shape or value.dtype != param.dtype or value.device.type != param.device.type:
        return False
    return _source(value) is _source(param) or torch.equal(as_tensor(value).to(param.device), values_of(param))


def _refusal(func: Any, source: Source) -> str:
    name = getattr(func, "__name__", "a function")
    name = ".data = ..." if name == "__set__" else name
    return (
        f"{source.name} was written to ({name}), but {source.because}, and the"
        " weight is spread over the ranks, so the write would be lost.\n"
        "  Write inside `with deepspeed.zero.GatheredParameters(param, modifier_rank=0):` on all ranks, or"
        f" {source.keep_16.format(name=source.name)}."
    )


def _refuse_trace(tracer: str, func: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
    """A tracer would write decoded values into its graph, as constants, or ask their fakes for bytes."""
    for one in (*args, *kwargs.values()):
        if is_released(one) and func not in OWN:
            source = one.__dict__[SOURCE]
            raise WeightError(
                f"{tracer} reads {source.name}, but {source.because}.\n"
                "  Trace inside `with deepspeed.zero.GatheredParameters(list(model.parameters())):` on all ranks, or"
                f" {source.keep_16.format(name=source.name)}."
            )
