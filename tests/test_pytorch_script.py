"""PyTorch's classic MNIST example runs with nothing but its import lines changed."""

import ast
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

# As in github.com/pytorch/examples/tree/main/mnist.
SCRIPT = """
import argparse
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
from torchvision import datasets, transforms
from torch.optim.lr_scheduler import StepLR


class Net(nn.Module):
    def __init__(self):
        super(Net, self).__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, 1)
        self.conv2 = nn.Conv2d(32, 64, 3, 1)
        self.dropout1 = nn.Dropout(0.25)
        self.dropout2 = nn.Dropout(0.5)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x):
        x = self.conv1(x)
        x = F.relu(x)
        x = self.conv2(x)
        x = F.relu(x)
        x = F.max_pool2d(x, 2)
        x = self.dropout1(x)
        x = torch.flatten(x, 1)
        x = self.fc1(x)
        x = F.relu(x)
        x = self.dropout2(x)
        x = self.fc2(x)
        output = F.log_softmax(x, dim=1)
        return output


def train(args, model, device, train_loader, optimizer, epoch):
    model.train()
    for batch_idx, (data, target) in enumerate(train_loader):
        data, target = data.to(device), target.to(device)
        optimizer.zero_grad()
        output = model(data)
        loss = F.nll_loss(output, target)
        loss.backward()
        optimizer.step()
        if batch_idx % args.log_interval == 0:
            print('Train Epoch: {} [{}/{} ({:.0f}%)]\\tLoss: {:.6f}'.format(
                epoch, batch_idx * len(data), len(train_loader.dataset),
                100. * batch_idx / len(train_loader), loss.item()))
            if args.dry_run:
                break


def test(model, device, test_loader):
    model.eval()
    test_loss = 0
    correct = 0
    with torch.no_grad():
        for data, target in test_loader:
            data, target = data.to(device), target.to(device)
            output = model(data)
            test_loss += F.nll_loss(output, target, reduction='sum').item()  # sum up batch loss
            pred = output.argmax(dim=1, keepdim=True)  # get the index of the max log-probability
            correct += pred.eq(target.view_as(pred)).sum().item()

    test_loss /= len(test_loader.dataset)

    print('\\nTest set: Average loss: {:.4f}, Accuracy: {}/{} ({:.0f}%)\\n'.format(
        test_loss, correct, len(test_loader.dataset),
        100. * correct / len(test_loader.dataset)))


def main():
    # Training settings
    parser = argparse.ArgumentParser(description='PyTorch MNIST Example')
    parser.add_argument('--batch-size', type=int, default=64, metavar='N',
                        help='input batch size for training (default: 64)')
    parser.add_argument('--test-batch-size', type=int, default=1000, metavar='N',
                        help='input batch size for testing (default: 1000)')
    parser.add_argument('--epochs', type=int, default=14, metavar='N',
                        help='number of epochs to train (default: 14)')
    parser.add_argument('--lr', type=float, default=1.0, metavar='LR',
                        help='learning rate (default: 1.0)')
    parser.add_argument('--gamma', type=float, default=0.7, metavar='M',
                        help='Learning rate step gamma (default: 0.7)')
    parser.add_argument('--no-cuda', action='store_true', default=False,
                        help='disables CUDA training')
    parser.add_argument('--dry-run', action='store_true', default=False,
                        help='quickly check a single pass')
    parser.add_argument('--seed', type=int, default=1, metavar='S',
                        help='random seed (default: 1)')
    parser.add_argument('--log-interval', type=int, default=10, metavar='N',
                        help='how many batches to wait before logging training status')
    parser.add_argument('--save-model', action='store_true', default=False,
                        help='For Saving the current Model')
    args = parser.parse_args()
    use_cuda = not args.no_cuda and torch.cuda.is_available()

    torch.manual_seed(args.seed)

    if use_cuda:
        device = torch.device("cuda")
    else:
        device = torch.device("cpu")

    train_kwargs = {'batch_size': args.batch_size}
    test_kwargs = {'batch_size': args.test_batch_size}
    if use_cuda:
        cuda_kwargs = {'num_workers': 1,
                       'pin_memory': True,
                       'shuffle': True}
        train_kwargs.update(cuda_kwargs)
        test_kwargs.update(cuda_kwargs)

    transform=transforms.Compose([
        transforms.ToTensor(),
        transforms.Normalize((0.1307,), (0.3081,))
        ])
    dataset1 = datasets.MNIST('../data', train=True, download=True,
                       transform=transform)
    dataset2 = datasets.MNIST('../data', train=False,
                       transform=transform)
    train_loader = torch.utils.data.DataLoader(dataset1,**train_kwargs)
    test_loader = torch.utils.data.DataLoader(dataset2, **test_kwargs)

    model = Net().to(device)
    optimizer = optim.Adadelta(model.parameters(), lr=args.lr)

    scheduler = StepLR(optimizer, step_size=1, gamma=args.gamma)
    for epoch in range(1, args.epochs + 1):
        train(args, model, device, train_loader, optimizer, epoch)
        test(model, device, test_loader)
        scheduler.step()

    if args.save_model:
        torch.save(model.state_dict(), "mnist_cnn.pt")


if __name__ == '__main__':
    main()
"""

IMPORTS = {
    "import torch": "import minidl as torch",
    "import torch.nn as nn": "import minidl.nn as nn",
    "import torch.nn.functional as F": "import minidl.nn.functional as F",
    "import torch.optim as optim": "import minidl.optim as optim",
    "from torchvision import datasets, transforms": "from minidl.data import datasets, transforms",
    "from torch.optim.lr_scheduler import StepLR": "from minidl.optim.lr_scheduler import StepLR",
}


def with_our_imports(script: str) -> str:
    lines = [IMPORTS.get(line, line) for line in script.splitlines()]
    return "\n".join(lines)


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.tobytes())


def write_digits(folder: Path, name: str, n: int, seed: int) -> None:
    """Images whose class is the place of a bright block, in noise, as official files."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, size=n).astype(np.uint8)
    images = rng.integers(0, 120, size=(n, 28, 28)).astype(np.uint8)
    for image, label in zip(images, labels):
        row, column = 2 + 13 * (label // 5), 1 + 5 * (label % 5)
        image[row : row + 10, column : column + 5] += 120
    folder.mkdir(parents=True, exist_ok=True)
    write_idx(folder / f"{name}-images-idx3-ubyte", images)
    write_idx(folder / f"{name}-labels-idx1-ubyte", labels)


def test_only_the_imports_are_changed():
    original = ast.parse(SCRIPT)
    ours = ast.parse(with_our_imports(SCRIPT))

    def without_imports(tree: ast.Module) -> str:
        body = [node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom)]
        return ast.dump(ast.Module(body, []))

    assert without_imports(original) == without_imports(ours)
    assert not re.search(r"^(import|from) torch", with_our_imports(SCRIPT), re.MULTILINE)
    assert set(IMPORTS) <= set(SCRIPT.splitlines())


def test_the_mnist_example_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    write_digits(tmp_path / "data/MNIST/raw", "train", 1280, seed=0)
    write_digits(tmp_path / "data/MNIST/raw", "t10k", 200, seed=1)
    (tmp_path / "mnist").mkdir()
    monkeypatch.chdir(tmp_path / "mnist")
    arguments = ["--epochs", "1", "--no-cuda", "--log-interval", "1", "--save-model"]
    monkeypatch.setattr(sys, "argv", ["main.py", *arguments, "--test-batch-size", "100"])
    script = with_our_imports(SCRIPT)
    exec(compile(script, "main.py", "exec"), {"__name__": "__main__"})

    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"Loss: ([\d.]+)", printed)]
    assert len(losses) == 20
    assert 2.0 < losses[0] < 3.5  # ten classes, nothing known: log 10 = 2.3
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
    assert "Train Epoch: 1 [1216/1280 (95%)]" in printed
    (accuracy,) = re.findall(r"Accuracy: (\d+)/200", printed)
    assert int(accuracy) > 150

    import minidl

    state = minidl.load("mnist_cnn.pt")
    assert state["fc1.weight"].shape == (128, 9216) and len(state) == 8
