"""`ds_fp8 convert`: a checkpoint as safetensors, at another level, or without ds_fp8.

    ds_fp8 convert CKPT OUT                      OUT/model.safetensors: fp32 weights under the model's own names
    ds_fp8 convert CKPT OUT --dtype bf16         the same in 16 bits, half the size
    ds_fp8 convert CKPT OUT --level O3           a DeepSpeed checkpoint whose exact quantized values are those of level
                                                 O3
    ds_fp8 convert CKPT OUT --level plain        a DeepSpeed checkpoint without our entries, a quarter smaller

CKPT is what `save_checkpoint` was given; the tag is `latest` unless `--tag` says otherwise. A job can load any level as
it is; converting before saves nothing but the first encoding. Weights come from the masters, not from the 16-bit model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..numerics.dtypes import BASE_DTYPES
from ..optim import ScaledAdamW, ScaledLion
from ..zero.states import DIGEST, KEY, check_quantized, head_digest
from .complete import is_tag, look, named_by_latest
from .entries import CONVERTED
from .manifest import MANIFEST, UNFINISHED
from .reading import nothing_is_run, read_safe, read_tensors
from .records import check_records
from .saving import finish_alone
from .universal import is_universal

T = TypeVar("T")


def convert(options: Any) -> str:
    """What the command `convert` was asked for (`cli/convert.py`); returns what was written. Raises CheckpointError."""
    folder = _folder(options.checkpoint, options.tag)
    with nullcontext() if options.trust_pickle else nothing_is_run():
        _check_files(folder, options.trust_pickle)
        if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
            raise CheckpointError(f"{options.out}: not an empty folder; name a new one.")
        if options.level:
            return convert_level(folder, options.out, options.level)
        return export_safetensors(folder, options.out, options.dtype or "fp32", options.shard_gb)


def _folder(checkpoint: Path, tag: str | None) -> Path:
    latest = checkpoint / "latest"
    if tag is None and not latest.exists() and any(checkpoint.glob("*_model_states.pt")):
        checkpoint, tag = checkpoint.resolve().parent, checkpoint.resolve().name  # one tag's folder
    if tag is None:
        if not latest.is_file():
            raise CheckpointError(_without_latest(checkpoint))
        tag = named_by_latest(checkpoint)
        if not tag or not tag.isprintable() or Path(tag).is_absolute() or ".." in Path(tag).parts:
            raise CheckpointError(
                f"{latest}: empty or garbage, or it points out of the folder; name the checkpoint with --tag "
                "(`ds_fp8 latest` lists them)."
            )
    folder = checkpoint / tag
    if is_universal(folder):
        raise CheckpointError(
            f"{folder}: a universal checkpoint, which has no shards; convert the checkpoint that it was made of."
        )
    if not any(folder.glob("*_model_states.pt")):
        raise CheckpointError(f"{folder}: no checkpoint of DeepSpeed there (*_model_states.pt).")
    return folder


def _without_latest(checkpoint: Path) -> str:
    """Why a folder without a file `latest` cannot be converted as it was named."""
    inside = [each.name for each in sorted(checkpoint.iterdir()) if each.is_dir()]
    found = [name for name in inside if is_tag(checkpoint / name)]
    if found:
        return f"{checkpoint}: no file `latest` there; name one of {', '.join(found[:5])} with --tag."
    universal = [name for name in inside if is_universal(checkpoint / name)]
    if is_universal(checkpoint) or universal:
        return (
            f"{checkpoint / universal[0] if universal else checkpoint}: a universal checkpoint, which has no shards; "
            "convert the checkpoint that it was made of."
        )
    return (
        f"{checkpoint}: no checkpoint of DeepSpeed there: neither a file `latest`, nor a folder with "
        "*_model_states.pt.\n  Name the folder that `save_checkpoint` was given."
    )


def _check_files(folder: Path, trusted: bool) -> None:
    """Refuse, before anything is loaded for good, what is damaged or holds objects that loading would run."""
    found = look(folder)
    if found.faults:
        raise CheckpointError(f"{folder}: not complete: {'; '.join(found.faults[:3])}")
    for path in _shown(sorted(folder.glob("*.pt")), "reading"):
        check_records(path)
        if not trusted:
            read_safe(path)


def _shown(items: Sequence[T], doing: str) -> Iterator[T]:
    """The items, with a bar on the terminal; silent where the output is no terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(items, doing, console=console, transient=True, disable=not console.is_terminal or len(items) < 2)


def full_weights(folder: Path) -> dict[str, Tensor]:
    """All weights in fp32 by name: masters where the checkpoint has them."""
    if any(folder.glob("*_optim_states.pt")):
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        return dict(get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), folder.name))
    files = sorted(folder.glob("mp_rank_*_model_states.pt"))
    if len(files) != 1:
        raise CheckpointError(
            f"{folder}: {len(files)} model files; model-parallel checkpoints are merged by ds_to_universal."
        )
    state = read_tensors(files[0])
    weights = {
        name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state["module"].items()
    }
    saved = state.get("optimizer") or {}
    names = (saved.get(KEY) or {}).get("layout", {}).get("names", [])
    return weights | dict(zip(names, _stage0_masters(saved, weights, names), strict=True))


def _stage0_masters(saved: dict[str, Any], weights: dict[str, Tensor], names: list[str]) -> list[Tensor]:
    if "fp32_groups_flat" in saved:
        whole = torch.cat([flat.reshape(-1) for flat in saved["fp32_groups_flat"]])
        chunks = whole.split([weights[name].numel() for name in names])
        return [chunk.view(weights[name].shape) for chunk, name in zip(chunks, names, strict=True)]
    if "fp32_groups" in saved:
        return [master for group in saved["fp32_groups"] for master in group]
    return [weights[name] for name in names]


def export_safetensors(folder: Path, out: Path, dtype: str, shard_gb: float) -> str:
    """Write `model.safetensors`, or numbered files with an index when they would be larger than `shard_gb`."""
    from safetensors.torch import save_file

    weights = full_weights(folder)
    out.mkdir(parents=True, exist_ok=True)
    files: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in weights.items():
        # A copy: tied weights share memory, which safetensors refuses; each name keeps its tensor.
        converted = tensor.to(BASE_DTYPES[dtype]) if tensor.is_floating_point() else tensor
        converted = converted.clone().contiguous()
        if files[-1] and size + converted.nbytes > shard_gb * 1e9:
            files.append({})
            size = 0
        files[-1][name] = converted
        size += converted.nbytes
    names = ["model.safetensors"]
    if len(files) > 1:
        names = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
        where = {name: file for file, tensors in zip(names, files, strict=True) for name in tensors}
        total = sum(tensor.nbytes for tensors in files for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for file, tensors in _shown(list(zip(names, files, strict=True)), "writing"):
        save_file(tensors, str(out / file), metadata={"format": "pt"})
    return f"{len(weights)} tensors in {dtype}, {len(names)} file(s) in {out}"


def convert_level(folder: Path, out: Path, level: str) -> str:
    """Copy the checkpoint with the quantized values of every optimizer shard encoded anew, or taken out (`plain`).
    Refused or interrupted it leaves nothing behind.
    """
    target = out / folder.name
    try:
        return _convert_level(folder, target, level)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


def _convert_level(folder: Path, target: Path, level: str) -> str:
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(MANIFEST))
    (target / UNFINISHED).touch()
    count = 0
    shards = sorted([*target.glob("*_optim_states.pt"), *target.glob("*_model_states.pt")])
    for path in _shown(shards, "converting"):
        content = read_tensors(path)
        if not isinstance(content, dict):
            raise CheckpointError(f"{path}: a {type(content).__name__}, no file of DeepSpeed.")
        shard = content.get("optimizer_state_dict") or content.get("optimizer")
        if path.name.endswith("_optim_states.pt") and (not isinstance(shard, dict) or shard.get(KEY) is None):
            raise _nothing_quantized(path)
        changed = level == "plain" and content.pop(KEY, None) is not None
        if isinstance(shard, dict) and shard.get(KEY) is not None:
            check_quantized(shard[KEY], str(path))
            if level == "plain":
                del shard[KEY]
            else:
                shard[KEY] = recode(shard[KEY], level)
            changed, count = True, count + 1
        if changed:
            torch.save(content, path)
    if not count:
        raise _nothing_quantized(folder)
    finish_alone(target, look(folder).step)
    (target.parent / "latest").write_text(folder.name)  # last: it names what is complete
    return f"{count} optimizer shard(s) at {level} in {target}"


def _nothing_quantized(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: no quantized values of ds_fp8 in it. A checkpoint of DeepSpeed alone loads into any level as it is."
    )


def recode(state: dict[str, Any], level: str) -> dict[str, Any]:
    """The entry `ds_fp8` of a shard, with states and masters in the formats of `level`."""
    layout = state["layout"]
    dtype = next((dtype for dtype in BASE_DTYPES.values() if str(dtype) == f"torch.{layout['base_dtype']}"), None)
    if dtype is None:
        raise CheckpointError(
            f"base dtype {layout['base_dtype']!r} is not one of {', '.join(map(str, BASE_DTYPES.values()))}."
        )
    params = [torch.zeros(numel, dtype=dtype, device="cpu") for numel in layout["numel"]]
    # The formats of states do not depend on which algorithm of the same states it was.
    has_squares = "exp_avg_sq" in layout.get("formats", {"exp_avg_sq": ""})
    cls = ScaledAdamW if has_squares else ScaledLion
    optimizer = cls([{"params": params}], level=level, seed=state["seed"])
    for param, quantized in zip(params, state["codes"], strict=True):
        optimizer.import_quantized(param, quantized)
    quantized = [optimizer.export_quantized(param) for param in params]
    recoded = {**state, "layout": {**layout, "formats": optimizer.formats()}, "codes": quantized, CONVERTED: True}
    return {**recoded, DIGEST: head_digest(recoded)}
