"""Compile every Triton kernel for sm_90, with both kinds of casts, and look for fused multiply-add in the PTX."""

from __future__ import annotations

import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ds_fp8.kernels.triton import (
    adam,
    adam_fast,
    blocks,
    cast,
    expert_rows,
    expert_tiles,
    flat,
    gates,
    grouped,
    history,
    masters,
    messages,
    operands,
    pairs,
    segments,
    states,
    visits,
    weights,
)  # fmt: skip
from ds_fp8.kernels.triton.launch import LAUNCH
from ds_fp8.numerics.states import RATIO_FORMATS

HOPPER = GPUTarget("cuda", 90, 32)


def build(kernel: Any, types: list[str], constants: dict[str, Any], *, fused: int = 0) -> None:
    """One kernel: `types` of its arguments that are not constants, in order; `fused` multiply-adds that it spells
    out.
    """
    given = iter(types)
    signature = {name: "constexpr" if name in constants else next(given) for name in kernel.arg_names}
    assert next(given, None) is None, f"{kernel.__name__}: too many types"
    where = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    built = triton.compile(ASTSource(kernel, signature, constexprs=where), target=HOPPER, options=LAUNCH)
    ptx = built.asm["ptx"]
    found = ptx.count("fma.rn.f32") > 0
    assert found == (fused > 0), (
        f"{kernel.__name__} {constants}: fused multiply-add where none is written, or none at all"
    )
    assert not chosen_bytes(ptx), f"{kernel.__name__} {constants}: a choice between bytes that FP8 conversions packed"
    assert "div.full" not in ptx, f"{kernel.__name__} {constants}: approximate division"
    assert not re.search(r"\bsqrt\.approx", ptx), f"{kernel.__name__} {constants}: approximate square root"


def chosen_bytes(ptx: str) -> list[str]:
    """Registers that choose between second bytes of packed FP8 conversions: ptxas 12.8 (in Triton 3.6) takes the first
    bytes there, on a real H100, from PTX that says otherwise."""
    packed = set(re.findall(r"cvt\S*\.e[45]m[23]x2\.f32\s+(%rs\d+)", ptx))
    second = {register for register, source in re.findall(r"shr\.u16\s+(%rs\d+), (%rs\d+), 8", ptx) if source in packed}
    choices = re.findall(r"selp\.b16\s+(%rs\d+), (\S+), (\S+), %p", ptx)
    return [found for found, one, other in choices if one in second and other in second]


def kind_is_fast(base: str, master: str) -> bool:
    """Whether a master of this kind on this base has the fast path."""
    return master in adam_fast.MASTERS and (base == "bf16" or not master.startswith("split"))


def experts() -> None:
    """Kernels of stacked experts."""
    tiles = {"TILE_ROWS": expert_tiles.TILE_ROWS, "TILE_COLUMNS": expert_tiles.TILE_COLUMNS}
    for hardware in (False, True):
        fmt = {"FMT": 0, "FMAX": 448.0, "HARDWARE": hardware}
        for columns, held in ((4096, 1), (1024, 4), (grouped.WIDEST, 1)):
            build(
                grouped._rows_kernel, ["*bf16", "*u8", "*fp32", "i32", "i32"], fmt | {"ROWS": held, "COLUMNS": columns}
            )
        for equal in (False, True):
            place = {"EQUAL": equal, "EXPERTS": 8}
            pointers = ["*bf16", "*u8", "*fp32", "*fp32", "*i32"]
            held = {"TILE_ROWS": expert_tiles.TILE_ROWS, "ROWS": 1, "COLUMNS": 4096}
            build(grouped._rows_measured_kernel, pointers + ["i32"] * 3, fmt | place | held)
            build(grouped._columns_kernel, pointers + ["i32"] * 4, fmt | place | tiles)
            build(grouped._column_amax_kernel, ["*bf16", "*fp32", "*i32"] + ["i32"] * 3, place | tiles)
    build(expert_rows._add_rows_kernel, ["*bf16", "*fp32", "*bf16", "*i32", "i32", "i32"], tiles | {"EXPERTS": 8})
    build(expert_rows._sum_rows_kernel, ["*bf16", "*fp32", "*i32", "i32", "i32"], {"ROWS": 32, "COLUMNS": 64})
    build(expert_rows._tail_kernel, ["*bf16", "*i32", "i32", "i32"], {"ROWS": 16, "COLUMNS": 256})
    build(expert_rows._empty_kernel, ["*bf16", "*i32", "i32"], {"STEP": 4096})
    for data, factors in (("*bf16", "*bf16"), ("*bf16", "*fp32"), ("*fp32", "*fp32")):
        build(visits._sum_kernel, [data, "*i64", factors, data, "i32", "i32"], {"WEIGHTED": True, "COLUMNS": 4096})
        pointers = [data, data, "*i64", factors, data, "*fp32", "i32", "i32"]
        build(visits._backward_kernel, pointers, {"COLUMNS": 4096})
    for kind in gates.KINDS.values():
        how = {"KIND": kind, "ROWS": gates.ROWS, "COLUMNS": gates.COLUMNS}
        for data in ("*bf16", "*fp16", "*fp32"):
            build(gates._gate_kernel, [data, data, "i32", "i32", "fp32", "fp32"], how)
            build(gates._gate_backward_kernel, [data, data, data, "i32", "i32", "fp32", "fp32"], how)


def main() -> None:
    experts()
    for hardware in (False, True):
        for fmt, fmax in ((0, 448.0), (1, 57344.0)):
            same = {"FMT": fmt, "HARDWARE": hardware}
            more = same | {"FMAX": fmax, "ROWS": flat.ROWS}
            for stochastic, best_of_two in ((False, False), (True, False), (False, True)):
                build(
                    flat._encode_kernel,
                    ["*fp32", "*u8", "*fp32", "i32", "i32", "i32"],
                    more | {"STOCHASTIC": stochastic, "BEST_OF_TWO": best_of_two},
                    fused=int(hardware),
                )
            for again, out in ((True, "*u8"), (False, "*bf16")):
                total = more | {"OUT_FMT": fmt, "WORLD": 4, "REQUANTISE": again, "OWN": again, "BEST_OF_TWO": again}
                build(
                    flat._sum_kernel,
                    ["*bf16", "*u8", "*fp32", out, "*fp32", "fp32", "i32", "i32", "i32"],
                    total,
                    fused=int(hardware and again),
                )
            for data, aligned in (("*bf16", True), ("*fp32", False)):
                spans = {"SPANS": 64, "ALIGNED": aligned, "ROWS": messages.ROWS}
                pointers = [data, "*i64", "*i64", "*u8", "*fp32"]
                build(
                    messages._encode_kernel,
                    pointers,
                    same | spans | {"FMAX": fmax, "MESSAGES": 16},
                    fused=int(hardware),
                )
                if not hardware:
                    pointers = [data, "*i64", "*u8", "*fp32", data, "fp32", "i32", "i32", "i32"]
                    build(messages._sum_kernel, pointers, {"FMT": fmt, "WORLD": 3} | spans)
                    pointers = ["*u8", "*fp32", data, "i32", "i32", "i32"]
                    build(messages._decode_kernel, pointers, {"FMT": fmt, "ROWS": messages.ROWS})
            measured = same | {"MEASURE": True}
            build(
                cast._quantize_kernel, ["*bf16", "*fp32", "*u8", "*i32", "i32"], measured | {"ELEMENTS": cast.ELEMENTS}
            )
            for current in (False, True):
                wanted = {
                    "FMAX": fmax,
                    "STRAIGHT": True,
                    "TRANSPOSED": True,
                    "MEASURE": not current,
                    "CURRENT": current,
                }
                wanted |= {"GUARDED": True, "KEPT": not current, "PARTS": operands.PARTS, "FROZEN": operands.FROZEN}
                wanted |= {"SHOWN": operands.SHOWN}
                wanted |= {"EVEN": current, "TILE_ROWS": operands.TILE_ROWS, "TILE_COLUMNS": operands.TILE_COLUMNS}
                pointers = ["*bf16", "*u8", "*u8"] + ["*fp32"] * 4 + ["i32"] * 3
                build(operands._operand_kernel, pointers, same | wanted)
            for tiles in (False, True):
                wanted = {
                    "FMAX": fmax,
                    "TILES": tiles,
                    "STRAIGHT": True,
                    "TRANSPOSED": True,
                    "POWER_OF_TWO": True,
                    "EVEN": tiles,
                }
                build(blocks._block_kernel, ["*bf16", "*u8", "*fp32", "*u8", "*fp32"] + ["i32"] * 6, same | wanted)
    build(flat._decode_kernel, ["*u8", "*fp32", "*bf16", "i32"], {"FMT": 0, "ROWS": flat.ROWS})
    data = {"fp32": "*fp32", "bf16": "*bf16", "fp16": "*fp16", "e4m3": "*u8", "e4m3_expanded": "*u8", "int8": "*i8"}
    remainder = {"own": "*fp32", "fp32": "*fp32", "split32": "*i16", "split24": "*i8", "fp16": "*fp16"}
    cases = [("bf16", name, name, "split24") for name in data if name != "int8"]
    cases += [("bf16", "int8", v, kind) for v in adam_fast.ROOTS for kind in adam_fast.MASTERS]
    cases.append(("bf16", "e4m3", "bf16", "split24"))
    cases += [(base, "e4m3", "fp16", kind) for base in ("bf16", "fp16") for kind in remainder if kind != "own"]
    cases.append(("fp32", "e4m3", "fp16", "own"))
    for number, (base, m, v, master) in enumerate(cases):
        state = [data[m], "*fp32", "*u8", data[v], "*fp32", "*u8"]
        stochastic = number % 2 == 1
        pointers = [
            f"*{base}",
            "*bf16",
            *state,
            remainder[master],
            "*fp32",
            "*fp32",
            "*fp32",
        ]
        constants = {"M_FORMAT": states.FORMATS[m], "M_RATIO": m in RATIO_FORMATS}
        constants |= {"V_FORMAT": states.FORMATS[v], "V_ROOT": v not in ("fp32", "bf16")}
        constants |= {"MASTER": masters.KINDS[master], "HALF": base == "fp16", "SCALE_TENSOR": number % 2 == 0}
        constants |= {"DECAY": True, "L2": False, "LERP_SMALL": True}
        short = m in adam_fast.MOMENTS and v in adam_fast.ROOTS and kind_is_fast(base, master)
        constants |= {"STOCHASTIC": stochastic, "ROWS": adam.FAST_ROWS if short else adam.ROWS, "SHORT": short}
        constants |= {"EVEN": not stochastic and not short, "HARDWARE": True, "FAST": not short}
        build(adam._adam_kernel, pointers + ["fp32"] * 9 + ["i32"] * 2, constants, fused=2)
    for keep in (False, True):
        constants = {"FORWARD_MAX": 448.0, "BACKWARD_MAX": 57344.0, "MARGIN_FACTOR": 2.0, "LENGTH": 1024}
        constants |= {"MOST_RECENT": False, "KEEP": keep, "FROZEN": operands.FROZEN, "SHOWN": operands.SHOWN}
        constants |= {"ROWS": history.ROWS, "COLUMNS": history.COLUMNS}
        build(history._update_kernel, ["*fp32"] * 7 + ["i32"] * 4, constants)
    tiles = {"TILE_ROWS": operands.TILE_ROWS, "TILE_COLUMNS": operands.TILE_COLUMNS, "FROZEN": operands.FROZEN}
    limits = {"FMAX": 448.0, "LIMIT": 896.0, "MARGIN_FACTOR": 1.0}
    for straight, transposed, hardware, even in ((True, True, True, True), (False, True, False, False)):
        how = {"STRAIGHT": straight, "TRANSPOSED": transposed, "MEASURE": straight, "HARDWARE": hardware, "EVEN": even}
        pointers = ["*bf16", "*fp8e4nv", "*fp8e4nv", "*fp32", "*fp32", "*i32", "*fp32", "i32", "i32", "i32"]
        build(weights._weight_kernel, pointers, {"FMT": 0} | limits | tiles | how)
    measured = {"ELEMENTS": weights.ELEMENTS, "FROZEN": operands.FROZEN}
    build(weights._scale_kernel, ["*bf16", "*fp32", "*i32", "*fp32", "i32", "i32"], limits | measured)
    parts = {"PARTS": operands.PARTS, "ELEMENTS": operands.PART_ELEMENTS}
    build(operands._parts_kernel, ["*bf16", "*fp32", "i32"], parts)
    build(pairs._parts_kernel, ["*bf16", "*bf16", "*fp32", "i32", "i32"], parts)
    both = {"FMT": 0, "TRANSPOSED": True, "WEIGHT_TRANSPOSED": True, "HARDWARE": True}
    del tiles["FROZEN"]
    for even in (False, True):
        how = both | tiles | {"EVEN": even, "WEIGHT_EVEN": not even}
        pointers = ["*bf16", "*fp8e4nv", "*fp8e4nv"] * 2
        delayed = how | limits | {"MEASURE": True, "KEPT": even, "FROZEN": operands.FROZEN}
        build(pairs._delayed_kernel, [*pointers, "*fp32", "*fp32", "*i32", "*fp32", "*fp32"] + ["i32"] * 5, delayed)
        current = how | {"FMAX": 448.0, "PARTS": operands.PARTS}
        build(pairs._current_kernel, [*pointers, "*fp32", "*fp32", "*fp32"] + ["i32"] * 3, current)
    for write in (False, True):
        wanted = {"FMT": 0, "MEASURE": not write, "WRITE": write, "ALIGNED": write, "ELEMENTS": segments.ELEMENTS}
        build(
            segments._segments_kernel, ["*bf16", "*u8", "*i64", "*i32", "*fp32", "*fp32"], wanted | {"HARDWARE": True}
        )
    build(cast._turn_kernel, ["*u8", "*u8", "i32", "i32"], {"TILE": cast.TILE})
    build(cast._amax_kernel, ["*bf16", "*i32", "i32"], {"ELEMENTS": cast.ELEMENTS})


if __name__ == "__main__":
    main()
    sys.exit(0)
