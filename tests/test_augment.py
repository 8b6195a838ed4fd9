"""Random transforms: what they do, and that they depend on (seed, epoch, index) only."""

import inspect

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

import minidl
import minidl.nn.functional as F
from minidl.data import DataLoader, Digits, Subset, augment
from minidl.data.augment import (
    ColorJitter,
    Compose,
    CutMix,
    Cutout,
    GaussianNoise,
    MixUp,
    RandAugment,
    RandomAffine,
    RandomCrop,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomRotation,
    RandomTransform,
    RandomVerticalFlip,
)

IMAGES = np.arange(6 * 2 * 5 * 4, dtype=np.float32).reshape(6, 2, 5, 4) + 1


# Every transform of the file, set so that it does something to nearly every image.
EXAMPLES = {
    "RandomHorizontalFlip": RandomHorizontalFlip(),
    "RandomVerticalFlip": RandomVerticalFlip(),
    "RandomCrop": RandomCrop(8, padding=2, padding_mode="reflect"),
    "RandomResizedCrop": RandomResizedCrop((6, 9)),
    "RandomRotation": RandomRotation(30),
    "RandomAffine": RandomAffine(20, (0.2, 0.1), (0.8, 1.2), 10, fill=0.5),
    "ColorJitter": ColorJitter(0.4, 0.4, 0.4, 0.1),
    "GaussianNoise": GaussianNoise(),
    "Cutout": Cutout(3, fill=0.5),
    "RandAugment": RandAugment(),
}
every_transform = pytest.mark.parametrize("transform", EXAMPLES.values(), ids=list(EXAMPLES))


def colours(n=6, size=8):
    """Smooth colour images in [0, 1]."""
    y, x = np.mgrid[:size, :size] / size
    rng = np.random.default_rng(0)
    a, b, c = rng.uniform(0, 3, (3, n, 3, 1, 1))
    return (0.5 + 0.5 * np.sin(a + b * x + 2 * c * y)).astype(np.float32)


def test_every_transform_has_an_example():
    found = {name for name in augment.__all__ if is_transform(getattr(augment, name))}
    assert found == set(EXAMPLES)


def is_transform(kind):
    is_one = inspect.isclass(kind) and issubclass(kind, RandomTransform)
    return is_one and kind is not RandomTransform


@every_transform
def test_a_batch_comes_out_as_its_images_would(transform):
    images = colours()
    minidl.manual_seed(0)
    batch = transform(images)
    minidl.manual_seed(0)
    one_by_one = np.stack([transform(image) for image in images])
    assert batch.dtype == np.float32 and batch.tobytes() == one_by_one.tobytes()
    assert (images == colours()).all()  # what it was given is as it was
    assert batch.min() >= 0 and batch.max() <= 1
    assert batch.shape != images.shape or (batch != images).any()
    minidl.manual_seed(1)
    assert (transform(images) != batch).any()


@every_transform
def test_grey_images_too(transform):
    assert transform(colours()[:, :1]).shape[:2] == (6, 1)


@every_transform
def test_refuses_what_is_no_image(transform):
    with pytest.raises(TypeError, match=r"floats in \[0, 1\], got uint8.*ToTensor"):
        transform(np.zeros((3, 8, 8), np.uint8))
    with pytest.raises(TypeError, match="got Image"):
        transform(Image.new("RGB", (8, 8)))
    with pytest.raises(ValueError, match=r"got shape \(8, 8\)"):
        transform(np.zeros((8, 8), np.float32))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: RandomVerticalFlip(-1), "probability"),
        (lambda: RandomCrop(-3), "size is"),
        (lambda: RandomCrop(3, padding_mode="wrap"), "padding_mode is one of"),
        (lambda: RandomRotation(-5), "degrees is"),
        (lambda: RandomAffine(0, translate=(2, 0)), "two shares"),
        (lambda: RandomAffine(0, scale=(-1, 1)), "above 0"),
        (lambda: RandomResizedCrop(8, scale=(0, 1)), "shares of the area"),
        (lambda: RandomResizedCrop(8, ratio=(0, 1)), "above 0"),
        (lambda: ColorJitter(brightness=-1), "brightness"),
        (lambda: ColorJitter(hue=0.7), "hue"),
        (lambda: GaussianNoise(sigma=-1), "sigma"),
        (lambda: Cutout(0), "length"),
        (lambda: RandAugment(magnitude=31), "magnitude"),
        (lambda: MixUp(0), "alpha"),
        (lambda: ColorJitter(1)(np.zeros((2, 8, 8), np.float32)), "1 or 3 channels, got 2"),
        (lambda: RandAugment()(np.zeros((2, 8, 8), np.float32)), "1 or 3 channels, got 2"),
    ],
)
def test_refuses_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_flip():
    assert (RandomVerticalFlip(1.0)(IMAGES) == IMAGES[..., ::-1, :]).all()
    assert (RandomHorizontalFlip(1.0)(IMAGES) == IMAGES[..., ::-1]).all()
    assert (RandomHorizontalFlip(0.0)(IMAGES) == IMAGES).all()
    assert RandomHorizontalFlip(1.0)(IMAGES[0]).shape == (2, 5, 4)
    minidl.manual_seed(0)
    many = np.broadcast_to(IMAGES[:1], (1000, 2, 5, 4))
    flipped = (RandomHorizontalFlip(0.3)(many) != many).any((1, 2, 3)).sum()
    assert 250 < flipped < 350
    with pytest.raises(ValueError, match="probability"):
        RandomHorizontalFlip(1.5)


def test_crop_is_a_shift():
    minidl.manual_seed(0)
    crop = RandomCrop((5, 4), padding=1, fill=-1)
    padded = np.pad(IMAGES[0], ((0, 0), (1, 1), (1, 1)), constant_values=-1)
    windows = {padded[:, y : y + 5, x : x + 4].tobytes() for y in range(3) for x in range(3)}
    found = {crop(IMAGES[0]).tobytes() for _ in range(200)}
    assert found == windows
    assert crop(IMAGES).dtype == np.float32 and crop(IMAGES).shape == IMAGES.shape
    assert RandomCrop(3)(IMAGES).shape == (6, 2, 3, 3)
    with pytest.raises(ValueError, match="window of 9×9"):
        RandomCrop(9, padding=1)(IMAGES)


def test_the_same_whoever_loads_it():
    """A batch at once, image by image, and in worker processes: the same images."""
    transform = Compose([t for t in EXAMPLES.values() if not isinstance(t, RandomResizedCrop)])
    transform = Compose([transform, EXAMPLES["RandomResizedCrop"]])  # last: it changes the size

    class OneByOne(Digits):
        def __getitem__(self, index):
            return super().__getitem__(index)

    def load(kind, **kwargs):
        loader = DataLoader(
            Subset(kind(transform=transform), range(20)), 8, shuffle=True, seed=5, **kwargs
        )
        return [np.concatenate([x.numpy() for x, _ in loader]) for _ in range(2)]

    first, second = load(Digits)
    assert (first != second).any()
    for kind, kwargs in [(OneByOne, {}), (Digits, {"num_workers": 2})]:
        again = load(kind, **kwargs)
        assert (again[0] == first).all() and (again[1] == second).all()


# Warps ------------------------------------------------------------------------------------


def test_a_quarter_turn_is_counter_clockwise():
    square = colours(2, 7)
    for degrees, turns in ((90, 1), (-90, -1), (180, 2)):
        turned = RandomRotation((degrees, degrees))(square)
        np.testing.assert_allclose(turned, np.rot90(square, turns, (2, 3)), atol=1e-6)


def test_affine_shifts_scales_and_shears():
    images = colours(1, 9)
    identity = RandomAffine(0)(images)
    np.testing.assert_allclose(identity, images, atol=1e-6)
    matrix = augment.translation(2, -1)[None]
    shifted = augment.warp_about_centre(images, matrix, fill=0.25)
    np.testing.assert_allclose(shifted[..., :8, 2:], images[..., 1:, :7], atol=1e-6)
    np.testing.assert_allclose(shifted[..., 8, :], 0.25, atol=1e-6)
    np.testing.assert_allclose(shifted[..., :2], 0.25, atol=1e-6)
    twice = augment.warp_about_centre(images, augment.scaling(2)[None])
    np.testing.assert_allclose(twice[..., ::2, ::2], images[..., 2:7, 2:7], atol=1e-6)
    sheared = augment.warp_about_centre(images, augment.shearing(45, 0)[None])  # x += y
    np.testing.assert_allclose(sheared[..., 5, 1:], images[..., 5, :-1], atol=1e-6)


def test_resized_crop_against_pillow():
    """A window that is enlarged: Pillow's bilinear filter is then plain interpolation."""
    image = colours(1, 12)[0]
    crop = RandomResizedCrop((24, 36))
    (ours,) = crop.apply(image[None], [(0.0, 0.0, 12.0, 12.0)])
    for channel, expected in zip(ours, image):
        theirs = Image.fromarray(expected).resize((36, 24), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(channel, np.asarray(theirs), atol=1e-5)


def test_resized_crop_draws_within_its_ranges():
    crop, rng = RandomResizedCrop(8), np.random.default_rng(0)
    windows = np.array([crop.draw(rng, (3, 60, 60)) for _ in range(300)])
    area, ratio = windows[:, 2] * windows[:, 3] / 3600, windows[:, 3] / windows[:, 2]
    assert area.min() > 0.06 and area.max() > 0.8
    assert ratio.min() > 0.65 and ratio.max() < 1.5
    assert (windows[:, :2] + windows[:, 2:] <= 60).all() and (windows[:, :2] >= 0).all()
    narrow = RandomResizedCrop(8, scale=(0.9, 1)).draw(rng, (3, 4, 60))
    np.testing.assert_allclose(narrow, (0, 27.5, 4, 5))  # as wide as 4/3 allows


# Values -----------------------------------------------------------------------------------


def pillow(function):
    """A Pillow function on our images: bytes there, so equal to half a step."""
    image = (colours(1, 32)[0] * 150 + 40).round()
    picture = Image.fromarray(image.transpose(1, 2, 0).astype(np.uint8))
    return (image / 255).astype(np.float32), np.asarray(function(picture)).transpose(2, 0, 1) / 255


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("name", ["Brightness", "Contrast", "Color", "Sharpness"])
def test_adjustments_against_pillow(name, factor):
    image, expected = pillow(lambda picture: getattr(ImageEnhance, name)(picture).enhance(factor))
    adjust = getattr(augment, f"adjust_{'saturation' if name == 'Color' else name.lower()}")
    np.testing.assert_allclose(adjust(image, factor), expected, atol=2.5 / 255)


@pytest.mark.parametrize(
    "adjust, amount, theirs, atol",
    [
        (augment.posterize, 3, lambda p: ImageOps.posterize(p, 3), 1e-6),
        (augment.solarize, 0.5, lambda p: ImageOps.solarize(p, 128), 1e-6),
        (augment.autocontrast, 0, ImageOps.autocontrast, 1.5 / 255),
        (augment.equalize, 0, ImageOps.equalize, 1.5 / 255),
    ],
)
def test_operations_against_pillow(adjust, amount, theirs, atol):
    image, expected = pillow(theirs)
    assert np.abs(expected - image).max() > 0.05
    np.testing.assert_allclose(adjust(image, amount), expected, atol=atol)


def test_hue_turns_the_colour_circle():
    red = np.zeros((3, 2, 2), np.float32)
    red[0] = 1
    np.testing.assert_allclose(augment.adjust_hue(red, 1 / 3), red[[1, 0, 2]], atol=1e-6)
    np.testing.assert_allclose(augment.adjust_hue(red, -1 / 3), red[[1, 2, 0]], atol=1e-6)


def test_noise_and_cutout():
    flat = np.full((300, 1, 16, 16), 0.5, np.float32)
    minidl.manual_seed(0)
    noisy = GaussianNoise(0.1, 0.05)(flat)
    assert abs(noisy.mean() - 0.6) < 0.001 and abs(noisy.std() - 0.05) < 0.002
    holes = (Cutout(5)(flat) == 0).sum((1, 2, 3))
    assert holes.max() == 25 and holes.min() < 25  # some stick out
    assert (Cutout(5)(flat)[:, 0] == 0).any(0).all()  # every pixel's turn comes


def test_randaugment_draws_them_all():
    transform, rng, seen = RandAugment(1, 30), np.random.default_rng(0), set()
    image = colours(1, 16)[0]
    for _ in range(300):
        seen.add(transform.apply(image[None], [transform.draw(rng, image.shape)]).tobytes())
    # 14, of which 8 have two signs; TranslateX ... differ by sign, so 22 results.
    assert len(transform.operations(image.shape)) == 14
    assert 20 <= len(seen) <= 22
    assert (RandAugment(0)(image) == image).all()


# Mixing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [MixUp, CutMix])
def test_mixing_keeps_labels_true(kind):
    """Images of one value each, their class's: then the label is the mean of the pixels."""
    n = 8
    images = np.tile(np.arange(n, dtype=np.float32).reshape(n, 1, 1, 1), (1, 3, 10, 10))
    minidl.manual_seed(0)
    mixed, labels = kind(num_classes=n)(minidl.tensor(images), minidl.tensor(np.arange(n)))
    assert labels.dtype == np.float32 and labels.shape == (n, n)
    np.testing.assert_allclose(labels.numpy().sum(1), 1, rtol=1e-6)
    expected = labels.numpy() @ np.arange(n)
    np.testing.assert_allclose(mixed.numpy().mean((1, 2, 3)), expected, rtol=1e-5)
    assert np.count_nonzero((labels.numpy() > 0).sum(1) == 2) >= n - 2
    if kind is CutMix:
        assert set(np.unique(mixed.numpy())) <= set(range(n))
    scores = minidl.randn(n, n, requires_grad=True)
    F.cross_entropy(scores, labels).backward()
    expected = (F.softmax(scores.detach(), dim=1) - labels).numpy() / n
    np.testing.assert_allclose(scores.grad.numpy(), expected, atol=1e-6)
    again, soft = kind()(mixed, labels)  # soft labels need no num_classes
    assert soft.shape == (n, n) and again.shape == mixed.shape


def test_mixing_refuses_labels_that_do_not_fit():
    x, y = minidl.zeros(4, 1, 8, 8), minidl.tensor([0, 1, 2, 3])
    with pytest.raises(ValueError, match="needs num_classes"):
        MixUp()(x, y)
    with pytest.raises(ValueError, match=r"\[0, 3\), got 0 to 3"):
        CutMix(num_classes=3)(x, y)
    with pytest.raises(ValueError, match="3 labels"):
        MixUp(num_classes=4)(x, y[:3])
    with pytest.raises(ValueError, match=r"integers \(N,\)"):
        MixUp(num_classes=4)(x, y.float())


def test_mixing_does_not_depend_on_the_workers():
    def load(**kwargs):
        data = Subset(Digits(transform=RandomCrop(8, padding=1)), range(24))
        mix = CutMix(num_classes=10).collate
        loader = DataLoader(data, 8, shuffle=True, seed=5, collate_fn=mix, **kwargs)
        return [[a.numpy() for batch in loader for a in batch] for _ in range(2)]

    first, again = load(), load(num_workers=2)
    for epoch, other in zip(first, again):
        assert all((a == b).all() for a, b in zip(epoch, other))
    assert any((a != b).any() for a, b in zip(*first))
