"""The doctor's probes: one small function per question, all of one signature, each yielding findings.

A finding is `ok`, a `note` (works, but somebody may wonder) or a `fail` (a job cannot run), and a cure is something to
type or to change. Only what really stops a job fails: no GPU, no Transformer Engine and no compiler are notes.
"""

from __future__ import annotations

import os
import platform
import shutil
import site
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from .. import releases
from ..config import contract
from ..import_hook import DISABLE_VARIABLE, is_disabled
from ..recipe import RECIPE_KINDS
from ..releases import numbers

MSAMP_NAMES = "deepspeed names of msamp"
"""A note that is a failure for a job with `msamp`."""


@dataclass(frozen=True)
class Finding:
    """One answer.

    what    the question
    found   the answer
    status  `ok`, `note` or `fail`
    cure    what to do about it; empty when nothing
    """

    what: str
    found: str
    status: str = "ok"
    cure: str = ""


def installed(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def versions() -> Iterator[Finding]:
    """Python, ourselves, and what we need."""
    from .. import __version__

    found = f"{platform.python_version()} on {platform.platform()}"
    yield _placed("python", found, platform.python_version(), releases.PYTHON, "note")
    yield Finding("ds_fp8", f"{__version__} in {Path(__file__).resolve().parents[1]}")
    for name, known in releases.REQUIRED.items():
        version = installed(name)
        if version is None:
            yield Finding(name, "not installed", "fail", f"pip install '{known.requirement(name)}'")
        else:
            # Of DeepSpeed releases that are newer than the tested ones `deepspeed_names` says more.
            yield _placed(name, version, version, known, "fail")
    for name, known in releases.OPTIONAL.items():
        if (version := installed(name)) is not None:
            yield _placed(name, version, version, known, "note")


def _placed(name: str, found: str, version: str, known: releases.Range, if_older: str) -> Finding:
    """A version, and whether it lies outside of those that were tested."""
    where = known.outside(version)
    if not where:
        return Finding(name, found)
    if where.startswith("older"):
        cure = "" if name == "python" else f"pip install --upgrade '{known.requirement(name)}'"
        return Finding(name, f"{found}, {where}", if_older, cure)
    return Finding(name, f"{found}, {where} ({known.span} were)", "note")


def deepspeed_names() -> Iterator[Finding]:
    """The private names that we stand on are as we know them: methods, attributes and imports, read off its source."""
    version = installed("deepspeed")
    if version is None:
        return
    from ..zero import private_names
    from ..zero.deepspeed_source import DeepSpeedSource

    source = DeepSpeedSource.installed()
    of_fp8 = list(private_names.differences(source, msamp=False, version=version))
    of_msamp = [text for text in private_names.differences(source, version=version) if text not in of_fp8]
    tested = f"{releases.DEEPSPEED[0]} to {releases.DEEPSPEED[-1]}"
    cure = (
        f"install DeepSpeed {releases.DEEPSPEED[-1]}, or a newer ds_fp8; "
        "`ds_fp8 doctor --deepspeed PATH` looks into others"
    )
    if numbers(version) < numbers(releases.DEEPSPEED[0]):
        return  # `versions` has said it
    for text in releases.faults(version):
        yield Finding(
            "deepspeed", f"{version} by itself: {text}", "note", "another release, e.g. the newest tested one"
        )
    for text in of_fp8:
        yield Finding("deepspeed names", text, "fail", cure)
    for text in of_msamp:
        yield Finding(MSAMP_NAMES, f"{text}; a job with msamp is refused, fp8 alone is not concerned", "note", cure)
    if not of_fp8 and not of_msamp:
        is_tested = numbers(version) in {numbers(one) for one in releases.DEEPSPEED}
        message = "all as expected" + ("" if is_tested else f"; {version} itself was not tested ({tested} were)")
        yield Finding("deepspeed names", message, "ok" if is_tested else "note")
    schema_version = contract.schema("deepspeed")["x-deepspeed-version"]
    if schema_version != version:
        yield Finding("config schema", f"made from DeepSpeed {schema_version}, {version} is installed", "note",
                      "`ds_fp8 check` may misjudge DeepSpeed's newest keys; training is not concerned")  # fmt: skip


def device() -> Iterator[Finding]:
    """What computes here, and whether it multiplies FP8."""
    if installed("torch") is None:
        return
    import torch

    from .. import capabilities

    if not torch.cuda.is_available():
        yield Finding("device", "cpu: FP8 is emulated bit for bit, at the speed of 16-bit products", "note")
        return
    for index in range(torch.cuda.device_count()):
        host = capabilities.host(f"cuda:{index}")
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        known = [
            name
            for name, kind in RECIPE_KINDS.items()
            if host.at_least(kind.transformer_engine_since or kind.multiplied_since)
        ]
        speaks = ", ".join(known) or "no FP8 products: emulated"
        yield Finding(f"device {index}", f"{host}, {memory:.0f} GiB; {speaks}", "ok" if host.multiplies_fp8 else "note")
    yield Finding("cuda", f"{torch.version.cuda}, nccl {'.'.join(map(str, torch.cuda.nccl.version()))}")


def transformer_engine() -> Iterator[Finding]:
    """Whether it imports, and why not."""
    if installed("torch") is None:
        return
    from .. import capabilities

    version, reason = capabilities.transformer_engine()
    if version is not None:
        yield Finding("transformer engine", version)
        return
    without = "backend torch computes the same numerics"
    cure = "pip install 'ds-fp8[transformer-engine]'" if reason == "not installed" else ""
    yield Finding("transformer engine", f"{reason}; {without}", "note", cure)


def kernels() -> Iterator[Finding]:
    """Which fast path casts and steps, and whether it gives the reference's bits."""
    if installed("torch") is None or util.find_spec("ds_fp8.kernels") is None:
        return
    import torch

    from .. import kernels as fast

    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    for name in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        path = fast.path(torch.device(name))
        slow = path == "torch"
        cure = (
            "install a C++ compiler (g++ or clang++); the kernels are built at first use"
            if slow and not compiler
            else ""
        )
        yield Finding(
            f"kernels on {name}", f"{path}{' (PyTorch: slow)' if slow else ''}", "note" if slow else "ok", cure
        )
        if not slow:
            yield _bit_for_bit(name)
    triton = installed("triton")
    if torch.cuda.is_available():
        yield Finding(
            "triton", triton or "not installed", "ok" if triton else "note", "" if triton else "pip install triton"
        )


def _bit_for_bit(device: str) -> Finding:
    """Run each kernel once beside its PyTorch reference: a compiler's fault shows here, not in a month of training."""
    from ..kernels import self_test

    what, wrong = f"kernels on {device}, bit for bit", self_test.disagreements(device)
    if not wrong:
        return Finding(what, "equal to the PyTorch reference")
    shown = "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
    compiler = "triton" if device == "cuda" else "C++ compiler"
    cure = (
        f"do not train here: gradients or weights would be wrong. Try another version of the {compiler}, "
        "and report this line"
    )
    return Finding(what, f"differ from the PyTorch reference: {shown}", "fail", cure)


ENTRY_POINTS, AUTOLOAD_VARIABLE = "torch.backends", "TORCH_DEVICE_BACKEND_AUTOLOAD"
"""The group whose entry points torch calls at the end of its import, unless the variable is 0."""


def torch_calls_us() -> bool:
    """Whether `import torch` activates the plugin: it finds our metadata, on sys.path too, and calls what they name."""
    named = any(point.name == "ds_fp8" for point in metadata.entry_points(group=ENTRY_POINTS))
    return named and os.environ.get(AUTOLOAD_VARIABLE, "1") != "0"


def activation_hook() -> Iterator[Finding]:
    """What makes JSON alone enough: the .pth file in a site directory."""
    # Only site directories count: Python reads no .pth file elsewhere, not even on sys.path.
    folders = {*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])}
    found = [Path(folder) / "ds_fp8.pth" for folder in sorted(folders) if (Path(folder) / "ds_fp8.pth").is_file()]
    if is_disabled():
        cure = f"unset {DISABLE_VARIABLE}, also on the other nodes"
        yield Finding("activation hook", f"{DISABLE_VARIABLE}={os.environ[DISABLE_VARIABLE]}: disabled", "fail", cure)
    elif found:
        yield Finding("activation hook", str(found[0]))
    elif torch_calls_us():
        yield Finding("activation hook", f"torch's entry point {ENTRY_POINTS}: no ds_fp8.pth in a site directory here")
    else:
        cure = (
            "pip install ds-fp8 (or -e .) into this environment; or `import ds_fp8` in the script; "
            "or `deepspeed --module ds_fp8.run train.py`"
        )
        yield Finding(
            "activation hook",
            "no ds_fp8.pth in the site directories: JSON alone does not activate the plugin",
            "note",
            cure,
        )


def msamp_package() -> Iterator[Finding]:
    """If Microsoft's package is there as well, which of the two works."""
    spec = util.find_spec("msamp")
    if spec is None:
        yield Finding("msamp package", "not installed; the msamp section is served by ds_fp8")
        return
    if "ds_fp8" in (spec.origin or ""):
        yield Finding("msamp package", f"ds_fp8's shim ({spec.origin})")
        return
    version = installed("ms-amp") or installed("msamp") or "of unknown version"
    yield Finding(
        "msamp package",
        f"{version} in {spec.origin}; in use for the msamp section of the JSON: ds_fp8",
        "note",
        "scripts with `from msamp import deepspeed` get that package, not ds_fp8; "
        "unmodified `import deepspeed` gets ds_fp8",
    )


PROBES: tuple[Callable[[], Iterator[Finding]], ...] = (
    versions,
    deepspeed_names,
    device,
    transformer_engine,
    kernels,
    activation_hook,
    msamp_package,
)
