"""FP8 layers live as long as their engine; what a model does afterwards is what DeepSpeed alone would do with its
weights.

Each job trains in an engine of ours, ends it, and goes on with the same model; beside it a fresh model gets the same
weights.
"""

from __future__ import annotations

import pytest
from ranks import run_ranks

from tests.engine.life_jobs import several

pytestmark = [pytest.mark.dist, pytest.mark.slow]

FP8_KINDS = {"Fp8Linear", "Fp8LayerNorm"}


def together(*calls):
    """Run jobs on two ranks; for each job its result on both."""
    return list(zip(*run_ranks(2, several, [(name, arguments) for name, *arguments in calls], timeout_s=280)))


def modes(stage):
    return ("fp8", "O2") + (("O3",) if stage else ())


@pytest.mark.parametrize("stages", [(0, 1), (2,), (3,)])
def test_a_destroyed_engine_gives_the_unmodified_model_back(stages):
    """Classes, attributes, hooks, dtypes, memory and values; then an engine without sections is DeepSpeed's to the bit.

    At O3 the 16-bit weights had been released (stages 1, 2) or were gathered in quantized form (3); under offload
    masters lie on the host.
    """
    calls = [("ended", mode, stage, False, "destroy", "unmodified") for stage in stages for mode in modes(stage)]
    calls += [
        ("ended", mode, stage, True, "destroy", "unmodified") for stage in stages if stage >= 2 for mode in ("O2", "O3")
    ]
    for call, results in zip(calls, together(*calls)):
        for found in results:
            assert found["clean"] and found["readable"] and found["same"], call
            assert found["dtypes"] == {"torch.bfloat16"}
            assert found["losses"] == found["fresh"], call


def test_a_forgotten_engine_gives_way_to_the_next():
    """`del engine` without `destroy()`: the next engine of the model restores it first, with sections or without."""
    endings = [("fp8", 0, "unmodified"), ("O2", 1, "block"), ("O3", 2, "unmodified"), ("O3", 3, "O2")]
    calls = [("ended", mode, stage, False, "drop", after) for mode, stage, after in endings]
    for call, results in zip(calls, together(*calls)):
        assert all(found["losses"] == found["fresh"] and found["clean_at_last"] for found in results), call


def test_a_refused_job_leaves_the_model_as_it_was():
    """The error is the cause's own; the model computes on its own, and trains when the cause is mended."""
    calls = [("refused", "fp8", 0), ("refused", "O2", 2), ("refused", "O3", 2), ("refused", "O3", 3)]
    calls += [("refused", "fp8", 3, "data"), ("refused", "O3", 1, "data")]
    calls += [("refused", mode, stage, "scheduler") for mode, stage in (("fp8", 0), ("O3", 2), ("fp8", 3), ("O3", 3))]
    errors = {"data": "OSError: nonsense", "scheduler": "KeyboardInterrupt: nonsense"}
    for call, results in zip(calls, together(*calls)):
        for found in results:
            assert errors.get(call[-1], "nonsense") in found["error"], call
            assert found["clean"] and found["same"], call
            assert found["losses"] == found["fresh"], call


def test_a_subclass_that_fails_leaves_the_model_as_it_was():
    """PipelineEngine, the hybrid engine and a script's own class go on after the constructor that swaps layers."""
    calls = [("refused_by_subclass", mode, stage, by) for mode, stage, by in
             (("fp8", 1, "pipeline"), ("O3", 1, "pipeline"), ("O3", 2, "hybrid"), ("fp8", 3, "hybrid"),
              ("fp8", 0, "own"), ("O3", 3, "own"))]  # fmt: skip
    for call, results in zip(calls, together(*calls)):
        for found in results:
            assert ("AssertionError" if call[-1] == "pipeline" else "KeyboardInterrupt: nonsense") in found["error"]
            assert found["clean"] and found["losses"] == found["fresh"], call


def test_one_model_through_engines_of_every_kind():
    """fp8, O2, block, O1, none, current, O3, none: each starts anew by its own JSON, as on a model never swapped.

    DeepSpeed itself does not take a model over from a living ZeRO-3 engine, so that one is destroyed in between.
    """
    order = ["fp8", "O2", "block", "O1", "unmodified", "current", "O3", "unmodified"]
    calls = [("chain", 0, order[:6], False), ("chain", 2, order, False), ("chain", 3, order, True)]
    for results in together(*calls):
        for found in results:
            *links, end = found
            assert end["clean"]
            for mode, link in zip(order[1:], links):
                assert link["losses"] == link["expected"], mode
                assert (set(link["kinds"]) >= FP8_KINDS) == (mode != "unmodified")


def test_copies_and_strangers_live_on_their_own():
    """A deepcopy of `engine.module` in a second engine, with sections or without; the first engine notices nothing.

    Engines of different recipes and levels over different models, in turns: each to the bit as if it were alone. And
    `finally: engine.destroy()` at O3, on a rank that failed alone, does not wait for the others.
    """
    calls = [("strangers", 0), ("strangers", 2), ("copied", "fp8", 0, "unmodified"), ("copied", "O2", 2, "block")]
    first, second, *copies, alone = together(*calls, ("interrupted", 2))
    assert all(found["finite"] for found in alone)
    assert all(found["alone"] == found["together"] for found in (*first, *second))
    for results in copies:
        for found in results:
            assert found["alone"] and found["read"]
            assert found["losses"] == found["fresh"] and found["clean"]
            assert found["first"] == found["undisturbed"] and set(found["kinds"]) >= FP8_KINDS


def test_a_shared_trunk_has_a_form_for_each_engine():
    """Actor and critic share a trunk: each computes by its own JSON. The control is a step in which nothing is learnt.

    With learning rate 0 the losses of a step depend on the engine's own form alone, whatever the other one is.
    """
    still = (0.0, 0.0)
    pairs = (
        ("unmodified", "unmodified"),
        ("fp8", "fp8"),
        ("fp8", "unmodified"),
        ("unmodified", "block"),
        ("fp8", "block"),
    )
    results = together(
        *(("actor_and_critic", pair, still) for pair in pairs), ("actor_and_critic", ("O2", "O2"), (1e-2, 1e-2))
    )
    *results, learning = results
    for rank in (0, 1):
        by_pair = dict(zip(pairs, (found[rank] for found in results)))
        baseline = by_pair["unmodified", "unmodified"]["losses"]
        assert by_pair["fp8", "unmodified"]["losses"][1] == baseline[1], "the critic has no section of ours"
        assert by_pair["unmodified", "block"]["losses"][0] == baseline[0]
        assert by_pair["fp8", "fp8"]["losses"][0] == by_pair["fp8", "unmodified"]["losses"][0] != baseline[0]
        assert (
            by_pair["fp8", "block"]["losses"][1][:4]
            == by_pair["unmodified", "block"]["losses"][1][:4]
            != baseline[1][:4]
        )
        assert all(found["clean"] for found in by_pair.values())
        assert set(by_pair["fp8", "fp8"]["left"]) >= FP8_KINDS, "the critic goes on when the actor is destroyed"
        actor, critic = learning[rank]["losses"]
        assert actor[-1] < actor[0] and critic[-1] < critic[0]


def test_a_shared_trunk_is_compiled_for_the_engine_that_asked():
    """Whichever comes first, and when the other is destroyed; afterwards for nobody. Losses as with both eager, to the
    rounding of what is fused.
    """
    pairs = (("fp8", "fp8"), ("compiled", "fp8"), ("fp8", "compiled"), ("unmodified", "compiled"))
    for results in zip(*together(*(("actor_and_critic", pair, (0.0, 0.0)) for pair in pairs))):
        eager = results[0]["losses"]
        for pair, found in zip(pairs, results):
            assert found["compiled"] == [*([mode == "compiled"] for mode in pair), [False]], pair
            assert found["losses"][1] == pytest.approx(eager[1], rel=2.0**-6) and found["clean"], pair


def test_a_teacher_shares_the_trunk_of_a_student_in_zero_2():
    """Losses as DeepSpeed's alone, to FP8's rounding; at O3 the trunk's weights are not there to be shared: refused."""
    baseline, fp8, o2, o3 = together(*(("teacher_and_student", mode) for mode in ("unmodified", "fp8", "O2", "O3")))
    for rank in (0, 1):
        for found in (fp8[rank], o2[rank]):
            assert found["losses"] == pytest.approx(baseline[rank]["losses"], rel=2.0**-4) and found["clean"]
        assert "opt_level O3" in o3[rank] and "destroy()" in o3[rank]
