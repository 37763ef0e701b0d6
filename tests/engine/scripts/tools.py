"""What torch offers around a model: whole models in files, casts, hooks, wrappers, saved tensors, parameter groups."""

from __future__ import annotations

import contextlib
import copy
import io
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.engine.script_jobs import Mlp, data, loss_of, norm, script, take, train


@script(not_in=(3,))
def whole_models_copied(make: Any, rank: int) -> Any:
    """A copy, a copy in fp32 for export, and what `torch.save` makes of a copy (DeepSpeed's hooks keep it from the
    model itself), on one rank alone.
    """
    engine, found = make(), []
    found += train(engine, range(2))
    if rank == 0:
        copied, file = copy.deepcopy(engine.module), io.BytesIO()
        for hooks in (copied._forward_pre_hooks, copied._forward_hooks):
            for key, hook in list(hooks.items()):
                if "DeepSpeed" in getattr(hook, "__qualname__", ""):
                    del hooks[key]
        torch.save(copied, file)
        file.seek(0)
        for model in (copied, torch.load(file, weights_only=False), copy.deepcopy(engine.module).float()):
            x = data(engine, 9)
            model.eval()
            with torch.no_grad():
                found.append(norm(model(x.to(next(model.parameters()).dtype))))
            model.train()
            loss = (model(x.to(next(model.parameters()).dtype)) - 1).float().pow(2).mean()
            loss.backward()
            found += [loss.item(), norm(model.mid.weight.grad)]
    return found, train(engine, range(2, 4))


@script(not_in=(3,))
def wrapped_in_torchs_own(make: Any, rank: int) -> Any:
    """DataParallel and DistributedDataParallel around `engine.module`, to evaluate and for a gradient."""
    engine, found = make(), []
    found += train(engine, range(2))
    distributed = nn.parallel.DistributedDataParallel(engine.module, broadcast_buffers=False)
    for wrapper in (nn.DataParallel(engine.module), distributed):
        with torch.no_grad():
            found.append(norm(wrapper(data(engine, 9))))
    return found, train(engine, range(2, 4))


@script()
def losses_scaled_by_hand(make: Any, rank: int) -> Any:
    """As a GradScaler does: times 1024; `module.zero_grad()` in between, which is not where DeepSpeed keeps them."""
    engine, found = make(), []
    for step in range(3):
        loss = loss_of(engine, data(engine, step))
        engine.backward(loss * 1024)
        engine.step()
        engine.module.zero_grad()
        found.append(loss.item())
    return found


@script(not_in=(3,))
def hooks_where_gradients_arrive(make: Any, rank: int) -> Any:
    """`register_post_accumulate_grad_hook`, and saved tensors that go to the host and back."""
    engine, found, seen = make(), [], []
    handle = engine.module.mid.weight.register_post_accumulate_grad_hook(lambda param: seen.append(param.shape))
    for step in range(2):
        with torch.autograd.graph.save_on_cpu():
            loss = loss_of(engine, data(engine, step))
        found.append(take(engine, loss))
    handle.remove()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        loss = loss_of(engine, data(engine, 2))
    return found, take(engine, loss), bool(seen), train(engine, range(3, 4))


@script()
def checkpointed_with_dropout(make: Any, rank: int) -> Any:
    """Both kinds of `checkpoint`, with a generator that is forked, and an autocast around."""

    class Checkpointed(Mlp):
        reentrant = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(7)
                x = x.requires_grad_() if self.reentrant else x
                hidden = checkpoint(self.part, x, use_reentrant=self.reentrant)
            return self.dec(hidden)

        def part(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(self.mid(torch.relu(self.enc(x))), 1e-9, self.training)

    model = Checkpointed()
    engine = make(model)
    found = train(engine, range(2))
    if engine.zero_optimization_stage() < 3:
        model.reentrant = True
    found += train(engine, range(2, 4))
    with torch.autocast(engine.device.type, dtype=torch.bfloat16):
        found += train(engine, range(4, 5))
    return found


@script(not_in=(3,))
def parametrized_and_pruned_in_mid_run(make: Any, rank: int) -> Any:
    """`register_parametrization` and `prune` on layers that are FP8 layers already."""
    from torch.nn.utils import parametrize, prune

    class Halved(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * 0.5

    engine = make()
    found, model = train(engine, range(2)), engine.module
    parametrize.register_parametrization(model.mid, "weight", Halved())
    found.append(norm(model(data(engine, 9))))
    found += train(engine, range(2, 4))
    parametrize.remove_parametrizations(model.mid, "weight", leave_parametrized=False)
    found.append(norm(model(data(engine, 9))))
    prune.l1_unstructured(model.dec, "weight", amount=0.5)
    with torch.no_grad():
        found.append(norm(model(data(engine, 9))))
    return found


@script(not_in=(3,))
def two_engines_against_each_other(make: Any, rank: int) -> Any:
    """As a GAN: the critic's gradients are turned off while the other one learns through it."""
    generator, critic = make(Mlp()), make(Mlp())
    found = []
    for step in range(4):
        x = data(generator, step)
        critic.module.requires_grad_(True)
        loss = (critic(generator.module(x).detach()).float() - 1).pow(2).mean() + critic(x).float().pow(2).mean()
        found.append(take(critic, loss))
        critic.module.requires_grad_(False)
        found.append(take(generator, critic.module(generator(x)).float().pow(2).mean()))
    return found


@script()
def groups_edited_in_mid_run(make: Any, rank: int) -> Any:
    """A learning rate by hand, weight decay, betas."""
    engine, found = make(), []
    for step in range(4):
        for group in engine.optimizer.param_groups:
            group["lr"], group["weight_decay"] = 1e-2 / (step + 1), 0.1 * step
        found += train(engine, range(step, step + 1))
    return found


@script(not_in=(3,))
def a_graph_used_twice(make: Any, rank: int) -> Any:
    """`retain_graph`: two losses of one forward, each with a backward of its own."""
    engine, found = make(gas=2), []
    for step in range(3):
        x = data(engine, step)
        output = engine(x)
        losses = (output - x).float().pow(2).mean(), output.float().abs().mean()
        for loss in losses:
            engine.backward(loss, retain_graph=loss is losses[0])
            engine.step()
            found.append(loss.item())
    return found


@script(not_in=(3,))
def threads_that_train(make: Any, rank: int) -> Any:
    """Two forwards with gradients at the same time, one backward of their sum."""
    engine, found = make(), []
    for step in range(3):
        losses: dict[int, torch.Tensor] = {}

        def forward(number: int, step: int = step, losses: dict[int, torch.Tensor] = losses) -> None:
            losses[number] = loss_of(engine.module, data(engine, 2 * step + number))

        several = [threading.Thread(target=forward, args=(number,)) for number in range(2)]
        for thread in several:
            thread.start()
        for thread in several:
            thread.join()
        found += [losses[0].item(), losses[1].item()]
        loss = losses[0] + losses[1] + 0 * engine(data(engine, step)).sum()
        take(engine, loss)
    return found


@script(not_in=(2, 3))
def without_sync(make: Any, rank: int) -> Any:
    """`engine.no_sync()`, which DeepSpeed has for stages 0 and 1."""
    engine, found = make(gas=2), []
    for step in range(3):
        with engine.no_sync() if hasattr(engine, "no_sync") else contextlib.nullcontext():
            loss = loss_of(engine, data(engine, 2 * step))
            engine.backward(loss)
            found.append(loss.item())
        engine.step()
        found.append(take(engine, loss_of(engine, data(engine, 2 * step + 1))))
    return found


@script(not_in=(3,))
def shared_memory(make: Any, rank: int) -> Any:
    """`module.share_memory()`, as for workers that read the weights."""
    engine = make()
    engine.module.share_memory()
    return train(engine, range(3))


@script(not_in=(3,))
def gradient_penalty(make: Any, rank: int) -> Any:
    """A second derivative: refused by the layer's name in training mode, right in eval mode."""
    engine, found = make(), []
    for step in range(3):
        x = data(engine, step)
        probe = x.clone().requires_grad_()
        if "Fp8" in type(engine.module.mid).__name__ or hasattr(engine.module.mid, "layer_state"):
            with pytest.raises(RuntimeError, match=r'fp8/layers/exclude \["dec"\]'):
                torch.autograd.grad(engine.module(probe).float().sum(), probe, create_graph=True)
        engine.eval()
        gradient = torch.autograd.grad(engine.module(probe).float().sum(), probe, create_graph=True)[0]
        penalty = (gradient.float().norm(dim=1) - 1).pow(2).mean()
        found += [norm(one) for one in torch.autograd.grad(penalty, list(engine.module.parameters()), allow_unused=True)
                  if one is not None]  # fmt: skip
        engine.train()
        found.append(take(engine, loss_of(engine, x)))
    return found
