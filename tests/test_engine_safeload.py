"""The reader of weights against files that must be refused: nothing in them may run."""

import io
import os
import pickle
import zipfile
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

import numpy as np
import pytest
import torch
from helpers_dalle import published, refusal, save_published, small_dalle

from beit_nb import BeitError
from beit_nb.engine.safeload import (
    WeightsUnpickler,
    describe_weights,
    flatten,
    load_tensors,
    read_legacy_file,
    read_weights_file,
    read_zip_file,
)


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
@pytest.mark.parametrize("place", ["alone", "in a state dict", "in a module"])
def test_hostile_files_are_refused_by_name_and_not_run(tmp_path, zipped, place):
    content = evil = Evil(tmp_path / "mark")
    if place == "in a state dict":
        content = {**small_dalle().encoder.state_dict(), "more": evil}
    if place == "in a module":
        content = published()[0]
        content.blocks.input.more = evil
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)

    message = refusal(load_tensors, tmp_path / "x.pth")

    assert "exec, which no weights need: refused" in message
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_are_refused_and_not_run(tmp_path, protocol):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(Evil(tmp_path / "mark"), protocol))

    message = refusal(load_tensors, tmp_path / "x.pkl")

    assert "exec" in message
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "module, name, said",
    [
        ("os", "system", "os.system"),
        ("builtins", "eval", "eval"),
        ("builtins", "getattr", "getattr"),
        ("torch", "load", "torch.load"),
        ("beit_nb.tokenizer", "load_dalle", "beit_nb.tokenizer.load_dalle"),
        ("dall_e", "load_model", "dall_e.load_model"),
        ("torch.nn.modules.container", "Sequential.__init__", "Sequential.__init__"),
        ("functools", "partial", "functools.partial"),
        ("torch.hub", "load", "torch.hub.load"),
        ("collections", "OrderedDict.fromkeys", "OrderedDict.fromkeys"),
    ],
)
def test_other_names_are_refused_in_both_layouts(tmp_path, module, name, said):
    program = b"\x80\x02c" + f"{module}\n{name}\n".encode() + b")R."
    (tmp_path / "old.pkl").write_bytes(program)
    archive = torch._C.PyTorchFileWriter(str(tmp_path / "new.pkl"))
    archive.write_record("data.pkl", program, len(program))
    archive.write_end_of_file()

    with pytest.raises(pickle.UnpicklingError, match="GLOBAL"):
        read_legacy_file(tmp_path / "old.pkl")
    for file in ("old.pkl", "new.pkl"):
        message = refusal(load_tensors, tmp_path / file).replace("posix.", "os.")
        assert f"{said}, which no weights need" in message


@pytest.mark.parametrize(
    "text",
    [
        "--2024-05-01 10:00:00--  https://cdn.openai.com/dall-e/encoder.pkl\nResolving cdn\n",
        "Une erreur est survenue : accès refusé à ce fichier\n",
    ],
)
def test_text_instead_of_weights(tmp_path, text):
    (tmp_path / "encoder.pkl").write_text(text)

    message = refusal(load_tensors, tmp_path / "encoder.pkl")

    assert all(part in message for part in ("is text", "wget -o", "-O", text[:10]))


def test_an_empty_file(tmp_path):
    (tmp_path / "encoder.pkl").write_text("")

    assert "is empty; download it" in refusal(load_tensors, tmp_path / "encoder.pkl")
    with pytest.raises(BeitError, match="is empty; delete it"):
        read_weights_file(tmp_path / "encoder.pkl", "delete it")


def test_stand_ins_are_lent_for_the_moment_only(tmp_path):
    pair = published()
    before = set(torch.serialization.get_safe_globals())

    load_tensors(save_published(pair, tmp_path) / "encoder.pkl")

    assert set(torch.serialization.get_safe_globals()) == before
    buffer = io.BytesIO()
    torch.save(pair[0], buffer)
    buffer.seek(0)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("keys", [7, [1.5], [None], [["a"]], {1: 2}])
def test_keys_of_storages_that_are_none(tmp_path, keys):
    "An old file is five pickles; in the last are the keys of its storages, which must be texts."
    file = tmp_path / "old.pth"
    torch.save({"w": torch.ones(3)}, file, _use_new_zipfile_serialization=False)
    data = io.BytesIO(file.read_bytes())
    for _ in range(3):
        pickle.load(data)
    reader = WeightsUnpickler(data, 10**6)
    reader.load()
    head = data.getvalue()[: data.tell()]
    file.write_bytes(head + pickle.dumps(keys, 2) + bytes(20))

    assert "is damaged or no file of weights" in refusal(load_tensors, file)


@pytest.mark.parametrize(
    "head, said",
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2150\n",
            "git lfs pull",
        ),
        (b"<!DOCTYPE html>\n<html><body>404</body></html>", "a page of a web site"),
        (b"\xef\xbb\xbf\n  <HTML lang='fr'>", "a page of a web site"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied", "a page of a web site"),
        (b'{"error": "Repository not found"}', "is text"),
        (b"\x1f\x8b\x08rest", "unpack it first"),
        (b"\x89PNG\r\n\x1a\n", "a picture"),
        (b"\x93NUMPY\x01\x00", "NumPy"),
    ],
)
def test_what_is_no_file_of_weights_is_called_by_name(tmp_path, head, said):
    (tmp_path / "x.pth").write_bytes(head)

    message = refusal(load_tensors, tmp_path / "x.pth")

    assert said in message and "delete" not in message and len(message) < 400


def test_a_folder_and_a_pipe_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # who opens it waits for ever

    for path in (tmp_path, tmp_path / "pipe", tmp_path / "nowhere"):
        assert "is no file" in refusal(load_tensors, path)


def rewritten(file, change=None, compress=ZIP_STORED):
    "The zip archive written anew, its program changed by (old, new) bytes."
    with ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    program = next(name for name in parts if name.endswith("data.pkl"))
    if change:
        assert change[0] in parts[program]
        parts[program] = parts[program].replace(*change)
    with ZipFile(file, "w", compress) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return file


LENGTH = b"K\x04tq"  # the 4 in the description of the storage of four numbers
SIZE = b"K\x04\x85q"  # and in the size of the tensor
HUGE = b"\x8a\x06\x00\x00\x00\x00\x00\x01"  # 2^40


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        (LENGTH, b"K\x05tq"),  # a storage longer than its numbers
        (LENGTH, HUGE + b"tq"),  # by terabytes
        (LENGTH, b"J\xff\xff\xff\xfftq"),  # of -1 numbers
        (SIZE, b"K\x05\x85q"),  # a tensor longer than its storage
        (SIZE, HUGE + b"\x85q"),
        (SIZE, b"J\xff\xff\xff\xff\x85q"),
        (b"K\x01\x85q", b"K\x07\x85q"),  # a stride beyond the end
        (b"QK\x00", b"QK\x02"),  # an offset
    ],
)
def test_tensors_that_claim_more_than_the_file_holds(tmp_path, change, zipped):
    "Nothing is read from memory that was not written, and no room is made for it."
    file = tmp_path / "x.pt"
    torch.save({"w": torch.ones(4)}, file, _use_new_zipfile_serialization=zipped)
    if zipped:
        rewritten(file, change)
    else:
        data = file.read_bytes()
        old, new = change
        if old == LENGTH:
            old, new = b"K\x04Ntq", new.replace(b"tq", b"Ntq")
        assert old in data
        file.write_bytes(data.replace(old, new, 1))

    assert "is damaged or no file of weights" in refusal(load_tensors, file)


def test_a_storage_that_there_is_not(tmp_path):
    torch.save({"w": torch.ones(4)}, tmp_path / "x.pt")
    rewritten(tmp_path / "x.pt", (b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x001"))

    assert "is damaged or no file of weights" in refusal(load_tensors, tmp_path / "x.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_one_number_is_no_terabyte(tmp_path, zipped):
    many = {"w": torch.ones(1).expand(2**40)}
    torch.save(many, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)

    assert "more numbers than there are" in refusal(load_tensors, tmp_path / "x.pt")


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    "Eight gigabytes of zeros in eight megabytes; here a hundredth of it."
    torch.save({"w": torch.zeros(2 * 10**7)}, tmp_path / "x.pt")
    file = rewritten(tmp_path / "x.pt", compress=ZIP_DEFLATED)
    assert file.stat().st_size < 10**6

    assert "its parts are compressed" in refusal(load_tensors, file)


def test_a_pickle_that_only_claims_memory(tmp_path):
    "A few bytes: bytearray(2^36), and a memo of 2^32 entries."
    for program in (
        b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R.",
        b"\x80\x02Nr\xff\xff\xff\xff.",
    ):
        (tmp_path / "x.pt").write_bytes(program)
        refusal(load_tensors, tmp_path / "x.pt")


def test_dicts_in_dicts_without_end(tmp_path):
    "Forty dicts, each twice in the one before: 2^40 names."
    inner = {"w": torch.ones(1)}
    for _ in range(40):
        inner = {"a": inner, "b": inner}
    torch.save(inner, tmp_path / "x.pt")
    circle = {}
    circle["again"] = circle

    assert "nested without end" in refusal(load_tensors, tmp_path / "x.pt")
    with pytest.raises(BeitError, match="nested without end"):
        flatten(circle)


def test_numbers_of_every_kind_are_the_same_bits(tmp_path):
    kinds = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()
    base = torch.arange(-5, 7)
    state = {kind: base.to(getattr(torch, kind)) for kind in kinds}
    state |= {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5), "turned": base.view(3, 4).T}
    state |= {"slice": base[3:9:2], "parameter": torch.nn.Parameter(torch.ones(2))}
    for zipped in (True, False):
        torch.save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
        read = load_tensors(tmp_path / "x.pt")
        assert read.keys() == state.keys()
        for name, tensor in state.items():
            assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name


def test_checksums_are_looked_at(tmp_path):
    torch.save({"w": torch.ones(1000)}, tmp_path / "x.pt")
    data = bytearray((tmp_path / "x.pt").read_bytes())
    data[data.index(torch.ones(2).numpy().tobytes()) + 100] ^= 1
    (tmp_path / "x.pt").write_bytes(data)

    assert "CRC" in refusal(load_tensors, tmp_path / "x.pt")


def test_zip_archives_of_others(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.ones(2))

    assert "without any weights of torch" in refusal(load_tensors, tmp_path / "x.npz")
    with pytest.raises(zipfile.BadZipFile):
        read_zip_file(tmp_path / "x.npz")


def test_whose_names():
    assert describe_weights(["blocks.3.attn.qkv.weight", "a"]).startswith(
        "2 tensors in the names of t"
    )
    assert describe_weights([]) == "no tensors"
