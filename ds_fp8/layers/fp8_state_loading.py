"""Matching a saved FP8 state to the layers of today: by name, and all checks before anything is changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..errors import CheckpointError

if TYPE_CHECKING:
    from .fp8_state import ModelFp8State

KEYS = ("names", "recipe", "steps", "forward_folds", "backward_folds", "scales", "forward_history", "backward_history")


def match_state(
    state: dict[str, Any], fp8_state: ModelFp8State
) -> tuple[dict[str, torch.Tensor], torch.Tensor, list[str]]:
    """(tensors in the layout of `fp8_state`, pending amaxes, one note for each thing that did not fit).

    Raises CheckpointError for a state that is foreign, newer, or damaged.
    """
    _check(state)
    names = list(state["names"])
    count = len(names)
    notes: list[str] = []
    missing = [name for name in fp8_state.names if name not in names]
    if missing:
        notes.append(f"{len(missing)} FP8 layers have no saved scales and start fresh: {', '.join(missing[:4])}")
    unused = [name for name in names if name not in fp8_state.names]
    if unused:
        notes.append(f"saved scales of {len(unused)} layers that are not in FP8 now: {', '.join(unused[:4])}")

    old_of = {name: index for index, name in enumerate(names)}
    pairs = [(new, old_of[name]) for new, name in enumerate(fp8_state.names) if name in old_of]
    new_forward = [2 * new + side for new, _ in pairs for side in (0, 1)]
    old_forward = [2 * old + side for _, old in pairs for side in (0, 1)]
    new_backward, old_backward = [new for new, _ in pairs], [old for _, old in pairs]

    total = len(fp8_state.names)
    new_columns = new_forward + [2 * total + new for new in new_backward]
    old_columns = old_forward + [2 * count + old for old in old_backward]
    scales = torch.ones(3 * total, dtype=torch.float32, device="cpu")
    pending = torch.zeros(3 * total, dtype=torch.float32, device="cpu")
    known = torch.zeros(3 * total, dtype=torch.bool, device="cpu")
    scales[new_columns] = state["scales"][old_columns]
    known[new_columns] = _known(state)[old_columns]
    if "pending" in state:
        pending[new_columns] = state["pending"][old_columns]
    tensors = {"scales": scales, "known": known}
    length = fp8_state.forward.history.shape[0]
    if state["forward_history"].shape[0] != length and fp8_state.recipe.keeps_history:
        notes.append(
            f"saved amax_history_len is {state['forward_history'].shape[0]}, now {length}: the newest are kept"
        )
    for key, columns, new, old in (
        ("forward_history", 2 * total, new_forward, old_forward),
        ("backward_history", total, new_backward, old_backward),
    ):
        tensors[key] = torch.zeros(length, columns, dtype=torch.float32, device="cpu")
        history = state[key][:, old]
        if not fp8_state.exact:  # written when infinities were remembered
            history = torch.where(torch.isfinite(history), history, 0.0)
        tensors[key][:, new] = _newest(history, length)
    return tensors, pending, notes


def _known(state: dict[str, Any]) -> torch.Tensor:
    """Which columns have a scale of their own: as written, or (until version 0.1.0, and under Transformer Engine's
    rules, which do not ask) as it shows.
    """
    known = state["scales"] != 1
    return known | state["known"] if "known" in state else known


def _newest(history: torch.Tensor, length: int) -> torch.Tensor:
    """A history of another length: row 0 is the open slot, the newest amax is the last row."""
    kept = history[1:][-(length - 1) :] if length > 1 else history[:0]
    missing = torch.zeros(length - kept.shape[0], history.shape[1], dtype=torch.float32, device="cpu")
    return torch.cat([missing, kept])


def _check(state: dict[str, Any]) -> None:
    from .fp8_state import VERSION

    version = state.get("version") if isinstance(state, dict) else None
    if not isinstance(version, int):
        raise CheckpointError("the saved FP8 state has no version; it was not written by ds_fp8.")
    if version > VERSION:
        raise CheckpointError(f"the saved FP8 state has version {version}, this ds_fp8 reads up to {VERSION}. Upgrade.")
    missing = [key for key in KEYS if key not in state]
    if missing:
        raise CheckpointError(f"the saved FP8 state is truncated: {', '.join(missing)} missing.")
    names = state["names"]
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise CheckpointError("the saved FP8 state is damaged: names is no list of layers.")
    if len(set(names)) < len(names):
        raise CheckpointError("the saved FP8 state is damaged: a layer stands there twice.")
    for key in ("steps", "forward_folds", "backward_folds"):
        if not isinstance(state[key], int) or state[key] < 0:
            raise CheckpointError(f"the saved FP8 state is damaged: {key} is {state[key]!r}.")
    count = len(names)
    for key, columns in (("scales", 3 * count), ("forward_history", 2 * count), ("backward_history", count)):
        tensor = state[key]
        dimensions = 1 if key == "scales" else 2
        fits = isinstance(tensor, torch.Tensor) and tensor.dim() == dimensions and tensor.shape[-1] == columns
        if not fits or tensor.dtype != torch.float32 or tensor.shape[0] == 0 < columns:
            raise CheckpointError(f"the saved FP8 state is damaged: {key} does not fit its {count} layers.")
        if key != "scales" and bool(((tensor < 0) | tensor.isnan()).any()):
            raise CheckpointError(f"the saved FP8 state is damaged: {key} holds negative values or NaN.")
    for key in ("known", "pending"):
        if key in state and (not isinstance(state[key], torch.Tensor) or state[key].shape != (3 * count,)):
            raise CheckpointError(f"the saved FP8 state is damaged: {key} does not fit its {count} layers.")
    if not bool((torch.isfinite(state["scales"]) & (state["scales"] > 0)).all()):
        raise CheckpointError("the saved FP8 state is damaged: a scale is zero, negative or not finite.")
