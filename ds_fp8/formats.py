"""The number formats, as facts: what a code of each can hold.

FP8 comes in two shapes. E4M3 has four exponent and three mantissa bits: finer, but ends at 448. E5M2 has five and
two: coarser, but reaches 57344. Activations and weights want E4M3, gradients of activations the range of E5M2; that
pair is called HYBRID. The `fn` in torch's name `float8_e4m3fn` means: no infinity, and NaN only as S.1111.111.

This floor does not import torch: `torch_name` is resolved by `ds_fp8.numerics.dtypes`.
Source: FP8 formats for deep learning (arXiv 2209.05433), table 1.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """One storage format.

    name            the name used everywhere: JSON, logs, checkpoints
    max             largest finite value
    min_normal      smallest positive normal value
    min_subnormal   smallest positive value
    mantissa_bits   stored mantissa bits; the relative error of a nearest cast of a normal value is <= 2^-(bits + 1)
    bytes           storage size of one element
    torch_name      attribute of `torch`
    """

    name: str
    max: float
    min_normal: float
    min_subnormal: float
    mantissa_bits: int
    bytes: int
    torch_name: str

    @property
    def half_ulp(self) -> float:
        """Largest relative error of a nearest cast of a normal value: the tolerance that tests derive from."""
        return 2.0 ** -(self.mantissa_bits + 1)


E4M3 = Format("e4m3", 448.0, 2.0**-6, 2.0**-9, 3, 1, "float8_e4m3fn")
E5M2 = Format("e5m2", 57344.0, 2.0**-14, 2.0**-16, 2, 1, "float8_e5m2")
FP16 = Format("fp16", 65504.0, 2.0**-14, 2.0**-24, 10, 2, "float16")
BF16 = Format("bf16", 3.3895313892515355e38, 2.0**-126, 2.0**-133, 7, 2, "bfloat16")
FP32 = Format("fp32", 3.4028234663852886e38, 2.0**-126, 2.0**-149, 23, 4, "float32")

FORMATS = {fmt.name: fmt for fmt in (E4M3, E5M2, FP16, BF16, FP32)}

BLOCK_SIZE = 128
"""Elements that share one scale in a flat partition, and the side of a GEMM weight tile."""
