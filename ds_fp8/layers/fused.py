"""`fuse`: a norm and the linear layer that alone reads it become one te.LayerNormLinear.

Why: the norm's result is written and read once less, and is cast to FP8 before it was ever rounded to 16 bits. When:
only where it is the same function. The parent's forward is traced (torch.fx, with every child as a leaf), and a pair is
taken if the norm is called once, its result goes into one linear layer and nowhere else, and that layer is called once
with nothing else. A forward that cannot be traced, a norm with hooks, products in high precision: kept as they are,
with the reason. A te.LayerNormMLP would need the activation too, and is left out: its first layer is fused, its second
is FP8.

Names and checkpoints stay the unmodified model's: the norm's Parameters stay registered in the norm, which now passes
its input on; the fused layer only refers to them. That is why ZeRO-3 is refused: it gathers the Parameters of the
module that runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from ..errors import BackendError
from ..plan import Plan
from .fused_rms_norm import RULE


@dataclass(frozen=True)
class Pair:
    """Two children of `parent` (an fqn, empty for the root) that become one layer."""

    parent: str
    norm: str
    linear: str


class _OneLevel(fx.Tracer):
    """Traces a module's own forward; its children are not looked into."""

    def is_leaf_module(self, module: nn.Module, module_qualified_name: str) -> bool:
        return True


def fuse_layers(model: nn.Module, plan: Plan) -> tuple[Pair, ...]:
    """Fuse every pair of swapped layers of `model`; returns the pairs.

    Raises BackendError when the plan cannot be fused at all, or nothing was found to fuse: an opt-in that does nothing
    is an error. The reasons are listed.
    """
    from .transformer_engine.norm_linear import make_norm_linear

    reasons: list[str] = []
    pairs = [pair for fqn, parent in model.named_modules() for pair in find_pairs(fqn, parent, plan, reasons)]
    if not pairs:
        listed = "".join(f"\n  {reason}" for reason in sorted(set(reasons))[:10])
        raise BackendError(
            f"fp8/fuse: no norm was found whose result one FP8 linear layer alone reads.{listed}\n  Set fp8/fuse to "
            "false."
        )
    for pair in pairs:
        make_norm_linear(model.get_submodule(pair.parent), pair.norm, pair.linear)
    return tuple(pairs)


def find_pairs(fqn: str, parent: nn.Module, plan: Plan, reasons: list[str]) -> list[Pair]:
    """Pairs among the children of one module; appends why candidates were not taken to `reasons`."""
    prefix = f"{fqn}." if fqn else ""
    swapped = {decision.fqn: decision.kind for decision in plan.swaps}
    norms = {name for name, _ in parent.named_children() if swapped.get(prefix + name) in ("LayerNorm", "RMSNorm")}
    linears = {name for name, _ in parent.named_children() if swapped.get(prefix + name) == "Linear"}
    if not norms or not linears:
        return []
    try:
        graph = _OneLevel().trace(parent)
    except Exception as error:  # noqa: BLE001 - whatever stops the trace, the answer is: not fused, for this reason
        reasons.append(f"{fqn or 'the model'}: its forward cannot be traced ({str(error).splitlines()[0][:100]})")
        return []
    calls: dict[Any, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(node.target, []).append(node)
    found = []
    for name in sorted(norms):
        reason = _conversion_check(parent, name, calls, linears)
        if reason is None:
            found.append(Pair(fqn, name, str(next(iter(calls[name][0].users)).target)))
        else:
            reasons.append(f"{prefix}{name}: {reason}")
    return found


def _conversion_check(parent: nn.Module, norm: str, calls: dict[Any, list[fx.Node]], linears: set[str]) -> str | None:
    """Why the norm cannot be fused with its reader, or None."""
    if len(calls.get(norm, [])) != 1:
        return f"called {len(calls.get(norm, []))} times"
    node = calls[norm][0]
    users = list(node.users)
    if len(users) != 1:
        return f"its result is read {len(users)} times"
    reader = users[0]
    if reader.op != "call_module" or reader.target not in linears:
        return "its result does not go into an FP8 linear layer"
    if len(calls[reader.target]) != 1 or reader.args != (node,) or reader.kwargs:
        return f"{reader.target} is called with something else too"
    for name in (norm, reader.target):
        module = parent.get_submodule(name)
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            return f"{name} has hooks, which would see other tensors"
    if RULE in vars(parent.get_submodule(norm)):
        return "it is a model library's, which Transformer Engine's layers do not replace"
    shape = getattr(parent.get_submodule(norm), "norm_arguments", ((0, 0), None))[0]
    if len(shape) != 1:
        return "it normalises over several dimensions"
    return None
