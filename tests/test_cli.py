"""The command line: help, errors in a paragraph, and one small run of each command."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from minidl import cli
from minidl.data import MNIST

COMMANDS = [
    "demo", "train", "attack", "augment", "quantize", "caption train", "caption show", "kernels",
    "doctor", "launch", "scale", "bench ladder", "bench step",
]  # fmt: skip


def commands():
    """(how it is called, its function), also for the commands of a group."""
    for c in cli.app.registered_commands:
        yield c.callback.__name__, c.callback
    for group in cli.app.registered_groups:
        for c in group.typer_instance.registered_commands:
            yield f"{group.name} {c.name or c.callback.__name__}", c.callback


def call(*arguments, **environment):
    """Run a command in this process; its exit code and all that it printed, on one line."""
    environment = {"COLUMNS": "200", "NO_COLOR": "1", "MINIDL_DATA": None, **environment}
    result = CliRunner(env=environment).invoke(cli.app, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


def call_process(*arguments):
    result = subprocess.run(
        [sys.executable, "-m", "minidl", *map(str, arguments)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return result.returncode, result.stdout, result.stderr


def test_the_commands_are_those_that_work():
    assert sorted(name for name, _ in commands()) == sorted(COMMANDS)
    code, output = call("--help")
    assert code == 0
    assert all(name.split()[0] in output for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command):
    code, output = call(*command.split(), "--help")
    assert code == 0
    assert f"Usage: minidl {command}" in output
    shorter, _ = call(*command.split(), "-h")
    assert shorter == 0


def test_every_option_is_explained():
    for name, function in commands():
        for parameter in function.__signature__.parameters.values():
            (option,) = parameter.annotation.__metadata__
            assert option.help, f"{name} --{parameter.name}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "digit"], "no dataset is called 'digit', did you mean 'digits'?"),
        (["--model", "cnnn"], "no model is called 'cnnn': did you mean 'cnn'?"),
        (["--optimizer", "sdg"], "did you mean 'sgd'?"),
        (["--scheduler", "x"], "Choose one of: onecycle, cosine, step, none"),
        (["--threads", "0"], "--threads is at least 1"),
        (["--device", "cuda"], "CuPy"),
        (["--device", "tpu"], "expected 'cpu', 'cuda' or 'cuda:N'"),
        (["--lr", "-1"], "lr must not be negative"),
        (["--model", "lenet"], "lenet needs images of at least 12×12"),
        (["--data", "mnist", "--root", "nowhere"], "the folder nowhere does not exist"),
        (["--data", "mnist", "--root", "nowhere"], "--download, or --root FOLDER"),
    ],
)
def test_errors_are_a_paragraph(tmp_path, monkeypatch, arguments, message):
    if "CuPy" in message:
        monkeypatch.setitem(sys.modules, "cupy", None)
    code, output = call("train", "--out", tmp_path / "run", *arguments)
    assert code == 2
    assert output.startswith("minidl: ") or "minidl: " in output
    assert message in output
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [["trane"], ["train", "--epochs", "x"], ["train", "--what"]])
def test_wrong_usage(arguments):
    code, _ = call(*arguments)
    assert code == 2


def test_a_damaged_file_is_named(tmp_path):
    for part in ("train", "t10k"):
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + 12 * b"\1")
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(b"")
    code, output = call("train", "--data", "mnist", "--root", tmp_path, "--out", tmp_path / "run")
    assert code == 2
    assert "train-images-idx3-ubyte: truncated" in output and "Traceback" not in output


def test_debug_shows_the_traceback():
    code, _, errors = call_process("train", "--data", "nothing", "--debug")
    assert code == 2
    assert "Traceback" in errors and "minidl: no dataset is called 'nothing'" in errors
    code, _, errors = call_process("train", "--data", "nothing")
    assert code == 2 and "Traceback" not in errors


def test_a_mistake_in_minidl_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli.training, "open_data", lambda *_: 1 + "1")
    with pytest.raises(TypeError):
        call("train")


def test_train_and_resume(tmp_path):
    out = tmp_path / "a" / "run"
    options = ["train", "--data", "digits", "--model", "mlp", "--scheduler", "none", "--out", out]
    code, output = call(*options, "--epochs", "2", "--augment")
    assert code == 0, output
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in log] == [1, 2]
    assert log[-1]["test_accuracy"] > 0.8
    assert f"test accuracy {100 * log[-1]['test_accuracy']:.2f} %" in output
    assert {p.name for p in out.iterdir()} == {
        "log.jsonl", "last.safetensors", "best.safetensors", "curves.png",
    }  # fmt: skip

    code, output = call(*options, "--epochs", "2", "--augment")
    assert code == 2 and "holds a run already" in output
    code, output = call(*options, "--epochs", "3", "--no-augment", "--resume")
    assert code == 2 and "augment was True, now it is False" in output
    code, output = call(*options, "--epochs", "3", "--augment", "--resume")
    assert code == 0, output
    assert len((out / "log.jsonl").read_text().splitlines()) == 3
    code, output = call(*options, "--epochs", "1", "--overwrite")
    assert code == 0, output
    assert len((out / "log.jsonl").read_text().splitlines()) == 1


def test_more_epochs_are_another_schedule(tmp_path):
    options = ["train", "--data", "digits", "--model", "linear", "--out", tmp_path]
    assert call(*options, "--epochs", "1")[0] == 0
    code, output = call(*options, "--epochs", "2", "--resume")
    assert code == 2 and "scheduler was 'onecycle over 1 epochs'" in output


def test_a_loss_that_is_not_finite(tmp_path):
    code, output = call(
        "train", "--data", "digits", "--model", "mlp", "--optimizer", "sgd", "--lr", "1e30",
        "--scheduler", "none", "--out", tmp_path,
    )  # fmt: skip
    assert code == 1
    assert "epoch 1" in output and "lower learning rate (--lr)" in output


@pytest.mark.parametrize(
    ("optimizer", "scheduler"),
    [("adam", "onecycle"), ("adamw", "cosine"), ("sgd", "step"), ("rmsprop", "none")],
)
def test_optimizers_and_schedulers_learn(tmp_path, optimizer, scheduler):
    code, output = call(
        "train", "--data", "digits", "--model", "linear", "--out", tmp_path,
        "--optimizer", optimizer, "--scheduler", scheduler, "--epochs", "2",
    )  # fmt: skip
    assert code == 0, output
    accuracy = float(re.search(r"best ([\d.]+) %", output)[1])
    assert accuracy > 60


def test_mixed_precision(tmp_path):
    options = ["train", "--model", "linear", "--epochs", "1", "--out", tmp_path, "--amp"]
    code, output = call(*options, "float8")
    assert code == cli.MISUSED and "float16 or bfloat16, got 'float8'" in output
    assert not any(tmp_path.iterdir())
    code, output = call(*options, "float16")
    assert code == 0 and "test accuracy" in output, output


def test_kernels():
    code, output = call("kernels")
    assert code == 0
    assert "conv2d" in output and "in use" in output


def test_doctor(tmp_path):
    code, output = call("doctor", MINIDL_DATA=str(tmp_path))
    assert code == 0
    for word in ("Python", "NumPy", "BLAS", "C++ kernels", "GPU", "MPI", "Spark", "Data"):
        assert word in output
    assert str(tmp_path) in output and "360 test images" in output
    assert "minidl train --data mnist --download" in output


def test_doctor_survives_what_it_finds(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise OSError("[Errno 5] a disk that [/dies]")

    monkeypatch.setattr(MNIST, "__init__", broken)
    monkeypatch.setattr("minidl.doctor.native", None)
    monkeypatch.setattr("minidl.doctor.why_missing", "no compiler")
    code, output = call("doctor", MINIDL_DATA=str(tmp_path))
    assert code == 0
    assert "a disk that [/dies]" in output and "no compiler" in output and "to mend" in output


CUPY = """
__version__ = "14.2.0"
class cuda:
    class runtime:
        def getDeviceCount():
            {count}
        def getDeviceProperties(i):
            return {{"name": b"NVIDIA H100"}}
"""
NO_GPU = "raise RuntimeError('cudaErrorNoDevice: no CUDA-capable device is detected')"


@pytest.mark.parametrize("driver", [False, True])
@pytest.mark.parametrize("gpus", [None, 0, 2])
def test_doctor_on_the_gpu(tmp_path, monkeypatch, gpus, driver):
    """No CuPy; CuPy and no GPU; GPUs: what is the case, and what to do about it."""
    find = importlib.util.find_spec
    if gpus is None:
        absent = lambda name: None if name == "cupy" else find(name)  # noqa: E731
        monkeypatch.setattr("importlib.util.find_spec", absent)
    else:
        count = f"return {gpus}" if gpus else NO_GPU
        (tmp_path / "cupy.py").write_text(CUPY.format(count=count))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    which = shutil.which
    nvidia = {"nvidia-smi": "/usr/bin/nvidia-smi" if driver else None}
    monkeypatch.setattr("shutil.which", lambda name, **how: nvidia.get(name, which(name, **how)))
    code, output = call("doctor", MINIDL_DATA=str(tmp_path))
    assert code == 0
    if gpus:
        assert "NVIDIA H100, NVIDIA H100 (CuPy 14.2.0)" in output
        assert "conv2d" in output and "have CUDA kernels" in output
    elif gpus == 0:
        assert "CuPy finds none: RuntimeError: cudaErrorNoDevice" in output
        assert ("see what nvidia-smi says" if driver else "install its driver") in output
    else:
        assert "CuPy is not installed" in output and "pip install 'minidl[cuda]'" in output
        assert ("though there is an NVIDIA driver" in output) == driver


@pytest.mark.parametrize(
    ("library", "level", "aware", "mpirun_is_open_mpi", "gpus", "expected"),
    [
        ("Open MPI", "MULTIPLE", False, True, "",
         ["Open MPI 5.0", "MPI_THREAD_MULTIPLE", "of this MPI", "--bind-to none", "through pinned",
          "shrink and respawn"]),
        ("MPICH", "MULTIPLE", True, False, "2 2.32.3",
         ["MPICH 5.0", "of this MPI", "(CUDA-aware): messages go directly", "--on-failure restart",
          "NCCL 2.32.3: dist.init() takes it for up to 2 ranks"]),
        ("MPICH", "FUNNELED", False, True, "2 nvidia-nccl-cu13",
         ["needs MULTIPLE", "mpirun is not MPICH's", "set MPI4PY_LIBMPI",
          "pip install nvidia-nccl-cu13"]),
    ],
)  # fmt: skip
def test_doctor_explains_the_mpi(
    monkeypatch, library, level, aware, mpirun_is_open_mpi, gpus, expected
):
    says = json.dumps([library, f"{library} 5.0", level, aware])
    monkeypatch.setattr("minidl.doctor.installed", lambda package: "4.1")
    monkeypatch.setattr("minidl.doctor.ask", lambda code: (True, says if "MPI" in code else gpus))
    find = importlib.util.find_spec
    here = lambda name: object() if name == "cupy" and gpus else find(name)  # noqa: E731
    monkeypatch.setattr("importlib.util.find_spec", here)
    monkeypatch.setattr(
        "minidl.distributed.launch.find_mpirun", lambda: ("/bin/mpirun", mpirun_is_open_mpi)
    )
    from minidl.doctor import the_cluster

    found = list(the_cluster())
    text = " ".join(f"{f.name} {f.found} {f.advice}" for f in found)
    for words in expected:
        assert words in text, text
    wrong = (level != "MULTIPLE") + (mpirun_is_open_mpi != (library == "Open MPI"))
    assert sum(f.state == "bad" for f in found if f.name != "Spark") == wrong


def test_demo(tmp_path):
    code, output = call("demo", "--out", tmp_path, "--epochs", "1")
    assert code == 1  # one epoch does not reach the goal
    page = (tmp_path / "index.html").read_text()
    assert "below the 97.5 %" in output and "index.html" in output
    assert page.count("<svg") > 40
    assert "</html>" in page
    # Nothing is fetched from anywhere.
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:|\#)""", page)
    assert not re.search(r"@import|url\((?!data:|#)", page)


def test_help_is_quick():
    """What only the work needs is not imported to say how to call it."""
    heavy = {"matplotlib", "jinja2", "sklearn", "PIL", "safetensors"}
    code = f"import minidl.cli, sys; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert result.stdout.strip() == "[]", result.stderr


def test_augment(tmp_path):
    ramp = np.arange(64 * 48 * 3, dtype=np.uint8).reshape(64, 48, 3)
    for name, pixels in (("a.png", ramp), ("b.png", ramp[::-1, ::-1])):
        Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / name)
    sheets = []
    for i, files in enumerate([["a.png"], ["a.png", "b.png"], ["a.png", "b.png"]]):
        out = tmp_path / f"sheets/{i}.png"
        files = [tmp_path / file for file in files]
        code, output = call("augment", *files, "--out", out, "--columns", 2, "--size", 16)
        assert code == 0 and f"{12 if len(files) > 1 else 10} transforms" in output
        sheets.append(out.read_bytes())
    assert sheets[0] != sheets[1] and sheets[1] == sheets[2]  # the same seed
    code, output = call("augment", tmp_path / "nothing.png")
    assert code == 2 and "nothing.png" in output
    (tmp_path / "text.png").write_text("no image")
    code, output = call("augment", tmp_path / "text.png")
    assert code == 2 and "not an image" in output


def test_attack(tmp_path):
    run = tmp_path / "run"
    assert call("train", "--epochs", 2, "--out", run)[0] == 0
    code, output = call("attack", run, "--epsilon", 0.3, "--epsilon", 0.1, "--images", 100)
    assert code == 0 and "written to" in output
    found = json.loads((run / "attack" / "attack.json").read_text())
    assert found["data"] == "digits" and found["steps"] == 10
    rows = found["accuracy"]
    assert [row["epsilon"] for row in rows] == [0.0, 0.1, 0.3]
    assert rows[0]["fgsm"] == rows[0]["noise"] > rows[1]["fgsm"] > rows[2]["fgsm"]
    assert rows[2]["noise"] > rows[2]["fgsm"] >= rows[2]["pgd"]
    for picture in ("curves.png", "sheet.png"):
        assert (run / "attack" / picture).read_bytes().startswith(b"\x89PNG")
    again = tmp_path / "again"
    call("attack", run / "best.safetensors", "--epsilon", 0.1, "--images", 100, "--out", again)
    assert json.loads((again / "attack.json").read_text())["accuracy"][1] == rows[1]


def test_attack_refuses(tmp_path):
    import minidl

    for arguments, words in [
        ([tmp_path / "nothing"], "is not there: give a run's folder"),
        ([tmp_path / "other.safetensors"], "is not a checkpoint of `minidl train`"),
    ]:
        minidl.save({"a": 1}, tmp_path / "other.safetensors")
        code, output = call("attack", *arguments)
        assert code == cli.MISUSED and words in output
    run = tmp_path / "run"
    assert call("train", "--epochs", 1, "--model", "linear", "--out", run)[0] == 0
    for arguments in (["--epsilon", -0.1], ["--epsilon", 0.1, "--show", 2]):
        code, output = call("attack", run, *arguments)
        assert code == cli.MISUSED and "epsilon" in output
        assert not (run / "attack").exists()


def test_quantize(tmp_path):
    import minidl
    from minidl.quantization import Quantized

    run = tmp_path / "run"
    assert call("train", "--epochs", 3, "--out", run)[0] == 0
    page = tmp_path / "page.html"
    code, output = call("quantize", run, "--sweep", "--calibrate", 100, "--microscope", page)
    assert code == 0 and "predictions kept" in output and "2 bits" in output
    assert "most noise on the scores" in output and "cnn on digits, in int8" in page.read_text()
    found = json.loads((run / "int8" / "quantize.json").read_text())
    assert found["agreement"] > 0.97 and len(found["sweep"]) == 7
    assert found["narrow"]["MiB"] < 0.35 * found["float32"]["MiB"]
    assert (run / "int8" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert Quantized.load(run / "int8" / "model.safetensors").graph.steps
    code, output = call("quantize", run, "--dtype", "float16", "--out", tmp_path / "half")
    assert code == 0 and "float16" in output
    if importlib.util.find_spec("onnx"):
        assert call("quantize", run, "--calibrate", 100, "--onnx")[0] == 0
        again = importlib.import_module("minidl.onnx").load(run / "int8" / "model.onnx")
        assert again(minidl.rand(2, 1, 8, 8)).shape == (2, 10)
    for scheme, dtype in (("dynamic", "int8"), ("weight_only", "int4")):
        code, output = call("quantize", run, "--scheme", scheme, "--dtype", dtype)
        assert code == 0 and "predictions kept" in output
        found = json.loads((run / f"{dtype}-{scheme}" / "quantize.json").read_text())
        assert found["scheme"] == scheme and found["agreement"] > 0.9
        assert minidl.load(run / f"{dtype}-{scheme}" / "model.safetensors")
    for arguments, words in (
        (["--scheme", "statik"], "static, dynamic"),
        (["--dtype", "int4"], "the static scheme makes int8, not 'int4'"),
        (["--dtype", "int9"], "int8, int4, float16"),
        (["--observer", "largest"], "expected one of minmax"),
        (["--skip", "conv9"], "has no layer 'conv9'"),
        (["--onnx", "--dtype", "float16"], "--onnx is for --dtype int8 --scheme static"),
    ):
        code, output = call("quantize", run, *arguments)
        assert code == cli.MISUSED and words in " ".join(output.split()), output


def test_caption(tmp_path):
    from PIL import Image

    from minidl.data import ShapeScenes

    run, picture = tmp_path / "run", tmp_path / "scene.png"
    short = ["--limit", 40, "--epochs", 1, "--hidden", 16, "--out", run]
    code, output = call("caption", "train", *short)
    assert code == 0 and "held-out images" in output
    for name in ("best.safetensors", "vocabulary.json", "log.jsonl", "curves.png"):
        assert (run / name).exists()
    page = (run / "gallery.html").read_text()
    assert page.count("<figure>") == 60 and "http" not in page
    scene = ShapeScenes("test", 1)
    assert scene.captions[0][0] in page

    pixels = (scene[0][0].transpose(1, 2, 0) * 255).astype(np.uint8)
    Image.fromarray(pixels).save(picture)
    drawn = tmp_path / "looked.png"
    how = ["--model", run, "--beam", 3, "--max-length", 5, "--out", drawn]
    for arguments in ([picture, *how], [*how, picture], ["show", picture, *how]):
        code, output = call("caption", *arguments)
        assert code == 0 and "likelihood" in output, output
        assert drawn.read_bytes().startswith(b"\x89PNG")
        drawn.unlink()

    again = call("caption", "train", *short)
    assert again[0] == cli.MISUSED and "holds a run already" in again[1]
    assert call("caption", "train", *short, "--resume")[0] == 0
    code, output = call("caption", "train", *short, "--overwrite", "--decoder", "tell")
    assert code == 0
    code, output = call("caption", picture, "--model", run)
    assert code == 0 and "where it looked" not in output


def test_caption_refuses(tmp_path):
    import minidl
    from minidl.captioning import Vocabulary

    minidl.save({"a": 1}, tmp_path / "best.safetensors")
    for arguments, words in [
        (["train", "--decoder", "attent"], "did you mean 'attend'"),
        (["train", "--data", "flickr8k", "--root", tmp_path], "Flickr8k"),
        (["train", "--freeze"], "give --weights"),
        ([tmp_path / "x.png", "--model", tmp_path], "vocabulary.json is not there"),
    ]:
        code, output = call("caption", *arguments)
        assert code == cli.MISUSED and words in output, output
    Vocabulary(["a"]).save(tmp_path / "vocabulary.json")
    code, output = call("caption", tmp_path / "x.png", "--model", tmp_path)
    assert code == cli.MISUSED and "is not a checkpoint of `minidl caption train`" in output

    run = tmp_path / "run"
    short = ["--limit", 10, "--epochs", 1, "--hidden", 8, "--decoder", "tell", "--out", run]
    assert call("caption", "train", *short)[0] == 0
    code, output = call("caption", tmp_path / "x.png", "--model", run)
    assert code == cli.MISUSED and "no such image file" in output
    (tmp_path / "x.png").write_bytes(b"no image")
    code, output = call("caption", tmp_path / "x.png", "--model", run)
    assert code == cli.MISUSED and "x.png" in output
    Vocabulary(["a"]).save(run / "vocabulary.json")
    code, output = call("caption", tmp_path / "x.png", "--model", run)
    assert code == cli.MISUSED and "is not the vocabulary" in output


def test_scale(tmp_path):
    picture = tmp_path / "new" / "scale.png"
    options = ["scale", "--model", "resnet20", "--images-per-second", "5000", "--out", picture]
    code, output = call(*options, "--gpus", "8:1024", "--batch", "128")
    assert code == 0, output
    assert "0.3 M parameters, 0.1 Gflop" in output
    assert "131,072" in output and "beyond 8,192 Goyal et al." in output
    rows = re.findall(r"([\d,]+) ([\d,]+) ([\d.]+) ([\d,]+) ([\d.]+) %", output)
    assert [int(row[0].replace(",", "")) for row in rows] == [8 << i for i in range(8)]
    efficiency = [float(row[4]) for row in rows]
    assert efficiency == sorted(efficiency, reverse=True) and efficiency[0] < 100
    assert Image.open(picture).size == (1500, 600)

    code, output = call(*options, "--gpus", "16", "--bandwidth", "0.01", "--latency", "1")
    assert code == 0 and "16 GPUs are bound by bandwidth" in output
    code, output = call(*options, "--gpus", "512", "--latency", "10000", "--bandwidth", "10000")
    assert code == 0 and "bound by latency" in output
    for wrong, message in [
        (["--gpus", "8-1024"], "given as 8:1024 or 1,8,64, got '8-1024'"),
        (["--gpus", "0:8"], "got '0:8'"),
        (["--cluster", "p101"], "did you mean 'p100'"),
        (["--algorithm", "rings"], "choose one of parameter_server"),
        (["--model", "resnet51"], "did you mean 'resnet50'"),
        (["--bandwidth", "0"], "--bandwidth is positive"),
        (["--measure"], "mpirun -n 2"),
    ]:
        code, output = call(*options, *wrong)
        assert code == 2 and message in output, output
