"""`ds_fp8 estimate`: the formulas of docs/numerics.md, 4, and the figures that were counted on real jobs."""

from __future__ import annotations

import json

import pytest

from ds_fp8.cli.budget import AMP, Job, is_possible, resident_bytes, sent_bytes
from ds_fp8.cli.estimate import count, human
from ds_fp8.cli.main import main
from ds_fp8.levels import LEVELS

EXPANDED = LEVELS["O3"].override(exp_avg="e4m3_expanded", exp_avg_sq="e4m3_expanded")


@pytest.mark.parametrize("world_size", [1, 2, 8, 64])
@pytest.mark.parametrize(
    ("level", "fixed", "sharded"),
    [
        (AMP, 2, 14),
        (LEVELS["O1"], 2, 12),
        (LEVELS["O2"], 2, 6.0625),
        (LEVELS["O3"], 1, 8.0625),
        (EXPANDED, 1, 7.078125),
    ],
    ids=["AMP", "O1", "O2", "O3", "O3 expanded"],
)
def test_resident_bytes_under_zero_2(level, fixed, sharded, world_size):
    """AMP 2 + 14/W, O2 2 + 6.1/W, O3 1 + 8.1/W, O3 expanded 1 + 7.1/W bytes per parameter."""
    assert resident_bytes(level, 2, Job(1, world_size)) == fixed + sharded / world_size


def test_stages_shard_one_item_after_the_other():
    """One rank of 8, AMP: 16, then states, then gradients, then weights divided by 8."""
    job = Job(1, 8)
    assert [resident_bytes(AMP, stage, job) for stage in (0, 1, 2, 3)] == [16, 5.5, 3.75, 2]


def test_one_rank_keeps_the_same_in_every_stage():
    job = Job(10, 1)
    assert {resident_bytes(LEVELS["O2"], stage, job) for stage in (0, 1, 2, 3)} == {10 * (2 + 2 + 4.0625)}
    assert sent_bytes(LEVELS["O2"], 2, job) == (0, 0)


def test_o3_is_not_possible_without_zero():
    assert [is_possible(LEVELS["O3"], stage) for stage in (0, 1, 2, 3)] == [False, True, True, True]


def test_an_fp32_weight_is_its_own_master():
    """4 weight + 4 gradient + 8 states; DeepSpeed's own ZeRO copies the weight once more."""
    job = Job(1, 1, base="fp32")
    assert resident_bytes(LEVELS["O1"], 1, job) == 16
    assert resident_bytes(AMP, 1, job) == 20


def test_gradients_of_zero_2_with_four_micro_batches():
    """Counted on 2 ranks: plain ZeRO-2 sends 8.8 bytes per parameter and step, with the FP8 reduce 3.0."""
    job = Job(1, 2, gas=4)
    assert sum(sent_bytes(AMP, 2, job)) == pytest.approx(8.8, rel=0.03)
    assert sum(sent_bytes(LEVELS["O2"], 2, job)) == pytest.approx(3.0, rel=0.03)


def test_fp8_gradients_of_zero_2_are_about_a_quarter():
    """1.03 bytes once to the owners, against an all-reduce of 2 bytes: 0.258."""
    job = Job(1, 8)
    assert sent_bytes(LEVELS["O1"], 2, job)[0] / sent_bytes(AMP, 2, job)[0] == pytest.approx(0.258, abs=0.001)


def test_o3_halves_the_bytes_of_weights():
    job = Job(1, 8)
    assert sent_bytes(LEVELS["O3"], 1, job)[1] * 2 == sent_bytes(LEVELS["O2"], 1, job)[1]


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


@pytest.mark.parametrize("flags", [["--params", "many"], ["--params", "0"], ["--params", "1", "--world-size", "0"]])
def test_nonsense_is_refused(flags):
    with pytest.raises(SystemExit) as caught:
        main(["estimate", *flags])
    assert caught.value.code == 2


def test_a_bad_file_is_refused(tmp_path, capsys):
    file = tmp_path / "ds.json"
    file.write_text('{"fp8": {"enabled": 1}}')
    assert main(["estimate", str(file), "--params", "1B", "--world-size", "8"]) == 1
    assert "write true" in capsys.readouterr().out


def test_a_model_is_counted_and_its_share_told(tmp_path, monkeypatch, capsys):
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
