"""Weights copied, averaged, perturbed, loaded and replaced between steps."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
from typing import Any

import torch

from tests.engine.script_jobs import data, loss_of, norm, script, train


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


@script(not_in=(3,), writes=True)
def weights_enlarged(make: Any, rank: int) -> Any:
    """A weight many times as large, in place and by new memory, between two steps; in training mode."""
    engine = make()
    found, dec = train(engine, range(2)), engine.module.dec.weight
    for _ in range(2):
        dec.data.mul_(16)
        found.append(norm(engine.module(data(engine, 9))))
        with torch.no_grad():
            found.append(norm(engine.module(data(engine, 9))))
        dec.data = dec.data / 64
        found.append(norm(engine.module(data(engine, 9))))
        dec.data = dec.data * 4
    return found + train(engine, range(2, 3))


@script()
def weights_enlarged_together(make: Any, rank: int) -> Any:
    """The same by DeepSpeed's own means, which reach masters and, with the next step, the FP8 data of O3."""
    import deepspeed

    engine = make()
    found, dec = train(engine, range(2)), engine.module.dec
    with deepspeed.zero.GatheredParameters([dec.weight], modifier_rank=0), torch.no_grad():
        dec.weight.mul_(16)
    with torch.no_grad():
        found.append(norm(engine(data(engine, 9))))
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


@script()
def saved_and_converted(make: Any, rank: int) -> Any:
    """`zero_to_fp32` on a checkpoint of the middle of a run; the run goes on."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    engine = make()
    found = train(engine, range(2))
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        torch.distributed.broadcast_object_list(folder, 0)
        engine.save_checkpoint(folder[0])
        torch.distributed.barrier()
        if engine.zero_optimization_stage():
            state = get_fp32_state_dict_from_zero_checkpoint(folder[0])
            found += [norm(state["mid.weight"]), norm(state["dec.bias"])]
        torch.distributed.barrier()
    return found + train(engine, range(2, 4))


@script()
def back_to_the_start(make: Any, rank: int) -> Any:
    """A checkpoint from before the first step, loaded after three: the same losses again."""
    engine = make()
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        torch.distributed.broadcast_object_list(folder, 0)
        engine.save_checkpoint(folder[0])
        found = train(engine, range(3))
        engine.load_checkpoint(folder[0])
        torch.distributed.barrier()
    return found + train(engine, range(3))
