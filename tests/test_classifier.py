"""The classifier: pooled by hand, its quiet start, timm's logits, and whose class is whose."""

import math

import pytest
import torch
import torch.nn.functional as F
from timm.models.beit import Beit

from beit_nb import BeitError
from beit_nb.classifier import BeitForImageClassification, match_classes, names_known

SIZE = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)


def network(**fields):
    "A classifier whose parameters are all different."
    torch.manual_seed(0)
    model = BeitForImageClassification(5, **SIZE, **fields).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


def test_the_mean_of_the_patches_or_the_class_token_by_hand():
    x = torch.randn(3, 3, 32, 32)

    mean = network()
    pooled = mean.fc_norm(mean.forward_features(x)[:, 1:].mean(1))
    torch.testing.assert_close(mean(x), pooled @ mean.head.weight.T + mean.head.bias)
    token = network(use_mean_pooling=False)
    pooled = token.norm(token.forward_features(x))[:, 0]
    torch.testing.assert_close(token(x), pooled @ token.head.weight.T + token.head.bias)


def test_a_fresh_head_knows_nothing_quietly():
    torch.manual_seed(0)
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
    quiet = BeitForImageClassification(5, **SIZE)
    loud = BeitForImageClassification(5, init_scale=30.0, **SIZE)

    assert abs(F.cross_entropy(quiet(x), y).item() - math.log(5)) < 1e-3
    assert abs(F.cross_entropy(loud(x), y).item() - math.log(5)) > 1e-1


@pytest.mark.parametrize("mean", (True, False))
def test_timm_says_the_same_with_our_weights(mean):
    ours = network(use_mean_pooling=mean)
    pool = "avg" if mean else "token"
    theirs = Beit(num_classes=5, **SIZE, use_abs_pos_emb=True, global_pool=pool).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 3, 32, 32)

    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_synsets_are_numbered_as_everybody_does():
    from timm.data import ImageNetInfo

    for count, name in ((1000, "imagenet-1k"), (21841, "imagenet-22k")):
        wanted = ImageNetInfo(name).label_names()[5:8]
        known = names_known(["tench, Tinca tinca"], count, wanted)
        assert match_classes(known, count, wanted, "net", "data").tolist() == [5, 6, 7]
    own = names_known(["n00000001"], 1000, ["n01440764"])
    assert own == ["n00000001"]  # it has names of that kind itself


def test_classes_find_their_numbers_by_name_or_in_order():
    known = ["ant", "bee", "cat"]

    assert match_classes(known, 3, ["cat", "ant"], "net", "data").tolist() == [2, 0]
    assert match_classes([], 2, ["b", "a"], "net", "data").tolist() == [0, 1]


@pytest.mark.parametrize(
    "known, wanted, said",
    [
        (["ant", "bee"], ["ant", "dog"], "1 of the 2 classes of data are unknown to net [(]dog[)]"),
        ([], ["ant", "bee", "cat"], "net tells 2 classes apart, without names, but data has 3"),
        (["crane", "crane"], ["crane"], "net has several classes called 'crane'"),
    ],
)
def test_classes_that_do_not_match_are_one_line(known, wanted, said):
    with pytest.raises(BeitError, match=said):
        match_classes(known, 2, wanted, "net", "data")
