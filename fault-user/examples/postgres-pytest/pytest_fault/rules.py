"""Rules in force for a while: a `fault run` that lives as long as a pipe to it is open."""

import contextlib
import os
import shutil
import subprocess


def words_of(*arguments):
    """The words that start `fault`."""
    program = os.environ.get("FAULT") or shutil.which("fault")
    if program is None:
        raise RuntimeError("no `fault` in PATH: install it, or say where it is in the variable FAULT")
    return ([] if os.geteuid() == 0 else ["sudo", "-n"]) + [program, *arguments]


class Fault:
    """Rules that are in force until `heal`. When this process dies, however it does, they are lifted too."""

    def __init__(self, target, faults, options=()):
        self.rules = [f"{target} {fault}" for fault in faults]
        words = words_of("run", "--scope", "host", *options)
        for rule in self.rules:
            words += ["-r", rule]
        words += ["--", "sh", "-c", "echo ready; exec cat"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        if self._process.stdout.readline() != "ready\n":
            _, told = self._process.communicate()
            raise RuntimeError(told.strip())

    def heal(self, must_have_fired=True):
        """Lifts the rules, and returns what they did. A fault that hurt nothing tests nothing: that is an error."""
        if self._process.stdin.closed:
            return ""
        _, told = self._process.communicate()
        code = self._process.returncode
        if code not in (0, 120) or (code == 120 and must_have_fired):
            raise AssertionError(told.strip())
        return told


class Faults:
    """Puts faults on; those that are still on are lifted when this is left."""

    def __init__(self):
        self._on = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.reset()

    def on(self, target, *faults, options=()):
        """Puts faults of a target on, and leaves them on. Returns what can `heal` them before the end."""
        fault = Fault(target, faults, options)
        self._on.append(fault)
        return fault

    def reset(self):
        """Lifts all that is on, the last first."""
        while self._on:
            self._on.pop().heal(must_have_fired=False)

    @contextlib.contextmanager
    def __call__(self, target, *faults, options=()):
        """`with fault("tcp:5432", "latency=1s"):`. Fails when a fault never fired."""
        fault = self.on(target, *faults, options=options)
        try:
            yield fault
        except BaseException:
            # The first error is the one that is told.
            fault.heal(must_have_fired=False)
            raise
        finally:
            if fault in self._on:
                self._on.remove(fault)
        fault.heal()
