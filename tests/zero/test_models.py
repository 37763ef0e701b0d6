"""GPT-2's Conv1D and a mixture's stacked experts in ZeRO 0 to 3, at O2 and O3: FP8 by JSON, the script is
DeepSpeed's.
"""

from __future__ import annotations

import pytest
from ranks import run_ranks

pytest.importorskip("transformers")

from tests.zero.model_jobs import train_expert_parallel, train_families

pytestmark = pytest.mark.dist

SAID = {
    "gpt2": "8 of 8 Conv1D -> Fp8Conv1D",
    "mixtral": "2 of 2 Experts -> Fp8Experts (E4M3, current, one scale per row)",
}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_they_train_in_every_stage_and_go_on_from_a_checkpoint(stage, tmp_path):
    """Losses beside bf16's but not equal to them; at O3 all FP8 weights travel so, Conv1D's with O2's losses to the
    bit, and experts' beside them, for their weights have one scale each then; a resumed run to the bit.
    """
    ranks = run_ranks(2, train_families, stage, ["gpt2", "mixtral"], str(tmp_path))
    for found in ranks:
        for name in SAID:
            baseline, o2 = found[f"{name} None"]["losses"], found[f"{name} O2"]["losses"]
            assert o2 != baseline and o2 == pytest.approx(baseline, rel=0.03), (name, o2, baseline)
            assert o2[-1] < o2[0] - 0.3
            if f"{name} O3" in found:
                o3 = found[f"{name} O3"]["losses"]
                assert o3 == o2 if name == "gpt2" else (o3 != o2 and o3 == pytest.approx(o2, rel=0.01)), name
            last = found.get(f"{name} O3", found[f"{name} O2"])
            assert last["resumed"] == last["after"], name
    for name, sentence in SAID.items():
        assert sentence in ranks[0][f"{name} O2"]["said"]
        last = f"{name} O3" if f"{name} O3" in ranks[0] else f"{name} O2"
        assert ranks[0][last]["weights"] == ranks[1][last]["weights"]
    if stage:
        for name, count in {"gpt2": 8, "mixtral": 12}.items():
            found = ranks[0][f"{name} O3"]
            assert f"{count} weights only in FP8 between steps" in found["said"]
            assert found["released"] == (count if stage < 3 else 0)
            assert found["read"] == pytest.approx(ranks[0][f"{name} O2"]["read"], rel=0.02)


def test_deepspeeds_own_mixture_with_experts_on_both_ranks():
    """A list of Linears, 8 of 16 experts here: converted but for the router and the head; losses beside bf16's."""
    for rank, found in enumerate(run_ranks(2, train_expert_parallel, 2)):
        baseline, ours = found["bf16"]["losses"], found["fp8"]["losses"]
        assert ours != baseline and ours == pytest.approx(baseline, rel=0.01)
        expected = {
            f"moe.deepspeed_moe.experts.deepspeed_experts.{n}.{name}" for n in range(8) for name in ("up", "down")
        }
        assert set(found["fp8"]["layers"]) == {"out", *expected}
        if rank == 0:
            assert "moe.deepspeed_moe.gate.wg (router, in high precision by default" in found["fp8"]["said"]
            assert "59% of the model's matrix FLOPs in FP8" in found["fp8"]["said"]
            assert "not: head 35%, routers 6%" in found["fp8"]["said"]
