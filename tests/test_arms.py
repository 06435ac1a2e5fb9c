"Studies as plain data: names of runs, the graph, the words of a run, paired differences."

from dataclasses import replace

import numpy as np
import pytest
from helpers_processes import run_python
from helpers_studies import TINY
from scipy.stats import ttest_rel

from beit_nb import BeitError
from beit_nb.arms import (
    Arm,
    Measure,
    StudyRun,
    compare_arms,
    measures_of,
    paired_interval,
    plan_run,
    run_words,
    study_graph,
    verdict,
    with_inputs,
)
from beit_nb.cli import read_recipe


def test_no_torch_is_imported():
    run_python("import sys, beit_nb.arms; sys.exit(bool({'torch', 'scipy'} & set(sys.modules)))")


def test_a_run_is_named_after_its_configuration():
    tokenizer = StudyRun("tokenizer", "nano", {"seed": 1, "steps": 6}, {})
    hide = StudyRun("pretrain", "nano", {"seed": 1}, {"tokenizer": tokenizer})

    same = [
        replace(hide, changes={"seed": 1, "log_every": 3, "workers": 2, "checkpoint_every": 5}),
        replace(hide, changes={"num_mask_patches": 26, "seed": 1}),  # which is nano's own
    ]
    others = [
        replace(hide, changes={"seed": 2}),
        replace(hide, changes={"seed": 1, "num_mask_patches": 27}),
        replace(hide, inputs={"tokenizer": replace(tokenizer, changes={"seed": 1, "steps": 7})}),
    ]

    assert {run.id for run in same} == {hide.id}
    assert len({run.id for run in [hide, *others]}) == 4
    assert hide.id.startswith("pretrain-")


def test_a_field_of_a_later_version_renames_nothing(monkeypatch):
    "A field that is added with the default 'as before' is at its default in all old runs."
    run = plan_run(TINY, TINY.arms[0], "pretrain", 0)
    before = run.id
    as_before = "beit_nb.arms.as_config"
    from beit_nb.limits import as_config

    monkeypatch.setattr(as_before, lambda *args: as_config(*args) | {"field_of_tomorrow": 0})

    assert run.id == before


def test_runs_are_shared_and_in_order():
    graph = study_graph(TINY, [0, 1])
    order = list(graph)

    commands = [run.command for run in graph.values()]
    assert [commands.count(c) for c in TINY.stages] == [2, 4, 6]
    for name, run in graph.items():
        assert name == run.id
        assert all(order.index(source.id) < order.index(name) for source in run.inputs.values())
    deepest = plan_run(TINY, TINY.arm("half"), "finetune", 1)
    assert [run.command for run in with_inputs(deepest).values()] == list(TINY.stages)


def test_without_a_stage():
    scratch = TINY.arm("scratch")
    unmeasured = replace(scratch, without=("finetune",))

    assert plan_run(TINY, scratch, "finetune", 0).recipe("runs").init == ""
    assert measures_of(TINY, unmeasured) == []
    only = replace(TINY, arms=(unmeasured,))
    assert study_graph(only, [0]) == {}


def test_a_tokenizer_of_somebody_else():
    arm = Arm("DALL-E's", {"pretrain": {"tokenizer": "data/dalle"}})

    run = plan_run(TINY, arm, "pretrain", 0)

    assert not run.inputs and run.recipe("runs").tokenizer == "data/dalle"


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"pretrain": {"num_mask_patches": 65}}, "arm 'wrong': num_mask_patches 65 does not fit"),
        ({"pretrain": {"lrr": 1}}, "unknown field of a pretrain recipe 'lrr'"),
        ({"tokenizer": {"vocab_size": 1}}, "arm 'wrong': vocab_size 1 must be"),
    ],
)
def test_a_wrong_arm_is_named(changes, says):
    "In any stage, also in one that only others read."
    study = replace(TINY, arms=(*TINY.arms, Arm("wrong", changes)))

    with pytest.raises(BeitError, match=says):
        study_graph(study, [0])


def test_the_words_of_a_run_mean_its_recipe():
    changes = {
        "exact_mask": False,
        "crop_scale": (0.5, 1.0),
        "watch_every": None,
        "compile": True,
        "tokenizer": "a folder/with 'marks'",
    }
    odd = StudyRun("pretrain", "nano", changes, {})

    for run in [odd, *study_graph(TINY, [0]).values()]:
        command, *words = run_words(run, "runs")
        assert read_recipe(command, words) == run.recipe("runs")


def test_a_measure_reads_numbers_only():
    probe = Measure("probe", "probe", "pretrained.knn.mean")

    assert probe.read({"pretrained": {"knn": {"mean": 0.5}}}) == 0.5
    for wrong in (None, {}, {"pretrained": 1}, {"pretrained": {"knn": {"mean": True}}}):
        assert probe.read(wrong) is None


def test_the_interval_is_that_of_the_paired_t_test():
    rng = np.random.default_rng(0)
    own, its = rng.normal(size=(2, 5))

    low, high = paired_interval(own - its)

    theirs = ttest_rel(own, its).confidence_interval(0.95)
    np.testing.assert_allclose((low, high), (theirs.low, theirs.high), rtol=1e-9)


def test_verdicts():
    above, below, across = (0.5, 1.5), (-1.5, -0.5), (-0.5, 1.5)

    assert [verdict(i, -2.0) for i in (above, below)] == ["contradicted", "reproduced"]
    assert [verdict(i, None) for i in (above, below)] == ["higher", "lower"]
    assert {verdict(i, p) for i in (across, None, (0.0, 0.0)) for p in (1.0, None)} == {"undecided"}


def test_equal_numbers_of_the_paper_claim_no_sign():
    "A difference of 0 can be neither reproduced nor contradicted."
    better, worse = ([3.0, 3.1, 3.2], [1.0, 1.2, 1.1]), ([1.0, 1.2, 1.1], [3.0, 3.1, 3.2])

    found = [compare_arms(own, its, paper=82.86, paper_base=82.86) for own, its in (better, worse)]

    assert [row["paper_difference"] for row in found] == [0, 0]
    assert [row["verdict"] for row in found] == ["higher", "lower"]
    assert verdict((-0.5, 1.5), 0.0) == verdict(None, 0.0) == "undecided"


def test_a_missing_run_takes_its_pair_away():
    both = compare_arms([3.0, None, 5.0], [1.0, 9.0, 2.0], paper=1.0, paper_base=2.0)

    assert (both["pairs"], both["difference"], both["paper_difference"]) == (2, 2.5, -1.0)
    assert compare_arms([None], [1.0])["difference"] is None
    assert compare_arms([2.0], [1.0])["verdict"] == "undecided"
