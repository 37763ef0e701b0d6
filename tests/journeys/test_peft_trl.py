"""PEFT's adapters and TRL's trainers, each by the words of their documentation, and with reference models from the
same JSON.
"""

from __future__ import annotations

import math

import pytest

from tests.journeys import clients

pytest.importorskip("peft", reason="needs peft")
pytest.importorskip("trl", reason="needs trl")

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(900)]

ADAPTERS = ("lora", "dora", "modules_to_save", "prompt")
TRAINERS = ("sft_lora", "dpo", "dpo_lora", "reward", "grpo")


def pairs_of(folder, script: str, kinds: tuple[str, ...]) -> dict[str, tuple[clients.Run, clients.Run]]:
    clients.write(folder, bf16=clients.AUTO, fp8={**clients.AUTO, **clients.FP8})
    runs = clients.run(folder, script, *[[kind, f"{way}.json"] for kind in kinds for way in ("bf16", "fp8")])
    return dict(zip(kinds, zip(runs[::2], runs[1::2])))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    return pairs_of(tmp_path_factory.mktemp("peft"), "peft_kinds", ADAPTERS)


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    return pairs_of(tmp_path_factory.mktemp("trl"), "trl_kinds", TRAINERS)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_train_over_fp8_layers(adapters, kind):
    """The 14 layers of the base model multiply in FP8, the adapters in high precision; merged, all are unmodified
    again.
    """
    bf16, fp8 = adapters[kind]
    assert "14 of " in fp8.banner and bf16.banner == "", fp8.said
    assert all(map(math.isfinite, fp8.losses)) and fp8.losses != bf16.losses
    assert all(abs(a - b) < 0.02 * b for a, b in zip(fp8.losses, bf16.losses)), (bf16.losses, fp8.losses)
    if kind == "prompt":
        assert fp8.fp8_layers == 14
        return
    assert "(adapter, in high precision by default" in fp8.said and fp8.is_falling()
    assert fp8.words("MERGED") == ["Linear", "Linear"] and fp8.fp8_layers == 0, "14 before, 0 after"
    assert "14 FP8 layers of this model are unmodified again" in fp8.said
    assert float(fp8.words("DIFFERENCE")[0]) < 0.02, "merging rounds the weights to bf16 once, as without FP8"
    clients.record(f"PEFT: {kind}", save="merge_and_unload: unmodified layers", **clients.cells(bf16, fp8))


@pytest.mark.parametrize("kind", TRAINERS)
def test_trl_trains_in_fp8(trainers, kind):
    bf16, fp8 = trainers[kind]
    assert fp8.fp8_layers == 14 and bf16.fp8_layers == 0, fp8.said
    assert all(map(math.isfinite, fp8.losses)) and fp8.losses != bf16.losses
    if kind == "grpo":  # sampled: the trajectories part at the first token that rounding changes
        assert abs(fp8.losses[0]) < 1e-3
    else:
        # A reward's loss is taken from one bf16 number per sequence: three digits.
        room = 0.15 if kind == "reward" else 0.05
        assert all(abs(a - b) < room * b for a, b in zip(fp8.losses, bf16.losses)), (bf16.losses, fp8.losses)
        assert min(fp8.losses) < fp8.losses[0]
    if kind in ("dpo", "grpo"):
        assert fp8.said.count("14 of 15 Linear -> Fp8Linear") == 2, "the policy and its reference"
    if kind.startswith("dpo"):
        assert fp8.losses[0] == pytest.approx(math.log(2), abs=2e-3), "policy and reference see the same rounding"
    clients.record(f"TRL: {kind}", **clients.cells(bf16, fp8))


def test_an_interrupted_sft_goes_on_and_its_adapter_loads_without_us(tmp_path):
    """From the checkpoint after step 3 to the bit; the saved adapter over an unmodified base model gives the same
    loss.
    """
    clients.write(tmp_path, fp8={**clients.AUTO, **clients.FP8})
    whole, parts = clients.run(
        tmp_path, "trl_resume", ["fp8.json", "whole"], ["fp8.json", "parts", "whole/checkpoint-3"]
    )
    assert whole.fp8_layers == 14 and parts.fp8_layers == 14, parts.said
    assert len(whole.losses) > 3 and parts.losses[-(len(whole.losses) - 3) :] == whole.losses[3:], (
        whole.losses,
        parts.losses,
    )
    ours, theirs = map(float, parts.words("ADAPTER"))
    assert abs(ours - theirs) < 0.01 * theirs
    clients.record(
        "TRL: SFT + LoRA, interrupted", save="adapter: the loss over an unmodified base", resume="losses to the bit"
    )
