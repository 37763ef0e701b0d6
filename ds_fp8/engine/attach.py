"""What the plugin does to one engine: read the JSON, plan, compare ranks, swap layers; later step, save, load.

    config.load -> Settings -> make_plan -> Plan -+-> layers.swap_layers        now, before DeepSpeed looks at the model
                                                  +-> zero.configure_optimizer  around DeepSpeed's _configure_optimizer

Called at the head of `DeepSpeedEngine._configure_distributed_model`: after tensor and expert parallelism have changed
the model, before the dtype cast, the broadcast, the parameter groups and ZeRO's hooks. The new layers hold the very
same Parameter objects, so nothing that comes later notices.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import DsFp8Error
from ..zero.touched import touched
from . import ATTRIBUTE, life, of
from .agreement import agree
from .checkpointing import add_state, check_state, take_state
from .deciding import finding_of, has_optimizer, plan_of, settings_of
from .merging import follow_merges
from .on_signal import check_can_arm, checkpoint_on_signal, disarm
from .printing import print_rank_0
from .training_mode import TrainingMode

if TYPE_CHECKING:
    from ..config.settings import Settings
    from ..layers import ModelFp8State
    from ..plan import Plan

TOUCHED = {
    "Engine": touched(
        overrides="_take_model_step compile load_checkpoint save_checkpoint",
        reads="device optimizer seq_data_parallel_group",
        writes="_configure_zero_optimizer",
    ),
    "ZeroStage3": touched(reads="parameter_offload"),
}


@dataclass(eq=False)
class Attachment:
    """What ds_fp8 has attached to one DeepSpeed engine.

    engine      the DeepSpeedEngine
    model       the module that it wraps
    settings    the validated JSON
    plan        the decision, equal on all ranks
    fp8_state   scales and amax histories of the FP8 layers; None when only `msamp`'s states were asked for
    watch       telemetry; None when it is off
    frozen      frozen weights that are kept in quantized form alone; None without any
    first_step  check of the first step in FP8; None when it is over, or was not asked for
    clipped     tells of a tensor that delayed scaling has clipped; None without history
    guard       stops a job whose loss is no number; None when it is off
    mode        whether it trains in eval mode
    """

    engine: Any
    model: Any
    settings: Settings
    plan: Plan
    fp8_state: ModelFp8State | None = None
    watch: Any = None
    frozen: Any = None
    first_step: Any = None
    clipped: Any = None
    guard: Any = None
    mode: TrainingMode = field(default_factory=TrainingMode)

    @property
    def is_attached(self) -> bool:
        return of(self.engine) is self

    @property
    def releases_weights(self) -> bool:
        """O3 in ZeRO 1 and 2: between steps the weights exist in quantized form only."""
        return bool(getattr(self.engine.optimizer, "fp8_stores", None))

    @property
    def has_released(self) -> bool:
        """Whether they do now; not before the first step."""
        return any(store.is_released for store in getattr(self.engine.optimizer, "fp8_stores", None) or ())

    def placed(self) -> None:
        """DeepSpeed has put the model on its device and knows its groups: whoever shares data shares scales."""
        if self.fp8_state is not None:
            self.fp8_state.group = self.engine.seq_data_parallel_group
            # Now, not with the first forward: a rank that runs none in a step takes part in its collective all the
            # same.
            self.fp8_state.to(self.engine.device)
        if self.plan.fp8.frozen_weights:
            self._freeze_weights()
        if self.watch is not None:
            self.watch.begin()
        if self.first_step is not None:
            self.first_step.begin()
        if self.guard is not None:
            self.guard.listen()

    def _freeze_weights(self) -> None:
        """Now; in ZeRO 3 when DeepSpeed has cut the parameters, with an optimizer or without."""
        if self.settings.deepspeed.zero_stage != 3:
            from ..zero.frozen_weights import FrozenWeights

            self.frozen = FrozenWeights(self.model, self.plan)
            self.frozen.freeze()
            return
        original = self.engine._configure_zero_optimizer

        def configure(optimizer: Any) -> Any:
            from ..zero.frozen_stage3 import FrozenPartitions

            made = original(optimizer)
            self.frozen = FrozenPartitions(self.model, self.plan, getattr(made, "parameter_offload", made))
            self.frozen.freeze()
            return made

        self.engine._configure_zero_optimizer = configure

    def configure_optimizer(self, original: Callable, client_optimizer: Any, model_parameters: Any) -> None:
        """Under `msamp` ours takes the place of the JSON's or the client's Adam; else DeepSpeed goes on as always."""
        if self.settings.checkpoint_on_signal is not None:  # only what has an optimizer comes to a step
            checkpoint_on_signal(self.engine, self.settings.checkpoint_on_signal)
        if self.plan.optim is None:
            original(self.engine, client_optimizer, model_parameters)
        else:
            from ..zero import configure_optimizer

            configure_optimizer(original, self.engine, client_optimizer, model_parameters, self.plan, self.fp8_state)
        if self.fp8_state is not None:
            self.fp8_state.optimized = optimized_parameters(self.engine)
        if self.settings.fp8.zero3_hooks == "auto":
            from ..zero.hooks_known import lighten

            lighten(self.engine.optimizer)

    def hook(self) -> None:
        """Hang step, checkpoints and the end on this engine; they outlive `deactivate()`, as the FP8 layers do."""
        for name, wrapper in (
            ("_take_model_step", self._take_model_step),
            ("save_checkpoint", self._save_checkpoint),
            ("load_checkpoint", self._load_checkpoint),
            ("compile", self._compile),
            ("destroy", self._destroy),
        ):
            original = getattr(self.engine, name)
            setattr(self.engine, name, functools.wraps(original)(functools.partial(wrapper, original)))
        life.register(self)

    def detach(self, *, communicate: bool = True) -> None:
        """Give the unmodified model back: layers, weights, hooks. Twice is once.

        communicate  whether O3 may gather 16-bit weights from all ranks. If not, layers whose weights are released stay
                     FP8 layers and go on with their quantized values.
        """
        if not self.is_attached:
            return
        # Whatever fails below, nobody may count on this engine any more.
        del self.engine.__dict__[ATTRIBUTE]
        for watcher in (self.watch, self.first_step, self.clipped):
            if watcher is not None:
                watcher.stop()
        self.mode.stop()
        disarm(self.engine)
        try:
            if communicate or not self.has_released:
                self._restore()
        finally:
            life.forget(self)

    def _restore(self) -> None:
        from ..layers import restore_layers

        give_back = getattr(self.engine.optimizer, "fp8_give_back", None)
        if give_back is not None:
            give_back()
        if self.frozen is not None:
            self.frozen.thaw()
        if self.fp8_state is not None:
            restore_layers(self.model, self.fp8_state)
        if self.settings.fp8.zero3_hooks == "auto":
            from ..zero.hooks_known import restore

            restore(self.engine.optimizer)

    def _compile(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        """Of the whole model: ZeRO 3 gets DeepSpeed's own hooks again. Dynamo knows not to look into them, and would
        compile each of ours.
        """
        from ..zero.hooks_known import restore

        restore(self.engine.optimizer)
        return original(*args, **kwargs)

    def _destroy(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        # An exception may be one rank's alone; the others would not come to a collective.
        self.detach(communicate=sys.exc_info()[0] is None and not life.is_collected())
        return original(*args, **kwargs)

    def _take_model_step(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        """All ranks come here at the boundary, with a step that is skipped for an overflow too."""
        if self.fp8_state is not None:
            self.fp8_state.update_scales()
            self.mode.follow(self)
        result = original(*args, **kwargs)
        if not self.is_attached:
            return result
        if self.fp8_state is not None:
            self.fp8_state.weights_changed()
        if self.watch is not None:
            self.watch.after_step()
        if self.first_step is not None and self.first_step.after_step():
            self.first_step = None
        if self.guard is not None:
            self.guard.after_step()
        return result

    def _save_checkpoint(
        self, original: Callable, save_dir: Any, tag: Any = None, client_state: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        if not self.is_attached:
            return original(save_dir, tag, client_state or {}, *args, **kwargs)
        from ..checkpoint.saving import save_checkpoint
        from ..checkpoint.stamp import new_stamp

        stamp = new_stamp(self.engine, tag)
        # Ours, below DeepSpeed's wrapper: its exact states carry the stamp of the save that they are written in.
        ours = getattr(self.engine.optimizer, "optimizer", None) if self.plan.optim is not None else None
        if ours is not None:
            ours.save_stamp = stamp
        try:
            client_state = add_state(self, client_state or {}, stamp)
            return save_checkpoint(original, self.engine, stamp, save_dir, tag, client_state, *args, **kwargs)
        finally:
            if ours is not None:
                ours.save_stamp = None

    def _load_checkpoint(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        from ..checkpoint import load_checkpoint

        if not self.is_attached:
            return original(*args, **kwargs)
        # Looks at every file of this rank before the engine is touched.
        if self.frozen is not None:
            self.frozen.thaw()
        try:
            path, client_state = load_checkpoint(
                original,
                self.engine,
                *args,
                check_client_state=lambda state, where: check_state(self, state, where),
                fallback=self.settings.checkpoint_fallback,
                **kwargs,
            )
        finally:
            if self.frozen is not None:
                self.frozen.freeze()
        if path is not None:
            take_state(self, client_state, path)
        return path, client_state


def optimized_parameters(engine: Any) -> frozenset[int]:
    """ids of the model's Parameters that the engine's optimizer steps; ZeRO's groups hold flats, and name them
    elsewhere.
    """
    optimizer = engine.optimizer
    found: set[int] = set()
    groups = [group["params"] for group in getattr(optimizer, "param_groups", ())]
    for name in ("bit16_groups", "fp16_groups", "bf16_groups"):
        groups += getattr(optimizer, name, None) or ()
    for group in groups:
        found.update(id(parameter) for parameter in group)
    return frozenset(found)


def attach(engine: Any, model: Any) -> Attachment | None:
    """Read the engine's configuration; swap layers; leave an Attachment on the engine. None if all is disabled.

    Every error is raised on every rank. The model is not touched before all ranks agree.
    """
    if of(engine) is not None:
        return of(engine)
    settings, plan, error = None, None, None
    try:
        settings = settings_of(engine)
        if settings.enabled:
            plan = plan_of(engine, model, settings)
            if settings.checkpoint_on_signal is not None:
                check_can_arm(settings.checkpoint_on_signal)
    except DsFp8Error as found:
        error = found
    agree(finding_of(engine, model, settings, plan, error), error)
    assert settings is not None, "`agree` has raised"
    if plan is None:
        for note in () if has_optimizer(engine) else settings.notes:
            print_rank_0(note)
        return None

    attachment = Attachment(engine, model, settings, plan)
    if settings.fp8.enabled:
        from ..layers import swap_layers
        from ..zero.autocast import mark_comm_dtypes

        mark_comm_dtypes(engine, model)
        attachment.fp8_state = swap_layers(model, plan, by_engine=True)
        follow_merges(model)
    # Set past nn.Module's bookkeeping: an attachment is no submodule.
    engine.__dict__[ATTRIBUTE] = attachment
    attachment.hook()
    print_rank_0(plan.banner())
    if settings.trains:
        _watch_steps(attachment)
    if settings.telemetry.enabled and settings.trains:
        import deepspeed.comm as dist

        from .watch import Watch

        attachment.watch = Watch(attachment, dist.get_rank() if dist.is_initialized() else 0)
    return attachment


def _watch_steps(attachment: Attachment) -> None:
    """What looks at the steps of an engine that trains."""
    from .clipped import ClippedReport
    from .first_step import FirstStep
    from .nonfinite import NonFiniteGuard

    fp8 = attachment.settings.fp8
    if attachment.fp8_state is not None and attachment.fp8_state.keeps_history:
        attachment.clipped = ClippedReport(attachment.engine, attachment.fp8_state)
    if attachment.fp8_state is not None and fp8.first_step_check != "off":
        attachment.first_step = FirstStep(attachment)
    if fp8.max_nonfinite_steps:
        attachment.guard = NonFiniteGuard(attachment.engine, attachment.model, fp8.max_nonfinite_steps)
