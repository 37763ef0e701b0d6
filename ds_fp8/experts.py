"""Experts of your own in FP8: tell how a class that holds `[experts, ., .]` parameters computes.

    import ds_fp8.experts

    def forward(module, linear, x, counts):
        hidden = torch.relu(linear("up", x, counts))
        return linear("down", hidden, counts)

    ds_fp8.experts.register(MyExperts, weights={"up": "out_in", "down": "out_in"}, forward=forward)

`linear(name, x, counts)` multiplies x [rows, in], whose rows are sorted by expert, with that expert's matrix, and gives
[rows, out]; `counts` [experts] says how many rows each expert has (integers, on x's device; an expert may have none,
and rows behind the last one come out as zeros). A bias is yours to add. `forward` is called with the module and then
what the module's own forward is called with; the latter still runs where FP8 does not: in eval mode, before
`start_step`, when the module is excluded. transformers' experts and DeepSpeed's grouped experts (AutoEP) are known
without this, and so are those with code of their own, Llama 4's and JetMoE's (`plan/library_experts.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import PlanError

LAYOUTS = ("out_in", "in_out")


@dataclass(frozen=True)
class Registration:
    """What `register` was told.

    weights    a parameter's name -> `out_in` or `in_out`
    all_visit  every token goes through every expert, whatever the router says
    """

    weights: Mapping[str, str]
    forward: Callable[..., Any]
    all_visit: bool = False


_registered: dict[type, Registration] = {}


def register(cls: type, *, weights: Mapping[str, str], forward: Callable[..., Any]) -> None:
    """Let `fp8` convert modules of class `cls`, not of its subclasses: call it before `deepspeed.initialize`.

    weights  name of a parameter [experts, out, in] -> "out_in"; [experts, in, out] -> "in_out"
    Raises PlanError if there are no weights, or a layout has another name.
    """
    wrong = [f"{name}: {layout!r}" for name, layout in weights.items() if layout not in LAYOUTS]
    if wrong or not weights:
        raise PlanError(
            f"ds_fp8.experts.register({cls.__name__}): weights maps names to one of {', '.join(LAYOUTS)}, "
            f"not {', '.join(wrong) or 'nothing'}."
        )
    _registered[cls] = Registration(dict(weights), forward)


def unregister(cls: type) -> None:
    """Forget `cls`; modules that were converted already stay so."""
    _registered.pop(cls, None)


def registration(cls: type) -> Registration | None:
    return _registered.get(cls)
