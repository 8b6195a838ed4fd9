"""Monte-Carlo dropout: its definitions, on networks whose answers are known."""

import numpy as np
import pytest

import minidl
from minidl import nn
from minidl.tensor import Tensor
from minidl.uncertainty import mc_dropout


class Coin(nn.Module):
    """Says class 0 or class 1, with certainty, as its dropout falls; class 0 for inputs < 0."""

    def __init__(self, p=0.5):
        super().__init__()
        self.drop = nn.Dropout(p)
        self.norm = nn.BatchNorm1d(1)

    def forward(self, x):
        self.norm(x)
        heads = self.drop(minidl.ones(len(x), 1)) * (x > 0).float()
        return minidl.cat([50 - heads * 100, heads * 100 - 50], dim=1)


def test_agreement_and_disagreement():
    minidl.manual_seed(0)
    found = mc_dropout(Coin(), minidl.tensor([[-1.0], [1.0]]), samples=400)
    assert found.samples.shape == (400, 2, 2)
    certain, split = found.probabilities.numpy()
    np.testing.assert_allclose(certain, [1, 0], atol=1e-6)
    np.testing.assert_allclose(split, [0.5, 0.5], atol=0.1)
    # Each network is certain: all the uncertainty is that they disagree, log 2.
    np.testing.assert_allclose(found.entropy.numpy(), [0, np.log(2)], atol=0.02)
    np.testing.assert_allclose(found.mutual_information.numpy(), [0, np.log(2)], atol=0.02)


def test_uncertain_but_agreed():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))
    with minidl.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    found = mc_dropout(model, minidl.ones(5, 3), samples=3)
    np.testing.assert_allclose(found.entropy.numpy(), np.log(4), rtol=1e-6)
    np.testing.assert_allclose(found.mutual_information.numpy(), 0, atol=1e-6)


@pytest.mark.parametrize(
    "layer",
    [nn.Dropout2d(0.5), nn.DropConnectLinear(4, 4), nn.LockedDropout(0.5),
     nn.GRU(4, 4, 2, dropout=0.5)],
)  # fmt: skip
def test_every_kind_of_dropout_counts(layer):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            y = self.layer(x)
            return (y[0] if isinstance(y, tuple) else y).flatten(1)

    minidl.manual_seed(0)
    found = mc_dropout(Net(), minidl.randn(6, 4, 4), samples=8)
    assert (found.mutual_information.numpy() > 0).any()


def test_leaves_the_model_as_it_was_and_is_a_matter_of_the_seed():
    model = Coin()
    model.norm.eval()
    state = {k: v.numpy().copy() for k, v in model.state_dict().items()}
    x = minidl.randn(20, 1)
    minidl.manual_seed(1)
    first = mc_dropout(model, x, 5).samples.numpy()
    minidl.manual_seed(1)
    np.testing.assert_array_equal(mc_dropout(model, x, 5).samples.numpy(), first)
    assert model.training and model.drop.training and not model.norm.training
    model.train()
    mc_dropout(model, x, 2)
    for k, v in model.state_dict().items():
        np.testing.assert_array_equal(v.numpy(), state[k])  # batch norm has not moved


def test_refuses():
    for model in (nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0))):
        with pytest.raises(ValueError, match="no layer that drops"):
            mc_dropout(model, minidl.ones(1, 2))
    with pytest.raises(ValueError, match="samples"):
        mc_dropout(Coin(), Tensor(np.ones((1, 1), np.float32)), 0)
