"""Which modules of stacked experts can compute in FP8, and how their parameters lie.

transformers   classes under its `use_experts_implementation`: what that decorator writes on a module says everything
               (`has_gate`, `has_bias`, `is_transposed`); all of transformers 5's mixtures are such
deepspeed      GroupedExperts, which AutoEP puts in the place of a model's experts before the engine looks at it
registered     classes that a user described with `ds_fp8.experts.register`; Llama 4's and JetMoE's (`library_experts`)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..errors import PlanError
from .library_experts import registration_of
from .shapes import own_parameter, shape_of


@dataclass(frozen=True)
class ExpertRule:
    """A way to compute, and the parameters that take part.

    kind        `transformers`, `deepspeed` or `registered`
    weights     names of the parameters [experts, ., .], in the order in which they are used
    transposed  those that lie as [experts, in, out]
    all_visit   every token goes through every expert
    """

    kind: str
    weights: tuple[str, ...]
    transposed: frozenset[str] = frozenset()
    all_visit: bool = False

    def shapes(self, module: nn.Module) -> list[tuple[int, int, int]]:
        """(experts, out, in) of each."""
        found = []
        for name in self.weights:
            count, rows, columns = shape_of(module.get_parameter(name))
            found.append((count, columns, rows) if name in self.transposed else (count, rows, columns))
        return found


def rule_of(module: nn.Module) -> ExpertRule | None:
    """The rule for a module, None for everything else. Raises PlanError if a registration does not fit its class."""
    if (registration := registration_of(type(module))) is not None:
        missing = [name for name in registration.weights if not _is_stack(module, name)]
        if missing:
            raise PlanError(
                f"ds_fp8.experts.register({type(module).__name__}): {', '.join(missing)} is no parameter [experts, ., "
                ".]."
            )
        transposed = frozenset(name for name, layout in registration.weights.items() if layout == "in_out")
        return ExpertRule("registered", tuple(registration.weights), transposed, registration.all_visit)
    if hasattr(module, "_apply_gate") and hasattr(module, "is_transposed") and hasattr(module, "has_bias"):
        names = ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj")
        if all(_is_stack(module, name) for name in names):
            return ExpertRule("transformers", names, frozenset(names) if module.is_transposed else frozenset())
    if type(module).__name__ == "GroupedExperts" and type(module).__module__ == "deepspeed.moe.ep_experts":
        return ExpertRule("deepspeed", ("w1", "w3", "w2"))
    return None


def _is_stack(module: nn.Module, name: str) -> bool:
    parameter = own_parameter(module, name)
    return parameter is not None and len(shape_of(parameter)) == 3
