#!/usr/bin/env python3
"""One row of bench/gpu/models.h, Capo beside PyTorch: both stay loaded on the card and run alternately, round by round.

  pair.py --row vit_b16 --capo build/cuda/bench/gpu/bench_gpu_step --variants masters:compile,... --out FILE

Capo's variants run as programs that wait between rounds; each PyTorch variant (peer.py) joins in turn, is warmed up, runs
its rounds alternately with Capo's and leaves. Every finished pair is one JSON line appended to FILE, so that what was done
stays when time runs out or a program dies.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
from serve import Failed, Program  # noqa: E402


def clocks():
    try:
        query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,temperature.gpu,power.draw,clocks_event_reasons.active", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", required=True)
    parser.add_argument("--capo", required=True, help="bench_gpu_step")
    parser.add_argument("--capo-variants", default="eager", help="of eager, graph")
    parser.add_argument("--alone", default="", help="Capo's variants to run first, by themselves: the card may not hold all of them at once")
    parser.add_argument("--variants", default="masters:compile", help="of PyTorch, in order; may be empty")
    parser.add_argument("--seconds", type=float, default=300, help="no variant is begun that would not end within these")
    parser.add_argument("--patience", type=float, default=150, help="seconds for one variant to compile and warm up")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=0, help="other than the row's")
    parser.add_argument("--infer", action="store_true", help="the forward pass alone")
    parser.add_argument("--round-seconds", type=float, default=0.5, help="a round is at least so long, and a step")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    same = ["--row", args.row, "--device", args.device, "--serve"] + (["--tiny"] if args.tiny else [])
    same += (["--batch", str(args.batch)] if args.batch else []) + (["--infer"] if args.infer else [])
    failures = []

    def write(kind, what):
        with open(args.out, "a") as f:
            f.write(json.dumps({"kind": kind, "row": args.row, **what}) + "\n")

    def start(name, command, patience):
        try:
            return Program(name, command, patience, round_seconds=args.round_seconds)
        except (Failed, OSError) as e:
            failures.append(str(e))
            write("failure", {"variant": name, "text": str(e)})
            return None

    def start_capo(variant):
        return start(f"capo {variant}", [args.capo, *same, *(["--graph"] if variant == "graph" else [])], min(180, args.seconds))

    def finish_capo(variant, program, rounds):
        try:
            for _ in range(rounds):
                program.round()
            write("capo", {"variant": variant, "result": {**program.finish(), "variant": variant}})
        except (Failed, OSError, subprocess.SubprocessError) as e:
            failures.append(str(e))
            write("failure", {"variant": f"capo {variant}", "text": str(e)})
            program.kill()

    for variant in filter(None, args.alone.split(",")):
        program = start_capo(variant)
        if program:
            finish_capo(variant, program, args.rounds)
    capo = {}
    for variants in (args.capo_variants, args.alone):  # the second only if none of the first starts
        for variant in filter(None, variants.split(",") if not capo else []):
            program = start_capo(variant)
            if program:
                capo[variant] = program
    total = {name: [] for name in capo}

    for variant in filter(None, args.variants.split(",")):
        left = end - time.monotonic()
        if left < (5 if args.tiny else 45):
            write("skipped", {"variant": variant, "text": f"{left:.0f} s left"})
            continue
        peer = start(variant, [sys.executable, os.path.join(HERE, "peer.py"), *same, "--variant", variant], min(left - 5, args.patience))
        if not peer:
            continue
        try:
            before, seconds, theirs = clocks(), {name: [] for name in capo}, []
            for i in range(args.rounds):
                turn = [*capo, None]
                for name in turn if i % 2 == 0 else reversed(turn):
                    (theirs if name is None else seconds[name]).append((peer if name is None else capo[name]).round())
            result = peer.finish()
        except (Failed, OSError, subprocess.SubprocessError) as e:
            failures.append(str(e))
            write("failure", {"variant": variant, "text": str(e)})
            peer.kill()
            capo = {name: program for name, program in capo.items() if program.process.poll() is None}
            continue
        for name in capo:
            total[name] += seconds[name]
        write("pair", {"variant": variant, "pytorch": result, "clocks": [before, clocks()], "capo": {
            name: {"seconds": statistics.median(s), "rounds": s, "ratio": statistics.median([b / a for a, b in zip(s, theirs)])}
            for name, s in seconds.items()}})
        print(f"{args.row}: {variant} {1e3 * statistics.median(theirs):.2f} ms;",
              *(f"capo {name} {1e3 * statistics.median(s):.2f} ms" for name, s in seconds.items()), file=sys.stderr, flush=True)

    for name, program in capo.items():
        finish_capo(name, program, 0 if total[name] else args.rounds)  # rounds of its own if no pair came about
    for text in failures:
        print("FAILED", text, file=sys.stderr)
    sys.exit(1 if failures or not capo else 0)


if __name__ == "__main__":
    main()
