#!/usr/bin/env python3
"""Writes the golden files of the convolutional models: PyTorch (torchvision, timm) results in float64, in training mode.

usage: make_conv_golden.py [OUTDIR] [--check]
Needs torch, torchvision, timm and numpy (CPU is enough).

Weights, inputs, labels and keys are by make_golden.py's rule, with 16 samples and 4 projections a key; running statistics
start at 0 and 1. What differs:

  losses           [10]  SGD (lr 0.05, of MobileNetV2 2e-4: with 2e-3 a change
                         of the images by 1e-15 moves PyTorch's tenth loss by 8e-7; momentum 0.9, weight decay 1e-4 on parameters with
                         ndim >= 2 but pos_embed), training mode, always on this batch
  stat.<running_var>.*   keys as for gradients: after the first forward
  mean.<norm>      [C]   its running mean after the first forward, in full, and
  mean.<norm>.scale [1]  0.1 (the momentum) times the largest standard deviation of what was averaged: the size that errors of
                         the mean are judged by (f32.err.mean.<norm>). Means of zero-mean weights' outputs are near 0 by
                         cancellation; measured by themselves their rounding looks large.
  eval.*                 the logits in eval mode, after the ten steps
  zero.K           [1]   in place of K's entries: max |t| of a gradient below 1e-10 of the largest, which is nothing but rounding
                         (a bias in front of a batch norm or of a softmax)
  f32.err.K              the largest error of 17 float32 runs: as it is, and with each element of the images and parameters moved by
                         at most one unit in the last place (make_golden.py's nudges 1 to 16). One run alone says little: of a
                         tensor with 16 elements its error is luck, and where an activation lies within rounding of ReLU's edge a
                         gradient element is there or not.
  f32.spread.losses      the same for the training losses
"""
import functools
import sys

import numpy as np
import timm
import torch
import torchvision
from timm.models.vision_transformer import Block as VitBlock
from timm.models.resnet import Bottleneck as TimmBottleneck, ResNet as TimmResNet
from torchvision.models.mobilenetv2 import MobileNetV2
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import make_golden as rule

rule.NSAMPLES = 16
rule.NPROJ = 4
NUDGES = 16


def small_resnet(block, width, layers, **more):
    """torchvision's, of two stages and another width (its constructor knows only 64)."""
    m = ResNet(block, [1, 1, 1, 1], num_classes=5, **more)
    m.inplanes = width
    m.conv1 = torch.nn.Conv2d(3, width, 7, 2, 3, bias=False)
    m.bn1 = torch.nn.BatchNorm2d(width)
    m.layer1 = m._make_layer(block, width, layers[0])
    m.layer2 = m._make_layer(block, 2 * width, layers[1], stride=2)
    m.layer3 = m.layer4 = torch.nn.Identity()
    m.fc = torch.nn.Linear(2 * width * block.expansion, 5)
    return m


def small_timm(width, layers):
    m = TimmResNet(TimmBottleneck, layers=(1, 1, 1, 1), stem_width=width // 2, stem_type="deep", avg_down=True, num_classes=5,
                   channels=(width, 2 * width, 2 * width, 2 * width), block_args=dict(attn_layer="se"))
    whole = TimmResNet(TimmBottleneck, layers=layers + (1, 1), stem_width=width // 2, stem_type="deep", avg_down=True,
                       num_classes=5, channels=(width, 2 * width, 2 * width, 2 * width), block_args=dict(attn_layer="se"))
    m.layer1, m.layer2 = whole.layer1, whole.layer2
    m.layer3 = m.layer4 = torch.nn.Identity()
    return m


class CifarBlock(torch.nn.Module):
    """Two 3x3 convolutions; where the shape changes, every second pixel between zero channels (option A)."""

    def __init__(self, before, after, stride):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(after)
        self.conv2 = torch.nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(after)
        self.more = (after - before) // 2
        self.stride = stride

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        side = x[:, :, ::self.stride, ::self.stride]
        return torch.relu(y + torch.nn.functional.pad(side, (0, 0, 0, 0, self.more, self.more)))


class CifarResnet(torch.nn.Module):
    def __init__(self, width, blocks):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(width)
        before = width
        for i, n in enumerate(blocks):
            after = width << i
            stage = [CifarBlock(before if k == 0 else after, after, 2 if i and not k else 1) for k in range(n)]
            setattr(self, "layer%d" % (i + 1), torch.nn.Sequential(*stage))
            before = after
        self.stages = len(blocks)
        self.linear = torch.nn.Linear(before, 5)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        for i in range(self.stages):
            x = getattr(self, "layer%d" % (i + 1))(x)
        return self.linear(x.mean((2, 3)))


class Cct(torch.nn.Module):
    """Convolutions with ReLU and max pooling as tokeniser, timm's ViT blocks, a learned weighted mean of the tokens."""

    def __init__(self, dim, depth, heads, convs, tokens):
        super().__init__()
        layers = []
        for i in range(convs):
            conv = torch.nn.Conv2d(64 if i else 3, dim if i + 1 == convs else 64, 3, 1, 1, bias=False)
            layers.append(torch.nn.Sequential(conv, torch.nn.ReLU(), torch.nn.MaxPool2d(3, 2, 1)))
        self.tokenizer = torch.nn.Module()
        self.tokenizer.conv_layers = torch.nn.Sequential(*layers)
        self.pos_embed = torch.nn.Parameter(torch.zeros(1, tokens, dim))
        norm = functools.partial(torch.nn.LayerNorm, eps=1e-6)
        self.blocks = torch.nn.Sequential(*[VitBlock(dim, heads, 1.0, qkv_bias=True, norm_layer=norm) for _ in range(depth)])
        self.norm = norm(dim)
        self.attention_pool = torch.nn.Linear(dim, 1)
        self.head = torch.nn.Linear(dim, 5)

    def forward(self, x):
        x = self.tokenizer.conv_layers(x).flatten(2).transpose(1, 2) + self.pos_embed
        x = self.norm(self.blocks(x))
        weights = torch.softmax(self.attention_pool(x), 1).transpose(1, 2)
        return self.head((weights @ x).squeeze(1))


CASES = {  # name: (model, images [batch, 3, side, side])
    "resnet_basic": (lambda: small_resnet(BasicBlock, 8, (1, 2)), (4, 32)),
    "resnext_bottleneck": (lambda: small_resnet(Bottleneck, 8, (1, 2), groups=4, width_per_group=16), (4, 32)),
    "seresnet_d": (lambda: small_timm(8, (1, 2)), (4, 33)),
    "resnet_cifar": (lambda: CifarResnet(8, (1, 2, 1)), (4, 16)),
    "mobilenet_v2": (lambda: MobileNetV2(num_classes=5, width_mult=0.25, dropout=0.0), (4, 64)),
    "cct": (lambda: Cct(32, 2, 2, 2, 25), (4, 17)),
}


def run(name, dtype, nudge=0):
    make, (batch, side) = CASES[name]
    model = make().to(dtype).train()
    with torch.no_grad():
        for key, p in model.named_parameters():
            t = rule.make(key, p.shape).to(dtype)
            p.copy_(rule.nudged(t, nudge) if nudge else t)
    x = rule.make("input", (batch, 3, side, side)).to(dtype)
    if nudge:
        x = rule.nudged(x, nudge)
    y = torch.from_numpy((rule.splitmix64(rule.fnv("labels"), batch) % np.uint64(5)).astype(np.int64))
    f64 = lambda t: t.detach().numpy().astype(np.float64).copy()
    entropy = torch.nn.functional.cross_entropy

    x.requires_grad_(True)
    logits = model(x)
    loss = entropy(logits, y)
    loss.backward()
    out = {"logits": f64(logits), "grad.input": f64(x.grad)}
    for key, p in model.named_parameters():
        out["grad." + key] = f64(p.grad)
    for key, b in model.named_buffers():
        if b.is_floating_point():
            out[("mean." + key[:-len(".running_mean")]) if key.endswith("mean") else "stat." + key] = f64(b)
            b.fill_(1.0 if key.endswith("running_var") else 0.0)

    x = x.detach()
    decay = [p for key, p in model.named_parameters() if p.ndim >= 2 and key != "pos_embed"]
    rest = [p for key, p in model.named_parameters() if p.ndim < 2 or key == "pos_embed"]
    opt = torch.optim.SGD([dict(params=decay, weight_decay=1e-4), dict(params=rest, weight_decay=0.0)],
                          lr=2e-4 if name == "mobilenet_v2" else 0.05, momentum=0.9)
    losses = []
    for _ in range(rule.STEPS):
        opt.zero_grad()
        step_loss = entropy(model(x), y)
        step_loss.backward()
        losses.append(step_loss.item())
        opt.step()
    with torch.no_grad():
        out["eval"] = f64(model.eval()(x))
    return out, np.array([loss.item()]), np.array(losses)


def golden(name):
    values, loss, losses = run(name, torch.float64)
    assert loss[0] == losses[0]
    narrow = [run(name, torch.float32, s) for s in range(NUDGES + 1)]
    out = {"loss": loss, "losses": losses, "logits": values["logits"]}
    out["f32.spread.losses"] = np.max([np.abs(n[2] - losses) / np.abs(losses) for n in narrow], axis=0)
    largest = max(np.abs(t).max() for key, t in values.items() if key.startswith("grad."))
    for key, t in values.items():
        if key.startswith("mean."):
            var = (values["stat." + key[5:] + ".running_var"] - 0.9) / 0.1
            scale = 0.1 * np.sqrt(var.max())
            out.update({key: t, key + ".scale": np.array([scale])})
            out["f32.err." + key] = np.array([np.max([np.abs(n[0][key] - t).max() / scale for n in narrow])])
            continue
        if np.abs(t).max() < 1e-10 * largest:
            out["zero." + key] = np.array([np.abs(t).max()])
            continue
        out.update(rule.compact(key, t))
        out["f32.err." + key] = np.max([rule.rel(n[0][key], t) for n in narrow], axis=0)
    meta = dict(case=name, optimizer="SGD momentum=0.9 weight_decay=1e-4 (ndim>=2)", images=str(CASES[name][1]),
                torch=torch.__version__, torchvision=torchvision.__version__, timm=timm.__version__, numpy=np.__version__)
    return out, meta


if __name__ == "__main__":
    rule.CASES, rule.golden = CASES, golden
    sys.exit(rule.main(sys.argv[1:]))
