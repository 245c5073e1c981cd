"""Tests of experiments/onnx_file.py: what ONNX Runtime computes from the file is the simulation.

They need onnx, onnxscript and onnxruntime, and are skipped where these are not installed.
"""
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from experiments.onnx_file import save_onnx
from flexround import RoundToNearest, input_quantizers, quantizers
from reconstruct import ReconstructionConfig, quantize_model

onnx = pytest.importorskip("onnx", reason="pip install onnx onnxscript onnxruntime")
pytest.importorskip("onnxscript", reason="pip install onnx onnxscript onnxruntime")
runtime = pytest.importorskip("onnxruntime", reason="pip install onnx onnxscript onnxruntime")

QUICK = ReconstructionConfig(iterations=4, batch_size=8, end_bits=None)

# An export takes a second or two, so one network holds a branch for each of these.
CASES = {
    "2 bits, float inputs": replace(QUICK, bits=2, symmetric=False, per_channel=True),
    "3 bits, inputs 4": replace(QUICK, bits=3, abits=4, per_channel=True),
    "4 bits, inputs 8": replace(QUICK, bits=4, abits=8, method="adaround"),
    "4 bits, inputs 3, asymmetric": replace(QUICK, bits=4, abits=3, symmetric=False),
    "5 bits, inputs 6": replace(QUICK, bits=5, abits=6, per_channel=True),
    "8 bits, inputs 8, asymmetric": replace(QUICK, bits=8, abits=8, symmetric=False),
}


class Branches(nn.Module):
    """What each branch returns, side by side: (N, branches, 4, 5)."""

    def __init__(self, *branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        return torch.stack([branch(x) for branch in self.branches], 1)


def branch() -> nn.Sequential:
    """A grouped convolution and a linear layer on three dims: (N, 4, 5)."""
    return nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Tanh(), nn.Flatten(2),
                         nn.Linear(16, 5)).eval()


def images(count: int = 16) -> torch.Tensor:
    return torch.randn(count, 4, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The network of CASES, quantized, and its file."""
    torch.manual_seed(0)
    net = Branches(*(branch() for _ in CASES)).eval()
    for part, config in zip(net.branches, CASES.values(), strict=True):
        quantize_model([part], images(), config)
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    save_onnx(net, images(), path)
    return net, path


def in_runtime(path, x, batch_size: int = 32) -> np.ndarray:
    """The file's output from ONNX Runtime, which would round biases, too, if it optimised."""
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(path, options)
    return np.concatenate([session.run(None, {"x": xs.numpy()})[0] for xs in x.split(batch_size)])


def agree(ours: np.ndarray, y: torch.Tensor) -> None:
    """Equal up to float32's noise, in 9 of 10 inputs. This noise can move a value that lies halfway
    between two codes, and another processor has another noise. A fault changes most inputs."""
    y = y.flatten(1).numpy()
    off = abs(ours.reshape(y.shape) - y).max(1) / abs(y).max()       # of each input
    assert (off < 2e-6).mean() >= 0.9 and off.max() < 0.1, off


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_onnx_runtime_computes_the_simulation(saved, case):
    net, path = saved
    x = 3 * images(32)                                               # some are outside the grid
    i = list(CASES).index(case)
    y = net.branches[i](x)
    agree(in_runtime(path, x)[:, i], y)
    agree(in_runtime(path, x, 1)[:, i], y)                           # the batch is free


def test_the_file_holds_integers_of_the_next_width(saved):
    net, path = saved
    graph = onnx.load(path).graph
    kinds = {t.name: onnx.TensorProto.DataType.Name(t.data_type) for t in graph.initializer}
    for i, kind in enumerate(["UINT4", "INT4", "INT4", "UINT4", "INT8", "UINT8"]):
        for layer in (0, 3):
            name = f"branches.{i}.{layer}.parametrizations.weight.0.codes"
            assert kinds[name] == kind
    operations = [node.op_type for node in graph.node]
    assert operations.count("QuantizeLinear") == 5 * 2               # one branch has float inputs
    assert operations.count("Clip") == 3 * 2                         # inputs of 3, 4 and 6 bits
    assert operations.count("DequantizeLinear") == 6 * 2 + 5 * 2


@torch.no_grad()
def test_a_process_without_torch_computes_the_same(saved, tmp_path):
    net, path = saved
    x = images()
    np.save(tmp_path / "x.npy", x.numpy())
    program = """
import sys
import numpy as np
import onnxruntime
options = onnxruntime.SessionOptions()
options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
session = onnxruntime.InferenceSession(sys.argv[1], options)
np.save("y.npy", session.run(None, {"x": np.load("x.npy")})[0])
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program, path], cwd=tmp_path, check=True)
    agree(np.load(tmp_path / "y.npy"), net(x))


def test_float64_is_cast_and_a_layer_may_run_twice_under_two_names(tmp_path):
    torch.manual_seed(0)
    shared = nn.Linear(6, 6)
    net = nn.Sequential(shared, nn.Tanh(), shared).eval().double()
    x = torch.randn(16, 6).double()
    quantize_model([net], x, replace(QUICK, bits=3, abits=8))
    with torch.no_grad():
        y = net(x)
        save_onnx(net, x, tmp_path / "net.onnx")
        assert torch.equal(net(x), y)                                # it stays as it is
    assert len(quantizers(net)) == len(input_quantizers(net)) == 1
    agree(in_runtime(tmp_path / "net.onnx", x.float()), y)


class Unused(nn.Module):
    """Holds a layer that forward does not call."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.used(x)


class Doubled(RoundToNearest):
    """Returns what is not s1 times the codes."""

    def forward(self, W):
        return 2 * super().forward(W)


def test_errors_say_what_is_wrong(tmp_path):
    path = tmp_path / "net.onnx"
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match="holds no quantizers"):
        save_onnx(branch(), images(), path)
    net = Unused().eval()
    nn.utils.parametrize.register_parametrization(net.used, "weight",
                                                  RoundToNearest(net.used.weight, 4))
    nn.utils.parametrize.register_parametrization(net.unused, "weight",
                                                  RoundToNearest(net.unused.weight, 4))
    with pytest.raises(ValueError, match=r"layers \['unused'\]: their integers are not"):
        save_onnx(net, x, path)
    net.unused.parametrizations.weight[0] = Doubled(net.unused.parametrizations.weight.original, 4)
    with pytest.raises(ValueError, match="layer 'unused': W_hat is not s1"):
        save_onnx(net, x, path)
    with mock.patch.dict(sys.modules, {"onnxscript": None}), \
            pytest.raises(ImportError, match="pip install onnx onnxscript"):
        save_onnx(net, x, path)
    assert not path.exists()
