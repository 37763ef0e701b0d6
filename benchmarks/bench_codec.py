"""How fast are the casts? e4m3 encode and decode, flat blocks and amax against torch's own casts.

    python benchmarks/bench_codec.py                   200 million elements, 1 and 2 threads
    python benchmarks/bench_codec.py --exhaustive      besides: all 2^32 fp32 inputs through every path, against torch;
                                                       two minutes of CPU time

Goals: decode 15x torch's cast, encode 2x, equal bits on all inputs. Contestants read and write buffers much larger
than the cache, and each writes into memory that was touched before.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import torch
from harness import Report, alternate

from ds_fp8.formats import E4M3, E5M2
from ds_fp8.kernels.cpu import casts, flat, jobs, loader
from ds_fp8.numerics import cast
from ds_fp8.numerics.dtypes import torch_dtype


def assert_equal(fmt) -> None:
    """All 256 codes, and 4 million inputs of every exponent, before anything is timed."""
    assert_decodes(fmt)
    x = torch.arange(-(2**31), 2**31, 1021, dtype=torch.int64).to(torch.int32).view(torch.float32)
    assert torch.equal(casts.quantize(x, 1.0, fmt).view(torch.uint8), cast.quantize(x, 1.0, fmt).view(torch.uint8))


def assert_decodes(fmt) -> None:
    """All 256 codes, into every dtype, as torch's own cast does it."""
    quantized = torch.arange(256, dtype=torch.uint8).view(torch_dtype(fmt))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ours, torchs = casts.dequantize(quantized, 1.0, dtype), quantized.to(dtype)
        assert torch.equal(ours.isnan(), torchs.isnan()), f"{fmt.name} to {dtype}: other NaN"
        assert torch.equal(ours.nan_to_num(-1.0), torchs.nan_to_num(-1.0)), f"{fmt.name} to {dtype}: decode differs"


def exhaustive(report: Report) -> None:
    """Every fp32, bf16 and fp16 pattern through every path into both formats, and every code back, against PyTorch.

    fp32 goes in chunks of 2^25; the reference of a chunk is made once, for all paths. Its scale is 1, so every pattern
    meets the cast as it is; NaN must come out as NaN with the same bits.
    """
    begun = time.perf_counter()
    best = loader.path()
    paths = [path for path in ("portable", "avx2", "avx512") if loader.choose(path) == path]
    wrong = {(path, fmt.name): 0 for path in paths for fmt in (E4M3, E5M2)}
    for x in patterns():
        for fmt in (E4M3, E5M2):
            expected = cast.quantize(x, 1.0, fmt).view(torch.uint8)
            for path in paths:
                loader.choose(path)
                quantized = casts.quantize(x, 1.0, fmt).view(torch.uint8)
                if not torch.equal(quantized, expected):
                    wrong[path, fmt.name] += int((quantized != expected).sum())
    for path in paths:
        loader.choose(path)
        for fmt in (E4M3, E5M2):
            assert_decodes(fmt)
    loader.choose(best)
    taken_s = time.perf_counter() - begun
    for (path, name), count in wrong.items():
        report.note(f"exhaustive: {path} {name} encode, {count} of 2^32 fp32, 2^16 bf16 and 2^16 fp16 inputs differ")
    report.note(
        f"exhaustive: all quantized values decode alike into fp32, bf16 and fp16; {taken_s:.0f} s, "
        f"{torch.get_num_threads()} threads"
    )
    what = "quantized values other than PyTorch's, over all 2^32 inputs"
    report.goal(
        what,
        result=float(sum(wrong.values())),
        goal=0.0,
        unit="",
        at_most=True,
        reason="see the notes",
        peer="numerics",
    )
    assert not any(wrong.values()), wrong


def patterns() -> Iterator[torch.Tensor]:
    """All numbers of three dtypes, in chunks."""
    size = 1 << 25
    for begin in range(-(2**31), 2**31, size):
        yield torch.arange(begin, begin + size, dtype=torch.int32).view(torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        yield torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


def measure(report: Report, numel: int, threads: int, repeats: int) -> None:
    """One table for one number of threads."""
    torch.set_num_threads(threads)
    x = torch.randn(numel)
    half = x.bfloat16()
    quantized = casts.quantize(x, 1.0, E4M3)
    raw, scale_inv = flat.encode(x, E4M3)
    out, quantized_out = torch.empty(numel), torch.empty(numel, dtype=torch.float8_e4m3fn)
    out_half = torch.empty(numel, dtype=torch.bfloat16)
    scale = torch.ones(())
    one = torch.ones(())

    def quantize_into(source: torch.Tensor) -> None:
        job = jobs.QuantizeJob(
            source.data_ptr(), quantized_out.data_ptr(), scale.data_ptr(), None, numel, jobs.DTYPES[source.dtype], 0
        )
        casts.run(jobs.QUANTIZE, job, casts.blocks_of(numel))

    cases = {
        "fp32 -> e4m3": {
            "torch copy_": lambda: quantized_out.copy_(x),
            "ds_fp8": lambda: quantize_into(x),
            "ds_fp8 flat blocks": lambda: flat.encode(x, E4M3, out=(raw, scale_inv)),
        },
        "bf16 -> e4m3": {"torch copy_": lambda: quantized_out.copy_(half), "ds_fp8": lambda: quantize_into(half)},
        "e4m3 -> fp32": {
            "torch copy_": lambda: out.copy_(quantized),
            "ds_fp8": lambda: casts.decode_into(quantized, one, "e4m3", out, per_block=False),
            "ds_fp8 flat blocks": lambda: flat.decode(raw, scale_inv, E4M3, out),
        },
        "e4m3 -> bf16": {
            "torch copy_": lambda: out_half.copy_(quantized),
            "ds_fp8": lambda: casts.decode_into(quantized, one, "e4m3", out_half, per_block=False),
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
            peer = f"torch copy_ {timings['torch copy_'].per(numel):.3g} ns/element"
            what = f"{case} against torch's cast"
            report.goal(what, result=faster, goal=goals[case], reason=bound_by(case, timings, numel), peer=peer)


def bound_by(case: str, timings, numel: int) -> str:
    """What our side took, and the bytes per second that it moved, for a goal that was missed."""
    taken_s = timings["ds_fp8"].median_s
    return f"{taken_s / numel * 1e9:.3g} ns/element; 5 bytes of it move at {5 * numel / taken_s / 1e9:.1f} GB/s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=200_000_000)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--exhaustive", action="store_true", help="all inputs there are; see above")
    arguments = parser.parse_args()
    report = Report("codec", "How fast are the casts?")
    for fmt in (E4M3, E5M2):
        assert_equal(fmt)
    if arguments.exhaustive:
        torch.set_num_threads(max(arguments.threads))
        exhaustive(report)
    for threads in arguments.threads:
        measure(report, arguments.numel, threads, arguments.repeats)
    report.write()


if __name__ == "__main__":
    main()
