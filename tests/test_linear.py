"A line on every frozen block in steps: against scikit-learn, stopped, and in two processes."

import json
import multiprocessing
import os

import numpy as np
import pytest
import torch
from helpers import red_and_blue
from helpers_models import shaken
from helpers_processes import PATIENCE, torchrun_environment

from beit_nb import BeitError
from beit_nb.checkpoints import load_weights, save_official
from beit_nb.configs import check_recipe
from beit_nb.data import open_data, sample_labels
from beit_nb.engine.runs import load_checkpoint
from beit_nb.linear import FrozenBody, LinearHeads, last_scores_of_blocks, linear
from beit_nb.mim import BeitForMaskedImageModeling
from beit_nb.neighbours import best_on_val
from beit_nb.networks import NETS
from beit_nb.probing import block_features, linear_scores
from beit_nb.recipes import recipe_named
from beit_nb.task_configs import LinearRecipe

FORK = multiprocessing.get_context("fork")
pytestmark = pytest.mark.usefixtures("pages_unpainted")


@pytest.fixture(scope="module")
def top(tmp_path_factory):
    "Red and blue pictures, and official weights of a small network."
    top = tmp_path_factory.mktemp("linear")
    red_and_blue(top)
    net = BeitForMaskedImageModeling(
        vocab_size=9, img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1
    )
    save_official(shaken(net), top / "official.pth")
    return top


def small(top, out, **changes):
    fields = dict(
        data=str(top), init=f"{top}/official.pth", out=f"{top}/{out}", batch_size=4, epochs=3,
        lr=1e-2, min_lr=0.0, weight_decay=1e-4, precision="fp32",
    )  # fmt: skip
    return LinearRecipe(**fields | changes)


@pytest.mark.slow
def test_steps_reach_what_a_fit_reaches(tmp_path):
    "On 200 labels of the digits: the best block within two standard errors of 1,000 pictures."
    init = str(NETS / "mim.safetensors")
    few = dict(
        labels_per_class=20, batch_size=50, epochs=40, lr=5e-2, eval_every=10**6, split="test"
    )
    r = recipe_named("linear", "nano", init=init, out=str(tmp_path), **few)

    ours = linear(r, quiet=True)

    weights = load_weights(init)
    body = FrozenBody(weights).body
    train, val, test = (open_data("digits", s, labels=True) for s in ("train", "val", "test"))
    ids = sample_labels(train.labels, 20, r.seed)
    x, on_val, on_test = (
        block_features(body, images, weights.mean_std)
        for images in (train.images[ids], val.images, test.images)
    )
    scores = [
        linear_scores((a, train.labels[ids]), [(b, val.labels), (c, test.labels)])
        for a, b, c in zip(x, on_val, on_test)
    ]
    theirs = best_on_val(np.array(scores)[None])["mean"]
    assert theirs > 0.75 and ours["accuracy"] > theirs - 2 * 0.013


def in_one_of_two(recipe, env):
    "The body of a child: one process of two."
    os.environ.update(env)
    linear(recipe, quiet=True)


def test_two_processes_are_one(top):
    "The weights agree to rounding, and the scores exactly."
    alone = linear(small(top, "alone"), quiet=True)
    recipe = small(top, "together")
    family = [
        FORK.Process(target=in_one_of_two, args=(recipe, env)) for env in torchrun_environment(2)
    ]
    for process in family:
        process.start()
    for process in family:
        process.join(PATIENCE)

    assert [process.exitcode for process in family] == [0, 0]
    together = json.loads((top / "together" / "metrics.json").read_text())
    assert together["layers"] == alone["layers"] and together["steps"] == alone["steps"] == 12
    one, two = (load_checkpoint(top / out)["model"] for out in ("alone", "together"))
    for name, w in one.items():
        torch.testing.assert_close(two[name], w, rtol=1e-4, atol=1e-5)


def test_a_line_on_anybodys_weights(top):
    m = linear(small(top, "whole"), quiet=True)

    assert m["finished"] and m["accuracy"] == 1.0 and len(m["layers"]) == 2
    rows = [json.loads(x) for x in (top / "whole" / "log.jsonl").read_text().splitlines()]
    assert any("accuracy" in row for row in rows)


def test_stopped_and_continued_is_the_same(top):
    whole = small(top, "in-one")
    linear(whole, quiet=True)
    for max_steps in (2, None):
        m = linear(small(top, "in-two", max_steps=max_steps), quiet=True)

    assert m["finished"]
    one, two = (load_checkpoint(top / out)["model"] for out in ("in-one", "in-two"))
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def test_heads_together_are_heads_alone(top):
    "The first head of two ends where it ends without the second, bit for bit but for its draw."
    weights = load_weights(top / "official.pth")
    body = FrozenBody(weights, "both")
    x = open_data(str(top), "train", labels=True)

    assert body.width == 128 and body.depth == 2 and len(x) > 3
    heads = LinearHeads(2, 128, 2)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    heads(body(images))[1].sum().backward()
    assert heads.heads[0].weight.grad.abs().sum() == 0 < heads.heads[1].weight.grad.abs().sum()
    assert all(p.grad is None for p in body.body.parameters())


def test_the_block_is_chosen_on_val():
    r = LinearRecipe(split="test")

    found = last_scores_of_blocks(r, [0.2, 0.6, 0.3], [0.9, 0.5, 0.1])

    assert (found["layer"], found["accuracy"], found["layers"]) == (2, 0.5, [0.9, 0.5, 0.1])


def test_refusals(top):
    with pytest.raises(BeitError, match="needs --init"):
        linear(LinearRecipe(out=f"{top}/nothing"))
    two = BeitForMaskedImageModeling(
        9, img_size=32, patch_size=8, embed_dim=64, num_heads=1, in_chans=2
    )
    save_official(two, top / "two.pth")
    with pytest.raises(BeitError, match="no pictures in .*; a network of 2 channels is asked for"):
        linear(small(top, "two", init=f"{top}/two.pth"))
    with pytest.raises(BeitError, match="set parallel ddp"):
        check_recipe(LinearRecipe(parallel="fsdp"))
