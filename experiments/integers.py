"""The integers: a quantized model as a small file and back, and a layer computed in integers.

A file of save_quantized holds three things:

    layers   for each quantized layer: its codes, at 2 to 8 bits each, s1 and the zero point
    inputs   for each layer whose input is quantized: the step and the zero point
    rest     what else state_dict holds, as it is: biases, norms, embeddings, buffers

A weight comes back as W_hat = s1 * (code - zero_point).

Why do we keep integers, and not W_hat in half precision?

- The codes are smaller. A weight of 3 bits takes 3 bits in the file, and 16 in half precision.
- The codes are exact. Half precision rounds W_hat once more, and the network that you load is then
  not the one that you measured.
- The codes are what hardware multiplies. integer_forward shows how.

S2, s3, s4 and V are not in the file. They chose the codes, and nobody needs them afterwards.
"""
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flexround import LSQ, code_range, input_quantizers, place_input_quantizer, quantizers
from reconstruct import device_of

FORMAT = "flexround-quantized, 4"        # 4: each layer says the dtype of its weight


# ---- Bits and bytes ------------------------------------------------------------------------------

def pack(codes: Tensor, bits: int) -> Tensor:
    """Write unsigned codes below 2^bits one behind the other, and return the bytes (uint8).

    [1, 2, 3] at 3 bits are the bits 001, 010 and 011. The first code takes the lowest bits, so we
    read the row of bits from the right. Then we cut it into bytes, again from the right:

        011 010 001   ->   0 11010001   ->   [209, 0]

    The last byte is filled up with zeros.
    """
    column = codes.reshape(-1, 1).to(torch.uint8).numpy()            # (count, 1)
    ones = np.unpackbits(column, axis=1, bitorder="little")          # (count, 8), lowest bit first
    data = np.packbits(ones[:, :bits], bitorder="little")            # row after row
    return torch.from_numpy(data)


def unpack(data: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of pack: int32, (count,). The last byte may hold more bits than there are."""
    ones = np.unpackbits(data.numpy(), count=count * bits, bitorder="little")
    ones = ones.reshape(count, bits)                                 # a code's bits in each row
    codes = np.packbits(ones, axis=1, bitorder="little")             # (count, 1)
    return torch.from_numpy(codes[:, 0].astype(np.int32))


# ---- A model as a file ---------------------------------------------------------------------------

def on_cpu(tensor: Tensor) -> Tensor:
    """A plain copy on the CPU, whatever the tensor is and wherever it lies.

    cpu() alone returns a tensor of the CPU as it is: a Parameter, or a view of something larger.
    The file would then have other bytes than the same network's file from a GPU.
    """
    return tensor.detach().cpu().clone()


def integers_of(layer: nn.Module, name: str) -> dict:
    """What the file holds for one quantized layer. ValueError: no integers make up its W_hat."""
    q = quantizers(layer)[""]
    codes = q.codes(layer.parametrizations.weight.original)          # int32, W's shape
    entry = {
        "bits": q.bits,
        "symmetric": q.symmetric,
        "shape": list(codes.shape),
        "dtype": layer.weight.dtype,
        "s1": on_cpu(q.s1),
        "zero_point": on_cpu(q.zero_point),
        "codes": pack(on_cpu(codes - q.lo), q.bits),
    }
    # We read back what we wrote. AdaRound is soft in train mode, and a rule of your own may return
    # what no code can be. Such weights would change in the file.
    if not torch.equal(weight_of(entry), on_cpu(layer.weight)):
        raise ValueError(f"{name}: W_hat is not s1 * integers() within bounds (call eval?)")
    return entry


def weight_of(entry: dict) -> Tensor:
    """W_hat of one layer of the file, W's shape. We multiply in the dtype of s1, which may be wider
    than the layer's, and round once at the end."""
    codes = unpack(entry["codes"], entry["bits"], math.prod(entry["shape"]))
    lo, _ = code_range(entry["bits"], entry["symmetric"])
    k = codes.view(entry["shape"]) + lo - entry["zero_point"]
    return (entry["s1"] * k).to(entry["dtype"])


@torch.no_grad()
def save_quantized(model: nn.Module, path) -> int:
    """Write a quantized model as integers, and return the file's size in bytes.

    The file is torch's own format, read with weights_only=True, so that no code runs. A dict of:

        format   FORMAT
        layers   by name: bits, symmetric, shape, dtype, s1, zero_point and codes. The codes are
                 packed, and are code - lo, where lo is -2^(bits-1) if symmetric, else 0
        inputs   by name: bits, signed, log_step, zero_point
        rest     by key: the tensors of state_dict that are not our quantizers'

    A network has the same file on a CPU and on a GPU, if both compute the same codes and s1. We
    write beside path and move the file there, so that a file of that name is never half a file.

    Raises:
        ValueError: no quantizers in the model, weights that are not integers times s1, or an extra
            state that is not a tensor.
    """
    if not quantizers(model):
        raise ValueError("the model holds no quantizers: save it after quantize_model, before fold")
    layers = {}
    ours = []                                                        # our keys begin like these
    # state_dict lists a layer that has two names twice. So do we.
    for name, layer in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        if "" in quantizers(layer):
            layers[name] = integers_of(layer, name)
            ours.append(f"{prefix}parametrizations.weight.")
        if "" in input_quantizers(layer):
            ours.append(f"{prefix}input_quantizer.")
    inputs = {}
    for name, q in input_quantizers(model).items():
        inputs[name] = {
            "bits": q.bits,
            "signed": q.signed,
            "log_step": on_cpu(q.log_step),
            "zero_point": on_cpu(q.zero_point),
        }
    rest = {}
    copies = {}                                                      # tied weights: one copy
    for key, value in model.state_dict(keep_vars=True).items():
        if key.startswith(tuple(ours)):
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"{key!r} of state_dict is a {type(value).__name__}: only tensors can "
                             "be saved")
        if id(value) not in copies:
            copies[id(value)] = on_cpu(value)
        rest[key] = copies[id(value)]
    file = {"format": FORMAT, "layers": layers, "inputs": inputs, "rest": rest}
    with tempfile.TemporaryDirectory(dir=Path(path).absolute().parent) as beside:
        whole = Path(beside, "file")
        torch.save(file, whole)
        whole.replace(path)
    return Path(path).stat().st_size


def load_quantized(model: nn.Module, path) -> nn.Module:
    """Put the weights of a file of save_quantized into a float network. Return it in eval mode.

    The layers are plain afterwards and hold the saved W_hat, to the last bit. Inputs that were
    quantized are quantized again. We check all before we change the first tensor.

    The outputs are the saved model's, too. They are equal to the last bit where both networks are
    frozen by requires_grad_(False). Otherwise torch may take another kernel for a weight that
    requires a gradient, and the last digit can differ.

    Args:
        model: the saved model's float architecture, batch norm folded where it was there.

    Raises:
        ValueError: another kind of file, or another architecture (it names the layer).
    """
    try:
        state, inputs = read_file(path)
    except FileNotFoundError:
        raise
    except Exception as error:                                       # torch raises many kinds
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: truncated, damaged or not a file of save_quantized "
                         f"({type(error).__name__}: {reason})") from error
    theirs = described(state)
    ours = described(model.state_dict())
    names = dict(model.named_modules())
    for name in inputs:
        theirs[name] = "a layer"
        if name in names:
            ours[name] = "a layer"
    for key in [*theirs, *ours]:
        if theirs.get(key) != ours.get(key):
            raise ValueError(f"{path}: another architecture, or no float network: {key!r} is "
                             f"{theirs.get(key)} in the file, {ours.get(key)} in the model")
    model.load_state_dict(state)
    for name, quantizer in inputs.items():
        layer = names[name]
        quantizer.requires_grad_(False).to(device_of([layer]))
        place_input_quantizer(layer, quantizer)
    return model.eval()


def read_file(path) -> tuple[dict, dict]:
    """The state_dict of the float network that the file stands for, and its LSQs by layer."""
    file = torch.load(path, map_location="cpu", weights_only=True)
    if file["format"] != FORMAT:
        raise ValueError(f"format {file['format']!r}")
    state = dict(file["rest"])
    for name, entry in file["layers"].items():
        key = f"{name}.weight" if name else "weight"
        state[key] = weight_of(entry)
    inputs = {}
    for name, entry in file["inputs"].items():
        own = (entry["bits"], entry["signed"], entry["log_step"], entry["zero_point"])
        inputs[name] = LSQ(*own)
    return state, inputs


def described(state: dict) -> dict:
    """What has to agree between a file and a model, by key: dtype and shape of each tensor."""
    found = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            found[key] = (value.dtype, tuple(value.shape))
        else:
            found[key] = type(value).__name__                        # an extra state
    return found


# ---- A layer in integers -------------------------------------------------------------------------

def integer_forward(layer: nn.Module, x_codes: Tensor, x_step: Tensor, x_zero: Tensor) -> Tensor:
    """A quantized layer's output from integer codes and integer inputs: to learn from, not fast.

    With x = x_step * (x_codes - x_zero) and W_hat = s1 * (codes - zero_point) the steps leave the
    sum, which is over int32 alone. One multiplication at the end brings the scale back:

        layer(x) = x_step * s1 * sum (x_codes - x_zero) * (codes - zero_point) + bias

    Args:
        layer: an nn.Linear or nn.Conv2d itself (no subclass), padded with zeros, not dilated (there
            torch has no convolution of integers), with a quantizer in place.
        x_codes: integers, (..., C_in) or (N, C_in, H, W). RoundToNearest(x, 8, False) finds such
            codes, their step (its s1) and zero (its zero_point) for a 2-D or 4-D x.

    Raises:
        ValueError: another layer, or no quantizer on it.
    """
    q = quantizers(layer).get("")
    kind = parametrize.type_before_parametrizations(layer)
    padding = getattr(layer, "padding_mode", "zeros")
    dilation = tuple(getattr(layer, "dilation", (1, 1)))
    fits = kind in (nn.Linear, nn.Conv2d) and padding == "zeros" and dilation == (1, 1)
    if q is None or not fits:
        raise ValueError(f"{layer}: a quantized nn.Linear, or nn.Conv2d padded with zeros and not "
                         "dilated, is allowed")
    k = q.codes(layer.parametrizations.weight.original) - q.zero_point   # int32, W's shape
    k_x = x_codes.to(torch.int32) - x_zero                           # int32: 0 stands for x = 0
    if kind is nn.Linear:
        total = F.linear(k_x, k)                                     # int32, (..., C_out)
        channels = (-1,)
    else:
        total = F.conv2d(k_x, k, None, layer.stride, layer.padding, layer.dilation, layer.groups)
        channels = (-1, 1, 1)
    y = total * (x_step * q.s1.reshape(channels))                    # float from here on
    if layer.bias is not None:
        y = y + layer.bias.reshape(channels)
    return y
