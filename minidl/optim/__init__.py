"""Optimizers and learning-rate schedules, with PyTorch's names."""

from minidl.optim import lr_scheduler
from minidl.optim.adaptive import Adadelta, Adagrad, Adam, AdamW, RMSprop
from minidl.optim.optimizer import Optimizer
from minidl.optim.sgd import SGD

__all__ = [
    "SGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Optimizer", "RMSprop", "lr_scheduler",
]  # fmt: skip
