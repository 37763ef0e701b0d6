"""gradient_wire_scope auto: what wins follows from nodes and NVLink, the same on all ranks."""

from __future__ import annotations

import pytest
from ranks import run_ranks

pytestmark = pytest.mark.dist

CASES = (
    (("a", "a", "a", "a"), (True,) * 4, "none"),
    (("a", "a", "b", "b"), (True,) * 4, "inter_node"),
    (("a", "a", "b", "b"), (True, True, True, False), "all"),
    (("a", "a", "a", "b"), (True,) * 4, "all"),
    (("a", "b", "c", "d"), (True,) * 4, "all"),
    (("a", "a", "a", "a"), (False,) * 4, "all"),
)


def chosen(rank, world_size):
    from ds_fp8.comm.topology import choose_scope

    found = [choose_scope(node_name=nodes[rank], nvlink=links[rank]) for nodes, links, _ in CASES]
    return [*found, choose_scope()]


def test_the_scope_follows_nodes_and_nvlink():
    """One NVLink node: DeepSpeed's own; several: inter_node; unequal nodes, single ranks, no NVLink, a CPU: all."""
    ranks = run_ranks(4, chosen)
    assert all(found == ranks[0] for found in ranks)
    assert [scope for scope, _ in ranks[0]] == [scope for _, _, scope in CASES] + ["all"]
    assert ranks[0][0][1] == "one node, NVLink between its 4 GPUs: bytes cost less than casts"
