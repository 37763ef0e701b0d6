"""The Hugging Face Trainer: eight kinds of models with "auto" values, and one whole life with two ranks."""

from __future__ import annotations

import math

import pytest

from tests.journeys import clients

pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("accelerate", reason="needs accelerate")

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(900)]

MODELS = {"Llama": 14, "Qwen3": 14, "Qwen3Moe": 8, "Mixtral": 8, "GPT2": 8, "Bert": 12, "T5": 32, "ViT": 12}
"""Model -> the least number of its layers that compute in FP8."""


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> dict[str, tuple[clients.Run, clients.Run]]:
    """Every model in bf16 and in FP8: sixteen runs for one start of Python."""
    folder = tmp_path_factory.mktemp("zoo")
    clients.write(folder, bf16=clients.AUTO, fp8={**clients.AUTO, **clients.FP8})
    pairs = [[model, f"{way}.json"] for model in MODELS for way in ("bf16", "fp8")]
    runs = clients.run(folder, "trainer_zoo", *pairs)
    return dict(zip(MODELS, zip(runs[::2], runs[1::2])))


@pytest.mark.parametrize("model", MODELS)
def test_a_model_learns_in_fp8(zoo, model):
    """The same model and data: other losses than bf16's in some digit, and the same to two percent."""
    bf16, fp8 = zoo[model]
    assert fp8.fp8_layers >= MODELS[model] and bf16.fp8_layers == 0, fp8.said
    assert all(map(math.isfinite, fp8.losses)) and fp8.is_falling()
    assert fp8.losses != bf16.losses
    assert all(abs(a - b) < 0.02 * b for a, b in zip(fp8.losses, bf16.losses)), (bf16.losses, fp8.losses)
    clients.record(f"Trainer: {model}", **clients.cells(bf16, fp8))


@pytest.mark.parametrize("stage", [2, 3])
def test_a_whole_life(tmp_path, stage):
    """Two ranks, FP8 and `msamp` O2: evaluates on the way, resumes to the bit, keeps the best, generates; the saved
    model is unmodified.
    """
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True, "reduce_bucket_size": "auto"}
    config = {**clients.AUTO, **clients.FP8, "msamp": {"enabled": True, "opt_level": "O2"}, "zero_optimization": zero}
    clients.write(tmp_path, ds=config)
    lives = (["ds.json", "whole"], ["ds.json", "resumed", "whole/checkpoint-4"])
    (both,) = clients.run(tmp_path, "trainer_life", *lives, ranks=2)
    lines = {start: [line for line in both.said.splitlines() if line.startswith(start)] for start in STARTS}
    assert all(len(found) == 2 for found in lines.values()), both.said
    assert "14 of 15 Linear -> Fp8Linear" in both.said and "ds_fp8: msamp O2: exp_avg int8" in both.said
    assert lines["LOSSES"][0] == lines["LOSSES"][1], "steps 5 and 6 again, as if nothing had happened"
    words = lines["EVAL"][0].split()
    first, last, best = float(words[1]), float(words[words.index("LAST") + 1]), words[-1]
    assert last < 0.9 * first and best == "whole/checkpoint-6"
    # Saved, and loaded by from_pretrained as an unmodified model: the same tokens, the same loss on the same rows.
    generated, again = lines["GENERATED"][0].split()[1:], lines["AGAIN"][0].split()
    assert again[1 : again.index("LOSS")] == generated
    assert float(again[-1]) == pytest.approx(last, rel=1e-3)
    assert "model.safetensors" in lines["FILES"][0]
    if stage == 2:
        clients.record(
            "Trainer: whole life", save="from_pretrained: the same tokens and loss", resume="losses to the bit"
        )


STARTS = ("LOSSES", "EVAL", "GENERATED", "AGAIN", "FILES")
