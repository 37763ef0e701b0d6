"""What a module says that it touches of DeepSpeed is what it touches, and DeepSpeed has it.

A private name that nobody lists is a name whose change nobody notices. Fails here? Declare the name in `TOUCHED` at the
head of the module (ds_fp8/zero/touched.py says how), and give a method that is overridden its parameters in
ds_fp8/zero/private_names.py.
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest
from touched_scan import scan

from ds_fp8.errors import PrivateNameError
from ds_fp8.zero import private_names, touched
from ds_fp8.zero.deepspeed_source import DeepSpeedSource
from ds_fp8.zero.touched import Touched, check_instance, files, of_file

FILES = {file.relative_to(touched.ROOT).as_posix(): file for file in files()}


@pytest.mark.parametrize("name", FILES)
def test_everything_touched_is_declared(name):
    declared = of_file(FILES[name])
    known = set().union(*(names.names for names in declared.values()), set())
    missing = {
        f"{owner}: {found} ({kind}, line {line})"
        for owner, kind, found, line in scan(FILES[name])
        if found not in known
    }
    assert not missing, f"{name} does not declare: {'; '.join(sorted(missing))}"


@pytest.mark.parametrize("name", FILES)
def test_writes_and_overrides_are_declared_as_such(name):
    """Reading a name that is gone fails by itself; setting it or standing in front of it does not."""
    declared = of_file(FILES[name])
    for kind in ("writes", "overrides"):
        known = set().union(*(getattr(names, kind) for names in declared.values()), set())
        for owner, found_kind, found, line in scan(FILES[name]):
            assert found_kind != kind or found in known, f"{name}, line {line}: {owner}.{found} belongs to `{kind}`"


@pytest.mark.parametrize("name", FILES)
def test_everything_declared_is_touched(name):
    text = FILES[name].read_text()
    tree = ast.parse(text)
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TOUCHED":
            lines = text.splitlines()
            del lines[node.lineno - 1 : node.end_lineno]
            text = "\n".join(lines)
    for owner, names in of_file(FILES[name]).items():
        idle = [one for one in sorted(names.names) if not re.search(rf"\b{one}\b", text)]
        assert not idle, f"{name} declares {', '.join(idle)} of {owner}, and does not use it"


def test_the_installed_deepspeed_has_all_of_it():
    assert list(private_names.differences(DeepSpeedSource.installed())) == []


def test_every_override_has_its_parameters_listed():
    listed = {(method.owner, method.name) for method in private_names.METHODS}
    for name, file in FILES.items():
        for owner, names in of_file(file).items():
            for one in names.overrides:
                owners = [o for o in touched.owners_of(owner) if name_in(o, one)]
                known = all({(o, one), ("ZeroOptimizer", one)} & listed for o in owners)
                assert known or "adapters" in name, f"{name}: {owner}.{one}"


@functools.cache
def source() -> DeepSpeedSource:
    return DeepSpeedSource.installed()


def name_in(owner: str, name: str) -> bool:
    module, cls = touched.OWNERS[owner]
    return bool(cls) and source().parameters(module, f"{cls}.{name}") is not None


def renamed(old: str, new: str) -> DeepSpeedSource:
    """The installed DeepSpeed with a name changed everywhere."""
    baseline = DeepSpeedSource.installed()

    def read(path: str) -> str | None:
        text = baseline._read(path)
        return None if text is None else re.sub(rf"\b{old}\b", new, text)

    return DeepSpeedSource(read, "renamed")


@pytest.mark.parametrize(
    "old",
    [
        "torch_autocast_z0_gradscaler",
        "using_bf16_optimizer",
        "_hp_optimizer_states_linked",
        "ds_persist",
        "_optimizer_step",
    ],
)
def test_a_renamed_name_is_found_even_if_we_only_write_it(old):
    """Each of these would have been set in vain: no error, other numbers."""
    found = list(private_names.differences(renamed(old, f"{old}_2"), version="0.19.9"))
    assert any(old in text for text in found), found


def test_a_changed_signature_is_found():
    found = list(private_names.differences(renamed("sub_group_id", "index"), version="0.19.9"))
    assert any("_optimizer_step: takes (self, index), expected (self, sub_group_id)" in text for text in found)


def test_a_finished_wrapper_is_compared_with_what_its_mixins_declare(monkeypatch):
    class DeepSpeeds:
        def step(self):
            """Theirs."""

    class Mixin:
        def step(self):
            """Ours."""

    import sys

    monkeypatch.setattr(
        sys.modules[__name__], "TOUCHED", {"ZeroStage12": Touched(("step",), ("flat",), ())}, raising=False
    )
    wrapper = type("Fp8", (Mixin, DeepSpeeds), {})()
    with pytest.raises(PrivateNameError, match="has no flat"):
        check_instance(wrapper, "ZeroStage12", DeepSpeeds)
    wrapper.flat = 1
    check_instance(wrapper, "ZeroStage12", DeepSpeeds)
    del DeepSpeeds.step
    with pytest.raises(PrivateNameError, match="has no step"):
        check_instance(wrapper, "ZeroStage12", DeepSpeeds)


def test_sources_are_read_from_archives_too(tmp_path: Path):
    """An sdist and a wheel of the same code tell the same."""
    import tarfile
    import zipfile

    root = Path(DeepSpeedSource.installed().where)
    parts = ("deepspeed/runtime/engine.py", "deepspeed/__init__.py")
    with (
        tarfile.open(tmp_path / "deepspeed-9.9.9.tar.gz", "w:gz") as sdist,
        zipfile.ZipFile(tmp_path / "d.whl", "w") as wheel,
    ):
        for part in parts:
            sdist.add(root / part, f"deepspeed-9.9.9/{part}")
            wheel.write(root / part, part)
        (tmp_path / "version.txt").write_text("9.9.9\n")
        sdist.add(tmp_path / "version.txt", "deepspeed-9.9.9/version.txt")
    expected = ("self", "model")
    for name, version in (("deepspeed-9.9.9.tar.gz", "9.9.9"), ("d.whl", "")):
        source = DeepSpeedSource.at(tmp_path / name)
        where = ("deepspeed.runtime.engine", "DeepSpeedEngine._configure_distributed_model")
        assert (source.parameters(*where), source.version) == (expected, version)
    with pytest.raises(PrivateNameError, match="no DeepSpeed here"):
        DeepSpeedSource.at(tmp_path / "nothing")
