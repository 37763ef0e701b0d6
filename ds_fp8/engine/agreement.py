"""All ranks go on or all ranks stop: an error on one rank must not leave the others waiting in a collective.

Every rank brings the digest of its plan, or the error it met. One gather, before training and before the first
broadcast, brings them to every rank. So every rank raises, and the launcher sees exit codes other than 0.
Before it the ranks are counted (`startup_check.py`): one that has no section would not come to the gather.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..errors import DsFp8Error, PlanError
from .common_facts import is_own
from .startup_check import gather_ranks, names


@dataclass(frozen=True)
class Finding:
    """What one rank brings.

    digest     of its plan; None when the sections are disabled, or after an error
    error      what stopped it, as text
    part       the part of the model that it holds, e.g. a pipeline stage: plans are compared within one part
    partial    its model is only such a part, so what counts is what all parts convert together
    converted  modules that it swaps
    unmatched  patterns that match nothing in its part, as `exclude: head`
    layers     names of what patterns could match in its part, if some match nothing
    facts      what must be equal on all ranks of its part (`common_facts.py`), and our own sections
    """

    digest: str | None = None
    error: str | None = None
    part: str = ""
    partial: bool = False
    converted: int = 0
    unmatched: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    facts: dict[str, str] = field(default_factory=dict)


def agree(own: Finding, error: DsFp8Error | None) -> None:
    """Compare with all ranks. Raises this rank's own error, or a PlanError that quotes the others."""
    try:
        rank, findings = _gather(own)
    except PlanError:
        # Ranks are missing; what this rank met itself is nearer to the user.
        if error is not None:
            raise error from None
        raise
    if error is not None:
        raise error
    judge(rank, findings)


def judge(rank: int, findings: list[Finding]) -> None:
    """Raise PlanError if the findings of all ranks do not make one job."""
    failed = {other: found.error for other, found in enumerate(findings) if found.error is not None}
    if failed:
        first = min(failed)
        raise PlanError(f"{names(sorted(failed))} stopped, so rank {rank} stops too. Rank {first}: {failed[first]}")
    for part in dict.fromkeys(found.part for found in findings):
        here = {other: found for other, found in enumerate(findings) if found.part == part}
        differing = different_facts({other: found.facts for other, found in here.items()})
        if foreign := [line for name, line in differing.items() if not is_own(name)]:
            raise PlanError(
                "\n".join(
                    [
                        (
                            "the ranks differ in what all of them must have alike; their weights would drift apart, "
                            "or they would hang:"
                        ),
                        *(f"  {line}" for line in foreign),
                        "  Give every node the same ds.json, the same arguments and the same packages.",
                    ]
                )
            )
        digests = {other: str(found.digest) for other, found in here.items()}
        if len(set(digests.values())) > 1:
            raise PlanError(difference(digests, list(differing.values())))
    parts = [found for found in findings if found.partial]
    if not parts:
        return
    missing = set.intersection(*(set(found.unmatched) for found in parts))
    if missing:
        raise _no_match(min(missing), parts)
    if all(found.converted == 0 for found in parts):
        raise PlanError("fp8 is enabled, but no stage of the pipeline has a layer that would compute in FP8.")


def _no_match(unmatched: str, parts: list[Finding]) -> PlanError:
    """The error of a model in one piece, for a pattern that matches in no part of this one."""
    from ..plan import patterns

    key, _, pattern = unmatched.partition(": ")
    if key == "weight_wire_exclude":
        return PlanError(
            f"msamp/{key}: {pattern!r} matches no parameter in any stage of the pipeline, so it would do nothing."
        )
    layers = dict.fromkeys(fqn for found in parts for fqn in found.layers)
    return patterns.no_match(key, pattern, [patterns.ModuleNames(fqn, ()) for fqn in layers], [])


def different_facts(facts: dict[int, dict[str, str]]) -> dict[str, str]:
    """Name -> a line that says which ranks have which value, for every fact that is not the same on all."""
    lines = {}
    for name in dict.fromkeys(name for own in facts.values() for name in own):
        groups = _groups({rank: own.get(name, "absent") for rank, own in facts.items()})
        if len(groups) > 1:
            lines[name] = f"{name}: " + "; ".join(f"{value} on {names(ranks)}" for value, ranks in groups.items())
    return lines


def _groups(values: dict[int, str]) -> dict[str, list[int]]:
    """Ranks by value."""
    groups: dict[str, list[int]] = {}
    for rank, value in values.items():
        groups.setdefault(value, []).append(rank)
    return groups


def difference(digests: dict[int, str], reasons: list[str]) -> str:
    """The message for plans that differ: which ranks hold which. `digests` maps a rank to its digest."""
    groups = _groups(digests)
    return "\n".join(
        [
            "the ranks made different plans; they would exchange tensors that do not fit each other:",
            *(f"  {digest[:12]}: {names(ranks)}" for digest, ranks in groups.items()),
            *(f"  {reason}" for reason in reasons),
            "  Give every node the same ds.json, the same model and the same versions of ds_fp8 and torch.",
        ]
    )


def _gather(own: Finding) -> tuple[int, list[Finding]]:
    import deepspeed.comm as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return 0, [own]
    gather_ranks()
    found: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, asdict(own))
    # A rank with another ds_fp8 may send other fields; what differs is reported by those that both know.
    known = {one.name for one in fields(Finding)}
    return dist.get_rank(), [Finding(**{key: values[key] for key in known & values.keys()}) for values in found]
