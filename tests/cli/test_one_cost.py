"""`explain` and `estimate` say the same bytes of the same job, in every stage, level, base, world size and
placement.
"""

from __future__ import annotations

import itertools
import json

import pytest

from ds_fp8.cli.estimate import DEEPSPEED, Job, cost
from ds_fp8.cli.main import main
from ds_fp8.cost.memory import Placement

MODEL = """
from torch import nn

def build():
    model = nn.Sequential()
    model.add_module("frozen", nn.Embedding(96, 256))
    model.add_module("body", nn.Linear(256, 256))
    model.add_module("norm", nn.LayerNorm(256))
    model.add_module("adapted", nn.Linear(256, 256, bias=False))
    model.add_module("lm_head", nn.Linear(256, 50))
    model.frozen.weight.requires_grad_(False)
    model.adapted.weight.requires_grad_(False)
    return model
"""
"""Every kind of parameter: of an FP8 layer, trained and frozen, and of others, trained and frozen."""

SECTIONS = {
    "AMP": {},
    "fp8": {"fp8": {"enabled": True}},
    "fp8 + cache": {"fp8": {"enabled": True, "weight_cache": True}},
    "fp8 alone": {"fp8": {"enabled": True, "frozen_weights": "fp8"}},
    "O1": {"msamp": {"enabled": True, "opt_level": "O1"}},
    "O2": {"msamp": {"enabled": True, "opt_level": "O2"}},
    "O2 + cache": {"fp8": {"enabled": True, "weight_cache": True}, "msamp": {"enabled": True, "opt_level": "O2"}},
    "O2 Lion": {"msamp": {"enabled": True, "opt_level": "O2"}, "optimizer": {"type": "Lion", "params": {"lr": 1e-4}}},
    "AMP Lion": {"optimizer": {"type": "Lion", "params": {"lr": 1e-4}}},
    "O2 e4m3": {"msamp": {"enabled": True, "opt_level": "O2", "exp_avg_sq": "e4m3", "gradient_wire": "e5m2"}},
    "O3": {"msamp": {"enabled": True, "opt_level": "O3"}},
    "O3 exclude": {"msamp": {"enabled": True, "opt_level": "O3", "weight_wire_exclude": ["body"]}},
}
OFFLOADS = ((), ("offload_optimizer",), ("offload_optimizer", "offload_param"))
PLACES = [(stage, offload) for stage in range(4) for offload in OFFLOADS if len(offload) <= (0, 1, 1, 2)[stage]]


def row_of(name: str, answer: dict) -> str:
    """The row of `estimate` that shows this job: one of the levels, or the file's own."""
    own = [row for row in answer["levels"] if row.endswith("as in the file")]
    return own[0] if own else name.split(maxsplit=1)[0]


@pytest.mark.parametrize("base", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", SECTIONS)
def test_explain_and_estimate_agree(name, base, tmp_path, monkeypatch, capsys):
    """Device and host, by what the bytes hold, and what is sent: 1 or 4 micro-batches, 1, 2 and 8 ranks, CPU and
    H100.
    """
    (tmp_path / "one_cost_model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    compared = 0
    for number, ((stage, offload), world_size) in enumerate(itertools.product(PLACES, (1, 2, 8))):
        gas, device = ((1, "cpu"), (4, "cpu"), (1, "h100"), (4, "h100"))[number % 4]
        data = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": gas,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
            "zero_optimization": {"stage": stage, **{key: {"device": "cpu"} for key in offload}},
            **({base: {"enabled": True}} if base != "fp32" else {}),
            **SECTIONS[name],
        }
        (tmp_path / "ds.json").write_text(json.dumps(data))
        arguments = ["ds.json", "--model", "one_cost_model:build", "--device", device, "--world-size", str(world_size)]
        code = main(["explain", *arguments, "--json"])
        text = capsys.readouterr().out
        if code == 1:  # refused by the plan, e.g. O3 in stage 0
            continue
        explained = json.loads(text)["estimate"]
        assert main(["estimate", *arguments, "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        estimated = answer["levels"][row_of(name, answer)][stage]
        found = {
            "stage": stage,
            "resident_bytes": sum(explained["device"].values()),
            "host_bytes": sum(explained["host"].values()),
            **{f"{part}_bytes": size for part, size in explained["device"].items()},
            "sent_gradient_bytes": explained["gradient_wire_bytes"],
            "sent_weight_bytes": explained["weight_wire_bytes"],
        }
        assert estimated == pytest.approx(found, abs=0.51), (stage, offload, gas, world_size, device)
        compared += 1
    assert compared >= 9, f"only {compared} jobs were not refused"


def test_frozen_parameters_cost_their_weight_alone(tmp_path, monkeypatch, capsys):
    """A LoRA job of 99 % frozen parameters needs about 2 bytes per parameter in bf16, not 16."""
    (tmp_path / "lora_model.py").write_text(
        "from torch import nn\n\ndef build():\n    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 5))\n"
        "    model[0].requires_grad_(False)\n    return model\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["estimate", "--model", "lora_model:build", "--world-size", "1", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    frozen, trained = 512 * 513, 5 * 513
    assert answer["levels"]["AMP"][2]["resident_bytes"] == 2 * frozen + 16 * trained


@pytest.mark.parametrize("world_size", [1, 2, 8, 64])
def test_deepspeeds_own_estimators_differ_by_what_is_explained(world_size):
    """docs/memory.md: theirs have the fp32 gradients that live inside the step alone, 4/W (in ZeRO 3 in place of the
    16-bit ones, 2/W more), and in ZeRO 3 the largest layer; an offloaded job's are the same, but for their factor on
    the host.
    """
    stage_1_and_2 = pytest.importorskip("deepspeed.runtime.zero.stage_1_and_2")
    stage3 = pytest.importorskip("deepspeed.runtime.zero.stage3")
    params, largest, one_node = 6_400_000, 64_000, {"num_gpus_per_node": world_size, "additional_buffer_factor": 1.0}

    def ours(stage, **offload):
        return cost("AMP", DEEPSPEED, stage, Job(params, Placement(stage, world_size, **offload)))

    _, theirs = stage_1_and_2.estimate_zero2_model_states_mem_needs(params, cpu_offload=False, **one_node)
    assert theirs == pytest.approx(ours(2).device.total + 4 * params / world_size)
    host, theirs = stage_1_and_2.estimate_zero2_model_states_mem_needs(params, cpu_offload=True, **one_node)
    offloaded = ours(2, offload_optimizer=True)
    assert theirs == offloaded.device.total
    assert host == pytest.approx(max(offloaded.host.total * world_size, 4 * params * world_size))

    zero3 = stage3.estimate_zero3_model_states_mem_needs
    _, theirs, _ = zero3(params, largest, cpu_offload=False, cpu_offload_params=False, **one_node)
    assert theirs == pytest.approx(ours(3).device.total + 2 * params / world_size + 4 * largest)
    host, theirs, _ = zero3(params, largest, cpu_offload=True, cpu_offload_params=True, **one_node)
    offloaded = ours(3, offload_optimizer=True, offload_param=True)
    assert theirs == offloaded.device.total + 4 * largest
    assert host == pytest.approx(offloaded.host.total * world_size)
