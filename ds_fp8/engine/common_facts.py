"""What must be the same on all ranks besides the plan: hyper-parameters, ZeRO's sections, versions of packages.

DeepSpeed compares none of it. Another learning rate or clip on one rank makes replicas drift apart in silence (ZeRO 0),
or trains parts of one model differently. Another bucket size or stage hangs in a collective. Another torch or ds_fp8
may round differently. `agreement.py` compares these facts before training and names what differs.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from typing import Any

from ..config import contract
from ..zero.touched import touched

TOUCHED = {
    "Engine": touched(
        reads=(
            "client_optimizer communication_data_type config gradient_accumulation_steps gradient_clipping "
            "gradient_predivide_factor zero_optimization"
        ),
    ),
}

SECTIONS = (
    "optimizer",
    "scheduler",
    "gradient_clipping",
    "gradient_accumulation_steps",
    "prescale_gradients",
    "gradient_predivide_factor",
    "sparse_gradients",
    "communication_data_type",
    "data_types",
    "bf16",
    "bfloat16",
    "fp16",
    "torch_autocast",
    "zero_optimization",
)
"""DeepSpeed's sections that every rank must have alike."""

PACKAGES = ("ds_fp8", "deepspeed", "torch", "triton", "transformer-engine")


def common_facts(engine: Any) -> dict[str, str]:
    """Name -> value of everything that must be equal, and of our own sections. Plain text, for one gather."""
    facts = dict(_flat(engine.config))
    facts.update(_client_optimizer(engine.client_optimizer))
    facts.update({f"version of {name}": _version(name) for name in PACKAGES})
    return facts


def is_own(name: str) -> bool:
    """A key of our sections: may be written differently and mean the same. Compared by the plan that they led to, named
    where plans differ.
    """
    return name.partition("/")[0] in contract.SECTIONS


def _flat(config: Any) -> Iterator[tuple[str, str]]:
    for section in (*SECTIONS, *contract.SECTIONS):
        if section in config:
            yield from _leaves(section, config[section])


def _leaves(path: str, value: Any) -> Iterator[tuple[str, str]]:
    """Every value below `path`; files and folders may lie elsewhere on each node."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(f"{path}/{key}", inner)
    elif not path.endswith(("path", "dir", "folder")):
        yield path, repr(value)


def _client_optimizer(optimizer: Any) -> Iterator[tuple[str, str]]:
    """Class and numbers of an optimizer that the script made."""
    if optimizer is None:
        return
    groups = getattr(optimizer, "param_groups", None)
    yield "class of the script's optimizer", type(optimizer).__name__ if groups else getattr(optimizer, "__name__", "")
    for number, group in enumerate(groups or ()):
        for key, value in group.items():
            number_or_text = float(value) if hasattr(value, "item") and value.numel() == 1 else value
            if isinstance(number_or_text, (bool, int, float, str, tuple)):
                yield f"optimizer group {number}, {key}", repr(number_or_text)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
