#!/usr/bin/env python3
"""PyTorch's side of bench/cpu/run: the ops of bench/cpu/ops.cpp, by the same protocol (bench/serve.py)."""
import argparse
import json
import sys
import time

import torch
import torch.nn.functional as F


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


def gemm(c):
    m, n, k = c["m"], c["n"], c["k"]
    dtype = torch.bfloat16 if c.get("dtype") == "bf16" else torch.float32
    a = random(k, m, dtype=dtype).t() if c.get("ta") else random(m, k, dtype=dtype)
    b = random(n, k, dtype=dtype).t() if c.get("tb") else random(k, n, dtype=dtype)
    bias = random(n, dtype=dtype) if c.get("bias") else None
    if c.get("prepacked"):  # what torch.compile's freezing makes of a layer
        packed = torch.ops.mkldnn._reorder_linear_weight(b.t().contiguous(), m)
        return lambda: torch.ops.mkldnn._linear_pointwise(a, packed, bias, "none", [], "")
    return (lambda: torch.addmm(bias, a, b)) if bias is not None else (lambda: torch.mm(a, b))


def conv(c):
    x, axes = c["x"], len(c["kernel"])
    layout = torch.channels_last if axes == 2 else torch.channels_last_3d
    x = random(x[0], x[-1], *x[1:-1]).to(memory_format=layout)
    w = random(c["out"], x.shape[1], *c["kernel"]).to(memory_format=layout)
    stride, pad, one, none = [c.get("stride", 1)] * axes, [c.get("pad", 0)] * axes, [1] * axes, [0] * axes
    if c["pass"] == "forward":
        return lambda: torch.ops.aten.convolution(x, w, None, stride, pad, one, False, none, 1)
    dy = torch.randn_like(torch.ops.aten.convolution(x, w, None, stride, pad, one, False, none, 1))
    mask = [c["pass"] == "data", c["pass"] == "weight", False]
    return lambda: torch.ops.aten.convolution_backward(dy, x, w, None, stride, pad, one, False, none, 1, mask)


def differentiated(passes, inputs, f):
    if passes == "forward":
        return lambda: f(*inputs)
    inputs = [t.requires_grad_() for t in inputs]
    with torch.enable_grad():
        y = f(*inputs)
    dy = torch.randn_like(y)
    if passes == "backward":
        return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)

    def both():
        with torch.enable_grad():
            return torch.autograd.grad(f(*inputs), inputs, dy)

    return both


def attention(c):
    q, k, v = random(c["batch"], c["n"], 3, c["heads"], c["d"]).permute(2, 0, 3, 1, 4).unbind(0)
    return differentiated(c["pass"], [q, k, v], F.scaled_dot_product_attention)


def layer_norm(c):
    n = c["columns"]
    return differentiated(c["pass"], [random(c["rows"], n), random(n), random(n)], lambda x, w, b: F.layer_norm(x, (n,), w, b, 1e-6))


def group_norm(c):
    b, h, w, n = c["x"]
    x = random(b, n, h, w).to(memory_format=torch.channels_last)
    return differentiated(c["pass"], [x, random(n), random(n)], lambda x, w, b: F.group_norm(x, c["groups"], w, b))


def softmax(c):
    return differentiated(c["pass"], [random(c["rows"], c["columns"])], lambda x: F.softmax(x, -1))


def gelu(c):
    return differentiated(c["pass"], [random(c["elements"])], F.gelu)


def adamw(c):
    params = [random(c["elements"] // c["tensors"]) for _ in range(c["tensors"])]
    for p in params:
        p.grad = torch.randn_like(p)
    return torch.optim.AdamW(params, fused=True).step


def copy(c):
    a, b = random(c["elements"]), random(c["elements"])
    return lambda: b.copy_(a)


OPS = {f.__name__: f for f in (gemm, conv, attention, layer_norm, group_norm, softmax, gelu, adamw, copy)}


def say(word, what):
    print(word, json.dumps(what), flush=True)


def versions():
    found = {"torch": torch.__version__}
    for line in torch.__config__.show().splitlines():
        if "MKL-DNN" in line or "Math Kernel Library Version" in line:
            found["oneDNN" if "MKL-DNN" in line else "MKL"] = line.split("v" if "MKL-DNN" in line else "Version ")[1].split()[0]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    torch.set_grad_enabled(False)
    torch.set_num_threads(args.threads)
    run, clock = None, time.perf_counter

    def timed(calls):
        start = clock()
        for _ in range(calls):
            run()
        return (clock() - start) / calls

    say("READY", {"seconds": 0, "versions": versions()})
    for line in sys.stdin:
        if line[0] == "{":
            c, run = json.loads(line), None
            threads = c.get("threads", args.threads)
            torch.set_num_threads(threads)
            clock = time.thread_time if threads == 1 else time.perf_counter
            try:
                run = OPS[c["op"]](c)
                timed(2)
                say("CASE", {"seconds": timed(1)})
            except Exception as e:  # one op that fails must not take the rest with it
                run = None
                say("CASE", {"error": f"{type(e).__name__}: {e}"[:500]})
        elif run:
            timed(1)
            say("ROUND", {"seconds": timed(max(1, int(line)))})
    say("RESULT", {})


if __name__ == "__main__":
    main()
