"""`minidl bench`: what it says of each rung; that a wrong one does not pass for a fast one."""

import json
import subprocess
import sys

import numpy as np
import pytest

from minidl import bench
from minidl.backend.native import native
from minidl.op import registry
from tests.test_cli import call


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(bench, "PAUSE", 0)


@pytest.mark.parametrize("op", bench.SIZES)
def test_flops_and_bytes_are_those_of_the_definition(op):
    """One multiplication and one addition a term: counted by an op on ones."""
    call = bench.problem(op, 32)
    arrays = [x for x in call.inputs if x is not None]
    ones = [x if x is None else np.ones_like(x) for x in call.inputs]
    inside = call.settings | ({"padding": (0, 0)} if op == "conv2d" else {})  # no zeros of the rim
    terms = registry[op].op.formula(*ones, **inside)
    made = registry[op].op.formula(*call.inputs, **call.settings)
    assert call.flops == 2 * terms.flat[0] * made.size
    assert call.bytes == sum(x.nbytes for x in arrays) + made.nbytes
    assert bench.traffic("im2col", call) > bench.traffic("native", call)


def test_ladder(tmp_path):
    code, output = call("bench", "ladder", "--size", 32, "--seconds", 0.01, "--out", tmp_path)
    assert code == 0
    record = json.loads((tmp_path / "ladder.json").read_text())
    for op in bench.SIZES:
        rungs = [rung for rung in record["rungs"] if rung["op"] == op]
        names = [rung["name"] for rung in rungs]
        assert sorted(names) == sorted(bench.implementations(op))
        assert [r["gflops"] for r in rungs] == sorted(r["gflops"] for r in rungs)
        assert all(name in output for name in names)
    loops = next(r for r in record["rungs"] if r["op"] == "conv2d" and r["name"] == "loops")
    assert loops["smaller"] and "(smaller)" in output and "would take too long" in output
    assert (record["roofs"] is None) == (native is None)
    if native:
        for rung in record["rungs"]:
            kind = "gops" if rung["op"] == "matmul_integer" else "gflops"
            assert rung["share"] == pytest.approx(rung["gflops"] / record["roofs"][kind])
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")


def test_without_the_kernels(tmp_path):
    """Then there are the Python rungs, and no roof."""
    done = subprocess.run(
        [sys.executable, "-m", "minidl", "bench", "ladder", "--op", "matmul", "--size", "32",
         "--seconds", "0.01", "--out", str(tmp_path)],
        env={"MINIDL_NO_NATIVE": "1", "COLUMNS": "200"}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "No roofs, and the Python rungs only" in done.stdout
    record = json.loads((tmp_path / "ladder.json").read_text())
    assert record["roofs"] is None
    assert {rung["name"] for rung in record["rungs"]} == {"loops", "formula"}


def test_a_wrong_rung_is_refused(tmp_path, monkeypatch):
    def wrong(op):
        return {"wrong": lambda x, y: registry[op].op.formula(x, y) * np.float32(1.01)}

    monkeypatch.setattr(bench, "implementations", wrong)
    code, output = call("bench", "ladder", "--op", "matmul", "--size", 32, "--out", tmp_path)
    assert code != 0
    assert "matmul: 'wrong' does not give what the formula gives" in output


def test_step():
    code, output = call("bench", "step", "--batch-size", 2, "--steps", 1, "--conv2d", "im2col")
    assert code == 0
    for word in ("cnn, 2 images of (1, 28, 28)", "forward", "backward", "optimizer", "MiB"):
        assert word in output
    code, output = call("bench", "step", "--conv2d", "imcol")
    assert code == 2 and "conv2d has no implementation 'imcol'" in output
