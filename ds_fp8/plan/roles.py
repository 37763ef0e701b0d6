"""Layers that the field keeps in high precision because of what they are for: heads, routers, adapters.

Their products are few and small, and what they decide is not: a wrong expert, a wrong word, an adapter that starts at
zero and whose first gradients are its whole signal. So they are kept by default, and a pattern that names them converts
them:

    output head           what `get_output_embeddings()` gives, or a Linear as wide as the vocabulary of the embedding
    router                a Linear that gives one number per expert, or that belongs to a class of routers
    classification head   the layers under `classifier`, `score`, `qa_outputs` and the like; a last Linear named `head`
    step size             `dt_proj` of Mamba-1: the mixer multiplies by its weight and never calls the layer
    adapter               LoRA and its like: what PEFT lists in `adapter_layer_names`, or a name that says so

Source: what torchtitan, torchao's float8 recipes, Megatron-LM and DeepSeek-V3 (arXiv 2412.19437, 3.3) keep.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from .experts_found import expert_counts
from .shapes import own_parameter, shape_of

HEAD_NAMES = ("lm_head", "embed_out", "unembed", "unembedding")
"""Names that say output head by themselves: in the last stage of a pipeline there is no embedding to compare with."""

HEADLIKE = re.compile(r"head|out|logits|vocab|decoder|unembed|predict", re.IGNORECASE)
POSITIONS = re.compile(r"pos|wpe|type|segment|time", re.IGNORECASE)
"""Embeddings of other things than words: a linear as wide as the longest sequence is no head."""

CLASSIFIERS = ("classifier", "classifiers", "pre_classifier", "classification_head", "score", "qa_outputs", "cls_head")
ROUTER_CLASS = re.compile(
    r"router|top_?k_?gat(?!ed)|moe_?gat(?!ed)|gating(?!_?(mlp|ffn|unit))|gate_?network", re.IGNORECASE
)
ROUTER_NAME = re.compile(r"router|^wg$", re.IGNORECASE)
GATE_NAME = re.compile(r"^(w_)?(gate|gates|gating|switch)(_linear|_network|_net|_layer)?$", re.IGNORECASE)
"""A router if it gives one number for each module of any list beside it; a SwiGLU's projection may be called so too."""

STEP_SIZE = "step size"

ADAPTER_NAME = re.compile(r"(^|_)(lora|loha|lokr|vera|dora|oft|boft|adapter|adapters)(_|$)|lora_", re.IGNORECASE)


Linears = dict[str, nn.Linear]
"""The Linears of a model by their full name."""


@dataclass(frozen=True)
class Role:
    """What a layer is for.

    name  as the reason says it: `output head`, `router`, `classification head`, `adapter`, `experts`
    part  the part of its full name that says so: `lm_head`, `gate`, `lora_A`; a pattern must name it
    glob  a pattern that names it and its like
    why   more about the default, as it stands in the reason
    least_rows  it is not kept after all, but computes in FP8 where that is faster (`ModuleDecision.least_rows`)
    """

    name: str
    part: str
    glob: str
    why: str = ""
    least_rows: tuple[int, ...] = ()

    def asked_by(self, pattern: str, fqn: str) -> bool:
        """Whether `pattern` means this layer, and does not only sweep it in: without that part it would not match."""
        hidden = ".".join("\0" if part == self.part else part for part in fqn.split("."))
        return fnmatchcase(fqn, pattern) and not fnmatchcase(hidden, pattern)

    def reason(self) -> str:
        return (
            f'{self.name}, in high precision by default{self.why}; fp8/layers/include ["*", "{self.glob}"] converts it'
        )


def experts_on_gpu(fqn: str, least_rows: tuple[int, ...], why: str) -> Role:
    """Stacked experts on a GPU, which a pattern may ask for whole: else in FP8 where that was measured to be faster.

    least_rows  `ModuleDecision.least_rows`; empty: no product is faster
    why         what was measured, or that nothing was
    """
    part = fqn.rpartition(".")[2]
    return Role("experts", part, f"*{part}", why, least_rows)


def find_roles(model: nn.Module) -> dict[str, Role]:
    """fqn -> role of every Linear that has one; a router inside a head is a router."""
    modules = dict(model.named_modules())
    linears: Linears = {fqn: module for fqn, module in modules.items() if isinstance(module, nn.Linear)}
    counts = {fqn: expert_counts(module) for fqn, module in modules.items()}  # a Linear too may hold modules
    roles: dict[str, Role] = {}
    for fqn in filter(None, linears):  # a model that is one Linear has no role
        if role := _adapter(fqn, modules) or _router(fqn, modules, counts) or _step_size(fqn, modules):
            roles[fqn] = role
    for fqn, part in _output_heads(model, linears):
        glob = fqn if fqn.split(".")[-1] == part else f"*{part}*"
        roles.setdefault(fqn, Role("output head", part, glob))
    roles.pop("", None)
    for fqn, part in _classifiers(linears):
        roles.setdefault(fqn, Role("classification head", part, fqn if part == fqn.split(".")[-1] else f"*{part}.*"))
    return roles


def _adapter(fqn: str, modules: dict[str, nn.Module]) -> Role | None:
    parts = fqn.split(".")
    for place, part in enumerate(parts):
        listed = getattr(modules.get(".".join(parts[:place])), "adapter_layer_names", ())
        if part == "modules_to_save":  # a layer of the model, trained whole
            continue
        if ADAPTER_NAME.search(part) or (isinstance(listed, (tuple, list)) and part in listed):
            return Role("adapter", part, f"*{part}*")
    return None


def _router(fqn: str, modules: dict[str, nn.Module], counts: dict[str, set[int]]) -> Role | None:
    """By class or name, or because it gives as many numbers as there are experts beside it.

    A class of routers that holds the experts too is a whole block; its other layers are no routers.
    """
    parts = fqn.split(".")
    own = parts[-1]
    role = Role("router", own, f"*.{own}" if len(parts) > 1 else own)
    if ROUTER_NAME.search(own):
        return role
    weight = own_parameter(modules[fqn], "weight")
    width = 0 if weight is None else shape_of(weight)[0]
    for up in (1, 2):
        if len(parts) < up:
            break
        above = ".".join(parts[:-up])
        if len(parts) > up and ROUTER_CLASS.search(type(modules[above]).__name__) and not counts[above]:
            return role
        if width > 1 and not _inside_experts(parts[len(parts) - up :]) and width in counts[above]:
            return role
        if width > 1 and GATE_NAME.search(own) and width in expert_counts(modules[above], named=False):
            return role
    return None


def _step_size(fqn: str, modules: dict[str, nn.Module]) -> Role | None:
    """`dt_proj` of Mamba-1 (transformers' and mamba_ssm's mixers), which nobody calls."""
    above, _, own = fqn.rpartition(".")
    if own == "dt_proj" and "x_proj" in modules[above]._modules and "A_log" in modules[above]._parameters:
        return Role(STEP_SIZE, own, "*.dt_proj" if above else own, ": Mamba's mixer multiplies by the weight itself")
    return None


def _inside_experts(parts: list[str]) -> bool:
    return any("expert" in part.lower() for part in parts[:-1])


def _output_heads(model: nn.Module, linears: Linears) -> Iterator[tuple[str, str]]:
    """(fqn, the part of it that names the head); PEFT's `modules_to_save` puts layers inside the head."""
    heads = {id(head) for head in _asked_heads(model)}
    found: dict[str, str] = {}
    for fqn, module in model.named_modules():
        if id(module) in heads or fqn.split(".")[-1] in HEAD_NAMES:
            inside = [name for name in linears if name == fqn or name.startswith(f"{fqn}.")]
            found.update(dict.fromkeys(inside, fqn.split(".")[-1]))
    for fqn in _as_wide_as_words(model, linears, bool(found)):
        found.setdefault(fqn, fqn.split(".")[-1])
    yield from found.items()


def _asked_heads(model: nn.Module) -> Iterator[nn.Module]:
    """What transformers' models name themselves, also where they are a part of the model."""
    for module in model.modules():
        if callable(getattr(type(module), "get_output_embeddings", None)):
            try:
                head = module.get_output_embeddings()  # type: ignore[operator]
            except Exception:  # noqa: BLE001  # the model's own code, which may not know: then it names none
                continue
            if isinstance(head, nn.Module):
                yield head


def _as_wide_as_words(model: nn.Module, linears: Linears, known: bool) -> list[str]:
    """Linears whose outputs are as many as the words of an embedding; layers of repeated blocks are none.

    Several of that width: those that are named like a head, else the last one.
    """
    words = set(_vocabularies(model))
    wide = [
        fqn
        for fqn, module in linears.items()
        if own_parameter(module, "weight") is not None
        and shape_of(module.weight)[0] in words
        and not any(part.isdigit() for part in fqn.split(".")[:-1])
    ]
    named = [fqn for fqn in wide if HEADLIKE.search(fqn.split(".")[-1])]
    return named or ([] if known else wide[-1:])


def _vocabularies(model: nn.Module) -> Iterator[int]:
    for fqn, module in model.named_modules():
        if isinstance(module, nn.Embedding) and not POSITIONS.search(fqn.split(".")[-1]):
            yield module.num_embeddings
    for spec in getattr(model, "_layer_specs", ()):  # the other stages of a DeepSpeed PipelineModule
        cls, arguments = getattr(spec, "typename", None), getattr(spec, "module_args", ())
        if isinstance(cls, type) and issubclass(cls, nn.Embedding) and arguments and isinstance(arguments[0], int):
            yield arguments[0]
        elif isinstance(spec, nn.Embedding):
            yield spec.num_embeddings


def _classifiers(linears: Linears) -> Iterator[tuple[str, str]]:
    """(fqn, the part of it that names a classifier)."""
    for fqn in linears:
        part = next((part for part in fqn.split(".") if part in CLASSIFIERS), None)
        if part is not None:
            yield fqn, part
    last = next(reversed(linears), "")
    if len(linears) > 1 and last.split(".")[-1] in ("head", "heads"):
        yield last, last.split(".")[-1]
