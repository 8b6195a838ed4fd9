#!/usr/bin/env bash
# Installs minidl where no C++ compiler is found, and checks that it says so and trains on NumPy.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

python3=.venv/bin/python
[ -x $python3 ] || python3=${PYTHON:-python3}
$python3 -m venv "$folder/venv"
python=$folder/venv/bin/python
env -u CXX -u MINIDL_REQUIRE_NATIVE PATH="$folder/venv/bin" \
    "$python" -m pip install --quiet '.[test]'

cp -r tests pyproject.toml "$folder"
cd "$folder"  # away from the source: import what was installed
"$python" - <<'PYTHON'
from minidl.backend import native

assert native.native is None, "the C++ kernels are there: a compiler was found after all"
assert "C++ compiler" in native.why_missing, native.why_missing
print(f"why_missing: {native.why_missing}")

import minidl
import minidl.nn.functional as F
from minidl import nn, optim

minidl.manual_seed(0)
model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 10))
optimizer = optim.SGD(model.parameters(), lr=0.1)
x, y = minidl.randn(16, 1, 8, 8), minidl.arange(16) % 10
losses = []
for _ in range(20):
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0] / 2, losses
print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}")
PYTHON
"$python" -m pytest -q tests/test_ops.py
