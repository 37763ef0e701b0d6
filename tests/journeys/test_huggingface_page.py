"""docs/huggingface.md as it stands: the JSON is valid, and each of the six examples trains in FP8 on tiny models."""

from __future__ import annotations

import json
import re
import sys

import pytest

from ds_fp8 import config
from tests.journeys import clients
from tests.journeys.launching import ROOT, launch

pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("trl", reason="needs trl")

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(900)]

PAGE = (ROOT / "docs" / "huggingface.md").read_text(encoding="utf-8")

MAKE_MODELS = """
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
import tiny
letters = Tokenizer(models.WordLevel({chr(97 + n) if n < 26 else f"<{n}>": n for n in range(64)}, unk_token="<63>"))
letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=letters, pad_token="<62>", bos_token="<61>", eos_token="<60>", unk_token="<63>"
)
experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
for name, model in {
    "MODEL": LlamaForCausalLM(LlamaConfig(**tiny.LLAMA)),
    "MOE_MODEL": Qwen3MoeForCausalLM(Qwen3MoeConfig(**tiny.LLAMA, **experts)),
}.items():
    model.save_pretrained(name)
    tokenizer.save_pretrained(name)
"""


LIGHTNING_ON_CPU = """
import runpy
import torch
from lightning.pytorch import strategies

class OnCPU(strategies.DeepSpeedStrategy):
    root_device = torch.device("cpu", 0)

    def setup_environment(self):
        self.accelerator.setup_device(self.root_device)
        self.set_world_ranks()
        self._init_deepspeed_distributed()

strategies.DeepSpeedStrategy = OnCPU
runpy.run_path("train.py", run_name="__main__")
"""
"""The strategy refuses CPUs: its checks of the device are left out, the rest is its own."""


def examples() -> dict[str, str]:
    """Heading -> the script under it."""
    return dict(re.findall(r"^## ([^\n]+)\n+```python\n(.*?)```", PAGE, flags=re.DOTALL | re.MULTILINE))


def the_json() -> dict:
    (text,) = re.findall(r"```json\n(.*?)```", PAGE, flags=re.DOTALL)
    return json.loads(text)


def test_the_json_is_valid_and_its_dtype_is_the_trainers():
    assert [problem for problem in config.check(the_json()) if problem.severity == "error"] == []
    assert config.load(the_json()).deepspeed.dtype == "bf16 (decided by the trainer)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the page takes for granted: two models, a text, the JSON."""
    folder = tmp_path_factory.mktemp("page")
    path = clients.variables(folder)["PYTHONPATH"] + f":{clients.HERE / 'natural'}"
    code, said = launch([sys.executable, "-c", MAKE_MODELS], folder, **clients.variables(folder, PYTHONPATH=path))
    assert code == 0, said
    (folder / "text.txt").write_text(
        "".join("abcdefghijklmnopqrstuvwxyz"[n % 9 : n % 9 + 16] + "\n" for n in range(32))
    )
    (folder / "ds.json").write_text(json.dumps(the_json()))
    return folder


@pytest.mark.parametrize("heading", examples())
def test_an_example_trains_in_fp8(folder, heading):
    """The script as it stands."""
    (folder / "train.py").write_text(examples()[heading])
    command = [sys.executable, "train.py"]
    if heading == "Lightning":
        pytest.importorskip("lightning", reason="needs lightning")
        command = [sys.executable, "-c", LIGHTNING_ON_CPU]
    code, said = launch(command, folder, 800, **clients.variables(folder))
    assert code == 0, said
    assert "-> Fp8Linear" in said and re.search(r"FLOPs, all \d+ planned layers ran in FP8 in step 1", said), said
    if heading == "A mixture of experts":
        assert "2 of 2 Experts -> Fp8Experts" in said, said
    if heading == "DPO":
        assert said.count("14 of 15 Linear -> Fp8Linear") == 2, said


def test_the_page_has_six_examples():
    names = ["Trainer", "Accelerate", "SFT with LoRA", "DPO", "A mixture of experts", "Lightning"]
    assert list(examples()) == names
