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


def network() -> nn.Sequential:
    """A convolution, a depthwise one, and linear layers on a matrix and on three dims."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.Flatten(2),
        nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(20, 6)).eval()


def images(count: int = 16) -> torch.Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def quantized(config: ReconstructionConfig) -> nn.Sequential:
    net = network()
    quantize_model([net], images(), config)
    return net


def in_runtime(path, x) -> np.ndarray:
    """The file's output, as the graph says, without ONNX Runtime's own changes of it."""
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return runtime.InferenceSession(path, options).run(None, {"x": x.numpy()})[0]


@pytest.mark.parametrize("bits, abits, symmetric, per_channel", [
    (2, None, False, True), (3, 4, True, True), (4, 8, True, False), (4, 3, False, True),
    (8, 8, False, False), (5, 6, True, True)])
def test_onnx_runtime_computes_the_simulation(tmp_path, bits, abits, symmetric, per_channel):
    net = quantized(replace(QUICK, bits=bits, abits=abits, symmetric=symmetric,
                            per_channel=per_channel))
    path = tmp_path / "net.onnx"
    save_onnx(net, images(), path)
    for count in (1, 16):                                            # the batch is free
        x = 3 * images(count)                                        # inputs that the grid clips
        with torch.no_grad():
            y = net(x).numpy()
        np.testing.assert_allclose(in_runtime(path, x), y, atol=1e-5 * abs(y).max())

    graph = onnx.load(path).graph
    kinds = {t.data_type for t in graph.initializer if t.name.endswith("codes")}
    name = f"{'' if symmetric else 'U'}INT{4 if bits <= 4 else 8}"
    assert kinds == {getattr(onnx.TensorProto, name)}
    operations = [node.op_type for node in graph.node]
    assert operations.count("QuantizeLinear") == (4 if abits else 0)
    assert operations.count("Clip") == (4 if abits and abits < 8 else 0)


def test_a_process_without_torch_computes_the_same(tmp_path):
    net = quantized(replace(QUICK, abits=8))
    x = images()
    save_onnx(net, x, tmp_path / "net.onnx")
    np.save(tmp_path / "x.npy", x.numpy())
    program = """
import sys
import numpy as np
import onnxruntime
session = onnxruntime.InferenceSession("net.onnx")
np.save("y.npy", session.run(None, {"x": np.load("x.npy")})[0])
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    here = runtime.InferenceSession(tmp_path / "net.onnx").run(None, {"x": x.numpy()})[0]
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), here)
    # ONNX Runtime rounds biases of 8-bit layers unless it is told not to, hence 2 % of the largest.
    with torch.no_grad():
        y = net(x).numpy()
    np.testing.assert_allclose(here, y, atol=0.02 * abs(y).max())


def test_the_network_stays_as_it_is_and_float64_is_cast(tmp_path):
    net = network().double()
    x = images().double()
    quantize_model([net], x, replace(QUICK, method="adaround", abits=4))
    with torch.no_grad():
        y = net(x)
        save_onnx(net, x, tmp_path / "net.onnx")
        assert torch.equal(net(x), y)
    assert len(quantizers(net)) == len(input_quantizers(net)) == 4
    ours = in_runtime(tmp_path / "net.onnx", x.float())
    np.testing.assert_allclose(ours, y.numpy(), atol=1e-5 * float(y.abs().max()))


def test_a_layer_that_runs_twice_under_two_names(tmp_path):
    torch.manual_seed(0)
    shared = nn.Linear(6, 6)
    net = nn.Sequential(shared, nn.Tanh(), shared).eval()
    x = torch.randn(16, 6)
    quantize_model([net], x, replace(QUICK, bits=3, abits=8))
    save_onnx(net, x, tmp_path / "net.onnx")
    with torch.no_grad():
        y = net(x).numpy()
    np.testing.assert_allclose(in_runtime(tmp_path / "net.onnx", x), y, atol=1e-5)


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
        save_onnx(network(), images(), path)
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
