"""Where a model keeps its experts: lists of modules, or parameters [experts, out, in]; and how many a token visits.

Nothing here imports a model library: experts are known by their structure, and the number that a token visits by the
attribute that the model's own router, block or configuration reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from .shapes import shape_of

TOP_K = (
    "top_k",
    "topk",
    "k",
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "num_selected_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
)
"""Attributes of routers, MoE blocks and configurations that say how many experts a token visits."""


def stacked(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """name -> shape of the parameters [experts, ., .] that `module` itself holds."""
    return {
        name: shape_of(parameter)
        for name, parameter in module._parameters.items()
        if parameter is not None and len(shape_of(parameter)) == 3
    }


def expert_counts(module: nn.Module, *, named: bool = True) -> set[int]:
    """Numbers of experts that the children of `module` keep: the length of a list, the first axis of a stack.

    named  only of children that are called experts
    """
    return set(_counts(module, named))


def _counts(module: nn.Module, named: bool) -> Iterator[int]:
    for name, child in module.named_children():
        if named and "expert" not in name.lower():
            continue
        for inner in (child, *child.children()):
            if isinstance(inner, (nn.ModuleList, nn.ModuleDict)) and len(inner) > 1:
                yield len(inner)
            for shape in stacked(inner).values():
                yield shape[0]


def visited(fqn: str, experts: int, modules: dict[str, nn.Module], root_config: Any) -> int | None:
    """How many of `experts` a token visits in the experts at `fqn`; None if nothing says so.

    Asked in this order: the module itself, its siblings (routers), the modules above, their configurations.
    """
    parts = fqn.split(".")
    for up in range(4):
        place = ".".join(parts[: len(parts) - up]) if up <= len(parts) else None
        if place is None or place not in modules:
            continue
        module = modules[place]
        for candidate in (module, *(child for name, child in module.named_children())):
            if (found := _top_k(candidate, experts)) is not None:
                return found
    configs = [getattr(modules.get(".".join(parts[:end])), "config", None) for end in range(len(parts), -1, -1)]
    for config in [*configs, root_config]:
        for part in (getattr(config, "text_config", None), config):
            if part is not None and (found := _top_k(part, experts)) is not None:
                return found
    return None


def _top_k(holder: Any, experts: int) -> int | None:
    for name in TOP_K:
        value = getattr(holder, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= experts:
            return value
    return None
