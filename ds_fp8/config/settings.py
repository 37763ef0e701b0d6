"""The typed, frozen view of a validated configuration: what every later floor is handed.

`config.load` makes it; nothing else parses JSON. Fields whose JSON default is "auto" are `None` here until the plan,
which knows the model and the device, decides them. JSON Schema (`schemas/`) is the truth for keys, ranges and
defaults; `tests/config/test_settings.py` compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..levels import Level
from ..recipe import Recipe


@dataclass(frozen=True)
class LayerSettings:
    """`fp8.layers`: which modules may be swapped. Globs are matched against module names (fqn) with fnmatch."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    linear: bool = True
    norm: bool = True
    library_norms: bool | None = None
    first_last_high_precision: bool = False
    min_features: int | None = None


@dataclass(frozen=True)
class CompileSettings:
    """`fp8.compile`, as an object: how torch.compile is called.

    dynamic   None leaves it to torch
    regional  the repeated blocks, and not the whole model
    loss      beside the blocks, the loss over a vocabulary of a Hugging Face model
    """

    mode: str = "default"
    dynamic: bool | None = None
    regional: bool = True
    loss: bool = True


@dataclass(frozen=True)
class TelemetrySettings:
    """`telemetry`, inside either section."""

    enabled: bool = False
    interval: int = 100
    path: str | None = None


@dataclass(frozen=True)
class Fp8Settings:
    """The `fp8` section; `implied` when `msamp` alone turned it on, as MS-AMP does."""

    enabled: bool = False
    implied: bool = False
    backend: str = "auto"
    recipe: Recipe = field(default_factory=Recipe)
    layers: LayerSettings = field(default_factory=LayerSettings)
    fuse: bool = False
    compile: CompileSettings | None = None
    frozen_weights: str = "high_precision"
    weight_cache: bool | None = None
    eval: bool | None = None
    start_step: int = 0
    first_step_check: str = "warn"
    zero3_hooks: str = "auto"
    max_nonfinite_steps: int = 5
    telemetry: TelemetrySettings = field(default_factory=TelemetrySettings)
    checkpoint_on_signal: str | None = None
    checkpoint_fallback: bool = False


@dataclass(frozen=True)
class MsampSettings:
    """The `msamp` section: a level with its overrides, or `level is None` when it is absent or disabled.

    explicit   keys that the user wrote himself; a default that the job cannot use is replaced and reported, an explicit
               value that it cannot use is refused
    weight_wire_exclude  globs over parameters that stay in 16 bits on every rank at O3
    """

    enabled: bool = False
    level: Level | None = None
    use_te: bool = False
    explicit: frozenset[str] = frozenset()
    weight_wire_exclude: tuple[str, ...] = ()
    telemetry: TelemetrySettings = field(default_factory=TelemetrySettings)
    checkpoint_on_signal: str | None = None
    checkpoint_fallback: bool = False


@dataclass(frozen=True)
class DeepSpeedFacts:
    """The few facts of DeepSpeed's own sections that the plan depends on.

    base_dtype     `bf16`, `fp16` or `fp32`: what the model's parameters are cast to
    dtype_is_auto  the file leaves it to the trainer ("auto"); base_dtype is what is planned with
    """

    zero_stage: int = 0
    base_dtype: str = "fp32"
    dtype_is_auto: bool = False
    gradient_accumulation_steps: int | None = None
    offload_optimizer: str | None = None
    offload_param: str | None = None
    optimizer: str | None = None
    torch_autocast: bool = False
    raw: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def dtype(self) -> str:
        """For people: `bf16`, or `bf16 (decided by the trainer)`."""
        return f"{self.base_dtype} (decided by the trainer)" if self.dtype_is_auto else self.base_dtype


@dataclass(frozen=True)
class Settings:
    """Everything a job asked of us.

    trains  the engine has an optimizer; without one there is nothing for `msamp` to do
    """

    fp8: Fp8Settings = field(default_factory=Fp8Settings)
    msamp: MsampSettings = field(default_factory=MsampSettings)
    deepspeed: DeepSpeedFacts = field(default_factory=DeepSpeedFacts)
    source: str = "config"
    notes: tuple[str, ...] = ()
    trains: bool = True

    @property
    def telemetry(self) -> TelemetrySettings:
        """The job's telemetry: whichever section asks for it (two that differ are refused)."""
        return self.fp8.telemetry if self.fp8.telemetry.enabled else self.msamp.telemetry

    @property
    def checkpoint_on_signal(self) -> str | None:
        """Folder for the checkpoint that a signal asks for; whichever section names one (two that differ are
        refused).
        """
        return self.fp8.checkpoint_on_signal or self.msamp.checkpoint_on_signal

    @property
    def checkpoint_fallback(self) -> bool:
        """Load the newest complete checkpoint where the latest cannot be loaded; whichever section says so."""
        return self.fp8.checkpoint_fallback or self.msamp.checkpoint_fallback

    @property
    def enabled(self) -> bool:
        return self.fp8.enabled or self.msamp.enabled
