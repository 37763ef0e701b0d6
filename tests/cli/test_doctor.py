"""`ds_fp8 doctor`: looks, changes nothing, survives a broken probe, and every failure brings its cure."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from ds_fp8.cli import doctor, probes
from ds_fp8.cli.main import main


def test_answers_in_json_on_a_clean_stdout(capsys):
    """DeepSpeed logs to stdout when imported; a machine must still be able to read the answer."""
    code = main(["doctor", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] == (code == 0)
    found = {finding["what"]: finding for finding in answer["findings"]}
    assert found["torch"]["status"] == "ok"
    assert {"python", "ds_fp8", "transformer engine", "activation hook", "msamp package"} <= found.keys()


def test_a_broken_probe_is_a_finding(monkeypatch, capsys):
    def broken_probe():
        raise OSError("no such driver")
        yield

    monkeypatch.setattr(doctor, "PROBES", (broken_probe,))
    assert main(["doctor"]) == 1
    assert "no such driver" in capsys.readouterr().out


def test_old_and_missing_packages_fail_with_the_command(monkeypatch):
    monkeypatch.setattr(probes, "installed", lambda name: {"torch": "2.1.0", "deepspeed": None}.get(name, "99.0"))
    found = {finding.what: finding for finding in probes.versions()}
    assert (found["torch"].status, found["torch"].cure) == ("fail", "pip install --upgrade 'torch>=2.11'")
    assert (found["deepspeed"].status, found["deepspeed"].cure) == ("fail", "pip install 'deepspeed>=0.18.0'")
    assert found["rich"].status == "ok"


def lacking(monkeypatch, *, fp8: list[str], msamp: list[str]) -> None:
    from ds_fp8.zero import private_names

    def differences(source, *, msamp=True, version=None, _of_msamp=tuple(msamp)):
        yield from fp8
        yield from _of_msamp if msamp else ()

    monkeypatch.setattr(private_names, "differences", differences)


def test_a_different_deepspeed_fails(monkeypatch):
    lacking(monkeypatch, fp8=["a: not there", "b: takes (self), expected (self, model)"], msamp=[])
    found = [finding for finding in probes.deepspeed_names() if finding.what == "deepspeed names"]
    assert [finding.status for finding in found] == ["fail", "fail"]


@pytest.mark.parametrize(("section", "code"), [("msamp", 1), ("fp8", 0)])
def test_an_older_deepspeed_fails_a_job_with_msamp_only(monkeypatch, tmp_path, capsys, section, code):
    """What only `msamp` hooks differs there: with `fp8` alone the job can run, and the note says which cannot."""
    lacking(monkeypatch, fp8=[], msamp=["DeepSpeedZeroOptimizer.allreduce_no_retain: not there"])
    monkeypatch.setattr(doctor, "PROBES", (probes.deepspeed_names,))
    sections = {section: {"enabled": True}, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
    (tmp_path / "ds.json").write_text(json.dumps({"train_batch_size": 2, "bf16": {"enabled": True}, **sections}))
    assert main(["doctor", str(tmp_path / "ds.json"), "--json"]) == code
    answer = json.loads(capsys.readouterr().out)
    assert answer["findings"][0]["what"] == probes.MSAMP_NAMES
    assert answer["findings"][0]["status"] == ("fail" if code else "note")


def test_a_deepspeed_that_is_not_installed_is_compared(tmp_path, capsys):
    """`--deepspeed PATH`: the installed one is as known; the same with a method renamed is not, and is reported by
    name.
    """
    import shutil
    from pathlib import Path

    import deepspeed

    assert main(["doctor", "--deepspeed", str(Path(deepspeed.__file__).parent)]) == 0
    assert "nothing differs" in capsys.readouterr().out
    copy = tmp_path / "deepspeed"
    shutil.copytree(Path(deepspeed.__file__).parent, copy, ignore=lambda _, names: [n for n in names if n == "ops"])
    engine = copy / "runtime" / "engine.py"
    engine.write_text(engine.read_text().replace("_take_model_step", "_step_model"))
    assert main(["doctor", "--deepspeed", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "_take_model_step: not there" in shown and "by itself" not in shown
    named = copy / "git_version_info_installed.py"
    named.write_text(named.read_text().replace(deepspeed.__version__, "0.18.8"))
    assert main(["doctor", "--deepspeed", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "DeepSpeed 0.18.8 in" in shown and "by itself: over gloo ZeRO 1 and 2 stop" in shown
    assert main(["doctor", "--deepspeed", str(tmp_path / "nowhere")]) == 2


def test_the_hook_is_found_in_a_site_directory_only(monkeypatch, tmp_path):
    """Python reads no .pth file elsewhere, not even in the current folder."""
    monkeypatch.setattr(probes.site, "getsitepackages", lambda: [str(tmp_path)])
    monkeypatch.setattr(probes.site, "ENABLE_USER_SITE", False)
    monkeypatch.setattr(probes, "torch_calls_us", lambda: False)
    monkeypatch.delenv("DS_FP8_DISABLE", raising=False)
    (finding,) = probes.activation_hook()
    assert (finding.status, "pip install" in finding.cure) == ("note", True)
    (tmp_path / "ds_fp8.pth").write_text("import ds_fp8.import_hook\n")
    (finding,) = probes.activation_hook()
    assert finding.status == "ok"


SECTION = {"train_batch_size": 2, "fp8": {"enabled": True}}


@pytest.mark.parametrize(
    ("data", "options", "code"),
    [
        (SECTION, [], 1),
        (SECTION, ["--other-activation"], 0),
        ({"train_batch_size": 2}, [], 0),
        ({**SECTION, "fp8": {"enabled": False}}, [], 0),
    ],
    ids=["sections", "import ds_fp8 in the script", "unmodified", "disabled"],
)
def test_a_missing_hook_fails_a_job_that_needs_it(monkeypatch, tmp_path, capsys, data, options, code):
    """Such a job would train in bf16 without a word: DeepSpeed ignores the section, and nothing of ours is there."""
    monkeypatch.setattr(doctor, "PROBES", (probes.activation_hook,))
    monkeypatch.setattr(probes, "torch_calls_us", lambda: False)
    monkeypatch.setattr(probes.site, "getsitepackages", lambda: [str(tmp_path)])
    monkeypatch.setattr(probes.site, "ENABLE_USER_SITE", False)
    monkeypatch.delenv("DS_FP8_DISABLE", raising=False)
    (tmp_path / "ds.json").write_text(json.dumps(data))
    assert main(["doctor", str(tmp_path / "ds.json"), "--json", *options]) == code
    answer = json.loads(capsys.readouterr().out)
    assert answer["findings"][0]["status"] == ("fail" if code else "note")
    (tmp_path / "ds_fp8.pth").write_text("import ds_fp8")
    assert main(["doctor", str(tmp_path / "ds.json"), *options]) == 0


def test_a_file_with_errors_fails_and_all_of_them_are_shown(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(doctor, "PROBES", ())
    (tmp_path / "ds.json").write_text(json.dumps({**SECTION, "fp8": {"enabled": True, "margn": 1, "interval": 0}}))
    assert main(["doctor", str(tmp_path / "ds.json")]) == 1
    shown = capsys.readouterr().out
    assert "fp8/margn: unknown key; did you mean 'margin'?" in shown and "fp8/interval: 0 is less" in shown


def test_a_bound_for_all_ranks_needs_all_ranks(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "--within", "5"])
    assert caught.value.code == 2 and "--every-rank" in capsys.readouterr().err


@pytest.mark.parametrize(
    "fp8, shown",
    [
        ({"recipe": "mxfp8"}, "mxfp8 runs in Transformer Engine only"),
        ({"backend": "transformer_engine"}, "transformer_engine"),
        ({"checkpoint_on_signal": "$DS_FP8_NOT_SET/there"}, "names a variable that is not set"),
    ],
    ids=["recipe", "backend", "variable"],
)
def test_a_job_that_this_machine_would_refuse_fails(monkeypatch, tmp_path, capsys, fp8, shown):
    """A preflight that lets such a job through spends the nodes' time on an error."""
    monkeypatch.setattr(doctor, "PROBES", ())
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    (tmp_path / "ds.json").write_text(json.dumps({"train_batch_size": 2, "fp8": {"enabled": True, **fp8}}))
    assert main(["doctor", str(tmp_path / "ds.json"), "--json"]) == 1
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert finding["status"] == "fail" and shown in finding["cure"]


def test_torchs_entry_point_is_a_hook_where_no_pth_is_read(monkeypatch):
    """`pip install --target` and PYTHONPATH: torch finds our metadata on sys.path, and activates us."""
    monkeypatch.delenv("DS_FP8_DISABLE", raising=False)
    monkeypatch.setattr(probes.site, "getsitepackages", list)
    monkeypatch.setattr(probes.site, "ENABLE_USER_SITE", False)
    monkeypatch.setattr(probes.metadata, "entry_points", lambda group: [SimpleNamespace(name="ds_fp8")])
    monkeypatch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD", raising=False)
    (finding,) = probes.activation_hook()
    assert finding.status == "ok" and "entry point" in finding.found
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    (finding,) = probes.activation_hook()
    assert finding.status == "note"


def test_a_disabled_hook_fails(monkeypatch):
    monkeypatch.setenv("DS_FP8_DISABLE", "1")
    (finding,) = probes.activation_hook()
    assert (finding.status, finding.cure) == ("fail", "unset DS_FP8_DISABLE, also on the other nodes")


def test_microsofts_package_is_named_beside_ours(monkeypatch, tmp_path):
    (tmp_path / "msamp").mkdir()
    (tmp_path / "msamp" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "msamp", raising=False)
    (finding,) = probes.msamp_package()
    assert finding.status == "note"
    assert "in use for the msamp section of the JSON: ds_fp8" in finding.found


@pytest.mark.parametrize(
    ("version", "parts"),
    [("2.13.0+cpu", (2, 13, 0)), ("0.17.2", (0, 17, 2)), ("2.5rc1", (2, 51)), ("2.6.0a0", (2, 6, 0))],
)
def test_version_numbers(version, parts):
    assert probes.numbers(version)[:2] >= (parts[0],)
    assert probes.numbers(version)[0] == parts[0]


def test_the_versions_are_those_of_the_package():
    """What doctor asks for, what the installer asks for and what the README says come from one table."""
    from pathlib import Path

    from ds_fp8 import releases

    root = Path(__file__).resolve().parents[2]
    assert "releases().REQUIRED" in (root / "setup.py").read_text(encoding="utf-8")
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert f"DeepSpeed {releases.DEEPSPEED[0]} to {releases.DEEPSPEED[-1]}" in readme
    words = " ".join(readme.split())
    for name, known in (("torch", releases.REQUIRED["torch"]), ("Python", releases.PYTHON)):
        assert f"{name} {known.oldest} or newer (tested: {', '.join(known.tested)})" in words
    assert all(f"DeepSpeed {fault.first} to {fault.last}" in readme for fault in releases.FAULTS)
    pinned = (root / "constraints.txt").read_text(encoding="utf-8")
    assert f"deepspeed=={releases.DEEPSPEED[-1]}" in pinned


@pytest.mark.parametrize(
    ("version", "shown"),
    [("2.10.1", "older than 2.11"), ("2.11.0", ""), ("2.13.0+cpu", ""), ("2.14.9", ""), ("2.15.0", "newer than 2.14")],
)
def test_versions_outside_of_what_was_tested_are_told(monkeypatch, version, shown):
    """An older torch is a failure; a newer one a note that names what was tested; patches of a tested one are
    neither.
    """
    monkeypatch.setattr(probes.releases, "REQUIRED", {"torch": probes.releases.Range("2.11", ("2.11", "2.14"))})
    monkeypatch.setattr(probes.releases, "OPTIONAL", {})
    monkeypatch.setattr(probes, "installed", lambda name: version)
    (finding,) = [one for one in probes.versions() if one.what == "torch"]
    assert shown in finding.found and finding.found.startswith(version)
    assert finding.status == ("ok" if not shown else "fail" if shown.startswith("older") else "note")
    assert ("2.11 to 2.14" in finding.found) == shown.startswith("newer")


def test_every_tested_release_is_on_the_page_of_the_matrix():
    """docs/compatibility.md is the result of tests/matrix.sh, so a release is tested if its row says ok, and only
    then.
    """
    from pathlib import Path

    from ds_fp8 import releases

    page = (Path(__file__).resolve().parents[2] / "docs" / "compatibility.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| 0.")
    ]
    assert {row[0] for row in rows if len(row) > 3} == set(releases.DEEPSPEED)
    for release, alone, *others in (row for row in rows if len(row) > 3):
        assert alone == ("fails by itself" if releases.faults(release) else "ok"), release
        assert set(others) == {"ok"}, release


@pytest.mark.parametrize(
    ("imports", "code", "shown"),
    [
        ("import torch", 0, "is hooked"),
        ("import ds_fp8\nds_fp8.import_hook.remove()", 1, "would train in 16 bits"),
        ("import no_such_client", 1, "No module named 'no_such_client'"),
    ],
    ids=["met", "past the hook", "broken client"],
)
def test_a_client_is_proven_by_what_it_imports(monkeypatch, tmp_path, capsys, imports, code, shown):
    """A fresh Python imports it and looks at DeepSpeed's engine class; a proven client needs no .pth file."""
    from ds_fp8.cli import clients
    from tests.journeys.launching import PACKAGE_PARENT, hook_folder

    monkeypatch.setenv("PYTHONPATH", f"{hook_folder(tmp_path / 'import_hook')}:{PACKAGE_PARENT}")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.delenv("DS_FP8_DISABLE", raising=False)
    monkeypatch.setattr(doctor, "PROBES", (probes.activation_hook,))
    monkeypatch.setattr(probes, "torch_calls_us", lambda: False)
    monkeypatch.setattr(probes.site, "getsitepackages", list)
    monkeypatch.setattr(probes.site, "ENABLE_USER_SITE", False)
    monkeypatch.setitem(clients.CLIENTS, "trainer", clients.Client(("torch",), imports))
    (tmp_path / "ds.json").write_text(json.dumps(SECTION))
    assert main(["doctor", str(tmp_path / "ds.json"), "--client", "trainer", "--json"]) == code
    found = {finding["what"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert shown in found["client trainer"]["found"]
    assert found["activation hook"]["status"] == ("fail" if code else "note")


def test_a_client_that_is_not_installed_fails_with_the_command(monkeypatch):
    from ds_fp8.cli import clients

    monkeypatch.setattr(clients, "installed", lambda name: None if name == "trl" else "1.0")
    (finding,) = clients.client("trl")
    assert (finding.status, finding.cure) == ("fail", "pip install trl")
