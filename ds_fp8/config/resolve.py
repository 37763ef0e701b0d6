"""From validated JSON to `Settings`: "auto" and absent keys become the schema's defaults, the level its formats.

Three keys stay undecided (None) until the plan knows model and device: `fp8.weight_cache`,
`fp8.layers.min_features`, and `telemetry.path`, which without a folder means: no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..algorithms import moments_of
from ..levels import LEVELS
from ..recipe import HighPrecision, Recipe
from . import contract
from .facts import read_facts
from .settings import CompileSettings, Fp8Settings, LayerSettings, MsampSettings, Settings, TelemetrySettings

LEVEL_KEYS = (
    "exp_avg",
    "exp_avg_sq",
    "master",
    "rounding",
    "gradient_wire",
    "gradient_wire_scope",
    "weight_wire",
    "block_size",
)
"""Keys of `msamp` that override one format of the level."""

RECIPE_KEYS = ("fp8_format", "margin", "interval", "amax_history_len", "amax_compute_algo", "amax_rules", "reduce_amax")


def value_of(given: dict[str, Any], section: str, key: str) -> Any:
    """The effective value of a key; None where the default itself is left to the plan."""
    value = given.get(key, "auto")
    if value == "auto":
        value = contract.default(section, key)
    return None if value == "auto" and "auto" not in contract.properties(section)[key].get("enum", ()) else value


def is_enabled(given: Any) -> bool:
    """A section is on: "enabled" is true or "auto"."""
    return isinstance(given, dict) and given.get("enabled") in (True, "auto")


def integer(value: Any) -> Any:
    """5e8 is a float to JSON and a whole number to people."""
    return int(value) if isinstance(value, float) else value


def explicit_keys(given: dict[str, Any]) -> frozenset[str]:
    """Keys that the user decided himself."""
    return frozenset(key for key, value in given.items() if value != "auto")


def without_training(data: dict[str, Any]) -> dict[str, Any]:
    """The configuration as an engine without an optimizer has it: `msamp` off, the FP8 layers that it brought along
    on.
    """
    if not is_enabled(data.get("msamp")):
        return data
    return {"fp8": {"enabled": True}, **data, "msamp": {**data["msamp"], "enabled": False}}


def settings_of(data: dict[str, Any], source: str, notes: tuple[str, ...] = (), trains: bool = True) -> Settings:
    """Build the typed view. `data` has passed the schema and the rules.

    trains  false for an engine without an optimizer
    """
    fp8_given: Any = data.get("fp8")
    msamp_given: Any = data.get("msamp")
    facts = read_facts(data)
    msamp = _msamp(msamp_given, moments_of(facts.optimizer)) if is_enabled(msamp_given) else MsampSettings()
    all_notes = list(notes)
    if is_enabled(fp8_given):
        fp8 = _fp8(fp8_given, backend=_backend(fp8_given, msamp))
    elif msamp.enabled and fp8_given is None:
        fp8 = _fp8({}, backend=_backend({}, msamp), implied=True)
        all_notes.append(
            'msamp turns FP8 matrix products on as well, as MS-AMP does; "fp8": {"enabled": false} keeps them off'
        )
    else:
        switches = fp8_given if isinstance(fp8_given, dict) else {}  # what holds for `msamp` alone too
        fp8 = Fp8Settings(zero3_hooks=value_of(switches, "fp8", "zero3_hooks"))
        if msamp.enabled:
            all_notes.append(
                "fp8.enabled is false: matrix products stay in high precision, msamp covers states and wire only"
            )
    if msamp.enabled and not trains:
        all_notes.append("this engine has no optimizer, so msamp has nothing to do here")
        msamp = MsampSettings()
    return Settings(fp8=fp8, msamp=msamp, deepspeed=facts, source=source, notes=tuple(all_notes), trains=trains)


def _backend(given: dict[str, Any], msamp: MsampSettings) -> str:
    backend = value_of(given, "fp8", "backend")
    return "transformer_engine" if msamp.use_te and backend == "auto" else backend


def _fp8(given: dict[str, Any], backend: str, implied: bool = False) -> Fp8Settings:
    recipe_values = {key: integer(value_of(given, "fp8", key)) for key in RECIPE_KEYS}
    return Fp8Settings(
        enabled=True,
        implied=implied,
        backend=backend,
        recipe=Recipe(
            kind=value_of(given, "fp8", "recipe"),
            override_linear_precision=HighPrecision(*value_of(given, "fp8", "override_linear_precision")),
            **recipe_values,
        ),
        layers=_layers(given.get("layers", "auto")),
        fuse=value_of(given, "fp8", "fuse"),
        compile=_compile(given.get("compile", False)),
        frozen_weights=value_of(given, "fp8", "frozen_weights"),
        weight_cache=value_of(given, "fp8", "weight_cache"),
        eval=value_of(given, "fp8", "eval"),
        start_step=integer(value_of(given, "fp8", "start_step")),
        first_step_check=value_of(given, "fp8", "first_step_check"),
        zero3_hooks=value_of(given, "fp8", "zero3_hooks"),
        max_nonfinite_steps=integer(value_of(given, "fp8", "max_nonfinite_steps")),
        telemetry=_telemetry(given.get("telemetry", "auto")),
        checkpoint_on_signal=value_of(given, "fp8", "checkpoint_on_signal"),
        checkpoint_fallback=value_of(given, "fp8", "checkpoint_fallback"),
    )


def _layers(given: Any) -> LayerSettings:
    given = {} if given == "auto" else given
    return LayerSettings(
        include=tuple(value_of(given, "layers", "include")),
        exclude=tuple(value_of(given, "layers", "exclude")),
        linear=value_of(given, "layers", "linear"),
        norm=value_of(given, "layers", "norm"),
        library_norms=value_of(given, "layers", "library_norms"),
        first_last_high_precision=value_of(given, "layers", "first_last_high_precision"),
        min_features=integer(value_of(given, "layers", "min_features")),
    )


def _compile(given: Any) -> CompileSettings | None:
    if not isinstance(given, dict):
        return CompileSettings() if given is True else None
    return CompileSettings(**{key: value_of(given, "compile", key) for key in contract.properties("compile")})


def _telemetry(given: Any) -> TelemetrySettings:
    given = {} if given == "auto" else given
    return TelemetrySettings(
        enabled=is_enabled(given),
        interval=integer(value_of(given, "telemetry", "interval")),
        path=value_of(given, "telemetry", "path"),
    )


def _msamp(given: dict[str, Any], moments: Sequence[str]) -> MsampSettings:
    level = LEVELS[value_of(given, "msamp", "opt_level")]
    overrides = {key: integer(given[key]) for key in LEVEL_KEYS if key in given}
    return MsampSettings(
        enabled=True,
        level=level.override(**overrides).keeping(moments),
        use_te=value_of(given, "msamp", "use_te"),
        explicit=explicit_keys(given),
        weight_wire_exclude=tuple(value_of(given, "msamp", "weight_wire_exclude")),
        telemetry=_telemetry(given.get("telemetry", "auto")),
        checkpoint_on_signal=value_of(given, "msamp", "checkpoint_on_signal"),
        checkpoint_fallback=value_of(given, "msamp", "checkpoint_fallback"),
    )
