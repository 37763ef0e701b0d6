"""JSON Schema is the truth, the frozen dataclasses are its typed view: here the two are compared."""

from __future__ import annotations

import importlib.util
from dataclasses import fields
from pathlib import Path

import pytest

from ds_fp8 import levels, recipe
from ds_fp8.config import CompileSettings, Fp8Settings, LayerSettings, TelemetrySettings, contract
from ds_fp8.levels import LEVELS
from ds_fp8.recipe import Recipe

SECTIONS = ("fp8", "layers", "compile", "msamp", "telemetry")


def undecided(value):
    """None in a dataclass is "auto" in JSON."""
    return "auto" if value is None else list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize(
    ("section", "instance", "renamed"),
    [
        ("fp8", Fp8Settings(), {"recipe", "layers", "compile", "telemetry", "implied"}),
        ("fp8", Recipe(), {"kind"}),
        ("layers", LayerSettings(), set()),
        ("compile", CompileSettings(), set()),
        ("telemetry", TelemetrySettings(), set()),
    ],
    ids=["fp8", "recipe", "layers", "compile", "telemetry"],
)
def test_defaults_agree(section, instance, renamed):
    """A default that stands in two places stands there once."""
    for field in fields(instance):
        if field.name not in renamed:
            assert undecided(getattr(instance, field.name)) == contract.default(section, field.name), field.name
    assert contract.default("fp8", "recipe") == Recipe().kind
    assert contract.definition("compile")["default"] is False
    assert Fp8Settings().compile is None


def test_every_key_has_a_home():
    """Each key of the schema is a field of the typed view, and the other way round."""
    recipe_fields = {field.name for field in fields(Recipe)} - {"kind"} | {"recipe"}
    fp8_fields = {field.name for field in fields(Fp8Settings)} - {"implied"}
    assert contract.properties("fp8").keys() == recipe_fields | fp8_fields
    assert contract.properties("layers").keys() == {field.name for field in fields(LayerSettings)}
    assert contract.properties("compile").keys() == {field.name for field in fields(CompileSettings)}
    assert contract.properties("telemetry").keys() == {field.name for field in fields(TelemetrySettings)}
    level_fields = {field.name for field in fields(LEVELS["O1"])} - {"name"}
    assert contract.properties("msamp").keys() == level_fields | {
        "enabled",
        "opt_level",
        "use_te",
        "telemetry",
        "checkpoint_on_signal",
        "checkpoint_fallback",
        "weight_wire_exclude",
    }


@pytest.mark.parametrize(
    ("section", "key", "words"),
    [
        ("fp8", "recipe", recipe.RECIPES),
        ("msamp", "opt_level", levels.OPT_LEVELS),
        ("msamp", "exp_avg", levels.EXP_AVG_FORMATS),
        ("msamp", "exp_avg_sq", levels.STATE_FORMATS),
        ("msamp", "master", levels.MASTER_FORMATS),
        ("msamp", "block_size", (levels.BLOCK_SIZE,)),
    ],
)
def test_allowed_words_agree_with_the_facts_below(section, key, words):
    assert [word for word in contract.properties(section)[key]["enum"] if word != "auto"] == list(words)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_explains_itself(section):
    """Description and default stand beside the key; a number has a range and a unit."""
    for key, entry in contract.properties(section).items():
        entry = contract.definition(key) if "$ref" in entry else entry
        assert len(entry["description"]) > 10, key
        assert "default" in entry, key
        if "integer" in entry.get("type", ()):
            assert {"minimum", "maximum", "x-unit"} <= entry.keys(), key


@pytest.mark.parametrize("section", SECTIONS)
def test_every_default_is_allowed(section):
    from jsonschema import Draft7Validator

    for key, entry in contract.properties(section).items():
        if "$ref" not in entry:
            Draft7Validator(entry).validate(entry["default"])
            Draft7Validator(entry).validate("auto")
            assert key


def test_the_reference_page_is_generated():
    """docs/configuration.md says what the schema says; nobody edits it by hand."""
    script = Path(__file__).resolve().parents[2] / "schemas" / "generate_reference.py"
    spec = importlib.util.spec_from_file_location("generate_reference", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.TARGET.read_text(encoding="utf-8") == module.render()
