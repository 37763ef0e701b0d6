"""ZeRO 3's coordinator in a step that follows the recorded trace: fetch, wait, prefetch, release, with few calls.

Before and after each module's forward and backward DeepSpeed's coordinator gathers what the module needs, waits for
what is on its way, gathers ahead what comes next, and lets go of what is not needed soon. The two methods here do the
same, in the same order, where the module is the next of the trace. Everything else goes to DeepSpeed's own methods, one
call at a time: steps that record the trace, leaf modules, recomputed frozen parameters.

Who calls them: `hooks_stage3.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import partitioned_param_coordinator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus, free_param
from deepspeed.runtime.zero.partitioned_param_coordinator import ZeRoTraceMode
from torch import nn

if TYPE_CHECKING:
    from .deepspeed_wrappers import Coordinator
else:
    Coordinator = object

AVAILABLE, AWAY = ZeroParamStatus.AVAILABLE, ZeroParamStatus.NOT_AVAILABLE


def parameters_of(module: nn.Module) -> Iterable[Any] | None:
    """A module's own and external parameters, each once; None where DeepSpeed has to look itself."""
    facts = module.__dict__
    external = facts.get("_external_params")
    if external is None or facts.get("_z3_leaf", False):
        return None
    own = facts["_parameters"]
    if not own and not external:
        return ()
    return {param for param in chain(own.values(), external.values()) if param is not None}


def is_empty(module: nn.Module) -> bool:
    """Whether a module has no parameters, own or external, and none that it fetches for its submodules (a leaf)."""
    facts = module.__dict__
    return not facts["_parameters"] and facts.get("_external_params") == {} and not facts.get("_z3_leaf", False)


class LeanCoordinator(Coordinator):
    """Mixin over `PartitionedParameterCoordinator`; the names are Python's mangled private ones.

    fp8_let_go  frees a parameter that nobody needs now
    fp8_ahead   (elements of 16 bits that are gathered ahead, ids of the parameters that travel as 1 byte per element);
                None where all travel in 16 bits, and DeepSpeed's own limit holds (`gathers_stage3.py`)
    """

    fp8_let_go: Callable[[Any], None] = staticmethod(free_param)
    fp8_ahead: tuple[int, frozenset[int]] | None = None

    def fp8_fetch(self, module: nn.Module, forward: bool) -> None:
        """Before a module's forward or backward: `trace_prologue`, `record_module`, `fetch_sub_module`."""
        step, order = (
            self._PartitionedParameterCoordinator__step_id,
            self._PartitionedParameterCoordinator__submodule_order,
        )
        params = parameters_of(module)
        follows = (
            self._PartitionedParameterCoordinator__trace_mode is ZeRoTraceMode.COMPLETE
            and step < len(order)
            and order[step] is module
        )
        if params is None or not follows:
            with torch.no_grad():
                self.trace_prologue(module)
                if self.is_record_trace():
                    self.record_module(module)
                self.fetch_sub_module(module, forward=forward)
            return
        if not forward:
            self._PartitionedParameterCoordinator__active_backward_submodules[module.ds_id] = module
        if params:
            self._fp8_bring(module, params, forward)
        queue = self._PartitionedParameterCoordinator__param_queue
        if queue:
            latest = self._PartitionedParameterCoordinator__most_recent_step_id_param_fetched_for
            if params:
                _leave_queue(queue, latest, {param for param in params if latest[param] < step}, module)
            room = (
                self._PartitionedParameterCoordinator__max_n_available_params
                - self._PartitionedParameterCoordinator__n_available_params
            )
            bucket, halves = self.fp8_ahead or (self._PartitionedParameterCoordinator__prefetch_bucket_sz, frozenset())
            if room > 0 and bucket > 0 and queue:
                ahead = _take_from_queue(queue, latest, room, 2 * bucket, halves)
                if ahead:
                    with torch.no_grad():
                        self._PartitionedParameterCoordinator__all_gather_params(ahead, forward)
        self._PartitionedParameterCoordinator__step_id = step + 1

    def _fp8_bring(self, module: nn.Module, params: Iterable[Any], forward: bool) -> None:
        """Gather what is away, and wait for what is on its way."""
        number, in_flight = module.ds_id, self._PartitionedParameterCoordinator__inflight_param_registry.data
        away = [param for param in params if param.ds_status is AWAY]
        if away:
            with torch.no_grad():
                self._PartitionedParameterCoordinator__all_gather_params(away, forward)
        recomputes = forward and torch._C._current_graph_task_id() != -1
        backwards = self._PartitionedParameterCoordinator__active_backward_submodules
        if recomputes and backwards:
            with torch._C.DisableTorchFunctionSubclass():  # a released weight (O3) answers from Python
                frozen = [param for param in params if not param.requires_grad]
            for param in frozen:
                partitioned_param_coordinator.update_recompute_parameters(next(reversed(backwards.values())), param)
        waits = False
        for param in params:
            param.ds_active_sub_modules.add(number)
            handle = in_flight.pop(param, None)
            if handle is not None:
                self._fp8_wait(handle)
                waits = True
            assert param.ds_status is AVAILABLE, param.ds_summary()
        accelerator = get_accelerator()
        if waits and not accelerator.resolves_data_dependency():
            accelerator.current_stream().wait_stream(self._PartitionedParameterCoordinator__allgather_stream)

    def _fp8_wait(self, handle: Any) -> None:
        """In the stream of the gathers; no more than a few of them wait for the device."""
        accelerator, events = get_accelerator(), self._PartitionedParameterCoordinator__ongoing_fetch_events
        stream = self._PartitionedParameterCoordinator__allgather_stream
        with torch.no_grad(), accelerator.stream(stream):
            while events and events[0].query():
                events.popleft()
            if len(events) > self._PartitionedParameterCoordinator__max_ongoing_fetch_events:
                events.popleft().synchronize()
            handle.wait(handle_dependency=True)
            if not accelerator.handles_memory_backpressure():
                event = accelerator.Event()
                event.record(stream)
                events.append(event)

    def fp8_release(self, module: nn.Module, forward: bool) -> None:
        """After a module's forward or backward: `release_sub_module`."""
        params = parameters_of(module)
        if (
            params is None
            or self._PartitionedParameterCoordinator__trace_mode is not ZeRoTraceMode.COMPLETE
            or not (forward or not module.ds_recompute_parameters)
        ):
            with torch.no_grad():
                self.release_sub_module(module, forward=forward)
            return
        if not forward:
            backwards = self._PartitionedParameterCoordinator__active_backward_submodules
            assert backwards, "a backward ends that has not begun"
            backwards.pop(module.ds_id, None)
        if not params:
            return
        number, step = module.ds_id, self._PartitionedParameterCoordinator__step_id
        leaving = self._PartitionedParameterCoordinator__params_to_release(module, step)
        for param in params:
            active = param.ds_active_sub_modules
            active.discard(number)
            if param.ds_id in leaving and not active and not param.is_external_param and param.ds_status is AVAILABLE:
                self.fp8_let_go(param)
                self._PartitionedParameterCoordinator__n_available_params -= param.ds_numel


def _leave_queue(queue: Any, latest: Any, wanted: set[Any], module: nn.Module) -> None:
    """What a module has fetched is not prefetched for it."""
    left: set[Any] = set()
    while queue and len(left) < len(wanted):
        found = queue.popleft()
        latest[found.param] = found.step_id_last_used_at
        left.add(found.param)
    if left != wanted:
        raise RuntimeError(
            f"ZeRO-3's trace: module {module.ds_id} ({type(module).__name__}) uses"
            f" {[param.ds_summary() for param in wanted]}, and {[param.ds_summary() for param in left]} come next."
        )


def _take_from_queue(queue: Any, latest: Any, room: int, most_bytes: int, halves: frozenset[int]) -> set[Any]:
    """The next parameters that are away, until `room` elements, or `most_bytes` of what travels, are full."""
    ahead: set[Any] = set()
    numel = travelling_bytes = 0
    while queue and numel < room and travelling_bytes < most_bytes:
        found = queue.popleft()
        param = found.param
        latest[param] = max(latest[param], found.step_id_last_used_at)
        if param.ds_status is AWAY and param not in ahead:
            ahead.add(param)
            numel += param.ds_numel
            travelling_bytes += param.ds_numel * (1 if id(param) in halves else 2)
    return ahead
