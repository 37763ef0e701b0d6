"""All ranks say yes, or all ranks stop: the verdict on what the ranks bring."""

from __future__ import annotations

import pytest

from ds_fp8.engine.agreement import Finding, judge
from ds_fp8.errors import PlanError


def test_equal_plans_pass():
    judge(0, [Finding("aa"), Finding("aa")])


def test_a_rank_that_stopped_is_quoted_to_the_others():
    """Rank 0 was fine by itself; it stops with the reason of rank 1 in hand."""
    with pytest.raises(PlanError, match=r"rank 1 stopped, so rank 0 stops too. Rank 1: no module matches 'h.\*'"):
        judge(0, [Finding("aa"), Finding(error="no module matches 'h.*'")])


def test_different_plans_list_who_holds_which():
    with pytest.raises(PlanError, match="aa: ranks 0, 2") as caught:
        judge(1, [Finding("aa"), Finding("bb"), Finding("aa")])
    assert "bb: rank 1" in str(caught.value)


def test_different_hyper_parameters_and_versions_are_named():
    """Learning rate, clip and torch of rank 1 are others; a key that only rank 0 has is absent there."""
    first = {"optimizer/params/lr": "0.001", "version of torch": "'2.13.0'", "gradient_clipping": "1.0"}
    other = {"optimizer/params/lr": "0.002", "version of torch": "'2.12.0'"}
    with pytest.raises(PlanError, match=r"optimizer/params/lr: 0.001 on ranks 0, 2; 0.002 on rank 1") as caught:
        judge(0, [Finding("aa", facts=first), Finding("aa", facts=other), Finding("aa", facts=first)])
    assert "version of torch: '2.13.0' on ranks 0, 2; '2.12.0' on rank 1" in str(caught.value)
    assert "gradient_clipping: 1.0 on ranks 0, 2; absent on rank 1" in str(caught.value)


def test_our_own_keys_are_compared_by_their_plan():
    """`"margin": 0` and no margin are one plan; where plans differ, the key that made them differ is named."""
    judge(0, [Finding("aa", facts={"fp8/margin": "0"}), Finding("aa", facts={})])
    with pytest.raises(PlanError, match="fp8/margin: 0 on rank 0; 1 on rank 1"):
        judge(0, [Finding("aa", facts={"fp8/margin": "0"}), Finding("bb", facts={"fp8/margin": "1"})])


def test_stages_of_a_pipeline_may_have_optimizers_of_their_own():
    judge(
        0,
        [
            Finding("aa", part="0", partial=True, converted=1, facts={"optimizer group 1, lr": "1"}),
            Finding("bb", part="1"),
        ],
    )


def test_a_rank_with_disabled_sections_does_not_agree_with_one_that_enabled_them():
    """Different files on two nodes: one would send FP8 values to somebody who waits for bf16."""
    with pytest.raises(PlanError, match="different plans"):
        judge(0, [Finding("aa"), Finding(None)])


def test_stages_of_a_pipeline_have_plans_of_their_own():
    """Different layers, different digests: compared within a stage only."""
    first, second = (Finding("aa", part="0", partial=True, converted=2), Finding("bb", part="1", partial=True))
    judge(0, [first, second, first, second])


def test_a_pattern_must_match_in_some_stage():
    """`head` lives in the last stage only; `haed` lives nowhere: the error of a model in one piece."""
    missing = ("exclude: head", "exclude: haed")
    stages = [
        Finding("aa", part="0", partial=True, converted=1, unmatched=missing, layers=("up", "down")),
        Finding("bb", part="1", partial=True, converted=1, unmatched=missing[1:], layers=("head",)),
    ]
    with pytest.raises(PlanError, match="fp8/layers/exclude: 'haed' matches no Linear") as caught:
        judge(0, stages)
    assert "Closest names: head" in str(caught.value)


def test_a_pipeline_must_convert_something():
    with pytest.raises(PlanError, match="no stage"):
        judge(0, [Finding("aa", part=str(stage), partial=True) for stage in range(2)])
