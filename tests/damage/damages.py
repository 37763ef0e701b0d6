"""Every damage of the damage table: each entry of a checkpoint's file in each way in which a value can be wrong, and
each file in each way in which a file can be.

An entry is damaged by reading the file, putting the wrong value at its path, and saving the file anew: every CRC-32 is
then right, and what is seen is what the checks say of the value. A *number of the right kind* is another learning rate,
another count, other values in a tensor (a NaN too: a job that has diverged saves such), an older save's whole file:
nothing in the value says that it is wrong.
"""

from __future__ import annotations

import copy
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DELETED = object()
BELIEVED = {("last_batch_iteration", "-1"), ("ds_fp8", "deleted")}
"""DeepSpeed's own value before the first step; a checkpoint of a job without ds_fp8. Nor does
a parameter without gradients have a state."""

Changed = Callable[[Any], Any]


@dataclass(frozen=True)
class Damage:
    """One damage to one file.

    kind     `value`: of the wrong kind, missing, or no number; `number`: another one of the right kind; `file`
    at       the entry's path, or what is done to the file
    how      what stands there afterwards
    do       writes the damaged file: (good file, its content or None, target) -> None
    """

    kind: str
    at: str
    how: str
    do: Callable[[Path, Any, Path], None]

    @property
    def name(self) -> str:
        return f"{self.at}: {self.how}"


def with_value(node: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of nested dicts, lists and tuples with `value` at `path`; what lies elsewhere is shared."""
    key, rest = path[0], path[1:]
    inner = with_value(node[key], rest, value) if rest else value
    if isinstance(node, dict):
        changed = copy.copy(node)
        if inner is DELETED:
            del changed[key]
        else:
            changed[key] = inner
        return changed
    items = list(node)
    items[key : key + 1] = [] if inner is DELETED else [inner]
    return items if isinstance(node, list) else tuple(items)


def entries(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every entry below `node` with its path. A torch.Size is one entry."""
    if path:
        yield path, node
    if isinstance(node, dict):
        for key, inner in node.items():
            yield from entries(inner, (*path, key))
    elif isinstance(node, (list, tuple)) and not isinstance(node, torch.Size):
        for index, inner in enumerate(node):
            yield from entries(inner, (*path, index))


def _one_changed(tensor: torch.Tensor) -> torch.Tensor:
    wrong = tensor.clone()
    flat = wrong.reshape(-1)
    flat[flat.numel() // 2] = ~flat[flat.numel() // 2] if tensor.dtype == torch.bool else flat[flat.numel() // 2] + 1
    return flat.reshape(tensor.shape)


def _one_nan(tensor: torch.Tensor) -> torch.Tensor:
    wrong = tensor.clone().reshape(-1)
    wrong[-1] = float("nan")
    return wrong.reshape(tensor.shape)


def wrong_values(value: Any) -> Iterator[tuple[str, str, Any]]:
    """(kind, how, what stands there instead) for one entry."""
    yield "value", "deleted", DELETED
    if value is not None:
        yield "value", "None", None
    if not isinstance(value, str):
        yield "value", "text", "x"
    if isinstance(value, torch.Tensor):
        yield from _wrong_tensors(value)
    elif isinstance(value, bool):
        yield "number", "negated", not value
        yield "value", "NaN", float("nan")
    elif isinstance(value, (int, float)):
        for how, wrong in (("NaN", float("nan")), ("-1", -1), ("1e30", 10**30), ("a list", [value])):
            yield "value", how, wrong
        yield "number", "another", value + 1 if isinstance(value, int) else value * 0.5 + 1e-3
    elif isinstance(value, str):
        yield "value", "empty", ""
        yield "value", "a number", 7
        yield "number", "another text", value[::-1] + "0"
    elif isinstance(value, (dict, list, tuple)) and value:
        yield "value", "empty", type(value)() if type(value) in (dict, list, tuple) else {}
        yield "value", "a list of None", [None] * len(value)
        if isinstance(value, list):
            yield "value", "the last twice", [*value, value[-1]]
    else:
        yield "value", "a number", 7


def _wrong_tensors(tensor: torch.Tensor) -> Iterator[tuple[str, str, Any]]:
    yield "value", "a list", [1.0]
    yield "value" if tensor.dim() else "number", "a number", 1.0
    yield "value", "on meta", torch.empty_like(tensor, device="meta")
    if tensor.numel() > 1:
        yield "value", "short", tensor.reshape(-1)[: tensor.numel() // 2].clone()
        yield "value", "long", torch.cat([tensor.reshape(-1)] * 2)
        yield "value", "of no elements", tensor.reshape(-1)[:0].clone()
        yield "number", "an axis more", tensor.unsqueeze(0)
        yield "number", "in another order", tensor.reshape(-1).flip(0).reshape(tensor.shape)
    if not tensor.numel():  # a weight that ZeRO 3 has cut up
        return
    other = torch.int32 if tensor.is_floating_point() else torch.float64
    yield "value", f"of {str(other)[6:]}", tensor.to(other)
    yield "number", "one element changed", _one_changed(tensor)
    yield "number", "zeros", torch.zeros_like(tensor)
    if tensor.is_floating_point():
        yield "number", "of float64", tensor.double()
        yield "number", "a NaN", _one_nan(tensor)
        yield "number", "negated", -tensor
        yield "number", "all values huge", torch.full_like(tensor, torch.finfo(tensor.dtype).max)


def of_values(content: Any) -> Iterator[Damage]:
    """Each entry of a file's content, in each wrong way."""
    for path, value in entries(content):
        for kind, how, wrong in wrong_values(value):
            if (path[-1], how) in BELIEVED or (path[-2:-1] == ("state",) and how == "deleted"):
                kind = "number"

            def do(good: Path, content: Any, target: Path, path: Any = path, wrong: Any = wrong) -> None:
                torch.save(with_value(content, path, wrong), target)

            yield Damage(kind, "/".join(map(str, path)), how, do)


def _bytes(change: Changed) -> Callable[[Path, Any, Path], None]:
    return lambda good, content, target: target.write_bytes(change(good.read_bytes())) and None


def _flipped(at: int) -> Changed:
    def change(content: bytes) -> bytes:
        damaged = bytearray(content)
        damaged[at] ^= 0x10
        return bytes(damaged)

    return change


def _lost(content: bytes) -> bytes:
    middle = len(content) // 2 // 512 * 512
    return content[:middle] + bytes(512) + content[middle + 512 :]


def _folder(good: Path, content: Any, target: Path) -> None:
    target.unlink()
    target.mkdir()


def _link(to: str) -> Callable[[Path, Any, Path], None]:
    def do(good: Path, content: Any, target: Path) -> None:
        target.unlink()
        target.symlink_to(to)

    return do


def of_files(good: Path) -> Iterator[Damage]:
    """The file itself: a bit of each record and of the archive's directory, cut off, empty, missing, no file."""
    with zipfile.ZipFile(good) as archive:
        for record in archive.infolist():
            if record.file_size:
                header = record.header_offset + 26
                lengths = good.read_bytes()[header : header + 4]
                begin = header + 4 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
                what = record.filename.partition("/")[2]
                yield Damage("file", what, "a bit flipped", _bytes(_flipped(begin + record.file_size // 2)))
        yield Damage("file", "directory", "a bit flipped", _bytes(_flipped(archive.start_dir + 20)))
    size = good.stat().st_size
    for how, change in {
        "a byte short": lambda content: content[:-1],
        "half": lambda content: content[: size // 2],
        "four bytes": lambda content: content[:4],
        "empty": lambda content: b"",
        "a sector of zeros": _lost,
        "zeros": lambda content: bytes(size),
        "something appended": lambda content: content + b"x" * 700,
        "text": lambda content: b"not a checkpoint\n",
        "last bit flipped": _flipped(size - 1),
    }.items():
        yield Damage("file", "the file", how, _bytes(change))
    yield Damage("file", "the file", "missing", lambda good, content, target: target.unlink())
    yield Damage("file", "the file", "a folder", _folder)
    yield Damage("file", "the file", "a link to nowhere", _link("nowhere"))
    yield Damage("file", "the file", "a link to itself", _link(good.name))


def of_another(others: dict[str, Path]) -> Iterator[Damage]:
    """The file replaced by another checkpoint's, or another file of this one."""
    for how, other in others.items():

        def do(good: Path, content: Any, target: Path, other: Path = other) -> None:
            target.write_bytes(other.read_bytes())

        yield Damage("number" if how.startswith("an older") else "file", "the file", how, do)


def every(good: Path, others: dict[str, Path]) -> list[Damage]:
    """All damages to the file `good`; `others` by what it is replaced with."""
    content = torch.load(good, map_location="cpu", weights_only=False)
    return [*of_files(good), *of_another(others), *of_values(content)]
