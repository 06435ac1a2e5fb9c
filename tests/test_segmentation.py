"""The network for segmentation against Hugging Face's, its names, windows that slide, scores."""

import numpy as np
import pytest
import torch
from helpers_models import FORMS, SIZE, forms, shaken
from transformers import BeitConfig, BeitForSemanticSegmentation as Theirs

from beit_nb import BeitError
from beit_nb.checkpoints import load_weights
from beit_nb.engine.optim import param_groups
from beit_nb.mim import BeitForMaskedImageModeling
from beit_nb.resizing import resize_pos_embed, resize_rel_pos_bias
from beit_nb.segmentation import (
    BeitForSemanticSegmentation,
    confusion_table,
    mean_iou,
    miou_interval,
    picture_counts,
    segmentation_scores,
    slide_inference,
    to_segmentation_names,
    window_starts,
)

torch.set_num_threads(1)
DEEP = SIZE | dict(depth=6)
KINDS = pytest.mark.parametrize("kind", ["setr_pup", "upernet", "linear"])


def pictures(side=32, batch=2):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def trained(model):
    "In eval mode, every number moved, variances upwards."
    torch.manual_seed(0)
    with torch.no_grad():
        for name, x in model.state_dict().items():
            if x.is_floating_point():
                noise = torch.rand_like(x) if name.endswith("var") else torch.randn_like(x)
                x.add_(0.1 * noise)
    return model.eval()


def hugging_face(paper: bool):
    config = BeitConfig(
        image_size=32,
        patch_size=4,
        hidden_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=256,
        use_absolute_position_embeddings=paper,
        use_relative_position_bias=not paper,
        layer_scale_init_value=0.0 if paper else 0.1,
        layer_norm_eps=1e-6,
        num_labels=11,
        out_indices=[2, 3, 5, 6],
    )
    return trained(Theirs(config))


def ours_like(paper: bool, **kwargs):
    name = "paper" if paper else "bias per block, LayerScale"
    return BeitForSemanticSegmentation(11, **DEEP, **FORMS[name], **kwargs).eval()


# The network.


@forms
@KINDS
def test_a_class_for_every_pixel(form, kind):
    model = BeitForSemanticSegmentation(7, kind, channels=8, **SIZE, **FORMS[form])

    logits = model(pictures())

    assert logits.shape == (2, 7, 32, 32)
    logits.square().mean().backward()
    used = [n for n, p in model.named_parameters() if p.grad is not None]
    assert any(n.startswith("blocks.2.") for n in used) and "decode_head.conv_seg.weight" in used


def test_maps_are_the_streams_without_cls():
    model = BeitForSemanticSegmentation(7, "linear", out_indices=(0, 0, 2, 1), **SIZE)
    images = pictures()

    maps = model.feature_maps(images)

    streams = model.forward_intermediates(images)
    for x, block in zip(maps, (0, 0, 2, 1)):
        assert torch.equal(x[1, :, 3, 6], streams[block][1, 1 + 3 * 8 + 6])


def test_auxiliary_heads_are_for_training_only():
    for kind, names in {"setr_pup": 4, "upernet": 1, "linear": 0}.items():
        model = BeitForSemanticSegmentation(7, kind, channels=8, **SIZE).eval()
        images = pictures()

        logits = model.heads(model.feature_maps(images))

        assert len(logits) == 1 + names
        alone = BeitForSemanticSegmentation(7, kind, channels=8, auxiliary=False, **SIZE).eval()
        assert not any(n.startswith("auxiliary_head") for n in alone.state_dict())
        alone.load_state_dict(model.state_dict(), strict=False)
        assert torch.equal(alone(images), model(images))


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(decode_head="psp"), "one of setr_pup, upernet, linear"),
        (dict(out_indices=(0, 1, 2)), "four blocks of 0 to 2"),
        (dict(out_indices=(0, 1, 2, 3)), "four blocks of 0 to 2"),
        (dict(norm="layer"), "'batch' or 'group'"),
    ],
)
def test_refused(changes, words):
    with pytest.raises(BeitError, match=words):
        BeitForSemanticSegmentation(7, **SIZE, **changes)


@KINDS
def test_layers_decay_and_heads_do_not(kind):
    model = BeitForSemanticSegmentation(7, kind, channels=8, **SIZE)

    groups = param_groups(model, 0.05, layer_decay=0.5)

    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scales[id(model.blocks[0].mlp.fc1.weight)] == 0.5**3
    heads = ("decode_head", "auxiliary_head", "fpn")
    around = [p for n, p in model.named_parameters() if n.startswith(heads)]
    assert around and all(scales[id(p)] == 1 for p in around)


@pytest.mark.parametrize(
    "kind, form, count",
    [
        ("setr_pup", "paper", 97_245_166),
        ("upernet", "paper", 163_277_612),
        ("upernet", "bias per block, LayerScale", 163_080_812),
    ],
)
def test_parameters_of_base_at_512(kind, form, count):
    "The shapes of the heads are counted by hand in lesson 60."
    with torch.device("meta"):
        model = BeitForSemanticSegmentation(150, kind, img_size=512, **FORMS[form])

    assert sum(p.numel() for p in model.parameters()) == count


# Weights from elsewhere.


@pytest.mark.parametrize("paper", [True, False])
def test_hugging_faces_logits(paper):
    "Its out_indices i is the stream after i - 1 blocks: our block i - 2."
    theirs = hugging_face(paper)
    ours = ours_like(paper, out_indices=(0, 1, 3, 4))
    images = pictures()

    ours.load_state_dict(to_segmentation_names(theirs.state_dict()))

    logits, auxiliary = ours.heads(ours.feature_maps(images))
    with torch.no_grad():
        expected = theirs(images).logits
        maps = theirs.fpn(ours.feature_maps(images))
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(auxiliary, theirs.auxiliary_head(maps), atol=1e-4, rtol=0)


def test_hugging_faces_folder(tmp_path):
    from safetensors.torch import load_file

    theirs = hugging_face(paper=False)
    theirs.save_pretrained(tmp_path)
    ours = ours_like(paper=False)

    ours.load_state_dict(to_segmentation_names(load_file(tmp_path / "model.safetensors")))

    in_memory = to_segmentation_names(theirs.state_dict())
    assert ours.state_dict().keys() == in_memory.keys()
    for name, x in ours.state_dict().items():
        assert torch.equal(x, in_memory[name]), name


def official(model):
    "A state dict as the official checkpoints have it."
    around = ("decode_head.", "auxiliary_head.")
    state = {n if n.startswith(around) else f"backbone.{n}": x for n, x in model.named_parameters()}
    state |= {n if n.startswith(around) else f"backbone.{n}": x for n, x in model.named_buffers()}
    for i in range(len(model.blocks)):
        state[f"backbone.blocks.{i}.attn.relative_position_index"] = torch.zeros(65, 65)
    return state


@pytest.mark.parametrize("front", ["", "state_dict.", "module."])
def test_official_names(front):
    model = trained(ours_like(paper=False))
    state = {f"{front}{name}": x for name, x in official(model).items()}
    assert {  # as the conversion script of transformers finds them in the released file
        f"{front}backbone.cls_token",
        f"{front}backbone.blocks.0.attn.q_bias",
        f"{front}backbone.blocks.5.gamma_1",
        f"{front}backbone.fpn1.0.weight",
        f"{front}decode_head.conv_seg.weight",
        f"{front}auxiliary_head.conv_seg.bias",
    } <= state.keys()

    fresh = ours_like(paper=False)
    fresh.load_state_dict(to_segmentation_names(state))

    assert torch.equal(fresh(pictures()), model(pictures()))


def test_what_is_no_beit_is_refused():
    with pytest.raises(BeitError, match="no BEiT"):
        to_segmentation_names({"decode_head.conv_seg.weight": torch.zeros(3)})


@pytest.mark.filterwarnings("ignore")
@KINDS
def test_a_body_from_pre_training_at_another_size(kind):
    "A masked model with one table for all blocks becomes a network for 48 pixels."
    form = FORMS["shared bias, LayerScale"]
    source = trained(BeitForMaskedImageModeling(vocab_size=16, **SIZE, **form))

    model = BeitForSemanticSegmentation.from_pretrained(
        source, num_classes=5, decode_head=kind, img_size=48, num_heads=4
    )

    table = source.rel_pos_bias.relative_position_bias_table
    expected = resize_rel_pos_bias(table, (8, 8), (12, 12))
    for block in model.blocks:
        torch.testing.assert_close(block.attn.relative_position_bias_table, expected)
    assert model(pictures(48)).shape == (2, 5, 48, 48)


@pytest.mark.filterwarnings("ignore")
def test_absolute_positions_are_resized():
    source = trained(BeitForMaskedImageModeling(vocab_size=16, **SIZE))

    model = BeitForSemanticSegmentation.from_pretrained(
        source, num_classes=5, decode_head="linear", img_size=48, num_heads=4
    )

    assert torch.equal(model.pos_embed, resize_pos_embed(source.pos_embed, (8, 8), (12, 12)))


@pytest.mark.filterwarnings("ignore")
def test_the_body_of_hugging_faces_network_in_memory():
    theirs = hugging_face(paper=True)

    weights = load_weights(theirs)

    assert torch.equal(weights.state["pos_embed"], theirs.beit.embeddings.position_embeddings)
    assert not any("head" in name or "fpn" in name for name in weights.state)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_the_body_is_timms(tmp_path):
    "What the four blocks say of a picture is what timm's own network says there."
    from timm.models.beit import Beit

    form = dict(use_abs_pos_emb=False) | FORMS["bias per block, LayerScale"]
    theirs = shaken(Beit(num_classes=5, **SIZE, **form)).eval()
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    said = []
    for block in theirs.blocks:
        block.register_forward_hook(lambda module, args, stream: said.append(stream))
    theirs(pictures(32))

    model = BeitForSemanticSegmentation.from_pretrained(
        tmp_path / "timm.pth", num_classes=7, decode_head="linear", num_heads=4
    )

    for block, x in zip(model.out_indices, model.feature_maps(pictures(32))):
        stream = said[block][:, 1:].mT.unflatten(2, (8, 8))
        torch.testing.assert_close(x, stream, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
@pytest.mark.parametrize("form", ["paper", "bias per block, LayerScale"])
@KINDS
def test_timms_body_at_another_size_is_ours_with_resized_positions(tmp_path, form, kind):
    "timm's weights of 32 pixels read 48: bit for bit our network with the same weights, resized."
    from timm.models.beit import Beit

    timm_form = dict(use_abs_pos_emb=form == "paper") | FORMS[form]
    theirs = shaken(Beit(num_classes=5, **SIZE, **timm_form))
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    wide = SIZE | dict(img_size=48)

    model = BeitForSemanticSegmentation.from_pretrained(
        tmp_path / "timm.pth", num_classes=7, decode_head=kind, img_size=48, num_heads=4
    )

    ours = BeitForSemanticSegmentation(7, kind, **wide, **FORMS[form]).eval()
    state = dict(model.state_dict())  # its fresh heads; all else comes from timm's tensors
    body = {name: x for name, x in theirs.state_dict().items() if name in state}
    for name, x in body.items():
        if name == "pos_embed":
            x = resize_pos_embed(x, (8, 8), (12, 12))
        if name.endswith("relative_position_bias_table"):
            x = resize_rel_pos_bias(x, (8, 8), (12, 12))
        state[name] = x
    around = {name.split(".")[0] for name in state.keys() - body.keys()}
    assert around <= {"decode_head", "auxiliary_head", "fpn1", "fpn2"}
    ours.load_state_dict(state)
    x = pictures(48)
    assert torch.equal(model(x), ours(x)) and model(x).shape == (2, 7, 48, 48)


# Windows.


@pytest.mark.parametrize(
    "side, starts",
    [(512, [0]), (513, [0, 1]), (683, [0, 171]), (853, [0, 341]), (900, [0, 341, 388])],
)
def test_windows_as_mmsegmentation_lays_them(side, starts):
    "max(side - 512 + 341 - 1, 0) // 341 + 1 of them, the last one moved back to the rim."
    assert window_starts(side, 512, 341) == starts
    assert len(starts) == max(side - 512 + 340, 0) // 341 + 1


def test_one_window_is_the_whole():
    model = ours_like(paper=True)
    images = pictures()

    assert torch.equal(slide_inference(model, images, (32, 32), (21, 21)), model(images))


def test_overlaps_are_means():
    x = torch.randn(1, 3, 8, 13)

    def sees_its_window(part):
        return part - part.mean((2, 3), keepdim=True)

    result = slide_inference(sees_its_window, x, (8, 8), (5, 5))

    left = x[..., :8].mean((2, 3), keepdim=True)
    right = x[..., 5:].mean((2, 3), keepdim=True)
    torch.testing.assert_close(result[..., :5], x[..., :5] - left)
    torch.testing.assert_close(result[..., 5:8], x[..., 5:8] - (left + right) / 2)
    torch.testing.assert_close(result[..., 8:], x[..., 8:] - right)


@pytest.mark.parametrize("window, stride", [((64, 32), (21, 21)), ((32, 32), (21, 0))])
def test_windows_that_do_not_fit(window, stride):
    with pytest.raises(BeitError, match="does not fit a side of"):
        slide_inference(torch.square, torch.zeros(1, 3, 32, 48), window, stride)


# Scores.


def test_scores_by_hand():
    "Two ignored pixels; class 3 never occurs; class 2 is answered where it is not."
    labels = torch.tensor([[0, 0, 1, 1], [1, 1, 255, 255]])
    answers = torch.tensor([[0, 2, 1, 1], [1, 0, 0, 3]])

    scores = segmentation_scores(confusion_table(answers, labels, 4))

    # IoU: 1 of 3, 3 of 4, 0 of 1, none; accuracy: 1 of 2, 3 of 4, none, none
    assert scores == pytest.approx(dict(mIoU=(1 / 3 + 3 / 4) / 3, mAcc=0.625, aAcc=4 / 6))
    assert mean_iou(answers, labels, 4) == scores["mIoU"]


def test_tables_add_up():
    g = torch.Generator().manual_seed(3)
    answers = torch.randint(0, 5, (6, 8, 8), generator=g)
    labels = torch.randint(0, 5, (6, 8, 8), generator=g)
    labels[0] = 255

    whole = confusion_table(answers, labels, 5)

    pairs = zip(answers.split(2), labels.split(2))
    assert torch.equal(whole, sum(confusion_table(a, b, 5) for a, b in pairs))
    assert whole.sum() == 5 * 64


def made_up_counts(pictures, classes=4, seed=0):
    "Answers and labels of small pictures, some of which lack a class, and their counts."
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (pictures, 6, 6), generator=g)
    labels[::3][labels[::3] == 2] = 1
    answers = torch.where(torch.rand(labels.shape, generator=g) < 0.7, labels, 0)
    tables = [confusion_table(a, b, classes) for a, b in zip(answers, labels)]
    return answers, labels, torch.stack([picture_counts(table) for table in tables])


def test_the_interval_is_that_of_pictures_drawn_by_hand():
    answers, labels, counts = made_up_counts(20)
    rng = np.random.default_rng(5)
    drawn = [torch.from_numpy(rng.integers(0, 20, 20)) for _ in range(2000)]

    low, high = miou_interval(counts, draws=2000, seed=1)

    scores = [mean_iou(answers[ids], labels[ids], 4) for ids in drawn]
    # the ends of 2000 draws: their standard error is about a tenth of the spread
    assert [low, high] == pytest.approx(np.quantile(scores, [0.025, 0.975]), abs=np.std(scores) / 4)
    assert low < mean_iou(answers, labels, 4) < high


def test_an_interval_holds_the_truth_about_as_often_as_it_says():
    "60 samples of 100 pictures from one world: between 85 and 100 % hold the world's score."
    answers, labels, counts = made_up_counts(6000)
    truth = mean_iou(answers, labels, 4)

    ends = [miou_interval(part, draws=200, seed=i) for i, part in enumerate(counts.split(100))]

    share = np.mean([low <= truth <= high for low, high in ends])
    assert 0.85 <= share <= 1 and np.mean([high - low for low, high in ends]) < 0.1


def test_an_interval_needs_pictures_and_minds_no_empty_ones():
    *_, counts = made_up_counts(20)
    nothing = torch.zeros_like(counts)

    assert miou_interval(torch.cat([counts, nothing])) == miou_interval(counts)
    with pytest.raises(BeitError, match="no picture has a pixel that counts"):
        miou_interval(nothing)
