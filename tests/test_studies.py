"The studies: sound at every scale, with the paper's numbers, and open to changes."

import pytest
from helpers_processes import run_python

from beit_nb import BeitError
from beit_nb.arms import changed_study, plan_run, study_graph
from beit_nb.studies import SCALES, STUDIES, study_named

ALL = [study for scales in STUDIES.values() for study in scales.values()]


def test_no_torch_is_imported():
    run_python("import sys, beit_nb.studies; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))")


@pytest.mark.parametrize("study", ALL, ids=lambda s: f"{s.name}-{s.scale}")
def test_every_study_can_be_run(study):
    graph = study_graph(study, [0, 1])  # raises where a recipe is unsound

    assert set(STUDIES[study.name]) == set(SCALES)
    names = [arm.name for arm in study.arms]
    assert len(names) >= 2 and len(set(names)) == len(names)
    measured = {measure.name for measure in study.measures} | {"segmentation"}
    assert all(set(arm.paper) <= measured for arm in study.arms)
    final = [run for run in graph.values() if run.command == study.measures[0].stage]
    assert len(final) == 2 * len(study.arms)  # no two arms are the same


def test_arms_change_the_same_fields_at_both_scales():
    for name in ("mask-ratio", "block-size", "table5"):
        turned = {
            scale: {f for a in s.arms for f in a.changes.get("pretrain", {})}
            for scale, s in STUDIES[name].items()
        }
        assert turned["nano"] == turned["base-in1k"], name


def test_the_numbers_of_the_paper():
    "Tables 4, 5 and 8 of arXiv 2106.08254v2."
    longer = study_named("longer", "base-in1k")
    assert longer.arm("").paper == {"fine-tuning": 82.86, "segmentation": 44.65}
    assert longer.arm("800 epochs").paper == {"fine-tuning": 83.19, "segmentation": 45.58}
    table4 = {arm.name: arm.paper for arm in study_named("table4", "base-in1k").arms if arm.paper}
    assert {name: tuple(row.values()) for name, row in table4.items()} == {
        "BEiT": (82.86, 44.65),
        "single patches": (82.77, 42.93),
        "pixels": (81.04, 41.38),
        "pixels, single patches": (80.50, 37.09),
        "recover all": (82.59, 40.93),
        "no masks, recover all": (81.67, 36.73),
        "longer": (83.19, 45.58),
    }
    table8 = [arm.paper["fine-tuning"] for arm in study_named("table8", "nano").arms]
    assert table8 == [82.86, 82.70]
    table5 = [arm.paper for arm in study_named("table5", "base-in1k").arms]
    assert [row["fine-tuning"] for row in table5] == [82.86, 83.00, 83.22]
    assert [row["segmentation"] for row in table5] == [44.86, 45.43, 45.70]


def test_heads_differ_in_head_labels_and_start():
    for scale in SCALES:
        study = study_named("heads", scale)
        for arm in study.arms:
            recipe = plan_run(study, arm, "segment", 0).recipe("runs")
            head, pictures, start = arm.name.split(", ")
            assert recipe.head == head and str(recipe.labelled or "all") == pictures
            assert (recipe.init == "") == (start == "scratch") == (recipe.layer_decay is None)
            assert study.arm(arm.base).name == f"{head}, {pictures}, scratch"


def test_arms_of_table_4_are_what_they_say():
    for scale in SCALES:
        study = study_named("table4", scale)
        made = {a.name: plan_run(study, a, "pretrain", 0).recipe("runs") for a in study.arms[:-1]}
        usual = made["BEiT"]
        assert (usual.masking, usual.targets, usual.recover) == ("blockwise", "tokens", "masked")
        assert made["single patches"].masking == "random"
        both = made["pixels, single patches"]
        assert (both.masking, both.targets, both.tokenizer) == ("random", "pixels", "")
        assert made["recover all"].recover == "all" and made["recover all"].masking == "blockwise"
        nothing = made["no masks, recover all"]
        assert (nothing.masking, nothing.recover) == ("none", "all")
        alone = study.arm("no pre-training")
        for stage in ("finetune", "segment"):
            recipe = plan_run(study, alone, stage, 0).recipe("runs")
            assert (recipe.init, recipe.layer_decay) == ("", None)


def test_shares_of_the_picture():
    for scale, patches in (("nano", 64), ("base-in1k", 196)):
        study = study_named("mask-ratio", scale)
        for arm in study.arms:
            share = int(arm.name.removesuffix(" %")) / 100
            recipe = plan_run(study, arm, "pretrain", 0).recipe("runs")
            assert abs(recipe.num_mask_patches / patches - share) < 0.02  # 75 of 196 are 38 %


def test_label_arms_have_a_scratch_of_their_own():
    study = study_named("labels", "nano")
    for arm in study.arms:
        base = study.arm(arm.base)
        recipes = [plan_run(study, a, "finetune", 0).recipe("runs") for a in (arm, base)]
        assert len({r.labels_per_class for r in recipes}) == 1
        assert recipes[1].init == "" and recipes[1].layer_decay is None
    assert study.arm("20, scratch, 16 x").changes["finetune"]["steps"] == 1600


def test_some_arms_and_other_fields():
    study = study_named("mask-ratio", "nano")

    some = changed_study(study, ["10 %", "40 %"], ["pretrain.steps=9", "finetune.mixup=0.5"])

    recipes = [run.recipe("runs") for run in study_graph(some, [0]).values()]
    assert {r.steps for r in recipes if hasattr(r, "num_mask_patches")} == {9}
    assert [arm.name for arm in some.arms] == ["40 %", "10 %"]  # the base stays the first
    assert study.stages["pretrain"][1]["steps"] == 450
    assert changed_study(study, [], []) == study


@pytest.mark.parametrize(
    "arms, changes, says",
    [
        (["90 %"], [], "--arms '90 %' needs '40 %' too, to compare with"),
        (["40%"], [], r"unknown arm of mask-ratio '40%' \(do you mean 40 %\?\)"),
        ([], ["steps=3"], "unknown stage of mask-ratio 'steps'|is no stage.field=value"),
        ([], ["pretrain.steps"], "is no stage.field=value, such as pretrain.steps=200"),
        (
            [],
            ["pretrian.steps=3"],
            r"unknown stage of mask-ratio 'pretrian' \(do you mean pretrain",
        ),
        ([], ["pretrain.stps=3"], r"unknown field of a pretrain recipe 'stps' \(do you mean steps"),
    ],
)
def test_wrong_changes(arms, changes, says):
    with pytest.raises(BeitError, match=says):
        changed_study(study_named("mask-ratio", "nano"), arms, changes)


def test_wrong_names():
    with pytest.raises(BeitError, match=r"unknown study 'maskratio' \(do you mean mask-ratio\?\)"):
        study_named("maskratio", "nano")
    with pytest.raises(BeitError, match="unknown scale of mask-ratio 'huge'"):
        study_named("mask-ratio", "huge")
