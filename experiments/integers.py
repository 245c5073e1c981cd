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

This module needs flexround.py and nothing else of ours. To use it elsewhere, copy both.
"""
import hashlib
import io
import math
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flexround import LSQ, code_range, input_quantizers, place_input_quantizer, quantizers

FORMAT = "flexround-quantized, 5"        # 5: the file holds a checksum of all that it says


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
    """A plain copy on the CPU, whatever the tensor is (a Parameter, a subclass) and wherever.

    cpu() alone returns a tensor of the CPU as it is: a Parameter, or a view of something larger.
    The file would then have other bytes than the same network's file from a GPU.
    """
    return tensor.detach().as_subclass(Tensor).cpu().clone()


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


def checksum(value) -> str:
    """Return the SHA-256 of what a file holds: dicts, lists, tensors and plain values."""
    if isinstance(value, dict):
        parts = [f"{key!r}: {checksum(part)}" for key, part in value.items()]
    elif isinstance(value, Tensor):
        data = value.contiguous().reshape(-1).view(torch.uint8).numpy()
        parts = [value.dtype, value.shape, hashlib.sha256(data).hexdigest()]
    else:
        parts = [value]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def check_grid(bits: int, signed: bool, step: Tensor, zero_point: Tensor, shapes: list) -> None:
    """Raises ValueError if these are no grid of ours: the step size of shape () or such, finite and
    positive, and the zero point a code."""
    lo, hi = code_range(bits, signed)
    if type(signed) is not bool or step.shape not in shapes or zero_point.shape != step.shape:
        raise ValueError(f"signed = {signed!r}, step sizes {tuple(step.shape)}, zero points "
                         f"{tuple(zero_point.shape)}: a bool and one of {shapes} are allowed")
    if not (torch.isfinite(step) & (step > 0)).all():
        raise ValueError("a step size is not a positive number")
    if zero_point.dtype != torch.int32 or not ((lo <= zero_point) & (zero_point <= hi)).all():
        raise ValueError(f"a zero point is no integer from {lo} to {hi}")


def weight_of(entry: dict) -> Tensor:
    """W_hat of one layer of the file, W's shape. We multiply in the dtype of s1, which may be wider
    than the layer's, and round once at the end. Raises ValueError for what cannot be a layer."""
    shape = entry["shape"]
    per_channel = (*shape[:1], *[1] * len(shape[1:]))                # (C_out, 1[, 1, 1])
    check_grid(entry["bits"], entry["symmetric"], entry["s1"], entry["zero_point"],
               [(), per_channel])
    if entry["symmetric"] and entry["zero_point"].any():
        raise ValueError("a symmetric grid has a zero point other than 0")
    count = math.prod(shape)
    if len(entry["codes"]) != math.ceil(count * entry["bits"] / 8):
        raise ValueError(f"{len(entry['codes'])} bytes for {count} codes of {entry['bits']} bits")
    codes = unpack(entry["codes"], entry["bits"], count)
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
        checksum of the above, see there

    Names are those of state_dict. A network has the same file on a CPU and on a GPU, if both
    compute the same codes and s1. We read back what we have written, beside path, and move it there
    last, so that a file of that name is never half a file. If path is a link, its target changes.

    Raises:
        ValueError: no quantizers in the model, weights that are not integers times s1, an extra
            state that is not a tensor, or a state_dict without our quantizers.
        OSError: the file cannot be written, for example because path is read-only.
    """
    if not quantizers(model):
        raise ValueError("the model holds no quantizers: save it after quantize_model, before fold")
    # A wrapper may give state_dict other names than modules have. So we find a layer's name by its
    # tensors. state_dict lists a layer that has two names twice, and so do we.
    weights, steps = {}, {}                                          # id of a tensor: its owner
    for name, layer in model.named_modules():
        if "" in quantizers(layer):
            weights[id(layer.parametrizations.weight.original)] = name, layer
        if "" in input_quantizers(layer):
            steps[id(layer.input_quantizer.log_step)] = layer.input_quantizer
    state = model.state_dict(keep_vars=True)
    layers, inputs, ours = {}, {}, []                                # our keys begin like ours
    for key, value in state.items():
        if id(value) in weights:
            prefix = key.removesuffix("parametrizations.weight.original")
            layers[prefix.removesuffix(".")] = integers_of(*reversed(weights[id(value)]))
            ours.append(f"{prefix}parametrizations.weight.")
        if id(value) in steps:
            prefix = key.removesuffix("input_quantizer.log_step")
            q = steps[id(value)]
            inputs[prefix.removesuffix(".")] = {
                "bits": q.bits,
                "signed": q.signed,
                "log_step": on_cpu(q.log_step),
                "zero_point": on_cpu(q.zero_point),
            }
            ours.append(f"{prefix}input_quantizer.")
    if len(ours) < len(weights) + len(steps):
        raise ValueError("state_dict does not hold all quantizers: does a hook change it?")
    rest = {}
    copies = {}                                                      # tied weights: one copy
    for key, value in state.items():
        if key.startswith(tuple(ours)):
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"{key!r} of state_dict is a {type(value).__name__}: only tensors can "
                             "be saved")
        if id(value) not in copies:
            copies[id(value)] = on_cpu(value)
        rest[key] = copies[id(value)]
    file = {"format": FORMAT, "layers": layers, "inputs": inputs, "rest": rest}
    file["checksum"] = checksum(file)
    whole = io.BytesIO()
    torch.save(file, whole)
    read_file(whole)

    # On a disk that is full Python says so. torch's own writer would say "unexpected pos".
    target = Path(path).resolve()                                    # of a symbolic link
    if target.exists() and not target.stat().st_mode & 0o222:
        raise PermissionError(f"{path} is read-only")
    with tempfile.TemporaryDirectory(prefix=f"{target.name}.unfinished-",
                                     dir=target.parent) as beside:
        unfinished = Path(beside, "file")
        unfinished.write_bytes(whole.getbuffer())
        unfinished.replace(target)
    return target.stat().st_size


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
    owners = {id(m.weight): m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    layers = {}                                                      # by their names in state_dict
    for key, value in model.state_dict(keep_vars=True).items():
        if id(value) in owners:
            layers[key.removesuffix("weight").removesuffix(".")] = owners[id(value)]
    for name in inputs:
        theirs[name] = "a layer"
        if name in layers:
            ours[name] = "a layer"
    for key in [*theirs, *ours]:
        if theirs.get(key) != ours.get(key):
            raise ValueError(f"{path}: another architecture, or no float network: {key!r} is "
                             f"{theirs.get(key)} in the file, {ours.get(key)} in the model")
    for key, value in model.state_dict().items():
        if isinstance(value, Tensor) and (value.is_meta or value.is_inference()):
            raise ValueError(f"{key!r} of the model lies on the device meta or was made within "
                             "inference_mode: load into tensors that can be changed")
    model.load_state_dict(state)
    for name, quantizer in inputs.items():
        layer = layers[name]
        if not input_quantizers(layer):                              # it may have two names
            place_input_quantizer(layer, quantizer.requires_grad_(False).to(layer.weight.device))
    return model.eval()


def read_file(path) -> tuple[dict, dict]:
    """The state_dict of the float network that the file stands for, and its LSQs by layer.

    torch.load compares no checksum, and a flipped bit would load as another network. So we compare
    the archive's own checksums first, and then our checksum of all that the file says.
    """
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} is wrong")
    if isinstance(path, io.BytesIO):
        path.seek(0)
    file = torch.load(path, map_location="cpu", weights_only=True)
    if file["format"] != FORMAT:
        raise ValueError(f"format {file['format']!r}")
    if file.pop("checksum") != checksum(file):
        raise ValueError("its checksum is wrong")
    state = dict(file["rest"])
    for name, entry in file["layers"].items():
        key = f"{name}.weight" if name else "weight"
        state[key] = weight_of(entry)
    inputs = {}
    for name, entry in file["inputs"].items():
        own = (entry["bits"], entry["signed"], entry["log_step"], entry["zero_point"])
        check_grid(*own[:2], own[2].exp(), own[3], [()])
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
    sum, which is over integers alone. One multiplication at the end brings the scale back:

        layer(x) = x_step * s1 * sum (x_codes - x_zero) * (codes - zero_point) + bias

    Hardware adds up in int32. We take int64, because at 8 bits about 33,000 inputs can overflow
    int32 (2^31 / 255^2).

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
    k = q.codes(layer.parametrizations.weight.original) - q.zero_point
    k = k.to(torch.int64)                                            # W's shape
    k_x = x_codes.to(torch.int64) - x_zero                           # int64: 0 stands for x = 0
    if kind is nn.Linear:
        total = F.linear(k_x, k)                                     # int64, (..., C_out)
        channels = (-1,)
    else:
        total = F.conv2d(k_x, k, None, layer.stride, layer.padding, layer.dilation, layer.groups)
        channels = (-1, 1, 1)
    y = total * (x_step * q.s1.reshape(channels))                    # float from here on
    if layer.bias is not None:
        y = y + layer.bias.reshape(channels)
    return y
