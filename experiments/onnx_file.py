"""A quantized network as an ONNX file, which ONNX Runtime and other tools run without torch.

    weights   integers and a DequantizeLinear: W_hat = s1 * (code - zero_point)
    inputs    of a layer that has an LSQ: QuantizeLinear, Clip and DequantizeLinear
    the rest  float32, as torch.onnx.export writes it

ONNX (opset 21) has integers of 4 and of 8 bits. So codes of 2 and 3 bits take 4 bits in the file,
and codes of 5 to 7 bits take 8. An input's codes take 8. Where abits is smaller, a Clip of these
integers does what the clamp of the LSQ does.

Everything is float32, because QuantizeLinear takes no float64. So a network in float64 is cast, and
a value that lies halfway between two codes up to float32's precision can get the other one.
"""
import copy

import torch
from torch import Tensor, nn

from flexround import LSQ, RoundToNearest, input_quantizers, quantizers


class StoredWeight(nn.Module):
    """Stands for a quantizer in the network that is exported: its codes and a DequantizeLinear.

    The codes are int8 or uint8 here, because torch has no type of 4 bits. See narrow.
    """

    def __init__(self, q: RoundToNearest, W: Tensor):
        super().__init__()
        kind = torch.int8 if q.symmetric else torch.uint8
        shape = (-1,) if q.per_channel else ()                       # ONNX wants a vector
        self.bits = q.bits
        self.register_buffer("codes", q.codes(W).to(kind))           # W's shape
        self.register_buffer("s1", q.s1.detach().reshape(shape))     # () or (C_out,)
        self.register_buffer("zero_point", q.zero_point.to(kind).reshape(shape))

    def forward(self, W):                                            # the float W does not leave
        inputs = (self.codes, self.s1, self.zero_point)
        return torch.onnx.ops.symbolic("DequantizeLinear", inputs, {"axis": 0},
                                       dtype=torch.float32, shape=self.codes.shape)


class StoredInput(nn.Module):
    """Stands for an LSQ in the network that is exported: x becomes codes, and codes x_hat."""

    def __init__(self, q: LSQ):
        super().__init__()
        kind = torch.int8 if q.signed else torch.uint8
        self.clip = q.bits < 8                                       # QuantizeLinear clamps to 8
        self.register_buffer("step", q.log_step.detach().exp())
        self.register_buffer("zero_point", q.zero_point.to(kind))
        self.register_buffer("lo", torch.tensor(q.lo, dtype=kind))
        self.register_buffer("hi", torch.tensor(q.hi, dtype=kind))

    def forward(self, x):
        def node(name, *inputs, dtype=self.lo.dtype):
            return torch.onnx.ops.symbolic(name, inputs, dtype=dtype, shape=x.shape)

        codes = node("QuantizeLinear", x, self.step, self.zero_point)
        if self.clip:
            codes = node("Clip", codes, self.lo, self.hi)            # of integers, so it is exact
        return node("DequantizeLinear", codes, self.step, self.zero_point, dtype=torch.float32)


def narrow(graph, name: str) -> None:
    """Store an initializer of a graph in 4 bits. graph: an onnx_ir.Graph."""
    from onnxscript import ir
    value = graph.initializers[name]
    kind = ir.DataType.INT4 if value.dtype == ir.DataType.INT8 else ir.DataType.UINT4
    codes = value.const_value.numpy().astype(kind.numpy())
    value.const_value = ir.tensor(codes, kind, name=name)
    value.dtype = kind


def export(net: nn.Module, x: Tensor):
    """torch.onnx.export's program of a network, dim 0 free, not yet optimised. We clear what the
    exporter notes at each node (lines of the source files), which is longer than the weights."""
    from onnxscript.ir.passes.common import ClearMetadataAndDocStringPass
    if x.is_floating_point():
        x = x.float()
    two = torch.cat([x[:1], x[:1]])                                  # torch fixes a batch of one
    net = copy.deepcopy(net).float().eval().requires_grad_(False)
    program = torch.onnx.export(net, (two,), dynamo=True, optimize=False, opset_version=21,
                                dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False,
                                input_names=["x"], output_names=["y"])
    ClearMetadataAndDocStringPass()(program.model)
    return program


@torch.no_grad()
def save_onnx(net: nn.Module, x: Tensor, path) -> None:
    """Write a network with quantizers in place as an ONNX file: after quantize_model, before fold.

    The file computes y from x. Dim 0 of both is the batch and free, and all other dims are fixed.
    Nothing in the file is trained further: AdaRound has its hard codes. The network stays as it is.

    Args:
        net: a network of one input and one output, float32 or float64.
        x: (N, ...) an example input.
        path: of the file. Of a network above 2 GB, the weights go into a second file beside it.

    Raises:
        ImportError: onnx or onnxscript is not installed, or torch is older than 2.8.
        ValueError: no quantizers, a rule whose W_hat is not s1 * (code - zero_point), or a layer
            whose integers are not in the exported graph.
        torch.onnx.OnnxExporterError: torch cannot export the network.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401
        from torch.onnx import ops  # noqa: F401
    except ImportError as error:
        raise ImportError("save_onnx needs torch 2.8 or newer, onnx and onnxscript: "
                          f"pip install onnx onnxscript ({error})") from error
    if not quantizers(net):
        raise ValueError("the network holds no quantizers: call save_onnx after quantize_model and "
                         "before fold")
    net = copy.deepcopy(net).eval()
    stored = {}                                                      # by the name of the layer
    for name, q in quantizers(net).items():
        weight = net.get_submodule(name).parametrizations.weight
        W = weight.original
        if not torch.equal(q(W), q.s1 * (q.codes(W) - q.zero_point)):
            raise ValueError(f"layer {name!r}: W_hat is not s1 * (code - zero_point)")
        stored[name] = weight[0] = StoredWeight(q, W)
    for name, q in input_quantizers(net).items():
        net.get_submodule(name).input_quantizer = StoredInput(q)

    program = export(net, x)
    graph = program.model.graph
    found = set()
    for name, module in net.named_modules(remove_duplicate=False):   # torch may take either name
        if isinstance(module, StoredWeight) and f"{name}.codes" in graph.initializers:
            found.add(module)
            if module.bits <= 4:
                narrow(graph, f"{name}.codes")
                narrow(graph, f"{name}.zero_point")
    lost = [name for name, module in stored.items() if module not in found]
    if lost:
        raise ValueError(f"layers {lost}: their integers are not in the exported graph, because "
                         "net(x) does not use them, or torch.onnx has transformed them")
    program.optimize()
    program.save(path)
    onnx.checker.check_model(path, full_check=True)
