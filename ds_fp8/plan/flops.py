"""All matrix products of a training step, by the shapes of the parameters: which share of them computes in FP8.

    a Linear, a Conv1D, a projection    out * in multiply-adds per token
    experts                             the same, times the experts that a token visits; a list of modules likewise
    attention                           S * (width of queries + width of values)      (`attention.py`)
    a layer with a state (Mamba-2, ...) the products inside its chunks              (`scans.py`)
    a pooler, a classification head     once for each sequence, so 1 / S; once for each token where the class says so,
                                        and in decoders (`score`), which choose the token afterwards
    a convolution                       its weights, once for each place

Nothing is run and no value is read, so a model on the meta device, under `zero.Init`, or one stage of a pipeline counts
as well. Forward, dgrad and wgrad are a third each; a frozen weight has no wgrad. The lengths of sequences are those
that the model is made for (`attention.sequence_length`). Parameters of two and more dimensions that no rule knows are
named, not guessed. `tests/plan/test_flops.py` compares with torch's FlopCounterMode.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .attention import attentions, heads_of, packed_projection, sequence_length
from .decisions import ModuleDecision, ProductDecision
from .expert_rules import rule_of
from .expert_speed import NONE, parts_of
from .experts_found import stacked, visited
from .roles import CLASSIFIERS, ROUTER_CLASS, STEP_SIZE, find_roles
from .scans import scans
from .shapes import is_around_another, matrix_of, own_parameter, shape_of

NO_PRODUCT = re.compile(r"pos|embed|token|mask|bias|scale|table|gamma|beta|norm|^A_log|sink|magnitude", re.IGNORECASE)
"""Names of parameters that are added, looked up or multiplied by element."""

PROJECTION = re.compile(r"proj|kernel|._weight$|^(hc_)?fn$", re.IGNORECASE)
"""Names of parameters by which their module multiplies each token itself."""

LINEAR_CLASS = re.compile(r"linear|dense", re.IGNORECASE)
"""Classes that are a linear layer, and no nn.Linear."""

PER_TOKEN = re.compile(r"TokenClassification|QuestionAnswering")
"""Classes whose classification head sees each token."""

PER_SEQUENCE = {*CLASSIFIERS, "pooler"} - {"score"}


@dataclass(frozen=True)
class Counted:
    """What `count_products` found: the products in groups of equal name, and the parameters that no rule knows.

    unknown_macs  multiply-adds per token of all of these, if each token is multiplied by each of them
    """

    products: tuple[ProductDecision, ...]
    unknown: tuple[str, ...]
    length: int
    unknown_macs: float = 0.0


def count_products(model: nn.Module, modules: Sequence[ModuleDecision]) -> Counted:
    """Every matrix product of the model, with what `modules` decided about it."""
    length = sequence_length(model)
    counter = _Counter(model, {decision.fqn: decision for decision in modules}, length)
    found = [*counter.layers(), *counter.experts(), *counter.parameters(), *counter.attention()]
    unknown = list(counter.unknown())
    names = tuple(dict.fromkeys(name for name, _ in unknown))
    return Counted(_grouped(found), names, length, float(sum(numel for _, numel in unknown)))


class _Counter:
    """One walk over the model; remembers which parameters have been accounted for."""

    def __init__(self, model: nn.Module, decisions: dict[str, ModuleDecision], length: int):
        self.model, self.decisions, self.length = model, decisions, length
        self.modules = dict(model.named_modules())
        self.roles = find_roles(model)
        self.known: set[int] = set()
        self.shares: dict[str, float] = {}

    def layers(self) -> Iterator[ProductDecision]:
        """Linear, Conv1D and others like them, convolutions, routers that hold a bare parameter, and
        nn.MultiheadAttention's projection.
        """
        for fqn, module in self.modules.items():
            weight = own_parameter(module, "weight")
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                self._know(module)
            elif is_around_another(module):
                continue
            elif isinstance(module, nn.modules.conv._ConvNd):
                self._know(module)
                macs = module.out_channels * module.in_channels // module.groups * math.prod(module.kernel_size)
                yield self._product(fqn, weight, macs, "convolution", "a convolution has no FP8 product")
            elif (shape := packed_projection(module)) is not None:
                self.known.add(id(module.in_proj_weight))
                macs = shape[0] * shape[1]
                yield self._product(fqn, module.in_proj_weight, macs, "nn.MultiheadAttention", "one packed parameter")
            elif (weight is not None or isinstance(module, nn.Linear)) and (shape := matrix_of(module)) is not None:
                self._know(module)
                yield self._layer(fqn, weight, shape)
            elif weight is not None and len(shape_of(weight)) == 2 and ROUTER_CLASS.search(type(module).__name__):
                self._know(module)
                yield self._product(fqn, weight, _numel(weight), "routers", "a parameter of the router itself")
            elif weight is not None and len(shape_of(weight)) == 2 and LINEAR_CLASS.search(type(module).__name__):
                self._know(module)
                yield self._layer(fqn, weight, shape_of(weight), f"{type(module).__name__} is no nn.Linear")

    def parameters(self) -> Iterator[ProductDecision]:
        """Matrices that a module holds and multiplies by itself: `x_proj_weight`, or XLNet's [width, heads, head]."""
        for fqn, module in self.modules.items():
            heads = heads_of(module)
            for name, parameter in module._parameters.items():
                if parameter is None or id(parameter) in self.known or not _is_matrix(shape_of(parameter)):
                    continue
                by_heads = heads is not None and shape_of(parameter)[1:] == heads
                if not NO_PRODUCT.search(name) and (by_heads or PROJECTION.search(name)):
                    self.known.add(id(parameter))
                    reason = "a parameter of its module itself"
                    yield self._product(f"{fqn}.{name}", parameter, _numel(parameter), name, reason)

    def experts(self) -> Iterator[ProductDecision]:
        """Stacks of matrices [experts, ., .]."""
        for fqn, module in self.modules.items():
            stacks = stacked(module)
            likely = "expert" in f"{fqn} {type(module).__name__}".lower()
            for name, shape in stacks.items():
                parameter = module._parameters[name]
                if min(shape) < 2 or NO_PRODUCT.search(name) or id(parameter) in self.known:
                    continue
                rule = rule_of(module)
                count = shape[0] if rule is not None and rule.all_visit else self._visited(fqn, shape[0])
                if not likely and count is None:
                    continue  # named by `unknown`
                self.known.add(id(parameter))
                macs = shape[1] * shape[2] * (count or 1)
                decision = self.decisions.get(fqn)
                reason = decision.reason if decision is not None else f"{type(module).__name__} has no FP8 rule"
                is_fp8 = decision is not None and decision.is_swap
                parts = parts_of(decision, module, name) if decision is not None else ""
                yield self._product(
                    f"{fqn}.{name}",
                    parameter,
                    macs,
                    "experts",
                    "" if is_fp8 else reason,
                    is_fp8 and parts != NONE,
                    parts,
                )

    def attention(self) -> Iterator[ProductDecision]:
        for fqn, macs in attentions(self.model, self.length):
            yield ProductDecision(starred(fqn), "attention", float(macs), True, False, "no weights")
        for fqn, label, scanned in scans(self.model, self.length):
            yield ProductDecision(starred(fqn), label, float(scanned), True, False, "no weights")

    def unknown(self) -> Iterator[tuple[str, int]]:
        """Parameters that could be matrices, and that nothing above has counted: in words, and how many elements."""
        for fqn, parameter in self.model.named_parameters():
            shape = shape_of(parameter)
            if id(parameter) in self.known or not _is_matrix(shape):
                continue
            if any(NO_PRODUCT.search(part) for part in fqn.split(".")[-2:]):
                continue
            yield f"{starred(fqn)} {list(shape)}", _numel(parameter)

    def _layer(
        self, fqn: str, weight: Any, shape: tuple[int, ...], unknown: str = "not a layer of ours"
    ) -> ProductDecision:
        decision, role = self.decisions.get(fqn), self.roles.get(fqn)
        if decision is not None and decision.is_swap:
            label, reason = "layers", ""
        else:
            reason = decision.reason if decision is not None else unknown
            last = [part for part in starred(fqn).split(".") if part != "*"][-1:] or ["the model"]
            plural = {"router": "routers", "adapter": "adapters", STEP_SIZE: last[0]}
            label = last[0] if role is None else plural.get(role.name, fqn)
        macs = shape[0] * shape[1] * self._share(fqn)
        return self._product(
            fqn, weight, macs, label, reason, not reason or (decision is not None and decision.is_swap)
        )

    def _product(
        self, fqn: str, weight: Any, macs: float, label: str, reason: str, fp8: bool = False, parts: str = ""
    ) -> ProductDecision:
        trained = weight is None or bool(weight.requires_grad)
        return ProductDecision(starred(fqn), label, float(macs), trained, fp8, reason, parts)

    def _know(self, module: nn.Module) -> None:
        """The parameters of a layer, and those from which its weight is computed (weight_norm)."""
        parametrized = getattr(module, "parametrizations", None)
        for holder in (module, *(parametrized.modules() if parametrized is not None else ())):
            self.known.update(id(parameter) for parameter in holder._parameters.values() if parameter is not None)

    def _share(self, fqn: str) -> float:
        """Of the tokens of a sequence, those that this layer sees: of experts in a list those that visit it."""
        parts = fqn.split(".")
        role = self.roles.get(fqn)
        if role is not None and role.name == "router":
            return 1.0
        if not PER_SEQUENCE.isdisjoint(parts) and not PER_TOKEN.search(type(self.model).__name__):
            return 1 / self.length
        for end in range(len(parts) - 1, 0, -1):
            above = self.modules[".".join(parts[:end])]
            if "expert" in parts[end - 1].lower() and isinstance(above, (nn.ModuleList, nn.ModuleDict)):
                return min(1.0, (self._visited(".".join(parts[:end]), len(above)) or 1) / len(above))
        return 1.0

    def _visited(self, fqn: str, experts: int) -> int | None:
        if fqn not in self.shares:
            found = visited(fqn, experts, self.modules, getattr(self.model, "config", None))
            self.shares[fqn] = found or 0
        return int(self.shares[fqn]) or None


def _grouped(products: Sequence[ProductDecision]) -> tuple[ProductDecision, ...]:
    """One entry for each name, label and fate, so that a plan of a hundred layers stays readable."""
    groups: dict[tuple[Any, ...], float] = {}
    for product in products:
        key = (product.name, product.label, product.trained, product.fp8, product.reason, product.parts)
        groups[key] = groups.get(key, 0.0) + product.macs
    return tuple(
        ProductDecision(name, label, macs, trained, fp8, reason, parts)
        for (name, label, trained, fp8, reason, parts), macs in groups.items()
    )


def starred(fqn: str) -> str:
    """The name that layers of equal place share: `model.layers.*.mlp.up_proj`."""
    return ".".join("*" if part.isdigit() else part for part in fqn.split(".")) or "the model itself"


def _is_matrix(shape: tuple[int, ...]) -> bool:
    return sum(size > 1 for size in shape) > 1


def _numel(weight: Any) -> int:
    size = 1
    for side in shape_of(weight) if weight is not None else ():
        size *= side
    return size
