"""save and load: the same nesting, the same bits, whole or not at all."""

import json
import math
import os
import signal
import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from minidl.serialization import DTYPES, atomic_path, load, save
from minidl.tensor import Tensor


def same(a, b):
    """Equal in type, nesting, dtype, shape and bits."""
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        return same(a.array, b.array)
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return [*map(repr, a)] == [*map(repr, b)] and all(
            same(v, w) for v, w in zip(a.values(), b.values())
        )
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(v, w) for v, w in zip(a, b))
    return a == b or (a != a and b != b)


def roundtrip(obj, path):
    save(obj, path)
    return load(path)


@pytest.mark.parametrize(
    "obj",
    [
        None,
        True,
        3,
        -(10**40),
        0.1,
        "text with ümlauts and \x00",
        math.nan,
        -math.inf,
        {},
        [],
        (),
        {"a": {}, "b": [], "c": [[], {}, ()]},
        (1, [2, (3,)], {"x": (4, 5)}),
        {0: "int", "0": "str", -1: None, 2.5: "float", None: 1, (1, "a"): 2},
        {True: "yes", False: "no"},
        {"$tensor": "escaped", "$": 1},
        {"": {"": 1}},
        np.float32(0.1),
        {"x": np.int8(-3), "y": np.bool_(True), "z": np.float64(math.nan), "h": np.float16(1.5)},
        {np.int64(3): 4},
    ],
    ids=repr,
)
def test_plain_values(obj, tmp_path):
    assert same(roundtrip(obj, tmp_path / "x"), obj)


@pytest.mark.parametrize("dtype", DTYPES.split())
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2, 3)])
def test_dtypes_and_shapes(dtype, shape, tmp_path):
    array = (np.arange(math.prod(shape)).reshape(shape) * 3 + 1).astype(dtype)
    obj = {"tensor": Tensor(array), "array": array + array}
    assert same(roundtrip(obj, tmp_path / "x"), obj)


@pytest.mark.parametrize(
    "view",
    [
        lambda a: a.T,
        lambda a: a[::2, ::-1],
        lambda a: a[1],
        lambda a: np.broadcast_to(a[0], (4, 6)),
        lambda a: a.astype(">f4"),
        lambda a: np.asfortranarray(a),
    ],
)
def test_layouts(view, tmp_path):
    array = view(np.arange(24, dtype=np.float32).reshape(4, 6))
    out = roundtrip([Tensor(array)], tmp_path / "x")[0].array
    assert np.array_equal(out, array) and out.dtype == np.float32 and out.flags.writeable


def test_special_floats_keep_their_bits(tmp_path):
    bits = np.array([0x7FC00001, 0xFF800000, 0x80000000, 1], np.uint32)
    assert same(roundtrip(bits.view(np.float32), tmp_path / "x"), bits.view(np.float32))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text("ab.$~0", max_size=3) | st.integers(0, 3), inner, max_size=3)
        | st.integers(0, 4).map(lambda n: Tensor(np.arange(n, dtype=np.float32)))
    ),
    max_leaves=12,
)


@given(json_values)
@settings(max_examples=25)
def test_any_nesting(tmp_path_factory, obj):
    assert same(roundtrip(obj, tmp_path_factory.getbasetemp() / "any"), obj)


@given(json_values)
@settings(max_examples=10)
def test_compressed(tmp_path_factory, obj):
    path = tmp_path_factory.getbasetemp() / "compressed"
    save(obj, path, compress=True)
    assert same(load(path), obj)


def test_what_is_repeated_is_compressed(tmp_path):
    obj = {"steps": [{"op": "conv", "inputs": (1, 2, 3)}] * 100, "w": Tensor(np.zeros(9))}
    for name, compress in (("plain", False), ("small", True)):
        save(obj, tmp_path / name, compress=compress)
    assert (tmp_path / "small").stat().st_size < 0.2 * (tmp_path / "plain").stat().st_size
    assert safetensors.numpy.load_file(tmp_path / "small").keys() == {"w"}


def test_state_dict_names_are_what_other_tools_see(tmp_path):
    w, b = np.ones((2, 1), np.float32), np.zeros(2, np.float32)
    save({"conv1.weight": Tensor(w), "conv1.bias": Tensor(b)}, tmp_path / "m.safetensors")
    seen = safetensors.numpy.load_file(tmp_path / "m.safetensors")
    assert set(seen) == {"conv1.weight", "conv1.bias"} and np.array_equal(seen["conv1.weight"], w)

    save({"model": {"conv1.weight": Tensor(w)}, "o": {0: [Tensor(b)]}}, tmp_path / "c")
    assert set(safetensors.numpy.load_file(tmp_path / "c")) == {"model.conv1.weight", "o.0.0"}


def test_names_that_collide_stay_apart(tmp_path):
    tensors = [Tensor(np.full(2, i, np.float32)) for i in range(5)]
    obj = {
        "a.b": tensors[0],
        "a": {"b": tensors[1]},
        "a.b~2": tensors[2],
        "__metadata__": tensors[3],
        "x": {1: tensors[4], "1": tensors[0]},
    }
    assert same(roundtrip(obj, tmp_path / "x"), obj)


def test_shared_tensors_are_stored_once_and_stay_shared(tmp_path):
    w = Tensor(np.ones((100, 100), np.float32))
    alias, view = Tensor(w.array), Tensor(w.array[:50])
    save({"embed": w, "head": alias, "half": view}, tmp_path / "x")
    out = load(tmp_path / "x")
    assert out["embed"] is out["head"] and out["half"] is not out["embed"]
    assert out["half"].shape == (50, 100)
    assert (tmp_path / "x").stat().st_size < 4 * 16_000


def test_subclasses_become_plain(tmp_path):
    class Weight(Tensor):
        pass

    out = roundtrip(
        OrderedDict(w=Weight(np.ones(2, np.float32), requires_grad=True)), tmp_path / "x"
    )
    assert type(out) is dict and type(out["w"]) is Tensor and not out["w"].requires_grad


def test_foreign_safetensors_is_a_flat_dict(tmp_path):
    arrays = {"a.b": np.arange(3, dtype=np.int32), "c": np.ones((), np.float64)}
    safetensors.numpy.save_file(arrays, tmp_path / "x", {"format": "np"})
    out = load(tmp_path / "x")
    assert {k: type(v) for k, v in out.items()} == {"a.b": Tensor, "c": Tensor}
    assert all(same(out[k].array, arrays[k]) for k in arrays)


class Custom:
    pass


@pytest.mark.parametrize(
    ("obj", "place", "kind"),
    [
        ({"optimizer": [0, 1, 2, len]}, "state['optimizer'][3]", "builtin_function_or_method"),
        ({"a": {1: (Custom(),)}}, "state['a'][1][0]", "Custom"),
        (Custom(), "state:", "Custom"),
        ({"a": b"bytes"}, "state['a']", "bytes"),
        ({"a": {1, 2}}, "state['a']", "set"),
        ({"a": 1j}, "state['a']", "complex"),
        ({"a": np.array(["text"])}, "state['a']", "<U4"),
        ({"a": Tensor(np.array([None]))}, "state['a']", "object"),
        ({"a": {frozenset(): 1}}, "state['a']", "frozenset"),
        ({"a": np.datetime64("2020-01-01")}, "state['a']", "datetime64"),
        ({"a": np.complex64(1)}, "state['a']", "complex64"),
    ],
)
def test_unsupported_types_name_their_place(obj, place, kind, tmp_path):
    with pytest.raises(TypeError) as error:
        save(obj, tmp_path / "x")
    assert place in str(error.value) and kind in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_cycles_and_depth(tmp_path):
    loop = {"a": []}
    loop["a"].append(loop)
    with pytest.raises(ValueError, match=r"state\['a'\]\[0\]: contains itself"):
        save(loop, tmp_path / "x")
    deep = 1
    for _ in range(150):
        deep = [deep]
    with pytest.raises(ValueError, match="nested more than 100"):
        save(deep, tmp_path / "x")
    twice = [1, 2]  # the same object twice is no cycle
    assert roundtrip([twice, twice], tmp_path / "x") == [[1, 2], [1, 2]]


def test_missing_foreign_and_truncated_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        load(tmp_path / "nothing.safetensors")
    whole = tmp_path / "whole"
    save({"w": Tensor(np.arange(1000.0))}, whole)
    content = whole.read_bytes()
    for name, damaged in {
        "empty": b"",
        "text": b"this is no safetensors file at all",
        "pickle": b"\x80\x04\x95" + b"\0" * 50,
        "header": content[:20],
        "data": content[:-1],
        "longer": content + b"\0",
    }.items():
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{name}: not a safetensors file"):
            load(tmp_path / name)


@pytest.mark.parametrize(
    "metadata",
    [
        "not json",
        "[]",
        "{}",
        '{"version": 1, "object": {"$tensor": "absent"}}',
        '{"version": 1, "object": {"$code": "os.system"}}',
        '{"version": 1, "object": {"$scalar": ["object", 1]}}',
        '{"version": 1, "object": {"$dict": [[[1], 2]]}}',
        '{"version": 99, "object": 1}',
        '{"version": 1, "object": ' + "[" * 5000 + "]" * 5000 + "}",
        '{"version": 1, "zlib": "not of four"}',
        '{"version": 1, "zlib": "eJwDAAAAAAA="}',
    ],
    ids=range(11),
)
def test_damaged_metadata(metadata, tmp_path):
    safetensors.numpy.save_file({"w": np.ones(1)}, tmp_path / "x", {"minidl": metadata})
    with pytest.raises(ValueError, match="damaged metadata"):
        load(tmp_path / "x")


def test_metadata_is_strict_json(tmp_path):
    save({"a": [math.inf, {1: (2,)}]}, tmp_path / "x")
    with safetensors.safe_open(tmp_path / "x", framework="np") as file:
        text = file.metadata()["minidl"]

    def refuse(constant):
        raise AssertionError(constant)

    json.loads(text, parse_constant=refuse)


def test_loading_runs_no_code(tmp_path):
    """Not even a module is imported by what a file says."""
    save({"a": np.float32(1), "b": Tensor(np.ones(1))}, tmp_path / "x")
    before = set(sys.modules)
    load(tmp_path / "x")
    assert set(sys.modules) == before


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "x"
    save({"old": 1}, path)

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        save({"new": 2}, path)
    monkeypatch.undo()
    assert load(path) == {"old": 1} and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_atomic_path_removes_its_part(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "x") as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_atomic_path_follows_links_and_keeps_permissions(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "file")
    with atomic_path(tmp_path / "link") as part:
        part.write_text("content")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "file").read_text()
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "real" / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_killed_while_saving(tmp_path):
    """SIGKILL at any moment leaves a file that loads."""
    path = tmp_path / "x"
    script = (
        "import sys, numpy as np\n"
        "from minidl.serialization import save\n"
        "from minidl.tensor import Tensor\n"
        "w = np.zeros(300_000, np.float32)\n"
        "for step in range(10**6):\n"
        "    save({'step': step, 'w': Tensor(w + step)}, sys.argv[1])\n"
        "    if step < 3: print(step, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while process.stdout.readline().strip() != "2":
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    out = load(path)
    assert out["step"] >= 2 and (out["w"].array == out["step"]).all()
