"""Telemetry: one step in every `interval` optimizer steps is measured; the others cost nothing.

For that one step hooks lie on the FP8 layers; operators of compiled layers, which call no hooks, report by themselves.
They see each operand as the layer sees it, measure its amax and the share of elements that the cast flushes to zero,
and keep the results on the device; after the step they are taken off and the numbers are read, which is the only time
that waits for the device. Nothing that is computed is changed.

    step N * interval   hooks on -> forward, backward, step -> hooks off -> monitor (rank 0), log (each rank), alarms

The aggregates go to DeepSpeed's monitor under `Train/Samples/ds_fp8/...`; each rank writes its own log, because
without `reduce_amax` ranks differ, and a bad batch is one rank's.
"""

from __future__ import annotations

import functools
import json
import math
from typing import Any

import torch

from ..formats import BLOCK_SIZE, Format
from ..layers.forward_scope import in_backward
from ..telemetry import JsonlLog, TensorStatistics, aggregate, find_alarms
from ..telemetry.aggregate import events
from ..telemetry.alarms import new_alarms
from ..zero.touched import touched
from ..zero.weights_released import is_released, values_of
from .heard_losses import hear_losses
from .printing import print_rank_0

TOUCHED = {
    "Engine": touched(reads="global_samples global_steps monitor"),
}


class Watch:
    """Looks at one attached engine: `begin` is called when it is made, `after_step` behind each optimizer step."""

    def __init__(self, attachment: Any, rank: int):
        self.attachment = attachment
        self.rank = rank
        self.interval = attachment.settings.telemetry.interval
        folder = attachment.settings.telemetry.path
        self._monitor_failed = False
        self.log = None if folder is None else JsonlLog(f"{folder}/telemetry_rank{rank}.jsonl")
        self._known_alarms: set[tuple[str, str, str]] = set()
        self._is_looking = False
        self._hooks: list[Any] = []
        self._losses: list[torch.Tensor] = []
        self._stop_hearing: Any = lambda: None
        self._seen: dict[tuple[str, str], list[torch.Tensor]] = {}
        self._formats: dict[tuple[str, str], Format] = {}
        self._margin = 0
        self._told_unseen = False

    def begin(self) -> None:
        """The engine is made: write down the plan, and look at the first step if it is due."""
        from ..comm import counters

        plan = self.attachment.plan
        if self.log is not None:
            self.log.write("plan", digest=plan.digest(), banner=plan.banner(), plan=json.loads(plan.to_json()))
        counters.reset()
        self._look_if_due()

    def after_step(self) -> None:
        """Report the step that was looked at, if it was; and get ready for the next one."""
        if self._is_looking:
            self._look_away()
            self._report()
        self._look_if_due()

    def stop(self) -> None:
        """The engine ends: no hook stays on its layers."""
        if self._is_looking:
            self._look_away()

    def _look_if_due(self) -> None:
        """Hooks on, if the step that comes is one to look at."""
        if (self.attachment.engine.global_steps + 1) % self.interval:
            return
        self._is_looking = True
        self._stop_hearing = hear_losses(self.attachment.engine, self._note_loss)
        modules = dict(self.attachment.model.named_modules())
        for layer_state in self._layers():
            module = modules.get(layer_state.fqn)
            if module is not None:
                self._hooks.append(module.register_forward_pre_hook(self._operands(layer_state)))
                self._hooks.append(module.register_forward_hook(self._gradient(layer_state)))
                layer_state.observe = functools.partial(self._observe, layer_state, module)

    def _layers(self) -> list[Any]:
        fp8_state = self.attachment.fp8_state
        return [] if fp8_state is None else list(fp8_state.layer_states)

    def _look_away(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for layer_state in self._layers():
            layer_state.observe = None
        self._stop_hearing()
        self._is_looking = False

    def _note_loss(self, loss: torch.Tensor) -> None:
        if self._is_looking:
            self._losses.append(loss.float())

    def _loss(self) -> float | None:
        """Mean over the micro-batches of this rank; None when none was heard, or it is not finite."""
        losses = [loss.item() for loss in self._losses]
        self._losses.clear()
        loss = sum(losses) / len(losses) if losses else math.nan
        return loss if math.isfinite(loss) else None

    def _operands(self, layer_state: Any) -> Any:
        def before(module: Any, args: tuple[Any, ...]) -> None:
            if torch.compiler.is_compiling():  # the layer's operator reports, in this and in later steps
                return
            training = layer_state.fp8_state.is_training(module.training)  # in eval mode too, if steps are taken in it
            if training and torch.is_grad_enabled() and args:
                self._observe(layer_state, module, "input", args[0])

        return before

    def _observe(self, layer_state: Any, module: torch.nn.Module, role: str, operand: torch.Tensor) -> None:
        """Measure an operand of a layer that trains; a recompute is the same forward once more."""
        if role == "grad_output":
            self._measure(layer_state, role, operand, layer_state.grad_output_column)
        elif not in_backward():
            self._measure(layer_state, role, operand, layer_state.input_column)
            weight: Any = module.weight
            if is_released(weight):  # an operator runs where torch does not ask a tensor's class
                weight = values_of(weight)
            if weight.numel() and (layer_state.fqn, "weight") not in self._seen:
                self._measure(layer_state, "weight", weight, layer_state.weight_column)

    def _gradient(self, layer_state: Any) -> Any:
        def after(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            if torch.compiler.is_compiling():
                return
            if isinstance(output, torch.Tensor) and output.requires_grad and not in_backward():
                output.register_hook(functools.partial(self._observe, layer_state, module, "grad_output"))

        return after

    @torch.no_grad()
    def _measure(self, layer_state: Any, role: str, tensor: torch.Tensor, column: int) -> None:
        """Amax, scale and share flushed to zero, as one small tensor on the device."""
        recipe = layer_state.fp8_state.recipe
        self._margin = recipe.margin if recipe.keeps_history else 0
        fmt = recipe.backward_format if role == "grad_output" else recipe.forward_format
        values = tensor.detach().float().reshape(-1).abs()
        if not values.numel():
            return
        amax = torch.nan_to_num(values.amax(), nan=math.inf, posinf=math.inf)
        if recipe.keeps_history:
            now = layer_state.fp8_state.scales_now  # a tensor without history is cast with its own amax
            scale = now.of_tensor(column, amax, fmt) if column in now.unknown else now.scale[column].to(values.device)
        else:
            scale = fmt.max / amax.clamp_min(2.0**-126)
        each = scale
        extent = recipe.facts.scale_extent
        # Rows and blocks have scales of their own; rows of 128 stand for the tiles of a weight too.
        width = tensor.shape[-1] if extent == "row" and tensor.dim() else BLOCK_SIZE
        if extent != "tensor" and values.numel() % width == 0:
            values = values.view(-1, width)
            each = fmt.max / values.amax(dim=1, keepdim=True).clamp_min(2.0**-126)
        # Half of the smallest value rounds to even, which is zero.
        nonzero = values > 0

        def lost(factor: torch.Tensor) -> torch.Tensor:
            return ((values * factor <= fmt.min_subnormal / 2) & nonzero).sum().float()

        own = fmt.max / amax.clamp_min(2.0**-126) if recipe.keeps_history else each
        counts = [lost(each), lost(each * 2.0**recipe.margin), lost(own), nonzero.sum().float()]
        key = (layer_state.fqn, role)
        self._formats[key] = fmt
        found = torch.stack([amax, scale.float(), *counts])
        self._seen.setdefault(key, []).append(found)

    def _statistics(self) -> list[TensorStatistics]:
        """One `TensorStatistics` for each operand: the largest amax and the summed losses of its micro-batches."""
        statistics = []
        for (fqn, role), found in self._seen.items():
            rows = torch.stack([each.cpu() for each in found])
            *lost, nonzero = rows[:, 2:].sum(dim=0).tolist()
            shares = [count / nonzero if nonzero else None for count in lost]
            worst = int(rows[:, 0].argmax())
            statistics.append(
                TensorStatistics(
                    fqn,
                    role,
                    amax=rows[worst, 0].item(),
                    scale=rows[worst, 1].item(),
                    format=self._formats[fqn, role],
                    underflow=shares[0],
                    margin=self._margin,
                    underflow_without_margin=shares[1],
                    underflow_of_own_amax=shares[2],
                )
            )
        self._seen.clear()
        return statistics

    def _report(self) -> None:
        from ..comm import counters

        engine = self.attachment.engine
        statistics, loss = self._statistics(), self._loss()
        if not statistics and self._layers() and not self._told_unseen:
            self._told_unseen = True
            print_rank_0(
                f"telemetry: no operand was seen at step {engine.global_steps}: a CUDA graph (fp8/compile/mode "
                "reduce-overhead) is replayed without our code; mode default shows them"
            )
        alarms = find_alarms(statistics)
        values = aggregate(statistics, alarms)
        sent = counters.to_json()
        if counters.sent_bytes:  # else there was no wire of ours to measure, and a zero would claim one
            for kind, sent_bytes in counters.sent.items():
                values[f"wire/{kind}_bytes"] = float(sent_bytes) / self.interval
            values["wire/ratio"] = counters.ratio()
        counters.reset()
        if engine.monitor.enabled and self.rank == 0 and not self._monitor_failed:
            try:
                engine.monitor.write_events(events(values, engine.global_samples))
            except OSError as error:  # watching must not end what it watches
                self._monitor_failed = True
                print(f"ds_fp8: telemetry: DeepSpeed's monitor: {error}; it gets no more from us", flush=True)
        alarms = new_alarms(alarms, self._known_alarms)
        if self.log is not None:
            self.log.write(
                "step",
                step=engine.global_steps,
                samples=engine.global_samples,
                loss=loss,
                values={name: value for name, value in values.items() if math.isfinite(value)},
                wire=sent,
                readings=[operand.to_json() for operand in statistics],
            )
            for alarm in alarms:
                shown = {
                    "kind": alarm.kind,
                    "fqn": alarm.fqn,
                    "role": alarm.role,
                    "text": alarm.text,
                    "cure": alarm.cure,
                }
                self.log.write("alarm", step=engine.global_steps, **shown)
        for alarm in alarms:
            print_rank_0(f"step {engine.global_steps}: {alarm.text}")
