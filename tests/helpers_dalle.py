"""Small dVAEs of DALL-E's shape with random weights, ours and the published package's."""

import pytest
import torch

from beit_nb.dalle import DalleDecoder, DalleEncoder, DalleVAE


def fill_biases(net):
    "So that no forgotten bias hides behind a zero."
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith(".b"):
                p.normal_(std=0.1)
    return net


def small_dalle(seed=0, **size):
    "A DalleVAE, 16 channels wide and with 64 tokens unless `size` says otherwise."
    torch.manual_seed(seed)
    size = dict(n_hid=16, vocab_size=64) | size
    return fill_biases(DalleVAE(DalleEncoder(**size), DalleDecoder(n_init=8, **size)))


def published(n_hid=64, n_init=32, n_blk_per_group=2, vocab_size=512, seed=0):
    "The published package's own encoder and decoder."
    dall_e = pytest.importorskip("dall_e", reason="pip install --no-deps dall-e attrs requests")
    torch.manual_seed(seed)
    size = dict(n_hid=n_hid, n_blk_per_group=n_blk_per_group, vocab_size=vocab_size)
    return fill_biases(dall_e.Encoder(**size)), fill_biases(dall_e.Decoder(n_init=n_init, **size))


def save_published(pair, folder, zipped=True):
    "As the authors left them: whole modules, pickled. Returns the folder."
    for net, name in zip(pair, ("encoder.pkl", "decoder.pkl")):
        torch.save(net, folder / name, _use_new_zipfile_serialization=zipped)
    return folder


def random_images(B=3, size=64, seed=0):
    return torch.rand(B, 3, size, size, generator=torch.Generator().manual_seed(seed))


def refusal(call, *args):
    "The one line with which a call refuses what it is given."
    with pytest.raises(ValueError) as e:
        call(*args)
    message = str(e.value)
    assert "\n" not in message
    return message
