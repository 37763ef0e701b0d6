"""LoRA with its frozen base in FP8 in ZeRO 3, beside ZeRO 2 and beside a 16-bit base; called on real ranks."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch

from tests.engine.engine_jobs import config, full_weights, make_engine
from tests.layers.test_conv1d import gpt2
from tests.layers.test_experts import mixture
from tests.zero.model_jobs import llama, lora, steps, tokens

BASE = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"

STACKS = ("Mixtral", "GptOss", "GPT2")
"""Weights [experts, out, in], [experts, in, out] and Conv1D's [in, out]."""


def settings(stage: int, kept: str, recipe: str, gas: int = 1, level: str | None = None, **zero: Any) -> dict[str, Any]:
    sections: dict[str, Any] = {"fp8": {"enabled": True, "recipe": recipe, "frozen_weights": kept}}
    if level:
        sections["msamp"] = {"enabled": True, "opt_level": level}
    made = config(stage, gas=gas, **sections)
    made["zero_optimization"].update(zero)
    return made


def engine_of(made: dict[str, Any], model: Any = None, *, checkpoints: bool = False, thawed: bool = False) -> Any:
    model = lora() if model is None else model
    if checkpoints:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if thawed:  # a part of the base is trained: at O3 its weights are cast in every step
        model.base_model.model.model.layers[1].mlp.requires_grad_(True)
    return make_engine(made, model)


def frozen_of(engine: Any) -> Any:
    import ds_fp8.engine

    return ds_fp8.engine.of(engine).frozen


def memory(engine: Any) -> dict[str, int]:
    """Bytes of frozen partitions on this rank: as quantized values, and otherwise; weights that are gathered now."""
    from ds_fp8.zero.weights_released import is_released

    chunks = getattr(frozen_of(engine), "chunks", {})
    messages = {one.message.untyped_storage()._cdata: one.message.numel() for one in chunks.values()}
    plain, gathered = 0, 0
    for parameter in engine.module.parameters():
        share = parameter.ds_tensor
        gathered += parameter.ds_status.name == "AVAILABLE" and not parameter.ds_persist
        if not parameter.requires_grad and id(parameter) not in chunks:
            plain += share.numel() * share.element_size()
        assert is_released(share) == (id(parameter) in chunks)
    return {"chunks": len(chunks), "quantized": sum(messages.values()), "plain": plain, "gathered": gathered}


def bits(engine: Any) -> dict[str, torch.Tensor]:
    return {name: value.bfloat16() for name, value in full_weights(engine).items()}


def train(rank: int, made: dict[str, Any], **more: Any) -> dict[str, Any]:
    engine = engine_of(made, **more)
    found = {"losses": steps(engine, rank, 0, 4), "memory": memory(engine), "weights": bits(engine)}
    engine.destroy()
    return found


def resume(rank: int, made: dict[str, Any], folder: str) -> dict[str, Any]:
    """A checkpoint in the middle, files of all kinds, a script that writes, the end of the engine."""
    import deepspeed
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    from ds_fp8.errors import WeightError

    made["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    engine = engine_of(made)
    steps(engine, rank, 0, 3)
    engine.module.eval()
    with torch.no_grad():
        evaluated = engine.module(input_ids=tokens(rank, 99)).logits.float()
    engine.module.train()
    engine.save_checkpoint(folder)
    engine.save_16bit_model(folder, "whole.bin")
    found: dict[str, Any] = {"evaluated": evaluated, "after": steps(engine, rank, 3, 6), "weights": bits(engine)}
    again = engine_of(made)
    again.load_checkpoint(folder)
    found |= {"resumed": steps(again, rank, 3, 6), "memory": memory(again)}
    found["fp32"] = get_fp32_state_dict_from_zero_checkpoint(folder)[BASE].clone()
    found["whole"] = torch.load(f"{folder}/whole.bin", weights_only=True)[BASE].clone()

    layer = again.module.get_submodule(BASE.removesuffix(".weight"))
    refused = []

    def write(module: Any, *_: Any) -> None:
        try:
            module.weight.data.mul_(2)
        except WeightError as error:
            refused.append(str(error))

    handle = layer.register_forward_pre_hook(write)
    steps(again, rank, 6, 7)
    handle.remove()
    found["refused"] = refused[0]
    with deepspeed.zero.GatheredParameters(list(again.module.parameters()), modifier_rank=0):
        if rank == 0:
            layer.weight.data.fill_(0.5)
    found["written"] = {"memory": memory(again), "weights": bits(again), "losses": steps(again, rank, 7, 9)}
    again.destroy()

    engine.module.eval()
    with torch.no_grad():
        found["adapted"] = engine.module(input_ids=tokens(rank, 99)).logits.float()
    model = engine.module
    engine.destroy()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        merged = model.merge_and_unload()
        with torch.no_grad():
            found["merged"] = merged(input_ids=tokens(rank, 99)).logits.float()
    found["classes"] = sorted({type(module).__name__ for module in merged.modules() if hasattr(module, "weight")})
    return found


def reference(rank: int, kept: str) -> dict[str, Any]:
    """A frozen model without an optimizer, as a preference loss asks it."""
    made = settings(3, kept, "block")
    del made["optimizer"]
    model = lora().requires_grad_(False)
    engine = make_engine(made, model, model_parameters=None)
    engine.module.eval()
    with torch.no_grad():
        logits = [engine(input_ids=tokens(rank, number)).logits.float() for number in range(3)]
    return {"logits": logits, "memory": memory(engine) if kept == "fp8" else None}


def everything(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    import deepspeed

    import ds_fp8

    ds_fp8.activate()
    said = io.StringIO()
    block, current = (lambda kept, **more: settings(3, kept, "block", **more)), settings(3, "fp8", "current")
    with contextlib.redirect_stdout(said):
        found: dict[str, Any] = {
            "block": train(rank, block("fp8")),
            "block, 16 bits": train(rank, block("high_precision")),
            "block, stage 2": {"losses": steps(engine := engine_of(settings(2, "fp8", "block")), rank, 0, 4)},
            "current": train(rank, current),
            "current, stage 2": {"weights": bits(engine_of(settings(2, "fp8", "current")))},
            "checkpoints": train(rank, current, checkpoints=True),
            "on the host": train(rank, settings(3, "fp8", "current", offload_param={"device": "cpu"})),
            "in parts": train(rank, settings(3, "fp8", "current", gas=2)),
            "in parts, 16 bits": train(rank, settings(3, "high_precision", "current", gas=2)),
            "O2": train(rank, settings(3, "fp8", "current", level="O2"), thawed=True),
            "O3": train(rank, settings(3, "fp8", "current", level="O3"), thawed=True),
        }
        with deepspeed.zero.Init(config_dict_or_path=current):  # as from_pretrained does
            base = llama()
        model = lora(base)
        with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
            if rank == 0:
                model.load_state_dict(lora().state_dict())
        found["zero.Init"] = train(rank, current, model=model)
        found["files"] = resume(rank, settings(3, "fp8", "delayed"), folder)
        found["reference"] = reference(rank, "fp8")
        found["reference, 16 bits"] = reference(rank, "high_precision")
        for name in STACKS:
            found[name] = {stage: stacks(rank, stage, name) for stage in (2, 3)}
    del engine
    found["said"] = said.getvalue()
    return found


def lora_by_level(rank: int, world_size: int) -> dict[str, Any]:
    """Nothing of the base is trained."""
    import ds_fp8

    ds_fp8.activate()
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        found = {level: train(rank, settings(3, "fp8", "current", level=level)) for level in ("O2", "O3")}
        engine = engine_of(settings(2, "fp8", "current", level="O3"))
        found["O3, stage 2"] = {"losses": steps(engine, rank, 0, 4)}
    return {**found, "said": said.getvalue()}


def stacks(rank: int, stage: int, name: str) -> dict[str, Any]:
    """A frozen mixture or GPT-2, whose norms and embeddings are trained."""
    made = settings(stage, "fp8", "current")
    model = (gpt2() if name == "GPT2" else mixture(name)).bfloat16()
    for fqn, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in fqn for part in ("norm", "ln_", "embed", "wte")))
    engine = make_engine(made, model)
    found = {"losses": steps(engine, rank, 0, 3), "weights": bits(engine)}
    found["frozen"] = [fqn for fqn in found["weights"] if ("experts." in fqn or ".c_" in fqn) and "bias" not in fqn]
    if stage == 3:
        chunks = frozen_of(engine).chunks
        found["kept"] = [id(model.get_parameter(fqn)) in chunks for fqn in found["frozen"]]
    engine.destroy()
    return found
