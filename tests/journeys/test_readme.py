"""README's code blocks are true: the JSON is valid and trains, the commands run, the named files exist."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from ds_fp8 import config
from tests.journeys.launching import ROOT, command_of, launch

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_json_to_add_is_accepted():
    """Both sections as shown; no error, and both are on."""
    (text,) = blocks("json")
    settings = config.load(json.loads(text))
    assert settings.fp8.enabled and settings.msamp.level.name == "O2"
    assert [problem for problem in config.check(json.loads(text)) if problem.severity == "error"] == []


@pytest.mark.parametrize("line", [line for block in blocks("bash") for line in block.splitlines()])
def test_the_commands_run(line):
    """Each command of the page, with exit code 0."""
    program, *arguments = line.split()
    assert program == "ds_fp8"
    found = command_of("ds_fp8")
    command = (
        [found]
        if found and Path(found).parent == Path(sys.executable).parent
        else [sys.executable, "-m", "ds_fp8.cli.main"]
    )
    code, said = launch([*command, *arguments], ROOT)
    assert code == 0, said


def test_every_script_and_document_that_is_named_exists():
    """A page that names a file which is gone sends its reader away."""
    named = re.findall(r"(?:bash |`)((?:examples|tests|configs|docs|launch|schemas|ds_fp8|\.ci)/[\w./]*)", README)
    assert len(named) > 8
    missing = [name for name in named if not (ROOT / name).exists()]
    assert missing == []


@pytest.mark.parametrize("script", ["examples/main_job.sh", "tests/run.sh", ".ci/run", ".ci/venv.sh"])
def test_the_scripts_are_valid_bash(script):
    code, said = launch(["bash", "-n", script], ROOT)
    assert code == 0, said
