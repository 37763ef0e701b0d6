"""The pages by task as they stand: every titled block becomes the file of that name, every `bash` block is run."""

from __future__ import annotations

import re
import shlex
import sys

import pytest

from ds_fp8 import config
from tests.journeys import clients
from tests.journeys.launching import ROOT, launch

pytestmark = pytest.mark.dist

BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)


def blocks(page: str) -> list[tuple[str, str, str]]:
    """(language, title or empty, text) of each block."""
    return BLOCK.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))


def run_page(page: str, folder) -> list[str]:
    """What each command printed. `deepspeed SCRIPT` is one rank here: another test launches several."""
    said = []
    for _, title, text in blocks(page):
        if title:
            (folder / title).write_text(text)
    for language, _, text in blocks(page):
        for line in text.splitlines() if language == "bash" else ():
            words = shlex.split(line)
            given = dict(word.split("=") for word in words if re.fullmatch(r"[A-Z_0-9]+=\S+", word))
            words = words[len(given) :]
            if words[0] in ("deepspeed", "python"):
                words = [sys.executable, *words[1:]]
            code, text_of = launch(words, folder, 400, **clients.variables(folder, **given))
            assert code == 0, f"{line}\n{text_of}"
            said.append(text_of)
    return said


def losses(said: str) -> list[float]:
    return [float(number) for number in re.findall(r"^step \d+ loss (\S+)", said, flags=re.MULTILINE)]


def test_leaving(tmp_path):
    """O2, then DeepSpeed alone from the same checkpoint: steps go on, the loss too; then the weights in plain torch."""
    with_it, without, _, loaded = run_page("leaving.md", tmp_path)
    assert "2 of 2 Linear -> Fp8Linear" in with_it and "msamp O2" in with_it
    assert "ds_fp8" not in without and "step 4 " in without and "step 6 " in without
    assert losses(without)[0] < losses(with_it)[0]
    assert "loaded 16576" in loaded


def test_compile(tmp_path):
    """Blocks are compiled by JSON, in FP8."""
    (said,) = run_page("compile.md", tmp_path)
    assert "8 of 8 Linear -> Fp8Linear" in said and "repeated blocks compiled by torch.compile" in said
    assert "all 8 planned layers ran in FP8 in step 1" in said and len(losses(said)) == 3


def test_coming_from_ms_amp(tmp_path):
    (said,) = run_page("migration.md", tmp_path)
    assert "msamp O2" in said and len(losses(said)) == 3


@pytest.mark.parametrize("page", ["leaving.md", "compile.md", "migration.md"])
def test_json_of_a_page_is_valid(page):
    """`check` has nothing to say about any of them."""
    import json

    for language, title, text in blocks(page):
        if language == "json" and title:
            assert config.check(json.loads(text)) == [], title
