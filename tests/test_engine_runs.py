"The folder of a run: checkpoints, what is kept of them, and whose folder it is."

import json
import multiprocessing
import os
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from beit_nb import BeitError
from beit_nb.configs import Run
from beit_nb.engine import runs
from beit_nb.engine.runs import (
    load_checkpoint,
    lock_run_folder,
    numbered_checkpoints,
    open_run,
    prune_checkpoints,
    read_checkpoint,
    run_checkpoints,
    run_config,
    save_checkpoint,
)
from beit_nb.limits import as_config

FORK = multiprocessing.get_context("fork")


def checkpoint(step=1, command="toy", **more):
    return {"config": {"command": command}, "step": step, "x": torch.arange(5_000)} | more


def save_steps(out, steps, **kept):
    last = out / "checkpoints" / "last.pt"
    for step in steps:
        save_checkpoint(last, checkpoint(step))
        prune_checkpoints(last, step, **kept)
    return last


def names(out):
    return sorted(p.stem for p in (out / "checkpoints").glob("step-*.pt"))


class FullDisk:
    def __reduce__(self):
        raise OSError(28, "No space left on device")


def test_a_save_that_fails_leaves_the_one_before(tmp_path):
    path = tmp_path / "deep" / "last.pt"
    save_checkpoint(path, checkpoint(1))

    with pytest.raises(BeitError, match="cannot write .*last.pt: No space left on device; make"):
        save_checkpoint(path, checkpoint(2, y=FullDisk()))

    assert read_checkpoint(path)["step"] == 1
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_nothing_in_a_file_is_run(tmp_path):
    torch.save(checkpoint(model=Evil(tmp_path / "mark")), tmp_path / "evil.pt")

    with pytest.raises(
        BeitError, match="evil.pt asks for .*system, which no weights need: refused"
    ):
        read_checkpoint(tmp_path / "evil.pt")

    assert not (tmp_path / "mark").exists()


def test_damage_is_found_wherever_it_is(tmp_path):
    "One flipped bit at 40 places: refused, or of no consequence. Cut short: refused."
    path = tmp_path / "last.pt"
    save_checkpoint(path, checkpoint())
    good = path.read_bytes()

    refused = 0
    for place in range(0, len(good), len(good) // 40):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        try:
            assert torch.equal(read_checkpoint(path)["x"], checkpoint()["x"])
        except BeitError:
            refused += 1

    assert refused >= 35
    for length in (len(good) // 2, len(good) - 1, 0):
        path.write_bytes(good[:length])
        with pytest.raises(BeitError, match="last.pt is (damaged|empty)"):
            read_checkpoint(path)


def test_a_strangers_file_is_refused(tmp_path):
    torch.save({"weights": torch.ones(1)}, tmp_path / "stranger.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("stranger.pt", "list.pt"):
        with pytest.raises(BeitError, match="not a beit_nb checkpoint: there is no recipe in it"):
            read_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    "name, whose",
    [
        ("blocks.0.attn.qkv.weight", "timm"),
        ("model.blocks.0.attn.q_bias", "the official BEiT code"),
        ("beit.encoder.layer.0.attention.attention.query.weight", "Hugging Face"),
        ("embeddings.cls_token", "Hugging Face"),
        ("state_dict.backbone.layers.0.ln1.weight", "mmpretrain"),
        ("blocks.group_1.block_1.res_path.conv_1.w", "DALL-E"),
        ("fc.weight", "1 tensors, such as fc.weight"),
    ],
)
def test_sound_weights_of_others_are_called_by_name(tmp_path, name, whose):
    "Nested as their authors nest them; nobody is told to delete them."
    content = torch.ones(2)
    for part in reversed(name.split(".", 1) if "." in name else [name]):
        content = {part: content}
    torch.save(content, tmp_path / "other.pth")
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file({name: torch.ones(2)}, tmp_path / "other.safetensors")

    for file in ("other.pth", "old.pth", "other.safetensors"):
        with pytest.raises(BeitError, match=f"{file} is not a beit_nb checkpoint.*{whose}") as e:
            read_checkpoint(tmp_path / file)
        assert "delete" not in str(e.value) and "damaged" not in str(e.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"config": 7},
        {"config": {"command": ["toy"]}},
        {"config": {}},
        {"config": {"command": "toy", "inputs": 3}},
        {"step": -5},
        {"step": 2.5},
        {"step": True},
        {"step": "3"},
        {"model": 3},
        {"model": {"w": 3}},
        {"model": {3: torch.ones(1)}},
        {"model": [torch.ones(1)]},
        {"ema": {"w": None}},
        {"optimizer": None},
        {"scaler": "x"},
        {"data": []},
        {"random": [1, 2]},
        {"classes": "abc"},
        {"classes": ["a", 3]},
    ],
    ids=str,
)
def test_parts_of_another_kind(tmp_path, changes):
    save_checkpoint(tmp_path / "changed.pt", checkpoint() | changes)

    with pytest.raises(BeitError, match="changed.pt is (damaged, or|not a beit_nb)") as e:
        read_checkpoint(tmp_path / "changed.pt")

    assert "\n" not in str(e.value)


@pytest.mark.parametrize("text", ['{"command": 7}', '{"inputs": []}', "[]", "3", "[" * 10**5])
def test_config_that_is_no_recipe(tmp_path, text):
    (tmp_path / "config.json").write_text(text)

    with pytest.raises(BeitError, match="config.json is damaged"):
        run_config(tmp_path)


@pytest.mark.parametrize(
    "keep, milestone_every, steps",
    [(1, None, [80]), (2, None, [70, 80]), (2, 30, [30, 60, 70, 80]), (9, 30, range(10, 90, 10))],
)
def test_which_checkpoints_stay(tmp_path, keep, milestone_every, steps):
    last = save_steps(tmp_path, range(10, 90, 10), keep=keep, milestone_every=milestone_every)

    assert names(tmp_path) == [f"step-{step:07d}" for step in steps]
    assert last.samefile(last.with_name("step-0000080.pt"))
    newest_first = [load_checkpoint(p)["step"] for p in run_checkpoints(tmp_path)]
    assert newest_first == sorted(steps, reverse=True)


def test_a_future_that_was_lost_is_taken_away(tmp_path):
    "After going back to step 20, the milestone of step 60 belongs to another road."
    save_steps(tmp_path, range(10, 70, 10), keep=6, milestone_every=30)

    save_steps(tmp_path, [20], keep=2, milestone_every=30)

    assert names(tmp_path) == ["step-0000010", "step-0000020"]


STRANGERS = ["step-old.pt", "step-0000010-old.pt", "step-12.pt", "checkpoint-old.pt", "step-.pt"]


def test_files_of_other_names_are_let_alone(tmp_path):
    "Somebody keeps copies in the folder of checkpoints: they are neither read nor taken away."
    last = save_steps(tmp_path, [10, 20, 30], keep=2)
    for name in STRANGERS:
        (last.parent / name).write_text("mine")

    save_steps(tmp_path, [40], keep=2)

    assert [*numbered_checkpoints(last.parent)] == [30, 40]
    assert [p.name for p in run_checkpoints(tmp_path)] == ["last.pt", "step-0000030.pt"]
    assert {(last.parent / name).read_text() for name in STRANGERS} == {"mine"}


def test_without_hard_links_the_file_is_copied(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    last = save_steps(tmp_path, [10, 20], keep=1)

    assert names(tmp_path) == ["step-0000020"]
    assert not last.samefile(last.with_name("step-0000020.pt"))
    assert load_checkpoint(last.with_name("step-0000020.pt"))["step"] == 20


def test_the_newest_sound_one_is_taken_and_both_are_named(tmp_path, capsys):
    save_steps(tmp_path, [10, 20, 30], keep=3)
    newest, second, _ = run_checkpoints(tmp_path)
    assert load_checkpoint(tmp_path, "toy")["step"] == 30
    assert capsys.readouterr().err == ""

    newest.write_bytes(b"\x80ashes")

    assert load_checkpoint(tmp_path, ("toy", "pretrain"))["step"] == 20
    [line] = capsys.readouterr().err.splitlines()
    assert f"{newest} is damaged" in line and line.endswith(f"the one before, {second}")


def test_what_cannot_be_loaded(tmp_path):
    save_steps(tmp_path, [10])
    with pytest.raises(
        BeitError, match="comes from `beit toy`, but a checkpoint of `beit pretrain"
    ):
        load_checkpoint(tmp_path, "pretrain")
    with pytest.raises(BeitError, match="no checkpoint at .*nowhere; give a .pt file or the --out"):
        load_checkpoint(tmp_path / "nowhere")
    for path in run_checkpoints(tmp_path):
        path.write_bytes(b"\x80ashes")
    with pytest.raises(BeitError, match="is damaged"):
        load_checkpoint(tmp_path)


@pytest.fixture
def recipe(tmp_path):
    return Run(out=str(tmp_path / "run"), steps=200)


def enter(recipe, resume=True):
    with lock_run_folder("toy", recipe, resume) as out:
        return out


def test_the_recipe_of_a_folder(recipe):
    out = enter(recipe)
    config = as_config("toy", recipe)
    assert json.loads((out / "config.json").read_text()) == config == run_config(out)

    save_checkpoint(out / "checkpoints" / "last.pt", checkpoint() | {"config": config})
    (out / "config.json").unlink()

    assert run_config(out) == config  # the checkpoint knows it too
    with pytest.raises(BeitError, match="holds another run .lr 0.001 there, 0.002 now"):
        enter(replace(recipe, lr=2e-3))
    enter(replace(recipe, workers=2))  # one of CHANGEABLE_FIELDS: welcome
    (out / "config.json").write_text('{"comma')
    with pytest.raises(BeitError, match="config.json is damaged; .* or delete that file"):
        enter(recipe)


def test_folders_that_are_refused(recipe, tmp_path):
    enter(recipe)
    with pytest.raises(BeitError, match="holds a run already, and --no-resume was given"):
        enter(recipe, resume=False)
    (tmp_path / "letter.txt").write_text("no folder")
    with pytest.raises(BeitError, match="--out .*letter.txt is a file, or lies in one; choose"):
        enter(replace(recipe, out=str(tmp_path / "letter.txt")))
    with pytest.raises(BeitError, match="batch_size 0 must be at least 1"):
        enter(replace(recipe, out=str(tmp_path / "new"), batch_size=0))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("saved", [False, True])
def test_a_run_that_fails_before_its_first_checkpoint_frees_the_folder(recipe, saved):
    with pytest.raises(ZeroDivisionError), open_run("toy", recipe) as out:
        if saved:
            save_checkpoint(out / "checkpoints" / "last.pt", checkpoint())
        raise ZeroDivisionError
    assert (out / "config.json").exists() == saved


def hold(recipe, entered, leave):
    with lock_run_folder("toy", recipe):
        entered.set()
        leave.wait(30)


@pytest.mark.parametrize("ending", ["leaves", "is killed"])
def test_two_runs_at_once(recipe, ending):
    "The lock comes back however the process ends."
    entered = FORK.Event()
    leave = FORK.Event()
    other = FORK.Process(target=hold, args=(recipe, entered, leave))
    other.start()
    assert entered.wait(30)

    with pytest.raises(BeitError, match="another run is at work in .*; wait, or choose"):
        enter(recipe)
    if ending == "leaves":
        leave.set()
    else:
        other.kill()
    other.join(30)

    enter(recipe)


def sleep_long(born):
    born.set()
    time.sleep(30)


def test_loader_processes_do_not_keep_the_lock(recipe):
    "They inherit open files, and may live on for a moment when the run has died."
    born = FORK.Event()
    with lock_run_folder("toy", recipe):
        worker = FORK.Process(target=sleep_long, args=(born,))
        worker.start()
    assert born.wait(30)
    enter(recipe)
    worker.kill()
    worker.join(30)


def test_a_file_system_without_locks_is_said(recipe, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(runs.fcntl, "flock", refuse)
    enter(recipe)
    assert "knows no locks; nothing stops a second run" in capsys.readouterr().err


def test_a_damaged_recipe_is_one_line(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xff")
    with pytest.raises(BeitError, match="config.json is damaged; choose another --out, or delete"):
        run_config(tmp_path)


def test_a_folder_of_somebody_else_keeps_its_config(recipe, tmp_path):
    "Such as transformers', whose network could not be read any more."
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text('{"model_type": "beit", "patch_size": 16}')

    with pytest.raises(BeitError, match="config.json is of no run of `beit`; choose another fold"):
        enter(replace(recipe, out=str(theirs)))

    assert [path.name for path in theirs.iterdir()] == ["config.json"]
    assert json.loads((theirs / "config.json").read_text())["model_type"] == "beit"
