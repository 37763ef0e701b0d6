"""The entry point of the fast paths: the same answer whichever runs, and PyTorch where none can."""

from __future__ import annotations

import copy

import pytest
import torch

from ds_fp8 import kernels, numerics
from ds_fp8.formats import E4M3, E5M2
from ds_fp8.kernels import dispatch
from ds_fp8.kernels.adam import CHUNK_NUMEL, reference_step
from ds_fp8.numerics import flat, masters, states
from ds_fp8.numerics.adam import torch_sqrt_is_ieee
from ds_fp8.numerics.random_bits import Stochastic

CALLS = {
    "quantize": lambda k, x: k.quantize(x, 3.0, E4M3),
    "quantize tensor scale": lambda k, x: k.quantize(x, torch.tensor(3.0), E5M2),
    "dequantize": lambda k, x: k.dequantize(numerics.quantize(x, 3.0, E4M3), 1 / 3, torch.bfloat16),
    "amax": lambda k, x: k.amax(x),
    "quantize_1x128": lambda k, x: k.quantize_1x128(x, E5M2),
    "quantize_128x128": lambda k, x: k.quantize_128x128(x, E4M3, power_of_two=False),
    "dequantize_1x128": lambda k, x: k.dequantize_1x128(*numerics.quantize_1x128(x, E4M3)),
    "dequantize_128x128": lambda k, x: k.dequantize_128x128(*numerics.quantize_128x128(x, E4M3), torch.float16),
}


def flat_calls(encode, decode, add, add_encode, x):
    """The four flat operations by any implementation, one after the other."""
    quantized, scale_inv = encode(x, E4M3)
    random, random_scale_inv = encode(x, E5M2, rounding=Stochastic(1, 2, 3))
    stacked, scales = quantized.expand(3, -1).contiguous(), scale_inv.expand(3, -1).contiguous()
    out = torch.empty(x.numel(), dtype=torch.bfloat16)
    return [
        quantized, scale_inv, random, random_scale_inv, decode(quantized, scale_inv, E4M3),
        decode(quantized, scale_inv, E4M3, out=out),
        add(stacked, scales, E4M3, factor=1 / 3), *add_encode(stacked, scales, E4M3, factor=0.5, out_fmt=E5M2),
    ]  # fmt: skip


def as_list(result):
    return list(result) if isinstance(result, tuple | list) else [result]


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def operand(strided):
    x = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    return x.t()[:130] if strided else x


@pytest.fixture(params=["fast", "torch"])
def path(request, monkeypatch):
    """What this machine has, and what it does without."""
    if request.param == "torch":
        monkeypatch.setattr(dispatch, "_libraries", {"cpu": None})
        assert kernels.path("cpu") == "torch"
    return request.param


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_casts_are_those_of_numerics(name, strided, path):
    x = operand(strided)
    for found, wanted in zip(as_list(CALLS[name](kernels, x)), as_list(CALLS[name](numerics, x)), strict=True):
        assert same_bits(found.reshape(-1), wanted.reshape(-1))


def test_quantize_with_amax_is_both(path):
    x = operand(False)
    quantized, largest = kernels.quantize_with_amax(x, 3.0, E4M3)
    assert same_bits(quantized, numerics.quantize(x, 3.0, E4M3))
    assert largest == x.abs().max()


def test_many_tensors_are_each_by_itself(path):
    """One call for the amaxes of several weights, one for their quantized values, each under its own scale."""
    chunks = list(operand(False).reshape(-1).bfloat16().tensor_split([100, 101]))
    assert torch.equal(kernels.amax_many(chunks), torch.stack([numerics.amax(chunk) for chunk in chunks]))
    scales, quantized = (
        torch.tensor([1.0, 3.0, 0.5]),
        [torch.empty(chunk.numel(), dtype=torch.uint8) for chunk in chunks],
    )
    kernels.quantize_many(chunks, scales, E4M3, quantized)
    for chunk, scale, found in zip(chunks, scales, quantized, strict=True):
        assert torch.equal(found, numerics.quantize(chunk, scale, E4M3).view(torch.uint8))


@pytest.mark.parametrize("numel", [0, 1, 130, 1000])
def test_flat_operations_are_those_of_numerics(numel, path):
    x = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    ours = flat_calls(kernels.flat_encode, kernels.flat_decode, kernels.flat_sum, kernels.flat_sum_encode, x)
    reference = flat_calls(flat.encode, flat.decode, flat.sum_contributions, flat.sum_and_encode, x)
    assert all(same_bits(a, b) for a, b in zip(ours, reference, strict=True))


def make_step(numel, **changes):
    generator = torch.Generator().manual_seed(0)
    param = (torch.randn(numel, generator=generator) * 0.02).bfloat16()
    options = {
        "lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "decoupled": True, "step": 1,
    }  # fmt: skip
    return kernels.AdamStep(
        param=param,
        grad=torch.randn(numel, generator=generator),
        exp_avg=states.new_state("e4m3", numel, "cpu"),
        exp_avg_sq=states.new_state("fp16", numel, "cpu"),
        master=masters.new_master("split24", param),
        **(options | changes),
    )


@pytest.mark.parametrize("numel", [0, 1, 130, CHUNK_NUMEL + 77])
def test_adam_step_is_the_reference(numel, path):
    """Three steps, longer than one chunk of the reference, stochastic."""
    ours = make_step(numel, rounding="stochastic", seed=5)
    reference = copy.deepcopy(ours)
    for number in (1, 2, 3):
        for step in (ours, reference):
            step.step = number
        kernels.adam_step(ours)
        reference_step(reference)
    assert all(same_bits(a, b) for a, b in zip(ours.tensors(), reference.tensors(), strict=True))


def test_chunks_do_not_show(monkeypatch):
    """The reference in chunks of one block gives the bits of one long chunk: nothing depends on where it is cut."""
    whole, cut = make_step(1000, rounding="stochastic"), make_step(1000, rounding="stochastic")
    reference_step(whole)
    monkeypatch.setattr("ds_fp8.kernels.adam.CHUNK_NUMEL", 128)
    reference_step(cut)
    assert all(same_bits(a, b) for a, b in zip(whole.tensors(), cut.tensors(), strict=True))


def test_torchs_own_square_root_is_kept(path):
    """An optimizer that promises torch's bits gets them on every path."""
    ours = make_step(1000, torch_sqrt=True)
    ours.exp_avg, ours.exp_avg_sq = (states.new_state("fp32", 1000, "cpu") for _ in range(2))
    reference = copy.deepcopy(ours)
    kernels.adam_step(ours)
    reference_step(reference)
    assert all(same_bits(a, b) for a, b in zip(ours.tensors(), reference.tensors(), strict=True))
    baseline = copy.deepcopy(reference)
    baseline.torch_sqrt = False
    if torch_sqrt_is_ieee():
        assert dispatch._is_fast(ours)


def test_a_function_that_a_fast_path_lacks_is_done_by_pytorch(monkeypatch):
    """No attribute, or NotImplemented: the reference answers."""

    class Half:
        path = "half"

        @staticmethod
        def quantize(x, scale, fmt):
            return NotImplemented

    monkeypatch.setattr(dispatch, "_libraries", {"cpu": Half()})
    x = operand(False)
    assert kernels.path() == "half"
    assert same_bits(kernels.quantize(x, 2.0, E4M3), numerics.quantize(x, 2.0, E4M3))
    assert kernels.amax(x) == x.abs().max()
    kernels.adam_step(make_step(10))


def test_a_device_without_fast_path_is_pytorch():
    assert kernels.path("meta") == "torch"


def test_sums_take_strided_rows(path):
    """Quantized values and scales are views of one message: rows lie apart, each row is dense."""
    message = torch.zeros(2, 512, dtype=torch.uint8)
    for row in range(2):
        quantized, scale_inv = flat.encode(torch.full((200,), 1.0 + row), E4M3)
        message[row, :200] = quantized
        message[row, 256:264] = scale_inv.view(torch.uint8)
    quantized, scale_inv = message[:, :200], message[:, 256:264].view(torch.float32)
    total = kernels.flat_sum(quantized, scale_inv, E4M3, factor=0.5)
    assert torch.allclose(total, torch.full((200,), 1.5), rtol=2.0**-22)
