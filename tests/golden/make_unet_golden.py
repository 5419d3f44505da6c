#!/usr/bin/env python3
"""Writes the golden files of the U-Net tests: PyTorch results in float64.

usage: make_unet_golden.py [OUTDIR] [--check]     (as make_golden.py)
Needs torch, torchvision, numpy, timm (through make_golden.py), dynamic-network-architectures and
segmentation-models-pytorch (pip); CPU is enough.

Weights, input and labels follow THE RULE of make_golden.py, with "input" of shape [batch, channels, spatial..] and
label_i = splitmix64(fnv("labels") + i) % classes for pixel i of [batch, spatial..]. Running statistics begin at 0 and 1.
Models are in train mode.

CASES
  unet_classic   the public PyTorch-UNet's modules and names (batch norm, transposed convolutions), base 4, depth 2
  unet_plain_2d  PlainConvUNet: instance norm (affine), LeakyReLU(0.01), convolution biases, deep supervision
  unet_plain_3d  the same on volumes, with a flat kernel and an uneven stride
  unet_resnet    segmentation-models-pytorch's Unet on a torchvision ResNet of one basic block per stage
  unetpp_resnet  the same with its UnetPlusPlus
  The configurations stand in each file's __metadata__.

LOSS
  mean over pixels of the cross entropy, plus 1 - mean over samples and foreground classes of
  (2 sum p t + 1e-5) / (sum p + sum t + 1e-5), p = softmax. Deep supervision: the weighted sum of that over the outputs,
  weights 1, 1/2, .. and 0 for the coarsest, over their sum; labels are taken at floor((i + 1/2) in / out).

WHAT EACH FILE HOLDS (dtype F64): as make_golden.py's, with 64 samples and 8 projections for each key, and
  losses         [10]   of SGD with lr 0.05, momentum 0.9
  output.N              keys of the outputs, finest first; running.<buffer name>: running statistics after one forward pass
  zero.K         [1]    in place of K's entries: max |t| where it is below 1e-10 of the largest gradient, as that of a
                        bias before a norm: nothing but rounding
  f32.spread.K   [1]    the largest error of 16 float32 runs whose input was moved by at most one unit in the last place
"""
import os
import sys

import numpy as np
import segmentation_models_pytorch as smp
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from segmentation_models_pytorch.encoders.resnet import ResNetEncoder
from torch import nn
from torchvision.models.resnet import BasicBlock

import make_golden as base

base.NSAMPLES = 64
base.NPROJ = 8
STEPS = 10
RUNS = 16
SGD = dict(lr=0.05, momentum=0.9)
ZERO = 1e-10

CASES = {
    "unet_classic": dict(kind="classic", channels=3, classes=2, base=4, depth=2, batch=2, size=(12, 16)),
    "unet_plain_2d": dict(kind="plain", channels=1, classes=3, batch=2, size=(24, 16), features=(6, 8, 12),
                          kernels=((3, 3), (3, 3), (3, 3)), strides=((1, 1), (2, 2), (2, 2)), convs=(2, 1, 2),
                          decoder_convs=(2, 1)),
    "unet_plain_3d": dict(kind="plain", channels=2, classes=3, batch=2, size=(4, 12, 8), features=(4, 6, 8),
                          kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)), strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)),
                          convs=(2, 2, 2), decoder_convs=(2, 2)),
    "unet_resnet": dict(kind="resnet", channels=3, classes=2, batch=2, size=(64, 96), widths=(16, 12, 8, 8, 4)),
    "unetpp_resnet": dict(kind="resnet", plusplus=True, channels=3, classes=2, batch=2, size=(64, 96),
                          widths=(16, 12, 8, 8, 4)),
}


class DoubleConv(nn.Module):
    def __init__(self, cin, cout):
        super().__init__()
        layers = []
        for c in (cin, cout):
            layers += [nn.Conv2d(c, cout, 3, padding=1, bias=False), nn.BatchNorm2d(cout), nn.ReLU()]
        self.double_conv = nn.Sequential(*layers)

    def forward(self, x):
        return self.double_conv(x)


class Down(nn.Module):
    def __init__(self, cin, cout):
        super().__init__()
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), DoubleConv(cin, cout))

    def forward(self, x):
        return self.maxpool_conv(x)


class Up(nn.Module):
    def __init__(self, cin, cout):
        super().__init__()
        self.up = nn.ConvTranspose2d(cin, cout, 2, stride=2)
        self.conv = DoubleConv(2 * cout, cout)

    def forward(self, x, skip):
        return self.conv(torch.cat([skip, self.up(x)], 1))


class Out(nn.Module):
    def __init__(self, cin, classes):
        super().__init__()
        self.conv = nn.Conv2d(cin, classes, 1)

    def forward(self, x):
        return self.conv(x)


class Classic(nn.Module):
    def __init__(self, channels, classes, width, depth):
        super().__init__()
        self.depth = depth
        self.inc = DoubleConv(channels, width)
        for i in range(depth):
            setattr(self, "down%d" % (i + 1), Down(width << i, width << (i + 1)))
        for i in range(depth):
            setattr(self, "up%d" % (i + 1), Up(width << (depth - i), width << (depth - i - 1)))
        self.outc = Out(width, classes)

    def forward(self, x):
        skips = [self.inc(x)]
        for i in range(self.depth):
            skips.append(getattr(self, "down%d" % (i + 1))(skips[-1]))
        x = skips.pop()
        for i in range(self.depth):
            x = getattr(self, "up%d" % (i + 1))(x, skips.pop())
        return [self.outc(x)]


def build(c):
    if c["kind"] == "classic":
        return Classic(c["channels"], c["classes"], c["base"], c["depth"])
    if c["kind"] == "resnet":
        model = (smp.UnetPlusPlus if c.get("plusplus") else smp.Unet)(
            "resnet18", encoder_weights=None, decoder_channels=c["widths"], in_channels=c["channels"],
            classes=c["classes"])
        model.encoder = ResNetEncoder(out_channels=(3, 64, 64, 128, 256, 512), block=BasicBlock, layers=[1, 1, 1, 1])
        return model
    three = len(c["size"]) == 3
    return PlainConvUNet(c["channels"], len(c["features"]), c["features"], nn.Conv3d if three else nn.Conv2d,
                         c["kernels"], c["strides"], c["convs"], c["classes"], c["decoder_convs"], True,
                         nn.InstanceNorm3d if three else nn.InstanceNorm2d, dict(eps=1e-5, affine=True), None, None,
                         nn.LeakyReLU, dict(negative_slope=0.01), deep_supervision=True)


def labels_at(y, size):
    for a, out in enumerate(size):
        n = y.shape[a + 1]
        y = y.index_select(a + 1, torch.tensor([(2 * i + 1) * n // (2 * out) for i in range(out)]))
    return y


def dice_ce(z, y):
    p = torch.softmax(z, 1)
    t = torch.nn.functional.one_hot(y, z.shape[1]).movedim(-1, 1).to(z.dtype)
    axes = tuple(range(2, z.ndim))
    dice = (2 * (p * t).sum(axes) + 1e-5) / (p.sum(axes) + t.sum(axes) + 1e-5)
    return torch.nn.functional.cross_entropy(z, y) + 1 - dice[:, 1:].mean()


def loss_of(outputs, y):
    n = len(outputs)
    weights = [2.0**-i for i in range(max(1, n - 1))]
    return sum(w / sum(weights) * dice_ce(z, labels_at(y, z.shape[2:])) for w, z in zip(weights, outputs))


def run(c, dtype, nudge=0):
    """-> ({key: array}, losses), float64."""
    model = build(c).to(dtype).train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(base.make(name, p.shape))
    x = base.make("input", (c["batch"], c["channels"]) + c["size"]).to(dtype)
    if nudge:
        x = base.nudged(x, nudge)
    shape = (c["batch"],) + c["size"]
    y = torch.from_numpy((base.splitmix64(base.fnv("labels"), int(np.prod(shape)))
                          % np.uint64(c["classes"])).astype(np.int64).reshape(shape))
    x.requires_grad_(True)
    call = lambda: [model(x)] if c["kind"] == "resnet" else model(x)
    outputs = call()
    loss_of(outputs, y).backward()
    f64 = lambda t: t.detach().numpy().astype(np.float64).copy()
    values = {"output.%d" % i: f64(z) for i, z in enumerate(outputs)}
    values["grad.input"] = f64(x.grad)
    for name, p in model.named_parameters():
        if p.grad is not None:  # the coarsest output has weight 0
            values["grad." + name] = f64(p.grad)
    for name, b in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            values["running." + name] = f64(b)
    x = x.detach()
    opt = torch.optim.SGD(model.parameters(), **SGD)
    losses = []
    for _ in range(STEPS):
        opt.zero_grad()
        loss = loss_of(call(), y)
        loss.backward()
        losses.append(loss.item())
        opt.step()
    return values, np.array(losses)


def golden(name):
    c = CASES[name]
    values, losses = run(c, torch.float64)
    narrow, losses32 = run(c, torch.float32)
    others = [run(c, torch.float32, s) for s in range(1, RUNS + 1)]
    largest = max(np.abs(t).max() for k, t in values.items() if k.startswith("grad."))
    out = {"losses": losses, "f32.err.losses": np.abs(losses32 - losses) / np.abs(losses),
           "f32.spread.losses": np.max([np.abs(l - losses) / np.abs(losses) for _, l in others], axis=0)}
    for key, t in values.items():
        if np.abs(t).max() < ZERO * largest:
            out["zero." + key] = np.array([np.abs(t).max()])
            continue
        out.update(base.compact(key, t))
        out["f32.err." + key] = base.rel(narrow[key], t)
        out["f32.spread." + key] = np.max([base.rel(v[key], t) for v, _ in others], axis=0)
    meta = {k: str(v) for k, v in c.items()}
    from importlib.metadata import version
    meta.update(case=name, dtype="float64", loss="cross entropy + (1 - foreground Dice per sample), deep supervision",
                optimizer="SGD lr=0.05 momentum=0.9", torch=torch.__version__, numpy=np.__version__,
                dynamic_network_architectures=version("dynamic-network-architectures"),
                segmentation_models_pytorch=smp.__version__, torchvision=version("torchvision"))
    return out, meta


def main(argv):
    check = "--check" in argv
    rest = [a for a in argv if not a.startswith("-")]
    if len(rest) > 1 or any(a != "--check" for a in argv if a.startswith("-")):
        sys.exit(__doc__.split("\n\nWeights, input")[0])
    outdir = rest[0] if rest else os.path.dirname(os.path.abspath(__file__))
    torch.set_num_threads(1)
    bad = 0
    for name in CASES:
        tensors, meta = golden(name)
        path = os.path.join(outdir, name + ".safetensors")
        if not check:
            base.save(path, tensors, meta)
            print("%s: %d tensors, %d bytes" % (path, len(tensors), os.path.getsize(path)))
            continue
        old, _ = base.load(path)
        worst = 0.0
        if set(old) != set(tensors):
            bad += 1
            print("%s: the keys differ" % path)
        for key in sorted(set(old) & set(tensors)):
            if key.startswith(("f32.", "zero.")):
                continue  # differs between machines
            scale = max(np.abs(old[key]).max(), np.finfo(np.float64).tiny)
            worst = max(worst, float(np.abs(old[key] - tensors[key]).max() / scale))
        bad += not worst < 1e-9
        print("%s: largest relative difference %.2e" % (path, worst))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
