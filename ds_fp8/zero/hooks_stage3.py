"""ZeRO 3's hooks around each module, with the same effect and less work on the host.

DeepSpeed hangs four hooks on every module, those without parameters too, and two nodes into its graph. A decoder layer
of Llama has 13 modules and runs three times under checkpointing. On two GPUs this took most of the host's time, and FP8
products are done before the host is (benchmarks/results/zero3_h200x2_202611.md). What DeepSpeed's hooks do is little;
they pay for texts that nobody prints, profiler ranges, `torch.compiler.disable`, signatures of functions, and the
generators of `named_parameters`.

With eager modules ours (`module_hooks_stage3.py`) call what DeepSpeed's call: the coordinator, before and after each
module's forward and backward (`coordinator_stage3.py`). They take the place of DeepSpeed's under the same handles, and
give it back with the model. Jobs with NVMe, ZenFlow, secondary partitions (hpZ), `fp8/zero3_hooks` deepspeed, or a
DeepSpeed whose code is another one than was read (`hooks_known.py`) keep DeepSpeed's hooks.

Left out is what a module without parameters of its own would do. It fetches and releases nothing; DeepSpeed puts it
into its trace, lets the device wait for gathers that it does not read, and two nodes into the graph. Without the node
before its inputs, gradients of an input that it uses several times, and others too, are added in the order that they
have without ZeRO 3: another sum of the same addends. Its nodes stay where some parameters are frozen, from the start
or by a script in mid-run: DeepSpeed releases those that a recompute has fetched with the innermost module in backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from torch import nn

from .coordinator_stage3 import LeanCoordinator, is_empty
from .module_hooks_stage3 import after_forward, around_backward, before_forward

if TYPE_CHECKING:
    from .deepspeed_wrappers import Offload
else:
    Offload = object


class LeanOffload(Offload):
    """Mixin over `DeepSpeedZeRoOffload`: what its hooks call.

    fp8_skips   modules without parameters have no nodes; not again once a parameter was frozen
    fp8_params  of the model, in a list that is quickly walked
    """

    fp8_skips: bool
    fp8_params: list[Any]

    def fp8_trains_all(self) -> bool:
        with torch._C.DisableTorchFunctionSubclass():  # a released weight (O3) answers from Python
            return all(param.requires_grad for param in self.fp8_params)

    def _register_deepspeed_module(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Also after hooks were taken off for a while, as for generation."""
        super()._register_deepspeed_module(module, *args, **kwargs)
        if module is self.module:
            _replace_all(self)

    def pre_sub_module_forward_function(self, sub_module: nn.Module) -> None:
        FWD_MODULE_STACK.append(sub_module)
        if sub_module is self.module and self.fp8_skips:
            self.fp8_skips = self.fp8_trains_all()  # a script may freeze a part in mid-run
        if not (self.fp8_skips and is_empty(sub_module)):
            self.param_coordinator.fp8_fetch(sub_module, True)

    def post_sub_module_forward_function(self, sub_module: nn.Module) -> None:
        if not (self.fp8_skips and is_empty(sub_module)):
            self.param_coordinator.fp8_release(sub_module, True)

    def pre_sub_module_backward_function(self, sub_module: nn.Module) -> None:
        self.param_coordinator.fp8_fetch(sub_module, False)

    def post_sub_module_backward_function(self, sub_module: nn.Module) -> None:
        self.param_coordinator.fp8_release(sub_module, False)


def replace_hooks(offload: Any) -> bool:
    """Put our hooks in the place of those that `offload` (a `DeepSpeedZeRoOffload`) has hung on its modules; False, and
    nothing happens, where DeepSpeed's own have to stay.
    """
    if not _is_common(offload):
        return False
    _derive(offload, LeanOffload)
    offload.fp8_params = list(offload.module.parameters())
    offload.fp8_skips = offload.fp8_trains_all()
    _derive(offload.param_coordinator, LeanCoordinator)
    _replace_all(offload)
    return True


def restore_hooks(offload: Any) -> None:
    """Undo `replace_hooks`: an engine that gives its model back leaves DeepSpeed's hooks there, as DeepSpeed does."""
    if LeanOffload not in type(offload).__mro__:
        return
    for lean in (offload, offload.param_coordinator):
        lean.__class__ = type(lean).__bases__[1]
    modules = _hooks_of(offload.module)
    for handle in (*offload.forward_hooks, *offload.backward_hooks):
        _, hooks = modules.get(id(handle.hooks_dict_ref()), (None, {}))
        hook: Any = hooks.get(handle.id)
        if hasattr(hook, "fp8_original"):
            hooks[handle.id] = hook.fp8_original


def _hooks_of(model: nn.Module) -> dict[int, tuple[nn.Module, Any]]:
    """Each table of hooks of a model, by its identity, with its module."""
    return {
        id(hooks): (module, hooks)
        for module in model.modules()
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
    }


def _replace_all(offload: Any) -> None:
    modules, around = _hooks_of(offload.module), around_backward
    for before, after in zip(offload.forward_hooks[::2], offload.forward_hooks[1::2], strict=True):
        _replace(modules, before, lambda _, original: before_forward(offload, original))
        _replace(modules, after, lambda _, original: after_forward(offload, original))
    for begin, end in zip(offload.backward_hooks[::2], offload.backward_hooks[1::2], strict=True):
        _replace(modules, begin, lambda module, original: around(offload, module.pre_bwd_fn, original, counts=False))
        _replace(modules, end, lambda module, original: around(offload, module.post_bwd_fn, original, counts=True))


def _is_common(offload: Any) -> bool:
    """Nothing that the methods here leave out."""
    if type(offload) is not parameter_offload.DeepSpeedZeRoOffload or offload.zenflow:
        return False
    if offload.fast_sharding_for_leaf_module or partitioned_param_coordinator.ENABLE_PROFILER:
        return False
    return all(
        param.nvme_swapper is None and param.ds_zero_param_process_group is None and param.ds_secondary_tensor is None
        for param in offload.module.parameters()
    )


def _derive(instance: Any, mixin: type) -> None:
    base = type(instance)
    instance.__class__ = type("Fp8" + base.__name__, (mixin, base), {"__module__": __name__})


def _replace(
    modules: dict[int, tuple[nn.Module, Any]], handle: Any, make: Callable[[nn.Module, Callable], Callable]
) -> None:
    """Another function under the same handle, which goes on taking it away; one that is gone already stays so."""
    found = modules.get(id(handle.hooks_dict_ref()))
    if found is None or handle.id not in found[1]:
        return
    module, hooks = found
    if not hasattr(hooks[handle.id], "fp8_original"):
        original = hooks[handle.id]
        hooks[handle.id] = make(module, original)
        hooks[handle.id].fp8_original = original
