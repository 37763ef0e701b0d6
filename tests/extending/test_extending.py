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
BLOCK = re.compile(r'^```(\w+) title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)

JOB = """
import json, logging, warnings

import torch
from torch import nn

warnings.simplefilter("ignore")
logging.basicConfig(format="%(message)s")
torch.manual_seed(0)

from ds_fp8 import config
from ds_fp8.layers import restore_layers, swap_layers
from ds_fp8.levels import LEVELS, MASTERS, STATE_BYTES
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
weight = scaling.requantize_weight(layer.weight, None, settings.fp8.recipe.forward_format)
found["power of two"] = float(torch.log2(weight.scale_inv)).is_integer()
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

# A master: by JSON, its bytes, a weight that moves by steps that bf16 alone would lose, and a resumed step.
settings = config.load({**base, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
                        "msamp": {"enabled": True, "opt_level": "O2", "master": "pair"}})
found["master bytes"] = MASTERS[settings.msamp.level.master].extra_bytes
pair = []
for level in (settings.msamp.level, settings.msamp.level.override(master="fp32")):
    param = nn.Parameter(torch.linspace(1, 2, 1000).bfloat16())
    optimizer = ScaledAdamW([param], lr=1e-5, level=level)
    for step in range(20):
        param.grad = torch.ones(1000).bfloat16()
        optimizer.step()
    pair.append(optimizer.export_fp32(param)["master"])
    again = nn.Parameter(param.detach().clone())
    resumed = ScaledAdamW([again], lr=1e-5, level=level)
    resumed.load_state_dict(optimizer.state_dict())
    param.grad = again.grad = torch.ones(1000).bfloat16()
    optimizer.step(), resumed.step()
    found["pair resumes"] = torch.equal(param, again)
found["pair error"] = float((pair[0] - pair[1]).abs().max())
found["pair moved"] = float((pair[0] - torch.linspace(1, 2, 1000).bfloat16().float()).abs().min())

# A type of layer: told by its class name and structure, swapped in place, close to the exact product, and given back.
class Dense(nn.Module):
    def __init__(self, features, units):
        super().__init__()
        self.units = units
        self.weight, self.bias = nn.Parameter(torch.randn(features, units) / 8), nn.Parameter(torch.zeros(units))

    def forward(self, x):
        return x @ self.weight + self.bias

model = nn.Sequential(Dense(32, 48), nn.GELU(), nn.Linear(48, 16)).bfloat16()
x = torch.randn(8, 32).bfloat16()
names, exact = list(model.state_dict()), model(x)
plan = make_plan(model, config.load({**base, "fp8": {"enabled": True, "recipe": "current"}}))
found["layers"] = plan.banner()
swap_layers(model, plan)
y = model(x)
y.float().sum().backward()
found["dense"] = [type(model[0]).__name__, bool(torch.equal(y, exact)), float((y - exact).norm() / exact.norm()),
                  list(model.state_dict()) == names, list(model[0].weight.grad.shape), plan.decision("0").shape]
restore_layers(model)
found["dense restored"] = [type(model[0]).__name__, bool(torch.equal(model(x), exact))]

# An algorithm: DeepSpeed's type is taken, and at O1 the step is torch's to the bit.
sgd = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}
file = {**base, "optimizer": sgd, "msamp": {"enabled": True, "opt_level": "O2"}}
found["problems"] = [str(one) for one in config.check(file) if one.severity == "error"]
ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 1000)) for _ in range(2))
one, two = ALGORITHMS["sgd"]([ours], lr=0.1, level="O1"), torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
for step in range(5):
    ours.grad = theirs.grad = torch.randn(1000, generator=torch.Generator().manual_seed(step))
    one.step(), two.step()
found["sgd"] = torch.equal(ours, theirs)
small = nn.Parameter(torch.linspace(-1, 1, 1000).bfloat16())
quantized = ALGORITHMS["sgd"]([small], lr=0.1, level="O2")
small.grad = torch.ones(1000).bfloat16()
quantized.step()
again = nn.Parameter(small.detach().clone())
resumed = ALGORITHMS["sgd"]([again], lr=0.1, level="O2")
resumed.load_state_dict(quantized.state_dict())
small.grad = again.grad = torch.ones(1000).bfloat16()
quantized.step(), resumed.step()
found["sgd resumes"] = torch.equal(small, again)
found["states"] = sorted(str(key) for key in quantized.state[small])
print("FOUND " + json.dumps(found))
"""


RELEASE = """
import json, os, sys, warnings

warnings.simplefilter("ignore")
import deepspeed, torch
import ds_fp8

ds_fp8.activate()
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="29871")
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 16))
engine, *_ = deepspeed.initialize(model=model, config={
    "train_micro_batch_size_per_gpu": 8, "bf16": {"enabled": True}, "steps_per_print": 10**9,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "msamp": {"enabled": True, "opt_level": "O2"}})
losses = []
for step in range(4):
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(step)).bfloat16()
    loss = engine(x).float().square().mean()
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
print("FOUND " + json.dumps({"losses": losses, "classes": [cls.__module__ for cls in type(engine.optimizer).__mro__]}))
"""


def place(tree: Path, kind: str, title: str, block: str) -> None:
    """Put one block of the page where its title says."""
    name, _, where = title.partition(" in ")
    target = tree / name
    if kind == "diff":
        target.write_text(_changed(target.read_text(), block, name))
        return
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


def _changed(text: str, block: str, name: str) -> str:
    """The lines with `-`, wherever they stand, replaced by those with `+` that follow them."""
    for old, new in re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)+)", block, re.MULTILINE):
        before, after = ("\n".join(line[1:] for line in part.splitlines()) for part in (old, new))
        assert text.count(before) == 1, f"{name}: {before!r} stands there {text.count(before)} times"
        text = text.replace(before, after)
    return text


def _into_enum(text: str, key: str, value: str) -> str:
    start = text.index(f'"{key}": {{')
    at = text.index('"enum": [', start) + len('"enum": [')
    return f"{text[:at]}{value}, {text[at:]}"


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the package with everything of the page."""
    tree = tmp_path_factory.mktemp("extended")
    shutil.copytree(PACKAGE, tree / "ds_fp8", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copytree(ROOT / "schemas", tree / "schemas")
    if (tree / "ds_fp8" / "schemas").is_dir() and not (tree / "ds_fp8" / "schemas").is_symlink():
        shutil.rmtree(tree / "ds_fp8" / "schemas")
    blocks = BLOCK.findall(PAGE.read_text())
    assert len(blocks) >= 20
    for kind, title, block in blocks:
        place(tree, kind, title, block)
    return tree


def run(code: str, package: Path, tmp_path: Path) -> dict:
    """What a job printed that ran on the package in this folder."""
    job = tmp_path / "job.py"
    job.write_text(code)
    environment = {
        **os.environ,
        "PYTHONPATH": str(package),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "DS_FP8_DISABLE": "1",
    }
    done = subprocess.run(
        [sys.executable, str(job)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, f"{done.stdout}\n{done.stderr}"
    return {**json.loads(lines[0].removeprefix("FOUND ")), "said": done.stderr}


@pytest.fixture(scope="module")
def found(tree, tmp_path_factory):
    return run(JOB, tree, tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A DeepSpeed 0.20.0 in which one private method has another name."""
    import deepspeed

    folder = tmp_path_factory.mktemp("release")
    shutil.copytree(
        Path(deepspeed.__file__).parent,
        folder / "deepspeed",
        ignore=lambda where, names: [n for n in names if not (n.endswith(".py") or (Path(where) / n).is_dir())],
    )
    changed = folder / "deepspeed" / "runtime" / "zero" / "stage_1_and_2.py"
    text = changed.read_text()
    assert "_get_offload_gradient_dict" in text
    changed.write_text(text.replace("_get_offload_gradient_dict", "_collect_offload_gradients"))
    return folder


def differences(package: Path, release: Path) -> str:
    """What doctor says of the release, with the package in this folder."""
    code = (
        "from ds_fp8.zero.deepspeed_source import DeepSpeedSource; from ds_fp8.zero.private_names import differences; "
        f"print(*differences(DeepSpeedSource.at({str(release)!r}), version='0.20.0'), sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(package), "DS_FP8_DISABLE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return "\n".join(line for line in done.stdout.splitlines() if "deepspeed.runtime" in line)


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


def test_the_master_of_the_page_remembers_small_steps(found):
    """2 bytes; twenty steps of 1e-5, which a bf16 weight between 1 and 2 would lose, are there to 16 bits."""
    assert found["master bytes"] == 2.0 and found["pair resumes"]
    assert found["pair error"] <= 20 * 2**-17 and found["pair moved"] > 1e-4
    assert "masters in pair have no kernel on cpu" in found["said"]


def test_the_layer_of_the_page_computes_in_fp8_and_comes_back(found):
    """Swapped by its name; other numbers, near the exact ones; the same names; shapes as (out, in)."""
    assert "1 of 1 Dense -> Fp8Dense" in found["layers"]
    name, is_exact, error, has_names, gradient, shape = found["dense"]
    assert name == "Fp8Dense" and not is_exact and error < 0.1 and has_names
    assert gradient == [32, 48] and shape == [48, 32]
    assert found["dense restored"] == ["Dense", True]


def test_the_release_of_the_page_is_what_the_package_expects(tree, release):
    """Before, the changed name is the one difference; after, there is none."""
    before, after = differences(PACKAGE.parent, release), differences(tree, release)
    assert before.count("\n") == 0 and "DeepSpeedZeroOptimizer._get_offload_gradient_dict: not there" in before
    assert after == ""


def test_the_release_before_trains_through_the_adapter(tree, tmp_path):
    """On the installed release the adapter stands behind the mixins, and the losses are the unchanged package's."""
    new, old = run(RELEASE, tree, tmp_path), run(RELEASE, PACKAGE.parent, tmp_path)
    assert "ds_fp8.zero.adapters.until_0_19_8" in new["classes"]
    assert "ds_fp8.zero.adapters.until_0_19_8" not in old["classes"]
    assert new["losses"] == old["losses"] and new["losses"][-1] < new["losses"][0]
