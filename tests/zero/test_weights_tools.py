"""O3 and tools of torch that go past `__torch_function__`: right values, or a stop with the name; never NaN."""

from __future__ import annotations

import pytest
from ranks import run_ranks
from tools_jobs import tied_since, transformed, written_down

pytestmark = pytest.mark.dist


def everything(rank, world_size):
    return transformed(rank, world_size, 1), written_down(rank, world_size, 2), tied_since(rank, world_size, 2)


@pytest.fixture(scope="module")
def found():
    return run_ranks(2, everything, timeout_s=200)


def test_transforms_of_torch_func_read_a_released_weight(found):
    """vmap, grad, jvp and their like on the Parameter itself: to the bit what they give for its values."""
    for transforms, _, _ in found:
        assert not [name for name, is_right in transforms.items() if not is_right]


def test_tracers_and_files_have_the_values_or_name_the_weight(found):
    for _, (written, refused), _ in found:
        assert not [name for name, is_right in written.items() if not is_right]
        for name, words in {"trace": "torch.jit.trace", "make_fx": "make_fx", "fake": "make_fx"}.items():
            assert refused[name].startswith(f"{words} reads enc.weight"), refused
        assert "offload_optimizer with device cpu" in refused["offload_states"], "not: a weight was written to"
        assert "GatheredParameters" in refused["trace"] and "restore_layers" in refused["script"]


def test_a_weight_that_another_layer_takes_over(found):
    """`layer.weight = other.weight` after the engine was made: read as it is, with a scale of its own, not by the old
    weight's quantized values or history."""
    for _, _, losses in found:
        assert losses["O2"] == pytest.approx(losses["None"], rel=0.06)
        assert losses["O3"] == pytest.approx(losses["None"], rel=0.06)
