#!/usr/bin/env python3
"""Writes the golden files of the ViT tests: PyTorch (timm) results in float64.

usage: make_golden.py [OUTDIR] [--check]
    OUTDIR   where the *.safetensors go (default: this script's folder)
    --check  write nothing; compare a fresh run with the files in OUTDIR
Needs torch, timm and numpy (CPU is enough).

THE RULE (the C++ side computes the same weights and inputs; nothing is loaded)

All integer arithmetic is unsigned, modulo 2^64.

  fnv(s)         FNV-1a, 64 bit, over the UTF-8 bytes of s:
                   h = 0xcbf29ce484222325; for each byte b: h ^= b; h *= 0x100000001b3
  splitmix64(x)  x += 0x9E3779B97F4A7C15; z = x;
                 z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
                 z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
                 return z ^ (z >> 31)
  u(z)           (double)(z >> 11) * 2^-53, in [0, 1)
  r(s, i)        2 * u(splitmix64(fnv(s) + i)) - 1, in [-1, 1)

  Tensor `name`, element i (row-major in the timm/PyTorch shape):
      value = offset + scale * r(name, i)          (computed in double)
  with (the first line that fits counts; names are timm's parameter names)
      "input"  (the images, [batch, 3, H, W])      offset 0, scale 1
      cls_token, pos_embed                         offset 0, scale 0.5
      *.weight with ndim >= 2                      offset 0, scale 1 / sqrt(fan_in),
                                                   fan_in = product of all dims but the first
      *.weight with ndim 1 (norms)                 offset 1, scale 0.1
      *.bias                                       offset 0, scale 0.1
  label_i = splitmix64(fnv("labels") + i) % num_classes
  float32 runs round these doubles to float32.

WHAT EACH FILE HOLDS (dtype F64)

  loss             [1]      mean cross-entropy of the batch, at the rule's weights
  losses           [10]     AdamW training from the rule's weights, always on this batch;
                            losses[k] is measured before update k, so losses[0] == loss.
                            lr 1e-3, betas (0.9, 0.999), eps 1e-8, weight decay 0.05 on
                            parameters with ndim >= 2 other than cls_token and pos_embed,
                            0 on the others
  logits           [batch, num_classes], in full
  For each key K in: logits, grad.input, grad.<parameter name>; t = that tensor, n elements,
  gradients of the mean loss at the rule's weights:
  K.norm           [1]      sqrt(sum t[i]^2)
  K.max            [1]      max |t[i]|
  K.samples        [256]    t[splitmix64(fnv(K) + j) % n] for j = 0..255 (repeats are possible)
  K.proj           [16]     sum_i t[i] * r(K + "#" + str(p), i) for p = 0..15, p in decimal
  f32.err.K        [1]      max|a - t| / max|t|, a = PyTorch's float32 result of the same model
  f32.err.loss     [1]      the same for loss (relative) and
  f32.err.losses   [10]     for each training loss
  f32.spread.losses [10]    the largest such error of 16 more float32 runs, s = 1..16, each with image element i moved
                            by splitmix64(fnv("ulp#" + str(s)) + i) % 3 - 1 units in the last place
  __metadata__              versions and the case's configuration, all as strings
"""
import json
import os
import sys

import numpy as np
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

NSAMPLES = 256
NPROJ = 16
STEPS = 10
SPREAD_RUNS = 16
ADAMW = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
WEIGHT_DECAY = 0.05
NO_DECAY = ("cls_token", "pos_embed")
MASK = (1 << 64) - 1

CASES = {
    "vit_ti": dict(img_size=32, patch_size=8, embed_dim=192, depth=12, num_heads=3,
                   mlp_ratio=4.0, num_classes=10, batch=2),
    "vit_b16_blocks": dict(img_size=32, patch_size=16, embed_dim=768, depth=2, num_heads=12,
                           mlp_ratio=4.0, num_classes=10, batch=2),
}


def fnv(s):
    h = 0xCBF29CE484222325
    for b in s.encode("utf-8"):
        h = ((h ^ b) * 0x100000001B3) & MASK
    return h


def splitmix64(seed, n):
    """splitmix64(seed + i) for i in 0..n-1, as uint64 (NumPy arrays wrap silently)."""
    z = np.arange(n, dtype=np.uint64)
    z += np.uint64((seed + 0x9E3779B97F4A7C15) & MASK)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def r(s, n):
    return 2.0 * ((splitmix64(fnv(s), n) >> np.uint64(11)).astype(np.float64) * 2.0**-53) - 1.0


def make(name, shape):
    shape = tuple(shape)
    if name == "input":
        offset, scale = 0.0, 1.0
    elif name in NO_DECAY:
        offset, scale = 0.0, 0.5
    elif name.endswith(".weight") and len(shape) >= 2:
        offset, scale = 0.0, 1.0 / np.sqrt(np.float64(np.prod(shape[1:])))
    elif name.endswith(".weight"):
        offset, scale = 1.0, 0.1
    elif name.endswith(".bias"):
        offset, scale = 0.0, 0.1
    else:
        raise ValueError("no rule for " + name)
    return torch.from_numpy((offset + scale * r(name, int(np.prod(shape)))).reshape(shape))


def nudged(x, s):
    """float32 x, each element moved by -1, 0 or 1 units in the last place."""
    a = x.numpy()
    way = (splitmix64(fnv("ulp#%d" % s), a.size) % np.uint64(3)).astype(np.int64).reshape(a.shape) - 1
    return torch.from_numpy(np.where(way == 0, a, np.nextafter(a, np.where(way > 0, np.float32(2), np.float32(-2)))))


def run(cfg, dtype, nudge=0):
    """One case in one dtype -> (logits, loss, {key: gradient}, losses), as float64 arrays."""
    args = {k: v for k, v in cfg.items() if k != "batch"}
    model = VisionTransformer(qkv_bias=True, class_token=True, global_pool="token", **args)
    assert model.norm.eps == model.blocks[0].norm1.eps == 1e-6
    assert type(model.blocks[0].mlp.act).__name__ == "GELU"
    assert getattr(model.blocks[0].mlp.act, "approximate", "none") == "none"
    model = model.to(dtype).eval()  # no dropout anywhere, so eval() changes nothing
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(make(name, p.shape))
    x = make("input", (cfg["batch"], 3, cfg["img_size"], cfg["img_size"])).to(dtype)
    if nudge:
        x = nudged(x, nudge)
    y = torch.from_numpy((splitmix64(fnv("labels"), cfg["batch"])
                          % np.uint64(cfg["num_classes"])).astype(np.int64))

    x.requires_grad_(True)
    logits = model(x)
    loss = torch.nn.functional.cross_entropy(logits, y)
    loss.backward()
    f64 = lambda t: t.detach().numpy().astype(np.float64)
    grads = {"grad.input": f64(x.grad).copy()}
    for name, p in model.named_parameters():
        grads["grad." + name] = f64(p.grad).copy()

    x = x.detach()
    decay, rest = [], []
    for name, p in model.named_parameters():
        (decay if p.ndim >= 2 and name not in NO_DECAY else rest).append(p)
    opt = torch.optim.AdamW([dict(params=decay, weight_decay=WEIGHT_DECAY),
                             dict(params=rest, weight_decay=0.0)], **ADAMW)
    losses = []
    for _ in range(STEPS):
        opt.zero_grad()
        step_loss = torch.nn.functional.cross_entropy(model(x), y)
        step_loss.backward()
        losses.append(step_loss.item())
        opt.step()
    return (f64(logits).copy(), np.array([loss.item()]), grads, np.array(losses)), y.tolist()


def rel(a, b):
    return np.array([np.abs(a - b).max() / np.abs(b).max()])


def compact(key, t):
    t = np.ascontiguousarray(t).reshape(-1)
    at = splitmix64(fnv(key), NSAMPLES) % np.uint64(t.size)
    return {
        key + ".norm": np.array([np.sqrt(np.sum(t * t))]),
        key + ".max": np.array([np.abs(t).max()]),
        key + ".samples": t[at.astype(np.int64)],
        key + ".proj": np.array([np.sum(t * r("%s#%d" % (key, p), t.size))
                                 for p in range(NPROJ)]),
    }


def golden(name):
    cfg = CASES[name]
    (logits, loss, grads, losses), labels = run(cfg, torch.float64)
    (logits32, loss32, grads32, losses32), _ = run(cfg, torch.float32)
    assert loss[0] == losses[0]
    nudged_losses = [run(cfg, torch.float32, s)[0][3] for s in range(1, SPREAD_RUNS + 1)]
    out = {"logits": logits, "loss": loss, "losses": losses,
           "f32.err.loss": rel(loss32, loss),
           "f32.err.losses": np.abs(losses32 - losses) / np.abs(losses),
           "f32.spread.losses": np.max([np.abs(l - losses) / np.abs(losses) for l in nudged_losses], axis=0),
           "f32.err.logits": rel(logits32, logits)}
    out.update(compact("logits", logits))
    for key, t in grads.items():
        out.update(compact(key, t))
        out["f32.err." + key] = rel(grads32[key], t)
    meta = {k: str(v) for k, v in cfg.items()}
    meta.update(case=name, model="timm VisionTransformer", dtype="float64", labels=str(labels),
                norm_eps="1e-6", act="gelu (erf)", qkv_bias="true",
                optimizer="AdamW lr=1e-3 betas=(0.9,0.999) eps=1e-8 weight_decay=0.05 "
                          "(ndim>=2, not cls_token/pos_embed)",
                torch=torch.__version__, timm=timm.__version__, numpy=np.__version__)
    return out, meta


def save(path, tensors, meta):
    """safetensors, with a sorted header so that the same results give the same bytes."""
    header, blobs, at = {"__metadata__": dict(sorted(meta.items()))}, [], 0
    for key in sorted(tensors):
        t = np.ascontiguousarray(tensors[key], dtype="<f8")
        header[key] = dict(dtype="F64", shape=list(t.shape), data_offsets=[at, at + t.nbytes])
        blobs.append(t.tobytes())
        at += t.nbytes
    head = json.dumps(header, separators=(",", ":")).encode("utf-8")
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as f:
        f.write(len(head).to_bytes(8, "little") + head + b"".join(blobs))


def load(path):
    raw = open(path, "rb").read()
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:8 + n])
    meta = header.pop("__metadata__")
    data = raw[8 + n:]
    return {k: np.frombuffer(data[slice(*v["data_offsets"])], "<f8").reshape(v["shape"])
            for k, v in header.items()}, meta


def main(argv):
    check = "--check" in argv
    rest = [a for a in argv if not a.startswith("-")]
    if len(rest) > 1 or any(a != "--check" for a in argv if a.startswith("-")):
        sys.exit(__doc__.split("\n\nTHE RULE")[0])
    outdir = rest[0] if rest else os.path.dirname(os.path.abspath(__file__))
    torch.set_num_threads(1)  # the float32 errors depend on the order of the sums
    bad = 0
    for name in CASES:
        tensors, meta = golden(name)
        path = os.path.join(outdir, name + ".safetensors")
        if not check:
            save(path, tensors, meta)
            print("%s: %d tensors, %d bytes" % (path, len(tensors), os.path.getsize(path)))
            continue
        old, _ = load(path)
        worst = 0.0
        if set(old) != set(tensors):
            bad += 1
            print("%s: the keys differ" % path)
        for key in sorted(set(old) & set(tensors)):
            if key.startswith("f32."):
                continue  # differs between machines
            scale = max(np.abs(old[key]).max(), np.finfo(np.float64).tiny)
            worst = max(worst, float(np.abs(old[key] - tensors[key]).max() / scale))
        bad += not worst < 1e-9
        print("%s: largest relative difference %.2e" % (path, worst))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
