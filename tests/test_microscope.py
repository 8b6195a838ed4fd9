"""The precision microscope: its figures against ones computed by hand, and planted faults."""

import math
import re

import numpy as np
import pytest

import minidl
from minidl import nn, optim
from minidl.data import DataLoader, Digits
from minidl.nn import functional as F
from minidl.quantization import quantize
from minidl.quantization.microscope import RUNS, Noise, look, page


def uniform(*shape, seed=0):
    return minidl.tensor(np.random.default_rng(seed).random(shape).astype(np.float32))


def small():
    minidl.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 10)
    ).eval()


@pytest.fixture(scope="module")
def trained():
    """A network that reads digits, test images, and batches to calibrate with."""
    minidl.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip
    optimizer = optim.Adam(model.parameters(), 0.005)
    for _ in range(3):
        for x, y in DataLoader(Digits(), 32, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    images = minidl.tensor(np.stack([x for x, _ in Digits(train=False)]))
    return model.eval(), images, [x for x, _ in DataLoader(Digits(), 256)]


@pytest.fixture(scope="module")
def view(trained):
    model, images, batches = trained
    return look(model, batches, images)


def decibels(exact, other):
    return 10 * np.log10(np.square(exact).sum() / np.square(other - exact).sum())


def test_a_known_quantizer():
    """A number in [0, 1), and a step of 1/255: noise s²/12, signal 1/3."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    batch = uniform(40, 1, 8, 8)
    batch.array[0, 0, 0, 0] = 1
    first, *_ = look(model, [batch], batch).layers
    assert first.name == "input" and first.scale == pytest.approx(1 / 255)
    assert first.noise["int8"].decibels == pytest.approx(10 * math.log10(4 * 255**2), abs=0.1)
    assert first.noise["float32"].decibels == math.inf
    for run in ("random signs", "FGSM"):  # as strong as that
        assert first.noise[run].decibels == pytest.approx(10 * math.log10(4 * 255**2), abs=0.1)


def test_decibels():
    noise = Noise()
    assert noise.decibels == math.inf
    noise.add(np.ones(4), np.full(4, 1.1))
    noise.add(np.ones(4), np.full(4, 1.1))
    assert noise.decibels == pytest.approx(20)
    assert Noise(0.0, 1.0).decibels == -math.inf


def test_figures_by_hand():
    """A convolution with its ReLU and a linear layer in float64, with numbers rounded by hand."""
    model, x = small(), uniform(40, 1, 8, 8, seed=2)
    half = minidl.tensor(0.5 * x.numpy())
    first, conv, fc = look(model, [half], x).layers
    assert (conv.name, conv.op, fc.name, fc.op) == ("0", "conv2d, relu", "4", "linear")
    w, b, v, c = (p.detach().double() for p in model.parameters())
    exact = F.conv2d(x.double(), w, b, padding=1).relu()
    scores = F.linear(F.max_pool2d(exact, 2).flatten(1), v, c)

    def rounded(values, layer):
        q = np.clip(np.rint(values / layer.scale) + layer.zero_point, 0, 255) - layer.zero_point
        return minidl.tensor(q)

    def whole(weights):
        axes = tuple(range(1, weights.ndim))
        s = np.abs(weights.numpy()).max(axis=axes, keepdims=True) / 127
        return minidl.tensor(np.rint(weights.numpy() / s)), s.reshape(-1)

    q, (k, s) = rounded(x.numpy().astype(np.float64), first), whole(w)
    bias = np.rint(b.numpy() / (first.scale * s))
    sums = F.conv2d(q, k, minidl.tensor(bias), padding=1).numpy()
    assert conv.largest == np.abs(sums).max()
    assert conv.headroom == pytest.approx(31 - np.log2(np.abs(sums).max()))
    # (the kernel multiplies by float32 scales: a few sums half-way may go the other way)
    y = rounded(np.maximum(sums, 0) * (first.scale * s)[:, None, None], conv)
    low = y.numpy() * conv.scale
    assert conv.noise["int8"].decibels == pytest.approx(decibels(exact.numpy(), low), abs=0.05)
    m, t = whole(v)
    bias = np.rint(c.numpy() / (conv.scale * t))
    sums = F.linear(F.max_pool2d(y, 2).flatten(1), m, minidl.tensor(bias)).numpy()
    assert fc.largest == pytest.approx(np.abs(sums).max(), rel=1e-3)
    found = sums * (conv.scale * t)
    assert fc.noise["int8"].decibels == pytest.approx(decibels(scores.numpy(), found), abs=0.05)
    high = conv.scale * 255.5
    assert conv.clipped == pytest.approx((exact.numpy() > high).mean()) and conv.clipped > 0.005
    assert conv.counts.sum() == conv.seen == exact.numpy().size
    inside = np.histogram(exact.numpy(), conv.edges)[0]
    np.testing.assert_array_equal(conv.counts[1:-1], inside[1:-1])
    with minidl.no_grad():
        single = model(x).numpy()
    assert fc.noise["float32"].decibels == pytest.approx(decibels(scores.numpy(), single), abs=3)
    # float16: 11 bits and a sign, relative to each number: 6.02 · 12 and a little
    assert 60 < conv.noise["float16"].decibels < 80


def test_sums_of_known_size():
    """64 inputs of 1 (255 in bytes), weights of 1 (127): 64 · 255 · 127, the most there can be."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    model[1].weight.data.fill_(1.0)
    ones = minidl.tensor(np.ones((4, 1, 8, 8), np.float32))
    fc = look(model, [ones], ones).layers[-1]
    assert fc.largest == fc.bound == 64 * 255 * 127
    model[1].weight.data[0, 0].fill_(0.0)
    fc = look(model, [ones], 0.5 * ones).layers[-1]
    assert fc.largest == pytest.approx(64 * 127.5 * 127, rel=0.01) and fc.bound == 64 * 255 * 127


def test_the_runs_are_those(trained, view):
    """Predictions of the model, of what `quantize` makes of it, and of noise on the pixels."""
    model, images, batches = trained
    with minidl.no_grad():
        exact = model(images).numpy().argmax(1)
        integers = quantize(model, batches)(images).numpy().argmax(1)
    np.testing.assert_array_equal(view.predictions["float32"], exact)
    np.testing.assert_array_equal(view.exact, exact)
    np.testing.assert_array_equal(view.predictions["int8"], integers)
    assert set(view.predictions) == set(RUNS)
    assert view.flipped("int8") == np.flatnonzero(integers != exact).tolist()
    for layer in view.layers[1:]:
        db = {run: layer.noise[run].decibels for run in RUNS}
        assert db["float32"] > db["float16"] > db["int8"]


def test_aimed_noise_grows(view):
    """On the pixels FGSM is as strong as random signs; on the scores it is far stronger."""
    first, last = view.layers[0], view.layers[-1]
    gap = [
        layer.noise["random signs"].decibels - layer.noise["FGSM"].decibels
        for layer in (first, last)
    ]
    assert abs(gap[0]) < 0.01 and gap[1] > 5


def test_a_planted_layer_is_named(trained):
    """A weight of 50 on an input that is never used: one scale for all, too coarse for the rest."""
    model, images, batches = trained
    before = model[4].weight.numpy().copy()
    dead = int(np.argmin(np.abs(model[0].weight.numpy()).sum(axis=(1, 2, 3))))
    conv = model[0].weight.numpy().copy(), model[0].bias.numpy().copy()
    try:
        model[0].weight.array[dead] = 0
        model[0].bias.array[dead] = 0  # its 16 pixels are 0 for every image
        fine = look(model, batches, images, per_channel=False)
        model[4].weight.array[:, 16 * dead] = 50
        planted = look(model, batches, images, per_channel=False)
    finally:
        model[4].weight.array[...] = before
        model[0].weight.array[...], model[0].bias.array[...] = conv
    np.testing.assert_array_equal(fine.exact, planted.exact)
    assert planted.worst().name == "4"
    by_name = {layer.name: layer for layer in planted.layers}
    others = {i for name, layer in by_name.items() if name != "4" for i in layer.flips}
    assert len(by_name["4"].flips) > 20 > len(others)
    assert by_name["4"].alone.decibels < min(x.alone.decibels for x in fine.layers) - 20


def test_noise_alone_is_less_than_together(view):
    together = view.layers[-1].noise["int8"].decibels
    assert all(layer.alone.decibels > together for layer in view.layers)


def test_a_residual_network_and_skip():
    minidl.manual_seed(0)
    x = uniform(4, 3, 16, 16)
    model = minidl.models.resnet8()
    names = [(layer.name, layer.op) for layer in look(model, [x], x).layers]
    assert ("layer1.0", "add, relu") in names and ("avgpool", "adaptive_avg_pool2d") in names
    skipped = look(model, [x], x, skip=["layer1"])
    assert {n for n, _ in names} - {layer.name for layer in skipped.layers} == {
        "layer1.0", "layer1.0.conv1", "layer1.0.conv2",
    }  # fmt: skip
    assert look(model, [x], x, skip=["conv1"]).epsilon == pytest.approx(1 / 255 / 12**0.5)


def test_page(view, tmp_path):
    path = tmp_path / "page.html"
    page(view, path, "a <network>")
    text = path.read_text()
    assert "a &lt;network&gt;" in text and "<network>" not in text
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(sources) > len(view.layers) and all(s.startswith("data:") for s in sources)
    assert "http" not in text and "url(" not in text
    for layer in view.layers:
        assert f"<td>{layer.name}</td>" in text
        if layer.largest is not None:
            assert f"{layer.largest:,}" in text


def test_bad_input():
    model, x = small(), uniform(4, 1, 8, 8)
    for batches, images in (([], x), ([x], x[:0])):
        with pytest.raises(ValueError, match="images to look at"):
            look(model, batches, images)
    with pytest.raises(ValueError, match="observer 'maxmin'"):
        look(model, [x], x, observer="maxmin")
    with pytest.raises(ValueError, match="classifier"):
        look(nn.Conv2d(1, 1, 3), [x], x)
    with pytest.raises(ValueError, match="no form on integers"):
        look(nn.Sequential(nn.Flatten(), nn.Sigmoid(), nn.Linear(64, 10)), [x], x)
