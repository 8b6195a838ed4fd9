"""Oracles of the ops in `minidl.distributed`. The samples have one rank, for which each of them is
the identity; tests/test_distributed_tensor.py and ..._data_parallel.py have several."""

import numpy as np

from tests.oracles import loops, pytorch


@loops("copy_to_ranks", "reduce_from_ranks")
def _(x, *, communicator):
    y = np.zeros(x.shape)
    for at in np.ndindex(*x.shape):
        y[at] = x[at]
    return y


@loops("scatter_to_ranks", "gather_from_ranks")
def _(x, *, dim, communicator):
    y = np.zeros(x.shape)
    for at in np.ndindex(*x.shape):
        y[at] = x[at]
    return y


@pytorch("copy_to_ranks", "reduce_from_ranks")
def _(x, *, communicator):
    return x.clone()


@pytorch("scatter_to_ranks", "gather_from_ranks")
def _(x, *, dim, communicator):
    return x.clone()


@loops("sum_over_ranks")
def _(x, *, samples, communicator):
    y = np.zeros(x.shape)
    for at in np.ndindex(*x.shape):
        y[at] = x[at]
    return y


@pytorch("sum_over_ranks")
def _(x, *, samples, communicator):
    return x.clone()
