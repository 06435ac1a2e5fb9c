"""load_dalle and save_dalle: every kind of file of DALL-E's weights that people really have."""

import copy

import pytest
import torch
from helpers_dalle import published, random_images, refusal, save_published, small_dalle
from helpers_processes import run_python
from safetensors.torch import save_file

from beit_nb.dalle import DalleDecoder
from beit_nb.device import KERNELS
from beit_nb.dvae import DiscreteVAE, map_pixels
from beit_nb.engine.winograd import optimize_for_inference
from beit_nb.tokenizer import Tokenizer, load_dalle, move_tokenizer, save_dalle


@pytest.mark.parametrize("zipped", [True, False])
def test_published_modules_pickled_whole(tmp_path, zipped):
    theirs = published()
    images = random_images()
    ids = theirs[0](map_pixels(images)).argmax(1)
    one_hots = torch.nn.functional.one_hot(ids, 512).permute(0, 3, 1, 2).float()

    model = load_dalle(save_published(theirs, tmp_path, zipped))

    assert torch.equal(model.get_codebook_indices(images), ids)
    torch.testing.assert_close(model.decode_stats(ids), theirs[1](one_hots), atol=1e-5, rtol=0)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("half, tensors", [("encoder", 74), ("decoder", 76)])
def test_either_published_file_alone(tmp_path, half, tensors):
    theirs = dict(zip(("encoder", "decoder"), published()))
    save_published(theirs.values(), tmp_path)

    model = load_dalle(tmp_path / f"{half}.pkl")

    state = model.state_dict()
    assert len(state) == tensors
    for name, value in theirs[half].state_dict().items():
        assert torch.equal(state[f"{half}.{name}"], value), name


@pytest.mark.parametrize("zipped", [True, False])
def test_modules_as_old_torch_left_them(tmp_path, zipped):
    """A decoder pickled by torch 1.7 lacks attributes of today.

    Its own forward fails on that, ours reads only tensors.
    """
    theirs = published()
    today = set(vars(torch.nn.Module()))
    for net in theirs:
        for m in net.modules():
            m.__dict__.pop("recompute_scale_factor", None)
            for k in today - {"training", "_parameters", "_buffers", "_modules"}:
                m.__dict__.pop(k, None)
            m.__dict__.update(_backward_hooks={}, _non_persistent_buffers_set=set())

    model = load_dalle(save_published(theirs, tmp_path, zipped))

    with torch.no_grad():
        painted = model.decode(model.get_codebook_indices(random_images()))
    assert painted.shape == (3, 3, 64, 64)


@pytest.mark.slow  # a fresh process imports torch
@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_of_the_package_is_needed_or_used(tmp_path, zipped):
    save_published(published(), tmp_path, zipped)
    code = f"""if True:
        import sys
        sys.modules["dall_e"] = None  # an import of it would fail
        from beit_nb.tokenizer import load_dalle
        import torch
        model = load_dalle({str(tmp_path)!r})
        painted = model.decode(model.get_codebook_indices(torch.rand(1, 3, 16, 16)))
        print(painted.shape, [m for m in sys.modules if m.startswith("dall_e.")])
    """

    out = run_python(code)

    assert out.stdout.strip() == "torch.Size([1, 3, 16, 16]) []"


def prefixed(state):
    backbone = {"backbone.blocks.0.norm1.weight": torch.ones(3)}
    return {f"target_generator.{k}": v for k, v in state.items()} | backbone


WRAPS = {
    "plain": lambda state: state,
    "mmpretrain": lambda state: {"meta": {"epoch": 3}, "state_dict": state},
    "prefixed": prefixed,
    "deep": lambda state: {"model": {"a": {f"module.x.{k}": v for k, v in state.items()}}},
}


@pytest.mark.slow
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("half, tensors", [("encoder", 74), ("decoder", 76)])
def test_state_dicts_in_any_wrapper(tmp_path, wrap, zipped, half, tensors):
    model = small_dalle()
    content = WRAPS[wrap](getattr(model, half).state_dict())
    torch.save(content, tmp_path / "dalle.pth", _use_new_zipfile_serialization=zipped)

    loaded = load_dalle(tmp_path / "dalle.pth").state_dict()

    assert len(loaded) == tensors
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.items())


@pytest.mark.parametrize(
    "size",
    [
        dict(),
        dict(n_hid=32, n_blk_per_group=1),
        dict(vocab_size=10, group_count=2, n_blk_per_group=3),
    ],
)
def test_our_safetensors_go_round(tmp_path, size):
    model = small_dalle(**size)
    if not size:
        optimize_for_inference(model)  # channels last must not hurt
    images = random_images()
    ids = model.get_codebook_indices(images)

    save_dalle(model, tmp_path / "dalle.safetensors")
    loaded = load_dalle(tmp_path / "dalle.safetensors")

    assert torch.equal(loaded.get_codebook_indices(images), ids)
    with torch.no_grad():
        torch.testing.assert_close(loaded.decode(ids), model.decode(ids), atol=1e-5, rtol=0)


def test_safetensors_of_an_encoder_alone(tmp_path):
    state = small_dalle().encoder.state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "e.safetensors")

    model = load_dalle(tmp_path / "e.safetensors")

    assert not model.has_decoder
    assert torch.equal(model.state_dict()["encoder.blocks.input.w"], state["blocks.input.w"])


@pytest.mark.parametrize("zipped", [True, False])
def test_half_precision_files_become_float(tmp_path, zipped):
    state = small_dalle().encoder.half().state_dict()
    torch.save(state, tmp_path / "e.pth", _use_new_zipfile_serialization=zipped)

    model = load_dalle(tmp_path / "e.pth")

    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert model.get_codebook_indices(random_images()).shape == (3, 8, 8)


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_a_file_alone_in_the_folder(tmp_path, half):
    model = small_dalle()
    torch.save(getattr(model, half).state_dict(), tmp_path / f"{half}.pkl")
    images = random_images()
    ids = model.get_codebook_indices(images)

    loaded = load_dalle(str(tmp_path))

    if half == "encoder":
        assert torch.equal(loaded.get_codebook_indices(images), ids)
        assert "load decoder.pkl" in refusal(loaded.decode, ids)
    else:
        torch.testing.assert_close(loaded.decode(ids), model.decode(ids), atol=1e-5, rtol=0)
        assert "load encoder.pkl" in refusal(loaded.logits, images)


# --- files that must be refused


@pytest.mark.parametrize("form", ["zip", "old", "safetensors"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_a_download_that_stopped_early(tmp_path, form, share):
    model = small_dalle()
    path = tmp_path / "encoder.pkl"
    if form == "safetensors":
        save_dalle(model, path)
    else:
        torch.save(model.encoder.state_dict(), path, _use_new_zipfile_serialization=form == "zip")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    assert "download it again" in refusal(load_dalle, path)


@pytest.mark.parametrize("path", ["", "no", "encoder.pkl"])
def test_missing_files_say_where_they_are(tmp_path, path):
    message = refusal(load_dalle, tmp_path / path)

    assert str(tmp_path / path) in message
    assert "https://cdn.openai.com/dall-e/encoder.pkl" in message
    assert all(part in message for part in ("215 MB", "175 MB", "data/README.md"))


def test_other_networks_are_named(tmp_path):
    torch.save({"blocks.0.norm1.weight": torch.ones(3)}, tmp_path / "vit.pth")

    assert "no network" in refusal(load_dalle, tmp_path / "vit.pth")


@pytest.mark.parametrize("gone", ["blocks.input.w", "blocks.group_2.block_1.res_path.conv_3.b"])
def test_a_missing_tensor_is_named(tmp_path, gone):
    state = small_dalle().encoder.state_dict()
    del state[gone]
    torch.save(state, tmp_path / "cut.pth")

    assert gone in refusal(load_dalle, tmp_path / "cut.pth")


@pytest.mark.parametrize("shape", [(), (3,), (0, 3, 7, 7), (4, 4, 3, 3)])
@pytest.mark.parametrize("name", ["blocks.input.w", "blocks.output.conv.w"])
def test_a_tensor_of_another_shape_is_refused(tmp_path, name, shape):
    state = small_dalle().encoder.state_dict() | {name: torch.zeros(shape)}
    torch.save(state, tmp_path / "bent.pth")

    assert "is not a whole DALL-E network" in refusal(load_dalle, tmp_path / "bent.pth")


def test_one_file_downloaded_twice(tmp_path):
    state = small_dalle().encoder.state_dict()
    for name in ("encoder.pkl", "decoder.pkl"):
        torch.save(state, tmp_path / name)

    assert "second encoder" in refusal(load_dalle, tmp_path)


def test_halves_of_different_networks(tmp_path):
    decoder = DalleDecoder(n_init=8, n_hid=16, vocab_size=32)
    torch.save(small_dalle().encoder.state_dict(), tmp_path / "encoder.pkl")
    torch.save(decoder.state_dict(), tmp_path / "decoder.pkl")

    assert "do not belong together" in refusal(load_dalle, tmp_path)


@pytest.mark.parametrize("number", [torch.bfloat16, None])
def test_a_tokenizer_moves_and_takes_the_numbers_of_its_device(monkeypatch, number):
    asked = []
    choice = KERNELS["cpu"]._replace(tokenizer=number)
    monkeypatch.setattr("beit_nb.tokenizer.kernels_for", lambda d: asked.append(d) or choice)
    images = random_images()
    model = small_dalle()
    want = copy.deepcopy(model)
    if number:
        optimize_for_inference(want, number)
    ours = DiscreteVAE(32, 16, 4, 16)
    kept = ours.get_codebook_indices(images)

    tokenizer = Tokenizer(model)
    move_tokenizer(tokenizer, "cpu")
    move_tokenizer(Tokenizer(ours), "cpu")

    assert asked == ["cpu", "cpu"]
    assert {x.dtype for x in model.state_dict().values()} == {
        x.dtype for x in want.state_dict().values()
    }
    assert (number in {x.dtype for x in model.state_dict().values()}) == (number is not None)
    assert torch.equal(tokenizer.get_codebook_indices(images), want.get_codebook_indices(images))
    assert {x.dtype for x in ours.state_dict().values()} == {torch.float32}
    assert torch.equal(ours.get_codebook_indices(images), kept)
