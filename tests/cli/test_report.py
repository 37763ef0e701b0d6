"""`ds_fp8 report`: a log as a page; what it shows is what was written."""

from __future__ import annotations

import json

import pytest

from ds_fp8.cli import report
from ds_fp8.cli.history import read_history
from ds_fp8.cli.main import main
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


def test_series_are_those_of_the_journal(log):
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
    assert [text for *_, text in history.alarms] == ["kept"]


def test_what_is_not_finite_is_a_gap(log):
    """An operand with inf has amax "inf" in the log, and no point in the plot."""
    write_steps(log, (1,))
    bad = TensorStatistics(LAYERS[0], "input", float("inf"), 1.0, E4M3)
    log.write("step", step=2, samples=16, loss=None, values={}, readings=[bad.to_json()])
    history = read_history(read_jsonl_log(log.path))
    assert history.statistics("input", "amax")[LAYERS[0]] == ([1], [1.0])
    assert history.statistics("input", "underflow")[LAYERS[0]] == ([1], [0.01])
    assert history.values("loss") == ([1], [2.0])


def test_the_page_stands_alone(log, tmp_path, capsys):
    """Plotly's script once for two logs and four figures; the plan, the layers and the alarms in words."""
    pytest.importorskip("plotly", reason="needs the extra report")
    write_steps(log, (2, 4))
    log.write("alarm", step=4, kind="underflow", fqn=LAYERS[1], text="loses 30% of <its> elements")
    other = JsonlLog(tmp_path / "telemetry_rank1.jsonl")
    write_steps(other, (2, 4))
    output = tmp_path / "pages" / "report.html"
    assert main(["report", str(log.path), str(other.path), "-o", str(output)]) == 0
    assert "2 log(s), 4 step(s), 1 alarm(s)" in capsys.readouterr().out
    text = output.read_text(encoding="utf-8")
    assert "ds_fp8: 2 of 3 Linear -&gt; Fp8Linear" in text
    assert "loses 30% of &lt;its&gt; elements" in text and text.count("No alarms.") == 1
    assert text.count("Plotly.newPlot(") >= 4 and "<script src=" not in text
    assert len(text) < 1.5 * len(_script()), "the script stands there once"


def _script() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def test_each_operand_has_every_layer(log):
    """Nine plots of two layers, and each layer once in the legend."""
    pytest.importorskip("plotly", reason="needs the extra report")
    write_steps(log, (2, 4))
    figure = report.operands(read_history(read_jsonl_log(log.path)))
    assert len(figure.data) == 9 * len(LAYERS)
    assert sorted(line.name for line in figure.data if line.showlegend) == sorted(LAYERS)
    assert all(list(line.x) == [2, 4] for line in figure.data)


def test_without_plotly_the_extra_is_named(log, monkeypatch, capsys):
    monkeypatch.setattr(report.util, "find_spec", lambda name: None)
    assert main(["report", str(log.path)]) == 2
    assert "pip install 'ds-fp8[report]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "code", "told"),
    [
        (None, 2, "FileNotFoundError"),
        (json.dumps({"no": "event"}), 2, "no telemetry log"),
        (json.dumps({"event": "plan", "banner": "ds_fp8: plan"}), 1, "no step yet"),
    ],
    ids=["missing", "another file", "just begun"],
)
def test_what_cannot_be_drawn_is_refused(tmp_path, capsys, text, code, told):
    pytest.importorskip("plotly", reason="needs the extra report")
    path = tmp_path / "t.jsonl"
    if text is not None:
        path.write_text(text + "\n")
    assert main(["report", str(path), "-o", str(tmp_path / "out.html")]) == code
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out.html").exists()
