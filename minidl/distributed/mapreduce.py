"""The gradient as MapReduce (Dean & Ghemawat 2004), on Spark.

A gradient is a sum over samples, so it falls into the two halves of a MapReduce job: *map* sums the
gradients of one part of the data, *reduce* adds up the parts (Chu et al. 2006, "Map-Reduce for
machine learning on multicore"). The driver divides by the number of samples, once, and steps:

    from minidl.distributed import mapreduce

    spark = mapreduce.context()                              # or a SparkContext of your own
    data = mapreduce.read(spark, "hdfs://.../train.bin", dtype).cache()
    for step in range(100):
        loss = mapreduce.gradient(model, F.cross_entropy, data)   # in place of loss.backward()
        optimizer.step()

A job costs about a hundred times what MPI takes to sum a gradient. What it buys: the computation
goes to where the data lies, and what a lost machine had done is done again by another one, to the
same bits. `local_sgd` makes a job worth its cost: each map task trains, and weights are averaged.

Whatever is a `pyspark.RDD` of batches (x, y) can be learned from. `read` makes one of binary
records, `batched` of any RDD of samples, so of all else that Spark reads:

    batched(spark.textFile(path).map(parse))                       # a line a sample
    batched(spark.sequenceFile(path).map(parse))                   # (key, value)
    batched(spark.binaryFiles(path).map(lambda file: parse(*file)))    # a file a sample
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
import os
import pickle
import shutil
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from minidl import backend, nn
from minidl.autograd import written
from minidl.backend import random
from minidl.data.collate import default_collate, default_convert, map_tensors
from minidl.distributed.communicator import tree_sum
from minidl.optim.optimizer import Optimizer
from minidl.tensor import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
FAN_IN = 16  # sums that are added up in one place: so many gradients must fit in memory


@dataclass
class Partial:
    """What one map task found in its part of the data: sums, so that all the rest is addition.

    Attributes:
        sums: by the name of a parameter or buffer: its gradient, or its values, summed over the
            samples; arrays on the CPU, float32 at least.
        loss: summed over the samples.
        samples: how many there were.
        errors: what went wrong in which partition.
    """

    sums: dict[str, np.ndarray] = field(default_factory=dict)
    loss: float = 0.0
    samples: int = 0
    errors: tuple[str, ...] = ()

    def __add__(self, other: Partial) -> Partial:
        """What both found. A parameter may be missing in one: no sample there needed it."""
        sums = dict(self.sums)
        for name, x in other.sums.items():
            sums[name] = np.asarray(sums[name] + x) if name in sums else x
        return Partial(
            sums, self.loss + other.loss, self.samples + other.samples, self.errors + other.errors
        )


# Map ------------------------------------------------------------------------------------------


def sum_gradients(model: nn.Module, loss_function: Loss, batches: Iterable[Any]) -> Partial:
    """Map: the sum of all samples' gradients, Σ_b n_b · ∇(mean loss of batch b).

    Args:
        model: in whatever mode it is; its gradients and buffers are changed.
        loss_function: of (model(x), y): the mean over the batch.
        batches: of (x, y), arrays or Tensors whose first dimension counts samples.

    Raises:
        FloatingPointError: the loss of a batch, or a gradient, is infinite or NaN.
    """
    total = Partial()
    for number, (x, y) in enumerate(batches):
        model.zero_grad()
        loss, n = backward(model, loss_function, x, y, number)
        grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        total += Partial(times(n, grads), n * loss, n)
    # Running averages of batch norm: those of a part count as much as it has samples.
    total.sums |= times(total.samples, dict(model.named_buffers()))
    return check_finite(total, model)


def train_locally(
    model: nn.Module,
    loss_function: Loss,
    optimizer: Optimizer,
    steps: int | None,
    batches: Iterable[Any],
) -> Partial:
    """Map of local SGD: train on this part of the data, then weights times samples seen.

    Args:
        model, loss_function, batches: as in `sum_gradients`; the batches must fit in memory.
        optimizer: of the model's parameters.
        steps: batches to train on, in a random order, anew each time all were seen; None: each
            batch once.

    Raises:
        FloatingPointError: the loss of a batch, or a weight at the end, is infinite or NaN.
    """
    shard = list(batches)
    total = Partial()
    orders = (random.generator().permutation(len(shard)) for _ in itertools.count())
    numbers = itertools.chain.from_iterable(orders) if shard else ()
    for number in itertools.islice(numbers, len(shard) if steps is None else steps):
        optimizer.zero_grad()
        x, y = shard[number]
        loss, n = backward(model, loss_function, x, y, number)
        optimizer.step()
        total += Partial({}, n * loss, n)
    total.sums = times(total.samples, state(model))
    return check_finite(total, model)


def backward(
    model: nn.Module, loss_function: Loss, x: Any, y: Any, number: int
) -> tuple[float, int]:
    """Forward and backward pass of batch `number`: its loss, and how many samples it has."""
    device = next(iter(model.parameters())).device
    x, y = map_tensors(lambda t: t.to(device), default_convert((x, y)))
    loss = loss_function(model(x), y)
    value = loss.item()
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss of batch {number} is {value}")
    loss.backward()
    return value, len(x)


def state(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: parameters that learn, and buffers, by name."""
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return learning | dict(model.named_buffers())


def times(n: int, tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """n · each, on the CPU; float16 would overflow, integers would not average: as floats."""
    if n == 0:
        return {}
    arrays = {name: backend.to_device(t.array, "cpu") for name, t in tensors.items()}
    wide = {name: x.astype(np.result_type(x.dtype, np.float32)) for name, x in arrays.items()}
    return {name: np.asarray(n * x) for name, x in wide.items()}


def check_finite(total: Partial, model: nn.Module) -> Partial:
    for name, _ in model.named_parameters():  # a buffer may be infinite: a mask
        if not np.isfinite(total.sums.get(name, 0)).all():
            raise FloatingPointError(f"{name}: infinite or NaN, though the losses are finite")
    return total


def map_task(payload: bytes, partition: int, batches: Iterable[Any]) -> Partial:
    """One map task, wherever it runs.

    Its random numbers (dropout, order) are those of (job, partition): a task that is run again on
    another machine gives the same bits. An exception becomes part of the result, for it would
    come again; a process that dies is run again by Spark.

    Args:
        payload: from `pack`.
        partition: which part of the data this is.
        batches: the data.
    """
    before = random.default_generator.state_dict()
    try:
        key, work = pickle.loads(payload)
        seed = np.random.SeedSequence([*key, partition]).generate_state(1, np.uint64)[0]
        random.manual_seed(int(seed >> 1))
        return work(batches)
    except Exception as error:
        trace = "".join(traceback.format_exception(error)[1:])
        message = f"partition {partition}: {type(error).__name__}: {error}"
        return Partial(errors=(f"{message}\n{trace}",))
    finally:
        random.default_generator.load_state_dict(before)


def pack(work: Callable[[Iterable[Any]], Partial]) -> bytes:
    """What map tasks do, and a fresh key of random numbers, as bytes to be sent to them.

    (By cloudpickle, which also packs functions and classes of the script itself.)

    Raises:
        TypeError: something in it cannot be pickled.
    """
    from pyspark import cloudpickle

    try:
        return cloudpickle.dumps((random.default_generator.next_key(), work))
    except Exception as error:
        raise TypeError(
            "the model (or loss function, or optimizer) cannot be sent to the map tasks: "
            f"{error}. It must not hold open files, locks, generators or a SparkContext: leave "
            "them out in __getstate__, or make them where they are used"
        ) from error


# Reduce ---------------------------------------------------------------------------------------


def tree_reduce(partials: Any) -> Partial:
    """Reduce: the sum of an RDD of (partition, Partial), one a partition.

    Neighbours are added up on the cluster until at most `FAN_IN` sums are left for the driver.
    (`RDD.treeReduce` adds in the order of arrival, another one each time; here the partition's
    number decides, so the bits do not depend on who computes what, or how often.)
    """
    n = partials.getNumPartitions()
    while n > FAN_IN:
        n = -(-n // FAN_IN)
        groups = partials.map(lambda pair: (pair[0] // FAN_IN, pair)).groupByKey(n)
        partials = groups.mapValues(in_order)
    return in_order(partials.collect())


def in_order(pairs: Iterable[tuple[int, Partial]]) -> Partial:
    parts: Any = [partial for _, partial in sorted(pairs, key=lambda pair: pair[0])]
    total: Any = tree_sum(parts)
    return total


def run(data: Any, work: Callable[[Iterable[Any]], Partial]) -> Partial:
    """A job: `work` on each partition of an RDD of batches, and the sum.

    Raises:
        RuntimeError: a map task failed; the message names its partition.
        ValueError: all partitions are empty; a file is not made of such records.
    """
    payload = data.context.broadcast(pack(work))
    try:
        partials = data.mapPartitionsWithIndex(
            lambda partition, batches: [(partition, map_task(payload.value, partition, batches))]
        )
        total = tree_reduce(partials) if data.getNumPartitions() else Partial()
    except Exception as error:
        if "Partial record" in str(error):  # Hadoop's words
            raise ValueError("a file is no whole number of records: is the dtype that of the "
                             "records that were written?") from error  # fmt: skip
        raise
    finally:
        payload.destroy()
    if total.errors:
        others = f"{len(total.errors) - 1} more partitions failed.\n" if total.errors[1:] else ""
        raise RuntimeError(f"a map task failed in {total.errors[0]}{others}")
    if total.samples == 0:
        raise ValueError(
            f"there is nothing to learn from: all {data.getNumPartitions()} partitions are empty"
        )
    return total


# What the driver calls ----------------------------------------------------------------------


def gradient(model: nn.Module, loss_function: Loss, data: Any) -> float:
    """Set every parameter's `.grad` to the gradient of the mean loss over all samples: one job.

    Buffers (the running averages of batch norm) become the mean of what the map tasks have, by
    samples. (Batch norm sees its own batch, dropout draws anew for each: the gradient is that of
    the batches in `data`, whichever machine has them.)

    Args:
        model: with its classes importable on the executors, or defined in the script itself.
        loss_function: of (model(x), y): the mean over the batch.
        data: an RDD of batches (x, y); a partition may be empty. Cache it if it fits in memory.

    Returns:
        The mean loss.

    Raises:
        RuntimeError: a map task failed, or found a NaN; the message names its partition.
        TypeError: the model cannot be pickled.
        ValueError: there are no samples.
    """
    total = run(data, functools.partial(sum_gradients, model, loss_function))
    for name, p in model.named_parameters():
        p.grad = None
        if name in total.sums:
            mean = np.asarray(total.sums[name] / total.samples, p.dtype)
            p.grad = Tensor(backend.to_device(mean, p.device))
    assign_means(total, dict(model.named_buffers()))
    return total.loss / total.samples


def local_sgd(
    model: nn.Module,
    loss_function: Loss,
    data: Any,
    optimizer: Optimizer,
    steps: int | None = None,
) -> float:
    """Train on every partition by itself, and average the weights, by samples: one job.

    One round of iterative parameter mixing (McDonald et al. 2010), also known as local SGD (Stich
    2019) and federated averaging (McMahan et al. 2017). One step on one batch each is a step of
    plain SGD. Long rounds let the partitions drift apart, the more so the less alike they are:
    shuffle the data before it is written.

    Args:
        model, loss_function, data: as in `gradient`; a partition must fit in memory.
        optimizer: of the model's parameters. Its settings are sent along, so a scheduler may
            change them between rounds. Each round starts with the state that the driver's has,
            which is none: momentum begins anew.
        steps: batches that each map task trains on; None: all that its partition has, once.

    Returns:
        The mean loss during training.

    Raises:
        RuntimeError, TypeError, ValueError: as `gradient`; also where the optimizer has other
            parameters than the model, or steps is not positive.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"steps is at least 1, or None for one pass over the data, got {steps}")
    own = set(model.parameters())
    if any(p not in own for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            "the optimizer changes parameters that are not the model's, so training would leave "
            "the model as it is: make it with optim.SGD(model.parameters(), ...)"
        )
    work = functools.partial(train_locally, model, loss_function, optimizer, steps)
    total = run(data, work)
    assign_means(total, state(model))
    return total.loss / total.samples


def assign_means(total: Partial, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        mean = total.sums[name] / total.samples
        mean = np.rint(mean) if tensor.dtype.kind in "iub" else mean
        tensor.array[...] = backend.to_device(np.asarray(mean, tensor.dtype), tensor.device)
        written(tensor.array)


# Data -------------------------------------------------------------------------------------------


def records(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Samples as records of one length each, which is all that Hadoop must know to cut a file.

        records(images, labels).tofile("train.bin")     # then: hdfs dfs -put train.bin ...

    Args:
        x: (N, ...), y: (N, ...).

    Returns:
        (N,), with the fields "x" and "y". Its dtype is what `read` needs.
    """
    if len(x) != len(y):
        raise ValueError(f"x and y must have one entry a sample, got {len(x)} and {len(y)}")
    made = np.empty(len(x), [("x", x.dtype, x.shape[1:]), ("y", y.dtype, y.shape[1:])])
    made["x"], made["y"] = x, y
    return made


def read(
    spark: Any, path: str, dtype: Any, batch_size: int = 256, partition_samples: int | None = None
) -> Any:
    """Batches of a binary file that `records` made, on any file system that Hadoop knows.

    Each machine reads the parts that lie near it.

    Args:
        spark: a SparkContext.
        path: "hdfs://...", "file:///...", "s3a://..."; a file, a folder, or a pattern.
        dtype: of a record: a structured NumPy dtype with the fields x and y, in this order.
        batch_size: samples a batch.
        partition_samples: at most so many samples a partition; None: a block of the file system.

    Returns:
        An RDD of (x, y): arrays (n, ...), n at most batch_size.

    Raises:
        ValueError: the dtype has not two fields.
        FileNotFoundError: there is nothing at `path`.
    """
    dtype = np.dtype(dtype)
    if dtype.names is None or len(dtype.names) != 2:
        raise ValueError(
            f"a record has two fields, its dtype is that of records(x, y); got {dtype}"
        )
    settings = {"fixedlengthinputformat.record.length": str(dtype.itemsize)}
    if partition_samples is not None:
        size = partition_samples * dtype.itemsize
        settings["mapreduce.input.fileinputformat.split.maxsize"] = str(size)
    try:
        pairs = spark.newAPIHadoopFile(
            path,
            "org.apache.hadoop.mapreduce.lib.input.FixedLengthInputFormat",
            "org.apache.hadoop.io.LongWritable",
            "org.apache.hadoop.io.BytesWritable",
            conf=settings,
        )
    except Exception as error:
        if "does not exist" in str(error) or "matches 0 files" in str(error):
            raise FileNotFoundError(f"there is nothing at {path}") from error
        raise
    return batched(pairs.values(), batch_size, functools.partial(from_records, dtype))


def from_records(dtype: np.dtype, samples: list[bytes]) -> tuple[np.ndarray, ...]:
    batch = np.frombuffer(b"".join(samples), dtype)
    return tuple(np.ascontiguousarray(batch[name]) for name in dtype.names or ())


def batched(
    samples: Any, batch_size: int = 256, collate_fn: Callable[[list[Any]], Any] = default_collate
) -> Any:
    """An RDD of batches of an RDD of samples, partition by partition.

    Args:
        samples: an RDD of (x, y).
        batch_size: samples a batch; the last of a partition may have fewer.
        collate_fn: makes a batch of a list of samples.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is at least 1, got {batch_size}")

    def collate(partition: Iterator[Any]) -> Iterator[Any]:
        while chunk := list(itertools.islice(partition, batch_size)):
            yield collate_fn(chunk)

    return samples.mapPartitions(collate)


# Spark ------------------------------------------------------------------------------------------


def context(master: str | None = None, settings: dict[str, str] | None = None) -> Any:
    """Start Spark, or join it: a `pyspark.SparkContext`, to be closed by its `stop()`.

    Each task computes on the one core that Spark counts for it, and on a terminal Spark shows a
    bar for each stage.

    Args:
        master: "local[4]": threads of this machine, for trying out; "local-cluster[2,1,1024]": two
            executors of one core and 1024 MiB here, which may die; "spark://host:7077", "yarn":
            a cluster. None: what spark-submit says, else "local[*]".
        settings: Spark's, such as {"spark.executor.memory": "4g"}.

    Raises:
        RuntimeError: PySpark or Java is missing, or Spark does not start.
    """
    if importlib.util.find_spec("pyspark") is None:
        raise RuntimeError("MapReduce runs on Spark, and PySpark is missing: pip install "
                           "'minidl[spark]' (it brings Spark along; Java it does not)")  # fmt: skip
    submitted = "PYSPARK_GATEWAY_PORT" in os.environ  # spark-submit has started Java already
    home = os.environ.get("JAVA_HOME")
    if not submitted and not shutil.which("java", path=str(Path(home, "bin")) if home else None):
        place = f"JAVA_HOME={home} has no bin/java" if home else "there is no java on the PATH"
        raise RuntimeError(f"Spark runs on Java, and {place}: install Java 17 or later (Debian: "
                           "openjdk-17-jre-headless), or set JAVA_HOME to where it is")  # fmt: skip
    from pyspark import SparkConf, SparkContext

    wanted = [*(settings or {}).items(), *([("spark.master", master)] if master else [])]
    try:
        # Java first: then SparkConf() knows what spark-submit and spark-defaults.conf say.
        SparkContext._ensure_initialized(conf=SparkConf(loadDefaults=False).setAll(wanted))
        conf = SparkConf()
        conf.set("spark.ui.showConsoleProgress", str(sys.stderr.isatty()).lower())
        for library in ("MINIDL", "OMP"):
            name = f"spark.executorEnv.{library}_NUM_THREADS"
            conf.setIfMissing(name, conf.get("spark.task.cpus", "1"))
        conf.setAll(wanted)
        if conf.get("spark.master", "").startswith("local"):
            os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # not PATH's first python3
            conf.setIfMissing("spark.driver.host", "localhost")  # a laptop's name may not resolve
        return SparkContext(conf=conf)
    except Exception as error:
        raise RuntimeError(f"Spark did not start ({error}); what Java says is above. Spark 4 "
                           "wants Java 17 or later") from error  # fmt: skip
