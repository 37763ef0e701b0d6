"""All ranks say yes, or all ranks stop: an error on one rank must not leave the others waiting in a collective.

Every rank brings the digest of its plan, or the error it met. One gather, before training and before anything was
changed on the network, shows everybody everything; so each rank raises, and the launcher sees exit codes other than 0.
Before it the ranks are counted (`roll_call.py`): one that has no section would not come to the gather.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..errors import DsFp8Error, PlanError
from .roll_call import gather_ranks, names


@dataclass(frozen=True)
class Finding:
    """What one rank brings.

    digest     of its plan; None when the sections are disabled, or after an error
    error      what stopped it, as text
    part       the piece of the model that it holds, e.g. a pipeline stage: plans are compared within one part
    partial    its model is only such a piece, so what counts is what all pieces convert together
    converted  modules that it swaps
    unmatched  patterns that match nothing in its piece, as `exclude: head`
    layers     names of what patterns could match in its piece, if some match nothing
    """

    digest: str | None = None
    error: str | None = None
    part: str = ""
    partial: bool = False
    converted: int = 0
    unmatched: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()


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
        digests = {other: str(found.digest) for other, found in enumerate(findings) if found.part == part}
        if len(set(digests.values())) > 1:
            raise PlanError(difference(digests))
    pieces = [found for found in findings if found.partial]
    if not pieces:
        return
    missing = set.intersection(*(set(found.unmatched) for found in pieces))
    if missing:
        raise _no_match(min(missing), pieces)
    if all(found.converted == 0 for found in pieces):
        raise PlanError("fp8 is enabled, but no stage of the pipeline has a layer that would compute in FP8.")


def _no_match(unmatched: str, pieces: list[Finding]) -> PlanError:
    """The error of a model in one piece, for a pattern that matches in no piece of this one."""
    from ..plan import patterns

    key, _, pattern = unmatched.partition(": ")
    layers = dict.fromkeys(fqn for found in pieces for fqn in found.layers)
    return patterns.no_match(key, pattern, [patterns.Candidate(fqn, ()) for fqn in layers], [])


def difference(digests: dict[int, str]) -> str:
    """The message for plans that differ: which ranks hold which. `digests` maps a rank to its digest."""
    groups: dict[str, list[int]] = {}
    for rank, digest in digests.items():
        groups.setdefault(digest, []).append(rank)
    return "\n".join(
        [
            "the ranks made different plans; they would exchange tensors that do not fit each other:",
            *(f"  {digest[:12]}: {names(ranks)}" for digest, ranks in groups.items()),
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
    return dist.get_rank(), [Finding(**values) for values in found]
