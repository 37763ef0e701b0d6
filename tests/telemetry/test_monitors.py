"""DeepSpeed's monitor: TensorBoard, W&B (offline) and CSV get the same aggregates, those that stand in the log."""

from __future__ import annotations

import csv
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds_fp8.telemetry import read_jsonl_log

pytestmark = [pytest.mark.dist, pytest.mark.slow]

JOB = """
import json, sys
import torch
import deepspeed

config = json.load(open(sys.argv[1]))
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
engine, *_ = deepspeed.initialize(model=model, config=config)
for step in range(4):
    loss = engine(torch.randn(16, 64, dtype=torch.bfloat16)).float().square().mean()
    engine.backward(loss)
    engine.step()
"""


def of_tensorboard(folder: Path) -> dict[str, float]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (file,) = folder.rglob("events.out.tfevents.*")
    events = accumulator.EventAccumulator(str(file))
    events.Reload()
    return {name: events.Scalars(name)[-1].value for name in events.Tags()["scalars"] if "/ds_fp8/" in name}


def wandb_records(data: bytes) -> Iterator[bytes]:
    """Records of a .wandb file: LevelDB's log, i.e. blocks of 32 KiB with pieces of (crc 4, length 2, kind 1), after
    7 bytes.
    """
    at, record = 7, b""
    while at + 7 <= len(data):
        length, kind = struct.unpack_from("<HB", data, at + 4)
        if 32768 - at % 32768 < 7 or kind == 0:
            at += 32768 - at % 32768  # the rest of a block that holds no more piece
            continue
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or last
            yield record
            record = b""


def of_wandb(folder: Path) -> dict[str, float]:
    """The last value of each name, out of the file that an offline run leaves."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.rglob("*.wandb")
    values: dict[str, float] = {}
    for data in wandb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        for item in record.history.item:
            name = item.key or "/".join(item.nested_key)
            if "/ds_fp8/" in name:
                values[name] = json.loads(item.value_json)
    return values


def of_csv(folder: Path) -> dict[str, float]:
    files = folder.rglob("Train_Samples_ds_fp8_*.csv")
    return {file.stem: float(list(csv.reader(file.read_text().splitlines()))[-1][1]) for file in files}


def test_every_writer_gets_the_aggregates_of_the_log(tmp_path):
    """Two steps in four are looked at; the last one is compared, name by name."""
    pytest.importorskip("tensorboard", reason="needs tensorboard, the extra test")
    pytest.importorskip("wandb", reason="needs wandb, the extra test")
    config = {
        "train_batch_size": 16,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "fp8": {"enabled": True, "telemetry": {"enabled": True, "interval": 2, "path": str(tmp_path / "log")}},
        "tensorboard": {"enabled": True, "output_path": str(tmp_path / "tensorboard"), "job_name": "job"},
        "csv_monitor": {"enabled": True, "output_path": str(tmp_path / "csv"), "job_name": "job"},
        "wandb": {"enabled": True, "project": "test"},
    }
    (tmp_path / "ds.json").write_text(json.dumps(config))
    (tmp_path / "job.py").write_text(JOB)
    env = {**os.environ, "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    env |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29761"}
    env |= {"DS_ACCELERATOR": "cpu"}
    command = [sys.executable, str(tmp_path / "job.py"), str(tmp_path / "ds.json")]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [event for event in read_jsonl_log(tmp_path / "log" / "telemetry_rank0.jsonl") if event["event"] == "step"]
    assert [step["step"] for step in steps] == [2, 4]
    expected = {f"Train/Samples/ds_fp8/{name}": value for name, value in steps[-1]["values"].items()}
    assert "Train/Samples/ds_fp8/grad_output/underflow_share" in expected and "Train/Samples/ds_fp8/alarms" in expected
    assert not any("wire" in name for name in expected), "one rank sends nothing, and no zero is written down"
    assert of_tensorboard(tmp_path / "tensorboard") == pytest.approx(expected, rel=1e-6)
    assert of_wandb(tmp_path) == pytest.approx(expected, rel=1e-6)
    in_files = {name.replace("/", "_"): value for name, value in expected.items()}
    assert of_csv(tmp_path / "csv") == pytest.approx(in_files, rel=1e-6)
