"""The examples of docs/extending.md, built as its reader would: a copy of the package, the page's blocks, and a job.

Nothing here knows what the blocks say, apart from the names by which the job asks for them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ds_fp8

pytestmark = pytest.mark.slow

PACKAGE = Path(ds_fp8.__file__).parent
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "extending.md"
BLOCK = re.compile(r'^```\w+ title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)

JOB = """
import json, logging, warnings

import torch
from torch import nn

warnings.simplefilter("ignore")
logging.basicConfig(format="%(message)s")
torch.manual_seed(0)

from ds_fp8 import config
from ds_fp8.layers import swap_layers
from ds_fp8.levels import LEVELS, STATE_BYTES
from ds_fp8.optim import ALGORITHMS, ScaledAdamW
from ds_fp8.plan import make_plan

base = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
found = {}

# A recipe: by JSON, refused at O3 with the reason in its entry, and a layer that casts with it.
settings = config.load({**base, "fp8": {"enabled": True, "recipe": "power"}})
model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 16)).bfloat16()
swap_layers(model, make_plan(model, settings))
x = torch.randn(8, 32).bfloat16().requires_grad_()
y = model(x)
y.float().square().sum().backward()
layer, scaling = model[0], model[0].layer_state.fp8_state.scaling
found["power of two"] = float(torch.log2(scaling.requantize_weight(layer.weight, None, settings.fp8.recipe.forward_format).scale_inv)).is_integer()
found["gradients"] = bool(x.grad.isfinite().all() and layer.weight.grad.abs().sum() > 0)
o3 = {**base, "fp8": {"enabled": True, "recipe": "power"}, "msamp": {"enabled": True, "opt_level": "O3"}}
found["refused"] = [problem.message for problem in config.check(o3)]

# A format: by JSON, its bytes, and a step that is close to fp32's.
settings = config.load({**base, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
                        "msamp": {"enabled": True, "opt_level": "O2", "exp_avg": "int16"}})
found["bytes"] = STATE_BYTES[settings.msamp.level.exp_avg]
pair = []
for level in (settings.msamp.level, LEVELS["O1"]):
    param = nn.Parameter(torch.linspace(-1, 1, 1000).bfloat16())
    optimizer = ScaledAdamW([param], lr=1e-2, level=level)
    for step in range(10):
        param.grad = torch.randn(1000, generator=torch.Generator().manual_seed(step)).bfloat16()
        optimizer.step()
    pair.append(optimizer.export_fp32(param)["exp_avg"])
found["int16 error"] = float((pair[0] - pair[1]).norm() / pair[1].norm())
found["refused int16"] = bool(config.check({**base, "msamp": {"enabled": True, "exp_avg_sq": "int16"}}))

# An algorithm: DeepSpeed's type is taken, and at O1 the step is torch's to the bit.
found["problems"] = [str(one) for one in config.check({**base, "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
                                                       "msamp": {"enabled": True, "opt_level": "O2"}}) if one.severity == "error"]
ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 1000)) for _ in range(2))
one, two = ALGORITHMS["sgd"]([ours], lr=0.1, level="O1"), torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
for step in range(5):
    ours.grad = theirs.grad = torch.randn(1000, generator=torch.Generator().manual_seed(step))
    one.step(), two.step()
found["sgd"] = torch.equal(ours, theirs)
small = nn.Parameter(torch.linspace(-1, 1, 1000).bfloat16())
coded = ALGORITHMS["sgd"]([small], lr=0.1, level="O2")
small.grad = torch.ones(1000).bfloat16()
coded.step()
again = nn.Parameter(small.detach().clone())
resumed = ALGORITHMS["sgd"]([again], lr=0.1, level="O2")
resumed.load_state_dict(coded.state_dict())
small.grad = again.grad = torch.ones(1000).bfloat16()
coded.step(), resumed.step()
found["sgd resumes"] = torch.equal(small, again)
found["states"] = sorted(str(key) for key in coded.state[small])
print("FOUND " + json.dumps(found))
"""


def place(tree: Path, title: str, block: str) -> None:
    """Put one block of the page where its title says."""
    name, _, where = title.partition(" in ")
    target = tree / name
    if not where:
        assert not target.exists(), f"{name} is there already; the page says that it is new"
        target.write_text(block)
        return
    text = target.read_text()
    if where.startswith("enum of "):
        text = _into_enum(text, where.removeprefix("enum of "), block.strip())
    else:
        lines = text.splitlines(keepends=True)
        (at,) = [number for number, line in enumerate(lines) if re.match(rf"{re.escape(where)}\b", line)][:1]
        text = "".join([*lines[: at + 1], block, *lines[at + 1 :]])
    target.write_text(text)


def _into_enum(text: str, key: str, value: str) -> str:
    start = text.index(f'"{key}": {{')
    at = text.index('"enum": [', start) + len('"enum": [')
    return f"{text[:at]}{value}, {text[at:]}"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the job printed that ran on the extended copy."""
    tree = tmp_path_factory.mktemp("extended")
    shutil.copytree(PACKAGE, tree / "ds_fp8", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copytree(ROOT / "schemas", tree / "schemas")
    if (tree / "ds_fp8" / "schemas").is_dir() and not (tree / "ds_fp8" / "schemas").is_symlink():
        shutil.rmtree(tree / "ds_fp8" / "schemas")
    blocks = BLOCK.findall(PAGE.read_text())
    assert len(blocks) >= 10
    for title, block in blocks:
        place(tree, title, block)
    job = tree / "job.py"
    job.write_text(JOB)
    environment = {**os.environ, "PYTHONPATH": str(tree), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "DS_FP8_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, str(job)], cwd=tree, env=environment, capture_output=True, text=True, timeout=240
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, f"{done.stdout}\n{done.stderr}"
    return {**json.loads(lines[0].removeprefix("FOUND ")), "said": done.stderr}


def test_the_recipe_of_the_page_computes(found):
    """By its name in the JSON; scales are powers of two; what it cannot do is refused with the reason of its entry."""
    assert found["power of two"] and found["gradients"]
    assert any("the owner's casts are not written" in message for message in found["refused"])


def test_the_format_of_the_page_holds_a_state(found):
    """2.03 bytes, an error of 16 bits, and a line that says who does the step; the second moment is not for it."""
    assert found["bytes"] == 2.03125 and found["int16 error"] < 1e-3
    assert "states in int16 have no kernel on cpu" in found["said"]
    assert found["refused int16"]


def test_the_algorithm_of_the_page_steps(found):
    """Taken from DeepSpeed's section, torch's to the bit at O1, one int8 state at O2, resumed to the bit."""
    assert found["problems"] == [] and found["sgd"] and found["sgd resumes"]
    assert found["states"] == ["exp_avg.data", "exp_avg.scale_inv", "master.data", "partition", "step"]
