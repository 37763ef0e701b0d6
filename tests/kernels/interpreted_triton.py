"""Triton kernels in the interpreter against `numerics`, bit for bit.

The interpreter's own FP8 and bf16 casts are wrong, so what is compared here is the integer arithmetic that also runs on
the GPU; `tests/gpu/test_triton_device.py` compares the compiled kernels and the hardware casts there. Triton reads
TRITON_INTERPRET when it is imported, so `test_triton.py` runs this file in a process of its own.
"""

from __future__ import annotations

import pytest
import torch

from ds_fp8.formats import E4M3, E5M2, Format
from ds_fp8.kernels import dispatch, self_test
from ds_fp8.kernels.triton import blocks, cast, entry, flat, launch, operands, pairs, weights
from ds_fp8.layers import scales
from ds_fp8.layers.scales import ScaleTensors
from ds_fp8.numerics import cast as reference_cast
from ds_fp8.numerics import flat as reference
from ds_fp8.numerics import gemm_blocks, scaling
from ds_fp8.numerics import messages as reference_messages
from ds_fp8.numerics.dtypes import torch_dtype
from ds_fp8.numerics.messages import Layout, message_bytes, message_views, row_numels
from ds_fp8.numerics.random_bits import Stochastic
from ds_fp8.recipe import Recipe

assert launch.INTERPRETED, "run this file with TRITON_INTERPRET=1"

FORMATS = pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def wide(numel: int, seed: int = 0) -> torch.Tensor:
    """Values over 24 binades, with zeros, negative zeros and a block of zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator)
    x = x * torch.exp2(torch.randint(-12, 12, (numel,), generator=generator).float())
    x[:128] = 0
    x[130], x[131] = 0.0, -0.0
    return x


def hazards(fmt: Format) -> torch.Tensor:
    """All bf16 values, all values of `fmt`, the middles between them and their fp32 neighbours."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    quantized = torch.arange(256, dtype=torch.uint8).view(torch_dtype(fmt)).float()
    quantized = quantized[quantized.isfinite()].sort().values
    middle = (quantized[1:] + quantized[:-1]) / 2
    return torch.cat([every, quantized, middle, middle.nextafter(quantized[1:]), middle.nextafter(quantized[:-1])])


def same_quantized(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal bits, except that a NaN may have either sign."""
    nan = wanted.float().isnan()
    found, wanted = found.view(torch.uint8), wanted.view(torch.uint8)
    return bool(((found == wanted) | (nan & ((found & 0x7F) == 0x7F))).all())


@FORMATS
def test_every_hazardous_value_gets_the_reference_code(fmt):
    """Ties to even, subnormals, saturation of finite and infinite values, NaN: the integer encoder is the cast."""
    x = hazards(fmt)
    for scale in (1.0, 3.7):
        quantized = torch.empty(x.numel(), dtype=torch_dtype(fmt))
        amax = torch.zeros(1)
        cast.quantize(x, torch.tensor([scale]), fmt, quantized, amax)
        assert same_quantized(quantized, reference_cast.quantize(x, scale, fmt))
        assert amax.item() == float("inf")


@FORMATS
@DTYPES
def test_flat_quantized_values_scales_and_values_are_the_references(fmt, dtype):
    """5001 elements: 39 full blocks and a short one."""
    x = wide(5001).to(dtype)
    quantized, scale_inv = torch.empty(5001, dtype=torch.uint8), torch.empty(40)
    for best_of_two in (True, False):
        flat.encode(x, fmt, quantized, scale_inv, None, best_of_two)
        wanted, wanted_scale_inv = reference.encode(x, fmt, best_of_two=best_of_two)
        assert torch.equal(quantized, wanted) and torch.equal(scale_inv, wanted_scale_inv)
    out = torch.empty(5001, dtype=dtype)
    flat.decode(quantized, scale_inv, fmt, out)
    assert torch.equal(out, reference.decode(quantized, scale_inv, fmt, dtype=dtype))


@FORMATS
@pytest.mark.parametrize("bad", [float("inf"), float("nan"), -float("inf")])
def test_a_block_that_is_not_finite_is_nan_and_its_neighbours_are_not(fmt, bad):
    """An overflow on one rank must be seen on all, and must not spread to other blocks."""
    x = wide(512)
    x[300] = bad
    quantized, scale_inv = torch.empty(512, dtype=torch.uint8), torch.empty(4)
    flat.encode(x, fmt, quantized, scale_inv)
    wanted, wanted_scale_inv = reference.encode(x, fmt)
    assert torch.equal(quantized, wanted)
    assert torch.equal(scale_inv, wanted_scale_inv) or scale_inv.isnan().tolist() == [False, False, True, False]
    out = torch.empty(512)
    flat.decode(quantized, scale_inv, fmt, out)
    assert out[256:384].isnan().all() and not out[:256].isnan().any() and not out[384:].isnan().any()


@FORMATS
def test_stochastic_quantized_values_draw_the_references_bits(fmt):
    """The bits are a function of (index, seed, step, stream), so all three implementations round alike."""
    x = wide(3000)
    for rounding in (Stochastic(7, 3, 1), Stochastic(2**31 + 5, 1, 2, first=2**31 - 1000)):
        quantized, scale_inv = torch.empty(3000, dtype=torch.uint8), torch.empty(24)
        flat.encode(x, fmt, quantized, scale_inv, rounding)
        wanted, _ = reference.encode(x, fmt, rounding=rounding)
        assert torch.equal(quantized, wanted)


@FORMATS
@pytest.mark.parametrize("world", [1, 3])
def test_sum_over_ranks_is_in_rank_order_and_unfused(fmt, world):
    """The owner's sum: one product and one addition per rank, each rounded; then the factor; then quantized values
    again.
    """
    contributions = torch.stack([wide(1000, seed) for seed in range(world)])
    message = torch.empty(world, 2000, dtype=torch.uint8)  # rows of a longer message: strided
    quantized, scale_inv = message[:, :1000], torch.empty(world, 8)
    for rank in range(world):
        one, scales = reference.encode(contributions[rank], fmt)
        quantized[rank], scale_inv[rank] = one, scales
    for own, best_of_two in ((None, False), (wide(1000, 9).bfloat16(), True)):
        out = torch.empty(1000)
        flat.sum_contributions(quantized, scale_inv, fmt, 1 / 3, out, own)
        assert torch.equal(out, reference.sum_contributions(quantized, scale_inv, fmt, factor=1 / 3, own=own))
        again, again_scale_inv = torch.empty(1000, dtype=torch.uint8), torch.empty(8)
        flat.sum_and_encode(quantized, scale_inv, fmt, 1 / 3, E4M3, again, again_scale_inv, own, best_of_two)
        wanted, wanted_scale_inv = reference.sum_and_encode(
            quantized, scale_inv, fmt, factor=1 / 3, out_fmt=E4M3, own=own, best_of_two=best_of_two
        )
        assert torch.equal(again, wanted) and torch.equal(again_scale_inv, wanted_scale_inv)


@FORMATS
@DTYPES
def test_messages_are_cast_summed_and_decoded_from_where_they_lie(fmt, dtype):
    """Spans of all sizes, across programs, an empty message, blocks that spans share: one launch gives what copies of
    the sequences give. By sixteen elements too, which is compiled apart.
    """
    x = wide(9000).to(dtype)
    x[777] = float("inf")
    uneven = (((0, 128), (1024, 4096)), ((128, 1000), (5000, 5003), (5100, 8001)), (), ((4096, 5000),))
    for spans in (uneven, (((16, 2064),), ((4096, 4416), (8192, 8352)))):
        layout, own = Layout(spans), Layout(spans[1:2])
        found = torch.zeros(sum(layout.bytes), dtype=torch.uint8)
        wanted = found.clone()
        assert entry.encode_messages(x, layout, fmt, found) is None
        reference_messages.encode_messages(x, layout, fmt, wanted)
        assert torch.equal(found, wanted)
        numel = own.numels[0]
        rows = torch.zeros(2, message_bytes(numel), dtype=torch.uint8)
        for seed, row in enumerate(rows):
            reference.encode(wide(numel, seed), fmt, out=message_views(row, numel))
        for out in (torch.empty(numel), torch.empty(numel, dtype=dtype)):
            summed = torch.empty_like(out)
            assert entry.sum_messages(*message_views(rows, numel), fmt, x, own, 1 / 3, out) is None
            reference_messages.sum_messages(*message_views(rows, numel), fmt, x, own, factor=1 / 3, out=summed)
            assert torch.equal(out, summed)
    rows = torch.zeros(3, message_bytes(256), dtype=torch.uint8)
    for total in (768, 700, 300):
        for row, length in zip(rows, row_numels(total, 256, 3), strict=True):
            reference.encode(x[:length], fmt, out=message_views(row, length))
        out, decoded = torch.empty(total, dtype=dtype), torch.empty(total, dtype=dtype)
        assert entry.decode_rows(rows, fmt, 256, out) is None
        reference_messages.decode_rows(rows, fmt, 256, decoded)
        assert torch.equal(out, decoded)


def test_what_the_message_kernels_cannot_search_or_view_is_left_to_others():
    """More spans than a program looks through; bytes that are no whole words."""
    many = Layout((tuple((2 * n, 2 * n + 1) for n in range(5000)),))
    x = wide(10_000)
    assert entry.encode_messages(x, many, E4M3, torch.empty(many.bytes[0], dtype=torch.uint8)) is NotImplemented
    assert entry.decode_rows(torch.zeros(1, 131, dtype=torch.uint8), E4M3, 128, torch.empty(100)) is NotImplemented


def test_an_amax_slot_keeps_what_is_larger():
    x, slot = wide(7200), torch.tensor([1.0])
    cast.raise_amax(x, slot)
    assert slot.item() == reference_cast.amax(x).item()
    slot = torch.tensor([1e30])
    cast.raise_amax(x, slot)
    assert slot.item() == torch.tensor(1e30).item()


@FORMATS
@pytest.mark.parametrize("power_of_two", [True, False])
def test_block_scales_along_both_axes_from_one_read(fmt, power_of_two):
    """Groups along the features for fprop, along the tokens for wgrad, tiles for the weight; edges are short."""
    x = wide(200 * 300).view(200, 300).bfloat16()
    x[3, :128] = float("inf")
    x[150] *= 1e-38

    def made(rows, columns, groups):
        return torch.empty(rows, columns, dtype=torch_dtype(fmt)), torch.empty(groups)

    straight, transposed = made(200, 300, (200, 3)), made(300, 200, (300, 2))
    blocks.quantize_groups(x, fmt, straight, transposed, power_of_two)
    for found, source in ((straight, x), (transposed, x.t().contiguous())):
        wanted = gemm_blocks.quantize_1x128(source, fmt, power_of_two=power_of_two)
        assert same_quantized(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    tile = made(200, 300, (2, 3))
    blocks.quantize_tiles(x, fmt, tile, power_of_two)
    wanted = gemm_blocks.quantize_128x128(x, fmt, power_of_two=power_of_two)
    assert same_quantized(tile[0], wanted[0]) and torch.equal(tile[1], wanted[1])


@FORMATS
@DTYPES
@pytest.mark.parametrize("shape", [(128, 192), (80, 144)], ids=str)
def test_operands_of_a_product_both_ways_round(fmt, dtype, shape):
    """Known scale and own amax; whole tiles and edges; what is not asked for is not made."""
    x = wide(shape[0] * shape[1]).view(shape).to(dtype).clamp(-6e4, 6e4)
    pending, frozen = torch.zeros(3), torch.full((3, operands.FROZEN), float("nan"))
    frozen[1, 1] = 3.7
    frozen[1, 0], kept = 0.27, torch.zeros(4)
    quantized, transposed = operands.cast_delayed(x.view(2, shape[0] // 2, -1), frozen, 1, fmt, pending, kept=kept)
    wanted = reference_cast.quantize(x, 3.7, fmt)
    assert same_quantized(quantized, wanted) and same_quantized(transposed, wanted.t().contiguous())
    assert pending.tolist() == [0, reference_cast.amax(x).item(), 0]
    assert torch.equal(kept, torch.tensor([0.27, 0, 0, 0]))
    alone, none = operands.cast_delayed(x, frozen, 1, fmt, None, transposed=False)
    assert none is None and same_quantized(alone, wanted)

    (quantized, transposed), scale_inv, shown = operands.cast_current(x, fmt)
    scale = scaling.scale_from_amax(reference_cast.amax(x), fmt)
    wanted = reference_cast.quantize(x, scale, fmt)
    assert same_quantized(quantized, wanted) and same_quantized(transposed, wanted.t().contiguous())
    assert scale_inv.item() == scaling.scale_inv_of(scale).item() and shown is scale_inv
    assert operands.cast_current(x, fmt, kept=kept[0])[1] is not scale_inv and kept[0] == scale_inv


@pytest.mark.parametrize("transposed", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize(("rows", "weight_rows", "columns"), [(64, 128, 128), (80, 72, 144)])
def test_input_and_weight_in_one_launch(rows, weight_rows, columns, transposed):
    """What a launch for each makes, to the bit: data, scale_inv, amaxes; also of a weight that outgrew its scale."""
    x = wide(rows * columns).view(rows, columns).bfloat16()
    weight = x.new_zeros(weight_rows, columns).copy_(wide(weight_rows * columns, seed=1).view(weight_rows, columns))
    for times in (1.0, 64.0):
        frozen = torch.ones(4, operands.FROZEN)
        for column, source in ((2, x), (1, weight)):
            frozen[column, 1] = scaling.scale_from_amax(source.abs().max().float(), E4M3)
            frozen[column, 0] = scaling.scale_inv_of(frozen[column, 1])
        weight[5, 7] = weight.abs().max() * times
        kept, found_kept = torch.zeros(2, 4), torch.zeros(2, 4)
        pending, found_pending = torch.zeros(4), torch.zeros(4)
        own, found_own = (torch.zeros(4, 2, dtype=torch.int32) for _ in range(2))
        wanted = (
            operands.cast_delayed(x, frozen, 2, E4M3, pending, transposed=transposed[0], kept=kept[0, 0]),
            weights.cast_weight(weight, frozen, 1, E4M3, pending, own, kept[1, 0], margin=1, transposed=transposed[1]),
        )
        found = pairs.cast_delayed(
            x, weight, frozen, (2, 1), E4M3, found_pending, found_own, found_kept[1, 0], margin=1,
            transposed=transposed, kept=found_kept[0, 0],
        )  # fmt: skip
        assert same_pairs(found, wanted) and torch.equal(found_pending, pending) and pending[1:3].all()
        assert torch.equal(found_kept, kept) and kept[:, 0].all() and not found_own.any()
        outgrown = weight.abs().max() * frozen[1, 1] > 2 * 448
        assert outgrown == (times > 1) == (kept[1, 0] != frozen[1, 0])
        found, (x_scale_inv, weight_scale_inv) = pairs.cast_current(
            x, weight, E4M3, transposed=transposed, kept=(None, found_kept[1, 0])
        )
        one, other = (
            operands.cast_current(source, E4M3, transposed=back)
            for source, back in zip((x, weight), transposed, strict=True)
        )
        assert same_pairs(found, (one[0], other[0])) and torch.equal(x_scale_inv, one[1])
        assert weight_scale_inv.view(1) == other[1] == found_kept[1, 0]


def same_pairs(found, wanted) -> bool:
    """Of two casts: data, and transposed data or None."""
    return all(
        (one is None and other is None) or same_quantized(one, other)
        for pair, control in zip(found, wanted, strict=True)
        for one, other in zip(pair, control, strict=True)
    )


@pytest.mark.parametrize("times", [1.0, 1.9, 2.1, 64.0, float("inf"), float("nan")])
def test_a_weight_that_has_outgrown_its_scale_is_cast_by_its_own(times):
    """More than twice the range: scale and data are those of its own amax, both ways round; else those of the step.
    Slots are zero again, and the amax is raised by calls that record.
    """
    fmt, margin = E4M3, 1
    x = wide(80 * 144).view(80, 144).bfloat16()
    x[3, 5] = x.abs().max() * 2
    known = scaling.scale_from_amax(x.float().abs().max(), fmt)  # as if with margin 0
    x[7, 9] = x[3, 5] * times
    frozen = torch.full((3, operands.FROZEN), float("nan"))
    frozen[1, 1], frozen[1, 0] = known, scaling.scale_inv_of(known)
    amax = reference_cast.amax(x)
    outgrown = bool(torch.isfinite(amax)) and bool(amax * known > 2 * fmt.max)
    assert outgrown == (times in (2.1, 64.0))
    scale = scaling.scale_from_amax(amax, fmt, margin=margin) if outgrown else known
    wanted, own, pending = reference_cast.quantize(x, scale, fmt), torch.zeros(3, 2, dtype=torch.int32), torch.zeros(3)
    for recorded in (pending, None):
        kept = torch.zeros(4)
        found = weights.cast_weight(x, frozen, 1, fmt, recorded, own, kept[0], margin=margin)
        assert same_quantized(found[0], wanted) and same_quantized(found[1], wanted.t().contiguous())
        assert kept[0] == scaling.scale_inv_of(scale) and not own.any()
    assert pending.tolist() == [0, amax.item(), 0]
    assert weights.cast_weight(x, frozen, 1, fmt, None, own, kept[0], margin=margin, straight=False)[0] is None
    assert weights.weight_scale(x, frozen, 1, fmt, own, margin=margin) == scale and not own.any()


@pytest.mark.parametrize("spoiled", [None, float("inf"), float("nan")])
def test_delayed_scaling_shows_what_is_not_finite(spoiled):
    """Of one column, where the guarded cast is asked for; for the rest of the step."""
    assert (scales.WIDTH, scales.SHOWN) == (operands.FROZEN, operands.SHOWN)
    x, pending, frozen = wide(80 * 144).view(80, 144).bfloat16(), torch.zeros(3), torch.ones(3, operands.FROZEN)
    plain = operands.cast_delayed(x, frozen, 1, E5M2, None)
    x[70, 140] = x[70, 140] if spoiled is None else spoiled
    operands.cast_delayed(x, frozen, 1, E5M2, pending)
    assert frozen.isfinite().all()
    found = operands.cast_delayed(x, frozen, 1, E5M2, pending, guarded=True)
    assert frozen.isfinite().view(-1).nonzero().numel() == frozen.numel() - (spoiled is not None)
    assert bool(frozen[1, operands.SHOWN].isnan()) == (spoiled is not None)
    assert pending[1] == reference_cast.amax(x) and same_quantized(found[0][:70], plain[0][:70])


@pytest.mark.parametrize("spoiled", [None, float("inf"), float("nan")])
@pytest.mark.parametrize("numel", [256, 4096, 4096 * 513 + 128])
def test_current_scaling_shows_what_is_not_finite(numel, spoiled):
    """The amax of less than a program, of one, and of more than all programs take at once; a guarded scale_inv."""
    x = wide(numel).view(-1, 128).bfloat16()
    x[-1, -1] = 3e4 if spoiled is None else spoiled
    (quantized, _), scale_inv, shown = operands.cast_current(x, E5M2, transposed=False, guarded=True)
    scale = scaling.scale_from_amax(reference_cast.amax(x), E5M2)
    assert same_quantized(quantized, reference_cast.quantize(x, scale, E5M2))
    assert scale_inv.item() == scaling.scale_inv_of(scale).item()
    assert bool(shown.isnan()) if spoiled is not None else torch.equal(shown, scale_inv)


def test_block_operands_have_the_strides_that_cublas_wants():
    """Scales of groups: outer axis contiguous. Scales of tiles: rows that begin at multiples of 16 bytes."""
    x = wide(256 * 384).view(256, 384).bfloat16()
    (quantized, groups), (transposed, transposed_groups) = operands.cast_groups(x, E4M3)
    assert groups.stride() == (1, 256) and transposed_groups.stride() == (1, 384)
    for found, found_scale, source in ((quantized, groups, x), (transposed, transposed_groups, x.t().contiguous())):
        wanted = gemm_blocks.quantize_1x128(source, E4M3)
        assert same_quantized(found, wanted[0]) and torch.equal(found_scale, wanted[1])
    (quantized, tiles), (transposed, transposed_tiles) = operands.cast_tiles(x, E4M3)
    wanted = gemm_blocks.quantize_128x128(x, E4M3)
    assert tiles.stride() == (4, 1) and transposed_tiles.stride() == (4, 1)
    assert same_quantized(quantized, wanted[0]) and torch.equal(tiles, wanted[1])
    assert same_quantized(transposed, wanted[0].t().contiguous()) and torch.equal(transposed_tiles, wanted[1].t())


@pytest.mark.parametrize("length", [1, 2, 5, 300])
@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
@pytest.mark.parametrize(("margin", "interval", "exact"), [(0, 1, True), (3, 2, False)])
def test_scales_are_updated_in_one_launch(length, algorithm, margin, interval, exact):
    """Zero, tiny, infinite and normal amaxes, more updates than the history is long; with and without a backward; the
    frozen scales and their reciprocals."""
    recipe = Recipe(amax_history_len=length, amax_compute_algo=algorithm, margin=margin, interval=interval)
    straight, fast = (ScaleTensors(7, recipe, exact=exact, device=torch.device("cpu")) for _ in range(2))
    fast.kernels = entry
    generator = torch.Generator().manual_seed(0)
    for step in range(7):
        amax = torch.rand(21, generator=generator) * 10
        amax[torch.rand(21, generator=generator) < 0.3] = 0
        amax[3], amax[4], amax[5], amax[15] = float("inf"), 1e-44, 1e38, float("inf")
        if step == 2:
            amax[14:] = 0
        for one in (straight, fast):
            one.pending.copy_(amax)
            one.update()
        assert torch.equal(*(one.current.frozen[:, :2] for one in (straight, fast)))
        assert torch.equal(*(torch.stack(one.current.shown) for one in (straight, fast)))
        assert straight.current.unknown == fast.current.unknown
        assert torch.equal(fast.scales, straight.scales) and not fast.pending.any()
        for found, wanted in ((fast.forward, straight.forward), (fast.backward, straight.backward)):
            assert torch.equal(found.history, wanted.history) and found.updates == wanted.updates


def test_transposed_views_become_dense():
    """100 x 72 is no multiple of the tile."""
    quantized = torch.arange(7200, dtype=torch.int32).to(torch.uint8).view(100, 72).view(torch.float8_e4m3fn)
    out = torch.empty(72, 100, dtype=torch.float8_e4m3fn)
    cast.turn(quantized.t(), out)
    assert torch.equal(out.view(torch.uint8), quantized.view(torch.uint8).t())
    three = quantized.view(3, 25, 96)
    assert torch.equal(entry.dense(three.mT).view(torch.uint8), three.view(torch.uint8).mT.contiguous())


def test_the_self_test_that_doctor_runs(monkeypatch):
    """What a GPU's doctor compares, with the interpreter in the place of the compiler."""
    monkeypatch.setitem(dispatch._libraries, "cpu", entry)
    assert self_test.disagreements("cpu") == []
