"""Which ranks talk to which: one flat group, or two levels when only the network between nodes is slow.

`gradient_wire_scope: inter_node` keeps full precision where bandwidth is plentiful (NVLink) and sends FP8 only where
it is scarce. A rank has a node and a place in it; ranks of equal place in different nodes form the outer group:

    node 0: places 0 1 2 3      outer group of place 2 = {rank 2 of node 0, rank 2 of node 1}
    node 1: places 0 1 2 3

Process groups must be created by *all* ranks of the job in the same order, also by those that are not in them, so the
routes of every data-parallel group are laid out once, together, when the engine is made.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any

from deepspeed import comm as dist

from ..errors import BackendError


@dataclass(frozen=True)
class Route:
    """One process group, with its two levels when there are nodes to tell apart.

    group       the whole group; for a flat route the only one
    owners      owners[node][place] is the rank within `group`; empty for a flat route
    """

    group: Any
    world_size: int
    rank: int
    inner: Route | None = None
    outer: Route | None = None
    owners: tuple[tuple[int, ...], ...] = ()

    @property
    def is_flat(self) -> bool:
        return self.inner is None

    @property
    def levels(self) -> tuple[Route, Route]:
        """(inner, outer) of a route that is not flat."""
        assert self.inner is not None and self.outer is not None
        return self.inner, self.outer

    def owner(self, node: int, place: int) -> int:
        return self.owners[node][place]


def flat_route(group: Any) -> Route:
    """All ranks of `group` on one level."""
    return Route(group, dist.get_world_size(group=group), dist.get_rank(group=group))


def group_ranks(group: Any) -> tuple[int, ...]:
    """Global ranks of a process group, in group order; `None` is the whole world."""
    if group is None:
        return tuple(range(dist.get_world_size()))
    return tuple(dist.get_global_rank(group, index) for index in range(dist.get_world_size(group=group)))


def two_level_routes(groups: list[Any], *, node_name: str | None = None) -> list[Route]:
    """Routes for this rank's `groups`, high precision inside a node. A collective call of the whole world.

    node_name  what tells this rank's node from others; the host name by default
    Raises BackendError when a group has nodes with unequal numbers of ranks: places would not match.
    """
    mine = (node_name or socket.gethostname(), [group_ranks(group) for group in groups])
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    node_of = [name for name, _ in everyone]
    # Every rank walks the same list of rank tuples and so creates the same groups in the same order.
    wanted = sorted({ranks for _, memberships in everyone for ranks in memberships})
    levels = {ranks: _create_levels(ranks, node_of) for ranks in wanted}
    return [
        Route(group, len(ranks), ranks.index(dist.get_rank()), *levels[ranks])
        for group, ranks in zip(groups, mine[1], strict=True)
    ]


def _create_levels(ranks: tuple[int, ...], node_of: list[str]) -> tuple[Any, Any, tuple[tuple[int, ...], ...]]:
    names = list(dict.fromkeys(node_of[rank] for rank in ranks))
    nodes = [[rank for rank in ranks if node_of[rank] == name] for name in names]
    sizes = {len(node) for node in nodes}
    if len(sizes) > 1:
        raise BackendError(
            f"msamp/gradient_wire_scope: inter_node needs the same number of ranks on every node, but the data-parallel"
            f" group {list(ranks)} has {[len(node) for node in nodes]}.\n  Set gradient_wire_scope to all, or start"
            f" equal numbers of ranks per node."
        )
    places = [list(column) for column in zip(*nodes, strict=True)]
    inner = _own_route([_new_group(node) for node in nodes], nodes)
    outer = _own_route([_new_group(column) for column in places], places)
    owners = tuple(tuple(ranks.index(rank) for rank in node) for node in nodes)
    return inner, outer, owners


def _new_group(ranks: list[int]) -> Any:
    return dist.new_group(ranks)


def _own_route(groups: list[Any], members: list[list[int]]) -> Route | None:
    """The route of the group that this rank is in; None on ranks outside all of them."""
    rank = dist.get_rank()
    for group, ranks in zip(groups, members, strict=True):
        if rank in ranks:
            return Route(group, len(ranks), ranks.index(rank))
    return None
