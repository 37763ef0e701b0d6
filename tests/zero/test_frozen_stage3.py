"""`fp8.frozen_weights: "fp8"` in ZeRO 3: a partition of 1 byte per element, and nothing else is different."""

from __future__ import annotations

from types import SimpleNamespace

import frozen_stage3_jobs as jobs
import pytest
import torch
from ranks import run_ranks

from ds_fp8.errors import PlanError
from ds_fp8.formats import E4M3
from ds_fp8.layers.recipes import scaling_of
from ds_fp8.layers.recipes.owner import decode_part
from ds_fp8.zero.frozen_stage3 import refuse_others

pytestmark = pytest.mark.dist

FROZEN = 14
"""Linears of two decoder layers."""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    pytest.importorskip("peft")
    return run_ranks(2, jobs.everything, str(tmp_path_factory.mktemp("frozen")), timeout_s=400)


def is_base(name: str) -> bool:
    return "base_layer" in name


@pytest.mark.parametrize("kind", ["current", "block"])
def test_a_part_decodes_to_what_the_whole_decodes_to(kind):
    """Ranks cut a weight anywhere: in a row, in a tile."""
    torch.manual_seed(0)
    weight = (torch.randn(256, 384) * torch.logspace(-6, 0, 384)).bfloat16()
    whole = scaling_of(kind).quantize_frozen(weight, E4M3)
    expected, flat = whole.values(torch.bfloat16).view(-1), whole.data.view(-1)
    for start, stop in ((0, 98304), (1000, 50001), (127 * 384 + 5, 129 * 384 + 200), (98000, 98304)):
        part = decode_part(flat[start:stop], start, (256, 384), whole.scale_inv, torch.bfloat16)
        assert torch.equal(part, expected[start:stop])


@pytest.mark.parametrize(
    ("found", "key"),
    [
        ("nvme_swapper", "offload_param/device"),
        ("ds_quant_scale", "zero_quantized_nontrainable_weights"),
        ("ds_secondary_tensor", "zero_hpz_partition_size"),
    ],
)
def test_other_forms_of_frozen_partitions_are_refused_by_their_key(found, key):
    param = SimpleNamespace(nvme_swapper=None, ds_tensor=SimpleNamespace(), ds_secondary_tensor=None)
    refuse_others([param])
    setattr(param.ds_tensor if found == "ds_quant_scale" else param, found, object())
    with pytest.raises(PlanError, match=rf"fp8/frozen_weights is fp8 and zero_optimization/{key}(?s:.*)Remove {key}"):
        refuse_others([param])


def test_training_is_as_with_a_16_bit_base_whose_layers_cast_to_the_same_values(found):
    """Recipe block casts weights by powers of two too: losses and adapters are equal to the bit."""
    for of_rank in found:
        ours, theirs = of_rank["block"], of_rank["block, 16 bits"]
        assert ours["losses"] == theirs["losses"]
        for name, value in theirs["weights"].items():
            assert is_base(name) or torch.equal(ours["weights"][name], value), name
        assert ours["losses"][:2] == of_rank["block, stage 2"]["losses"][:2], "before sums of gradients differ"


def test_the_quantized_weight_is_the_one_of_zero_2(found):
    """One scale for the whole weight, though no rank has all of it."""
    for of_rank in found:
        for name, value in of_rank["current, stage 2"]["weights"].items():
            assert not is_base(name) or torch.equal(of_rank["current"]["weights"][name], value), name


@pytest.mark.parametrize("name", jobs.STACKS)
def test_experts_and_conv1d_train_as_in_zero_2(found, name):
    """One scale for each expert, whatever part of the stack a rank has: losses and weights are equal to the bit."""
    for of_rank in found:
        two, three = of_rank[name][2], of_rank[name][3]
        assert three["frozen"] and all(three["kept"])
        assert three["losses"] == two["losses"]
        assert all(torch.equal(three["weights"][fqn], two["weights"][fqn]) for fqn in three["frozen"])


def test_one_byte_is_left_on_each_rank_and_nothing_stays_gathered(found):
    numel = sum(value.numel() for name, value in found[0]["block"]["weights"].items() if is_base(name))
    for of_rank in found:
        plain = of_rank["block, 16 bits"]["memory"]["plain"]
        for case in ("block", "current", "checkpoints", "on the host", "in parts", "zero.Init"):
            kept = of_rank[case]["memory"]
            assert kept["chunks"] == FROZEN and kept["quantized"] == numel // 2 and kept["gathered"] == 0, case
            assert kept["plain"] == plain - 2 * numel // 2, case
    assert "frozen weights of 14 Linear are kept in FP8 alone" in found[0]["said"]


def test_checkpointing_and_offload_change_nothing(found):
    for of_rank in found:
        for case in ("checkpoints", "on the host"):
            assert of_rank[case]["losses"] == of_rank["current"]["losses"], case
            assert all(
                torch.equal(of_rank[case]["weights"][name], value)
                for name, value in of_rank["current"]["weights"].items()
            ), case


def test_a_model_that_was_built_in_parts_has_the_same_base(found):
    """Its buffers stay in fp32 under zero.Init, so losses differ a little."""
    for of_rank in found:
        ours, theirs = of_rank["zero.Init"], of_rank["current"]
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-2)
        for name, value in theirs["weights"].items():
            assert not is_base(name) or torch.equal(ours["weights"][name], value), name


def test_gradients_are_accumulated_as_with_a_16_bit_base(found):
    for of_rank in found:
        ours, theirs = of_rank["in parts"]["losses"], of_rank["in parts, 16 bits"]["losses"]
        assert ours == pytest.approx(theirs, rel=0.02) and ours != theirs and ours[0] == ours[0]


def test_o3_is_o2_where_a_part_of_the_base_is_trained(found):
    """Stepped weights travel as quantized values beside the frozen ones."""
    for of_rank in found:
        o2, o3 = of_rank["O2"], of_rank["O3"]
        assert o3["losses"] == o2["losses"] and o3["memory"]["chunks"] == o2["memory"]["chunks"] == FROZEN - 3
        assert all(torch.equal(o3["weights"][name], value) for name, value in o2["weights"].items())


def test_files_hold_the_decoded_weights_and_a_job_goes_on_to_the_bit(found):
    for of_rank in found:
        files = of_rank["files"]
        assert files["resumed"] == files["after"] and files["memory"]["chunks"] == FROZEN
        base = files["weights"][jobs.BASE]
        assert torch.equal(files["fp32"], base.float()) and torch.equal(files["whole"], base)


def test_a_write_is_refused_or_brings_16_bits_for_that_weight(found):
    """Outside of GatheredParameters it would vanish; inside, with a modifier, it reaches all ranks."""
    for of_rank in found:
        files = of_rank["files"]
        assert "it is frozen and kept in FP8 (fp8/frozen_weights)" in files["refused"]
        assert "GatheredParameters" in files["refused"] and "fp8/frozen_weights high_precision" in files["refused"]
        written = files["written"]
        assert written["memory"]["chunks"] == FROZEN - 1
        assert (written["weights"][jobs.BASE] == 0.5).all()
        for name, value in files["weights"].items():
            same = torch.equal(written["weights"][name], value)
            assert same or not is_base(name) or name == jobs.BASE, name
        assert all(loss == loss for loss in written["losses"])


def test_the_end_gives_a_16_bit_model_that_merges(found):
    for of_rank in found:
        files = of_rank["files"]
        error = (files["merged"] - files["adapted"]).norm() / files["adapted"].norm()
        assert error < 0.02 and not torch.equal(files["adapted"], files["evaluated"])
        assert {"Linear", "Embedding"} <= set(files["classes"]) and "Fp8Linear" not in files["classes"]


def test_a_reference_model_without_an_optimizer(found):
    for of_rank in found:
        ours, theirs = of_rank["reference"], of_rank["reference, 16 bits"]
        assert ours["memory"]["chunks"] == FROZEN and ours["memory"]["gathered"] == 0
        assert all(map(torch.equal, ours["logits"], theirs["logits"]))
