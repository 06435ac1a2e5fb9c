"""beit_nb.predicting: what a network says of a picture, in a line, as JSON and on a sheet."""

import json

import numpy as np
import pytest
import timm
import torch
from helpers import beit, refused
from helpers_models import shaken
from PIL import Image, ImageFont
from timm.data import create_transform
from torch.testing import assert_close

from beit_nb import BeitError, UnreadableImage
from beit_nb.checkpoints import save_official
from beit_nb.classifier import BeitForImageClassification
from beit_nb.classifier_files import load_classifier
from beit_nb.engine.decoding import load_image
from beit_nb.images import preprocess, to_tensor
from beit_nb.predicting import (
    GAP,
    SIDE,
    TEXT,
    Prediction,
    Predictor,
    check_grid,
    draw_grid,
    load_picture,
    shorten,
)


def answers(n, color="red", name="cat"):
    thumbnail = Image.new("RGB", (SIDE, SIDE), color)
    return [Prediction(f"{i}.png", [name], [0.5], thumbnail) for i in range(n)]


@pytest.fixture
def pictures(tmp_path):
    "A wide, a tall and a square picture, of noise."
    rng = np.random.default_rng(0)
    files = []
    for i, size in enumerate([(20, 60), (60, 20), (32, 32)]):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(tmp_path / f"{i}.png")
        files.append(tmp_path / f"{i}.png")
    return files


def test_json_is_what_the_network_says(runs, pictures):
    words = ["predict", "--init", runs / "fine", "--images", *pictures, "--top", 10]
    rows = [json.loads(line) for line in beit(*words, "--json").stdout.splitlines()]
    lines = beit(*words).stdout.splitlines()

    model, recipe, classes = load_classifier(runs / "fine")
    x = to_tensor(load_image(pictures[2]))  # already of the network's size
    with torch.no_grad():
        expected = model(preprocess(x[None], recipe.mean_std))[0].softmax(-1)
    said = {p["class"]: p["probability"] for p in rows[2]["predictions"]}
    assert_close(torch.tensor([said[name] for name in classes]), expected, atol=1e-5, rtol=0)
    assert [row["image"] for row in rows] == [str(path) for path in pictures]
    for row, line in zip(rows, lines, strict=True):
        likely = [f"{p['class']} {p['probability']:.3f}" for p in row["predictions"]]
        assert line == f"{row['image']}: {', '.join(likely)}"


def test_every_picture_has_a_line_of_json(runs, pictures, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_text("no picture")
    words = ["predict", "--init", runs / "fine", "--json", "--images"]

    some = [json.loads(x) for x in beit(*words, pictures[0], broken, ok=1).stdout.splitlines()]
    none = [json.loads(x) for x in beit(*words, broken, ok=2).stdout.splitlines()]

    assert [row["image"] for row in some] == [str(pictures[0]), str(broken)]
    assert "predictions" in some[0] and none == some[1:]
    assert none[0].keys() == {"image", "error"} and "broken.png" in none[0]["error"]


def test_grid_has_a_place_for_each_readable_picture(runs, pictures, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_text("no picture")
    sheet = tmp_path / "sheet.PNG"
    words = ["predict", "--init", runs / "fine", "--grid", sheet]

    beit(*words, "--images", pictures[0], broken, *pictures[1:], ok=1)

    with Image.open(sheet) as image:
        assert image.size == (2 * (SIDE + GAP) + GAP, 2 * (SIDE + TEXT + GAP) + GAP)
        assert image.getpixel((GAP + SIDE // 2, GAP + SIDE // 2)) != (255, 255, 255)
        assert image.getpixel((GAP + SIDE // 2, GAP + 3)) == (255, 255, 255)  # above a wide one


@pytest.mark.parametrize("n, columns, rows", [(1, 1, 1), (7, 3, 3), (40, 7, 6)])
def test_sheet_is_about_as_wide_as_high(n, columns, rows):
    sheet = draw_grid(answers(n))

    assert sheet.size == (columns * (SIDE + GAP) + GAP, rows * (SIDE + TEXT + GAP) + GAP)
    colors = {color: count for count, color in sheet.getcolors(2**16) or ()}
    assert colors[(255, 0, 0)] == n * SIDE * SIDE  # nothing lies upon a picture


def test_long_names_do_not_run_into_the_neighbor():
    font = ImageFont.load_default(14)
    assert isinstance(font, ImageFont.FreeTypeFont)

    short = shorten("Chesapeake Bay retriever, a dog of Maryland", font)

    assert short.startswith("Chesapeake Bay") and short.endswith("…")
    assert font.getlength(short) <= SIDE < font.getlength(short + "mm")
    assert shorten("cat", font) == "cat"


@pytest.mark.parametrize(
    "grid, images, says",
    [
        ("a.jpg", ("b.png",), "must be the name of a .png"),
        ("none/a.png", ("b.png",), "no folder that exists"),
        ("./a.png", ("b.png", "a.png"), "one of the pictures"),
        ("a.png", ("b.png",) * 1001, "at most 1,000"),
    ],
)
def test_sheets_that_cannot_be(grid, images, says):
    with pytest.raises(BeitError, match=says):
        check_grid(grid, images)


def test_refused_before_anything_is_asked(runs, pictures):
    before = pictures[0].read_bytes()

    refused("predict", "--init", "none", "--images", *pictures, "--grid", "x.gif", says="x.gif")
    words = ["--images", *pictures, "--grid", pictures[0]]
    refused("predict", "--init", runs / "fine", *words, says="one of the pictures")

    assert pictures[0].read_bytes() == before


# --- anybody's weights

TINY = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1)
NAMES = "ape bee cat dog elk".split()


def shares(said):
    "The probabilities of a prediction of five classes, in the order of the classes."
    numbers = [NAMES.index(c) if c in NAMES else int(c) for c in said.classes]
    return torch.tensor(said.probabilities)[torch.tensor(numbers).argsort()]


def predicted(init, file):
    return shares(Predictor(init)(str(file), load_image(file)))


def answer_of(model, x):
    with torch.no_grad():
        said = model(x)
    return getattr(said, "logits", said)[0].softmax(-1)


@pytest.fixture
def transformers_folder(tmp_path):
    "A BEiT of transformers' own with names, saved by it, with and without a square crop."
    transformers = pytest.importorskip("transformers")
    config = transformers.BeitConfig(
        image_size=32,
        patch_size=8,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        use_relative_position_bias=True,
        layer_norm_eps=1e-6,
        id2label=dict(enumerate(NAMES)),
        label2id={name: i for i, name in enumerate(NAMES)},
    )
    model = shaken(transformers.BeitForImageClassification(config)).eval()

    def save(**preprocessing):
        folder = tmp_path / "hf"
        model.save_pretrained(folder)
        processor = transformers.BeitImageProcessor(
            crop_size=dict(height=32, width=32), image_mean=[0.3, 0.4, 0.5], **preprocessing
        )
        processor.save_pretrained(folder)
        return model, processor, folder

    return save


@pytest.mark.parametrize(
    "preprocessing",
    [
        dict(size=dict(height=32, width=32), do_center_crop=False),
        dict(size=dict(height=48, width=48), do_center_crop=True),
        dict(size=dict(shortest_edge=40), do_center_crop=True),
        dict(size=dict(shortest_edge=40), do_center_crop=True, resample=2),
    ],
)
def test_as_transformers_answers(transformers_folder, pictures, preprocessing):
    model, processor, folder = transformers_folder(**preprocessing)

    for file in pictures:
        x = processor(to_tensor(load_image(file)), return_tensors="pt", do_rescale=False)
        ours = predicted(folder, file)
        assert_close(ours, answer_of(model, x["pixel_values"]), atol=0.02, rtol=0)
    assert set(Predictor(folder).classes) == set(NAMES)


def test_as_timm_answers(tmp_path, pictures, capsys):
    model = timm.models.beit.Beit(
        **TINY, num_classes=5, use_rel_pos_bias=True, use_abs_pos_emb=False, init_values=0.1
    )
    torch.save(shaken(model).eval().state_dict(), tmp_path / "timm.pt")
    transform = create_transform(
        32, interpolation="bicubic", crop_pct=224 / 256, mean=[0.5] * 3, std=[0.5] * 3
    )

    for file in pictures:
        theirs = answer_of(model, transform(load_image(file))[None])
        assert_close(predicted(tmp_path / "timm.pt", file), theirs, atol=1e-5, rtol=0)
    assert capsys.readouterr().err.count("does not name its classes") == 1


def test_official_weights_of_another_size_and_form(tmp_path, pictures, capsys):
    model = shaken(BeitForImageClassification(5, **TINY | dict(img_size=48))).eval()
    save_official(model, tmp_path / "official.pth")
    transform = create_transform(48, interpolation="bicubic", crop_pct=224 / 256)

    said = predicted(tmp_path / "official.pth", pictures[0])

    assert_close(
        said, answer_of(model, transform(load_image(pictures[0]))[None]), atol=1e-5, rtol=0
    )
    refused("predict", "--init", tmp_path / "none.pth", "--images", pictures[0], says="none.pth")


def test_networks_that_can_say_nothing_of_a_picture(tmp_path, pictures):
    "Of two channels, and of broken numbers: `nan` is no probability, and no JSON."
    save_official(BeitForImageClassification(5, **TINY, in_chans=2), tmp_path / "two.pth")
    broken = BeitForImageClassification(5, **TINY)
    broken.head.weight.data[0, 0] = float("nan")
    save_official(broken, tmp_path / "nan.pth")
    asked = ("--images", pictures[0], "--json")

    unread = beit("predict", "--init", tmp_path / "two.pth", *asked, ok=2)
    said = beit("predict", "--init", tmp_path / "nan.pth", *asked, ok=1)

    assert "two.pth reads 2 channels, and" in json.loads(unread.stdout)["error"]
    assert not said.stdout and "not finite" in said.stderr.splitlines()[-1]


def test_a_network_that_guesses_tokens_names_nothing(runs, pictures):
    says = ["has no head for classes", f"beit finetune RECIPE --init {runs / 'pre'}"]

    refused("predict", "--init", runs / "pre", "--images", *pictures, says=says)


def test_a_strip_of_one_pixel_has_a_place_too(runs, tmp_path):
    Image.new("L", (1, 2000), 90).save(tmp_path / "strip.png")
    Image.new("RGB", (3000, 2), "red").save(tmp_path / "line.jpg")
    files = (tmp_path / "strip.png", tmp_path / "line.jpg")

    said = beit(
        "predict", "--init", runs / "fine", "--images", *files, "--grid", tmp_path / "s.png"
    )

    assert len(said.stdout.splitlines()) == 2 and Image.open(tmp_path / "s.png").height > SIDE


@pytest.mark.parametrize("channels", [1, 3])
def test_an_array_of_colors_is_a_picture_like_others(channels, tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (channels, 9, 7), dtype=np.uint8)
    np.save(tmp_path / "x.npy", levels)

    got = load_picture(tmp_path / "x.npy", channels)

    assert got.dtype == torch.uint8 and got.shape == (3, 9, 7)
    assert torch.equal(got, torch.from_numpy(levels).expand(3, -1, -1))


def test_a_file_that_a_network_cannot_read_is_one_line(tmp_path):
    (tmp_path / "torn.tif").write_bytes(b"II*\0 torn")
    np.save(tmp_path / "five.npy", np.zeros((5, 8, 8), np.uint8))

    for file, channels in (("torn.tif", 5), ("five.npy", 4), ("missing.npy", 5)):
        with pytest.raises(UnreadableImage, match=file) as e:
            load_picture(tmp_path / file, channels)

        assert "\n" not in str(e.value)
