"""The Trainer by its other paths: compiled, from a dict or a command line, subclassed, for sequences, for evaluation
alone.
"""

from __future__ import annotations

import math

import pytest

from tests.journeys import clients

pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("accelerate", reason="needs accelerate")

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(900)]

WAYS = {"compiled": 2, "from_a_dict": 2, "parsed": 2, "seq2seq": 2, "evaluated": 3, "without_trainer": 3}
"""Way -> its ZeRO stage."""


@pytest.fixture(scope="module")
def ways(tmp_path_factory) -> dict[str, tuple[clients.Run, clients.Run]]:
    """Each in bf16 and in FP8, for one start of Python."""
    folder = tmp_path_factory.mktemp("ways")
    for stage in (2, 3):
        config = {**clients.AUTO, "zero_optimization": {"stage": stage}}
        clients.write(folder, **{f"bf16_{stage}": config, f"fp8_{stage}": {**config, **clients.FP8}})
    pairs = [[way, f"{kind}_{stage}.json"] for way, stage in WAYS.items() for kind in ("bf16", "fp8")]
    runs = clients.run(folder, "trainer_ways", *pairs)
    return dict(zip(WAYS, zip(runs[::2], runs[1::2])))


@pytest.mark.parametrize("way", WAYS)
def test_fp8_is_on(ways, way):
    bf16, fp8 = ways[way]
    layers = 32 if way == "seq2seq" else 14
    assert f"{layers} of {layers + 1} Linear -> Fp8Linear" in fp8.said and fp8.fp8_layers == layers, fp8.said
    assert "ds_fp8:" not in bf16.said and bf16.fp8_layers == 0
    assert fp8.losses != bf16.losses and all(map(math.isfinite, fp8.losses))
    assert all(abs(a - b) < 0.02 * b for a, b in zip(fp8.losses, bf16.losses)), (bf16.losses, fp8.losses)
    if way == "evaluated":
        assert "FP8 in eval mode" in fp8.said and fp8.losses[0] == fp8.losses[1]
        return
    assert f"all {layers} planned layers ran in FP8 in step 1" in fp8.first_step and fp8.is_falling(), fp8.said
    if way == "compiled":
        assert int(fp8.words("GRAPHS")[0]) > 0 and int(bf16.words("GRAPHS")[0]) > 0, "was compiled"
    names = {
        "compiled": "Trainer: torch_compile",
        "from_a_dict": "Trainer: a dict, model_init",
        "parsed": "Trainer: HfArgumentParser, subclass, checkpointing",
        "seq2seq": "Seq2SeqTrainer: T5, predict_with_generate",
        "without_trainer": "HfDeepSpeedConfig, ZeRO 3, own loop",
    }
    clients.record(names[way], **clients.cells(bf16, fp8))
