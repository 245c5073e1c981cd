"""How the small networks were trained. `python -m experiments.train FOLDER` trains the three of the
main job anew, into files FOLDER/resnet.pt, mobilenet.pt and gpt.pt, in 20 s on 2 cores. Then
`python reconstruct.py --networks FOLDER` takes them. Another processor or number of threads trains
other networks, so the ones in experiments/networks are committed.

`python -m experiments.train paragraphs FILE ...` chose the GPT's text. Each FILE is the
pydoc_data/topics.py of another Python, and the text is what they have in common. We gave it those
of 3.10.13, 3.11.2, 3.11.7, 3.12.1, 3.13.0, and 3.14.2 to 3.14.7. Corrections reach the patch
releases of older versions, too, so the newest Python tells what these will lack.
"""
import runpy
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

import models
from experiments import pretrained


def train(net: nn.Module, batch: Callable, steps: int, lr: float) -> nn.Module:
    """AdamW, a one-cycle rate, cross-entropy, in place. batch() returns inputs and targets."""
    optimizer = torch.optim.AdamW(net.train().parameters(), lr=lr, weight_decay=0.1,
                                  betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in tqdm(range(steps), desc=f"training the {type(net).__name__}", mininterval=5):
        x, y = batch()
        loss = F.cross_entropy(net(x).flatten(0, -2), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return net.eval()


def image_batches(x: Tensor, y: Tensor, batch_size: int = 64, shift: int = 0, seed: int = 0):
    """Batches for train, drawn by the seed. With shift, mirrored and moved by up to so many pixels,
    a batch at a time."""
    generator = torch.Generator().manual_seed(seed)

    def batch():
        index = torch.randint(len(x), (batch_size,), generator=generator)
        images = x[index]
        if shift:
            mirror, i, j = torch.randint(2 * shift + 1, (3,), generator=generator).tolist()
            images = F.pad(images.flip(3) if mirror % 2 else images, [shift] * 4)
            images = images[:, :, i:i + x.shape[2], j:j + x.shape[3]]
        return images, y[index]

    return batch


def text_batches(tokens: Tensor, context: int, batch_size: int = 32, seed: int = 0):
    """Batches for train: windows of tokens (length,) that start anywhere, drawn by the seed."""
    generator, window = torch.Generator().manual_seed(seed), torch.arange(context + 1)

    def batch():
        start = torch.randint(len(tokens) - context, (batch_size, 1), generator=generator)
        drawn = tokens[start + window]                               # (B, context + 1)
        return drawn[:, :-1], drawn[:, 1:]

    return batch


def kept(path, make: Callable, fit: Callable) -> nn.Module:
    """make() with the weights in path. Where there is no such file, fit(net) trains the network
    first, and we write it, with what fit returns (a dict, or None). ValueError: the file of another
    network."""
    path = Path(path)
    with torch.random.fork_rng(devices=[]):                          # the caller's stream stays
        torch.manual_seed(0)
        net = make()
    if path.exists():
        try:
            net.load_state_dict(torch.load(path, weights_only=True)["state"])
        except Exception as error:                                   # torch raises many kinds
            raise ValueError(f"{path} does not hold this network: delete it, and it is trained "
                             "again") from error
    else:
        more = fit(net) or {}
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"state": net.state_dict(), **more}, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)                   # never half a file
    return net.eval()


def text_network(path, string: str, layers: int, width: int, context: int, steps: int,
                 make: Callable = models.GPT, heads: int = 4):
    """A character GPT, trained on the first 90 % of a text, and the tokens of the whole text. make:
    another kind of network, with models.GPT's arguments."""
    vocabulary = "".join(sorted(set(string)))
    tokens = models.characters(string, vocabulary)

    def fit(net):
        train(net, text_batches(tokens[:int(0.9 * len(tokens))], context), steps, 3e-3)
        return {"vocabulary": vocabulary}

    net = kept(path, lambda: make(len(vocabulary), context, layers, heads, width), fit)
    return net, tokens


class LlamaBlock(nn.Module):
    """A layer of transformers' LLaMA that takes and returns one tensor, (B, T, D)."""

    def __init__(self, layer: nn.Module, rotary: nn.Module):
        super().__init__()
        self.layer, self.rotary = layer, rotary

    def forward(self, x):
        position = torch.arange(x.shape[1], device=x.device)[None]
        return self.layer(x, position_embeddings=self.rotary(x, position))


def llama(vocabulary: int, context: int, layers: int, heads: int, width: int) -> models.Blocks:
    """transformers' LLaMA (RMS norm, rotary positions, gated MLP, no biases) as a list of blocks,
    with the start of its weights. heads share keys and values in pairs. ImportError: no
    transformers."""
    transformers = pretrained.need("transformers")
    net = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=8 * width // 3,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads // 2,
        max_position_embeddings=context, tie_word_embeddings=False))
    blocks = models.Blocks(
        net.model.embed_tokens, *(LlamaBlock(layer, net.model.rotary_emb)
                                  for layer in net.model.layers),
        nn.Sequential(OrderedDict(norm=net.model.norm, lm_head=net.lm_head)))
    blocks.context = context
    return blocks


def common_paragraphs(files: list) -> list[str]:
    """The hashes of the paragraphs that stand in each of the files pydoc_data/topics.py, in the
    order of the first file."""
    found = [models.paragraphs(runpy.run_path(file)["topics"]) for file in files]
    return [key for key in found[0] if all(key in other for other in found)]


def main(folder) -> None:
    """Train what is not there yet, and say how large the files are."""
    x, y, *_ = models.digits()
    folder = Path(folder)

    def fit(net):
        train(net, image_batches(x, y), 400, 5e-3)

    kept(folder / "resnet.pt", lambda: models.ResNet((8, 16, 32), 1, "conv", channels=1), fit)
    kept(folder / "mobilenet.pt", lambda: models.MobileNet((8, 16, 24), channels=1), fit)
    text_network(folder / "gpt.pt", models.text(), 3, 64, 64, 1000)
    for path in sorted(folder.glob("*.pt")):
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    if sys.argv[1:2] == ["paragraphs"] and len(sys.argv) > 2:
        models.PARAGRAPHS.write_text("\n".join(common_paragraphs(sys.argv[2:])) + "\n")
    elif len(sys.argv) == 2:
        main(sys.argv[1])
    else:
        sys.exit("python -m experiments.train FOLDER, or paragraphs TOPICS.PY ...")
