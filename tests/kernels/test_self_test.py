"""The kernels' self-test: silent where they are right, and by name where a compiler made wrong code."""

from __future__ import annotations

import pytest
import torch

from ds_fp8 import kernels
from ds_fp8.cli import probes
from ds_fp8.kernels import dispatch, self_test


class Faulty:
    """The real kernels, one of which writes every second code as a copy of the first."""

    def __init__(self, real, name):
        self.real, self.name = real, name

    def __getattr__(self, name):
        function = getattr(self.real, name)
        if name != self.name:
            return function

        def copies(*arguments):
            found = function(*arguments)
            quantized = found[0] if isinstance(found, tuple) else found
            even = quantized.view(-1)[: quantized.numel() // 2 * 2]
            even[1::2] = even[::2]
            return found

        return copies


needs_kernels = pytest.mark.skipif(kernels.path("cpu") == "torch", reason="no C++ kernels on this machine")


@needs_kernels
def test_this_machine_agrees():
    assert self_test.disagreements("cpu") == []


@needs_kernels
@pytest.mark.parametrize(
    "name", ["quantize", "quantize_1x128", "flat_encode", "flat_decode", "flat_sum", "flat_sum_encode"]
)
def test_a_faulty_kernel_is_named(monkeypatch, name):
    monkeypatch.setitem(dispatch._libraries, "cpu", Faulty(dispatch.library_for("cpu"), name))
    wrong = self_test.disagreements("cpu")
    assert wrong and all(one.startswith(name) for one in wrong)


@needs_kernels
def test_a_faulty_step_is_named(monkeypatch):
    real = dispatch.library_for("cpu")

    class FaultyStep(Faulty):
        def adam_step(self, step):
            real.adam_step(step)
            step.param[1::2] = step.param[: step.param.numel() - 1 : 2]

    monkeypatch.setitem(dispatch._libraries, "cpu", FaultyStep(real, "nothing else"))
    assert all(one.startswith("adam_step") for one in self_test.disagreements("cpu"))
    assert self_test.disagreements("cpu")


@needs_kernels
def test_doctor_fails_on_a_machine_whose_kernels_are_wrong(monkeypatch):
    """Such a job would train, on wrong gradients, and say nothing."""
    monkeypatch.setitem(dispatch._libraries, "cpu", Faulty(dispatch.library_for("cpu"), "flat_encode"))
    found = {finding.what: finding for finding in probes.kernels()}
    finding = found["kernels on cpu, bit for bit"]
    assert finding.status == "fail"
    assert "flat_encode" in finding.found and finding.cure


def test_doctor_says_that_they_agree():
    found = {finding.what: finding for finding in probes.kernels()}
    if kernels.path("cpu") != "torch":
        assert found["kernels on cpu, bit for bit"].status == "ok"


def test_the_reference_has_nothing_to_prove(monkeypatch):
    monkeypatch.setitem(dispatch._libraries, "cpu", None)
    assert self_test.disagreements(torch.device("cpu")) == []
