"The looks at a pre-training on its way: pictures, TensorBoard, and tokenizers that cannot paint."

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from beit_nb import BeitError
from beit_nb.dalle import DalleEncoder, DalleVAE
from beit_nb.data import open_data
from beit_nb.engine.log import read_log
from beit_nb.engine.sources import Digits
from beit_nb.engine.token_files import tokenize_files
from beit_nb.images import to_float, to_pil
from beit_nb.pretraining import build_mim, pretrain
from beit_nb.recipes import recipe_named
from beit_nb.reconstructions import ReconstructionCallback, look_files, reconstruction_figure
from beit_nb.report import pretrain_pictures
from beit_nb.tokenizer import load_tokenizer, train_tokenizer
from beit_nb.tokens import Tokenizer

pytestmark = pytest.mark.usefixtures("pages_unpainted")

SMALL = dict(batch_size=16, log_every=2, precision="fp32")


def recipe(top, out, **changes):
    small = SMALL | dict(steps=4, watch_every=2, embed_dim=32, num_heads=2, depth=2)
    where = dict(data=f"{top}/pictures", tokenizer=f"{top}/tok", out=f"{top}/{out}")
    return recipe_named("pretrain", "nano", **small | where | changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    top = tmp_path_factory.mktemp("runs")
    (top / "pictures").mkdir()
    for i, image in enumerate(Digits("train", places=1).images[:64]):
        to_pil(to_float(image)).save(top / "pictures" / f"{i:02d}.png")
    small = dict(data=f"{top}/pictures", out=f"{top}/tok", width=32, steps=24, **SMALL)
    train_tokenizer(recipe_named("tokenizer", "nano", **small), quiet=True)
    pretrain(recipe(top, "pre"), quiet=True)
    return top


@pytest.mark.slow
def test_a_look_is_a_picture(runs):
    "OUT/watch/STEP.png shows what the model saw, its guess and the truth: three different rows."
    watch = runs / "pre" / "watch"
    page = np.asarray(Image.open(watch / "0000004.png")).astype(int)
    look = torch.load(watch / "0000004.pt", weights_only=True)
    tokenizer = load_tokenizer(runs / "tok")

    assert sorted(file.name for file in watch.glob("*.png")) == [f"{s:07d}.png" for s in (0, 2, 4)]
    assert page.shape == (3 * 100 + 4, 52 + 6 * 100 + 4, 3)
    seen, guess, truth = (page[4 + 100 * i : 100 + 100 * i, 56:] for i in range(3))
    assert np.abs(guess - truth).max() > 20 and np.abs(seen - guess).max() > 20
    shown = ~look["masks"]
    assert not torch.equal(look["guess"], look["ids"])
    assert torch.equal(look["guess"][shown], look["ids"][shown])
    assert torch.equal(look["ids"], tokenizer.get_codebook_indices(to_float(look["views"])))
    # 32 pixels, three screen pixels each
    painted = (tokenizer.decode(look["ids"])[0] * 255).round().permute(1, 2, 0).int().numpy()
    assert np.abs(truth[:96:3, :96:3] - painted).max() <= 1
    for kept, ids in zip(look["painted"], (look["guess"], look["ids"])):
        assert torch.equal(kept, (tokenizer.decode(ids) * 255).round().to(torch.uint8))


@pytest.mark.slow
def test_a_page_after_a_run_loads_no_tokenizer(runs, monkeypatch):
    "What the decoder made of the tokens is kept; an older run, without, asks the tokenizer."
    asked = []
    monkeypatch.setattr("beit_nb.report.decoder_of", asked.append)
    r = recipe(runs, "pre")

    old = runs / "old" / "watch"
    old.mkdir(parents=True)
    for file in look_files(runs / "pre"):
        look = torch.load(file, weights_only=True)
        torch.save({name: x for name, x in look.items() if name != "painted"}, old / file.name)

    [(figure, caption)] = pretrain_pictures(runs / "pre", r, {})
    assert not asked and "(decoded)" in caption and len(figure.axes) == 6 * (2 + 3 + 1)

    [(_, caption)] = pretrain_pictures(old.parent, r, {})
    assert asked == [r] and "one colour a token" in caption


def test_a_resumed_run_goes_on_with_the_same_pictures(runs):
    "Stopped after two of four steps and continued: the same looks as those of a run in one go."
    pretrain(recipe(runs, "stopped", max_steps=2), quiet=True)
    pretrain(recipe(runs, "stopped"), quiet=True)

    names = sorted(file.name for file in (runs / "pre" / "watch").iterdir())
    assert names == sorted(file.name for file in (runs / "stopped" / "watch").iterdir())
    assert len(names) == 6
    for name in names:
        one, two = (runs / run / "watch" / name for run in ("pre", "stopped"))
        if name.endswith(".png"):
            assert one.read_bytes() == two.read_bytes()
            continue
        looks = [torch.load(file, weights_only=True) for file in (one, two)]
        for key, value in looks[0].items():
            assert np.array_equal(value, looks[1][key]), (name, key)


def test_looks_come_when_they_are_due(tmp_path):
    "Every third step, two files each; and the model goes back to its training."
    views = Digits("val").images[:2]
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[:, 2:5] = True
    watch = ReconstructionCallback(tmp_path, 3, views, masks, torch.zeros(2, 8, 8), None)
    model = build_mim(recipe(tmp_path, "x")).train()

    said = [watch.look(step, model) for step in range(5)]

    assert [look is not None for look in said] == [True, False, False, True, False]
    names = sorted(file.name for file in (tmp_path / "watch").iterdir())
    assert names == ["0000000.png", "0000000.pt", "0000003.png", "0000003.pt"]
    assert model.training


def test_looks_go_to_tensorboard(runs):
    "The engine sends what the callback returns to TensorBoard, and leaves it out of the log."
    pretrain(recipe(runs, "tb", tensorboard=True), quiet=True)

    events = EventAccumulator(str(runs / "tb" / "tb")).Reload()

    assert [event.step for event in events.Images("reconstruction")] == [2, 4]
    assert not [row for row in read_log(runs / "tb") if "reconstruction" in row]


def test_a_tokenizer_that_cannot_paint(tmp_path):
    "DALL-E's encoder alone reads but paints nothing: ids are shown as colors, and looks go on."
    blind = Tokenizer(DalleVAE(DalleEncoder(3, 8, 1, vocab_size=256)))
    views = torch.stack([Digits("val").images[i] for i in range(6)])
    masks = torch.rand(6, 8, 8) < 0.4
    ids = blind.get_codebook_indices(to_float(views))
    watch = ReconstructionCallback(tmp_path, 1, views, masks, ids, blind)

    picture = watch.look(3, build_mim(recipe(tmp_path, "x")))["reconstruction"]

    assert not blind.has_decoder
    assert picture.dtype == np.uint8
    assert np.array_equal(picture, Image.open(tmp_path / "watch" / "0000003.png"))
    cells = picture[204:300, 56:152].reshape(8, 12, 8, 12, 3).swapaxes(1, 2).reshape(64, 144, 3)
    assert (cells == cells[:, :1]).all()  # a cell has one color, and a color is a token
    assert len(np.unique(cells[:, 0], axis=0)) == len(ids[0].unique()) > 1
    assert len(reconstruction_figure(tmp_path, None).axes) == 6 * 4


def test_where_nobody_looked(runs):
    with pytest.raises(BeitError, match="nobody has watched"):
        reconstruction_figure(runs / "tok", None)


def test_tokens_from_disk_are_painted_too(runs):
    "With --tokens no tokenizer runs; if --tokenizer is given still, it paints: the same looks."
    tokenize_files(open_data(f"{runs}/pictures"), load_tokenizer(runs / "tok"), runs / "tokens")

    pretrain(recipe(runs, "table", tokens=f"{runs}/tokens"), quiet=True)

    wanted = (runs / "pre" / "watch" / "0000004.png").read_bytes()
    assert (runs / "table" / "watch" / "0000004.png").read_bytes() == wanted
