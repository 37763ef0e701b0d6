"""The plan as data: frozen, printable, equal on all ranks.

Nothing here decides; `make.py` fills these classes and the stations read them. A station gets its own part only:
layers read `Fp8Plan` and the module decisions, optim reads `OptimPlan`, comm and zero read `CommPlan`.
Everything is a built-in value, so a plan survives JSON (`Plan.to_json`, `plan_from_json`) and hashes to one digest.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from ..config.settings import CompileSettings
from ..levels import Level
from ..recipe import HighPrecision, Recipe


@dataclass(frozen=True)
class ModuleDecision:
    """What happens to one Linear, Conv1D, module of experts, LayerNorm or RMSNorm.

    fqn     full name in the model
    kind    `Linear`, `LayerNorm` or `RMSNorm`: the torch class it is, or derives from; `Conv1D`: GPT-2's layer with a
            weight [in, out]; `Experts`: a module that holds parameters [experts, ., .]
    action  `swap` or `keep`
    target  class that takes over, e.g. `Fp8Linear` or `te.Linear`; empty when kept
    reason  why it is kept; for a swap empty, or what made an exception
    shape   (out, in) of a Linear and a Conv1D, (experts, out, in) of experts' first weight, normalized shape of a norm
    least_rows  of experts whose products were measured: for each weight the rows per expert from which fprop, and from
                which dgrad, are faster in FP8, 0 for never; with fewer they run in high precision in that call, and
                wgrad always does. Empty: every product is in FP8
    whole_experts  of experts whose weights are cast outside of the module (O3, frozen weights): one scale for each
                expert, so that the data serve fprop and dgrad
    """

    fqn: str
    kind: str
    action: str
    target: str = ""
    reason: str = ""
    shape: tuple[int, ...] = ()
    least_rows: tuple[int, ...] = ()
    whole_experts: bool = False

    @property
    def is_swap(self) -> bool:
        return self.action == "swap"


@dataclass(frozen=True)
class ParameterDecision:
    """In which format everything that belongs to one parameter is kept and sent; `none` where nothing is.

    owner  fqn of the FP8 layer whose quantized values stand for this weight (O3); empty for all others
    """

    fqn: str
    shape: tuple[int, ...]
    numel: int
    dtype: str
    frozen: bool
    exp_avg: str
    exp_avg_sq: str
    master: str
    gradient_wire: str
    weight_wire: str
    owner: str = ""


@dataclass(frozen=True)
class ProductDecision:
    """Matrix products of equal name (`model.layers.*.mlp.up_proj`), and whether they compute in FP8.

    label    what the banner calls them when they do not: `attention`, `experts`, `lm_head`
    macs     multiply-adds of one forward for one token, all of that name together
    trained  the weight has a gradient, so there is a wgrad; attention has as many products
    reason   why they stay in high precision
    parts    those of `fprop dgrad wgrad` that run in FP8 at all (`least_rows`); empty: all that the recipe does
    """

    name: str
    label: str
    macs: float
    trained: bool
    fp8: bool
    reason: str = ""
    parts: str = ""


@dataclass(frozen=True)
class Fp8Plan:
    """The part of the layers: settings with every `auto` decided.

    frozen_weights  names of the frozen weights that are kept in quantized form alone
    """

    enabled: bool = False
    implied: bool = False
    backend: str = "torch"
    recipe: Recipe = field(default_factory=Recipe)
    weight_cache: bool = False
    eval: bool = False
    start_step: int = 0
    min_features: int = 0
    fuse: bool = False
    compile: CompileSettings | None = None
    emulated: bool = True
    frozen_weights: tuple[str, ...] = ()


@dataclass(frozen=True)
class OptimPlan:
    """The part of the optimizer: the level that is in force on this base and stage.

    base_dtype         dtype of the model's parameters: `bf16`, `fp16` or `fp32`
    offload_optimizer  `cpu`, `nvme` or None
    """

    level: Level
    base_dtype: str
    zero_stage: int
    offload_optimizer: str | None = None


@dataclass(frozen=True)
class CommPlan:
    """The part of the wire.

    fp8_weights  names of the parameters that travel as the quantized values of their FP8 layer (O3); all others in 16
                 bits
    """

    gradient_wire: str
    gradient_wire_scope: str
    weight_wire: str
    block_size: int
    fp8_weights: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Everything ds_fp8 will do to one job. `optim` and `comm` are None without an `msamp` section.

    products   every matrix product of the model (`flops.py`), counted for sequences of `length` tokens
    unknown    parameters of two and more dimensions that no rule knows; `unknown_macs` is what they would add to it
    partial    the model is one stage of a pipeline
    unmatched  patterns that match nothing *here*; only in a partial model, elsewhere they are an error
    notes      one line each: what was adapted, and why
    """

    modules: tuple[ModuleDecision, ...]
    parameters: tuple[ParameterDecision, ...]
    fp8: Fp8Plan
    optim: OptimPlan | None
    comm: CommPlan | None
    zero_stage: int
    world_size: int
    base_dtype: str
    device: str
    products: tuple[ProductDecision, ...] = ()
    unknown: tuple[str, ...] = ()
    unknown_macs: float = 0.0
    length: int = 0
    partial: bool = False
    unmatched: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def swaps(self) -> tuple[ModuleDecision, ...]:
        return tuple(decision for decision in self.modules if decision.is_swap)

    def decision(self, fqn: str) -> ModuleDecision | None:
        return next((decision for decision in self.modules if decision.fqn == fqn), None)

    def banner(self) -> str:
        """What rank 0 prints at start."""
        from .banner import banner

        return banner(self)

    def digest(self) -> str:
        """SHA-256 of all that is decided; the name of the device is left out, so an H100 and an H200 may share a
        job.
        """
        decided = {key: value for key, value in asdict(self).items() if key != "device"}
        return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(asdict(self), indent=indent, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Plan:
        return plan_from_json(text)


def plan_from_json(text: str) -> Plan:
    """The plan that `Plan.to_json` wrote."""
    data: dict[str, Any] = json.loads(text)
    recipe = dict(data["fp8"]["recipe"])
    recipe["override_linear_precision"] = HighPrecision(*recipe["override_linear_precision"])
    optim, comm = data["optim"], data["comm"]
    data["modules"] = tuple(ModuleDecision(**_tuples(item)) for item in data["modules"])
    data["parameters"] = tuple(ParameterDecision(**_tuples(item)) for item in data["parameters"])
    data["products"] = tuple(ProductDecision(**item) for item in data.get("products", ()))
    compiled = data["fp8"].get("compile")
    compiled = None if compiled is None else CompileSettings(**compiled)
    data["fp8"] = Fp8Plan(**_tuples({**data["fp8"], "recipe": Recipe(**recipe), "compile": compiled}))
    data["optim"] = None if optim is None else OptimPlan(**{**optim, "level": Level(**optim["level"])})
    data["comm"] = None if comm is None else CommPlan(**_tuples(comm))
    return Plan(**_tuples(data))


def _tuples(item: dict[str, Any]) -> dict[str, Any]:
    """JSON knows lists only; frozen classes hold tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in item.items()}
