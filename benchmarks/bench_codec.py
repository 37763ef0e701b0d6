"""How fast are the casts? e4m3 encode and decode, flat blocks and amax against torch's own casts.

    python benchmarks/bench_codec.py                   200 million elements, 1 and 2 threads
    python benchmarks/bench_codec.py --exhaustive      besides: all 2^32 fp32 inputs through every path, against torch

Goals: decode 15x torch's cast, encode 2x, equal bits on all inputs. Contestants read and write buffers much larger
than the cache, and each writes into memory that was touched before.
"""

from __future__ import annotations

import argparse

import torch
from harness import Report, alternate

from ds_fp8.formats import E4M3, E5M2
from ds_fp8.kernels.cpu import casts, flat, jobs, loader
from ds_fp8.numerics import cast
from ds_fp8.numerics.dtypes import torch_dtype


def assert_equal(fmt) -> None:
    """All 256 codes, and 4 million inputs of every exponent, before anything is timed."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch_dtype(fmt))
    ours, torchs = casts.dequantize(codes, 1.0), codes.float()
    assert torch.equal(ours.nan_to_num(-1.0), torchs.nan_to_num(-1.0)), f"{fmt.name}: decode differs"
    x = torch.arange(-(2**31), 2**31, 1021, dtype=torch.int64).to(torch.int32).view(torch.float32)
    assert torch.equal(casts.quantize(x, 1.0, fmt).view(torch.uint8), cast.quantize(x, 1.0, fmt).view(torch.uint8))


def exhaustive(report: Report) -> None:
    """Every fp32 pattern through every path, in pieces of 2^26."""
    size = 1 << 26
    for path in ("portable", "avx2", "avx512"):
        if loader.choose(path) != path:
            report.note(f"exhaustive: this CPU has no {path}")
            continue
        for fmt in (E4M3, E5M2):
            wrong = 0
            for begin in range(-(2**31), 2**31, size):
                x = torch.arange(begin, begin + size, dtype=torch.int64).to(torch.int32).view(torch.float32)
                ours, torchs = casts.quantize(x, 1.0, fmt), cast.quantize(x, 1.0, fmt)
                wrong += int((ours.view(torch.uint8) != torchs.view(torch.uint8)).sum())
            report.note(f"exhaustive: {path} {fmt.name} encode, {wrong} of 2^32 inputs differ from torch")
            assert wrong == 0
    loader.choose("avx512")


def measure(report: Report, numel: int, threads: int, repeats: int) -> None:
    """One table for one number of threads."""
    torch.set_num_threads(threads)
    x = torch.randn(numel)
    half = x.bfloat16()
    codes = casts.quantize(x, 1.0, E4M3)
    raw, scale_inv = flat.encode(x, E4M3)
    out, out_codes = torch.empty(numel), torch.empty(numel, dtype=torch.float8_e4m3fn)
    out_half = torch.empty(numel, dtype=torch.bfloat16)
    scale = torch.ones(())
    one = torch.ones(())

    def quantize_into(source: torch.Tensor) -> None:
        job = jobs.QuantizeJob(
            source.data_ptr(), out_codes.data_ptr(), scale.data_ptr(), None, numel, jobs.DTYPES[source.dtype], 0
        )
        casts.run(jobs.QUANTIZE, job, casts.blocks_of(numel))

    cases = {
        "fp32 -> e4m3": {
            "torch copy_": lambda: out_codes.copy_(x),
            "ds_fp8": lambda: quantize_into(x),
            "ds_fp8 flat blocks": lambda: flat.encode_into(x, E4M3, raw, scale_inv),
        },
        "bf16 -> e4m3": {"torch copy_": lambda: out_codes.copy_(half), "ds_fp8": lambda: quantize_into(half)},
        "e4m3 -> fp32": {
            "torch copy_": lambda: out.copy_(codes),
            "ds_fp8": lambda: casts.decode_into(codes, one, "e4m3", out, per_block=False),
            "ds_fp8 flat blocks": lambda: flat.decode(raw, scale_inv, E4M3, out),
        },
        "e4m3 -> bf16": {
            "torch copy_": lambda: out_half.copy_(codes),
            "ds_fp8": lambda: casts.decode_into(codes, one, "e4m3", out_half, per_block=False),
        },
        "amax of fp32": {
            "torch aminmax": lambda: torch.aminmax(x),
            "torch abs().max()": lambda: x.abs().max(),
            "ds_fp8": lambda: casts.amax(x),
        },
    }
    goals = {"fp32 -> e4m3": 2.0, "e4m3 -> fp32": 15.0}
    for case, contestants in cases.items():
        timings = alternate(contestants, repeats=repeats, warmup=1)
        for name, timing in timings.items():
            report.timing(name, case, timing, value=timing.per(numel), unit="ns/element")
        if case in goals:
            faster = timings["torch copy_"].median_s / timings["ds_fp8"].median_s
            report.goal(f"{case} against torch's cast", result=faster, goal=goals[case], reason=bound_by(case, timings))


def bound_by(case: str, timings) -> str:
    """Bytes per second that our side moved, for a goal that was missed."""
    per_s = 5.0 / timings["ds_fp8"].median_s / 1e9
    return f"5 bytes per element moved; see the ns/element of {case} and the memory bandwidth ({per_s:.2g} G passes/s)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=200_000_000)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--exhaustive", action="store_true")
    arguments = parser.parse_args()
    report = Report("codec", "How fast are the casts?")
    for fmt in (E4M3, E5M2):
        assert_equal(fmt)
    if arguments.exhaustive:
        exhaustive(report)
    for threads in arguments.threads:
        measure(report, arguments.numel, threads, arguments.repeats)
    report.write()


if __name__ == "__main__":
    main()
