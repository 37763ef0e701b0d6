"""ZeRO 3 gathers quantized values as far ahead as their bytes allow, and reduces while the backward goes on."""

from __future__ import annotations

import prefetch_jobs as jobs
import pytest
from ranks import run_ranks

from ds_fp8.zero import hooks_known

pytestmark = pytest.mark.dist

BUCKET = 2
"""Layers in `stage3_prefetch_bucket_size`: it counts elements of 16 bits."""


@pytest.fixture(scope="module")
def found():
    return run_ranks(2, jobs.everything, BUCKET)


def test_with_one_byte_per_element_twice_the_layers_are_on_their_way(found):
    """At O3 and with a frozen base in FP8: what DeepSpeed gathers with a bucket of twice the size. A 16-bit table as
    large as all layers changes nothing about that; DeepSpeed's own hooks count by the average.
    """
    if not hooks_known.is_known():
        pytest.skip("this DeepSpeed keeps its own hooks")
    for of_rank in found:
        bf16, twice = of_rank["bf16"], of_rank["bf16, twice the bucket"]
        assert bf16["forward"][0] == list(range(1, 2 * BUCKET)), "what this module and the one before have asked for"
        assert twice["forward"][0] == list(range(1, 4 * BUCKET))
        for case in ("O3", "frozen"):
            for phase in ("forward", "backward"):
                assert of_rank[case][phase] == twice[phase], (case, phase)
        for case in ("fp8", "O2"):
            for phase in ("forward", "backward"):
                assert of_rank[case][phase] == bf16[phase], (case, phase)
        by_average = of_rank["O3, DeepSpeed's hooks"]
        assert by_average["coordinator"] == "PartitionedParameterCoordinator"
        assert len(bf16["forward"][0]) < len(by_average["forward"][0]) < len(twice["forward"][0])


def test_gradients_are_reduced_while_the_backward_goes_on(found):
    """A bucket holds two layers: when the backward comes to the first layer, all before it are reduced but those two,
    with every wire as in DeepSpeed alone.
    """
    for of_rank in found:
        reduced = of_rank["bf16"]["reduced"]
        assert reduced["backward", jobs.LAYERS - 1] == 0 and reduced["backward", 0] == jobs.LAYERS - 2
        for case in ("fp8", "O2", "O3", "O3, DeepSpeed's hooks"):
            assert of_rank[case]["reduced"] == reduced, case
