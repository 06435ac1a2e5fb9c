"Bands: what they are made of, which runs belong to them, and where a course leaves one."

import json

import numpy as np
import pytest

from beit_nb import BeitError
from beit_nb.bands import (
    BANDS,
    band_edges,
    band_of,
    check_anchors,
    check_band,
    other_fields,
    read_band,
    recipe_like,
    write_band,
)
from beit_nb.health import RunCourse, columns_of
from beit_nb.recipes import as_config, recipe_named

STEPS = np.arange(20, 820, 20)


def run(top, name, log_every=1, **changes):
    "The folder of a pre-training with a curve of its seed."
    config = as_config("pretrain", recipe_named("pretrain", "nano")) | changes
    noise = np.random.default_rng(config["seed"]).normal(size=len(STEPS))
    losses = 2.5 + 3 * np.exp(-STEPS / 100) + 0.05 * noise
    out = top / name
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config))
    rows = [{"step": int(s), "loss": float(x), "lr": 1e-3} for s, x in zip(STEPS, losses)]
    (out / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[::log_every]))
    return out


@pytest.fixture
def band(tmp_path):
    runs = [run(tmp_path, f"seed-{seed}", seed=seed) for seed in range(3)]
    return write_band(tmp_path / "band.json", runs, "a test")


def course(out, shift=0.0, **config):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    columns = columns_of([row | {"loss": row["loss"] + shift} for row in rows])
    return RunCourse("pretrain", columns, json.loads((out / "config.json").read_text()) | config)


def test_other_seeds_stay_inside(tmp_path, band):
    "Twenty of them: 4 standard deviations, known from three seeds and five lines."
    grades = [
        check_band(course(run(tmp_path, f"new-{seed}", seed=seed)), band)[0].grade
        for seed in range(3, 23)
    ]

    assert grades == ["fine"] * 20


@pytest.mark.parametrize(("shift", "side"), [(0.6, "above"), (-0.6, "below")])
def test_a_course_leaves_it_on_a_side(tmp_path, band, shift, side):
    [finding] = check_band(course(tmp_path / "seed-0", shift), band)

    assert finding.grade == "look" and f": {side} it in 100% of the later lines" in finding.said
    low, high = band_edges(*band.curves["loss"])
    assert f"the band of band (3 runs) is {low[-1]:.3g} to {high[-1]:.3g}" in finding.said


def test_every_second_line_is_compared_as_well(tmp_path, band):
    sparse = course(run(tmp_path, "sparse", log_every=4, seed=7))

    assert check_band(sparse, band)[0].grade == "fine"


def test_where_the_rates_differ_nothing_is_compared(tmp_path, band):
    "Of a recipe with the same peak: another length, another warm-up."
    late = course(tmp_path / "seed-0", 5.0)
    late.columns["lr"] = STEPS, np.full(len(STEPS), 1e-4)

    assert check_band(late, band)[0].grade == "unknown"
    late.config["lr"] = 1e-4  # but of a recipe with another peak everything is
    assert check_band(late, band)[0].grade == "look"


def test_edges_are_four_deviations():
    rng = np.random.default_rng(0)

    low, high = band_edges(STEPS, 10 + rng.normal(size=(3000, len(STEPS))))

    np.testing.assert_allclose(high - low, 8, rtol=0.05)


def test_a_run_belongs_to_the_band_of_its_task(tmp_path, band):
    files = [tmp_path / "band.json"]
    config = as_config("pretrain", recipe_named("pretrain", "nano"))

    assert band_of(config, files).seeds == [0, 1, 2]
    assert band_of(config | {"data": "embedded:digits", "lr": 1.0, "seed": 9}, files)
    assert band_of(config | {"batch_size": 32}, files) is None
    assert band_of(config | {"init": "runs/other"}, files) is None
    assert other_fields(config | {"clip_grad": 1.0}, band) == ["clip_grad 1.0, there 3.0"]


def test_lengths_and_how_a_run_is_computed_are_left_aside(band):
    config = as_config("pretrain", recipe_named("pretrain", "nano"))

    aside = {"steps": 9, "epochs": 3, "precision": "bf16", "compile": True}
    assert other_fields(config | aside, band) == []


@pytest.mark.parametrize("seeds", [(0, 1), (0, 1, 1), (0,)])
def test_less_than_three_seeds_are_no_band(tmp_path, seeds):
    runs = [run(tmp_path, f"{i}-{seed}", seed=seed) for i, seed in enumerate(seeds)]

    with pytest.raises(BeitError, match="three seeds"):
        write_band(tmp_path / "band.json", runs, "")


def test_other_recipes_make_no_band(tmp_path):
    runs = [run(tmp_path, str(seed), seed=seed, lr=1e-3 * (seed + 1)) for seed in range(3)]

    with pytest.raises(BeitError, match="another recipe.*: lr"):
        write_band(tmp_path / "band.json", runs, "")


@pytest.mark.parametrize(
    "said",
    ["[]", "{}", '{"made_with": "", "config": {}, "seeds": [0], "curves": {"loss": [[1], [2]]}}'],
)
def test_a_file_that_is_no_band(tmp_path, said):
    (tmp_path / "x.json").write_text(said)

    with pytest.raises(BeitError, match="x.json is"):
        read_band(tmp_path / "x.json")


def test_the_bands_that_come_along_are_of_presets():
    "Each is of a preset as it is now, and made of three seeds or more."
    files = sorted(BANDS.glob("*.json"))
    assert [file.stem for file in files] == ["pretrain-nano", "tokenizer-nano"]
    for file in files:
        band = read_band(file)
        command, preset = file.stem.split("-", 1)
        now = as_config(command, recipe_named(command, preset))

        assert len(band.seeds) >= 3 and "--write-band" in band.made_with
        assert other_fields(now, band) == [] and band_of(now).name == file.stem


def test_published_points_are_for_base_only():
    n = np.arange(1.0, 301)
    columns = {"loss": (n, n * 0 + 6.9), "epoch": (n, n), "lr": (n, np.linspace(1.5e-3, 1e-5, 300))}

    base = RunCourse("pretrain", columns, {"n_parameters": 91_965_776})
    large = RunCourse("pretrain", columns, {"n_parameters": 304_000_000})
    small_alphabet = RunCourse("pretrain", columns, {"n_parameters": 91_965_776 - 7168 * 769})

    assert check_anchors(base)[0].cause == "outside-the-band"
    assert check_anchors(large) == check_anchors(small_alphabet) == []


def test_the_recipe_most_like_it():
    config = as_config("pretrain", recipe_named("pretrain", "base-in1k", lr=1.5e-2))

    assert recipe_like(config) == ("base-in1k", 1.5e-3)
