"""`ds_fp8 report`: a log as a page; what it shows is what was written."""

from __future__ import annotations

import json
import re

import pytest

from ds_fp8.cli import report
from ds_fp8.cli.history import read_history
from ds_fp8.cli.main import main
from ds_fp8.cli.page import run_data
from ds_fp8.cli.runs import read_runs
from ds_fp8.formats import E4M3, E5M2
from ds_fp8.telemetry import JsonlLog, TensorStatistics, read_jsonl_log

LAYERS = ("blocks.0.up", "blocks.0.<down>")


def write_steps(log, steps, amax=1.0):
    """One plan line and some steps, as `engine.watch` writes them."""
    log.write("plan", digest="ab", banner="ds_fp8: 2 of 3 Linear -> Fp8Linear", plan={})
    for step in steps:
        statistics = [
            TensorStatistics(
                fqn, role, amax * step, 448 / (amax * step), E5M2 if role == "grad_output" else E4M3, 0.01 * step
            )
            for fqn in LAYERS
            for role in ("input", "weight", "grad_output")
        ]
        values = {"wire/gradient_bytes": 100.0, "wire/weight_bytes": 0.0, "wire/scale_bytes": 20.0, "wire/ratio": 0.25}
        log.write(
            "step",
            step=step,
            samples=8 * step,
            loss=2.0 / step,
            values=values,
            readings=[operand.to_json() for operand in statistics],
        )


@pytest.fixture
def log(tmp_path):
    return JsonlLog(tmp_path / "telemetry_rank0.jsonl")


def test_series_are_those_of_the_log(log):
    """amax 2 and 4 at steps 2 and 4; 120 bytes of ours where DeepSpeed would have sent 480."""
    write_steps(log, (2, 4))
    history = read_history(read_jsonl_log(log.path))
    assert history.statistics("input", "amax") == dict.fromkeys(LAYERS, ([2, 4], [2.0, 4.0]))
    assert history.statistics("grad_output", "underflow")[LAYERS[0]] == ([2, 4], [0.02, 0.04])
    assert history.sent_bytes() == ([2, 4], [120.0, 120.0])
    assert history.bytes_of_deepspeed() == ([2, 4], [480.0, 480.0])
    assert history.values("loss") == ([2, 4], [1.0, 0.5])


def test_a_resumed_run_replaces_what_was_lost(log):
    """Killed after step 6, resumed from step 2: steps 4 and 6 of the first run, and its alarm, never led anywhere."""
    write_steps(log, (2, 4, 6))
    log.write("alarm", step=6, kind="saturated", fqn="blocks.0.up", text="lost")
    write_steps(log, (4,), amax=10.0)
    log.write("alarm", step=4, kind="saturated", fqn="blocks.0.up", text="kept")
    history = read_history(read_jsonl_log(log.path))
    assert (history.runs, [step["step"] for step in history.steps]) == (2, [2, 4])
    assert history.statistics("weight", "amax")[LAYERS[0]] == ([2, 4], [2.0, 40.0])
    assert [alarm.text for alarm in history.alarms] == ["kept"]


def test_what_is_not_finite_is_a_gap(log):
    """An operand with inf has amax "inf" in the log, and no point in the plot."""
    write_steps(log, (1,))
    bad = TensorStatistics(LAYERS[0], "input", float("inf"), 1.0, E4M3)
    log.write("step", step=2, samples=16, loss=None, values={}, readings=[bad.to_json()])
    history = read_history(read_jsonl_log(log.path))
    assert history.statistics("input", "amax")[LAYERS[0]] == ([1], [1.0])
    assert history.statistics("input", "underflow")[LAYERS[0]] == ([1], [0.01])
    assert history.values("loss") == ([1], [2.0])


def data_of(path):
    """The JSON that stands in a page."""
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)[1])


def test_the_page_stands_alone(log, tmp_path, capsys):
    """Plotly's script once, nothing fetched; two ranks of one folder are one run, with the alarm of one of them."""
    pytest.importorskip("plotly", reason="needs the extra report")
    write_steps(log, (2, 4))
    log.write(
        "alarm", step=4, kind="underflow", fqn=LAYERS[1], text=f"{LAYERS[1]}: input loses 30% of <its> elements; cure"
    )
    write_steps(JsonlLog(tmp_path / "telemetry_rank1.jsonl"), (2, 4))
    output = tmp_path / "pages" / "report.html"
    assert main(["report", str(tmp_path), "-o", str(output)]) == 0
    assert "1 run(s), 2 log(s), 2 step(s), 1 alarm(s)" in capsys.readouterr().out
    (run,) = data_of(output)["runs"]
    assert run["banner"] == "ds_fp8: 2 of 3 Linear -> Fp8Linear" and run["ranks"] == [0, 1]
    assert len(run["lines"]) == 9 * len(LAYERS) * 2, "nine quantities of two layers on two ranks"
    (group,) = run["alarms"]
    row = {"fqn": LAYERS[1], "role": "input", "finding": "loses 30% of <its> elements", "steps": [4], "ranks": [0]}
    assert group == {"kind": "underflow", "cure": "cure", "rows": [row]}
    text = output.read_text(encoding="utf-8")
    assert "<its>" not in text, "what a name says is never markup"
    assert "<script src=" not in text and len(text) < 1.5 * len(_script()), "the script stands there once"


def _script() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def test_two_runs_and_what_one_of_them_did_not_measure(tmp_path, capsys):
    """bf16 by the Trainer has a loss and nothing else: its other numbers are missing, not zero."""
    pytest.importorskip("plotly", reason="needs the extra report")
    write_steps(JsonlLog(tmp_path / "fp8" / "telemetry_rank0.jsonl"), (2, 4))
    (tmp_path / "bf16").mkdir()
    losses = [{"step": 2, "loss": 1.5}, {"step": 4, "loss": 0.75}, {"step": 4, "eval_loss": 9.0}]
    (tmp_path / "bf16" / "trainer_state.json").write_text(json.dumps({"log_history": losses}))
    output = tmp_path / "report.html"
    assert main(["report", str(tmp_path / "bf16"), str(tmp_path / "fp8"), "-o", str(output)]) == 0
    baseline, fp8 = data_of(output)["runs"]
    assert (baseline["name"], fp8["name"]) == ("bf16", "fp8")
    assert baseline["loss"] == {"0": [[2, 4], [1.5, 0.75]]} and baseline["sent"] == {} and baseline["lines"] == []
    facts = dict(baseline["facts"])
    assert facts["loss, mean of the last tenth"] == "0.7500"
    assert facts["alarms"] is None and facts["sent for each step, by a rank"] is None
    assert dict(fp8["facts"])["of DeepSpeed's own bytes"] == "25%"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Train_Samples_train_loss.csv", "step,train_loss\n16,3.0\n32,2.5\n"),
        ("metrics.json", '{"curve": {"train": [[1, 3.0], [2, 2.5]]}}'),
        ("losses.jsonl", '{"step": 1, "loss": 3.0}\nodd\n{"step": 2, "loss": 2.5}\n{"step": 3}\n'),
    ],
)
def test_losses_of_a_plain_job_are_read_where_they_lie(tmp_path, name, text):
    """DeepSpeed's CSV monitor counts samples, 16 to a step."""
    (tmp_path / name).write_text(text)
    (run,) = read_runs([str(tmp_path / name)])
    assert run.ranks[0].values("loss") == ([1, 2], [3.0, 2.5])


def test_nothing_sent_is_nothing_measured(log):
    """One rank: counters of zero are no line of zeros."""
    log.write("step", step=1, loss=1.0, values={"wire/gradient_bytes": 0.0, "wire/ratio": 1.0}, readings=[])
    history = read_history(read_jsonl_log(log.path))
    assert history.sent_bytes() == ([], []) and history.bytes_of_deepspeed() == ([], [])


def test_odd_lines_are_left_out_and_counted(log, tmp_path, capsys):
    """Not an event, no step, readings that are none: told, and never a traceback."""
    pytest.importorskip("plotly", reason="needs the extra report")
    write_steps(log, (2,))
    odd = [
        {"event": "step"},
        {"event": "step", "step": "4"},
        {"event": "alarm", "step": 1},
        {"event": 7},
        {"event": "x"},
    ]
    fine = [{"event": "step", "step": 3, "values": [], "readings": [1, {"fqn": 1}, {"fqn": "a", "role": "input"}]}]
    with log.path.open("a") as file:
        file.write("".join(json.dumps(event) + "\n" for event in [*odd, *fine]) + "[1]\nnull\n")
    assert main(["report", str(log.path), "-o", str(tmp_path / "out.html")]) == 0
    assert "5 line(s) are no events" in capsys.readouterr().out


def test_a_long_run_is_thinned_without_losing_its_peaks(log):
    """4000 steps in 400 points: the one amax of 9 is still there."""
    for step in range(1, 4001):
        amax = 9.0 if step == 1234 else 1.0
        operand = TensorStatistics("up", "input", amax, 448.0, E4M3)
        log.write("step", step=step, loss=1.0, values={}, readings=[operand.to_json()])
    data = run_data(read_runs([str(log.path)])[0])
    ((_, _, _, _, steps, values),) = [line for line in data["lines"] if line[1] == "amax"]
    assert len(steps) == 400 and data["every"] == 10 and steps[-1] == 4000 and max(values) == 9.0


def test_an_output_that_cannot_be_written_is_told(log, tmp_path, capsys):
    pytest.importorskip("plotly", reason="needs the extra report")
    write_steps(log, (2,))
    (tmp_path / "file").write_text("")
    for output in (tmp_path, tmp_path / "file" / "out.html"):
        assert main(["report", str(log.path), "-o", str(output)]) == 2
        assert "cannot be written" in capsys.readouterr().err


def test_without_plotly_the_extra_is_named(log, monkeypatch, capsys):
    monkeypatch.setattr(report.util, "find_spec", lambda name: None)
    assert main(["report", str(log.path)]) == 2
    assert "pip install 'ds-fp8[report]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "code", "shown"),
    [
        (None, 2, "cannot be read"),
        (json.dumps({"no": "event"}), 2, "no telemetry log"),
        (json.dumps({"event": "plan", "banner": "ds_fp8: plan"}), 1, "no step yet"),
    ],
    ids=["missing", "another file", "just begun"],
)
def test_what_cannot_be_drawn_is_refused(tmp_path, capsys, text, code, shown):
    pytest.importorskip("plotly", reason="needs the extra report")
    path = tmp_path / "t.jsonl"
    if text is not None:
        path.write_text(text + "\n")
    assert main(["report", str(path), "-o", str(tmp_path / "out.html")]) == code
    assert shown in capsys.readouterr().err
    assert not (tmp_path / "out.html").exists()
