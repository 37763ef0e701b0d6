"""All ranks say yes, or all ranks stop: an error on one rank must not leave the others waiting in a collective.

Every rank brings the digest of its plan, or the error it met. One gather, before training and before anything was
changed on the network, shows everybody everything; so each rank raises, and the launcher sees exit codes other than 0.
"""

from __future__ import annotations

from typing import Any

from ..errors import DsFp8Error, PlanError


def agree(digest: str | None, error: DsFp8Error | None, *, part: str = "") -> None:
    """Compare with all ranks. Raises this rank's own error, or a PlanError that quotes the others.

    part  the piece of the model that this rank holds (a pipeline stage): plans are compared within one part
    """
    rank, findings = _gather({"digest": digest, "part": part, "error": None if error is None else str(error)})
    if error is not None:
        raise error
    failed = {other: found["error"] for other, found in enumerate(findings) if found["error"] is not None}
    if failed:
        first = min(failed)
        raise PlanError(f"{_ranks(sorted(failed))} stopped, so rank {rank} stops too. Rank {first}: {failed[first]}")
    for name in dict.fromkeys(found["part"] for found in findings):
        digests = {other: found["digest"] for other, found in enumerate(findings) if found["part"] == name}
        if len(set(digests.values())) > 1:
            raise PlanError(difference(digests))


def difference(digests: dict[int, str]) -> str:
    """The message for plans that differ: which ranks hold which. `digests` maps a rank to its digest."""
    groups: dict[str, list[int]] = {}
    for rank, digest in digests.items():
        groups.setdefault(digest, []).append(rank)
    return "\n".join(
        [
            "the ranks made different plans; they would exchange tensors that do not fit each other:",
            *(f"  {digest[:12]}: {_ranks(ranks)}" for digest, ranks in groups.items()),
            "  Give every node the same ds.json, the same model and the same versions of ds_fp8 and torch.",
        ]
    )


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def _gather(finding: dict[str, Any]) -> tuple[int, list[dict[str, Any]]]:
    import deepspeed.comm as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return 0, [finding]
    findings: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(findings, finding)
    return dist.get_rank(), findings
