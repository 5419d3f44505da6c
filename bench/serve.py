"""Programs that stay loaded between the rounds of a measurement, so that several are measured alternately.

Such a program says "READY {"seconds": of one step}"; for each line "N" on its input it runs N steps and says "ROUND
{"seconds": of one}"; at its input's end it says "RESULT {...}". One that serves many cases takes, instead, a line of JSON
first, which describes a case, and answers "CASE {"seconds": ..}" or "CASE {"error": ..}".
"""
import json
import math
import os
import queue
import subprocess
import sys
import threading
import time


class Failed(Exception):
    pass


class Program:
    """Its other output goes to `log`."""

    def __init__(self, name, command, patience, env=None, log=sys.stderr, round_seconds=0.5):
        self.name = name
        self.log = log
        self.lines = queue.Queue()
        self.tail = []
        print("+", *command, file=log, flush=True)
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                        env={**os.environ, **(env or {})})
        threading.Thread(target=self.read, daemon=True).start()
        self.ready = self.wait("READY", patience)
        self.plan(self.ready["seconds"], round_seconds)

    def plan(self, step_seconds, round_seconds):
        self.step_seconds = step_seconds
        self.steps = max(1, math.ceil(round_seconds / max(step_seconds, 1e-6)))

    def case(self, spec, patience, round_seconds):
        """Has it prepare what `spec` describes; Failed with its reason if it cannot, and it then goes on to serve."""
        self.write(json.dumps(spec))
        answer = self.wait("CASE", patience)
        if "error" in answer:
            raise Failed(f"{self.name}: {answer['error']}")
        self.plan(answer["seconds"], round_seconds)
        return answer

    def read(self):
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def wait(self, word, patience):
        end = time.monotonic() + patience
        while True:
            try:
                line = self.lines.get(timeout=max(0.1, end - time.monotonic()))
            except queue.Empty:
                self.kill()
                raise Failed(f"{self.name}: no {word} within {patience:.0f} s; last: {' | '.join(self.tail)}") from None
            if line is None:
                raise Failed(f"{self.name}: ended with {self.process.wait()} before {word}; last: {' | '.join(self.tail)}")
            if line.startswith(word + " "):
                return json.loads(line[len(word):])
            print(f"[{self.name}] {line}", end="", file=self.log, flush=True)
            self.tail = [*self.tail, line.strip()[:300]][-8:]

    def write(self, line):
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except OSError:
            pass  # wait() tells what it said last

    def round(self):
        self.write(str(self.steps))
        return self.wait("ROUND", 60 + 20 * self.steps * self.step_seconds)["seconds"]

    def finish(self):
        self.process.stdin.close()
        result = self.wait("RESULT", 60 + 20 * self.step_seconds)  # a peer may profile a step
        self.process.wait(timeout=60)
        return result

    def kill(self):
        self.process.kill()
        self.process.wait()
