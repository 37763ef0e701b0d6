"""O3 and functions of a C++ extension, which pybind11 calls past torch's dispatch: an error instead of a NaN."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

pytestmark = [
    pytest.mark.dist,
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("g++") or not shutil.which("ninja"), reason="no compiler for extensions"),
]
NAME = "ds_fp8_extension"
TO_WRITE = ("writes", "address")
"""Accesses that torch stops in every build; the others only where it is built for CUDA."""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with the extension. Torch links it; compiled without optimization, for it is the headers that cost."""
    from torch.utils import cpp_extension

    folder = tmp_path_factory.mktemp("extension")
    source = Path(__file__).with_name("extension.cpp")
    cpp_extension.load(NAME, [str(source)], build_directory=str(folder), extra_cflags=["-O0"], is_python_module=False)
    return str(folder)


def extension(folder):
    spec = importlib.util.spec_from_file_location(NAME, str(Path(folder, f"{NAME}.so")))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def given(function, weight):
    try:
        function(weight)
    except RuntimeError as error:
        return str(error)
    return "no error"


def accesses(rank, world_size, folder, marks):
    """`in_stage` for each.

    marks  as a build for CUDA does: `torch._C` has the function that gives a storage a message
    """
    from ds_fp8.zero.blank_memory import WITH_MESSAGE

    code = extension(folder)
    if marks:
        setattr(torch._C, WITH_MESSAGE, code.mark)
    return {stage: in_stage(code, rank, stage) for stage in (1, 2, 3)}


def in_stage(code, rank, stage):
    """What each access to a released weight says, and whether the run in which it happened is as without."""
    from reads_jobs import start, train

    from ds_fp8.zero.weights_released import is_released

    def losses_of(engine):
        """The last step with saved tensors that go to the host and back, which copies them by their addresses."""
        before = train(engine, rank, range(3))
        with torch.autograd.graph.save_on_cpu():
            return before + train(engine, rank, range(3, 4))

    functions = ("writes", "address", "storage", "reads", "square", "product")
    said, right = {}, {}

    def probe(module, *_):
        weight = module.weight
        if is_released(weight):
            said.update({name: given(getattr(code, name), weight) for name in functions})
            values = weight.detach()
            right["reads"] = code.reads(values) == weight[0, 0].item() == values.tolist()[0][0]
            right["product"] = torch.equal(code.product(values), torch.mm(values, values.t()))

    engine = start("O3", stage)
    before = train(engine, rank, range(2))
    handle = engine.module.mid.register_forward_hook(probe)
    losses = before + train(engine, rank, range(2, 4))
    handle.remove()
    losses += losses_of(engine)
    engine.destroy()
    control = start("O3", stage)
    same = losses == train(control, rank, range(4)) + train(control, rank, range(4))
    weights = list(engine.module.parameters())
    readable = all(given(code.address, weight) == "no error" for weight in weights) if stage < 3 else True
    control.destroy()
    return said, right, same, readable


def parametrized(rank, world_size, folder):
    """What `script_jobs` finds where a script gives an FP8 layer a parametrization, in a build for CUDA."""
    from ds_fp8.zero.blank_memory import WITH_MESSAGE
    from tests.engine import script_jobs, test_scripts

    setattr(torch._C, WITH_MESSAGE, extension(folder).mark)
    cases = test_scripts.cases((2,), thrifty=True)
    return script_jobs.several(rank, world_size, [case for case in cases if "parametrized" in case[0]])


def test_a_parametrized_layer_is_handed_its_quantized_values(built):
    """By its Parameter: reading `layer.weight` would compute the parametrization of a weight that is away."""
    from tests.engine import test_scripts

    for found in run_ranks(1, parametrized, built):
        assert len(found) == 6 and test_scripts.judge(found) == []


@pytest.mark.parametrize("marks", [False, True], ids=["built for CPUs", "built for CUDA"])
def test_an_extension_that_is_given_a_released_weight_stops_by_its_name(built, marks):
    """In ZeRO 1, 2 and 3, while and after; the same extension reads `weight.detach()` right, and the run goes on to
    the bit. torch for CPUs stops who could write, without a name.
    """
    if not marks and hasattr(torch._C, "_set_storage_data_ptr_access_error_msg"):
        pytest.skip("torch is built for CUDA here")
    for stages in run_ranks(2, accesses, built, marks):
        for stage, (said, right, same, readable) in stages.items():
            assert said and all(right.values()) and same and readable, (stage, said, right)
            for name, error in said.items():
                if marks:
                    assert error.startswith("mid.weight was asked for its address"), (stage, name, error)
                    assert "mid.weight.detach()" in error and 'weight_wire_exclude ["mid.weight"]' in error
                elif name in TO_WRITE:
                    assert error.startswith("Cannot access data pointer"), (stage, name, error)
