"""DALL-E's dVAE against the published package, and the reader of its files against every file that people really have."""

import inspect
import io
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from beit_nb.engine.winograd import optimize_for_inference
from beit_nb.dalle import DalleBlock, DalleDecoder, DalleEncoder, DalleVAE
from beit_nb.engine.safeload import read_legacy_file, load_tensors
from beit_nb.scale.bench import bench_tokenizer
from beit_nb.tokenizer import load_dalle, save_dalle
from beit_nb.dvae import DiscreteVAE, dvae_loss, map_pixels

SIZE = dict(n_hid=16, vocab_size=64)


def a_dvae(seed=0, **size):
    torch.manual_seed(seed)
    size = SIZE | size
    model = DalleVAE(DalleEncoder(**size), DalleDecoder(n_init=8, **size))
    with torch.no_grad():
        for name, p in model.named_parameters():
            # so that no forgotten bias hides behind a zero
            if name.endswith(".b"):
                p.normal_(std=0.1)
    return model


def pictures(B=3, size=64, seed=0):
    return torch.rand(B, 3, size, size, generator=torch.Generator().manual_seed(seed))


def published(n_hid=64, n_init=32, n_blk_per_group=2, vocab_size=512, seed=0):
    "The published package's own modules with random weights; biases too."
    dall_e = pytest.importorskip("dall_e", reason="pip install --no-deps dall-e attrs requests")
    torch.manual_seed(seed)
    pair = (
        dall_e.Encoder(n_hid=n_hid, n_blk_per_group=n_blk_per_group, vocab_size=vocab_size),
        dall_e.Decoder(
            n_hid=n_hid, n_init=n_init, n_blk_per_group=n_blk_per_group, vocab_size=vocab_size
        ),
    )
    for net in pair:
        for name, p in net.named_parameters():
            if name.endswith(".b"):
                p.data.normal_(std=0.1)
    return pair


def saved(pair, folder, zipped=True):
    for net, name in zip(pair, ("encoder.pkl", "decoder.pkl")):
        torch.save(net, folder / name, _use_new_zipfile_serialization=zipped)
    return folder


def refusal(call, *args):
    with pytest.raises(ValueError) as e:
        call(*args)
    assert "\n" not in str(e.value)
    return str(e.value)


# --- the networks


@pytest.mark.parametrize(
    "n_hid, n_init, n_blk, vocab",
    [(64, 32, 2, 512), (96, 8, 1, 1000), (64, 128, 3, 2048), (128, 16, 2, 700)],
)
@pytest.mark.parametrize("fast", [False, True])
def test_equal_to_the_published_package(n_hid, n_init, n_blk, vocab, fast):
    theirs = published(n_hid, n_init, n_blk, vocab)
    ours = DalleVAE(
        DalleEncoder(n_hid=n_hid, n_blk_per_group=n_blk, vocab_size=vocab),
        DalleDecoder(n_init=n_init, n_hid=n_hid, n_blk_per_group=n_blk, vocab_size=vocab),
    )
    for a, b in zip((ours.encoder, ours.decoder), theirs):
        a.load_state_dict(b.state_dict())
    if fast:
        optimize_for_inference(ours)
    images = pictures(3, 48)
    with torch.no_grad():
        scores = theirs[0](map_pixels(images))
        mine = ours.logits(images)
        torch.testing.assert_close(mine, scores, atol=1e-5, rtol=0)
        assert torch.equal(mine.argmax(1), scores.argmax(1))
        hard = F.one_hot(scores.argmax(1), vocab).permute(0, 3, 1, 2).float()
        soft = scores.softmax(1)
        for z, twin in ((scores.argmax(1), hard), (hard, hard), (soft, soft)):
            torch.testing.assert_close(ours.decode_stats(z), theirs[1](twin), atol=1e-5, rtol=0)
        from dall_e import unmap_pixels

        torch.testing.assert_close(
            ours.decode(scores.argmax(1)),
            unmap_pixels(theirs[1](hard)[:, :3].sigmoid()),
            atol=1e-5,
            rtol=0,
        )
    with torch.enable_grad():
        # the road without the cache trick
        torch.testing.assert_close(ours.logits(images).detach(), scores, atol=1e-5, rtol=0)


def test_the_published_sizes():
    with torch.device("meta"):
        pair = DalleEncoder(), DalleDecoder()
    for net, count, tensors in zip(pair, (53_786_240, 43_829_766), (74, 76)):
        state = net.state_dict()
        assert sum(p.numel() for p in net.parameters()) == count and len(state) == tensors
        assert all(m.post_gain == 1 / 64 for m in net.modules() if isinstance(m, DalleBlock))
    shape = {k: tuple(v.shape) for net in pair for k, v in net.state_dict().items()}
    assert shape["blocks.group_4.block_1.id_path.w"] == (256, 512, 1, 1) and tuple(
        pair[0].state_dict()["blocks.input.w"].shape
    ) == (256, 3, 7, 7)


@pytest.mark.parametrize("batch", [1, 2, 17, 65])
@pytest.mark.parametrize("size", [(8, 8), (16, 40), (112, 112)])
def test_few_at_a_time_is_all_at_once(batch, size):
    if batch * size[0] > 2000:
        pytest.skip("one large batch is enough")
    net = a_dvae().encoder
    x = torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        few = net(x)
    torch.testing.assert_close(few, net(x).detach(), atol=1e-5, rtol=0)
    assert torch.equal(few.argmax(1), net(x).argmax(1))


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_other_depths_of_the_tower(groups):
    model = a_dvae(group_count=groups)
    images = pictures(2, 16)
    assert model.downsample == 2 ** (groups - 1) and model.get_codebook_indices(images).shape == (
        2,
        16 // model.downsample,
        16 // model.downsample,
    )
    assert model.decode(model.get_codebook_indices(images)).shape == images.shape


def test_it_has_the_interface_of_our_own_dvae():
    names = [
        n
        for n, f in inspect.getmembers(DiscreteVAE, inspect.isfunction)
        if n in vars(DiscreteVAE) and not n.startswith("_")
    ]
    for n in names:
        assert inspect.signature(getattr(DalleVAE, n)) == inspect.signature(
            getattr(DiscreteVAE, n)
        ), n
    model = a_dvae()
    assert (model.vocab_size, model.downsample, model.likelihood) == (64, 8, "laplace")


def test_it_trains_with_our_loss_also_in_bf16():
    model = a_dvae()
    images = pictures(2, 32)
    opt = torch.optim.Adam(model.parameters(), 1e-3)
    first = None
    for _ in range(30):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = dvae_loss(model, images, kl_weight=0.0)
        opt.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        opt.step()
        first = first or loss.item()
    assert loss.item() < first
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model.get_codebook_indices(images).shape == (2, 4, 4)


def test_wrong_pictures_and_wrong_pairs_are_named():
    model = a_dvae()
    assert "divide by 8" in refusal(model.logits, pictures(1, 60))
    assert "floats in [0, 1]" in refusal(model.logits, torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert "do not belong together" in refusal(
        DalleVAE, model.encoder, DalleDecoder(n_init=8, n_hid=16, vocab_size=32)
    )
    assert "do not belong together" in refusal(DalleVAE)
    assert "multiple of 4" in refusal(lambda: DalleEncoder(n_hid=6))
    assert "load encoder.pkl" in refusal(DalleVAE(decoder=model.decoder).logits, pictures())
    assert "load decoder.pkl" in refusal(
        DalleVAE(model.encoder).decode, torch.zeros(1, 2, 2, dtype=torch.int64)
    )


# --- the files


@pytest.mark.parametrize("zipped", [True, False])
def test_published_modules_pickled_whole(tmp_path, zipped):
    theirs = published()
    model = load_dalle(saved(theirs, tmp_path, zipped))
    images = pictures()
    ids = theirs[0](map_pixels(images)).argmax(1)
    assert torch.equal(model.get_codebook_indices(images), ids)
    torch.testing.assert_close(
        model.decode_stats(ids),
        theirs[1](F.one_hot(ids, 512).permute(0, 3, 1, 2).float()),
        atol=1e-5,
        rtol=0,
    )
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    # either file alone
    for name, half in (("encoder", model.encoder), ("decoder", model.decoder)):
        alone = load_dalle(tmp_path / f"{name}.pkl")
        assert all(
            torch.equal(v, half.state_dict()[k])
            for k, v in getattr(alone, name).state_dict().items()
        )
        assert len(list(alone.parameters())) == (74 if name == "encoder" else 76)


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
    model = load_dalle(saved(theirs, tmp_path, zipped))
    with torch.no_grad():
        assert model.decode(model.get_codebook_indices(pictures())).shape == (3, 3, 64, 64)


@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_of_the_package_is_needed_or_used(tmp_path, zipped):
    saved(published(), tmp_path, zipped)
    code = f"""if True:
        import sys
        sys.modules["dall_e"] = None                       # an import of it would fail
        from beit_nb.tokenizer import load_dalle
        import torch
        model = load_dalle({str(tmp_path)!r})
        print(model.decode(model.get_codebook_indices(torch.rand(1, 3, 16, 16))).shape, [m for m in sys.modules if m.startswith("dall_e.")])
    """
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0 and out.stdout.strip() == "torch.Size([1, 3, 16, 16]) []", out.stderr


WRAPS = {
    "plain": lambda s: s,
    "mmpretrain": lambda s: {"meta": {"epoch": 3}, "state_dict": s},
    "prefixed": lambda s: (
        {f"target_generator.{k}": v for k, v in s.items()}
        | {"backbone.blocks.0.norm1.weight": torch.ones(3)}
    ),
    "deep": lambda s: {"model": {"a": {f"module.x.{k}": v for k, v in s.items()}}},
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_state_dicts_in_any_wrapper(tmp_path, wrap, zipped, half):
    model = a_dvae()
    torch.save(
        WRAPS[wrap](getattr(model, half).state_dict()),
        tmp_path / "dalle.pth",
        _use_new_zipfile_serialization=zipped,
    )
    loaded = load_dalle(tmp_path / "dalle.pth")
    assert all(
        torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items()
    ) and len(loaded.state_dict()) in (74, 76)


@pytest.mark.parametrize(
    "size",
    [
        dict(),
        dict(n_hid=32, n_blk_per_group=1),
        dict(vocab_size=10, group_count=2, n_blk_per_group=3),
    ],
)
def test_our_safetensors_go_round(tmp_path, size):
    model = a_dvae(**size)
    if not size:
        optimize_for_inference(model)  # channels last must not hurt
    save_dalle(model, tmp_path / "dalle.safetensors")
    loaded = load_dalle(tmp_path / "dalle.safetensors")
    images = pictures()
    assert torch.equal(loaded.get_codebook_indices(images), model.get_codebook_indices(images))
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.decode(loaded.get_codebook_indices(images)),
            model.decode(model.get_codebook_indices(images)),
            atol=1e-5,
            rtol=0,
        )
    save_file(
        {
            k.removeprefix("encoder."): v.contiguous()
            for k, v in model.state_dict().items()
            if k.startswith("encoder.")
        },
        tmp_path / "e.safetensors",
    )
    assert load_dalle(tmp_path / "e.safetensors").decoder is None


@pytest.mark.parametrize("zipped", [True, False])
def test_half_precision_files_become_float(tmp_path, zipped):
    torch.save(
        a_dvae().encoder.half().state_dict(),
        tmp_path / "e.pth",
        _use_new_zipfile_serialization=zipped,
    )
    model = load_dalle(tmp_path / "e.pth")
    assert all(p.dtype == torch.float32 for p in model.parameters()) and model.get_codebook_indices(
        pictures()
    ).shape == (3, 8, 8)


# --- files that must be refused


class Evil:
    "What a hostile file does when it is merely loaded: here it makes a file."

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return exec, (f"open({self.mark!r}, 'w').close()",)


def test_the_hostile_file_is_a_real_one(tmp_path):
    torch.save(Evil(tmp_path / "mark"), tmp_path / "e.pkl")
    torch.load(tmp_path / "e.pkl", weights_only=False)
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["alone", "in a state dict", "in a module"])
def test_hostile_files_are_refused_by_name_and_not_run(tmp_path, zipped, where):
    evil = Evil(tmp_path / "mark")
    content = evil
    if where == "in a state dict":
        content = {**a_dvae().encoder.state_dict(), "more": evil}
    if where == "in a module":
        content = published()[0]
        content.blocks.input.more = evil
    for name in ("encoder.pkl", "x.pth"):
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
        assert "exec, which no weights need: refused" in refusal(load_dalle, tmp_path / name)
    assert "exec" in refusal(load_dalle, tmp_path)  # the folder
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_are_refused_and_not_run(tmp_path, protocol):
    (tmp_path / "encoder.pkl").write_bytes(pickle.dumps(Evil(tmp_path / "mark"), protocol))
    said = refusal(load_dalle, tmp_path)
    assert "exec" in said and not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "module, name",
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("torch", "load"),
        ("beit_nb.dalle", "load_dalle"),
        ("dall_e", "load_model"),
        ("torch.nn.modules.container", "Sequential.__init__"),
        ("functools", "partial"),
        ("torch.hub", "load"),
        ("collections", "OrderedDict.fromkeys"),
    ],
)
def test_other_names_are_refused_in_both_layouts(tmp_path, module, name):
    program = b"\x80\x02c" + f"{module}\n{name}\n".encode() + b")R."
    (tmp_path / "old.pkl").write_bytes(program)
    with pytest.raises(pickle.UnpicklingError, match="GLOBAL"):
        read_legacy_file(tmp_path / "old.pkl")
    assert name in refusal(load_tensors, tmp_path / "old.pkl")
    archive = torch._C.PyTorchFileWriter(str(tmp_path / "new.pkl"))
    archive.write_record("data.pkl", program, len(program))
    archive.write_end_of_file()
    assert f"asks for {module}.{name}".replace("builtins.", "") in refusal(
        load_tensors, tmp_path / "new.pkl"
    ).replace("posix.", "os.")


def test_text_instead_of_weights(tmp_path):
    for text in (
        "--2024-05-01 10:00:00--  https://cdn.openai.com/dall-e/encoder.pkl\nResolving "
        "cdn.openai.com\n",
        "<!DOCTYPE html>\n<html><body>404</body></html>",
    ):
        (tmp_path / "encoder.pkl").write_text(text)
        said = refusal(load_dalle, tmp_path)
        assert "is text" in said and "wget -o" in said and "-O" in said and text[:10] in said
    (tmp_path / "encoder.pkl").write_text("")
    assert "is empty" in refusal(load_dalle, tmp_path)


@pytest.mark.parametrize("form", ["zip", "old", "safetensors"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_a_download_that_stopped_early(tmp_path, form, share):
    model = a_dvae()
    path = tmp_path / "encoder.pkl"
    if form == "safetensors":
        save_dalle(model, path)
    else:
        torch.save(model.encoder.state_dict(), path, _use_new_zipfile_serialization=form == "zip")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert "download it again" in refusal(load_dalle, path)


def test_missing_files_say_where_they_are(tmp_path):
    for path in (tmp_path, tmp_path / "no", tmp_path / "encoder.pkl"):
        said = refusal(load_dalle, path)
        assert all(
            w in said
            for w in (
                str(path),
                "https://cdn.openai.com/dall-e/encoder.pkl",
                "215 MB",
                "175 MB",
                "data/README.md",
            )
        )


def test_other_contents_are_named(tmp_path):
    model = a_dvae()
    torch.save({"blocks.0.norm1.weight": torch.ones(3)}, tmp_path / "vit.pth")
    assert "no network" in refusal(load_dalle, tmp_path / "vit.pth")
    state = model.encoder.state_dict()
    for gone in ("blocks.input.w", "blocks.group_2.block_1.res_path.conv_3.b"):
        torch.save({k: v for k, v in state.items() if k != gone}, tmp_path / "cut.pth")
        assert gone in refusal(load_dalle, tmp_path / "cut.pth")
    for name in ("encoder.pkl", "decoder.pkl"):
        torch.save(state, tmp_path / name)
    assert "second encoder" in refusal(load_dalle, tmp_path)
    torch.save(
        DalleDecoder(n_init=8, n_hid=16, vocab_size=32).state_dict(), tmp_path / "decoder.pkl"
    )
    assert "do not belong together" in refusal(load_dalle, tmp_path)


def test_only_one_file_in_the_folder(tmp_path):
    model = a_dvae()
    torch.save(model.encoder.state_dict(), tmp_path / "encoder.pkl")
    half = load_dalle(str(tmp_path))
    assert torch.equal(
        half.get_codebook_indices(pictures()), model.get_codebook_indices(pictures())
    )
    assert "load decoder.pkl" in refusal(half.decode, half.get_codebook_indices(pictures()))


def test_stand_ins_are_lent_for_the_moment_only(tmp_path):
    published()
    buffer = io.BytesIO()
    before = list(torch.serialization.get_safe_globals())
    load_dalle(saved(published(), tmp_path))
    assert torch.serialization.get_safe_globals() == before
    torch.save(published()[0], buffer)
    buffer.seek(0)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(buffer, weights_only=True)


# --- the clock


def test_bench_compares_and_counts_equal_tokens(monkeypatch):
    small = published()[0]
    monkeypatch.setattr("dall_e.Encoder", lambda: small)
    threads = torch.get_num_threads()
    result = bench_tokenizer(batch=2, repeats=3, size=48)
    assert (
        result["ids_equal"] == 1
        and result["ratio_low"] <= result["ratio"] <= result["ratio_high"]
        and torch.get_num_threads() == threads
    )
    assert result["seconds"].keys() == {"published", "ours"} and all(
        v > 0 for v in result["seconds"].values()
    )


def test_bench_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "dall_e", None)
    assert "pip install" in refusal(bench_tokenizer)
