"Nearest neighbours against scikit-learn, the effective rank against closed forms, refusals."

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from beit_nb import BeitError
from beit_nb.classifier_files import build_classifier
from beit_nb.configs import check_recipe
from beit_nb.engine.log import read_log
from beit_nb.engine.runs import load_checkpoint
from beit_nb.neighbours import (
    OnlineNeighbours,
    effective_rank,
    knn_scores,
    nearest_rows,
    neighbour_scores,
    pooled_features,
)
from beit_nb.pretraining import pretrain
from beit_nb.recipes import recipe_named
from beit_nb.task_configs import ProbeRecipe
from beit_nb.tokenizer import train_tokenizer


def clouds(n, seed, classes=5, width=16):
    "Features (n, D) around one centre a class, of different lengths, and labels (n,)."
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    features = np.eye(classes, width)[labels] + rng.normal(size=(n, width))
    return (features * rng.uniform(0.5, 2, (n, 1))).astype("float32"), labels


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_the_vote_is_scikit_learns(temperature):
    "Theirs are Euclidean distances of unit vectors: cosine = 1 - distance² / 2."
    train = clouds(300, 0)
    asked, truth = clouds(200, 1)
    ks = [1, 5, 20, 100]

    ours = knn_scores(train, [(asked, truth)], ks, temperature)[:, 0]

    unit_train, unit_asked = (
        x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train[0], asked)
    )
    theirs = [
        KNeighborsClassifier(k, weights=lambda d: np.exp((1 - d**2 / 2) / temperature))
        .fit(unit_train, train[1])
        .score(unit_asked, truth)
        for k in ks
    ]
    np.testing.assert_allclose(ours, theirs, atol=1e-9)
    assert len(set(theirs)) > 1  # k matters here


def test_portions_change_nothing():
    train, held_out = clouds(101, 0), clouds(53, 1)
    known, asked = torch.tensor(train[0]), torch.tensor(held_out[0])

    cosines, rows = nearest_rows(asked, known, 10)
    in_portions = nearest_rows(asked, known, 10, chunk=7)
    scores = [knn_scores(train, [held_out], [1, 10], chunk=c).tolist() for c in (7, 4096)]

    torch.testing.assert_close(in_portions[0], cosines)
    assert torch.equal(in_portions[1], rows)
    assert scores[0] == scores[1]
    ranks = [effective_rank(train[0], centered=True, chunk=c) for c in (7, 4096)]
    assert ranks[0] == pytest.approx(ranks[1], rel=1e-9)


@pytest.mark.parametrize("shape", [(90, 30), (30, 90)])
@pytest.mark.parametrize("k", [1, 4, 20])
def test_rank_of_equal_singular_values(shape, k):
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(n, k)))[0] for n in shape)

    assert effective_rank(left @ right.T) == pytest.approx(k, rel=1e-6)


def test_rank_of_two_values_and_of_nothing():
    "Singular values 3 and 1: shares 3/4 and 1/4."
    x = np.zeros((5, 4))
    x[0, 0], x[1, 1] = 3, 1

    want = np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    assert effective_rank(x) == pytest.approx(want)
    assert effective_rank(np.zeros((5, 4))) == 0
    assert effective_rank(np.ones((5, 4)), centered=True) == 0


def test_no_temperature_is_too_small():
    train = clouds(50, 0)

    tiny, one = (knn_scores(train, [clouds(40, 1)], [k], t) for k, t in ((20, 1e-12), (1, 0.07)))

    assert (tiny == one).all()  # the nearest decides alone


def test_both_poolings_are_the_streams():
    net = build_classifier(recipe_named("finetune", "nano", depth=2, drop_path_rate=0.0), 2).eval()
    images = torch.rand(3, 3, 32, 32)

    mean, cls = pooled_features(net, images, chunk=2)

    with torch.no_grad():
        streams = torch.stack(net.forward_intermediates((images - 0.5) / 0.5))
    torch.testing.assert_close(torch.tensor(mean), streams[:, :, 1:].mean(2), atol=0.02, rtol=0.02)
    torch.testing.assert_close(torch.tensor(cls), streams[:, :, 0], atol=0.02, rtol=0.02)


def test_a_given_k_and_a_chosen_one():
    "Validation alone chooses, and more neighbours than labelled pictures are all of them."
    train, val, test = clouds(60, 0), clouds(80, 1), clouds(70, 2)
    sets = [(f[None], y) for f, y in (train, val, test)]
    draws = [np.arange(0, 30), np.arange(30, 60)]

    found = neighbour_scores(sets[0], sets[1:], draws, 500, 0.07)

    halves = [(train[0][rows], train[1][rows]) for rows in draws]
    everyone = [knn_scores(half, [test], [30])[0, 0] for half in halves]
    assert found["given"]["k"] == 30
    assert found["given"]["runs"] == pytest.approx(everyone)
    by_k = {
        k: np.mean([knn_scores(half, [val], [k]) for half in halves]) for k in (1, 2, 5, 10, 20)
    }
    chosen = found["chosen"]["k"]
    chosen_on_val = np.mean([knn_scores(half, [val], [chosen]) for half in halves])
    assert chosen_on_val >= max(by_k.values())
    other = neighbour_scores(sets[0], [sets[1], sets[1]], draws, 500, 0.07)
    assert other["chosen"]["k"] == chosen


def test_refusals():
    train = clouds(10, 0)
    broken = train[0].copy()
    broken[3, 3] = np.nan

    for ks in ([0], [11], [1, 11]):
        with pytest.raises(BeitError, match="of 10 labelled pictures: choose 1 to all"):
            knn_scores(train, [train], ks)
    with pytest.raises(BeitError, match="temperature 0 weighs no vote"):
        knn_scores(train, [train], [1], 0)
    with pytest.raises(BeitError, match="not finite"):
        knn_scores(train, [(broken, train[1])], [1])
    with pytest.raises(BeitError, match="not finite"):
        effective_rank(broken)


def test_the_recipe_asks_as_the_field_does():
    assert (ProbeRecipe().knn_k, ProbeRecipe().knn_temperature) == (20, 0.07)


ONLINE = dict(vocab_size=32, embed_dim=32, num_heads=2, depth=2, batch_size=16, precision="fp32")
ONLINE |= dict(steps=6, log_every=2, checkpoint_every=2, watch_every=None)


@pytest.fixture(scope="module")
def alphabet(tmp_path_factory):
    out = f"{tmp_path_factory.mktemp('alphabet')}/tok"
    small = dict(vocab_size=32, width=16, code_dim=16, steps=1, batch_size=32)
    train_tokenizer(recipe_named("tokenizer", "nano", out=out, **small), quiet=True)
    return out


@pytest.mark.slow
def test_the_training_does_not_feel_that_it_is_asked(tmp_path, alphabet):
    """Weights and log are those of a run that nobody asks, and of one that was stopped.

    The one that goes on is asked otherwise than before: that is no other run.
    """
    weights, logs = {}, {}
    for name, calls in {
        "plain": [{}],
        "asked": [dict(online_knn=3)],
        "stopped": [dict(online_knn=3, max_steps=4), dict(online_knn=2)],
    }.items():
        for changes in calls:
            fields = ONLINE | dict(out=f"{tmp_path}/{name}", tokenizer=alphabet) | changes
            pretrain(recipe_named("pretrain", "nano", **fields), quiet=True)
        weights[name] = load_checkpoint(tmp_path / name)["model"]
        logs[name] = read_log(tmp_path / name)

    for name in ("asked", "stopped"):
        assert all(torch.equal(x, weights[name][k]) for k, x in weights["plain"].items())
        for ours, plain in zip((row for row in logs[name] if "loss" in row), logs["plain"]):
            assert all(ours[k] == plain[k] for k in ("step", "loss", "mlm_acc", "grad_norm"))
    told = {name: {r["step"]: r["knn"] for r in logs[name] if "knn" in r} for name in logs}
    assert told["plain"] == {} and [*told["asked"]] == [3, 6] and 6 in told["stopped"]
    assert told["asked"][6] == told["stopped"][6] and 0.1 < told["asked"][6] < 1


def test_without_labels_it_is_refused_before_the_training(tmp_path, photos):
    r = recipe_named("pretrain", "nano", online_knn=2, data=str(photos), out=f"{tmp_path}/run")

    with pytest.raises(BeitError, match="train"):
        OnlineNeighbours(r)


def test_processes_that_share_the_weights_cannot_be_asked(tmp_path):
    r = recipe_named("pretrain", "nano", online_knn=2, parallel="fsdp")

    with pytest.raises(BeitError, match="parallel ddp"):
        check_recipe(r)
