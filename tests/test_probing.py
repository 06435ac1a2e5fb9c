"Linear probes: the fit, the choice of a layer, and a checkpoint on a folder of pictures."

import re
import shutil

import numpy as np
import pytest
import torch
from helpers import red_and_blue
from helpers_models import shaken
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from beit_nb import BeitError, probing
from beit_nb.checkpoints import save_official, to_timm
from beit_nb.data import open_data
from beit_nb.engine.runs import save_checkpoint
from beit_nb.images import IMAGENET_MEAN_STD
from beit_nb.limits import as_config
from beit_nb.mim import BeitForMaskedImageModeling
from beit_nb.neighbours import best_on_val
from beit_nb.pretraining import build_mim
from beit_nb.probing import STRENGTHS, linear_scores, probe, raw_pixels
from beit_nb.recipes import recipe_named
from beit_nb.task_configs import ProbeRecipe

pytestmark = pytest.mark.usefixtures("pages_unpainted")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return red_and_blue(tmp_path_factory.mktemp("pictures"))


def test_the_small_fit_is_the_direct_fit():
    "Rotated onto the span of the training rows, the accuracies are those of the plain pipeline."
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 40)
    t = rng.integers(0, 3, 60)

    # five constant features
    def make(labels):
        return (
            rng.normal(size=(len(labels), 300)) * (np.arange(300) > 4)
            + 1.5 * np.eye(3, 300, 10)[labels]
        )

    x = make(y)
    h = make(t)
    want = [
        [
            make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=5000, tol=1e-8))
            .fit(x, y)
            .score(h, t)
        ]
        for c in STRENGTHS
    ]
    assert np.abs(linear_scores((x, y), [(h, t)]) - want).max() <= 1 / 60


def test_probe_of_a_folder(folder, tmp_path, capsys):
    pre = recipe_named("pretrain", "nano", tokenizer="none", embed_dim=32, depth=2, num_heads=2)
    body = build_mim(pre)
    save_checkpoint(
        tmp_path / "pre.pt", dict(model=body.state_dict(), config=as_config("pretrain", pre))
    )
    m = probe(
        ProbeRecipe(
            data=str(folder),
            init=str(tmp_path / "pre.pt"),
            out=str(tmp_path / "probe"),
            labels_per_class=4,
            draws=2,
            batch_size=5,
        )
    )
    assert (
        m["labels"] == 8
        and m["pixels"]["mean"] == 1
        and len(m["pretrained"]["layers"]) == 2
        and re.search(r"pixels: 1\.000", capsys.readouterr().out)
    )
    assert list(m["pretrained"]["knn"]) == list(m["random"]["rank"]) == ["mean", "cls"]
    assert list(m["pixels"]["knn"]) == ["all"] and m["pixels"]["knn"]["all"]["given"]["mean"] == 1
    assert m["pretrained"]["knn"]["cls"]["given"]["k"] == 8  # all that have labels
    assert all(len(ranks) == 2 for ranks in m["pretrained"]["rank"]["cls"].values())


@pytest.mark.slow
def test_anybodys_weights_are_probed(folder, tmp_path, capsys):
    "One network in five spellings has one score; a page of a web site has none."
    r = recipe_named(
        "pretrain", "nano", tokenizer="none", embed_dim=128, depth=2, num_heads=2,
        pos_embed_init="normal", weight_init="beit", mean_std="imagenet",
    )  # fmt: skip
    body = shaken(build_mim(r))
    state = body.state_dict()
    run = dict(model=state, config=as_config("pretrain", r))
    save_checkpoint(tmp_path / "run.pt", run)
    save_official(body, tmp_path / "official.pth")
    torch.save(to_timm(body), tmp_path / "timm.pth")
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "plain.safetensors")
    body.save_pretrained(tmp_path / "hf", mean_std=IMAGENET_MEAN_STD)
    common = dict(data=str(folder), labels_per_class=4, draws=1)

    found = {
        name: probe(ProbeRecipe(init=f"{tmp_path}/{name}", out=f"{tmp_path}/of-{name}", **common))
        for name in ("run.pt", "official.pth", "timm.pth", "plain.safetensors", "hf")
    }

    want = found.pop("run.pt")
    assert len(want["pretrained"]["layers"]) == 2
    for name, got in found.items():
        assert got["pretrained"] == want["pretrained"], name
    (tmp_path / "page.pth").write_text("<!doctype html><title>Sign in</title>")
    with pytest.raises(BeitError, match="a page of a web site"):
        probe(ProbeRecipe(init=f"{tmp_path}/page.pth", out=f"{tmp_path}/of-page", **common))


def test_a_set_that_chooses_and_is_reported_is_read_once(folder, tmp_path, monkeypatch, capsys):
    "By the second process of two, which says nothing."
    pre = recipe_named("pretrain", "nano", tokenizer="none", embed_dim=32, depth=1, num_heads=2)
    state = dict(model=build_mim(pre).state_dict(), config=as_config("pretrain", pre))
    save_checkpoint(tmp_path / "pre.pt", state)
    opened = []

    def noted(data, split, labels, channels):
        opened.append(split)
        return open_data(data, split, labels, channels)

    monkeypatch.setattr(probing, "open_data", noted)
    options = dict(data=str(folder), init=str(tmp_path / "pre.pt"), labels_per_class=4)
    monkeypatch.setattr(probing, "rank", lambda: 1)

    m = probe(ProbeRecipe(out=str(tmp_path / "probe"), draws=1, **options))

    assert capsys.readouterr().out == ""
    assert opened == ["train", "val"] and m["split"] == "val"


def test_networks_without_sound_features(folder, tmp_path, capsys):
    "Of two channels, and of broken numbers: one line, where scikit-learn gave a page."
    form = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1)
    save_official(BeitForMaskedImageModeling(9, **form, in_chans=2), tmp_path / "two.pth")
    broken = BeitForMaskedImageModeling(9, **form)
    broken.blocks[0].attn.proj.weight.data[0, 0] = float("nan")
    save_official(broken, tmp_path / "nan.pth")
    common = dict(data=str(folder), labels_per_class=4, draws=1, out=f"{tmp_path}/out")

    with pytest.raises(BeitError, match="left out: .*; a network of 2 channels is asked for"):
        probe(ProbeRecipe(init=f"{tmp_path}/two.pth", **common))
    with pytest.raises(FloatingPointError, match="features .pretrained. are not finite"):
        probe(ProbeRecipe(init=f"{tmp_path}/nan.pth", **common))


def test_labels_of_one_class_are_refused(tmp_path):
    "scikit-learn's fit ended in a traceback."
    network = BeitForMaskedImageModeling(
        9, img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1
    )
    save_official(network, tmp_path / "mim.pth")
    data = red_and_blue(tmp_path / "pictures")
    for split in ("train", "val"):
        shutil.rmtree(data / split / "blue")

    with pytest.raises(BeitError, match="labels of one class only, so there is nothing to tell"):
        probe(ProbeRecipe(init=f"{tmp_path}/mim.pth", data=str(data), out=str(tmp_path / "probe")))


def test_without_a_checkpoint_it_says_which_option(tmp_path):
    with pytest.raises(BeitError, match="needs --init"):
        probe(ProbeRecipe(out=str(tmp_path / "probe")))

    assert not (tmp_path / "probe" / "config.json").exists()  # the folder is free for another try


def test_the_choice_never_sees_the_reported_set():
    scores = np.random.default_rng(0).random((3, 4, 5, 2))
    other = scores.copy()
    other[..., 1] = 0.5
    assert (
        best_on_val(scores)["layer"] == best_on_val(other)["layer"]
        and best_on_val(other)["mean"] == 0.5
        and best_on_val(other)["std"] == 0
    )


def test_large_pictures_are_averaged_for_the_pixel_arm():
    x = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    want = x.float().view(2, 3, 32, 2, 32, 3).mean((3, 5)) / 255
    np.testing.assert_allclose(raw_pixels(x)[0], want.flatten(1), atol=1e-6)
