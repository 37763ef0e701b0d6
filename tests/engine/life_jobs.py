"""Models that outlive their engine: destroyed, forgotten, copied, shared. Jobs for `test_life.py`, on real ranks."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tests.engine.engine_jobs import WIDTH, Net, batch, config, full_weights, make_engine, steps

SECTIONS: dict[str, dict[str, Any]] = {
    "unmodified": {},
    "fp8": {"fp8": {"enabled": True}},
    "compiled": {"fp8": {"enabled": True, "compile": True}},
    "current": {"fp8": {"enabled": True, "recipe": "current"}},
    "block": {"fp8": {"enabled": True, "recipe": "block"}},
    "O1": {"fp8": {"enabled": True}, "msamp": {"enabled": True, "opt_level": "O1"}},
    "O2": {"fp8": {"enabled": True}, "msamp": {"enabled": True, "opt_level": "O2"}},
    "O3": {"fp8": {"enabled": True}, "msamp": {"enabled": True, "opt_level": "O3"}},
}


def sections(mode: str, stage: int, offload: bool = False, **more: Any) -> dict[str, Any]:
    settings = config(stage, **SECTIONS[mode], **more)
    if offload:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if stage == 3:
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 100
    return settings


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        yield said


def marks(model: nn.Module) -> dict[str, Any]:
    """What a swap could leave behind: classes, attributes, hooks; without numbers of DeepSpeed's own."""
    found = {}
    for name, module in model.named_modules():
        hooks = [
            getattr(hook, "__module__", "?")
            for hooks in (module._forward_pre_hooks, module._forward_hooks, module._state_dict_pre_hooks)
            for hook in hooks.values()
        ]
        ours = [key for key in vars(module) if key.startswith("_ds_fp8") or key == "layer_state"]
        found[name] = (type(module).__module__.split(".")[0], ours, [hook for hook in hooks if "ds_fp8" in str(hook)])
    return found


def is_clean(model: nn.Module) -> bool:
    return all(package != "ds_fp8" and not ours and not hooks for package, ours, hooks in marks(model).values())


def readable(model: nn.Module) -> bool:
    """Every weight has memory of its own size and finite values, where ZeRO 3 has not cut it."""
    return all(
        parameter.untyped_storage().nbytes() > 2 and bool(parameter.isfinite().all())
        for parameter in model.parameters()
        if parameter.numel()
    )


def fresh(weights: dict[str, torch.Tensor], dtype: torch.dtype = torch.bfloat16) -> Net:
    model = Net()
    model.load_state_dict(weights)
    return model.to(dtype)


def continued(model: nn.Module, mode: str, stage: int, rank: int, count: int = 3) -> list[float]:
    """Losses of a new engine on `model`."""
    settings = sections(mode, stage)
    with quiet():
        engine = make_engine(settings, model)
    losses = steps(engine, settings, rank, 50, 50 + count)
    engine.destroy()
    return losses


def ended(rank: int, world_size: int, mode: str, stage: int, offload: bool, ending: str, after: str) -> dict[str, Any]:
    """Train, end the engine by `destroy` or `drop`, train on in an engine of mode `after`; beside it a fresh model."""
    settings = sections(mode, stage, offload)
    with quiet() as said:
        engine = make_engine(settings)
        steps(engine, settings, rank, 0, 3)
        weights = full_weights(engine)
        model, found = engine.module, {}
        if ending == "destroy":
            engine.destroy()
            found = {"clean": is_clean(model), "readable": readable(model), "same": same_weights(model, weights)}
            found["dtypes"] = {str(parameter.dtype) for parameter in model.parameters()}
        del engine
        found["losses"] = continued(model, after, stage, rank)
        found["fresh"] = continued(fresh(weights), after, stage, rank)
        found["clean_at_last"] = is_clean(model)
    found["said"] = said.getvalue()
    return found


def same_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=None):
        return all(torch.equal(value.float(), weights[name]) for name, value in model.named_parameters())


def chain(rank: int, world_size: int, stage: int, modes: list[str], destroys: bool) -> list[dict[str, Any]]:
    """One model through engines of several recipes and levels; for each, what a fresh model with its weights does."""
    with quiet():
        engine = make_engine(sections(modes[0], stage))
        steps(engine, sections(modes[0], stage), rank, 0, 2)
        found = []
        for number, mode in enumerate(modes[1:]):
            weights, model = full_weights(engine), engine.module
            if destroys:
                engine.destroy()
            settings = sections(mode, stage)
            engine = make_engine(settings, model)
            losses = steps(engine, settings, rank, 10 + number, 12 + number)
            beside = make_engine(settings, fresh(weights))
            expected = steps(beside, settings, rank, 10 + number, 12 + number)
            beside.destroy()
            found.append({"losses": losses, "expected": expected, "kinds": kinds(model)})
        engine.destroy()
    return [*found, {"clean": is_clean(model)}]


def kinds(model: nn.Module) -> list[str]:
    return sorted({type(module).__name__ for module in model.modules()})


def copied(rank: int, world_size: int, mode: str, stage: int, after: str) -> dict[str, Any]:
    """A deepcopy of `engine.module` in a second engine, while the first one goes on; and the copy alone."""
    settings = sections(mode, stage)
    with quiet():
        alone = make_engine(settings)
        steps(alone, settings, rank, 0, 2)
        undisturbed = steps(alone, settings, rank, 2, 4)

        engine = make_engine(settings)
        steps(engine, settings, rank, 0, 2)
        weights = full_weights(engine)
        copied_model = copy.deepcopy(engine.module)
        lonely = copy.deepcopy(engine.module.blocks[0])
        read = engine.module.blocks[1]
        if stage == 0:  # elsewhere DeepSpeed hangs its optimizer on the parameters, which no pickle takes
            read = pickle.loads(pickle.dumps(read))
        x = torch.randn(16, WIDTH, dtype=torch.bfloat16)
        found = {"alone": bool(lonely(x).isfinite().all()), "read": torch.equal(read(x), engine.module.blocks[1](x))}
        lonely(x).float().sum().backward()
        found["losses"] = continued(copied_model, after, stage, rank)
        found["fresh"] = continued(fresh(weights), after, stage, rank)
        found["first"] = steps(engine, settings, rank, 2, 4)
    return {**found, "undisturbed": undisturbed, "clean": is_clean(copied_model), "kinds": kinds(engine.module)}


class Headed(nn.Module):
    """A trunk, which others may hold too, and a head."""

    def __init__(self, trunk: nn.Module):
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.trunk:
            x = block(x)
        return self.head(x).float().pow(2).mean()


def actor_and_critic(rank: int, world_size: int, modes: tuple[str, str], lrs: tuple[float, float]) -> dict[str, Any]:
    """Two engines that share a trunk, stepped in turns; then the first is destroyed and the second goes on."""
    torch.manual_seed(0)
    trunk = Net().blocks
    actor, critic = Headed(trunk), Headed(trunk)
    engines, settings = [], []
    with quiet() as said:
        for model, mode, lr in zip((actor, critic), modes, lrs):
            settings.append(sections(mode, 0))
            settings[-1]["optimizer"]["params"]["lr"] = lr
            engines.append(make_engine(settings[-1], model))
        losses: list[list[float]] = [[], []]
        compiled: list[set[bool]] = [set(), set()]
        for step in range(4):
            for number, engine in enumerate(engines):
                losses[number] += steps(engine, settings[number], rank, step, step + 1)
                compiled[number] |= {block._compiled_call_impl is not None for block in trunk}
        swapped = kinds(trunk)
        scales = [engine_scales(engine) for engine in engines]
        engines[0].destroy()
        left = kinds(trunk)
        losses[1] += steps(engines[1], settings[1], rank, 9, 10)
        compiled[1] |= {block._compiled_call_impl is not None for block in trunk}
        engines[1].destroy()
        compiled.append({block._compiled_call_impl is not None for block in trunk})
    return {
        "losses": losses,
        "compiled": [sorted(found) for found in compiled],
        "swapped": swapped,
        "left": left,
        "clean": is_clean(actor) and is_clean(critic),
        "scales": scales,
        "said": said.getvalue(),
    }


def teacher_and_student(rank: int, world_size: int, mode: str) -> Any:
    """A student in ZeRO 2 distils from a teacher that shares its trunk, in an engine without optimizer; or the
    refusal.
    """
    from ds_fp8.errors import PlanError

    torch.manual_seed(0)
    trunk = Net().blocks
    student, teacher = Headed(trunk), Headed(trunk)
    settings, frozen = sections(mode, 2), sections("unmodified" if mode == "unmodified" else "fp8", 0)
    del frozen["optimizer"]
    with quiet():
        engine = make_engine(settings, student)
        try:
            judge = make_engine(frozen, teacher, model_parameters=None)
        except PlanError as error:
            engine.destroy()
            return str(error)
        losses = []
        for step in range(4):
            x = batch(rank, step).bfloat16()
            with torch.no_grad():
                wanted = judge(x)
            loss = (engine(x) - wanted).pow(2) + engine(x)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        engine.destroy()
        judge.destroy()
    return {"losses": losses, "clean": is_clean(student) and is_clean(teacher)}


def engine_scales(engine: Any) -> Any:
    import ds_fp8.engine

    attachment = ds_fp8.engine.of(engine)
    return None if attachment is None else attachment.fp8_state.state_dict()["scales"]


def strangers(rank: int, world_size: int, stage: int) -> dict[str, Any]:
    """Two engines of different recipes over different models, in turns: each as if it were alone."""
    alone, together = {}, {}
    modes = ("fp8", "block") if stage == 0 else ("O3", "O2")
    with quiet():
        for mode in modes:
            settings = sections(mode, stage)
            alone[mode] = steps(make_engine(settings), settings, rank, 0, 4)
        engines = {mode: make_engine(sections(mode, stage)) for mode in modes}
        for step in range(4):
            for mode, engine in engines.items():
                together.setdefault(mode, []).extend(steps(engine, sections(mode, stage), rank, step, step + 1))
    return {"alone": alone, "together": together}


class Unreadable(list):
    """A data set whose length nobody can tell."""

    def __len__(self) -> int:
        raise OSError("nonsense")

    def __bool__(self) -> bool:
        return True


def interrupt(optimizer: Any) -> Any:
    """A scheduler at whose making somebody presses Ctrl-C."""
    raise KeyboardInterrupt("nonsense")


def refused(rank: int, world_size: int, mode: str, stage: int, by: str = "optimizer") -> dict[str, Any]:
    """An `initialize` that ends by an error when layers are swapped already; then a right one, on the same model.

    by  whose error: the optimizer's in the JSON, the data set's before it, the scheduler's after it
    """
    settings, given = sections(mode, stage), {}
    if by == "optimizer":
        settings["optimizer"]["params"]["nonsense"] = 1
    elif by == "data":
        given["training_data"] = Unreadable()
    else:
        given["lr_scheduler"] = interrupt
    torch.manual_seed(0)  # on every rank, for DeepSpeed broadcasts rank 0's weights
    model, found = Net(), {}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    handle = model.head.register_forward_hook(lambda module, args, output: output)
    with quiet():
        try:
            make_engine(settings, model, **given)
        except BaseException as error:  # noqa: BLE001  DeepSpeed's own, ours, or Ctrl-C
            found["error"] = f"{type(error).__name__}: {error}"
        hooks = [hook for each in model.modules() for hook in (*each._forward_hooks, *each._forward_pre_hooks)]
        found["clean"] = is_clean(model) and hooks == [handle.id]
        rounded = fresh(weights, model.head.weight.dtype)
        found["same"] = same_weights(model, {name: value.float() for name, value in rounded.named_parameters()})
        if not hasattr(model.head.weight, "ds_id"):  # ZeRO 3 has cut the parameters: no model computes alone
            found["same"] &= readable(model)
            found["same"] &= bool(model(batch(rank, 0).to(model.head.weight.dtype)).isfinite())
        found["losses"], found["fresh"] = (
            continued(each, mode, stage, rank) for each in (model, fresh(weights, model.head.weight.dtype))
        )
    return found


def interrupted(rank: int, world_size: int, stage: int) -> dict[str, Any]:
    """`destroy()` in the `finally` of an exception that rank 0 alone meets: the other rank must not be needed."""
    settings = sections("O3", stage)
    with quiet():
        engine = make_engine(settings)
        steps(engine, settings, rank, 0, 2)
        if rank == 0:
            with contextlib.suppress(ZeroDivisionError):
                try:
                    raise ZeroDivisionError
                finally:
                    engine.destroy()
    return {"finite": True}


def make_subclass(by: str, settings: dict[str, Any], model: nn.Module) -> Any:
    """An engine of a subclass whose own constructor fails when DeepSpeedEngine's has done its work.

    by  "pipeline": a JSON that PipelineEngine refuses; "hybrid": a container that cannot be made; "own": a script's
        class, defined after the plugin was activated
    """
    import deepspeed
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.config import DeepSpeedConfig

    if by == "pipeline":
        settings["pipeline"] = {"pipe_partitioned": "nonsense"}
        layers = [*model.blocks, model.head]
        model = PipelineModule(layers, num_stages=1, loss_fn=lambda output, label: output.float().pow(2).mean())
        return make_engine(settings, model)
    if by == "hybrid":
        settings["hybrid_engine"] = {"enabled": True}
        create = deepspeed.DeepSpeedHybridEngine.create_inference_module
        deepspeed.DeepSpeedHybridEngine.create_inference_module = interrupt
        try:
            return make_engine(settings, model)
        finally:
            deepspeed.DeepSpeedHybridEngine.create_inference_module = create

    class Own(deepspeed.DeepSpeedEngine):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            interrupt(self)

    return Own(
        None, model, model_parameters=model.parameters(), config=settings, config_class=DeepSpeedConfig(settings)
    )


def refused_by_subclass(rank: int, world_size: int, mode: str, stage: int, by: str) -> dict[str, Any]:
    """As `refused`, where the base class' constructor has succeeded."""
    torch.manual_seed(0)
    model, found = Net(), {}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with quiet():
        try:
            make_subclass(by, sections(mode, stage), model)
        except BaseException as error:  # noqa: BLE001
            found["error"] = f"{type(error).__name__}: {error}"
        found["clean"] = is_clean(model) and not any(
            hooks for each in model.modules() for hooks in (each._forward_hooks, each._forward_pre_hooks)
        )
        found["losses"], found["fresh"] = (
            continued(each, mode, stage, rank) for each in (model, fresh(weights, model.head.weight.dtype))
        )
    return found


def several(rank: int, world_size: int, calls: list[tuple[str, tuple[Any, ...]]]) -> list[Any]:
    import ds_fp8

    ds_fp8.activate()
    return [globals()[name](rank, world_size, *arguments) for name, arguments in calls]
