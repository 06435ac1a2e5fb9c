"Stages of the demo: done once, and believed only if they are its own."

import json
from dataclasses import replace

import pytest
from helpers_demo import STAGE_FIGURES, count_calls

from beit_nb import BeitError
from beit_nb.demo_stages import ARMS, FIGURES, QUICK, DemoPlan, read_stage, settings_of, stage
from beit_nb.engine.files import write_json


def test_a_stage_is_done_once(tmp_path):
    plan = DemoPlan(str(tmp_path))

    first, worked = count_calls(plan)
    second, worked_again = count_calls(plan)

    assert (worked, worked_again) == (1, 0)
    assert first == second and first["answer"] == 42 and first["seconds"] >= 0


ONE_RATE = dict.fromkeys(ARMS, (1e-3,))
OTHERS = [dict(seed=1), QUICK, dict(draws=2), dict(lrs=ONE_RATE), dict(pretrain_steps=1)]


@pytest.mark.parametrize("changes", OTHERS)
def test_a_stage_of_another_plan_is_refused(tmp_path, changes):
    plan = DemoPlan(str(tmp_path / "demo"))
    (tmp_path / "demo").mkdir()
    count_calls(plan)

    with pytest.raises(BeitError) as e:
        count_calls(replace(plan, **changes))

    line = str(e.value)
    assert "\n" not in line and line.startswith(f"{plan.out} holds another demo (")
    assert f"{next(iter(changes))} " in line and line.endswith(f"--out {plan.out}-2")


@pytest.mark.parametrize("kept", [{"mse": 0.1}, {"settings": {"version": "0.0"}, "result": {}}])
def test_a_stage_of_another_version_is_refused(tmp_path, kept):
    (tmp_path / "dvae.json").write_text(json.dumps(kept))

    with pytest.raises(BeitError, match="holds another demo .version "):
        stage(DemoPlan(str(tmp_path)), "dvae", lambda plan: {})


def test_the_folder_that_is_offered_is_free(tmp_path):
    plan = DemoPlan(str(tmp_path / "demo"))
    for name in ("demo", "demo-2", "demo-3"):
        (tmp_path / name).mkdir()
    count_calls(plan)

    with pytest.raises(BeitError, match="--out .*/demo-4$"):
        count_calls(replace(plan, seed=1))


WRONG = [None, [], {}, "1", -1, float("nan"), True, 10**400, {"mean": "<script>"}]


@pytest.mark.parametrize("name", FIGURES)
def test_a_strangers_stage_is_one_line(tmp_path, name):
    "Every figure in turn is of another kind; settings may be anything as well."
    plan = DemoPlan(out=str(tmp_path))
    settings = settings_of(plan)
    sound = STAGE_FIGURES[name]
    others = [sound | {key: wrong} for key in sound for wrong in WRONG]
    others += [{key: sound[key] for key in sound if key != missing} for missing in sound]

    write_json(tmp_path / f"{name}.json", {"settings": settings, "result": sound})
    assert read_stage(plan, name) == sound
    for result in [*WRONG, *others]:
        write_json(tmp_path / f"{name}.json", {"settings": settings, "result": result})
        with pytest.raises(BeitError, match="holds no figures of that stage; delete it"):
            read_stage(plan, name)
    for wrong in WRONG[:5]:
        write_json(tmp_path / f"{name}.json", {"settings": wrong, "result": sound})
        with pytest.raises(BeitError, match="holds another demo"):
            read_stage(plan, name)


def test_a_damaged_stage_is_one_line(tmp_path):
    (tmp_path / "probe.json").write_text('{"settings": {')

    with pytest.raises(BeitError, match=f"^{tmp_path}/probe.json is damaged .*; delete it"):
        read_stage(DemoPlan(out=str(tmp_path)), "probe")
