#!/usr/bin/env python3
"""What Capo is held against: the rows of bench/gpu/models.h and its memory-bound passes, in PyTorch
with timm.

  peer.py --row vit_b16 --variant masters:compile [--serve]     one training step, measured as bench_gpu_step does
  peer.py --row ops                                             copy, product, layer norm backward, AdamW, host cost
  --device cpu --tiny runs everything at sizes for a CPU; its figures mean nothing.

A variant is WEIGHTS:MODE.
  masters    bf16 weights, f32 masters in the optimiser: Capo's own arithmetic
  autocast   f32 weights, torch.autocast(bf16)
  f32        f32 weights, no autocast: what bench/cpu/run compares with
  pure       bf16 weights and moments, no masters: less arithmetic than Capo's, reported but not compared with
  eager | compile | step-graph (compile, and the whole step with its optimiser as one CUDA graph) | reduce-overhead |
  max-autotune (with step-graph's capture) | freeze (compile with the weights as constants, which folds batch norms into convolutions and
  fuses activations and residual sums after them, as Capo's side does; --infer alone)

On the CPU the result also tells what one step adds to the resident size, and which share of it torch.profiler finds in products and
convolutions. All of them: SDPA, channels-last input, fused AdamW, gradients set to None. The last line is RESULT {json}.
"""
import argparse
import ctypes
import gc
import json
import math
import statistics
import sys
import time

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

ROWS = {  # size, image, patch, classes, batch, tuned, checkpointed
    "vit_b16": ("base", 224, 16, 1000, 256, False, False),
    "vit_s16": ("small", 224, 16, 1000, 256, False, False),
    "vit_ti4": ("tiny", 32, 4, 200, 128, False, False),
    "u_tuning_b16": ("base", 224, 16, 100, 256, True, False),
    "u_tuning_b16_checkpointed": ("base", 224, 16, 100, 256, True, True),
}
CONVOLUTIONAL = {  # image, classes, batch
    "resnet18_32": (32, 100, 1024),
    "resnet50": (224, 1000, 256),
    "mobilenet_v2": (224, 1000, 256),
    "unet2d": (256, 2, 32),
    "unet3d": (64, 3, 8),
}
PREFIX, ADAPTER = 10, 40  # kUTuning in models.h


def sync(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PrefixAttention(nn.Module):
    """timm's attention with learned keys and values in front of its own: Capo's u_prefix, without the split."""

    def __init__(self, attn):
        super().__init__()
        self.qkv, self.proj, self.heads = attn.qkv, attn.proj, attn.num_heads
        dim = attn.qkv.in_features
        self.k, self.v = (nn.Parameter(nn.init.xavier_uniform_(torch.empty(PREFIX, dim))) for _ in range(2))

    def forward(self, x, **_):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)

        def with_learned(learned, own):
            learned = learned.reshape(1, PREFIX, self.heads, c // self.heads).transpose(1, 2)
            return torch.cat([learned.to(own.dtype).expand(b, -1, -1, -1), own], 2)

        o = F.scaled_dot_product_attention(q, with_learned(self.k, k), with_learned(self.v, v))
        return self.proj(o.transpose(1, 2).reshape(b, n, c))


class TunedBlock(nn.Module):
    """A ViT block with a prefix beside its attention and an adapter, fed by the stream, beside its FFN."""

    def __init__(self, block):
        super().__init__()
        self.norm1, self.norm2, self.mlp = block.norm1, block.norm2, block.mlp
        self.attn = PrefixAttention(block.attn)
        dim = block.norm1.normalized_shape[0]
        self.down, self.up = nn.Linear(dim, ADAPTER), nn.Linear(ADAPTER, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x, **_):
        h = x + self.attn(self.norm1(x))
        return h + self.mlp(self.norm2(h)) + self.up(F.gelu(self.down(h)))


class Checkpointed(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, **_):
        return checkpoint(self.block, x, use_reentrant=False)


class Stack(nn.Sequential):
    """nnU-Net's [convolution, instance norm, leaky ReLU], twice, the first convolution strided."""

    def __init__(self, axes, cin, cout, stride):
        conv, norm = (nn.Conv2d, nn.InstanceNorm2d) if axes == 2 else (nn.Conv3d, nn.InstanceNorm3d)
        super().__init__(*(m for i in range(2) for m in (
            conv(cout if i else cin, cout, 3, 1 if i else stride, 1), norm(cout, affine=True), nn.LeakyReLU(0.01, inplace=True))))


class PlainUnet(nn.Module):
    """nnU-Net's topology for cubic patches, as plain_config of models/unet/plain.h makes it."""

    def __init__(self, axes, image, classes, base):
        super().__init__()
        up, out = (nn.ConvTranspose2d, nn.Conv2d) if axes == 2 else (nn.ConvTranspose3d, nn.Conv3d)
        widths, side = [base], image
        while side % 2 == 0 and side >= 8:
            widths.append(min(2 * widths[-1], 512 if axes == 2 else 320))
            side //= 2
        self.down = nn.ModuleList(Stack(axes, 1 if i == 0 else widths[i - 1], w, 1 if i == 0 else 2) for i, w in enumerate(widths))
        pairs = list(zip(widths[:0:-1], widths[-2::-1]))
        self.raise_ = nn.ModuleList(up(a, b, 2, 2) for a, b in pairs)
        self.join = nn.ModuleList(Stack(axes, 2 * b, b, 1) for _, b in pairs)
        self.out = out(base, classes, 1)

    def forward(self, x):
        maps = []
        for stage in self.down:
            x = stage(x)
            maps.append(x)
        for up, join, skip in zip(self.raise_, self.join, maps[-2::-1]):
            x = join(torch.cat([up(x), skip], 1))
        return self.out(x)


def build_convolutional(row, tiny):
    """The model, the shape of one image, classes, batch."""
    image, classes, batch = CONVOLUTIONAL[row]
    small = row == "resnet18_32"
    if tiny:
        image, batch = 32, 4
    if row.startswith("unet"):
        axes = 3 if row == "unet3d" else 2
        return PlainUnet(axes, image, classes, 4 if tiny else 32), [1] + [image] * axes, classes, batch
    model = timm.create_model("mobilenetv2_100" if row == "mobilenet_v2" else row.split("_")[0], num_classes=classes)
    if small:
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return model, [3, image, image], classes, batch


def build(row, tiny):
    if row in CONVOLUTIONAL:
        return build_convolutional(row, tiny)
    size, image, patch, classes, batch, tuned, checkpointed = ROWS[row]
    kwargs = dict(num_classes=classes, img_size=image)
    if tiny:
        size, patch, batch = "tiny", 16, 4
        kwargs.update(img_size=32, depth=2)
    model = timm.create_model(f"vit_{size}_patch16_224", patch_size=patch, **kwargs)
    if tuned:
        model.requires_grad_(False)
        for i, block in enumerate(model.blocks):
            model.blocks[i] = TunedBlock(block)  # its own parameters are new, hence trained
        model.head.requires_grad_(True)
    if checkpointed:
        for i, block in enumerate(model.blocks):
            model.blocks[i] = Checkpointed(block)
    return model, [3, kwargs["img_size"], kwargs["img_size"]], classes, batch


class Step:
    """Forward, loss, backward, AdamW; weights as `weights` says, run as `mode` says."""

    def __init__(self, row, variant, device, tiny, batch=0, infer=False):
        self.device = device
        weights, self.mode = variant.split(":")
        torch.manual_seed(0)
        model, image, self.classes, self.batch = build(row, tiny)
        self.batch = batch or self.batch
        self.infer = infer
        half = weights in ("masters", "pure")
        layout = torch.channels_last_3d if len(image) == 4 else torch.channels_last
        model = model.to(device=device, dtype=torch.bfloat16 if half else torch.float32).train(not infer)
        if row in CONVOLUTIONAL:
            model = model.to(memory_format=layout)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.trainable = sum(p.numel() for p in self.trained)
        self.masters = [p.detach().float().clone() for p in self.trained] if weights == "masters" else None
        graph = self.mode in ("step-graph", "max-autotune") and device.type == "cuda"
        targets = self.masters or self.trained
        groups = [{"params": [t for t in targets if t.ndim >= 2]},
                  {"params": [t for t in targets if t.ndim < 2], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=1e-4, weight_decay=0.05, fused=True, capturable=graph)
        self.x = torch.randn(self.batch, *image, device=device).to(memory_format=layout)
        if weights != "f32":
            self.x = self.x.bfloat16()
        labels = [self.batch, *image[1:]] if row.startswith("unet") else [self.batch]
        self.y = (torch.arange(math.prod(labels), device=device) * 37 % self.classes).reshape(labels)

        def loss(x, y):
            with torch.autocast(device.type, torch.bfloat16, enabled=weights == "autocast"):
                logits = model(x)
            return F.cross_entropy(logits.float(), y)

        compiled = {"compile": {}, "step-graph": {}, "reduce-overhead": {"mode": "reduce-overhead"},
                    "max-autotune": {"mode": "max-autotune-no-cudagraphs"}, "freeze": {"options": {"freezing": True}}}
        self.loss = loss if self.mode == "eager" else torch.compile(loss, **compiled[self.mode])
        self.newest = None
        self.replay = None
        if graph:
            self.capture()

    def once(self):
        if self.infer:
            with torch.no_grad():
                self.newest = self.loss(self.x, self.y)
            return
        if self.mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        loss = self.loss(self.x, self.y)
        loss.backward()
        if self.masters:
            grads = [p.grad for p in self.trained]
            for master, grad in zip(self.masters, grads):
                if master.grad is None:
                    master.grad = torch.empty_like(master)
            torch._foreach_copy_([m.grad for m in self.masters], grads)
        self.optimizer.step()
        if self.masters:
            with torch.no_grad():
                torch._foreach_copy_(self.trained, self.masters)
        for p in self.trained:
            p.grad = None
        self.newest = loss.detach()

    def capture(self):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.once()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.once()
        self.replay = graph

    def run(self):
        if self.replay:
            self.replay.replay()
        else:
            self.once()

    def timed(self, steps):
        sync(self.device)
        start = time.perf_counter()
        for _ in range(steps):
            self.run()
        sync(self.device)
        return (time.perf_counter() - start) / steps


PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mkldnn_convolution", "aten::convolution_backward",
            "aten::mkldnn_convolution_backward", "aten::_slow_conv2d_forward", "aten::_slow_conv2d_backward", "aten::convolution",
            "mkldnn::_linear_pointwise", "mkldnn::_convolution_pointwise", "mkl::_mkl_linear")


def shares(step):
    """Of one step's time, by torch.profiler: products and convolutions; attention, whose products are not in these; AdamW."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        begin = time.perf_counter()
        step.run()
        microseconds = 1e6 * (time.perf_counter() - begin)
    found = {"products": 0.0, "attention": 0.0, "adamw": 0.0}
    for event in profile.key_averages():
        kind = ("products" if event.key in PRODUCTS or event.key.startswith("cpp_CppMicroGemm") else
                "attention" if "attention" in event.key else "adamw" if "fused_adamw" in event.key else None)
        if kind:
            found[kind] += event.self_cpu_time_total / microseconds
    return found


def status_bytes(field):
    with open("/proc/self/status") as f:
        return next(1024 * int(line.split()[1]) for line in f if line.startswith(field + ":"))


def resident_step(step):
    """Resident bytes before a step, and what the step adds at most."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    before = status_bytes("VmRSS")
    step.run()
    return before, status_bytes("VmHWM") - before


def say(word, what):
    print(word, json.dumps(what), flush=True)


def train_row(args, device):
    cuda = device.type == "cuda"
    begin = time.perf_counter()
    step = Step(args.row, args.variant, device, args.tiny, args.batch, args.infer)
    step.timed(1 if args.tiny else 5 if cuda else 2)
    resident = (0, 0) if cuda else resident_step(step)
    # A graph's replays allocate nothing: there the peak is that of the steps before and during the capture.
    live = torch.cuda.memory_allocated() if cuda else 0
    if cuda and step.mode in ("eager", "compile"):
        torch.cuda.reset_peak_memory_stats()
    guess = step.timed(3 if cuda and not args.tiny else 1)
    warm_up = time.perf_counter() - begin
    rounds = []
    if args.serve:
        say("READY", {"seconds": guess})
        for line in sys.stdin:
            rounds.append(step.timed(max(1, int(line))))
            say("ROUND", {"seconds": rounds[-1]})
    else:
        for _ in range(2 if args.tiny else 10):
            rounds.append(step.timed(1 if args.tiny else max(3, int(0.5 / guess) + 1)))
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    result = {"bench": "step", "engine": "pytorch", "variant": args.variant, "row": args.row, "device": str(device), "tiny": args.tiny,
              "batch": step.batch, "parameters": step.parameters, "trainable": step.trainable, "loss": float(step.newest),
              "peak_bytes": peak, "live_bytes": live, "step_bytes": peak - live, "warm_up_seconds": warm_up,
              "reserved_bytes": torch.cuda.max_memory_reserved() if cuda else 0, "torch": torch.__version__, "timm": timm.__version__}
    if not cuda:
        result.update(resident_bytes=resident[0], resident_step_bytes=resident[1], shares=shares(step))
    if rounds:
        seconds = statistics.median(rounds)
        result.update(seconds=seconds, rounds=rounds, images_per_second=step.batch / seconds)
    say("RESULT", result)


def measured(run, device, tiny):
    """Seconds of one call: on CUDA several calls captured as a graph, between events; medians of 15 replays."""
    if device.type != "cuda":
        run()
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    for _ in range(3):
        run()
    sync(device)
    start = time.perf_counter()
    run()
    sync(device)
    calls = max(1, min(200, int(5e-3 / (time.perf_counter() - start)) + 1))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    times = []
    for _ in range(15):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record()
        graph.replay()
        b.record()
        b.synchronize()
        times.append(1e-3 * a.elapsed_time(b) / calls)
    return statistics.median(times)


def host_seconds(run, device):
    """What the host spends on one call before it returns."""
    times = []
    for _ in range(150):
        sync(device)
        start = time.perf_counter()
        for _ in range(100):
            run()
        times.append((time.perf_counter() - start) / 100)
    sync(device)
    return statistics.median(times)


def ops_row(args, device):
    tiny, dtype = args.tiny, torch.bfloat16
    rows = []

    def add(name, work, run, host=False):
        try:
            seconds = host_seconds(run, device) if host else measured(run, device, tiny)
        except Exception as e:  # one op that fails must not take the rest with it
            rows.append({"case": name, "error": f"{type(e).__name__}: {e}"[:500]})
            return
        rows.append({"case": name, "pytorch": {"median": seconds, "rate": work / seconds}})
        print(f"{name}: {seconds * 1e6:.2f} us", flush=True)

    n = 1 << (12 if tiny else 29)
    a, b = torch.randn(n, device=device, dtype=dtype), torch.empty(n, device=device, dtype=dtype)
    add("copy", 4 * n, lambda: b.copy_(a))
    m = 64 if tiny else 8192
    x, w = (torch.randn(m, m, device=device, dtype=dtype) for _ in range(2))
    add(f"ceiling {m}^3", 2 * m**3, lambda: torch.mm(x, w))

    def norm_backward(dy, x, mean, rstd, w, b):
        return torch.ops.aten.native_layer_norm_backward(dy, x, [x.shape[1]], mean, rstd, w, b, [True, True, True])

    def residual_backward(dy, ds, x, mean, rstd, w, b):
        dx, dw, db = norm_backward(dy, x, mean, rstd, w, b)
        return dx + ds, dw, db

    for r, c in [(12, 16)] if tiny else [(256 * 197, 768), (256 * 197, 384), (1024, 12288)]:
        x, dy, ds = (torch.randn(r, c, device=device, dtype=dtype) for _ in range(3))
        w, b = (torch.randn(c, device=device, dtype=dtype) for _ in range(2))
        _, mean, rstd = torch.ops.aten.native_layer_norm(x, [c], w, b, 1e-6)
        for how, wrap in [("eager", lambda f: f)] + ([] if tiny else [("compile", lambda f: torch.compile(f, dynamic=False))]):
            one, two = wrap(norm_backward), wrap(residual_backward)
            add(f"layer norm {r} x {c}, backward, {how}", 6 * r * c, lambda: one(dy, x, mean, rstd, w, b))
            add(f"residual + layer norm {r} x {c}, backward, {how}", 8 * r * c, lambda: two(dy, ds, x, mean, rstd, w, b))

    with torch.device("meta"):
        shapes = [p.shape for p in build("vit_b16", tiny)[0].parameters()]
    params = [torch.randn(s, device=device) for s in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = torch.optim.AdamW(params, fused=True, capturable=device.type == "cuda")
    add("AdamW f32", 28 * sum(p.numel() for p in params), optimizer.step)

    x, y, p = (torch.randn(16, 64, device=device, dtype=dtype) for _ in range(3))
    w, b = torch.randn(64, 64, device=device, dtype=dtype), torch.randn(64, device=device, dtype=dtype)
    p.requires_grad_(True)
    with torch.no_grad():
        add("host: add", 1, lambda: x + y, host=True)
        add("host: layer norm", 1, lambda: F.layer_norm(x, (64,), b, b), host=True)
        add("host: linear 16 x 64 x 64", 1, lambda: F.linear(x, w, b), host=True)
    add("host: add, recorded", 1, lambda: p + y, host=True)
    say("RESULT", {"bench": "ops", "engine": "pytorch", "device": str(device), "tiny": tiny, "torch": torch.__version__, "rows": rows})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", default="vit_b16", choices=[*ROWS, *CONVOLUTIONAL, "ops"])
    parser.add_argument("--variant", default="masters:compile")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--batch", type=int, default=0, help="other than the row's")
    parser.add_argument("--infer", action="store_true", help="the forward pass alone")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = True
    device = torch.device(args.device)
    (ops_row if args.row == "ops" else train_row)(args, device)


if __name__ == "__main__":
    main()
