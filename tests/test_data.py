"""Datasets, samplers, collating, and the loader: same batches whoever loads them."""

import collections
import gc
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from minidl.backend import random as backend_random
from minidl.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    ImageDataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
    get_worker_info,
    random_split,
    sample_rng,
    sample_rngs,
    transforms,
)
from minidl.tensor import Tensor

pytestmark = pytest.mark.timeout(60)  # nothing here may hang

# How a loader may load. None of these may change a batch.
WAYS = {
    "here": {},
    "thread": {"prefetch_thread": True},
    "2 workers": {"num_workers": 2},
    "3 persistent workers": {"num_workers": 3, "persistent_workers": True, "prefetch_factor": 1},
}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())


class Numbers(Dataset):
    """Sample i is (an array, i); with noise that belongs to the sample."""

    def __init__(self, n=23, noise=False):
        self.n, self.noise = n, noise

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        if not 0 <= index < self.n:
            raise IndexError(index)
        x = np.full(3, index, np.float32)
        if self.noise:
            x = x + sample_rng().random(3, np.float32) + sample_rng().random(dtype=np.float32)
        return x, index


def values(batches):
    """Batches as nested lists, to compare."""

    def plain(b):
        if isinstance(b, Tensor):
            return b.array.tolist()
        return [plain(v) for v in b] if isinstance(b, list | tuple) else b

    return [plain(b) for b in batches]


def indices(batches):
    return [y for _, y in values(batches)]


def no_children():
    """Whether every worker process is gone, within a second."""
    gc.collect()
    deadline = time.monotonic() + 1
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.01)
    return multiprocessing.active_children() == []


# Datasets -----------------------------------------------------------------------------------------


def test_tensor_dataset():
    x, y = np.arange(12.0).reshape(6, 2), np.arange(6)
    data = TensorDataset(Tensor(x), y)
    assert len(data) == 6 and data[2][1] == 2 and data[2][0].array.tolist() == [4, 5]
    a, b = next(iter(DataLoader(data, 4)))
    assert isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == np.float64
    assert np.array_equal(a.array, x[:4]) and np.array_equal(b.array, y[:4])
    with pytest.raises(ValueError, match=r"different lengths: \[6, 5\]"):
        TensorDataset(x, y[:5])
    with pytest.raises(ValueError, match="at least one"):
        TensorDataset()


def test_tensor_dataset_keeps_the_tape():
    x = Tensor(np.ones((4, 2), np.float32), requires_grad=True)
    (batch,) = next(iter(DataLoader(TensorDataset(x), 2, collate_fn=lambda s: s[0])))
    assert batch.requires_grad


def test_subset_and_concat():
    subset = Subset(Numbers(), [5, 3, 9])
    assert len(subset) == 3 and subset[1][1] == 3
    both = subset + Numbers(4)
    assert isinstance(both, ConcatDataset) and len(both) == 7
    assert [both[i][1] for i in range(7)] == [5, 3, 9, 0, 1, 2, 3]
    assert both[-1][1] == 3 and both[-7][1] == 5
    for i in (7, -8):
        with pytest.raises(IndexError):
            both[i]
    assert [y for _, y in both] == [5, 3, 9, 0, 1, 2, 3]  # iterable, by IndexError at its end


@pytest.mark.parametrize(
    ("lengths", "sizes"),
    [
        ([20, 3], [20, 3]),
        ([0.5, 0.5], [12, 11]),
        ([0.1, 0.2, 0.7], [3, 4, 16]),
        ([1.0], [23]),
        ([23], [23]),
        ([0, 23], [0, 23]),
    ],
)
def test_random_split(lengths, sizes):
    parts = random_split(Numbers(), lengths, seed=1)
    assert [len(p) for p in parts] == sizes
    assert sorted(y for p in parts for _, y in p) == list(range(23))


def test_random_split_seeds():
    def split(**kwargs):
        return random_split(Numbers(), [20, 3], **kwargs)[1].indices

    assert split(seed=1) == split(seed=1) != split(seed=2)
    assert split() != split()  # the next stream of minidl's generator
    backend_random.manual_seed(5)
    first = split()
    backend_random.manual_seed(5)
    assert split() == first
    generator = backend_random.Generator(3)
    assert split(generator=generator) == split(generator=backend_random.Generator(3))
    for lengths in ([20, 4], [0.5, 0.6], [24, -1]):
        with pytest.raises(ValueError, match="must sum to 23"):
            random_split(Numbers(), lengths)
    with pytest.raises(ValueError, match="not both"):
        split(seed=1, generator=generator)


# Samplers -----------------------------------------------------------------------------------------


def test_samplers():
    assert list(SequentialSampler(range(4))) == [0, 1, 2, 3]
    sampler = RandomSampler(range(50), seed=3)
    first, second = list(sampler), list(sampler)
    assert sorted(first) == sorted(second) == list(range(50)) and first != second
    sampler.set_epoch(0)
    assert list(sampler) == first and list(RandomSampler(range(50), seed=4)) != first
    few = RandomSampler(range(50), num_samples=7, seed=3)
    assert list(few) == first[:7] and len(few) == 7
    drawn = list(RandomSampler(range(5), replacement=True, num_samples=200, seed=1))
    assert len(drawn) == 200 and set(drawn) == set(range(5))
    assert list(RandomSampler([])) == []
    with pytest.raises(ValueError, match="empty dataset"):
        list(RandomSampler([], num_samples=3))


def test_batch_sampler():
    assert list(BatchSampler(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(BatchSampler(range(7), 3, drop_last=True)) == [[0, 1, 2], [3, 4, 5]]
    assert len(BatchSampler(range(7), 3)) == 3 and len(BatchSampler(range(7), 3, True)) == 2
    for size in (0, -1, 2.5, True, None):
        with pytest.raises(ValueError, match="batch_size"):
            BatchSampler(range(7), size)


def test_the_order_of_a_seed_is_fixed():
    """Written down: an epoch's order must not change from one version to the next."""
    assert list(RandomSampler(range(8), seed=0)) == [7, 5, 6, 2, 0, 1, 4, 3]


# Collating ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "expected", "dtype"),
    [
        ([1, 2], [1, 2], np.int64),
        ([1.5, 2], [1.5, 2], np.float32),
        ([1, 2.5], [1, 2.5], np.float32),
        ([True, False], [True, False], np.bool_),
        ([np.float32(1), np.float32(2)], [1, 2], np.float32),
        ([np.uint8(1), np.uint8(2)], [1, 2], np.uint8),
        ([np.ones((1, 2), np.float16)] * 2, [[[1, 1]], [[1, 1]]], np.float16),
        ([Tensor(np.float64(1))] * 2, [1, 1], np.float64),
    ],
)
def test_collate_numbers(samples, expected, dtype):
    out = default_collate(samples)
    assert isinstance(out, Tensor) and out.dtype == dtype and out.array.tolist() == expected


def test_collate_structures():
    Pair = collections.namedtuple("Pair", "x y")
    out = default_collate([Pair(1, {"a": "s", "b": (2, [3])}), Pair(4, {"a": "t", "b": (5, [6])})])
    assert type(out) is Pair and out.x.array.tolist() == [1, 4]
    assert out.y["a"] == ["s", "t"] and values(out.y["b"]) == [[2, 5], [[3, 6]]]


@pytest.mark.parametrize(
    ("samples", "error", "says"),
    [
        ([None, None], TypeError, "NoneType; give the DataLoader a collate_fn"),
        ([(1, 2), (1,)], ValueError, r"different lengths.*\[1, 2\]"),
        ([np.ones(2), np.ones(3)], ValueError, r"different shapes.*\(2,\), \(3,\)"),
    ],
)
def test_collate_errors(samples, error, says):
    with pytest.raises(error, match=says):
        default_collate(samples)


# The loader: which batches come -------------------------------------------------------------------


@ways
@pytest.mark.parametrize("drop_last", [False, True])
def test_in_order(way, drop_last):
    loader = DataLoader(Numbers(), 5, drop_last=drop_last, **way)
    expected = [list(range(i, min(i + 5, 23))) for i in range(0, 20 if drop_last else 23, 5)]
    for _ in range(2):
        assert indices(loader) == expected
    assert len(loader) == len(expected)


@ways
def test_shuffle_and_noise_depend_on_seed_and_epoch_only(way):
    def epochs(seed, way):
        loader = DataLoader(Numbers(noise=True), 4, shuffle=True, seed=seed, **way)
        return [values(loader) for _ in range(3)]

    backend_random.default_generator.next_key()  # other random numbers drawn meanwhile
    a, b, c = epochs(1, way)
    assert [a, b, c] == epochs(1, {}) and a != epochs(2, {})[0]
    assert sorted(i for _, y in a for i in y) == list(range(23))
    assert a != b != c
    # The noise of a sample is another one in each epoch.
    assert len({x for batch in (a, b, c) for xs, _ in batch for x in map(tuple, xs)}) == 3 * 23


def test_noise_does_not_depend_on_the_batch_size_or_order():
    def noise(**kwargs):
        loader = DataLoader(Numbers(noise=True), seed=7, **kwargs)
        return {y: tuple(x) for xs, ys in values(loader) for x, y in zip(xs, ys)}

    assert noise(batch_size=4) == noise(batch_size=23) == noise(batch_size=1, shuffle=True)


def test_the_seed_is_minidls_by_default():
    loader = DataLoader(Numbers(noise=True), 4, shuffle=True)
    backend_random.manual_seed(11)
    first = values(loader)
    assert first == values(DataLoader(Numbers(noise=True), 4, shuffle=True, seed=11))
    backend_random.manual_seed(12)
    loader.set_epoch(0)
    assert values(loader) == values(DataLoader(Numbers(noise=True), 4, shuffle=True, seed=12))
    by_generator = [
        indices(DataLoader(Numbers(), 4, True, generator=backend_random.Generator(s)))
        for s in (1, 1, 2)
    ]
    assert by_generator[0] == by_generator[1] != by_generator[2]


@ways
@pytest.mark.parametrize("stop", [0, 3, 6])
def test_resumed_in_the_middle_of_an_epoch(way, stop):
    whole = DataLoader(Numbers(noise=True), 4, shuffle=True, seed=5, **way)
    epochs = [values(whole) for _ in range(4)]

    stopped = DataLoader(Numbers(noise=True), 4, shuffle=True, seed=5, **way)
    for _ in stopped:
        pass
    state = stopped.state_dict()
    if stop:
        for count, _ in enumerate(stopped, 1):
            state = stopped.state_dict()
            if count == stop:
                break
    assert state == {"seed": 5, "epoch": 1, "batch": stop}
    # Another process, with another seed and another number of workers.
    resumed = DataLoader(Numbers(noise=True), 4, shuffle=True, seed=99, num_workers=1)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert values(resumed) == epochs[1][stop:]
    assert values(resumed) == epochs[2]
    del whole, stopped
    assert no_children()


def test_an_epoch_left_in_the_middle_is_followed_by_the_next():
    loader = DataLoader(Numbers(), 4, shuffle=True, seed=5)
    epochs = [indices(loader) for _ in range(3)]
    again = DataLoader(Numbers(), 4, shuffle=True, seed=5)
    next(iter(again))
    assert indices(again) == epochs[1]
    assert indices(again) == epochs[2]
    again.set_epoch(1)
    assert indices(again) == epochs[1]


def test_two_iterators_at_once():
    loader = DataLoader(Numbers(), 4, shuffle=True, seed=5)
    first, second = indices(loader), indices(loader)
    loader.set_epoch(0)
    pairs = list(zip(loader, loader))
    assert indices(a for a, _ in pairs) == first and indices(b for _, b in pairs) == second


def test_samplers_given():
    assert indices(DataLoader(Numbers(), 2, sampler=[4, 2, 7])) == [[4, 2], [7]]
    batches = DataLoader(Numbers(), batch_sampler=[[1], [2, 3]])
    assert indices(batches) == [[1], [2, 3]] and len(batches) == 2

    class Epoch(SequentialSampler):
        def set_epoch(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            return iter([self.epoch])

    loader = DataLoader(Numbers(), sampler=Epoch(Numbers()))
    assert [indices(loader) for _ in range(3)] == [[[0]], [[1]], [[2]]]
    own = DataLoader(Numbers(), 4, sampler=RandomSampler(Numbers(), seed=5))
    assert indices(own) == indices(DataLoader(Numbers(), 4, shuffle=True, seed=5))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"batch_size": 0},
        {"num_workers": -1},
        {"prefetch_factor": 0},
        {"timeout": -1},
        {"shuffle": True, "sampler": [1]},
        {"batch_sampler": [[1]], "batch_size": 2},
        {"batch_sampler": [[1]], "shuffle": True},
        {"persistent_workers": True},
        {"seed": 1, "generator": backend_random.Generator(1)},
    ],
)
def test_arguments_that_are_refused(kwargs):
    with pytest.raises(ValueError):
        DataLoader(Numbers(), **kwargs)


def test_lists_are_datasets():
    assert values(DataLoader([1, 2, 3], 2)) == [[1, 2], [3]]
    assert values(DataLoader([], 2)) == [] and len(DataLoader([], 2)) == 0


def test_collate_fn_gets_the_samples():
    loader = DataLoader(TensorDataset(np.arange(4)), 2, collate_fn=lambda samples: len(samples))
    assert list(loader) == [2, 2]


# Whole batches at once ----------------------------------------------------------------------------


class Images(ImageDataset):
    def __init__(self, transform=None, **kwargs):
        pixels = np.arange(10 * 12, dtype=np.uint8).reshape(10, 1, 3, 4)
        super().__init__(pixels, np.arange(10) % 3, transform, **kwargs)


def flip(image):
    """A random transform for one image."""
    return image[..., ::-1] if sample_rng().random() < 0.5 else image


class BatchedFlip:
    """The same for a batch."""

    batched = True

    def __call__(self, images):
        flips = [rng.random() < 0.5 for rng in sample_rngs(len(images))]
        return np.where(np.reshape(flips, (-1, 1, 1, 1)), images[..., ::-1], images)


def test_a_batch_at_once_is_the_same(monkeypatch):
    normalize = transforms.Normalize((0.2,), (0.5,))
    slow = DataLoader(Images(transforms.Lambda(normalize)), 4, shuffle=True, seed=1)
    fast = DataLoader(Images(normalize), 4, shuffle=True, seed=1)
    assert values(slow) == values(fast)

    def refuse(self, index):
        raise AssertionError("sample by sample")

    monkeypatch.setattr(ImageDataset, "__getitem__", refuse)
    assert len(list(fast)) == 3
    assert len(list(DataLoader(Subset(Images(), [1, 2]), 2))) == 1
    with pytest.raises(AssertionError):
        list(slow)
    with pytest.raises(AssertionError):
        list(DataLoader(Images(target_transform=str), 4))


def test_random_transforms_may_be_batched():
    slow = DataLoader(Images(flip), 4, shuffle=True, seed=1)
    fast = DataLoader(Images(BatchedFlip()), 4, shuffle=True, seed=1)
    a, b = values(slow), values(fast)
    assert a == b and a != values(DataLoader(Images(), 4, shuffle=True, seed=1))


def test_one_generator_for_a_whole_batch_is_refused():
    wrong = transforms.Lambda(flip, batched=True)
    with pytest.raises(RuntimeError, match=r"asked for 1 sample\(s\) while 4 are loaded at once"):
        list(DataLoader(Images(wrong), 4))


def test_a_getitem_that_was_overridden_is_not_bypassed():
    class Mine(Images):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image + 1, label

    (images, _), *_ = DataLoader(Mine(), 4)
    assert images.array.min() == 1
    (images, _), *_ = DataLoader(Subset(Mine(), range(4)), 4)
    assert images.array.min() == 1


def test_getitems_as_in_pytorch():
    class Many(Numbers):
        def __getitems__(self, indices):
            return [(np.zeros(1), -i) for i in indices]

    assert indices(DataLoader(Many(4), 2)) == [[0, -1], [-2, -3]]


def test_sample_rng_outside_a_loader():
    backend_random.manual_seed(1)
    a = sample_rng().random(), sample_rng().random()
    backend_random.manual_seed(1)
    assert a == (sample_rng().random(), sample_rng().random()) and a[0] != a[1]


# Streams ------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __init__(self, n=10, split=True):
        self.n, self.split = n, split

    def __iter__(self):
        info = get_worker_info()
        start, step = (info.id, info.num_workers) if info and self.split else (0, 1)
        for i in range(start, self.n, step):
            yield i + sample_rng().random() / 2


@pytest.mark.parametrize("n", [0, 1, 7, 10])
def test_streams(n):
    whole = [round(v) for batch in values(DataLoader(Stream(n), 3)) for v in batch]
    assert whole == list(range(n))
    parts = values(DataLoader(Stream(n), 3, num_workers=2))
    assert sorted(round(v) for batch in parts for v in batch) == whole
    # The workers take turns; each has a part of the stream, and numbers of its own.
    assert [round(v) for v in (parts or [[]])[0]] == list(range(0, n, 2))[:3]
    twice = values(DataLoader(Stream(n, split=False), 3, num_workers=2))
    assert len(twice) == 2 * -(-n // 3)
    assert all(len(b) == 3 for b in values(DataLoader(Stream(n), 3, drop_last=True)))


@pytest.mark.parametrize("way", [{}, {"num_workers": 2}], ids=repr)
def test_streams_resume(way):
    loader = DataLoader(Stream(), 2, seed=3, **way)
    epochs = [values(loader), values(loader)]
    loader.load_state_dict({"seed": 3, "epoch": 1, "batch": 2})
    assert values(loader) == epochs[1][2:] and epochs[0] != epochs[1]


def test_stream_arguments():
    with pytest.raises(ValueError, match="own order"):
        DataLoader(Stream(), shuffle=True)
    with pytest.raises(TypeError):
        len(DataLoader(Stream()))


# Workers ------------------------------------------------------------------------------------------


def test_spawned_workers():
    """Spawned workers inherit nothing: all that they need is sent."""
    data = Numbers(noise=True)
    loader = DataLoader(data, 8, True, num_workers=1, multiprocessing_context="spawn", seed=2)
    assert values(loader) == values(DataLoader(data, 8, shuffle=True, seed=2))
    assert no_children()


class Failing(Numbers):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def __getitem__(self, index):
        if index == 13:
            raise self.error
        return super().__getitem__(index)


@ways
def test_exceptions_come_out_as_they_are(way):
    loader = DataLoader(Failing(KeyError("missing")), 5, **way)
    seen = []
    with pytest.raises(KeyError, match="missing") as error:
        for batch in loader:
            seen.append(batch)
    assert len(seen) == 2  # what came before it was delivered
    assert "sample 13" in "".join(error.value.__notes__)
    if way.get("num_workers"):
        text = str(error.value.__cause__)
        assert "in DataLoader worker" in text and "__getitem__" in text
    del loader, error
    assert no_children()


class Unpicklable(Exception):
    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")


def test_exceptions_that_cannot_travel():
    with pytest.raises(RuntimeError, match="Unpicklable: this and that"):
        list(DataLoader(Failing(Unpicklable("this", "that")), 5, num_workers=2))
    loader = DataLoader(Numbers(), 2, num_workers=1, collate_fn=lambda samples: lambda: samples)
    with pytest.raises(Exception, match="pickle"):
        list(loader)


def test_persistent_workers_survive_an_exception():
    loader = DataLoader(Failing(KeyError()), 5, num_workers=2, persistent_workers=True)
    for _ in range(2):
        with pytest.raises(KeyError):
            list(loader)
    pids = {p.pid for p in multiprocessing.active_children()}
    assert len(pids) == 2
    loader.set_epoch(0)
    next(iter(loader))
    assert {p.pid for p in multiprocessing.active_children()} == pids
    del loader
    assert no_children()


class Pids(Numbers):
    def __getitem__(self, index):
        return os.getpid()


def test_workers_persist_only_if_asked():
    def pids(loader):
        return {pid for batch in values(loader) for pid in batch}

    loader = DataLoader(Pids(), num_workers=2)
    first = pids(loader)
    assert len(first) == 2 and os.getpid() not in first and not first & pids(loader)
    assert no_children()
    loader = DataLoader(Pids(), num_workers=2, persistent_workers=True)
    assert pids(loader) == pids(loader)


def test_one_iterator_at_a_time_with_persistent_workers():
    loader = DataLoader(Numbers(), 4, num_workers=2, persistent_workers=True)
    old = iter(loader)
    next(old)
    assert len(indices(loader)) == 6
    with pytest.raises(RuntimeError, match="newer one"):
        next(old)


class Dying(Numbers):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def __getitem__(self, index):
        if index == 9:
            if self.how == "exit":
                os._exit(3)
            os.kill(os.getpid(), self.how)
        return super().__getitem__(index)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("how", "says"),
    [
        (signal.SIGKILL, r"worker 0 \(pid \d+\) was killed by SIGKILL \(out of memory\?\)"),
        (signal.SIGUSR1, "was killed by SIGUSR1"),
        ("exit", "ended with exit code 3"),
    ],
)
@pytest.mark.parametrize("persistent", [False, True])
def test_a_worker_that_dies_is_an_error(how, says, persistent):
    data = Dying(how)
    loader = DataLoader(data, 4, num_workers=2, persistent_workers=persistent)
    for _ in range(2):  # with persistent workers, the next epoch starts new ones
        with pytest.raises(RuntimeError, match=says):
            list(loader)
    assert no_children()


@pytest.mark.timeout(20)
def test_a_worker_killed_while_it_is_idle():
    loader = DataLoader(Numbers(), 1, num_workers=2, prefetch_factor=1)
    batches = iter(loader)
    next(batches)
    time.sleep(0.2)
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="was killed by SIGKILL"):
        list(batches)
    assert no_children()


class Slow(Numbers):
    def __getitem__(self, index):
        time.sleep(30)


@pytest.mark.timeout(20)
def test_timeout_and_stuck_workers():
    loader = DataLoader(Slow(), 4, num_workers=2, timeout=0.2)
    with pytest.raises(TimeoutError, match=r"worker 0 gave no batch in 0\.2 s"):
        next(iter(loader))
    assert no_children()


@ways
def test_nothing_is_left_behind(way):
    loader = DataLoader(Numbers(200), 2, **way)
    for _ in loader:
        break
    batches = iter(loader)
    next(batches)
    del batches
    with pytest.raises(ZeroDivisionError):
        for _ in loader:
            raise ZeroDivisionError
    del loader
    assert no_children()
    assert not [t for t in threading.enumerate() if "prefetch" in t.name]


class Big(Numbers):
    def __getitem__(self, index):
        return np.full(200_000, index, np.float32)


@pytest.mark.timeout(30)
def test_large_requests_and_large_answers_do_not_lock_up():
    """Both directions fill their pipe at once."""
    repeated = [[i] * 3 + list(range(20)) * 2 for i in range(20)]
    loader = DataLoader(Big(20), batch_sampler=repeated[:4], num_workers=1)
    assert [b.array[0, 0] for b in loader] == [0, 1, 2, 3]
    loader = DataLoader(
        TensorDataset(np.arange(10.0)),
        batch_sampler=[list(range(10)) * 20_000] * 6,
        num_workers=1,
    )
    assert [b[0].shape for b in loader] == [(200_000,)] * 6


def test_what_comes_out_of_a_worker_is_writable():
    for batch in DataLoader(Numbers(), 4, num_workers=1):
        assert batch[0].array.flags.writeable and batch[1].dtype == np.int64


class Draws(Numbers):
    def __getitem__(self, index):
        return random.random(), np.random.random(), backend_random.generator().random()


def test_workers_draw_different_numbers_of_their_own():
    def draws(seed):
        loader = DataLoader(Draws(8), 1, num_workers=2, seed=seed)
        return values(loader)

    state = random.getstate(), np.random.get_state()[1].tolist()
    a = draws(1)
    assert a == draws(1) != draws(2)
    assert all(len({str(b[i]) for b in a}) == 8 for i in range(3))
    assert state == (
        random.getstate(),
        np.random.get_state()[1].tolist(),
    )  # the parent's are its own


def test_worker_init_fn():
    seen = []

    def init(worker):
        seen.append(worker)
        assert get_worker_info().id == worker and get_worker_info().num_workers == 2

    class Seen(Numbers):
        def __getitem__(self, index):
            return seen[0]

    for persistent in (False, True):
        loader = DataLoader(
            Seen(4), 1, num_workers=2, worker_init_fn=init, persistent_workers=persistent
        )
        for _ in range(2):
            assert values(loader) == [[0], [1], [0], [1]]
    del loader
    assert seen == [] and get_worker_info() is None

    def fail(worker):
        raise LookupError(f"worker {worker} cannot start")

    with pytest.raises(LookupError, match="worker 0 cannot start"):
        list(DataLoader(Numbers(), 2, num_workers=2, worker_init_fn=fail))
    assert no_children()


def test_a_forked_copy_of_the_parent_leaves_the_workers_alone():
    batches = iter(DataLoader(Numbers(), 4, num_workers=2))
    next(batches)
    pid = os.fork()
    if pid == 0:
        del batches
        gc.collect()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert len(list(batches)) == 5


SCRIPT = """
import multiprocessing, os, sys, time
from minidl.data import DataLoader, Dataset

class Numbers(Dataset):
    def __len__(self):
        return 1000
    def __getitem__(self, index):
        time.sleep(0.01)
        return index

if __name__ == "__main__":
    for batch in DataLoader(Numbers(), 2, num_workers=2, prefetch_factor=4):
        print(*[p.pid for p in multiprocessing.active_children()], flush=True)
"""


def test_sigterm_to_all_is_the_parents_business(tmp_path):
    """A scheduler tells the whole group; the parent may finish its step and save."""
    script = SCRIPT.replace("import multiprocessing,", "import multiprocessing, signal,").replace(
        'if __name__ == "__main__":',
        "caught = []\nsignal.signal(signal.SIGTERM, lambda *a: caught.append(1))\n"
        'if __name__ == "__main__":',
    )
    script += "        if len(caught) > 5: sys.exit('finished')\n        caught += caught[:1]\n"
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    workers = [int(pid) for pid in process.stdout.readline().split()]
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert errors == "finished\n" and all(gone(pid) for pid in workers)


def gone(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="reads /proc")
@pytest.mark.parametrize(
    ("method", "how"),
    [
        ("fork", signal.SIGINT),
        ("fork", signal.SIGTERM),
        ("fork", signal.SIGKILL),
        ("spawn", signal.SIGKILL),
    ],
)
def test_the_workers_end_with_their_parent(method, how, tmp_path):
    script = SCRIPT.replace("num_workers=2,", f"num_workers=2, multiprocessing_context={method!r},")
    (tmp_path / "script.py").write_text(script)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2 and not any(gone(pid) for pid in workers)
    if how == signal.SIGINT:  # Ctrl-C reaches the whole group
        os.killpg(process.pid, how)
    else:
        process.send_signal(how)
    _, errors = process.communicate(timeout=20)
    deadline = time.monotonic() + 5
    while not all(gone(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert all(gone(pid) for pid in workers)
    if how == signal.SIGINT:
        assert errors.count("KeyboardInterrupt") == 1 and errors.count("Traceback") == 1
