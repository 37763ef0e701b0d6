"""Fail on code of ds_fp8 that nothing but tests uses, as vulture finds it.

    python .ci/unused.py

A use is one in the package, in setup.py or in examples; a test or a benchmark is none. What DeepSpeed calls or reads is
declared in the `TOUCHED` of the module that defines it. What else is used where vulture cannot see it stands in `USED`
with its user; an entry that is no longer needed fails too. Arguments are not looked at: callers, or caches by argument,
decide which there are.
"""

from __future__ import annotations

import sys
from pathlib import Path

from vulture import Vulture
from vulture.core import Item

from ds_fp8.zero.touched import OWNERS, files, of_file

ROOT = Path(__file__).resolve().parents[1]

USED = {
    "__class__": "Python reads it",
    "__getattr__": "Python calls it on a module",
    "__spec__": "importlib reads it",
    "_": "the kernels for tracing of torch.library, which their decorators register",
    "_backward": "as `_`",
    "_weight_values": "as `_`",
    "SeamError": "the old name of PrivateNameError, for except clauses of users",
    "after_torch_import": "the entry point that setup.py names",
    "find_class": "pickle calls it",
    "post_sub_module_backward_function": "our hooks call it (zero/module_hooks_stage3.py)",
    "pre_sub_module_backward_function": "as `post_sub_module_backward_function`",
    "persistent_load": "pickle calls it",
    "generate_vmap_rule": "torch.autograd.Function reads it",
    "setup_context": "torch.autograd.Function calls it",
    "half_ulp": "from it tests and benchmarks derive their tolerances",
    "min_normal": "as `half_ulp`",
    "is_leaf_module": "torch.fx calls it",
    "locate_file": "importlib.metadata calls it",
    "get_optim_state_fragment": "DeepSpeed's tensor_fragment has it: ZeRO and its checkpoints call it",
    "get_optim_state_keys": "as `get_optim_state_fragment`",
    "unscale_": "the engine calls it on what it takes for a GradScaler",
    "use_grad_scaling": "DeepSpeed's stage 0 reads it from the configuration of the loss scale",
    "unregister": "the way back of `experts.register`, for users",
    "wants_dgrad": "`Ran.bits` reads it by name",
    "wants_wgrad": "`Ran.bits` reads it by name",
}
"""Name -> who uses it."""


def names_of_deepspeed() -> set[str]:
    """Everything that a module of ours says it overrides or sets for DeepSpeed; adapters' classes bear the owners'
    names.
    """
    touched = [names for file in files() for names in of_file(file).values()]
    return set(OWNERS) | {name for names in touched for name in (*names.overrides, *names.writes)}


def _is_argument(one: Item) -> bool:
    return one.typ == "variable" and one.confidence == 100


def main() -> int:
    finder = Vulture()
    finder.scavenge([str(ROOT / "ds_fp8"), str(ROOT / "setup.py"), str(ROOT / "examples")])
    found = [
        one
        for one in finder.get_unused_code(min_confidence=60)
        if ROOT / "ds_fp8" in Path(one.filename).parents and not _is_argument(one)
    ]
    known = names_of_deepspeed() | set(USED)
    faults = [one.get_report() for one in found if one.name not in known]
    stale = sorted(set(USED) - {one.name for one in found})
    faults += [f"{Path(__file__).name}: {name!r} is listed and found in use, or gone: take it out" for name in stale]
    print("\n".join(faults) or f"vulture: nothing unused in ds_fp8 ({len(found)} names are used from elsewhere)")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
