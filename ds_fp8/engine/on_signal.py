"""Checkpoint on a signal: after TERM or USR1 to any rank, all ranks save after the same optimizer step and leave.

Schedulers warn before they kill: a time limit, a preemption, an eviction. A script that saves every thousand steps, or
never, then loses at most the step it is in. Which step that is, all ranks agree on (`agreed_step.py`); until a signal
comes a step costs a comparison.

After the save every rank raises SystemExit(128 + signal), as if the signal had ended it: whoever sent it sees that the
job was interrupted, not done. The launch scripts then start it again (`docs/clusters.md`).
"""

from __future__ import annotations

import functools
import os
import signal
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..zero.touched import touched
from .agreed_step import PATIENCE_S, agreed_step
from .printing import print_rank_0

TOUCHED = {
    "Engine": touched(reads="global_steps save_checkpoint"),
    "PipelineEngine": touched(reads="train_batch"),
}

SIGNALS = ("SIGTERM", "SIGUSR1")

_armed: list[SignalCheckpoint] = []
_handlers_before: dict[int, Any] = {}
_armed_so_far = 0


def checkpoint_on_signal(
    engine: Any,
    save_dir: str | os.PathLike[str],
    *,
    signals: Sequence[str] = SIGNALS,
    client_state: Callable[[], dict[str, Any]] | None = None,
    leave: bool = True,
) -> SignalCheckpoint:
    """Save `engine` into `save_dir` at the next step boundary after a signal, on all ranks, then leave.

    engine        a DeepSpeedEngine or PipelineEngine, with or without sections of ours; every rank calls this
    save_dir      folder for DeepSpeed's checkpoint `global_step<N>` and its `latest`, the same on all ranks; ~ and
                  variables of the environment are put in
    signals       names of the signals that ask for it; a handler that a program had installed before is called too
    client_state  called on every rank at the save; gives what `save_checkpoint` takes under that name
    leave         raise SystemExit(128 + signal) after the save; False: train on

    Returns an object whose `disarm()` undoes it. Raises CheckpointError where this engine or this folder is armed
    already, outside the main thread (Python handles signals nowhere else), and for a variable that is not set.
    """
    global _armed_so_far
    check_can_arm(save_dir)
    folder = _expanded(save_dir)
    if any(other.engine is engine or other.save_dir == folder for other in _armed):
        raise CheckpointError(
            f"checkpoint_on_signal: this engine, or another engine with the folder {folder}, is armed already.\n"
            "  Two engines would overwrite each other's checkpoint: give each a folder of its own."
        )
    _armed_so_far += 1
    return SignalCheckpoint(engine, folder, signals, client_state, leave, name=str(_armed_so_far))


def check_can_arm(save_dir: str | os.PathLike[str]) -> None:
    """Raise CheckpointError if this folder cannot be named, or this thread cannot handle signals."""
    _expanded(save_dir)
    if threading.current_thread() is not threading.main_thread():
        raise CheckpointError(
            "checkpoint_on_signal: Python handles signals in its main thread only, and this is another one.\n"
            "  Make the engine in the main thread, or leave checkpoint_on_signal out."
        )


def _expanded(save_dir: str | os.PathLike[str]) -> str:
    text = os.path.expanduser(os.path.expandvars(os.fspath(save_dir)))  # noqa: PTH111 - after the variables
    if "$" in text or not text:
        raise CheckpointError(
            f"checkpoint_on_signal: {os.fspath(save_dir)!r} names a variable that is not set here.\n"
            "  Set it on every rank, or write the folder itself."
        )
    return str(Path(text).absolute())


def disarm(engine: Any) -> None:
    """An engine that is destroyed saves no more; nothing where it was not armed."""
    for armed in [each for each in _armed if each.engine is engine]:
        armed.disarm()


class SignalCheckpoint:
    """One engine that saves on a signal."""

    def __init__(
        self,
        engine: Any,
        save_dir: str,
        signals: Sequence[str],
        client_state: Callable[[], dict[str, Any]] | None,
        leave: bool,
        name: str,
    ):
        self._engine = weakref.ref(engine)
        self.save_dir = save_dir
        self.signals = [int(signal.Signals[each]) for each in signals]
        self.client_state = client_state
        self.leave = leave
        self.saved = False
        self.received = 0
        try:
            self._agreement = agreed_step(name, lambda: int(self.engine.global_steps))
        except RuntimeError as error:
            raise CheckpointError(f"checkpoint_on_signal: the ranks cannot agree on a step: {error}.") from error
        # A pipeline steps inside train_batch, all others in step().
        self._method = "train_batch" if hasattr(type(engine), "train_batch") else "step"
        original = getattr(engine, self._method)
        setattr(engine, self._method, functools.partial(_step, original, self._engine, self))
        _armed.append(self)
        _set_handlers()
        weakref.finalize(engine, self.disarm)

    @property
    def engine(self) -> Any:
        return self._engine()

    def disarm(self) -> None:
        """Give the engine its method back, and the process its handlers where no other engine needs them."""
        if self not in _armed:
            return
        _armed.remove(self)
        if self.engine is not None:
            setattr(self.engine, self._method, self.engine.__dict__[self._method].args[0])
        if self._agreement is not None:
            self._agreement.close()
        _set_handlers()

    def receive(self, number: int) -> None:
        """Called by the signal handler: two assignments, nothing that could wait."""
        if not self.saved or not self.leave:
            self.received = self.received or number
            if self._agreement is not None:
                self._agreement.ask(str(number))

    def at_boundary(self) -> None:
        """After every optimizer step: train on, or save and leave."""
        step, number, agreed = int(self.engine.global_steps), self.received, True
        if self._agreement is not None:
            verdict = self._agreement.at(step)
            if verdict is None:
                return
            number = int(verdict.word) if verdict.word.isdigit() else number or int(signal.SIGTERM)
            agreed = verdict.step is not None
        elif not number:
            return
        self.received = 0
        name = signal.Signals(number).name
        if agreed:
            self._save(step, name)
        else:
            print_rank_0(
                f"ds_fp8: {name} after step {step}: not all ranks answered within {PATIENCE_S:.0f} s, nothing is saved."
                " A rank died or hangs, or checkpoint_on_signal is missing there."
            )
        if self.leave and all(other.saved for other in _armed if agreed):
            raise SystemExit(128 + number)

    def _save(self, step: int, name: str) -> None:
        from deepspeed import comm as dist

        print_rank_0(f"ds_fp8: {name}: saving step {step} to {self.save_dir}")
        self.engine.save_checkpoint(self.save_dir, client_state=self.client_state() if self.client_state else {})
        if dist.is_initialized():
            dist.barrier()  # nobody leaves, and takes the launcher along, before `latest` names it
        self.saved = True
        print_rank_0(f"ds_fp8: {name}: saved step {step}" + ("; leaving" if self.leave else ""))


def _step(original: Callable, engine: weakref.ref, armed: SignalCheckpoint, *args: Any, **kwargs: Any) -> Any:
    """The engine's step or train_batch; an accumulation step that updates nothing is no boundary."""
    stepping: Any = engine()
    before = stepping.global_steps
    result = original(*args, **kwargs)
    if stepping.global_steps != before:
        armed.at_boundary()
    return result


def _set_handlers() -> None:
    """Exactly the signals of the armed engines are handled by us."""
    wanted = {number for armed in _armed for number in armed.signals}
    for number in wanted - _handlers_before.keys():
        _handlers_before[number] = signal.signal(number, _on_signal)
    for number in _handlers_before.keys() - wanted:
        before = _handlers_before.pop(number)
        # Whoever has put a handler in place of ours since keeps it.
        if signal.getsignal(number) is _on_signal:
            signal.signal(number, signal.SIG_DFL if before is None else before)


def _on_signal(number: int, frame: Any) -> None:
    for armed in _armed:
        if number in armed.signals:
            armed.receive(number)
            if armed.leave:
                # A scheduler may signal the data loader's workers as well; their death must not end the step.
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    before = _handlers_before.get(number)
    if callable(before):
        before(number, frame)


def _in_forked_child() -> None:
    """A data loader's worker has no engine. TERM ends it as ever; a USR1 meant for the ranks does not."""
    for number, before in _handlers_before.items():
        if signal.getsignal(number) is _on_signal:
            ignored = before in (None, signal.SIG_DFL) and number != signal.SIGTERM
            signal.signal(number, signal.SIG_IGN if ignored else before or signal.SIG_DFL)
    _armed.clear()
    _handlers_before.clear()


os.register_at_fork(after_in_child=_in_forked_child)
