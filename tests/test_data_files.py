"""The readers of the official formats, and what they say about damaged files."""

import gzip
import hashlib
import http.server
import io
import os
import pickle
import struct
import tarfile
import threading

import numpy as np
import pytest
from PIL import Image

from minidl.data import (
    CIFAR10,
    MNIST,
    NPZ,
    DataError,
    DataLoader,
    Digits,
    FashionMNIST,
    ImageFolder,
    MissingDataError,
    files,
    read_idx,
    transforms,
)
from minidl.tensor import Tensor

rng = np.random.default_rng(0)
IMAGES = rng.integers(0, 256, (20, 28, 28), dtype=np.uint8)
LABELS = np.arange(20, dtype=np.uint8) % 10


def idx(array, code=8):
    header = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


def write_mnist(folder, gz=True, splits=("train", "t10k"), images=IMAGES, labels=LABELS):
    folder.mkdir(parents=True, exist_ok=True)
    for split in splits:
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = idx(array)
            path = folder / f"{split}-{name}-ubyte{'.gz' if gz else ''}"
            path.write_bytes(gzip.compress(content, 1) if gz else content)
    return folder


def write_jpegs(shape=(8, 32, 32, 3)):
    jpegs = []
    for pixels in rng.integers(0, 256, shape, dtype=np.uint8):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG")
        jpegs.append(file.getvalue())
    offset = np.cumsum([0] + [len(j) for j in jpegs])
    return np.frombuffer(b"".join(jpegs), np.uint8), offset.astype(np.int64)


# IDX, MNIST ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "dtype"),
    [(0x08, "u1"), (0x09, "i1"), (0x0B, ">i2"), (0x0C, ">i4"), (0x0D, ">f4"), (0x0E, ">f8")],
)
def test_idx_types(code, dtype, tmp_path):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    (tmp_path / "x").write_bytes(idx(array, code))
    out = read_idx(tmp_path / "x")
    assert out.dtype.isnative and out.dtype == np.dtype(dtype).newbyteorder("=")
    assert np.array_equal(out, array)


@pytest.mark.parametrize("gz", [True, False])
@pytest.mark.parametrize("layout", ["", "MNIST/raw", "raw", "MNIST", "mnist"])
def test_mnist_layouts(gz, layout, tmp_path):
    write_mnist(tmp_path / layout, gz)
    data = MNIST(tmp_path)
    assert len(data) == 20 and data.classes[3] == "3"
    image, label = data[7]
    assert image.dtype == np.float32 and image.shape == (1, 28, 28) and type(label) is int
    assert np.array_equal(image[0], IMAGES[7].astype(np.float32) / np.float32(255)) and label == 7
    assert image.min() >= 0 and image.max() <= 1
    assert len(MNIST(tmp_path, train=False)) == 20


def test_default_root(tmp_path, monkeypatch):
    write_mnist(tmp_path / "mnist")
    write_mnist(tmp_path / "fashion_mnist", labels=LABELS[::-1])
    monkeypatch.setenv("MINIDL_DATA", str(tmp_path))
    assert MNIST().targets[0] == 0 and FashionMNIST().targets[0] == 9
    assert FashionMNIST().classes[9] == "Ankle boot"
    monkeypatch.delenv("MINIDL_DATA")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingDataError, match="folder data does not exist"):
        MNIST()


def test_target_transform_and_present_files_are_not_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_fetch", None)
    write_mnist(tmp_path)
    data = MNIST(tmp_path, download=True, target_transform=lambda label: label * 2)
    assert data[3][1] == 6
    _, labels = next(iter(DataLoader(data, 4)))
    assert labels.array.tolist() == [0, 2, 4, 6]


def test_missing_files_say_where_and_how(tmp_path):
    write_mnist(tmp_path, splits=["train"])
    with pytest.raises(MissingDataError) as error:
        MNIST(tmp_path, train=False)
    message = str(error.value)
    for words in (str(tmp_path), "t10k-images-idx3-ubyte", "download=True", "MNIST/raw"):
        assert words in message
    assert isinstance(error.value, FileNotFoundError) and isinstance(error.value, ValueError)


IMAGES_FILE, LABELS_FILE = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
GOOD = idx(IMAGES)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (IMAGES_FILE, b"", "the file is empty"),
        (IMAGES_FILE, b"\0\0", "not an IDX file"),
        (IMAGES_FILE, b"<!DOCTYPE html><html>404", "not an IDX file.*3c 21 44 4f"),
        (IMAGES_FILE, GOOD[:10], "truncated in its header"),
        (IMAGES_FILE, GOOD[:-1], "truncated.*20×28×28.*15,696 bytes.*15,695"),
        (IMAGES_FILE, GOOD + b"\0", "too long"),
        (IMAGES_FILE, gzip.compress(GOOD)[:-500], "truncated gzip"),
        (IMAGES_FILE, gzip.compress(GOOD)[:-8] + b"\1" * 8, "damaged gzip"),
        (IMAGES_FILE, gzip.compress(GOOD)[:50] + b"\xff" * 300, "damaged gzip|truncated gzip"),
        (IMAGES_FILE, gzip.compress(b""), "gzip file of nothing"),
        (IMAGES_FILE, idx(LABELS), "not images: magic number 2049, expected 2051"),
        (LABELS_FILE, GOOD, "not labels: magic number 2051, expected 2049"),
        (IMAGES_FILE, idx(IMAGES.astype("i1"), 9), "not images"),
        (IMAGES_FILE, idx(IMAGES[:0]), "holds no images"),
        (IMAGES_FILE, b"\0\0\x08\x03" + b"\xff" * 12, "truncated.*4294967295"),
        (LABELS_FILE, idx(LABELS[:-1]), r"labels of shape \(19,\) for 20 images"),
        (LABELS_FILE, idx(LABELS + 1), "label 9 is 10, expected 0 to 9"),
    ],
)
def test_damaged_mnist(name, content, says, tmp_path):
    write_mnist(tmp_path, gz=False)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says) as error:
        MNIST(tmp_path)
    assert name in str(error.value)


# CIFAR-10 -----------------------------------------------------------------------------------------

PIXELS = rng.integers(0, 256, (6, 3072), dtype=np.uint8)
CIFAR_LABELS = [3, 0, 9, 1, 1, 5]
TRAIN_FILES = [f"data_batch_{i}" for i in range(1, 6)]


def write_cifar_python(folder, protocol=2):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate([*TRAIN_FILES, "test_batch"]):
        batch = {b"data": PIXELS ^ np.uint8(i), b"labels": CIFAR_LABELS, b"filenames": [b"a.png"]}
        (folder / name).write_bytes(pickle.dumps(batch, protocol))


def write_cifar_binary(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate([*TRAIN_FILES, "test_batch"]):
        records = np.column_stack([np.array(CIFAR_LABELS, np.uint8), PIXELS ^ np.uint8(i)])
        (folder / f"{name}.bin").write_bytes(records.tobytes())


def check_cifar(root):
    train, test = CIFAR10(root), CIFAR10(root, train=False)
    assert len(train) == 30 and len(test) == 6 and train.classes[9] == "truck"
    image, label = train[8]  # the third of the second file
    expected = (PIXELS[2] ^ 1).reshape(3, 32, 32).astype(np.float32) / np.float32(255)
    assert np.array_equal(image, expected) and image.dtype == np.float32 and label == 9
    assert train.targets.tolist() == CIFAR_LABELS * 5


@pytest.mark.parametrize("folder", ["", "cifar-10-batches-py"])
@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_cifar_python(folder, protocol, tmp_path):
    write_cifar_python(tmp_path / folder, protocol)
    check_cifar(tmp_path)


@pytest.mark.parametrize("folder", ["", "cifar-10-batches-bin"])
def test_cifar_binary(folder, tmp_path):
    write_cifar_binary(tmp_path / folder)
    check_cifar(tmp_path)


def python2_pickle(pixels, labels):
    """A batch as Python 2 with NumPy 1 wrote it (the official files): strings are byte strings."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\0K\1\x87R(K\3" + text(b"|")
    dtype += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    raw = pixels.tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85" + text(b"b") + b"\x87R"
    )
    array += b"(K\1K" + bytes([len(pixels)]) + b"M\0\x0c\x86" + dtype + b"\x89"
    array += b"T" + struct.pack("<i", len(raw)) + raw + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([n]) for n in labels) + b"e"
    return b"\x80\2}(" + text(b"data") + array + text(b"labels") + numbers + b"u."


def test_cifar_as_python_2_wrote_it(tmp_path):
    (tmp_path / "test_batch").write_bytes(python2_pickle(PIXELS, CIFAR_LABELS))
    data = CIFAR10(tmp_path, train=False)
    assert np.array_equal(data.data.reshape(6, -1), PIXELS) and data[2][1] == 9


class Exploit:
    def __reduce__(self):
        return os.system, ("touch exploited",)


def pickled(**changes):
    return pickle.dumps({"data": PIXELS, "labels": CIFAR_LABELS} | changes, 2)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the file is empty"),
        (b"\x80\2", "not a pickle"),
        (b"<html>", "not a pickle"),
        (pickled()[:-100], "not a pickle of arrays, or damaged"),
        (pickle.dumps([1, 2]), "a pickled list, expected a dict"),
        (pickle.dumps({"x": 1}), "expected 'data' and 'labels'"),
        (pickled(data=[1, 2]), "'data' is not a uint8 array"),
        (pickled(data=PIXELS.astype(float)), "'data' is not a uint8 array"),
        (pickled(data=PIXELS[:, :-1]), r"shape \(6, 3071\), expected \(N, 3072\)"),
        (pickled(data=PIXELS[:0], labels=[]), "test_batch"),
        (pickled(labels=CIFAR_LABELS[:-1]), r"labels of shape \(5,\) for 6 images"),
        (pickled(labels=[10] * 6), "label 0 is 10, expected 0 to 9"),
        (pickled(labels=["a"] * 6), "expected integers"),
        (pickled(labels=[[1], 2, 3, 4, 5, 6]), "'labels' is not a list of numbers"),
        (pickle.dumps(Exploit()), "(posix|nt).system, which is refused"),
        (pickled(labels=Exploit()), "system, which is refused"),
        (b"cbuiltins\neval\n(S'1'\ntR.", "builtins.eval, which is refused"),
        (b"cnumpy\nload\n.", "numpy.load, which is refused"),
        (b"\x80\4\x8c\5numpy\x8c\rdtype.__new__\x93.", "which is refused"),
    ],
)
def test_damaged_cifar_python(content, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(DataError, match=says) as error:
        CIFAR10(tmp_path, train=False)
    assert "test_batch" in str(error.value) and not (tmp_path / "exploited").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (bytes(3073 * 2 - 5), "6,141 bytes are not whole records of 3,073"),
        (b"\x0b" + bytes(3072), "label 0 is 11"),
    ],
)
def test_damaged_cifar_binary(content, says, tmp_path):
    (tmp_path / "test_batch.bin").write_bytes(content)
    with pytest.raises(DataError, match=says):
        CIFAR10(tmp_path, train=False)


def test_missing_cifar(tmp_path):
    write_cifar_python(tmp_path)
    (tmp_path / "data_batch_4").unlink()
    with pytest.raises(MissingDataError, match=r"data_batch_4[\s\S]*download=True"):
        CIFAR10(tmp_path)
    assert len(CIFAR10(tmp_path, train=False)) == 6


def test_cifar_jpeg(tmp_path):
    jpeg, offset = write_jpegs()
    labels = np.arange(8, dtype=np.uint8)
    np.savez_compressed(tmp_path / "train.npz", jpeg=jpeg, offset=offset, label=labels)
    data = CIFAR10(tmp_path)
    with Image.open(io.BytesIO(jpeg[offset[5] : offset[6]].tobytes())) as image:
        expected = np.asarray(image).transpose(2, 0, 1)
    assert np.array_equal(data[5][0], expected.astype(np.float32) / np.float32(255))
    images, _ = next(iter(DataLoader(data, 8)))
    assert np.array_equal(images.array[5], data[5][0]) and np.asarray(data.data).dtype == np.uint8


def test_damaged_cifar_jpeg(tmp_path):
    jpeg, offset = write_jpegs()
    path, labels = tmp_path / "train.npz", np.arange(8)

    def check(says, access=None, **changes):
        np.savez(path, **({"jpeg": jpeg, "offset": offset, "label": labels} | changes))
        with pytest.raises(DataError, match=says) as error:
            data = CIFAR10(tmp_path)
            if access is not None:
                data[access]
        assert "train.npz" in str(error.value)

    damaged = jpeg.copy()
    damaged[offset[3] : offset[3] + 20] = 0
    check("image 3: not an image that can be decoded", access=3, jpeg=damaged)
    truncated = np.concatenate([jpeg[: offset[7] + 700], np.zeros_like(jpeg[offset[7] + 700 :])])
    end = np.append(offset[:-1], offset[7] + 650)
    check("image 7: not an image that can be decoded", access=7, jpeg=truncated, offset=end)
    check("ascend", offset=offset[::-1])
    check("ascend", jpeg=jpeg[:-9])
    check("must be bytes", jpeg=jpeg.astype(int))
    check("must be integers", offset=offset / 2)
    check("labels of shape", label=labels[:5])
    check("label 7 is 70", label=np.array([*range(7), 70]))
    small, small_offset = write_jpegs((8, 28, 28, 3))
    check("expected", jpeg=small, offset=small_offset)
    np.savez(path, jpeg=jpeg)
    with pytest.raises(DataError, match=r"not \['offset', 'label'\]"):
        CIFAR10(tmp_path)


# NPZ ----------------------------------------------------------------------------------------------

COLOUR = rng.integers(0, 256, (5, 9, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("arrays", "kwargs", "shape"),
    [
        ({"train_images": IMAGES[:5], "train_labels": LABELS[:5, None]}, {}, (1, 28, 28)),
        ({"val_images": IMAGES[:5], "val_labels": LABELS[:5]}, {"split": "val"}, (1, 28, 28)),
        ({"x_test": IMAGES[:5], "y_test": LABELS[:5]}, {"split": "test"}, (1, 28, 28)),
        ({"images": COLOUR, "labels": LABELS[:5]}, {}, (3, 9, 8)),
        ({"x": COLOUR.transpose(0, 3, 1, 2), "y": LABELS[:5]}, {}, (3, 9, 8)),
        ({"x": COLOUR[:, :3], "y": LABELS[:5]}, {"layout": "CHW"}, (3, 8, 3)),
        ({"a": COLOUR / 255, "b": LABELS[:5]}, {"images": "a", "labels": "b"}, (3, 9, 8)),
        ({"x": COLOUR.astype(np.uint16) * 257, "y": LABELS[:5]}, {}, (3, 9, 8)),
        ({"x": COLOUR > 127, "y": LABELS[:5]}, {}, (3, 9, 8)),
    ],
)
def test_npz(arrays, kwargs, shape, tmp_path):
    np.savez(tmp_path / "x.npz", **arrays)
    data = NPZ(tmp_path / "x.npz", **kwargs)
    image, label = data[3]
    assert image.shape == shape and image.dtype == np.float32 and label == 3 and len(data) == 5
    assert data[0][0].min() >= 0 and data[0][0].max() <= 1


def test_npz_scales_and_names(tmp_path, monkeypatch):
    np.savez(tmp_path / "x.npz", x=COLOUR, y=[0, 1, 1, 0, 1], classes=["ants", "bees"])
    monkeypatch.setenv("MINIDL_DATA", str(tmp_path))
    data = NPZ("x.npz")
    assert data.classes == ["ants", "bees"] and data.class_to_idx == {"ants": 0, "bees": 1}
    assert np.array_equal(data[1][0], COLOUR[1].transpose(2, 0, 1) / np.float32(255))


def test_damaged_npz(tmp_path):
    path = tmp_path / "x.npz"

    def check(says, content=None, **arrays):
        if content is None:
            np.savez(path, **arrays)
        else:
            path.write_bytes(content)
        with pytest.raises(DataError, match=says) as error:
            NPZ(path)
        assert "x.npz" in str(error.value)

    with pytest.raises(MissingDataError, match="no such file"):
        NPZ(path)
    np.savez(path, x=COLOUR, y=LABELS[:5])
    good = path.read_bytes()
    check("not an NPZ file", b"")
    check("not an NPZ file", b"PK but no zip")
    check("not an NPZ file", good[:-30])
    place = good.index(COLOUR.tobytes())
    check("'x' cannot be read", good[:place] + b"\xff" * 50 + good[place + 50 :])
    check("no images and labels of split 'train'", a=COLOUR)
    check("shape", x=COLOUR[0, 0], y=LABELS[:5])
    check("no images in it", x=COLOUR[:0], y=LABELS[:0])
    check("int64 from 0 to 255", x=COLOUR.astype(np.int64) // 255 * 255, y=LABELS[:5])
    check("expected uint8, uint16, or floats", x=COLOUR / 1.0, y=LABELS[:5])
    check("floats", x=np.full((2, 4, 4), np.nan), y=LABELS[:2])
    check("labels of shape", x=COLOUR, y=LABELS[:4])
    check("expected integers", x=COLOUR, y=LABELS[:5] / 2)
    check("label 2 is 2, expected 0 to 1", x=COLOUR, y=LABELS[:5], classes=["a", "b"])
    check("cannot be read", x=np.array([object()] * 5), y=LABELS[:5])


# ImageFolder --------------------------------------------------------------------------------------


def test_image_folder(tmp_path):
    for name, count in (("dog", 2), ("cat", 3)):
        (tmp_path / name / "deeper").mkdir(parents=True)
        for i in range(count):
            Image.fromarray(COLOUR[i]).save(tmp_path / name / f"{i}.png")
    Image.fromarray(IMAGES[0]).save(tmp_path / "dog" / "deeper" / "grey.JPG")
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    (tmp_path / "dog" / "._0.png").write_text("a Mac was here")
    (tmp_path / "file.png").write_text("not in a class")
    data = ImageFolder(tmp_path)
    assert data.classes == ["cat", "dog"] and data.class_to_idx == {"cat": 0, "dog": 1}
    assert data.targets == [0, 0, 0, 1, 1, 1] and len(data) == 6
    image, label = data[1]
    assert np.array_equal(image, COLOUR[1].transpose(2, 0, 1) / np.float32(255)) and label == 0
    assert image.dtype == np.float32 and data[5][0].shape == (3, 28, 28)
    assert ImageFolder(tmp_path, mode="L")[0][0].shape == (1, 9, 8)
    resized = ImageFolder(tmp_path, transforms.Resize((6, 6)), lambda label: -label)
    assert resized[5][0].shape == (3, 6, 6) and resized[5][1] == -1
    images, _ = next(iter(DataLoader(resized, 6)))
    assert images.shape == (6, 3, 6, 6)


def test_damaged_image_folder(tmp_path):
    with pytest.raises(MissingDataError, match="no such folder"):
        ImageFolder(tmp_path / "absent")
    with pytest.raises(MissingDataError, match="no folders in it"):
        ImageFolder(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match=r"cat: no images"):
        ImageFolder(tmp_path)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, "JPEG")
    for name, content in {
        "a.jpg": b"",
        "b.png": b"no image",
        "c.jpg": file.getvalue()[:2000],
    }.items():
        (tmp_path / "cat" / name).write_bytes(content)
    data = ImageFolder(tmp_path)
    for i, name in enumerate(["a.jpg", "b.png", "c.jpg"]):
        with pytest.raises(DataError, match=f"{name}: not an image that can be decoded"):
            data[i]
    (tmp_path / "cat" / "a.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.jpg"):
        data[0]


# Digits -------------------------------------------------------------------------------------------


def test_digits():
    train, test = Digits(), Digits(train=False)
    assert len(train) == 1437 and len(test) == 360
    image, label = train[0]
    assert image.shape == (1, 8, 8) and image.dtype == np.float32 and label == 0
    assert image[0, 0].tolist() == [0, 0, 5 / 16, 13 / 16, 9 / 16, 1 / 16, 0, 0]
    assert train.data.max() == 1 and train.data.min() == 0
    assert np.bincount(train.targets, minlength=10).sum() == 1437 and set(test.targets) == {
        *range(10)
    }


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDataError, match="pip install scikit-learn"):
        Digits()


# Download -----------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path):
    """Serves tmp_path/web, and counts what was asked for."""
    web = tmp_path / "web"
    web.mkdir()

    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(web))

        def do_GET(self):
            asked.append(self.path)
            if self.path.startswith("/broken/"):  # ends in the middle
                self.send_response(200)
                self.send_header("Content-Length", "1000000")
                self.end_headers()
                self.wfile.write(b"half")
            else:
                super().do_GET()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}/", web, asked
        httpd.shutdown()
        thread.join()


def test_download_mnist(server, tmp_path, monkeypatch, capsys):
    url, web, asked = server
    write_mnist(web / "mnist")
    names = {p.name.split("-idx")[0]: p for p in (web / "mnist").iterdir()}
    digests = {k: hashlib.sha256(p.read_bytes()).hexdigest() for k, p in sorted(names.items())}
    monkeypatch.setattr(MNIST, "digests", digests)
    monkeypatch.setattr(MNIST, "addresses", (url + "broken/", url + "absent/", url + "mnist/"))
    root = tmp_path / "root"
    with pytest.raises(MissingDataError):
        MNIST(root)
    assert not asked and not root.exists()  # never unasked

    assert len(MNIST(root, download=True)) == 20 and len(MNIST(root, train=False)) == 20
    assert sorted(p.name for p in (root / "MNIST/raw").iterdir()) == sorted(
        p.name for p in names.values()
    )
    assert "downloading" in capsys.readouterr().err
    # A whole file is not fetched again; a damaged one is.
    asked.clear()
    (root / "MNIST/raw/train-labels-idx1-ubyte.gz").unlink()
    assert len(MNIST(root, download=True)) == 20
    assert {path.rsplit("/", 1)[1] for path in asked} == {"train-labels-idx1-ubyte.gz"}


def test_download_that_fails(server, tmp_path, monkeypatch):
    url, web, _ = server
    write_mnist(web / "mnist")
    monkeypatch.setattr(
        MNIST, "addresses", (url + "mnist/", url + "broken/", "http://127.0.0.1:9/")
    )
    root = tmp_path / "root"
    with pytest.raises(DataError) as error:
        MNIST(root, download=True)
    for words in ("SHA-256 is", "it ended after 4 of 1000000 bytes", "refused", str(root)):
        assert words in str(error.value)
    assert list((root / "MNIST/raw").iterdir()) == []  # no part of anything


def test_download_cifar(server, tmp_path, monkeypatch):
    url, web, _ = server
    write_cifar_python(tmp_path / "cifar-10-batches-py")
    (tmp_path / "cifar-10-batches-py" / "batches.meta").write_bytes(pickle.dumps({}))
    with tarfile.open(web / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "cifar-10-batches-py", "cifar-10-batches-py")
        tar.addfile(tarfile.TarInfo("../escaped"))
    digest = hashlib.sha256((web / "cifar-10-python.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "digest", digest)
    monkeypatch.setattr(CIFAR10, "address", url + "cifar-10-python.tar.gz")
    root = tmp_path / "root" / "data"
    assert len(CIFAR10(root, download=True)) == 30
    check_cifar(root)
    assert not (tmp_path / "root" / "escaped").exists()


# Transforms ---------------------------------------------------------------------------------------


def test_to_tensor():
    image = COLOUR[0]
    expected = image.transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    to_tensor = transforms.ToTensor()
    for source in (image, Image.fromarray(image)):
        out = to_tensor(source)
        assert np.array_equal(out, expected) and out.dtype == np.float32
    assert to_tensor(IMAGES[0]).shape == to_tensor(Image.fromarray(IMAGES[0])).shape == (1, 28, 28)
    assert to_tensor(expected) is expected
    with pytest.raises(TypeError, match="got str"):
        to_tensor("x")
    with pytest.raises(ValueError, match="int64"):
        to_tensor(np.zeros((2, 2), np.int64))


def test_normalize():
    image = rng.random((3, 4, 5), dtype=np.float32)
    before = image.copy()
    out = transforms.Normalize((0.1, 0.2, 0.3), (2, 3, 4))(image)
    for c in range(3):
        mean, std = np.float32(0.1 * (c + 1)), np.float32(c + 2)
        assert np.allclose(out[c], (before[c] - mean) / std, atol=1e-7)
    assert np.array_equal(image, before) and out.dtype == np.float32
    assert transforms.Normalize(0.5, 0.5)(image).shape == image.shape
    with pytest.raises(ValueError, match="3 channels"):
        transforms.Normalize((0.1, 0.2), (1, 1))(image)
    with pytest.raises(ValueError, match="zero"):
        transforms.Normalize((0.1,), (0.0,))


@pytest.mark.parametrize(
    ("size", "shape"), [(6, (6, 12)), ((5, 7), (5, 7)), (40, (40, 80)), ([20, 40], (20, 40))]
)
def test_resize(size, shape):
    image = rng.random((3, 20, 40), dtype=np.float32)
    out = transforms.Resize(size)(image)
    assert out.shape == (3, *shape) and out.dtype == np.float32
    assert abs(out.mean() - image.mean()) < 0.02
    assert np.array_equal(transforms.Resize((20, 40))(image), image)
    picture = Image.fromarray((image.transpose(1, 2, 0) * 255).astype(np.uint8))
    assert transforms.Resize(size)(picture).size == shape[::-1]
    pixels = transforms.ToTensor()(transforms.Resize(size)(picture))
    assert abs(pixels - out).max() < 0.02  # rounding to 8 bits


def test_center_crop():
    image = np.arange(60, dtype=np.float32).reshape(1, 6, 10)
    assert np.array_equal(transforms.CenterCrop(4)(image), image[:, 1:5, 3:7])
    assert np.array_equal(transforms.CenterCrop((2, 10))(image), image[:, 2:4])
    padded = transforms.CenterCrop((8, 4))(image)
    assert padded.shape == (1, 8, 4) and (padded[:, [0, 7]] == 0).all()
    assert np.array_equal(padded[:, 1:7], image[:, :, 3:7])
    picture = Image.fromarray(IMAGES[0])
    assert np.array_equal(np.asarray(transforms.CenterCrop(10)(picture)), IMAGES[0][9:19, 9:19])


def test_batched_transforms_do_what_they_do_one_by_one(tmp_path):
    write_mnist(tmp_path)
    chain = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.13,), (0.3,)), transforms.CenterCrop(20)]
    )
    assert chain.batched and transforms.Compose([]).batched
    assert not transforms.Compose([chain, transforms.Lambda(np.copy)]).batched
    data = MNIST(tmp_path, transform=chain)
    images, labels = next(iter(DataLoader(data, 7)))
    assert isinstance(images, Tensor) and images.shape == (7, 1, 20, 20)
    for i in range(7):
        assert np.array_equal(images.array[i], data[i][0]) and labels.array[i] == data[i][1]
    slow = MNIST(tmp_path, transform=transforms.Lambda(chain))
    assert np.array_equal(next(iter(DataLoader(slow, 7)))[0].array, images.array)


# The real ones ------------------------------------------------------------------------------------


@pytest.mark.skipif("MINIDL_DATA" not in os.environ, reason="MINIDL_DATA names no folder of data")
def test_real_mnist():
    train, test = MNIST(), MNIST(train=False)
    assert len(train) == 60_000 and len(test) == 10_000
    assert np.bincount(train.targets).tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949,
    ]  # fmt: skip
    assert (
        abs(train.data.mean() / 255 - 0.1307) < 1e-4 and abs(train.data.std() / 255 - 0.3081) < 1e-4
    )
