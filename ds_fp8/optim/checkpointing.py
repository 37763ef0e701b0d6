"""Exact quantized values in a checkpoint, and a load that either happens whole or not at all.

Two containers, both of built-in types and tensors, safe under `torch.load(weights_only=True)`:

`export_quantized(optimizer, param)`    one parameter, self-contained
    version, formats {exp_avg, exp_avg_sq, master, rounding}, dtype, step, partition, tensors {key: [..]}, weight [n]

`state_dict(optimizer)`             all of them in torch's layout, the parameters themselves saved elsewhere
    state {index: {step, partition, key: tensor}}, param_groups, ds_fp8 {version, algorithm, formats, seed, dtypes}

Equal formats: the bits are copied. Other formats of ours: decoded and encoded anew, which is how a job changes its
level. A torch Adam's state_dict (exp_avg, exp_avg_sq, step): encoded. Everything else is a CheckpointError, raised
after a look at every entry and before the first one is touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..algorithms import MOMENTS, REFUSED_OPTIONS
from ..errors import CheckpointError
from ..levels import EXP_AVG_FORMATS, MASTER_FORMATS, STATE_FORMATS
from ..numerics.dtypes import BASE_DTYPES
from . import codecs, masters

if TYPE_CHECKING:
    from .scaled_optimizer import ScaledOptimizer

KEY = "ds_fp8"
"""Under it stands whatever is ours in a checkpoint of DeepSpeed's or a state_dict of torch's."""

VERSION = 2
"""2: an 8-bit exp_avg is a ratio to the root of exp_avg_sq; in 1, which was never released, it was exp_avg itself."""

MOST_STEPS = 1 << 53
"""Steps and partitions above it are damage."""

_FORMAT_NAMES = {"exp_avg": EXP_AVG_FORMATS, "exp_avg_sq": STATE_FORMATS, "master": MASTER_FORMATS}
_NOT_OURS = {*REFUSED_OPTIONS, "foreach", "fused", "decoupled_weight_decay", "params"}
"""Keys of a foreign parameter group that mean nothing here."""


@dataclass
class Saved:
    """One parameter's state as found in a checkpoint, ours or a torch Adam's."""

    formats: dict[str, str]
    dtype: torch.dtype
    step: int
    partition: int | None
    tensors: dict[str, torch.Tensor]
    weight: torch.Tensor | None
    has_master: bool = True


@torch.no_grad()
def export_quantized(optimizer: ScaledOptimizer, param: torch.Tensor) -> dict[str, Any]:
    """The exact state of one parameter; CPU copies that later steps do not change."""
    state = optimizer.state_of(param)
    return {
        "version": VERSION,
        "formats": optimizer.formats(),
        "dtype": _dtype_name(param.dtype),
        "step": state["step"],
        "partition": state["partition"],
        "tensors": {key: _copy(value) for key, value in state.items() if isinstance(value, torch.Tensor)},
        "weight": _copy(param.detach().reshape(-1)),
    }


@torch.no_grad()
def import_quantized(optimizer: ScaledOptimizer, param: torch.Tensor, quantized: dict[str, Any]) -> None:
    """The way back; raises CheckpointError with everything unchanged."""
    _apply(optimizer, param, check_saved(quantized, param.numel(), "quantized values of a partition"))


def check_saved(quantized: Any, numel: int, where: str) -> Saved:
    """What `export_quantized` wrote of a partition of `numel` elements; CheckpointError, by `where`, if it is
    damaged.
    """
    _check_header(quantized, where, ("formats", "dtype", "step", "partition", "tensors", "weight"))
    for key, kind in (("formats", dict), ("dtype", str), ("tensors", dict), ("weight", torch.Tensor)):
        if not isinstance(quantized[key], kind):
            raise CheckpointError(f"{where}: {key} is a {type(quantized[key]).__name__}, expected {kind.__name__}.")
    for key in ("step", "partition"):
        if type(quantized[key]) is not int or not 0 <= quantized[key] < MOST_STEPS:
            raise CheckpointError(f"{where}: {key} is {quantized[key]!r}, expected a whole number of at least 0.")
    saved = Saved(
        _checked_formats(quantized["formats"], where),
        _checked_dtype(quantized["dtype"], where),
        quantized["step"],
        quantized["partition"],
        quantized["tensors"],
        quantized["weight"],
    )
    _check_tensors(saved, numel, where)
    for key, tensor in saved.tensors.items():
        if key.endswith("scale_inv") and bool((tensor < 0).any()):
            raise CheckpointError(f"{where}: {key} has negative scales; it is damaged.")
    return saved


def state_dict(optimizer: ScaledOptimizer, torch_state: dict[str, Any]) -> dict[str, Any]:
    """`torch_state`, torch's own state_dict of `optimizer`, with what a load needs to know."""
    torch_state[KEY] = {
        "version": VERSION,
        "algorithm": optimizer.algorithm,
        "formats": optimizer.formats(),
        "seed": optimizer.seed,
        "dtypes": [_dtype_name(param.dtype) for param in optimizer.parameters()],
    }
    return torch_state


@torch.no_grad()
def load_state_dict(optimizer: ScaledOptimizer, loaded: dict[str, Any]) -> None:
    """Check everything, then groups (in place: schedulers hold the dicts), then states."""
    if not isinstance(loaded, dict) or not {"state", "param_groups"} <= loaded.keys():
        raise CheckpointError("optimizer state: neither 'state' nor 'param_groups' of an optimizer are there.")
    _check_groups(optimizer, loaded["param_groups"])
    ids = [index for group in loaded["param_groups"] for index in group["params"]]
    params = list(optimizer.parameters())
    header = loaded.get(KEY)
    if header is not None:
        _check_header(header, "optimizer state", ("algorithm", "formats", "seed", "dtypes"))
        _check_moments(optimizer, header["formats"], f"optimizer state of {header['algorithm']}")
        if len(header["dtypes"]) != len(params):
            raise CheckpointError(f"optimizer state: {len(header['dtypes'])} dtypes for {len(params)} parameters.")
    found: list[tuple[torch.Tensor, Saved]] = []
    for number, (index, param) in enumerate(zip(ids, params, strict=True)):
        entry = loaded["state"].get(index)
        if not entry:
            continue
        where = f"optimizer state of parameter {number}"
        saved = (
            _torch_entry(entry, optimizer.moments, where)
            if header is None
            else _own_entry(entry, header, number, where)
        )
        if saved.has_master and saved.dtype != param.dtype:
            raise CheckpointError(
                f"{where}: saved beside a {saved.dtype} parameter, this one is {param.dtype}; the master cannot be"
                " put together again. Load the fp32 export instead."
            )
        _check_tensors(saved, param.numel(), where)
        found.append((param, saved))
    for group, values in zip(optimizer.param_groups, loaded["param_groups"], strict=True):
        group.update({key: value for key, value in values.items() if key not in _NOT_OURS})
    for param in {*params} - {param for param, _ in found}:
        optimizer.forget_moments(param)  # saved before its first step
    for param, saved in found:
        _apply(optimizer, param, saved)
    if header is not None:
        optimizer.seed = int(header["seed"])


def _own_entry(entry: dict[str, Any], header: dict[str, Any], number: int, where: str) -> Saved:
    if not {"step", "partition"} <= entry.keys():
        raise CheckpointError(f"{where}: no 'step' or no 'partition'.")
    return Saved(
        _checked_formats(header["formats"], where),
        _checked_dtype(header["dtypes"][number], where),
        int(entry["step"]),
        int(entry["partition"]),
        {key: value for key, value in entry.items() if isinstance(value, torch.Tensor)},
        None,
    )


def _torch_entry(entry: dict[str, Any], moments: tuple[str, ...], where: str) -> Saved:
    """What torch's and DeepSpeed's own optimizers keep: moments of the parameter's shape."""
    missing, foreign = {"step", *moments} - entry.keys(), set(MOMENTS) & entry.keys() - set(moments)
    if missing or foreign:
        raise CheckpointError(
            f"{where}: missing {', '.join(sorted(missing)) or 'nothing'}, not expected "
            f"{', '.join(sorted(foreign)) or 'nothing'}; this is not the state of an optimizer that keeps "
            f"{' and '.join(moments)}."
        )
    if "max_exp_avg_sq" in entry:
        raise CheckpointError(f"{where}: saved with amsgrad, which FP8 states do not have.")
    tensors = {name: entry[name].detach().float().reshape(-1) for name in moments}
    formats = dict.fromkeys((*moments, "master"), "fp32")
    return Saved(formats, torch.float32, int(entry["step"]), None, tensors, None, has_master=False)


def _check_moments(optimizer: ScaledOptimizer, formats: dict[str, str], where: str) -> None:
    """Raise CheckpointError for states of another algorithm."""
    saved = _moments_of(formats)
    if saved != optimizer.moments:
        raise CheckpointError(
            f"{where}: it keeps {' and '.join(saved)}, {optimizer.algorithm} keeps {' and '.join(optimizer.moments)}.\n"
            "  Train on with the algorithm that saved it, or load the weights alone."
        )


def _check_groups(optimizer: ScaledOptimizer, groups: list[dict[str, Any]]) -> None:
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    found = [len(group["params"]) for group in groups]
    if sizes != found:
        raise CheckpointError(f"optimizer state: groups of {found} parameters, this optimizer has groups of {sizes}.")
    for group in groups:
        for name, reason in REFUSED_OPTIONS.items():
            if group.get(name):
                raise CheckpointError(f"optimizer state: saved with {name}, which is not available here ({reason}).")


def _check_header(header: Any, where: str, names: tuple[str, ...]) -> None:
    if not isinstance(header, dict) or not {"version", *names} <= header.keys():
        raise CheckpointError(f"{where}: not written by ds_fp8, or truncated.")
    if not isinstance(header["version"], int):
        raise CheckpointError(f"{where}: version is {header['version']!r}, expected a whole number.")
    if header["version"] < VERSION:
        raise CheckpointError(
            f"{where}: version {header['version']}, from a ds_fp8 before its first release; there exp_avg in 8 bits "
            f"meant something else. This ds_fp8 reads version {VERSION}: load the fp32 export, or save anew with the "
            "old one."
        )
    if header["version"] > VERSION:
        raise CheckpointError(
            f"{where}: version {header['version']}, this ds_fp8 reads up to {VERSION}. Upgrade ds_fp8, or load the"
            " fp32 export."
        )


def _checked_formats(formats: dict[str, str], where: str) -> dict[str, str]:
    for name, allowed in _FORMAT_NAMES.items():
        if name == "exp_avg_sq" and name not in formats:
            continue  # Lion
        if formats.get(name) not in allowed:
            raise CheckpointError(f"{where}: {name} format {formats.get(name)!r} is not one of {', '.join(allowed)}.")
    return formats


def _checked_dtype(name: str, where: str) -> torch.dtype:
    if name not in BASE_DTYPES:
        raise CheckpointError(f"{where}: dtype {name!r} is not one of {', '.join(BASE_DTYPES)}.")
    return BASE_DTYPES[name]


def _check_tensors(saved: Saved, numel: int, where: str) -> None:
    """Names, sizes and dtypes against what the saved formats say they must be."""
    expected: dict[str, torch.Tensor] = {}
    for moment in _moments_of(saved.formats):
        expected |= codecs.new_moment(moment, saved.formats[moment], numel, "meta")
    flat = torch.empty(numel, dtype=saved.dtype, device="meta")
    if saved.has_master:
        expected |= masters.new_master(saved.formats["master"], flat)
    tensors = dict(saved.tensors)
    if saved.weight is not None:
        expected["weight"], tensors["weight"] = flat, saved.weight
    if expected.keys() != tensors.keys():
        missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
        raise CheckpointError(f"{where}: tensors missing: {missing or 'none'}; not expected: {extra or 'none'}.")
    for key, like in expected.items():
        tensor = tensors[key]
        if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided or tensor.device.type == "meta":
            raise CheckpointError(f"{where}: {key} is a {type(tensor).__name__}, expected a tensor of values.")
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            raise CheckpointError(
                f"{where}: {key} is {tuple(tensor.shape)} {tensor.dtype}, expected {tuple(like.shape)} {like.dtype}."
            )


def _apply(optimizer: ScaledOptimizer, param: torch.Tensor, saved: Saved) -> None:
    """Write a checked entry: bits where formats agree, else by way of fp32."""
    formats = optimizer.formats()
    state = optimizer.state_of(param)
    state["step"] = saved.step
    if saved.partition is not None:
        state["partition"] = saved.partition
    values: dict[str, torch.Tensor | None] = {}
    for moment in optimizer.moments:
        if not _exact(moment, saved.formats, formats):
            values[moment] = codecs.export_moment(saved.tensors, moment, saved.formats)
        else:
            _copy_into(state, saved.tensors, codecs.keys_of(moment, formats[moment]))
    # After the copies: exp_avg may have to be encoded beside an exp_avg_sq that was copied.
    codecs.import_moments(state, formats, values)
    if not saved.has_master:
        return
    if saved.formats["master"] == formats["master"] and saved.dtype == param.dtype:
        _copy_into(state, saved.tensors, masters.keys_of(masters.format_for(formats["master"], param)))
        if saved.weight is not None:
            param.copy_(saved.weight.to(param.device).view(param.shape))
        return
    weight = param.detach().reshape(-1) if saved.weight is None else saved.weight
    tensors = {key: value.to(weight.device) for key, value in saved.tensors.items()}
    optimizer.import_fp32(param, master=masters.export_master(tensors, saved.formats["master"], weight))


def _moments_of(formats: dict[str, str]) -> tuple[str, ...]:
    return tuple(moment for moment in MOMENTS if moment in formats)


def _exact(moment: str, saved: dict[str, str], own: dict[str, str]) -> bool:
    """Whether the quantized values of `moment` mean here what they meant there."""
    if saved[moment] != own[moment]:
        return False
    return not codecs.depends_on_squares(moment, own) or saved["exp_avg_sq"] == own["exp_avg_sq"]


def _copy_into(state: dict[str, Any], tensors: dict[str, torch.Tensor], keys: dict[str, str]) -> None:
    for key in keys.values():
        state[key].copy_(tensors[key])


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)


def _dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, known in BASE_DTYPES.items() if known == dtype)
