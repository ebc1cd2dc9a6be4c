"""Recognisers that others have published: AdaFace's, CVLface's and TFace's checkpoints.

model.py asks for them when a recogniser is named by a file and not by a run folder.
"""
import re
import zipfile
from pathlib import Path

import safetensors.torch
import torch

from model import Prototypes, fail, reading


def read_checkpoint(path):
    """The tensors {name: tensor} of a .safetensors, .pth, .pt or .ckpt, in fp32; code in it is not run."""
    if Path(path).suffix == ".onnx":
        raise ValueError("an ONNX network cannot be read; name a checkpoint of PyTorch")
    if Path(path).suffix == ".safetensors":
        state = safetensors.torch.load_file(path)
    else:
        # A checkpoint may name classes of the trainer that wrote it. Empty classes stand in for them.
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipfile.is_zipfile(path) else []
        empty = {"__init__": lambda self, *_: None, "__setstate__": lambda self, _: None}
        stand_ins = [type(name, (), empty | {"__module__": module})
                     for module, _, name in (name.rpartition(".") for name in names)]
        with torch.serialization.safe_globals(stand_ins):
            state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
    return {name: tensor.float() if tensor.is_floating_point() else tensor
            for name, tensor in state.items() if torch.is_tensor(tensor)}


def read_published(path, prefix="net"):
    """Published weights {prefix.name: tensor}, without the names of wrappers, and without margin heads."""
    with reading(path, "published weights"):
        return {re.sub(r"^((module|model|net|backbone)\.)*", f"{prefix}.", name): tensor
                for name, tensor in read_checkpoint(path).items() if "head." not in name}


def load_published(path, bgr=None):
    """Tensors and metadata of a published recogniser. Names and shapes in its file tell its architecture.

    bgr: its colour order; by default BGR for AdaFace's checkpoints, RGB for all others.
    """
    tensors = read_published(path, "backbone")
    widths = [len(tensor) for name, tensor in tensors.items() if "res_layer.4.weight" in name]    # of units
    if not widths or "backbone.input_layer.0.weight" not in tensors:
        fail(f"{path}: expected the layout of AdaFace, CVLface or TFace (input_layer, body, output_layer), "
             f"found {', '.join([*tensors][:3])} (conv1 and layer1 are InsightFace's); name another file")
    if bgr is None:
        with reading(path, "published weights"):
            bgr = any(name.startswith("model.input_layer") for name in read_checkpoint(path))
    print(f"{path}: {len(widths)} residual units, reads {'BGR' if bgr else 'RGB'} images")
    units = [widths.count(width) for width in sorted({*widths})]
    config = dict(size=112, dim=512, width=widths[0], units=units, bgr=bgr,
                  se="backbone.body.0.res_layer.se_block.fc1.weight" in tensors)
    nobody = Prototypes(0, 0, 512)                      # such files tell nothing of whom the network has seen
    tensors |= {f"prototypes.{name}": tensor for name, tensor in nobody.state_dict().items()}
    return tensors, dict(config=config, prototypes=nobody.config, names=[], data=[], val=[])
