"""Comparisons with PyTorch: run by `pytest tests/oracle`, never by plain `pytest`.

Without PyTorch they fail: a comparison that was asked for and did not happen is no success.
"""

import torch

torch.set_num_threads(1)
