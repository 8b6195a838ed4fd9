"""The training loop: what it writes, and that nothing is lost when it is stopped."""

import inspect
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

import minidl
from minidl import nn, optim
from minidl.data import DataLoader, Digits, Subset, TensorDataset
from minidl.data.augment import RandomCrop
from minidl.nn import functional as F
from minidl.train import Interrupted, NonFiniteError, RunError, evaluate, train


def parts(lr=0.003, hidden=24, seed=3):
    """What `train` takes: it depends on everything that a checkpoint must hold (moments, batch
    statistics, dropout's random numbers, the schedule, the order of the images, augmentation)."""
    minidl.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(144, hidden), nn.ReLU(), nn.Dropout(0.3), nn.Linear(hidden, 10),
    )  # fmt: skip
    images = Subset(Digits(transform=RandomCrop(8, padding=1)), range(300))
    loader = DataLoader(images, 32, shuffle=True, prefetch_thread=True)
    optimizer = optim.Adam(model.parameters(), lr)
    scheduler = optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
    return model, loader, DataLoader(Digits(train=False), 128), optimizer, scheduler


EPOCHS = 3  # of ten steps


def run_script(script, *arguments):
    """Run Python code in another process; its exit code and what it printed."""
    imports = """
        import minidl
        from minidl import nn, optim
        from minidl.data import DataLoader, Digits, Subset
        from minidl.data.augment import RandomCrop
        from minidl.train import train
    """
    code = textwrap.dedent(imports) + inspect.getsource(parts) + textwrap.dedent(script)
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return result.returncode, result.stdout + result.stderr


def final(out):
    """What a run must end with, whatever happened to it: the state's bits, and the log."""
    states = [minidl.load(out / name) for name in ("last.safetensors", "best.safetensors")]
    bits = []

    def collect(value, where=""):
        if isinstance(value, minidl.Tensor):
            bits.append((where, value.numpy().tobytes()))
        elif isinstance(value, dict):
            for key, v in value.items():
                if key not in ("seconds", "images_per_second"):
                    collect(v, f"{where}.{key}")
        elif isinstance(value, list | tuple):
            for i, v in enumerate(value):
                collect(v, f"{where}.{i}")
        else:
            bits.append((where, value))

    collect(states)
    collect(read_log(out), "log")
    return bits


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    train(*parts(), epochs=EPOCHS, out=out)
    return final(out)


KILL_IN_STEP = """
    import os, sys
    out, epoch, step, every = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])

    def kill(progress, lr):
        if (progress.epoch, progress.step) == (epoch, step):
            os.kill(os.getpid(), 9)

    train(*parts(), epochs=3, out=out, resume=True, checkpoint_seconds=every, on_step=kill)
"""


@pytest.mark.parametrize("every", [0, 1000], ids=["each step", "each epoch"])
def test_killed_and_resumed_gives_the_same_bits(tmp_path, uninterrupted, every):
    for epoch, step in [(1, 1), (1, 10), (2, 4)]:
        code, output = run_script(KILL_IN_STEP, tmp_path, epoch, step, every)
        assert code == -signal.SIGKILL, output
    reached = minidl.load(tmp_path / "last.safetensors")["progress"]
    assert (reached["epoch"], reached["step"]) == (2, 3 if every == 0 else 0)
    train(*parts(), epochs=EPOCHS, out=tmp_path, resume=True)
    assert final(tmp_path) == uninterrupted


KILL_IN_SAVE = """
    import os, sys
    out, name = sys.argv[1:]
    save = minidl.save

    def save_and_die(state, path):
        save(state, path)
        if path.name == name and state["progress"]["epoch"] == 2:
            os.kill(os.getpid(), 9)

    minidl.save = save_and_die
    train(*parts(), epochs=3, out=out)
"""


@pytest.mark.parametrize("name", ["best.safetensors", "last.safetensors"])
def test_killed_between_the_files_of_an_epoch(tmp_path, uninterrupted, name):
    code, output = run_script(KILL_IN_SAVE, tmp_path, name)
    assert code == -signal.SIGKILL, output
    (tmp_path / ".last.safetensors.1-ab.tmp").write_bytes(b"half")
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"epoch": 1, "train_lo')
    train(*parts(), epochs=EPOCHS, out=tmp_path, resume=True)
    assert final(tmp_path) == uninterrupted
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "best.safetensors", "curves.png", "last.safetensors", "log.jsonl",
    ]  # fmt: skip


def test_ctrl_c_leaves_a_checkpoint(tmp_path, uninterrupted):
    def press(progress, lr):
        if (progress.epoch, progress.step) == (2, 5):
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted) as stopped:
        train(*parts(), epochs=EPOCHS, out=tmp_path, on_step=press)
    assert isinstance(stopped.value, KeyboardInterrupt)
    assert signal.getsignal(signal.SIGINT) is before
    reached = minidl.load(tmp_path / "last.safetensors")["progress"]
    assert (reached["epoch"], reached["step"]) == (2, 5)
    train(*parts(), epochs=EPOCHS, out=tmp_path, resume=True)
    assert final(tmp_path) == uninterrupted


def test_a_resumed_run_depends_on_the_checkpoint(tmp_path, uninterrupted):
    """The comparison of bits would notice: without the saved random numbers they differ."""
    train(*parts(), epochs=1, out=tmp_path)
    state = minidl.load(tmp_path / "last.safetensors")
    state["random"]["calls"] += 1
    minidl.save(state, tmp_path / "last.safetensors")
    train(*parts(), epochs=EPOCHS, out=tmp_path, resume=True)
    assert final(tmp_path) != uninterrupted


def test_the_log(tmp_path):
    seen = []
    log = train(*parts(), epochs=2, out=tmp_path, on_epoch=seen.append)
    assert log == seen == read_log(tmp_path)
    assert [record["epoch"] for record in log] == [1, 2]
    for record in log:
        assert record["steps"] == 10
        assert 0 < record["test_accuracy"] <= 1
        assert record["seconds"] > 0 and record["images_per_second"] > 0
    assert log[1]["train_loss"] < log[0]["train_loss"]
    assert (tmp_path / "curves.png").stat().st_size > 1000

    best = minidl.load(tmp_path / "best.safetensors")
    model, _, test_loader, *_ = parts()
    model.load_state_dict(best["model"])
    result = evaluate(model, test_loader)
    assert result.accuracy == max(record["test_accuracy"] for record in log)
    record = log[best["progress"]["epoch"] - 2]
    assert result.loss == record["test_loss"]


def test_train_loss_is_the_mean_over_the_images(tmp_path):
    """With a learning rate of 0 the training loss is that of the network as it is."""
    minidl.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    loader = DataLoader(Subset(Digits(), range(100)), 64)  # 64 and 36
    log = train(
        model, loader, loader, optim.SGD(model.parameters(), lr=0.0), epochs=1, out=tmp_path
    )
    images, labels = next(iter(DataLoader(Subset(Digits(), range(100)), 100)))
    expected = F.cross_entropy(model(images), labels).item()
    assert math.isclose(log[0]["train_loss"], expected, rel_tol=1e-6)
    assert math.isclose(log[0]["test_loss"], expected, rel_tol=1e-6)


def test_evaluate():
    logits = np.array([[3, 0], [0, 3], [3, 0]], dtype=np.float32)
    loader = DataLoader(TensorDataset(logits, np.array([0, 1, 1])), 2)
    model = nn.Sequential(nn.Linear(2, 2))
    with minidl.no_grad():
        model[0].weight.copy_(minidl.eye(2))
        model[0].bias.zero_()
    model.train()
    result = evaluate(model, loader)
    assert math.isclose(result.accuracy, 2 / 3)
    assert math.isclose(result.loss, math.log1p(math.exp(-3)) + 1, rel_tol=1e-6)
    assert model.training
    with pytest.raises(ValueError, match="gave no batch"):
        evaluate(model, [])


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model, loader, test_loader, _, _ = parts()
    optimizer = optim.SGD(model.parameters(), lr=1e30)
    with np.errstate(all="ignore"), pytest.raises(NonFiniteError, match=r"epoch 1\b.*--lr"):
        train(model, loader, test_loader, optimizer, epochs=2, out=tmp_path, checkpoint_seconds=0)
    kept = minidl.load(tmp_path / "last.safetensors")
    assert all(np.isfinite(v.numpy()).all() for v in kept["model"].values())
    assert not (tmp_path / "best.safetensors").exists()


def test_data_that_are_not_finite(tmp_path):
    images = np.zeros((64, 1, 8, 8), np.float32)
    images[40, 0, 3, 3] = np.nan
    loader = DataLoader(TensorDataset(images, np.zeros(64, np.int64)), 16)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    optimizer = optim.SGD(model.parameters(), lr=0.25)
    test_loader = DataLoader(TensorDataset(images[:16], np.zeros(16, np.int64)), 16)
    with pytest.raises(NonFiniteError, match=r"nan at step 3 of epoch 1, learning rate 0.25"):
        train(model, loader, test_loader, optimizer, epochs=1, out=tmp_path)


def test_a_run_is_not_overwritten_unasked(tmp_path):
    train(*parts(), epochs=1, out=tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(RunError, match=r"holds a run already.*--resume.*--overwrite"):
        train(*parts(), epochs=1, out=tmp_path)
    with pytest.raises(RunError, match="exclude each other"):
        train(*parts(), epochs=1, out=tmp_path, resume=True, overwrite=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    log = train(*parts(), epochs=2, out=tmp_path, overwrite=True)
    assert read_log(tmp_path) == log and len(log) == 2
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_network_that_does_not_fit_overwrites_nothing(tmp_path):
    train(*parts(), epochs=1, out=tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    _, loader, test_loader, *_ = parts()
    model = nn.Sequential(nn.Flatten(), nn.Linear(65, 10))
    with pytest.raises((ValueError, RuntimeError)):
        train(
            model, loader, test_loader, optim.SGD(model.parameters(), 0.1),
            epochs=1, out=tmp_path, overwrite=True,
        )  # fmt: skip
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 25}, "network was"),
        ({"lr": 0.004}, r"optimizer_settings was .*lr=0\.003.* now it is .*lr=0\.004"),
        ({"config": {"data": "b"}}, "data was 'a', now it is 'b'"),
        ({"test": np.zeros((360, 1, 8, 8), np.float32)}, "test_images was"),
    ],
)
def test_another_run_is_not_resumed(tmp_path, change, message):
    train(*parts(), epochs=1, out=tmp_path, config={"data": "a"})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    config = change.pop("config", {"data": "a"})
    test = change.pop("test", None)
    model, loader, test_loader, *rest = parts(**change)
    if test is not None:
        test_loader = DataLoader(TensorDataset(test, np.zeros(360, np.int64)), 128)
    with pytest.raises(RunError, match=message):
        train(model, loader, test_loader, *rest, epochs=2, out=tmp_path, resume=True, config=config)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_resume_of_a_finished_run_changes_nothing(tmp_path, uninterrupted):
    log = train(*parts(), epochs=EPOCHS, out=tmp_path)
    assert train(*parts(), epochs=EPOCHS, out=tmp_path, resume=True) == log
    assert final(tmp_path) == uninterrupted


def test_a_damaged_checkpoint_is_named(tmp_path):
    train(*parts(), epochs=1, out=tmp_path)
    path = tmp_path / "last.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"last\.safetensors.*truncated"):
        train(*parts(), epochs=2, out=tmp_path, resume=True)
    minidl.save({"model": {}}, path)
    with pytest.raises(RunError, match="not a checkpoint of a training run"):
        train(*parts(), epochs=2, out=tmp_path, resume=True)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        train(*parts(), epochs=1, out=tmp_path / "file" / "run")


def test_sigint_on_the_command_line(tmp_path):
    command = [sys.executable, "-m", "minidl", "train", "--data", "digits", "--model", "mlp"]
    command += ["--epochs", "500", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 60
        log = tmp_path / "run" / "log.jsonl"
        while not (log.exists() and log.read_text().count("\n") >= 2):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert "--resume" in output and "Traceback" not in output
    reached = minidl.load(tmp_path / "run" / "last.safetensors")["progress"]
    assert len(read_log(tmp_path / "run")) == reached["epoch"] - 1
