"""Regions: sets of patches against masks, who asks, priors, distances, features as colours."""

import pytest
import torch
from helpers_models import SIZE, shaken

from beit_nb.attention import attention_maps, top_mass_mask
from beit_nb.mim import BeitForMaskedImageModeling
from beit_nb.regions import (
    asked_maps,
    attention_distance,
    draw_distances,
    draw_features,
    feature_pca,
    find_subjects,
    fitting_patches,
    grid_distances,
    head_sets,
    mask_iou,
    measure_regions,
    patch_cover,
    prior_scores,
    top_patches,
)
from beit_nb.vit import VisionTransformer


def some_masks(B=6):
    "Rectangles of at least 6 x 6 pixels, (B, 32, 32)."
    g = torch.Generator().manual_seed(2)
    masks = torch.zeros(B, 32, 32, dtype=torch.bool)
    for mask in masks:
        top, left, height, width = torch.randint(6, 16, (4,), generator=g).tolist()
        mask[top : top + height, left : left + width] = True
    return masks


def some_subjects(B=6):
    g = torch.Generator().manual_seed(1)
    return find_subjects(torch.randn(B, 3, 32, 32, generator=g), some_masks(B), (8, 8))


# --- sets and masks


def test_iou_is_that_of_the_pixels():
    masks = some_masks()
    kept = torch.rand(6, 8, 8) < 0.4

    iou = mask_iou(kept, masks)

    pixels = kept.repeat_interleave(4, 1).repeat_interleave(4, 2)
    by_hand = (pixels & masks).sum((1, 2)) / (pixels | masks).sum((1, 2))
    torch.testing.assert_close(iou, by_hand)
    nothing = torch.zeros(1, 8, 8, dtype=torch.bool)
    assert mask_iou(nothing, torch.zeros(1, 32, 32, dtype=torch.bool)) == 0


def test_cover_on_a_grid_that_is_no_square():
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[0, :3] = True
    assert patch_cover(mask, (2, 2)).tolist() == [[0.5, 0], [0, 0]]


def test_top_patches_are_as_many_as_asked_and_none_outside_is_larger():
    scores = torch.randn(3, 4, 5)
    counts = torch.tensor([0, 7, 20])

    kept = top_patches(scores, counts)

    assert kept.sum((1, 2)).tolist() == [0, 7, 20]
    assert scores[1][kept[1]].min() > scores[1][~kept[1]].max()
    assert top_patches(torch.ones(2, 2), torch.tensor(2)).tolist() == [[True, True], [False] * 2]


def test_no_set_fits_better():
    "All sets of patches on a grid of 3 x 3, by enumeration."
    masks = torch.rand(4, 6, 6) < torch.tensor([0.2, 0.4, 0.6, 0.9])[:, None, None]
    masks[:, 0, 0] = True
    every = (torch.arange(512)[:, None] >> torch.arange(9)) % 2 == 1

    area, best = fitting_patches(masks, (3, 3))

    iou = torch.stack([mask_iou(kept.view(3, 3), masks) for kept in every])
    torch.testing.assert_close(best, iou.amax(0))
    cover = patch_cover(masks, (3, 3))
    torch.testing.assert_close(mask_iou(top_patches(cover, area), masks), best)


# --- who asks


def test_the_patch_with_most_of_the_object_asks():
    model = shaken(VisionTransformer(**SIZE)).eval()
    s = some_subjects()

    asked = asked_maps(model, s)

    cover = patch_cover(s.masks, (8, 8)).flatten(1)
    assert torch.equal(cover[torch.arange(6), s.query], cover.amax(1))
    maps = attention_maps(model, s.images)
    for block, probs in enumerate(maps):
        rows = probs[torch.arange(6), :, 1 + s.query, 1:]
        torch.testing.assert_close(asked["patch"][block].flatten(2), rows)
        torch.testing.assert_close(asked["CLS"][block].flatten(2), probs[:, :, 0, 1:])


def test_a_hidden_patch_asks_without_its_pixels():
    model = shaken(BeitForMaskedImageModeling(**SIZE, vocab_size=9)).eval()
    s = some_subjects()
    hole = torch.zeros(6, 64).scatter(1, s.query[:, None], 1).view(6, 8, 8)
    pixels = hole.bool().repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]

    seen, hidden = asked_maps(model, s), asked_maps(model, s, hide=True)

    other = s._replace(images=s.images.masked_fill(pixels, 3.0))
    assert torch.equal(hidden["patch"], asked_maps(model, other, hide=True)["patch"])
    assert not torch.allclose(seen["patch"], asked_maps(model, other)["patch"], atol=1e-3)
    assert not torch.allclose(seen["patch"], hidden["patch"], atol=1e-3)


def test_sets_of_heads_and_of_their_mean():
    maps = torch.rand(2, 3, 4, 5, 5)
    area = torch.tensor([3, 9, 25])

    by_mass, by_area = head_sets(maps), head_sets(maps, area)

    assert by_mass.shape == by_area.shape == (2, 3, 5, 5, 5)
    assert torch.equal(by_mass[:, :, 4], top_mass_mask(maps.mean(2)))
    assert torch.equal(by_area.sum((-2, -1)), area[:, None].expand(2, 3, 5))


def test_priors_see_no_picture():
    s = some_subjects()
    priors = prior_scores(s, (8, 8))

    assert torch.equal(priors["query"].flatten(1).argmax(1), s.query)
    middle = top_patches(priors["centre"], torch.full((6,), 4))
    assert middle[:, 3:5, 3:5].all()
    other = s._replace(images=-s.images)
    assert all(torch.equal(a, priors[name]) for name, a in prior_scores(other, (8, 8)).items())


# --- the measurement


def test_a_head_that_points_at_the_object_is_found(monkeypatch):
    s = some_subjects()
    perfect = patch_cover(s.masks, (8, 8)) + 1e-6

    def maps_of(model, subjects):
        maps = torch.rand(3, 6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        maps[1, :, 2] = perfect
        return {"patch": maps, "CLS": maps.flip(2)}

    monkeypatch.setattr("beit_nb.regions.asked_maps", maps_of)

    found = measure_regions(VisionTransformer(**SIZE), {"val": s, "test": s})

    best = found["patch"]["area"]["best"]
    assert (best["block"], best["head"]) == (1, 2)
    assert best["iou"] == pytest.approx(s.ceiling.mean().item())
    assert best["patches"] == pytest.approx(s.area.float().mean().item())
    assert found["CLS"]["area"]["best"]["head"] == 1
    assert found["patch"]["area"]["heads"][1][2] == pytest.approx(best["iou"])
    centre = top_patches(prior_scores(s, (8, 8))["centre"], s.area)
    assert best["centre"] == pytest.approx(mask_iou(centre, s.masks).mean().item())


def test_the_head_is_chosen_on_val_alone():
    model = shaken(VisionTransformer(**SIZE)).eval()
    val, test = some_subjects(), some_subjects(5)
    turned = test._replace(masks=test.masks.flip(1, 2))

    a = measure_regions(model, {"val": val, "test": test})["patch"]["mass"]["best"]
    b = measure_regions(model, {"val": val, "test": turned})["patch"]["mass"]["best"]

    assert (a["block"], a["head"], a["patches"]) == (b["block"], b["head"], b["patches"])
    assert a["iou"] != b["iou"]


# --- distance


def test_distances_by_hand():
    probs = torch.zeros(1, 2, 7, 7)  # CLS and a grid of 2 x 3
    probs[:, 0] = torch.eye(7)
    probs[:, 1, :, 0] = 0.5  # half of all attention goes to CLS, and does not count
    probs[:, 1, :, 6] = 0.5

    far = attention_distance(probs, (2, 3), 4)

    corner = torch.tensor([5, 2, 1, 4, 1, 0]).sqrt().mean()
    torch.testing.assert_close(far, torch.tensor([[0, 4 * corner]]))
    assert grid_distances((2, 3))[0, 5] == pytest.approx(5**0.5)


def test_the_figure_of_distances_shows_every_head():
    fig = draw_distances({"a": torch.rand(3, 4), "b": torch.rand(3, 4)}, 2.0)
    a, mean, b, _, even = fig.axes[0].lines
    assert len(a.get_xdata()) == len(b.get_xdata()) == 12 and even.get_ydata()[0] == 2
    assert not set(a.get_xdata()) & set(b.get_xdata()) and a.get_marker() != b.get_marker()
    by_hand = torch.tensor(a.get_ydata()).view(3, 4).mean(1).tolist()
    assert mean.get_ydata() == pytest.approx(by_hand)


# --- features


def test_components_are_those_of_sklearn():
    from sklearn.decomposition import PCA

    x = torch.randn(2, 40, 6) * torch.tensor([4, 3, 2, 1, 0.5, 0.1]) + 3

    colors, shares = feature_pca(x)

    pca = PCA(3).fit(x.flatten(0, 1))
    wanted = torch.tensor(pca.explained_variance_ratio_).float()
    torch.testing.assert_close(shares, wanted, atol=1e-5, rtol=1e-4)
    theirs = torch.tensor(pca.transform(x.flatten(0, 1)))
    inside = (colors > 0) & (colors < 1)  # the outer percents are clipped
    for i in range(3):
        of_both = torch.stack([colors[..., i].flatten(), theirs[:, i]])[:, inside[..., i].flatten()]
        assert of_both.corrcoef()[0, 1].abs() > 0.9999
    assert colors.shape == (2, 40, 3) and colors.min() == 0 and colors.max() == 1


def test_equal_features_are_one_color():
    colors = feature_pca(torch.ones(1, 9, 4)).colors
    assert colors.isfinite().all() and (colors == colors[0, 0]).all()


def test_the_figure_of_features_has_a_picture_a_block():
    fig = draw_features(torch.rand(3, 8, 8), torch.rand(8, 2, 2, 3))
    titles = [ax.get_title() for ax in fig.axes]
    assert titles[:9] == ["picture", *(f"block {i}" for i in range(8))]
