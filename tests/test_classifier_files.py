"Classifiers from anybody's weights: what comes along, what stays behind, what is told."

import shutil
from dataclasses import replace

import pytest
import torch
from helpers import red_and_blue
from helpers_finetuning import PLUS, TINY, quick
from helpers_models import shaken
from safetensors.torch import save_file

from beit_nb import BeitError
from beit_nb.checkpoints import save_official
from beit_nb.classifier import BeitForImageClassification
from beit_nb.classifier_files import build_from_checkpoint, load_classifier
from beit_nb.finetuning import finetune
from beit_nb.mim import BeitForMaskedImageModeling
from beit_nb.recipes import recipe_named
from beit_nb.task_configs import FinetuneRecipe

pytestmark = pytest.mark.usefixtures("pages_unpainted")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return red_and_blue(tmp_path_factory.mktemp("pictures"))


def of_timm(folder):
    from timm.models.beit import Beit

    shape = {k: TINY[k] for k in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
    theirs = shaken(Beit(num_classes=5, use_rel_pos_bias=True, init_values=0.1, **shape))
    torch.save(theirs.state_dict(), folder / "timm.pth")
    return folder / "timm.pth"


def of_hugging_face(folder):
    from transformers import BeitConfig, BeitForMaskedImageModeling as Theirs

    config = BeitConfig(
        vocab_size=11,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        image_size=16,
        patch_size=4,
        layer_norm_eps=1e-6,
        use_mean_pooling=True,
        use_mask_token=True,
        use_shared_relative_position_bias=True,
    )
    shaken(Theirs(config)).save_pretrained(folder / "hf")
    return folder / "hf"


def of_the_official_code(folder):
    shape = {k: TINY[k] for k in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
    shared = dict(use_abs_pos_emb=False, use_shared_rel_pos_bias=True, init_values=0.1)
    ours = shaken(BeitForMaskedImageModeling(vocab_size=11, **shape, **shared))
    save_official(ours, folder / "official.pth")
    return folder / "official.pth"


def of_safetensors(folder):
    content = torch.load(of_the_official_code(folder), weights_only=True)
    save_file(content["model"], folder / "x.safetensors")
    return folder / "x.safetensors"


@pytest.mark.parametrize("write", [of_timm, of_hugging_face, of_the_official_code, of_safetensors])
@pytest.mark.parametrize("changes", [{}, dict(img_size=24, in_chans=1)])
def test_it_starts_from_anybodys_weights(write, changes, folder, tmp_path):
    "The body as `from_pretrained` has it, for larger and gray pictures too; norm and head are new."
    init = write(tmp_path)
    r = quick(folder, tmp_path / "run", init=str(init), init_scale=0.001, **PLUS | changes)
    if write is of_timm:
        r = replace(r, use_abs_pos_emb=True)

    model = build_from_checkpoint(r, 2)
    metrics = finetune(r, quiet=True)
    tuned, again, _ = load_classifier(tmp_path / "run")

    known = BeitForImageClassification.from_pretrained(init, num_classes=2, **changes)
    for name, p in model.state_dict().items():
        if not name.startswith(("head.", "fc_norm.")):
            assert torch.equal(p, known.state_dict()[name]), name
    assert model.head.weight.abs().max() < 0.001
    assert (model.fc_norm.weight == 1).all() == (write is not of_timm)  # that one has been trained
    assert metrics["steps"] == 2 and again == r
    side = r.img_size
    assert tuned(torch.randn(1, 3, side, side)).shape == (1, 2)


def test_weights_of_another_shape_or_color_are_told(folder, tmp_path, capfd):
    r = quick(folder, tmp_path / "run", init=str(of_timm(tmp_path)), **PLUS)
    r = replace(r, use_abs_pos_emb=True)

    with pytest.raises(BeitError, match="depth is 2 in the checkpoint, but 3 in this model"):
        build_from_checkpoint(replace(r, depth=3), 2)
    with pytest.raises(BeitError, match=r"init_values \(LayerScale\) must be the checkpoint's"):
        build_from_checkpoint(replace(r, init_values=None), 2)
    with pytest.raises(BeitError, match="use_rel_pos_bias"):
        build_from_checkpoint(replace(r, use_rel_pos_bias=False), 2)
    capfd.readouterr()
    build_from_checkpoint(replace(r, mean_std="imagenet"), 2)
    assert capfd.readouterr().err == ""
    build_from_checkpoint(r, 2)
    assert "see --mean-std" in capfd.readouterr().err


def test_broken_weights_are_named_before_a_training(folder, tmp_path):
    state = torch.load(of_timm(tmp_path), weights_only=True)
    state["blocks.1.mlp.fc1.weight"][0, 0] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    r = quick(folder, tmp_path / "run", init=str(tmp_path / "nan.pth"), **PLUS)

    with pytest.raises(BeitError, match=r"nan.pth are broken.*\(blocks.1.mlp.fc1.weight\)"):
        finetune(r, quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("renamed", (False, True))
def test_a_head_for_other_classes_stays_behind(tmp_path, folder, capsys, renamed):
    first = FinetuneRecipe(data=str(folder), out=str(tmp_path / "first"), **TINY)
    finetune(first, quiet=True)
    others = shutil.copytree(folder, tmp_path / "others")
    if renamed:  # as many, but others
        for split in ("train", "val"):
            (others / split / "red").rename(others / split / "apple")
    again = replace(
        first, data=str(others), out=str(tmp_path / "again"), init=first.out, lr=1e-12, min_lr=0.0
    )

    finetune(again, quiet=True)

    heads = [load_classifier(out)[0].head.weight for out in (first.out, again.out)]
    assert torch.allclose(*heads, rtol=0, atol=1e-9) == (not renamed)
    told = "knows other classes or another order; a fresh one starts" in capsys.readouterr().err
    assert told == renamed


@pytest.mark.parametrize(("had", "wanted"), [(5, 3), (5, 1), (3, 5), (4, 5)])
def test_weights_of_another_number_of_bands_begin_with_a_line(had, wanted, tmp_path, capfd):
    size = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2)
    start = BeitForImageClassification(4, in_chans=had, **size)
    save_official(start, tmp_path / "bands.pth")
    plain = dict(init=str(tmp_path / "bands.pth"), in_chans=wanted, augment="none")
    recipe = recipe_named("finetune", "nano", **plain, **size)

    model = build_from_checkpoint(recipe, 4)

    kernels = [x.patch_embed.proj.weight for x in (start, model)]
    kept = [kernels[0].sum(1)] if wanted == 1 else [kernels[0][:, 0] * had / wanted]
    assert torch.allclose(kernels[1][:, 0], kept[0])
    said = capfd.readouterr().err
    assert f"bands.pth read {had} channels, and this recipe {wanted}" in said
    assert ("the sum of their kernels" in said) == (wanted == 1)
