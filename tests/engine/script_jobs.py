"""What scripts do besides forward, backward and step, one function each; they run under DeepSpeed alone and with our sections.

A script is `name(make, rank) -> numbers`: `make(model)` is `deepspeed.initialize` with the JSON of the case. On a CPU over
gloo, or on one GPU or several.
"""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

WIDTH = 64
SCRIPTS: dict[str, Callable[..., Any]] = {}
NOT_IN: dict[str, tuple[int, ...]] = {}
"""Stages in which DeepSpeed alone cannot do it."""

WRITES: set[str] = set()
"""Scripts that write to weights between steps: O3 in ZeRO 1 and 2 refuses them by name."""


def script(*, not_in: tuple[int, ...] = (), writes: bool = False) -> Callable[[Callable], Callable]:
    def add(function: Callable) -> Callable:
        SCRIPTS[function.__name__], NOT_IN[function.__name__] = function, not_in
        if writes:
            WRITES.add(function.__name__)
        return function

    return add


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc, self.mid, self.dec = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dec(F.gelu(self.mid(F.gelu(self.enc(x)))))


def config(stage: int, gas: int = 1, dtype: str = "bf16", **sections: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 16,
        "gradient_accumulation_steps": gas,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        dtype: {"enabled": True},
        **sections,
    }


def maker(stage: int, sections: dict[str, Any]) -> Callable[..., Any]:
    """`make(model, params)`: an engine; the model's weights are those of seed 1 in every mode."""

    def make(model: nn.Module | None = None, params: Iterable[Any] | None = None, gas: int = 1) -> Any:
        import deepspeed

        model = Mlp() if model is None else model
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for param in model.parameters():
                param.copy_(torch.randn(param.shape, generator=generator) * param.shape[-1] ** -0.5)
        params = list(model.parameters() if params is None else params)
        with contextlib.redirect_stdout(io.StringIO()):
            return deepspeed.initialize(model=model, model_parameters=params, config=config(stage, gas, **sections))[0]

    return make


def data(engine: Any, step: int, rows: int = 16) -> torch.Tensor:
    rank = torch.distributed.get_rank()
    x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(10 * step + rank))
    return x.to(engine.device, torch.bfloat16)


def loss_of(engine: Any, x: torch.Tensor) -> torch.Tensor:
    return (engine(x) - x.detach()).float().pow(2).mean()


def take(engine: Any, loss: torch.Tensor) -> float:
    engine.backward(loss)
    engine.step()
    return loss.item()


def train(engine: Any, steps: range) -> list[float]:
    return [take(engine, loss_of(engine, data(engine, step))) for step in steps]


def norm(x: torch.Tensor) -> float:
    return x.detach().float().norm().item()


# -- shapes of models --------------------------------------------------------------------------------------------------


@script()
def one_layer_used_many_times(make: Any, rank: int) -> Any:
    class Recurrent(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            state = torch.zeros_like(x)
            for _ in range(5):
                state = torch.tanh(self.enc(x) + self.mid(state))
            return self.dec(state)

    return train(make(Recurrent()), range(4))


@script()
def two_modules_share_a_layer(make: Any, rank: int) -> Any:
    model = Mlp()
    model.dec = model.enc
    return train(make(model), range(4))


@script()
def attention_and_its_fast_path(make: Any, rank: int) -> Any:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.TransformerEncoderLayer(WIDTH, 4, WIDTH, dropout=0.0, batch_first=True)
            self.pool = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
            self.out = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.block(x[None])
            return self.out(self.pool(hidden, hidden, hidden, need_weights=False)[0][0])

    engine = make(Attention())
    found = train(engine, range(3))
    engine.eval()
    with torch.no_grad():
        found.append(loss_of(engine, data(engine, 9)).item())
    with torch.inference_mode():
        found.append(loss_of(engine, data(engine, 9)).item())
    engine.train()
    return found + train(engine, range(3, 5))


@script()
def outputs_written_in_place(make: Any, rank: int) -> Any:
    class InPlace(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = F.relu(self.enc(x), inplace=True)
            hidden = F.dropout(self.mid(hidden), 0.0, self.training, inplace=True)
            hidden[:, :8] += 1
            hidden.mul_(0.5).masked_fill_(hidden > 3, 3)
            first, second = self.dec(hidden).chunk(2, dim=1)
            return torch.cat([first, second * 2], 1)

    return train(make(InPlace()), range(4))


@script(not_in=(3,))
def hooks_of_every_kind(make: Any, rank: int) -> Any:
    """Hooks of torch on layers, on weights, on outputs; a full backward hook that changes the gradient."""
    model, seen = Mlp(), []
    model.mid.register_forward_hook(lambda module, args, output: output * 2)
    model.enc.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    model.dec.register_full_backward_hook(lambda module, grad_input, grad_output: (grad_input[0] * 2,))
    engine = make(model)
    model.mid.weight.register_hook(lambda gradient: seen.append(norm(gradient)))
    return train(engine, range(4)), len(seen)


@script()
def patched_forward(make: Any, rank: int) -> Any:
    """Accelerate's `add_hook_to_module` puts another forward on the instance; a script does it by hand."""
    hooks = pytest.importorskip("accelerate.hooks")

    class Doubles(hooks.ModelHook):
        def post_forward(self, module: Any, output: torch.Tensor) -> torch.Tensor:
            return 2 * output

    model = Mlp()
    hooks.add_hook_to_module(model.mid, Doubles())
    engine = make(model)
    found = train(engine, range(2))
    hooks.remove_hook_from_module(model.mid)
    original = model.dec.forward
    model.dec.forward = lambda x: original(x) + x
    return found + train(engine, range(2, 4))


@script(not_in=(3,))
def parametrized_weights(make: Any, rank: int) -> Any:
    from torch.nn.utils import parametrizations

    model = Mlp()
    parametrizations.weight_norm(model.mid)
    parametrizations.weight_norm(model.dec, dim=1)
    return train(make(model), range(4))


@script()
def checkpointed_in_segments(make: Any, rank: int) -> Any:
    from torch.utils.checkpoint import checkpoint_sequential

    class Segments(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint_sequential([self.enc, self.mid, self.dec], 2, x, use_reentrant=False)

    return train(make(Segments()), range(4))


# -- the flow of a script ----------------------------------------------------------------------------------------------


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
    """An exception and a Ctrl-C in the middle of a forward and of a backward; the script goes on with the next batch."""
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
    engine, found = make(), []
    for step in range(3):
        x = data(engine, step).float().requires_grad_()
        with torch.autocast(engine.device.type, dtype=torch.bfloat16):
            loss = (engine(x) - x.detach()).float().pow(2).mean()
        found.append(take(engine, loss))
    return found


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
    engine = make()
    found = train(engine, range(2))
    torch.set_default_dtype(torch.float64)
    try:
        found += train(engine, range(2, 4))
    finally:
        torch.set_default_dtype(torch.float32)
    return found


@script(not_in=(3,))
def moved_to_where_it_is(make: Any, rank: int) -> Any:
    engine = make()
    found = train(engine, range(2))
    engine.module.to(engine.device).to(torch.bfloat16)
    return found + train(engine, range(2, 4))


# -- weights -----------------------------------------------------------------------------------------------------------


@script(not_in=(3,))
def copies_and_pickles(make: Any, rank: int) -> Any:
    """A copy and a pickle of the model in the middle of a run: they compute and train on their own."""
    engine = make()
    found = train(engine, range(2))
    copied = copy.deepcopy(engine.module)
    found.append(loss_of(copied, data(engine, 9)).item())
    file = io.BytesIO()
    torch.save({name: param.data for name, param in engine.module.named_parameters()}, file)
    file.seek(0)
    found.append(norm(torch.load(file)["mid.weight"]))
    found.append(norm(pickle.loads(pickle.dumps(engine.module.mid.weight.data))))
    optimizer = torch.optim.SGD(copied.parameters(), lr=0.1)
    for step in range(2):
        loss = loss_of(copied, data(engine, step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found + train(engine, range(2, 4))


@script(not_in=(3,))
def averages(make: Any, rank: int) -> Any:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    engine = make()
    average, found = AveragedModel(engine.module, multi_avg_fn=get_ema_multi_avg_fn(0.5)), []
    for step in range(3):
        found += train(engine, range(step, step + 1))
        average.update_parameters(engine.module)
    with torch.no_grad():
        found.append(loss_of(average, data(engine, 9)).item())
    return found, norm(average.module.mid.weight)


@script(not_in=(3,), writes=True)
def average_swapped_in_and_out(make: Any, rank: int) -> Any:
    """As timm, diffusers and torch_ema evaluate: store, copy_to, evaluate, restore."""
    engine = make()
    params = list(engine.module.parameters())
    shadow, found = [param.detach().clone().float() for param in params], []
    for step in range(3):
        found += train(engine, range(step, step + 1))
        with torch.no_grad():
            for one, param in zip(shadow, params):
                one.lerp_(param.float(), 0.5)
    stored = [param.data.clone() for param in params]
    for one, param in zip(shadow, params):
        param.data.copy_(one)
    engine.eval()
    with torch.no_grad():
        found.append(loss_of(engine, data(engine, 9)).item())
    engine.train()
    for one, param in zip(stored, params):
        param.data.copy_(one)
    return found + train(engine, range(3, 5))


@script(not_in=(3,), writes=True)
def sharpness_aware(make: Any, rank: int) -> Any:
    """SAM: a gradient, weights perturbed along it through `.data`, the gradient there, weights as before, the step."""
    engine, found = make(), []
    params = list(engine.module.parameters())
    for step in range(3):
        x = data(engine, step)
        loss = loss_of(engine.module, x)
        gradients = torch.autograd.grad(loss, params)
        total = torch.nn.utils.get_total_norm(gradients)
        stored = [param.data.clone() for param in params]
        for param, gradient in zip(params, gradients):
            param.data.add_(gradient * (0.05 / total))
        perturbed = loss_of(engine, x)
        engine.backward(perturbed)
        for param, one in zip(params, stored):
            param.data.copy_(one)
        engine.step()
        found += [loss.item(), perturbed.item()]
    return found


@script(not_in=(3,))
def state_dict_loaded(make: Any, rank: int) -> Any:
    engine = make()
    found = train(engine, range(2))
    state = {name: tensor.clone() * 0.5 for name, tensor in engine.module.state_dict().items()}
    engine.module.load_state_dict(state)
    found.append(norm(engine.module(data(engine, 9))))
    engine.module.load_state_dict(state, assign=True)
    found.append(norm(engine.module(data(engine, 9))))
    return found


@script(not_in=(3,))
def functional_call(make: Any, rank: int) -> Any:
    engine = make()
    found = train(engine, range(2))
    given = {name: param.detach() * 0.5 for name, param in engine.module.named_parameters()}
    for _ in range(2):
        output = torch.func.functional_call(engine.module, {n: p.clone() for n, p in given.items()}, (data(engine, 9),))
        found.append(norm(output))
    return found


def run(make: Any, name: str, rank: int) -> Any:
    """Numbers of one script, flat; or the error's type and text."""
    try:
        return list(_flat(SCRIPTS[name](make, rank)))
    except pytest.skip.Exception:
        return []
    except Exception as error:  # noqa: BLE001  judged by the caller
        return f"{type(error).__name__}: {error}"


def _flat(found: Any) -> Iterable[float]:
    if isinstance(found, (list, tuple)):
        for one in found:
            yield from _flat(one)
    else:
        yield float(found)


def several(rank: int, world_size: int, cases: list[tuple[str, int, str, dict[str, Any]]]) -> dict[Any, Any]:
    """Each case (script, stage, mode, sections) in turn."""
    import ds_fp8

    ds_fp8.activate()
    found = {}
    for name, stage, mode, sections in cases:
        found[name, stage, mode] = run(maker(stage, sections), name, rank)
        torch.distributed.barrier()
    return found
