"""What happens between steps: evaluation, empty batches, errors, threads, frozen layers, gradients of other things."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.engine.script_jobs import WIDTH, Mlp, data, loss_of, norm, script, take, train


@script()
def evaluation_of_every_kind(make: Any, rank: int) -> Any:
    """In eval mode and in train mode, under no_grad and in inference mode, and with gradients that nobody asks for."""
    engine = make()
    found = train(engine, range(2))
    for training in (True, False):
        engine.train(training)
        for context in (torch.no_grad, torch.inference_mode, contextlib.nullcontext):
            with context():
                found.append(loss_of(engine, data(engine, 9)).item())
    engine.train()
    return found + train(engine, range(2, 4))


@script()
def trained_in_eval_mode(make: Any, rank: int) -> Any:
    """`from_pretrained` without `train()`: FP8 from the second step on, except without gradients; then train mode
    after all.
    """
    import ds_fp8.engine

    engine = make()
    engine.eval()
    found = train(engine, range(3))
    attachment = ds_fp8.engine.of(engine)
    fp8_state = None if attachment is None else attachment.fp8_state
    before = None if fp8_state is None else (fp8_state.pending.clone(), fp8_state.scales.clone())
    with torch.no_grad():
        found.append(loss_of(engine, data(engine, 9)).item())
    if fp8_state is not None:
        assert fp8_state.trains_in_eval
        assert not fp8_state.pending.any() and not before[0].any(), "evaluation leaves no amax"
        assert not fp8_state.keeps_history or (fp8_state.scales != 1).all(), "training leaves some"
    found += train(engine, range(3, 5))
    engine.train()
    found += train(engine, range(5, 6))
    assert fp8_state is None or not fp8_state.trains_in_eval
    return found


@script()
def ranks_in_different_modes(make: Any, rank: int) -> Any:
    """One rank evaluates where the other one's forward could be of training, and trains in eval mode; what they gather
    in ZeRO 3 is the same all the same.
    """
    engine = make()
    found = train(engine, range(2))
    for step in range(2, 5):
        engine.train(rank != step % 2)
        with torch.no_grad():
            found.append(loss_of(engine, data(engine, 9)).item())
        with torch.no_grad() if step == 2 else contextlib.nullcontext():
            found.append(loss_of(engine, data(engine, 9)).item())
        found += train(engine, range(step, step + 1))
    engine.train()
    return found + train(engine, range(5, 6))


@script(not_in=(3,))
def rank_0_alone(make: Any, rank: int) -> Any:
    engine = make()
    found = train(engine, range(2))
    if rank == 0:
        engine.eval()
        with torch.no_grad():
            engine.module(data(engine, 9))
        engine.train()
        engine.module(data(engine, 9) * 3)
    torch.distributed.barrier()
    return found + train(engine, range(2, 4))


@script()
def batches_without_tokens(make: Any, rank: int) -> Any:
    """No row at all, on all ranks and on one; a ragged last micro-batch."""
    engine = make(gas=2)
    found = train(engine, range(2))
    for step, rows in enumerate((0, 16, 5 if rank else 0, 16, 3, 16)):
        x = data(engine, step, rows)
        found.append(take(engine, (engine(x) - x).float().pow(2).sum() / 1024))
    return found


@script(not_in=(3,))
def errors_that_are_caught(make: Any, rank: int) -> Any:
    """An exception and a Ctrl-C in the middle of a forward and of a backward; the script goes on with the next
    batch.
    """
    engine = make()
    found = train(engine, range(2))

    def stop(error: type) -> Callable[..., Any]:
        def hook(*args: Any) -> None:
            raise error

        return hook

    for error in (ValueError, KeyboardInterrupt):
        handle = engine.module.dec.register_forward_pre_hook(stop(error))
        with contextlib.suppress(error):
            engine(data(engine, 3))
        handle.remove()
        output = engine.module(data(engine, 3))
        output.register_hook(stop(error))
        with contextlib.suppress(error):
            torch.autograd.grad(output.sum(), engine.module.enc.bias)
    return found + train(engine, range(2, 5))


@script(not_in=(3,))
def threads(make: Any, rank: int) -> Any:
    """Evaluation in two threads at once, and a step in another thread."""
    engine, found = make(), {}

    def evaluate(number: int) -> None:
        with torch.no_grad():
            found[number] = norm(engine.module(data(engine, number)))

    losses = train(engine, range(2))
    several = [threading.Thread(target=evaluate, args=(number,)) for number in range(2)]
    for thread in several:
        thread.start()
    for thread in several:
        thread.join()
    thread = threading.Thread(target=lambda: losses.extend(train(engine, range(2, 4))))
    thread.start()
    thread.join()
    return losses, found[0], found[1]


@script()
def frozen_and_unfrozen(make: Any, rank: int) -> Any:
    model = Mlp()
    engine = make(model)
    found = train(engine, range(2))
    model.enc.requires_grad_(False)
    found += train(engine, range(2, 4))
    model.enc.requires_grad_(True)
    return found + train(engine, range(4, 6))


@script(not_in=(3,))
def modules_that_come_later(make: Any, rank: int) -> Any:
    """A module added, a layer replaced, a weight tied after `initialize`."""
    model = Mlp()
    engine = make(model)
    found = train(engine, range(2))
    extra = nn.Linear(WIDTH, WIDTH).to(engine.device, torch.bfloat16)
    with torch.no_grad():
        for param in extra.parameters():
            param.copy_(torch.randn(param.shape, generator=torch.Generator().manual_seed(4)) / 8)
    model.extra = extra
    engine.module.register_forward_hook(lambda module, args, output: module.extra(output))
    found += train(engine, range(2, 4))
    model.dec.weight = model.enc.weight
    found += train(engine, range(4, 6))
    model.mid = copy.deepcopy(extra)
    return found + train(engine, range(6, 8))


@script()
def autocast_inside(make: Any, rank: int) -> Any:
    """Inside the model; around it DeepSpeed turns it off on a GPU."""

    class Autocast(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast(x.device.type, dtype=torch.bfloat16):
                return super().forward(x.float())

    return train(make(Autocast()), range(3))


@script()
def gradients_of_inputs(make: Any, rank: int) -> Any:
    """Adversarial examples: `autograd.grad` with respect to the input, then a step on what it made."""
    engine, found = make(), []
    for step in range(3):
        x = data(engine, step).requires_grad_()
        if engine.zero_optimization_stage() < 3:
            gradient = torch.autograd.grad(loss_of(engine.module, x), x)[0]
            found.append(norm(gradient))
            x = (x + 0.1 * gradient.sign()).detach()
        found.append(take(engine, loss_of(engine, x)))
    return found


@script(not_in=(3,))
def gradients_of_weights(make: Any, rank: int) -> Any:
    engine = make()
    found = train(engine, range(2))
    loss = loss_of(engine.module, data(engine, 5))
    gradients = torch.autograd.grad(loss, list(engine.module.parameters()))
    total = torch.nn.utils.get_total_norm(gradients).item()
    return found, total, train(engine, range(2, 4))


@script()
def another_default_dtype(make: Any, rank: int) -> Any:
    """In the middle of a run; and around all of it, as scripts do that make their model in bf16."""
    engine = make()
    found = train(engine, range(2))
    try:
        torch.set_default_dtype(torch.float64)
        found += train(engine, range(2, 4))
        torch.set_default_dtype(torch.bfloat16)
        found += train(make(), range(2))
    finally:
        torch.set_default_dtype(torch.float32)
    return found


@script()
def another_default_device(make: Any, rank: int) -> Any:
    """In the middle of a run: tensors that the script makes by itself are elsewhere, and hold nothing."""
    engine = make()
    found = train(engine, range(2))
    batches = [data(engine, step) for step in range(2, 4)]
    with torch.device("meta"):
        for x in batches:
            found.append(take(engine, loss_of(engine, x)))
    return found


@script(not_in=(3,))
def moved_to_where_it_is(make: Any, rank: int) -> Any:
    """Also under another name of the same device, for which torch copies on a CPU (`Trainer`'s bf16_full_eval)."""
    engine = make()
    found = train(engine, range(2))
    engine.module.to(engine.device).to(torch.bfloat16)
    engine.module.to(torch.device(engine.device.type, torch.device(engine.device).index or 0))
    found.append(loss_of(engine, data(engine, 9)).item())
    return found + train(engine, range(2, 5))
