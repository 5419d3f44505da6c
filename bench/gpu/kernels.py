#!/usr/bin/env python3
"""kernels.py FILE.csv: what ncu --csv --page raw told of one step, summed by kernel. Prints a table and RESULT {json}."""
import csv
import json
import re
import sys

TIME, BYTES = "gpu__time_duration.sum", "dram__bytes.sum"
SCALE = {"ns": 1e-9, "nsecond": 1e-9, "us": 1e-6, "usecond": 1e-6, "ms": 1e-3, "msecond": 1e-3, "s": 1, "second": 1,
         "byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}


def short(name):
    """Without namespaces and arguments; template arguments stay."""
    name = re.sub(r"\(anonymous namespace\)::|<unnamed>::|\bcapo::|\bvoid |\((int|bool|unsigned int|long)\)", "", name)
    return re.sub(r"\(.*$", "", name)[:110]


def main():
    with open(sys.argv[1], encoding="utf-8", errors="replace", newline="") as f:
        lines = [line for line in f if line.startswith('"')]  # ncu's own remarks start with ==
    rows = list(csv.DictReader(lines))
    units, rows = rows[0], rows[1:]  # the first row below the head holds the units

    def number(row, key):
        text = (row.get(key) or "").replace(",", "")
        return float(text) * SCALE.get(units.get(key, ""), 1) if re.fullmatch(r"[-+.eE0-9]+", text) else 0.0

    kernels = {}
    for row in rows:
        entry = kernels.setdefault(short(row["Kernel Name"]), [0, 0.0, 0.0])
        entry[0] += 1
        entry[1] += number(row, TIME)
        entry[2] += number(row, BYTES)
    total = sum(e[1] for e in kernels.values()) or 1e-30
    out = sorted(({"kernel": k, "launches": n, "seconds": t, "bytes": b} for k, (n, t, b) in kernels.items()), key=lambda e: -e["seconds"])
    print(f"{total * 1e3:.2f} ms in {sum(e['launches'] for e in out)} launches")
    for e in out[:40]:
        print(f"{100 * e['seconds'] / total:5.1f} % {e['seconds'] * 1e3:9.3f} ms {e['launches']:5d} x {e['bytes'] / max(e['seconds'], 1e-30) * 1e-9:7.0f} GB/s  {e['kernel']}")
    print("RESULT " + json.dumps({"bench": "kernels", "seconds": total, "kernels": out[:60]}))


if __name__ == "__main__":
    main()
