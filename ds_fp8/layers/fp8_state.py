"""FP8 state of all layers of a model.

Only delayed scaling remembers anything from step to step (`scales.py`); under other recipes the FP8 state only says
whether FP8 is on, and holds quantized weights.

A cast raises its column of `pending` to its amax. Under a DeepSpeed engine (`managed`) forwards and backwards do
nothing else. The engine's step, which all ranks take together, calls `update_scales()`, which reduces `pending` over
the ranks that share data (`reduce_amax`, one collective, always) and renews the scales. No forward and no backward
communicates, so ranks may run as many of them as they like. Without an engine a model updates alone before its next
pass (`forward_scope.py`).

The state is kept here and not in the model's state_dict, which stays the unmodified model's; `checkpoint` saves
`state_dict()` beside it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from ..plan import Fp8Plan
from .amax_history import AmaxHistory
from .forward_scope import ForwardScopes
from .layer_state import Call, LayerFp8State
from .recipes import scaling_of
from .scales import Scales, ScaleTensors

VERSION = 1


class ModelFp8State:
    """Scales of all FP8 layers of one model.

    names      fqn of the layers, in model order
    plan       the layers' part of the plan
    group      process group whose ranks share one history; None is the whole world
    managed    somebody calls `update_scales` once per optimizer step
    exact      Transformer Engine's rules to the bit (`fp8/amax_rules`); see `ScaleTensors`
    optimized  ids of the Parameters that the engine's optimizer steps, set by the engine
    steps      optimizer steps so far (see `weights_changed`)
    warming    before `start_step`: products run in high precision
    trains_in_eval  the last optimizer step was taken in eval mode: calls in eval mode with gradients are training
    in_forward_with_grad  of the model, in eval mode in which steps are taken: its calls are training, also without
                          gradients (reentrant checkpointing)
    """

    def __init__(
        self,
        names: Sequence[str],
        plan: Fp8Plan,
        *,
        device: torch.device | str = "cpu",
        group: Any = None,
        managed: bool = False,
        exact: bool | None = None,
    ):
        self.names = tuple(names)
        self.plan = plan
        self.recipe = plan.recipe
        self.scaling, self.keeps_history = scaling_of(plan.recipe.kind), plan.recipe.keeps_history
        self.forward_format, self.backward_format = plan.recipe.forward_format, plan.recipe.backward_format
        self.group = group
        self.managed = managed
        self.exact = _is_exact(plan, managed) if exact is None else exact
        self.optimized: frozenset[int] = frozenset()
        self.trains_in_eval = self.in_forward_with_grad = False
        self._recorded = False  # only a model without an engine asks
        self._count_steps(0)
        self.layer_states = tuple(LayerFp8State(self, index, fqn) for index, fqn in enumerate(self.names))
        self._by_name = dict(zip(self.names, self.layer_states, strict=True))
        self.holders: weakref.WeakSet[Any] = weakref.WeakSet()  # of quantized weights, beside the layers: experts
        self.tensors = ScaleTensors(len(self.names), self.recipe, exact=self.exact, device=torch.device(device))
        self.scopes = None if managed else ForwardScopes(self._update_alone)
        self._phase: Any = None
        self.before_update: Any = None  # called before the amaxes of a step go into the histories

    def layer_state(self, fqn: str) -> LayerFp8State:
        return self._by_name[fqn]

    def to(self, device: torch.device) -> None:
        """Move to the device of the model; DeepSpeed puts it there after the layers were swapped."""
        self.tensors.to(device)

    @property
    def scales(self) -> torch.Tensor:
        """[3n] fp32: the scales as they stand."""
        return self.tensors.scales

    @property
    def pending(self) -> torch.Tensor:
        """[3n] fp32: the amaxes since the last update."""
        return self.tensors.pending

    @property
    def slots(self) -> torch.Tensor:
        """[3n, 8] fp32: scale_inv and scale first, at an address that stays (once the FP8 state is on its device)."""
        return self.tensors.slots

    @property
    def scales_now(self) -> Scales:
        return self.tensors.current

    @property
    def forward(self) -> AmaxHistory:
        return self.tensors.forward

    @property
    def backward(self) -> AmaxHistory:
        return self.tensors.backward

    def watch(self, root: torch.nn.Module) -> None:
        """Learn where a forward of `root` begins: only a model without an engine needs to know, under delayed
        scaling.
        """
        if self.keeps_history and not self.managed:
            root.register_forward_pre_hook(self._before_root, prepend=True)
            root.register_forward_hook(self._after_root, always_call=True)

    def unwatch(self, root: torch.nn.Module) -> None:
        """Take our hooks off, by owner and not by handle: a copied model has hooks without handles."""
        for hooks in (root._forward_pre_hooks, root._forward_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                del hooks[key]
                root._forward_hooks_always_called.pop(key, None)

    def _before_root(self, root: torch.nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return  # a compiled model's layers find out for themselves, as those do that are called without their root
        self.scopes.before_root(torch.is_grad_enabled() and root.training)  # type: ignore[union-attr]

    def _after_root(self, root: torch.nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self.scopes.after_root(output)  # type: ignore[union-attr]

    # -- the call of a layer -----------------------------------------------------------------------------------------

    def call(
        self, layer_state: LayerFp8State, *, training: bool, device: torch.device, grad: bool | None = None
    ) -> Call | None:
        """What a layer needs for one forward; None when it is to compute in high precision.

        training  the layer's mode
        grad      whether gradients are recorded; asked of torch when not given

        A step before `start_step` is in high precision too, but fills the histories, so that FP8 starts with scales
        that fit. A call without gradients (evaluation, a teacher, the first forward under reentrant checkpointing,
        whose recompute has them) leaves no amax.
        """
        grad = torch.is_grad_enabled() if grad is None else grad
        training = training or (self.trains_in_eval and (grad or self.in_forward_with_grad))
        if not (training or self.plan.eval):
            return None
        records = training and grad
        if not self.keeps_history:
            return None if self.warming else Call(layer_state, None, records)
        if self.warming and not records:
            return None
        tensors = self.tensors
        if tensors.device != device:
            tensors.to(device)
        scope = None if self.scopes is None else self.scopes.of_call(layer_state.index, records)
        return Call(layer_state, tensors.current, records, self.warming, scope)

    def record(self, column: int, amax: torch.Tensor) -> None:
        """MAX one amax (0-d fp32; inf stands for NaN) into what the next update takes."""
        self._recorded = True
        slot = self.tensors.pending_slots[column]
        torch.maximum(slot, amax, out=slot)

    def raised(self) -> torch.Tensor:
        """The pending amaxes, for a kernel that raises its column itself."""
        self._recorded = True
        return self.tensors.pending

    def slot(self, column: int) -> torch.Tensor:
        """fp32 [1], a view into the pending amaxes, for somebody who raises it himself: a kernel, Transformer
        Engine.
        """
        self._recorded = True
        return self.tensors.pending_slots[column].reshape(1)

    def is_training(self, training: bool) -> bool:
        """Whether a call counts as training, for a layer in this mode."""
        return training or (self.trains_in_eval and (self.in_forward_with_grad or torch.is_grad_enabled()))

    def follow_mode(self, trains_in_eval: bool) -> bool:
        """At a step: whether the model is being trained in eval mode. Returns whether that has just begun."""
        begins = trains_in_eval and not self.trains_in_eval
        if trains_in_eval != self.trains_in_eval:
            self.trains_in_eval = trains_in_eval
            for layer_state in (*self.layer_states, *self.holders):
                layer_state.trains_in_eval = trains_in_eval
            self.in_forward_with_grad = False
        return begins

    # -- once per step -----------------------------------------------------------------------------------------------

    def update_scales(self) -> None:
        """Bring the amaxes of a step into histories and scales; nothing else moves a scale under an engine.

        Collective over `group` if `reduce_amax`: all of its ranks call it, whatever they have run. Call it when all
        backwards of the step are done, before the optimizer's step: at O3 weights are cast there for the next one.
        """
        if not self.keeps_history:
            return
        if self.recipe.reduce_amax and _world_size(self.group) > 1:
            torch.distributed.all_reduce(self.pending, op=torch.distributed.ReduceOp.MAX, group=self.group)
        self._update()

    def _update_alone(self) -> None:
        """Without an engine, before a pass: nothing happens where nothing was recorded, as in evaluation."""
        if self._recorded:
            self._update()

    def _update(self) -> None:
        self._recorded = False
        if self.before_update is not None:
            self.before_update()
        self.tensors.update()

    def weights_changed(self) -> None:
        """An optimizer step was taken: cached quantized weights are stale, a step is counted."""
        self.weights_replaced(self.steps + 1)

    def weights_replaced(self, steps: int) -> None:
        """The weights are other ones, those of a run that took `steps` optimizer steps."""
        self._count_steps(steps)
        self._forget_weights()
        self._renew_anchors()

    def _renew_anchors(self) -> None:
        """Tell CUDA graphs (`anchors`) when the layers go on in another way: `start_step` is reached, a history has
        begun.
        """
        phase = self.warming, self.tensors.current.unknown
        if phase != self._phase:
            self._phase = phase
            for layer_state in self.layer_states:
                layer_state.renew_anchor()

    def _count_steps(self, steps: int) -> None:
        self.steps = steps
        self.warming = steps < self.plan.start_step

    def _forget_weights(self) -> None:
        for layer_state in (*self.layer_states, *self.holders):
            layer_state.forget_weight()  # a byte per parameter that nobody will read again

    def weight_scale(self, layer: torch.nn.Module | str, amax: torch.Tensor) -> torch.Tensor:
        """0-d scale with which the layer would cast a weight of this amax (0-d, all of it) now (delayed scaling)."""
        return self.weight_scales([layer], [amax])[0]

    def weight_scales(
        self, layers: Sequence[torch.nn.Module | str], amaxes: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """The same for many layers, in a few launches whatever their number."""
        now, fmt = self.scales_now, self.forward_format
        columns = [self._layer_state_of(layer).weight_column for layer in layers]
        if self.exact:  # every column has a scale then
            return [now.scale[column] for column in columns]
        each = [amax.to(now.frozen.device) for amax in amaxes]
        if each and not now.unknown and now.frozen.device.type != "cpu":
            return now.of_weights(columns, torch.stack(each), fmt)
        return [
            (now.of_tensor if column in now.unknown else now.of_weight)(column, amax, fmt)
            for column, amax in zip(columns, each, strict=True)
        ]

    def record_weight_amax(self, layer: torch.nn.Module | str, amax: torch.Tensor) -> None:
        """The amax of a weight that somebody else cast for the layer (O3); recorded when the layer next uses it."""
        self._layer_state_of(layer).staged_weight_amax = amax

    def _layer_state_of(self, layer: torch.nn.Module | str) -> LayerFp8State:
        return self._by_name[layer] if isinstance(layer, str) else vars(layer)["layer_state"]

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Tensors and values, on CPU. This rank's alone: no collective, and nothing is changed.

        What is pending is kept too (in the middle of gradient accumulation), under `pending`, where there is any.
        """
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in self.tensors.tensors().items()}
        pending = self.pending.detach().cpu().clone()
        return {
            "version": VERSION,
            "names": list(self.names),
            "recipe": self.recipe.kind,
            "steps": self.steps,
            "forward_folds": self.forward.updates,
            "backward_folds": self.backward.updates,
            **tensors,
            **({"pending": pending} if pending.any() else {}),
            **({"trains_in_eval": True} if self.trains_in_eval else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> list[str]:
        """Take over a saved state, by layer name; returns one line for each thing that did not fit.

        Layers that the state does not know start fresh; a history of another length keeps its newest entries. Raises
        CheckpointError, before anything is changed, when the state is not one of ours or is damaged.
        """
        from .fp8_state_loading import match_state

        tensors, pending, notes = match_state(state, self)
        self.tensors.fill(tensors, int(state["forward_folds"]), int(state["backward_folds"]))
        self.pending.copy_(pending)
        self._recorded = bool(pending.any())
        self._count_steps(int(state["steps"]))
        self.follow_mode(bool(state.get("trains_in_eval")))
        self._forget_weights()
        return notes

    # -- copies ------------------------------------------------------------------------------------------------------

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles carry scales and histories. Quantized values are made again; a process group cannot be
        pickled.
        """
        return _rebuild, (self.names, self.plan, self.exact, str(self.tensors.device), self.state_dict())

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelFp8State:
        """A copied model (an EMA, say) gets an FP8 state of its own, which no engine's step updates."""
        rebuild, arguments = self.__reduce__()
        copied = rebuild(*arguments)
        memo[id(self)] = copied
        return copied


def _rebuild(names: tuple[str, ...], plan: Fp8Plan, exact: bool, device: str, state: dict[str, Any]) -> ModelFp8State:
    fp8_state = ModelFp8State(names, plan, device=device, exact=exact)
    fp8_state.load_state_dict(state)
    fp8_state.follow_mode(False)  # no engine trains the copy
    return fp8_state


def _is_exact(plan: Fp8Plan, managed: bool) -> bool:
    """`amax_rules` decided: "auto" is Transformer Engine's for a layer by itself, ours where an engine trains it."""
    return not managed if plan.recipe.amax_rules == "auto" else plan.recipe.amax_rules == "transformer_engine"


def _world_size(group: Any) -> int:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    return torch.distributed.get_world_size(group)
