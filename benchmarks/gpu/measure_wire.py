"""FP8 on the wire between tensors on a GPU: two ranks on one device over gloo, and NCCL as far as one device lets it.

functions   sums to owners, all-reduce and gathered shares over gloo with tensors on the device, each equal to the bit
            to the same call with tensors on the CPU
training    a small GPT in ZeRO-2 on two ranks: O2 and O3 give the same losses to the bit
NCCL        two ranks on one device, if the library allows that; else one rank that sends bytes to itself
casts       what the device spends on a message: encode, sum at the owner, decode, beside a copy
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from ledger import Ledger, main

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
NUMEL = 1_000_003 if CUDA else 100_003
FP8 = {"enabled": True, "recipe": "delayed", "backend": "torch"}


def _rank(rank: int, world_size: int, port: int, backend: str, what: str, out: str) -> None:
    shared = torch.cuda.device_count() < world_size
    os.environ.update(RANK=str(rank), LOCAL_RANK="0" if shared else str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    if shared:
        os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
    elif CUDA:
        torch.cuda.set_device(rank)
    import deepspeed

    import ds_fp8

    ds_fp8.activate()
    if not CUDA:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    works = {"functions": functions, "training": training, "bytes": bytes_by_nccl}
    if what == "exchange":
        from measure_nccl import exchange

        works[what] = exchange
    result = works[what](rank, world_size)
    Path(out, str(rank)).write_text(json.dumps(result))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def on_ranks(world_size: int, backend: str, what: str) -> list[Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as out:
        mp.spawn(_rank, (world_size, port, backend, what, out), nprocs=world_size)
        return [json.loads(Path(out, str(rank)).read_text()) for rank in range(world_size)]


def functions(rank: int, world_size: int) -> dict[str, bool]:
    """Each function with tensors here and on the CPU: the same bits?"""
    from ds_fp8.comm import Wire, all_reduce, reduce_slices
    from ds_fp8.comm.gather import all_gather_shares
    from ds_fp8.comm.reduce import owner_bounds

    wire, average = Wire.named("e4m3", None), 1 / world_size
    gradient = torch.randn(NUMEL, generator=torch.Generator().manual_seed(rank)).bfloat16()
    bounds = owner_bounds(NUMEL, world_size)

    def gathered(x: torch.Tensor, bounds: list[int]) -> torch.Tensor:
        store = torch.zeros_like(x)
        store[bounds[rank] : bounds[rank + 1]] = x[bounds[rank] : bounds[rank + 1]]
        all_gather_shares(store, bounds, None)
        return store

    quantized = gradient.view(torch.int16).to(torch.uint8)
    calls = {
        "reduce_slices": lambda d: reduce_slices(
            gradient.to(d).tensor_split(bounds[1:-1]), None, wire=wire, average=average
        ),
        "all_reduce": lambda d: all_reduce(gradient.to(d), None, wire=wire, average=average),
        "gather, uneven": lambda d: gathered(quantized.to(d), list(bounds)),
        "gather, even": lambda d: gathered(quantized[: NUMEL // 2 * 2].to(d), [0, NUMEL // 2, NUMEL // 2 * 2]),
    }
    if world_size != 2:
        calls.pop("gather, even")
    return {name: torch.equal(call(DEVICE).cpu(), call("cpu")) for name, call in calls.items()}


def training(rank: int, world_size: int) -> dict[str, list[float]]:
    """Last losses of bf16, O2 and O3 in ZeRO-2."""
    import deepspeed
    from gpt_job import config_of
    from gpt_model import GPT

    sections: dict[str, dict[str, Any]] = {"bf16": {}}
    for level in ("O2", "O3"):
        sections[level] = {"fp8": FP8, "msamp": {"enabled": True, "opt_level": level}}
    losses: dict[str, list[float]] = {}
    for name, extra in sections.items():
        torch.manual_seed(0)
        with torch.device(DEVICE):
            model = GPT(2, 256, 512, 64).bfloat16()
        config = config_of({"micro_batch": 2, "gas": 1, "stage": 2, "sections": extra})
        engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
        generator = torch.Generator(DEVICE).manual_seed(1 + rank)
        for _ in range(8 if CUDA else 3):
            loss = engine(torch.randint(0, 512, (2, 64), device=DEVICE, generator=generator))
            engine.backward(loss)
            engine.step()
            losses.setdefault(name, []).append(float(loss.detach()))
        engine.destroy()
    return losses


def bytes_by_nccl(rank: int, world_size: int) -> dict[str, bool]:
    """What our wire and gather ask of a backend: all_to_all, all-gather and broadcast of bytes, MAX of fp32."""
    from deepspeed import comm as dist

    sent = torch.arange(world_size * 1024, device=DEVICE).to(torch.uint8) + rank
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, async_op=True).wait()
    found = {"all_to_all of bytes": bool((got.view(world_size, -1)[rank] == sent.view(world_size, -1)[rank]).all())}
    everything = torch.empty(world_size * 1024, dtype=torch.uint8, device=DEVICE)
    dist.all_gather_into_tensor(everything, sent[:1024].contiguous())
    found["all-gather of bytes"] = bool((everything.view(world_size, -1)[rank] == sent[:1024]).all())
    shared = sent.clone()
    dist.broadcast(shared, 0, async_op=True).wait()
    found["broadcast of bytes"] = bool((shared == sent - rank).all())
    amax = torch.tensor([float(rank), float("inf")], device=DEVICE)
    dist.all_reduce(amax, op=dist.ReduceOp.MAX)
    found["MAX keeps inf"] = amax.tolist() == [world_size - 1.0, float("inf")]
    return found


def casts(numel: int = 2**28) -> list[dict[str, Any]]:
    """Milliseconds of each kernel of the wire for `numel` bf16 gradients, and its share of the copy bandwidth."""
    from timing import alternate, copy_bytes_per_ms, free

    from ds_fp8 import kernels
    from ds_fp8.formats import E4M3

    ceiling = copy_bytes_per_ms(2**28)
    free()
    x = torch.randn(numel, device=DEVICE).bfloat16()
    quantized, scale_inv = kernels.flat_encode(x, E4M3)
    out = quantized.clone(), scale_inv.clone()
    arrived, total = (quantized.view(1, -1), scale_inv.view(1, -1)), torch.empty(numel, device=DEVICE)
    works = {
        "encode": (3, lambda: kernels.flat_encode(x, E4M3, out=out)),
        "encode, better of two scales": (3, lambda: kernels.flat_encode(x, E4M3, best_of_two=True, out=out)),
        "sum of own and one other": (7, lambda: kernels.flat_sum(*arrived, E4M3, factor=0.5, own=x, out=total)),
        "sum, encoded": (
            4,
            lambda: kernels.flat_sum_encode(*arrived, E4M3, factor=0.5, own=x, best_of_two=True, out=out),
        ),
        "decode": (3, lambda: kernels.flat_decode(quantized, scale_inv, E4M3, out=x)),
    }
    found = alternate({name: work for name, (_, work) in works.items()})
    return [
        {"kernel": name, **found[name], "of copy bandwidth": round(size * numel / found[name]["ms"] / ceiling, 3)}
        for name, (size, _) in works.items()
    ]


def body(ledger: Ledger) -> None:
    if CUDA:
        ledger.attempt("casts of 256M elements", casts)
    ledger.attempt("two ranks on one device over gloo: equal to the CPU", lambda: on_ranks(2, "gloo", "functions"))

    def train_two() -> dict[str, Any]:
        ranks = on_ranks(2, "gloo", "training")
        equal = all(one["O2"] == one["O3"] for one in ranks)
        return {
            "O3 = O2 to the bit": equal,
            "last losses of rank 0": {name: found[-1] for name, found in ranks[0].items()},
        }

    ledger.attempt("two ranks on one device over gloo: ZeRO-2", train_two, needs_s=30)
    if not CUDA:
        ledger.problem("NCCL", "no CUDA device")
        return
    if ledger.attempt("two ranks on one device over NCCL", lambda: on_ranks(2, "nccl", "bytes"), needs_s=30):
        ledger.attempt("the same: equal to the CPU", lambda: on_ranks(2, "cpu:gloo,cuda:nccl", "functions"), needs_s=30)
    ledger.attempt("one rank over NCCL", lambda: on_ranks(1, "nccl", "bytes"), needs_s=15)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main("wire", body, needs_cuda=False)
