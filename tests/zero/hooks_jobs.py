"""Models whose modules meet every branch of ZeRO 3's hooks, trained with our hooks and with DeepSpeed's."""

from __future__ import annotations

import sys
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import set_z3_leaf_modules
from torch import nn
from torch.utils.checkpoint import checkpoint

WIDTH = 32


class Pair(nn.Module):
    """Two outputs, one of them twice used, and a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(
        self, x: torch.Tensor, *, shift: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Any, dict[str, Any]]:
        left = self.left(x)
        return left if shift is None else left + shift, None, {"right": self.right(x)}


class Block(nn.Module):
    """Modules without parameters between those with; a weight that is read outside of its layer."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.norm, self.pair = nn.LayerNorm(WIDTH), Pair()
        self.act, self.down, self.reads = nn.GELU(), nn.Linear(WIDTH, WIDTH), reads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, _, others = self.pair(self.norm(x), shift=x)
        right = others["right"]
        if self.reads:
            right = right + nn.functional.linear(x, self.norm.weight.diag())
        return x + self.down(self.act(left * right))


class Model(nn.Module):
    def __init__(self, checkpoints: str = "", reads: bool = False, frozen: bool = False) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(48, WIDTH), nn.Linear(WIDTH, 48, bias=False)
        self.blocks, self.checkpoints = nn.ModuleList(Block(reads) for _ in range(3)), checkpoints
        if frozen:
            for block in self.blocks:
                block.pair.left.requires_grad_(requires_grad=False)
                block.norm.requires_grad_(requires_grad=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        for block in self.blocks:
            if self.checkpoints:
                x = checkpoint(block, x, use_reentrant=self.checkpoints == "reentrant")
            else:
                x = block(x)
        return self.head(x)


class Parallel(nn.Module):
    """A module without parameters that uses its input twice, beside another that uses it: as attention and MLP do in
    GPT-J."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.pair, self.down = nn.LayerNorm(WIDTH), Pair(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        left, _, others = self.pair(normed)
        return x + left * others["right"] + self.down(normed)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpoints": {"checkpoints": "non-reentrant"},
    "reentrant": {"checkpoints": "reentrant"},
    "frozen": {"checkpoints": "non-reentrant", "frozen": True},
    "frozen later": {"checkpoints": "non-reentrant"},
    "external": {"reads": True},
    "leaf": {},
    "parallel": {},
}


def settings(level: str | None, gas: int) -> dict[str, Any]:
    zero = {"stage": 3, "stage3_param_persistence_threshold": 40, "stage3_prefetch_bucket_size": 3000}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": gas,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {**zero, "stage3_max_live_parameters": 8000, "stage3_max_reuse_distance": 2000},
        "steps_per_print": 10**9,
        "fp8": {"enabled": True, "backend": "torch"},
        **({"msamp": {"enabled": True, "opt_level": level}} if level else {}),
    }


def start(case: str, level: str | None, gas: int = 1, **fp8: Any) -> Any:
    torch.manual_seed(0)
    model = Model(**CASES[case])
    if case == "parallel":
        model.blocks = nn.ModuleList(Parallel() for _ in range(3))
    if case == "leaf":
        set_z3_leaf_modules(model, [Pair])
    config = settings(level, gas)
    config["fp8"] |= fp8
    trained = [p for p in model.parameters() if p.requires_grad]
    return deepspeed.initialize(model=model, model_parameters=trained, config=config)[0]


def train_compiled_blocks() -> list[float]:
    """Dynamo traces some hooks, breaks at others, and gives up some after a few recompilations."""
    engine = start("plain", None)
    for block in engine.module.blocks:
        block.compile(backend="eager")
    losses = [step(engine, number) for number in range(3)]
    engine.destroy()
    return losses


def train_compiled_engine() -> tuple[list[float], str, list[str], tuple[int, int]]:
    """Losses, whose hooks there are, which functions of ours Dynamo has compiled; its graphs and breaks."""
    from torch._dynamo.convert_frame import input_codes
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    engine = start("plain", None)
    engine.compile(backend="eager")
    losses = [step(engine, number) for number in range(3)]
    codes = [found for reference in input_codes.seen if (found := reference()) is not None]
    traced = [code.co_name for code in codes if code.co_filename.endswith("hooks_stage3.py")]
    hooks = type(engine.optimizer.parameter_offload).__name__
    counted = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    engine.destroy()
    return losses, hooks, traced, counted


def switched_off() -> str:
    engine = start("plain", None, zero3_hooks="deepspeed")
    found = type(engine.optimizer.parameter_offload).__name__
    engine.destroy()
    return found


def step(engine: Any, number: int) -> float:
    for micro in range(engine.gradient_accumulation_steps()):
        generator = torch.Generator().manual_seed(100 * number + 10 * micro + dist.get_rank())
        tokens = torch.randint(0, 48, (2, 16), generator=generator)
        loss = nn.functional.cross_entropy(engine(tokens).float().flatten(0, 1), tokens.flatten())
        engine.backward(loss)
        engine.step()
    return loss.item()


def train(case: str, level: str | None, gas: int = 1, skips: bool = True) -> dict[str, Any]:
    """Losses of training and evaluation, the weights, and whether every parameter was let go.

    skips  false: modules without parameters have their nodes, as with DeepSpeed
    """
    engine = start(case, level, gas)
    if not skips and hasattr(engine.optimizer.parameter_offload, "fp8_skips"):
        engine.optimizer.parameter_offload.fp8_skips = False
    losses, rests = [], []
    for number in range(7):
        if case == "frozen later" and number == 2:
            for block in engine.module.blocks:
                block.pair.left.requires_grad_(requires_grad=False)
        losses.append(step(engine, number))
        if number == 2:  # as before generation, and after it
            offload = engine.optimizer.parameter_offload
            for handle in (*offload.forward_hooks, *offload.backward_hooks):
                handle.remove()
            offload.forward_hooks, offload.backward_hooks = [], []
            offload._register_deepspeed_module(offload.module)
        if number == 3:  # another order of modules than the trace's
            engine.eval()
            with torch.no_grad():
                losses.append(engine(torch.arange(16).view(2, 8)).float().sum().item())
            engine.train()
        rests.append(
            [name for name, p in engine.module.named_parameters()
             if not p.ds_persist and (p.ds_status is not ZeroParamStatus.NOT_AVAILABLE or p.ds_active_sub_modules)]
        )  # fmt: skip
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        weights = [p.detach().float().clone() for p in engine.module.parameters()]
    found = {"losses": losses, "kept": rests, "weights": weights}
    offload = engine.optimizer.parameter_offload
    found["hooks"] = type(offload).__name__
    found["skips"] = getattr(offload, "fp8_skips", None)
    engine.destroy()
    return found


def calls_in_a_step(case: str, level: str | None) -> dict[str, int]:
    """Calls in a step that follows the trace: of all functions, of this package's, of gathers, of decodings of
    released weights.
    """
    engine = start(case, level)
    for number in range(4):
        step(engine, number)
    counts = {"all": 0, "ours": 0, "gathers": 0, "decoded": 0}

    def count(frame: Any, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            counts["all"] += 1
            code = frame.f_code
            if event == "call":
                counts["ours"] += "/ds_fp8/" in code.co_filename
                counts["decoded"] += code.co_name == "values" and code.co_filename.endswith("weights_released.py")
                counts["gathers"] += (
                    code.co_name == "all_gather_into_tensor" and "deepspeed/comm/torch" in code.co_filename
                )

    sys.setprofile(count)
    step(engine, 4)
    sys.setprofile(None)
    engine.destroy()
    return counts


def without_our_hooks() -> None:
    from ds_fp8.zero import hooks_known

    hooks_known.is_known.cache_clear()
    hooks_known.KNOWN = frozenset()


def both(rank: int, world_size: int, cases: list[tuple[str, str | None, int]]) -> list[Any]:
    import ds_fp8

    ds_fp8.activate()
    ours = [train(*case) for case in cases]
    counted = [calls_in_a_step("checkpoints", level) for level in (None, "O3")]
    ours.append(train("parallel", None))
    switched, compiled = switched_off(), train_compiled_blocks()
    without_our_hooks()
    theirs = [train(*case) for case in cases]
    return [
        list(zip(cases, ours[:-1], theirs, strict=True)),
        counted,
        calls_in_a_step("checkpoints", None),
        switched,
        ours[-1],
        compiled,
    ]


def changed_in_mid_run(rank: int, world_size: int) -> dict[str, Any]:
    """A part that is frozen after two steps, and a compiled engine: with our hooks and with DeepSpeed's."""
    import ds_fp8

    ds_fp8.activate()
    ours = {level: train("frozen later", level) for level in (None, "O3")}
    compiled = train_compiled_engine()
    without_our_hooks()
    return {
        "ours": ours,
        "theirs": {level: train("frozen later", level) for level in (None, "O3")},
        "compiled": (compiled, train_compiled_engine()),
    }
