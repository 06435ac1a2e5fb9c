"""The reader of weights against files that must be refused: nothing in them may run."""

import io
import pickle

import pytest
import torch
from helpers_dalle import published, refusal, save_published, small_dalle

from beit_nb.engine.safeload import LegacyUnpickler, load_tensors, read_legacy_file


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
        "<!DOCTYPE html>\n<html><body>404</body></html>",
    ],
)
def test_text_instead_of_weights(tmp_path, text):
    (tmp_path / "encoder.pkl").write_text(text)

    message = refusal(load_tensors, tmp_path / "encoder.pkl")

    assert all(part in message for part in ("is text", "wget -o", "-O", text[:10]))


def test_an_empty_file(tmp_path):
    (tmp_path / "encoder.pkl").write_text("")

    assert "is empty" in refusal(load_tensors, tmp_path / "encoder.pkl")


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
    reader = LegacyUnpickler(data)
    reader.storages = {}
    reader.load()
    head = data.getvalue()[: data.tell()]
    file.write_bytes(head + pickle.dumps(keys, 2) + bytes(20))

    assert "is damaged or no file of weights" in refusal(load_tensors, file)
