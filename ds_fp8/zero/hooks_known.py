"""Which DeepSpeed has what our hooks and coordinator of ZeRO 3 restate: told by its text, not by a version.

A method that is restated has to be the one that was read. So its source is compared, by digest, with what the tested
releases have; of any other DeepSpeed, and of one that somebody has changed, the hooks stay as they are.

    python -m ds_fp8.zero.hooks_known [PATH...]     digests of source trees, sdists or wheels; of the installed one
"""

from __future__ import annotations

import functools
import hashlib
import sys
from typing import Any

from .deepspeed_source import DeepSpeedSource
from .touched import touched

TOUCHED = {"ZeroStage3": touched(reads="parameter_offload")}

OFFLOAD, COORDINATOR, PARTITION = (
    f"deepspeed.runtime.zero.{name}"
    for name in ("parameter_offload", "partitioned_param_coordinator", "partition_parameters")
)
RESTATED = (
    *((OFFLOAD, f"DeepSpeedZeRoOffload.{name}") for name in (
        "_register_deepspeed_module", "pre_sub_module_forward_function", "post_sub_module_forward_function",
        "pre_sub_module_backward_function", "post_sub_module_backward_function")),
    (COORDINATOR, "iter_params"),
    (COORDINATOR, "get_all_parameters"),
    *((COORDINATOR, f"PartitionedParameterCoordinator.{name}") for name in (
        "trace_prologue", "fetch_sub_module", "_fetch_sub_module_impl", "release_sub_module", "__release_param",
        "__all_gather_params", "__all_gather_params_", "__params_to_release")),
    (PARTITION, "Init._partition"),
    (PARTITION, "Init._partition_param"),
    (PARTITION, "free_param"),
)  # fmt: skip
"""Module and definition, whose text has to be a known one."""

KNOWN = frozenset({"1ab38932a2aeb68d"})
"""Digests: 0.19.7 and 0.19.8."""


def digest(source: DeepSpeedSource) -> str:
    """Of the definitions in `RESTATED`, without decorators, comments and spacing; empty where one is not there."""
    found = hashlib.sha256()
    for module, path in RESTATED:
        text = source.text(module, path)
        if text is None:
            return ""
        lines = (line.strip() for line in text.splitlines())
        found.update("\n".join(line for line in lines if line and not line.startswith("#")).encode())
    return found.hexdigest()[:16]


@functools.cache
def is_known() -> bool:
    """Whether the installed DeepSpeed has the hooks that were read."""
    return digest(DeepSpeedSource.installed()) in KNOWN


def lighten(optimizer: Any) -> bool:
    """Put our hooks in the place of ZeRO 3's, if `optimizer` is its wrapper and this DeepSpeed is known; whether it
    was done.
    """
    offload = _offload_of(optimizer)
    if type(offload).__name__ != "DeepSpeedZeRoOffload" or not is_known():
        return False
    from .hooks_stage3 import replace_hooks

    return replace_hooks(offload)


def restore(optimizer: Any) -> None:
    """DeepSpeed's hooks come back where `lighten` put ours."""
    offload = _offload_of(optimizer)
    if type(offload).__module__ == "ds_fp8.zero.hooks_stage3":
        from .hooks_stage3 import restore_hooks

        restore_hooks(offload)


def _offload_of(optimizer: Any) -> Any:
    """An engine without an optimizer has it in its place."""
    return getattr(optimizer, "parameter_offload", optimizer)


if __name__ == "__main__":
    for source in [DeepSpeedSource.at(path) for path in sys.argv[1:]] or [DeepSpeedSource.installed()]:
        print(source.version, digest(source))
