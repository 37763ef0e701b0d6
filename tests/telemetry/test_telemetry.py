"""Tensor statistics, aggregates, alarms and the log: from numbers to words."""

from __future__ import annotations

import math

import pytest

from ds_fp8.formats import E4M3, E5M2
from ds_fp8.telemetry import JsonlLog, TensorStatistics, aggregate, find_alarms, read_jsonl_log
from ds_fp8.telemetry.aggregate import events
from ds_fp8.telemetry.alarms import new_alarms


def statistics_of(amax, scale=1.0, fmt=E4M3, fqn="up", role="input", **more):
    return TensorStatistics(fqn, role, amax, scale, fmt, **more)


def test_a_scale_from_its_own_amax_fills_the_range():
    """used = amax * (448 / amax) / 448 = 1: no headroom, nothing clamped."""
    full = statistics_of(3.0, 448 / 3.0)
    assert full.used == pytest.approx(1) and full.headroom_bits == pytest.approx(0, abs=1e-9)
    assert not full.is_saturated


def test_headroom_counts_powers_of_two():
    """112 of 448 leaves two bits; 1792 lies two bits beyond."""
    assert statistics_of(112.0).headroom_bits == 2
    assert statistics_of(1792.0).headroom_bits == -2
    assert statistics_of(1792.0).is_saturated


def test_aggregates_leave_out_what_was_not_seen():
    """Two inputs and one gradient: no number for weights, and inf counts beside the medians, not in them."""
    values = aggregate(
        [
            statistics_of(1.0),
            statistics_of(3.0),
            statistics_of(math.inf),
            statistics_of(2.0, fmt=E5M2, role="grad_output"),
        ]
    )
    assert values["input/amax_max"] == 3.0 and values["input/amax_median"] == 2.0
    assert values["nonfinite_tensors"] == 1
    assert not any(name.startswith("weight/") for name in values)


def test_monitor_events_are_finite_and_carry_the_sample_count():
    """A plot has no place for inf."""
    assert events({"a": 1.5, "b": math.inf}, samples=64) == [("Train/Samples/ds_fp8/a", 1.5, 64)]


@pytest.mark.parametrize(
    ("found", "kind", "key"),
    [
        (statistics_of(math.inf), "nonfinite", "fp8/layers/exclude"),
        (statistics_of(448 * 4.0), "saturated", "fp8/margin"),
        (statistics_of(448 * 2.0**-13), "idle", "fp8/amax_history_len"),
        (statistics_of(448.0, underflow=0.3), "underflow", "fp8/recipe block"),
    ],
)
def test_each_alarm_names_the_layer_and_the_key(found, kind, key):
    """An alarm that does not say what to change is noise."""
    (alarm,) = find_alarms([found])
    assert alarm.kind == kind and alarm.text.startswith("up: input") and key in alarm.text


@pytest.mark.parametrize(
    ("found", "kind", "cure", "not_told"),
    [
        # A head whose gradients all become zero under an old amax: lost before unused.
        (
            statistics_of(448 * 2.0**-20, underflow=1.0, underflow_of_own_amax=0.01),
            "underflow", "fp8/amax_history_len", "block",
        ),
        (
            statistics_of(448 * 2.0**-8, underflow=0.4, margin=8, underflow_without_margin=0.02),
            "underflow", "lower fp8/margin", "history",
        ),
        (
            statistics_of(448 * 2.0**-8, underflow=0.9, margin=8, underflow_without_margin=0.6),
            "underflow", "recipe block", "margin",
        ),
        (statistics_of(448 * 2.0**-14, margin=10), "idle", "lower fp8/margin", "history"),
        (statistics_of(448 * 2.0**-14, margin=1), "idle", "fp8/amax_history_len", "lower fp8/margin"),
    ],
    ids=["lost before unused", "margin loses", "spread loses", "margin idles", "history idles"],
)  # fmt: skip
def test_the_cure_is_the_cause(found, kind, cure, not_told):
    """The key is named without which the alarm would not hold."""
    (alarm,) = find_alarms([found])
    assert alarm.kind == kind and cure in alarm.cure and not_told not in alarm.text


def test_a_healthy_tensor_raises_no_alarm():
    """Full range, half range, and a tensor of zeros (a layer that got no data) are all fine."""
    assert find_alarms([statistics_of(448.0), statistics_of(224.0), statistics_of(0.0)]) == []


def test_an_alarm_is_reported_once_until_it_has_gone():
    """Step 1 reports, step 2 is silent, step 3 is fine, step 4 reports again."""
    bad, known = find_alarms([statistics_of(448 * 4.0)]), set()
    assert [len(new_alarms(now, known)) for now in (bad, bad, [], bad)] == [1, 0, 0, 1]


def test_a_log_cut_by_a_kill_is_still_readable(tmp_path):
    """Half a line at the end is the crash; the lines before it are the run."""
    log = JsonlLog(tmp_path / "logs" / "t.jsonl")
    log.write("plan", digest="ab")
    log.write("step", step=1, readings=[statistics_of(math.inf).to_json()])
    with log.path.open("a") as file:
        file.write('{"event": "st')
    found = read_jsonl_log(log.path)
    assert [event["event"] for event in found] == ["plan", "step"]
    assert found[1]["readings"][0]["amax"] == "inf"


def test_a_cut_line_in_the_middle_loses_only_itself(tmp_path):
    """Killed in a write, then resumed: the new lines are not glued to the half one."""
    path = tmp_path / "t.jsonl"
    JsonlLog(path).write("plan", digest="ab")
    with path.open("a") as file:
        file.write('{"event": "st')
    resumed = JsonlLog(path)
    resumed.write("plan", digest="cd")
    resumed.write("step", step=2)
    assert [event["event"] for event in read_jsonl_log(path)] == ["plan", "plan", "step"]


def test_a_full_disk_ends_the_log_and_not_the_training(capsys):
    """/dev/full refuses every write with ENOSPC: reported once, then silence."""
    log = JsonlLog("/dev/full")
    for step in range(3):
        log.write("step", step=step)
    assert not log.is_open
    assert capsys.readouterr().err.count("training goes on") == 1


def test_a_folder_that_cannot_be_made_ends_the_log_only(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    log = JsonlLog(tmp_path / "file" / "t.jsonl")
    log.write("step", step=1)
    assert "training goes on" in capsys.readouterr().err
