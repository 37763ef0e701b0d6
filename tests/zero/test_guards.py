"""torch.compile looks at a layer's parameters again after a weight has changed its class and its memory."""

from __future__ import annotations

import pytest
from ranks import run_ranks
from torch import nn

from ds_fp8.zero.guards import memory_changed, put_in_again


class Written(dict):
    """A dict that notes what is written to it: Dynamo goes by the dict's own version."""

    def __init__(self, *args):
        super().__init__(*args)
        self.names = []

    def __setitem__(self, name, value):
        self.names.append(name)
        super().__setitem__(name, value)


def test_a_parameter_is_written_to_its_places_and_keeps_its_order():
    layer = nn.Linear(2, 2)
    layer.register_parameter("other", layer.weight)
    layer._parameters, before = Written(layer._parameters), list(layer._parameters.items())
    put_in_again(layer, layer.weight)
    assert list(layer._parameters.items()) == before
    assert layer._parameters.names == ["weight", "weight", "other", "other"]
    layer._parameters.names.clear()
    memory_changed(layer.weight)  # where the Parameter alone is known
    assert layer._parameters.names == ["weight", "weight", "other", "other"]
    memory_changed(nn.Linear(2, 2).weight)


def layers_written(rank, world_size, stage):
    """Which layers' weights were written to in the first step, in the second, and when the engine ended."""
    from reads_jobs import start, train

    engine = start("O3", stage)
    layers = [module for module in engine.module.modules() if isinstance(module, nn.Linear)]
    for layer in layers:
        layer._parameters = Written(layer._parameters)
    found = []
    for step in (*range(2), None):
        if step is None:
            engine.destroy()
        else:
            train(engine, rank, range(step, step + 1))
        found.append(["weight" in layer._parameters.names for layer in layers])
        [layer._parameters.names.clear() for layer in layers]
    return found


@pytest.mark.dist
@pytest.mark.parametrize("stage", [1, 2])
def test_a_weight_that_is_released_or_taken_back_is_written_to_its_layer(stage):
    for first, second, ended in run_ranks(1, layers_written, stage):
        assert all(first) and not any(second) and all(ended)
