"""A stamp for each save: files that belong together carry the same one, and ranks compare it before they load.

    {"id": 16 hex digits, drawn by rank 0, "tag": the tag, "step": engine.global_steps}

The stamp stands in our entry of the model file and of every optimizer shard. An optimizer file of another step beside
this model, a shard of another save, ranks whose `latest` differs (a node with an old copy of the folder), a checkpoint
that exists on one rank only: each of them loads in silence in DeepSpeed, or hangs. Here the ranks exchange what each
of them found before anything is changed. Checkpoints from before stamps have none; then tag and steps are compared.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError
from ..zero.touched import touched
from .exchange import from_all_ranks, from_rank_0
from .manifest import CURE

TOUCHED = {"Engine": touched(reads="global_steps")}

STAMP = "save"
"""Key of our entries under which the stamp stands."""


def new_stamp(engine: Any, tag: Any) -> dict[str, Any]:
    """The stamp of a save that begins. Collective: rank 0 draws the id."""
    drawn, step = from_rank_0(secrets.token_hex(8)), int(engine.global_steps)
    return {"id": drawn, "tag": str(tag if tag is not None else f"global_step{step}"), "step": step}


def ids_of(entry: Any) -> list[str]:
    """The id of the save that an entry of ours comes from; none from before ids."""
    stamp = entry.get(STAMP) if isinstance(entry, dict) else None
    return [str(stamp["id"])] if isinstance(stamp, dict) and "id" in stamp else []


@dataclass(frozen=True)
class RankView:
    """What one rank is about to load.

    problem    why it cannot; None: nothing was found wrong
    tag        the tag that it would take; None: no `latest`, nothing to load
    exists     the folder of the tag is there
    step       optimizer steps of the model file; None where it says nothing, or is not read here
    ids        of the saves that this rank's files come from, without repetition
    matching   how many files of the tag this rank found to be those that its manifest lists
    different  files that are not those, each a sentence with the file's name
    unlisted   files that this rank read and that the manifest does not list
    """

    problem: str | None = None
    tag: str | None = None
    exists: bool = False
    step: int | None = None
    ids: tuple[str, ...] = ()
    matching: int = 0
    different: tuple[str, ...] = ()
    unlisted: tuple[str, ...] = ()


def agree(view: RankView) -> None:
    """Raise CheckpointError on all ranks if one of them has a problem, or if they would load different things."""
    everyone = from_all_ranks(view)
    _compare_with_manifest(everyone)  # says best what has become of a file
    if view.problem is not None:
        raise CheckpointError(view.problem)
    for rank, other in enumerate(everyone):
        if other.problem is not None:
            raise CheckpointError(f"rank {rank}: {other.problem}")
    _compare(everyone)


def _compare(everyone: Sequence[RankView]) -> None:
    tags = [one.tag for one in everyone]
    if len(set(tags)) > 1:
        raise CheckpointError(
            f"the ranks would load different checkpoints: {_by_rank(tags)}. `latest` differs between nodes, or the "
            "script passes different tags.\n  Put one folder where all ranks see it, or pass the same tag on all of "
            "them."
        )
    if len({one.exists for one in everyone}) > 1:
        lacking = [rank for rank, one in enumerate(everyone) if not one.exists]
        raise CheckpointError(
            f"the checkpoint {tags[0]} is not there for rank {', '.join(map(str, lacking))}, and is for the others.\n"
            "  Put one folder where all ranks see it, or copy it to every node."
        )
    if tags[0] is not None and not everyone[0].exists:
        raise CheckpointError(f"the checkpoint {tags[0]} is not there: named in `latest`, or by the script, and gone.")
    ids = sorted({name for one in everyone for name in one.ids})
    if len(ids) > 1:
        raise CheckpointError(
            f"the checkpoint {tags[0]} is made of files of {len(ids)} saves: "
            f"{_by_rank([one.ids for one in everyone])}. A file was copied from another tag, or a save over this tag "
            "was broken off.\n  Use another tag."
        )
    steps = [one.step for one in everyone]
    if len({step for step in steps if step is not None}) > 1:
        raise CheckpointError(
            f"the ranks would load different steps of the checkpoint {tags[0]}: {_by_rank(steps)}.\n"
            "  Put one folder where all ranks see it, or copy it anew to every node."
        )


def _compare_with_manifest(everyone: Sequence[RankView]) -> None:
    """Raise CheckpointError if a file is another than the manifest lists. No file is one that it lists, and none has an
    id of ours: a job without ds_fp8 has written over the tag, and the manifest is void.
    """
    if not any(one.matching or one.ids for one in everyone):
        return
    faults = [fault for one in everyone for fault in one.different]
    faults += [f"{name}: not of this save, the manifest does not list it" for one in everyone for name in one.unlisted]
    faults = list(dict.fromkeys(faults))
    if faults:
        more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(
            f"the checkpoint {everyone[0].tag} is not as it was saved: {'; '.join(faults[:3])}{more}.\n  Use another "
            f"tag. {CURE}"
        )


def _by_rank(values: Sequence[Any], most: int = 4) -> str:
    """`rank 0: a; ranks 1, 2: b`, shortened."""
    ranks: dict[Any, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    parts = []
    for value, holders in list(ranks.items())[:most]:
        shown = ", ".join(map(str, holders[:most])) + (", ..." if len(holders) > most else "")
        text = " + ".join(value) if isinstance(value, tuple) else value
        parts.append(f"rank{'s' if len(holders) > 1 else ''} {shown}: {text if text not in (None, '') else 'none'}")
    return "; ".join(parts)
