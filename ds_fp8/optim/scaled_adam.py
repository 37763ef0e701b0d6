"""ScaledAdam and ScaledAdamW: torch's Adam and AdamW with states and masters in 8 and 16 bits.

A parameter is a flat ZeRO partition or an ordinary tensor, in bf16 or fp16 (the 16-bit weight itself, half of its
master) or fp32 (its own master). The gradient is `param.grad`, or `optimizer.gradients[param]` when it must have
another dtype than the parameter: torch refuses an fp32 `.grad` on a bf16 tensor. `grad_scale` multiplies every gradient
inside the pass: unscaling and clipping cost nothing.

`state[param]`, all tensors flat, updated in place and never rebound:

    step        int, a plain counter
    partition   int, this parameter's number: with `seed` and `step` it decides the random bits of stochastic rounding
    exp_avg...  exp_avg_sq...  master...      tensors, see codecs.py and masters.py

Example:

    optimizer = ScaledAdamW(model.parameters(), lr=3e-4, weight_decay=0.1, level="O2")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from .. import kernels
from ..errors import CheckpointError, PlanError
from ..levels import LEVELS, Level
from ..numerics.dtypes import BASE_DTYPES
from ..numerics.random_bits import mix
from . import checkpointing, codecs, masters
from .algorithm import check_gradient, check_numbers, refuse_options, step_options
from .codecs import MOMENTS


class ScaledAdam(torch.optim.Optimizer):
    """Adam: weight decay is an L2 term of the gradient, as in torch.optim.Adam.

    level       a Level, or the name of one: the formats of exp_avg, exp_avg_sq and master, and the rounding
    base_dtype  `fp32`, `bf16` or `fp16`: what 16-bit parameters must be; None accepts each parameter's own
    seed        of stochastic rounding; ranks that own different partitions pass different seeds
    """

    decoupled = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        *,
        level: Level | str = "O2",
        base_dtype: str | None = None,
        seed: int = 0,
    ):
        self.level = LEVELS[level] if isinstance(level, str) else level
        if base_dtype is not None and base_dtype not in BASE_DTYPES:
            raise ValueError(f"base_dtype: {base_dtype!r} is not one of {', '.join(BASE_DTYPES)}")
        self.base_dtype = base_dtype
        self.seed = int(seed)
        self.grad_scale: float | torch.Tensor = 1.0
        self.gradients: dict[torch.Tensor, torch.Tensor] = {}
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; numbers and dtypes are checked before the group is taken."""
        numbers = {**self.defaults, **param_group}
        refuse_options(numbers, type(self).__name__)
        check_numbers(numbers["lr"], numbers["betas"], numbers["eps"], numbers["weight_decay"])
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
            raise PlanError(f"a parameter of shape {tuple(param.shape)} is {param.dtype}; ScaledAdam takes {names}.")

    def __getstate__(self) -> dict[str, Any]:
        # torch copies and pickles three attributes by name; a copy without its level could not step.
        ours = {name: getattr(self, name) for name in ("level", "base_dtype", "seed", "grad_scale", "gradients")}
        return {**super().__getstate__(), **ours}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            options = step_options(group)
            for param in group["params"]:
                grad = self.gradients.get(param, param.grad)
                if grad is not None:
                    check_gradient(param, grad)
                    self._step_param(param, grad, options)
        return loss

    def _step_param(self, param: torch.Tensor, grad: torch.Tensor, options: dict[str, Any]) -> None:
        state = self.state_of(param)
        state["step"] += 1
        flat = param.detach().reshape(-1)
        kernels.adam_step(
            kernels.AdamStep(
                param=flat,
                grad=_in_order_of(param, grad),
                exp_avg=codecs.moment_codes(state, "exp_avg", self.level.exp_avg),
                exp_avg_sq=codecs.moment_codes(state, "exp_avg_sq", self.level.exp_avg_sq),
                master=masters.master_codes(state, self.level.master, flat),
                decoupled=self.decoupled,
                step=state["step"],
                grad_scale=self.grad_scale,
                rounding=self.level.rounding,
                torch_sqrt=self._promises_torch(flat),
                seed=mix(self.seed + mix(state["partition"])),
                **options,
            )
        )
        if not param.is_contiguous():
            param.copy_(flat.view(param.shape))

    def _promises_torch(self, flat: torch.Tensor) -> bool:
        """States and master are fp32 to the last bit: then the step equals torch.optim.Adam's, to the last bit."""
        exact_states = self.level.exp_avg == self.level.exp_avg_sq == "fp32"
        return exact_states and masters.format_for(self.level.master, flat) in masters.EXACT_FORMATS

    def state_of(self, param: torch.Tensor) -> dict[str, Any]:
        """The state of `param`, made (zero moments, master equal to the parameter) if there is none yet."""
        state = self.state[param]
        if not state:
            numel, device = param.numel(), param.device
            state["step"] = 0
            state["partition"] = len(self.state) - 1
            state.update(codecs.new_moment("exp_avg", self.level.exp_avg, numel, device))
            state.update(codecs.new_moment("exp_avg_sq", self.level.exp_avg_sq, numel, device))
            state.update(masters.new_master(self.level.master, param.detach().reshape(-1)))
        return state

    def parameters(self) -> Iterator[torch.Tensor]:
        """All parameters, group by group."""
        for group in self.param_groups:
            yield from group["params"]

    def formats(self) -> dict[str, str]:
        """What must be equal for codes to be exchanged as they are."""
        return {name: getattr(self.level, name) for name in ("exp_avg", "exp_avg_sq", "master", "rounding")}

    @torch.no_grad()
    def export_fp32(
        self,
        param: torch.Tensor,
        *,
        only: tuple[str, ...] = ("master", *MOMENTS),
        start: int = 0,
        stop: int | None = None,
    ) -> dict[str, Any]:
        """Fresh fp32 flats of `master`, `exp_avg` and `exp_avg_sq` (those in `only`, elements [start, stop)), and `step`."""
        state = self.state_of(param)
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
        exp_avg: torch.Tensor | None = None,
        exp_avg_sq: torch.Tensor | None = None,
        step: int | None = None,
    ) -> None:
        """Encode fp32 flats [n] into the state of `param`, in place, to nearest; what is None stays as it is.

        An 8-bit exp_avg is encoded beside exp_avg_sq: give both at once, or the one that is set first is rounded twice.
        A new master writes the parameter too. Raises CheckpointError, before anything is changed, for a wrong size.
        """
        given = {"master": master, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        for name, values in given.items():
            if values is not None and values.numel() != param.numel():
                raise CheckpointError(f"{name} of {values.numel()} elements for a partition of {param.numel()}.")
        state = self.state_of(param)
        moments = {name: None if given[name] is None else given[name].reshape(-1) for name in MOMENTS}
        codecs.import_moments(state, self.formats(), moments)
        if master is not None:
            flat = param.detach().reshape(-1)
            masters.import_master(state, self.level.master, flat, master.reshape(-1))
            if not param.is_contiguous():
                param.copy_(flat.view(param.shape))
        if step is not None:
            state["step"] = int(step)

    def export_codes(self, param: torch.Tensor) -> dict[str, Any]:
        """The exact state of `param`, the 16-bit weight included, as plain types and CPU tensors; see checkpointing.py."""
        return checkpointing.export_codes(self, param)

    def import_codes(self, param: torch.Tensor, codes: dict[str, Any]) -> None:
        """Take what `export_codes` gave, bit for bit, or encoded anew if the formats differ; CheckpointError if foreign."""
        checkpointing.import_codes(self, param, codes)

    def state_dict(self) -> dict[str, Any]:
        """torch's layout with our codes as states, plus `ds_fp8` (version, formats, seed); see checkpointing.py."""
        return checkpointing.state_dict(self, super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state_dict of ours (any level) or of a plain Adam; on CheckpointError the optimizer is as before.

        Tensors are copied in place and never cast to the parameter's dtype, which is what torch's own method would do.
        """
        checkpointing.load_state_dict(self, state_dict)


class ScaledAdamW(ScaledAdam):
    """AdamW: weight decay shrinks the weight directly, as in torch.optim.AdamW."""

    decoupled = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        bias_correction: bool = True,
        *,
        level: Level | str = "O2",
        base_dtype: str | None = None,
        seed: int = 0,
    ):
        super().__init__(
            params, lr, betas, eps, weight_decay, bias_correction, level=level, base_dtype=base_dtype, seed=seed
        )


def _in_order_of(param: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The gradient flat, in the order of the parameter's elements."""
    if grad.shape == param.shape:
        return grad.detach().reshape(-1)
    return grad.detach().contiguous().view(-1)
