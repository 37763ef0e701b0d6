"""What older DeepSpeeds lack or do otherwise: one small file for each line of releases that has ended.

The mixins of `zero` speak the newest release, and the few words of `vocabulary.py` where releases differ in more than a
name. `until_0_19_7.py` holds what 0.19.7 and all before it did otherwise, seen from the release after; so 0.18.5 gets
the adapters of 0.18.5 and of every line that ended later, each translating one step. In the specialised class

    Fp8DeepSpeedZeroOptimizer(wire mixins, states mixin, until_0_19_7, until_0_19_5, ..., vocabulary, DeepSpeed's class)

they stand between our mixins and DeepSpeed, and `super()` in a mixin meets them first. A line has a class for each kind
of optimizer wrapper that it concerns, under the name of the kind: ZeroStage12, ZeroStage3, Bf16, Stage0.
"""

from __future__ import annotations

from importlib import import_module

from ...releases import numbers

LINES = ("0.18.2", "0.18.5", "0.19.1", "0.19.2", "0.19.5", "0.19.7")
"""Last release of each line that has an adapter, oldest first."""


def adapters(kind: str, version: str) -> tuple[type, ...]:
    """The classes that translate DeepSpeed `version` for wrappers of `kind`, outermost first; the vocabulary last."""
    found = []
    for line in reversed(LINES):
        if numbers(version) <= numbers(line):
            adapter = getattr(import_module(f"{__name__}.until_{line.replace('.', '_')}"), kind, None)
            if adapter is not None:
                found.append(adapter)
    return (*found, getattr(import_module(f"{__name__}.vocabulary"), kind))
