"""ScaledOptimizer: what every optimizer with states and masters in 8 and 16 bits shares; an algorithm is a subclass.

A parameter is a flat ZeRO partition or a regular tensor, in bf16 or fp16 (the 16-bit weight itself, half of its
master) or fp32 (its own master). The gradient is `param.grad`, or `optimizer.gradients[param]`: a tensor of another
dtype than the parameter's (torch refuses an fp32 `.grad` on a bf16 tensor), or `Pieces`, which the step frees as it
goes. `grad_scale` multiplies every gradient inside the pass: unscaling and clipping cost nothing.

`state[param]`, all tensors flat, updated in place and never rebound:

    step        int, a counter
    partition   int, this parameter's number: with `seed` and `step` it decides the random bits of stochastic rounding
    exp_avg...  exp_avg_sq...  master...      tensors, see codecs.py and masters.py; those in `moments` alone
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from ..errors import CheckpointError, PlanError
from ..levels import LEVELS, Level
from ..numerics.dtypes import BASE_DTYPES
from ..numerics.random_bits import ADAM_STREAM, mix, seed_at
from . import checkpointing, codecs, masters
from .algorithm import check_gradient, check_numbers, refuse_options
from .pieces import Pieces, state_at

SEED = 0x5EED
"""Where stochastic rounding starts; each partition adds its own number, replicas share it. Kept in checkpoints."""


class ScaledOptimizer(torch.optim.Optimizer):
    """An algorithm whose states lie in formats of their own.

    algorithm   its name, in checkpoints
    moments     the states that it keeps

    level       a Level, or the name of one: the formats of states and master, and the rounding
    base_dtype  `fp32`, `bf16` or `fp16`: what 16-bit parameters must be; None accepts each parameter's own
    seed        of stochastic rounding; ranks that own different partitions pass different seeds
    """

    algorithm = ""
    moments: tuple[str, ...] = ()

    def __init__(
        self, params: Iterable[Any], defaults: dict[str, Any], *, level: Level | str, base_dtype: str | None, seed: int
    ):
        level = LEVELS[level] if isinstance(level, str) else level
        self.level = level.keeping(self.moments)
        if base_dtype is not None and base_dtype not in BASE_DTYPES:
            raise ValueError(f"base_dtype: {base_dtype!r} is not one of {', '.join(BASE_DTYPES)}")
        self.base_dtype = base_dtype
        self.seed = int(seed)
        self.hyperparameters = tuple(defaults)
        self.grad_scale: float | torch.Tensor = 1.0
        self.gradients: dict[torch.Tensor, torch.Tensor | Pieces] = {}
        super().__init__(params, defaults)

    def check_numbers(self, numbers: dict[str, Any]) -> None:
        """ValueError with the name and the value for a number out of range."""
        check_numbers(numbers)

    def step_options(self, group: dict[str, Any]) -> dict[str, Any]:
        """What `step_flat` needs of a parameter group: every hyper-parameter, betas as beta1 and beta2.

        Python numbers: schedulers may have put tensors there.
        """
        options: dict[str, Any] = {}
        for name in self.hyperparameters:
            if name == "betas":
                options["beta1"], options["beta2"] = (float(beta) for beta in group[name])
            else:
                options[name] = bool(group[name]) if isinstance(self.defaults[name], bool) else float(group[name])
        return options

    def step_flat(self, flat: torch.Tensor, grad: torch.Tensor, state: dict[str, Any], options: dict[str, Any]) -> None:
        """One update of a flat parameter, its state and master, in place; `state["step"]` counts this step already.

        It may get the parameter in ranges of whole blocks, each with its part of the gradient and of the state.
        """
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; numbers and dtypes are checked before the group is taken."""
        numbers = {**self.defaults, **param_group}
        refuse_options(numbers, type(self).__name__)
        self.check_numbers(numbers)
        super().add_param_group(param_group)
        try:
            for param in self.param_groups[-1]["params"]:
                self._check_dtype(param)
        except PlanError:
            self.param_groups.pop()
            raise

    def _check_dtype(self, param: torch.Tensor) -> None:
        allowed = set(BASE_DTYPES.values())
        if self.base_dtype is not None:
            allowed = {torch.float32, BASE_DTYPES[self.base_dtype]}
        if param.dtype not in allowed:
            names = " or ".join(sorted(str(dtype).removeprefix("torch.") for dtype in allowed))
            raise PlanError(
                f"a parameter of shape {tuple(param.shape)} is {param.dtype}; {type(self).__name__} takes {names}."
            )

    def __getstate__(self) -> dict[str, Any]:
        # torch copies and pickles three attributes by name; a copy without its level could not step.
        ours = {
            name: getattr(self, name)
            for name in ("level", "base_dtype", "seed", "hyperparameters", "grad_scale", "gradients")
        }
        return {**super().__getstate__(), **ours}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            options = self.step_options(group)
            for param in group["params"]:
                grad = self.gradients.get(param, param.grad)
                if isinstance(grad, Pieces):
                    self._step_pieces(param, grad, options)
                elif grad is not None:
                    check_gradient(param, grad)
                    self._step_param(param, grad, options)
        return loss

    def _step_param(self, param: torch.Tensor, grad: torch.Tensor, options: dict[str, Any]) -> None:
        state = self.state_of(param)
        state["step"] += 1
        flat = param.detach().reshape(-1)
        self.step_flat(flat, _in_order_of(param, grad), state, options)
        if not param.is_contiguous():
            param.copy_(flat.view(param.shape))

    def _step_pieces(self, param: torch.Tensor, pieces: Pieces, options: dict[str, Any]) -> None:
        """The same update, to the bit, of a flat parameter whose gradient is in pieces."""
        state = self.state_of(param)
        state["step"] += 1
        flat = param.detach()
        assert flat.dim() == 1 and flat.is_contiguous() and flat.numel() == pieces.numel
        for start, grad in pieces.chunks():
            stop = start + grad.numel()
            part = state_at(state, self.moments, self.level, flat, start, stop)
            self.step_flat(flat[start:stop], grad, part, options)
            del grad  # before the next one is made

    def rounding_of(self, state: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a step: how it rounds."""
        seed = mix(self.seed + mix(state["partition"]))
        return {
            "rounding": self.level.rounding,
            "seed": seed_at(state.get("first", 0), seed, state["step"], ADAM_STREAM),
        }

    def state_of(self, param: torch.Tensor) -> dict[str, Any]:
        """The state of `param`, made (zero moments, master equal to the parameter) if there is none yet."""
        state = self.state[param]
        if not state:
            numel, device = param.numel(), param.device
            state["step"] = 0
            state["partition"] = len(self.state) - 1
            for moment in self.moments:
                state.update(codecs.new_moment(moment, getattr(self.level, moment), numel, device))
            state.update(masters.new_master(self.level.master, param.detach().reshape(-1)))
        return state

    def parameters(self) -> Iterator[torch.Tensor]:
        """All parameters, group by group."""
        for group in self.param_groups:
            yield from group["params"]

    def formats(self) -> dict[str, str]:
        """What must be equal for quantized values to be exchanged as they are."""
        return {name: getattr(self.level, name) for name in (*self.moments, "master", "rounding")}

    @torch.no_grad()
    def export_fp32(
        self,
        param: torch.Tensor,
        *,
        only: tuple[str, ...] | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> dict[str, Any]:
        """Fresh fp32 flats of `master` and the moments (those in `only`, elements [start, stop)), and `step`."""
        state, only = self.state_of(param), ("master", *self.moments) if only is None else only
        result: dict[str, Any] = {"step": state["step"]}
        for name in only:
            if name == "master":
                flat = param.detach().reshape(-1)
                result[name] = masters.export_master(state, self.level.master, flat, start, stop)
            else:
                result[name] = codecs.export_moment(state, name, self.formats(), start, stop)
        return result

    @torch.no_grad()
    def import_fp32(
        self,
        param: torch.Tensor,
        *,
        master: torch.Tensor | None = None,
        step: int | None = None,
        **given: torch.Tensor | None,
    ) -> None:
        """Encode fp32 flats [n] into the state of `param`, in place, to nearest; what is None stays as it is.

        Beside the master the moments, by name. Where exp_avg is a ratio it is encoded beside exp_avg_sq: give both at
        once, or the one that is set first is rounded twice.
        A new master writes the parameter too. Raises CheckpointError, before anything is changed, for a wrong size.
        """
        if foreign := [name for name, values in given.items() if values is not None and name not in self.moments]:
            raise CheckpointError(
                f"{', '.join(foreign)}: no state of {self.algorithm}, which keeps {' and '.join(self.moments)}; it was "
                "saved by another algorithm.\n  Load the weights alone (load_optimizer_states=False)."
            )
        for name, values in {"master": master, **given}.items():
            if values is not None and values.numel() != param.numel():
                raise CheckpointError(f"{name} of {values.numel()} elements for a partition of {param.numel()}.")
        state = self.state_of(param)
        moments = {name: None if (values := given.get(name)) is None else values.reshape(-1) for name in self.moments}
        codecs.import_moments(state, self.formats(), moments)
        if master is not None:
            flat = param.detach().reshape(-1)
            masters.import_master(state, self.level.master, flat, master.reshape(-1))
            if not param.is_contiguous():
                param.copy_(flat.view(param.shape))
        if step is not None:
            state["step"] = int(step)

    def forget_moments(self, param: torch.Tensor) -> None:
        """As before its first step; the master stays. Nothing for a parameter that has no state yet."""
        if self.state.get(param):
            zeros = {
                name: torch.zeros(param.numel(), dtype=torch.float32, device=param.device) for name in self.moments
            }
            self.import_fp32(param, step=0, **zeros)

    def export_quantized(self, param: torch.Tensor) -> dict[str, Any]:
        """The exact state of `param`, the 16-bit weight included, as built-in types and CPU tensors; see
        checkpointing.py.
        """
        return checkpointing.export_quantized(self, param)

    def import_quantized(self, param: torch.Tensor, quantized: dict[str, Any]) -> None:
        """Take what `export_quantized` gave, bit for bit, or encoded anew if the formats differ; CheckpointError if
        foreign.
        """
        checkpointing.import_quantized(self, param, quantized)

    def state_dict(self) -> dict[str, Any]:
        """torch's layout with our quantized values as states, plus `ds_fp8` (version, formats, seed); see
        checkpointing.py.
        """
        return checkpointing.state_dict(self, super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state_dict of ours (any level) or of torch's Adam; on CheckpointError the optimizer is as before.

        Tensors are filled in place and never cast to the parameter's dtype, which is what torch's own method would
        do.
        """
        checkpointing.load_state_dict(self, state_dict)


def _in_order_of(param: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The gradient flat, in the order of the parameter's elements."""
    if grad.shape == param.shape:
        return grad.detach().reshape(-1)
    return grad.detach().contiguous().view(-1)
