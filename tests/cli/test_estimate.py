"""`ds_fp8 estimate`: the formulas of docs/numerics.md, 4, and the figures that were counted on real jobs."""

from __future__ import annotations

import json

import pytest

from ds_fp8.cli.estimate import DEEPSPEED, ROWS, Job, cost, count, human, is_possible
from ds_fp8.cli.main import main
from ds_fp8.cost.memory import Placement
from ds_fp8.levels import LEVELS

EXPANDED = LEVELS["O3"].override(exp_avg="e4m3_expanded", exp_avg_sq="e4m3_expanded")


def kept(name, stage, world_size=1, params=1, level=None, **where):
    """Bytes of one rank on the device."""
    job = Job(params, Placement(stage, world_size, **where))
    return cost(name, level or ROWS[name], stage, job).device.total


def sent(name, stage, world_size, gas=1):
    found = cost(name, ROWS[name], stage, Job(1, Placement(stage, world_size, micro_batches=gas)))
    return found.gradient_wire_bytes, found.weight_wire_bytes


@pytest.mark.parametrize("world_size", [1, 2, 8, 64])
@pytest.mark.parametrize(
    ("name", "level", "fixed", "sharded"),
    [
        ("AMP", DEEPSPEED, 2, 14),
        ("O1", LEVELS["O1"], 2, 12),
        ("O2", LEVELS["O2"], 2, 6.0625),
        ("O3", LEVELS["O3"], 1, 8.0625),
        ("O3 expanded", EXPANDED, 1, 7.078125),
    ],
)
def test_resident_bytes_under_zero_2(name, level, fixed, sharded, world_size):
    """AMP 2 + 14/W, O2 2 + 6.1/W, O3 1 + 8.1/W, O3 expanded 1 + 7.1/W bytes per parameter."""
    assert kept(name, 2, world_size, level=level) == pytest.approx(fixed + sharded / world_size)


def test_stages_shard_one_item_after_the_other():
    """One rank of 8, AMP, accumulating: 16, then states, then gradients, then weights divided by 8."""
    assert [kept("AMP", stage, 8, micro_batches=2) for stage in (0, 1, 2, 3)] == [16, 5.5, 3.75, 2]
    assert kept("AMP", 1, 8) == 3.75, "each backward is a boundary: the partition's gradients alone stay"


def test_one_rank_keeps_the_same_in_every_stage():
    assert {kept("O2", stage, params=10) for stage in (0, 1, 2, 3)} == {10 * (2 + 2 + 4.0625)}
    assert sent("O2", 2, 1) == (0, 0)


def test_o3_is_not_possible_without_zero():
    assert [is_possible(LEVELS["O3"], stage) for stage in (0, 1, 2, 3)] == [False, True, True, True]


@pytest.mark.parametrize(("name", "stage", "size"), [("O1", 1, 16), ("AMP", 1, 20), ("AMP", 0, 16), ("O1", 0, 16)])
def test_an_fp32_weight_is_its_own_master(name, stage, size):
    """4 weight + 4 gradient + 8 states; DeepSpeed's own ZeRO copies the weight once more."""
    assert kept(name, stage, base="fp32") == size


def test_an_offloaded_optimizer_leaves_the_weights():
    """ZeRO-2, W = 4: on the device 2 bytes; on the host 12 / W and DeepSpeed's fp32 gradients."""
    job = Job(1, Placement(2, 4, offload_optimizer=True))
    found = cost("AMP", DEEPSPEED, 2, job)
    assert (found.device.total, found.host.total) == (2.0, 4.0)
    found = cost("AMP", DEEPSPEED, 3, Job(1, Placement(3, 4, offload_optimizer=True, offload_param=True)))
    assert (found.device.total, found.host.weights) == (0.0, 0.5)


def test_gradients_of_zero_2_with_four_micro_batches():
    """Counted on 2 ranks: unmodified ZeRO-2 sends 8.8 bytes per parameter and step, with the FP8 reduce 3.0."""
    assert sum(sent("AMP", 2, 2, gas=4)) == pytest.approx(8.8, rel=0.03)
    assert sum(sent("O2", 2, 2, gas=4)) == pytest.approx(3.0, rel=0.03)


def test_fp8_gradients_of_zero_2_are_about_a_quarter():
    """1.03 bytes once to the owners, against an all-reduce of 2 bytes: 0.258."""
    assert sent("O1", 2, 8)[0] / sent("AMP", 2, 8)[0] == pytest.approx(0.258, abs=0.001)


def test_o3_halves_the_bytes_of_weights():
    assert sent("O3", 1, 8)[1] * 2 == sent("O2", 1, 8)[1]


@pytest.mark.parametrize(
    ("text", "number"), [("7B", 7e9), ("350M", 350e6), ("1.25b", 1.25e9), ("2e6", 2e6), ("12", 12)]
)
def test_numbers_as_people_write_them(text, number):
    assert count(text) == number


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (7 * 2**30, "7.00 GiB")])
def test_human_sizes(size, text):
    assert human(size) == text


def test_tables_and_json_have_every_level(tmp_path, capsys):
    file = tmp_path / "ds.json"
    file.write_text('{"bf16": {"enabled": true}, "zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 4,'
                    '"msamp": {"enabled": true, "opt_level": "O2", "exp_avg_sq": "e4m3"}}')  # fmt: skip
    arguments = ["estimate", str(file), "--params", "1B", "--world-size", "8"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("AMP", "fp8", "O1", "O2", "O3", "O2 as in the file", "ZeRO 3"))
    assert main([*arguments, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["gas"], answer["base"], answer["levels"]["O3"][0]) == (4, "bf16", None)
    assert answer["levels"]["AMP"][2]["resident_bytes"] == 3_750_000_000


def test_seconds_and_host_bytes_are_shown_when_asked_for(tmp_path, capsys):
    """1B parameters, W = 2, AMP in ZeRO 2: (2 + 1) GB at 100 Gbit/s take .24 s."""
    file = tmp_path / "ds.json"
    file.write_text(
        '{"bf16": {"enabled": true}, "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}'
    )
    assert main(["estimate", str(file), "--params", "1B", "--world-size", "2", "--bandwidth", "100"]) == 0
    text = capsys.readouterr().out
    assert "on the host" in text and "optimizer offloaded" in text and "0.24" in text


def test_what_a_node_sends_to_the_others(capsys):
    """1B bf16 parameters on 4 nodes of 8 ranks. AMP in ZeRO 2: 4 + 2 bytes per parameter times 31/32, as a ring. O2:
    the same gradients in FP8 between the 4 ranks of a place, 3/4 of a byte and its scale's share for each parameter.
    """
    assert main(["estimate", "--params", "1B", "--world-size", "32", "--nodes", "4", "--json"]) == 0
    levels = json.loads(capsys.readouterr().out)["levels"]
    sent = {name: [levels[name][2][f"node_sent_{what}_bytes"] for what in ("gradient", "weight")] for name in levels}
    assert sent["AMP"] == [3_875_000_000, 1_937_500_000]
    assert sent["O2"] == [round(0.75e9 * (1 + 4 / 128)), 1_937_500_000]
    assert sent["O3"] == [sent["O2"][0], round(31 / 32 * 1e9)]


def test_seconds_are_of_a_node_where_nodes_are_given(capsys):
    flags = ["--params", "1B", "--world-size", "32", "--nodes", "4", "--bandwidth", "400"]
    assert main(["estimate", *flags]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "a node of 8 ranks sends" in text and "400 Gbit/s per node" in text and "0.116" in text


def test_a_scope_of_all_sends_from_every_rank(tmp_path, capsys):
    """8 ranks, each to the 24 of 31 others that are in other nodes."""
    file = tmp_path / "ds.json"
    file.write_text(
        '{"bf16": {"enabled": true}, "msamp": {"enabled": true, "opt_level": "O2", "gradient_wire_scope": "all"}}'
    )
    assert main(["estimate", str(file), "--params", "1B", "--world-size", "32", "--nodes", "4", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["levels"]["O2 as in the file"][2]
    assert row["node_sent_gradient_bytes"] == pytest.approx(8 * 24 / 31 * row["sent_gradient_bytes"])


def test_nodes_that_do_not_divide_the_ranks_are_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["estimate", "--params", "1B", "--world-size", "10", "--nodes", "4"])
    assert caught.value.code == 2 and "10 ranks (--world-size)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", [["--params", "many"], ["--params", "0"], ["--params", "1e400"], ["--params", "1", "--world-size", "0"]]
)
def test_nonsense_is_refused(flags):
    with pytest.raises(SystemExit) as caught:
        main(["estimate", *flags])
    assert caught.value.code == 2


def test_a_bad_file_is_refused(tmp_path, capsys):
    file = tmp_path / "ds.json"
    file.write_text('{"fp8": {"enabled": 1}}')
    assert main(["estimate", str(file), "--params", "1B", "--world-size", "8"]) == 1
    assert "write true" in capsys.readouterr().out


def test_a_model_is_counted_and_its_share_reported(tmp_path, monkeypatch, capsys):
    """body 128 x 128 in FP8, head 128 x 50 not: 16384 of 22784 multiply-adds."""
    (tmp_path / "ds.json").write_text('{"fp8": {"enabled": true}, "bf16": {"enabled": true}}')
    (tmp_path / "estimated_model.py").write_text(
        "from torch import nn\n\ndef build():\n    return nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 50))\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["estimate", "ds.json", "--model", "estimated_model:build", "--world-size", "2"]) == 0
    text = capsys.readouterr().out
    assert "22,962 parameters" in text and "72% of the model's matrix FLOPs in FP8" in text
    assert main(["estimate", "ds.json", "--model", "estimated_model:nothing", "--world-size", "2"]) == 2
    assert "AttributeError" in capsys.readouterr().out
