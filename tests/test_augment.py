"""Random flips and crops: what they do, and that they depend on (seed, epoch, index) only."""

import numpy as np
import pytest

import minidl
from minidl.data import DataLoader, Digits, Subset
from minidl.data.augment import Compose, RandomCrop, RandomHorizontalFlip

IMAGES = np.arange(6 * 2 * 5 * 4, dtype=np.float32).reshape(6, 2, 5, 4) + 1


def test_flip():
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
    transform = Compose([RandomHorizontalFlip(), RandomCrop(8, padding=1)])

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
