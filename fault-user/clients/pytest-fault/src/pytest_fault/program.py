"""Finds the program `fault` and the rights to run it."""

import functools
import json
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from pytest_fault.errors import UnavailableError


@functools.cache
def find_command() -> tuple[str, ...]:
    """Return the words that start `fault`: its path, with `sudo -n` in front of it where needed.

    Raises:
        UnavailableError: There is no such program, or it lacks the rights that it needs.

    """
    program = _find_program()
    reason = _lacks((program,))
    if reason is None:
        return (program,)
    if os.geteuid() != 0 and shutil.which("sudo"):
        with_sudo = ("sudo", "-n", program)
        with_sudo_reason = _lacks(with_sudo)
        if with_sudo_reason is None:
            return with_sudo
        reason = f"{reason} (tried: {with_sudo_reason})"
    raise UnavailableError(f"fault can't act here: {reason}")


def _find_program() -> str:
    named = os.environ.get("FAULT")
    found = shutil.which(named or "fault")
    if found is None and named:
        raise UnavailableError(f"FAULT={named} is not a program")
    if found is None:
        raise UnavailableError("fault is not installed: put it in PATH, or set FAULT to its path")
    return str(Path(found).absolute())


def _lacks(command: Iterable[str]) -> str | None:
    """Return what this command lacks to limit rules to a process tree; `None` if nothing."""
    done = subprocess.run(
        [*command, "doctor", "--json"], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    try:
        checks = json.loads(done.stdout)["system"]
    except (ValueError, LookupError):
        return one_line(done.stderr) or f"`{' '.join(done.args)}` printed no result"
    for check in checks:
        if check["name"] in ("bpf(2)", "cgroup2") and not check["ok"]:
            return str(check["detail"])
    return None if done.returncode == 0 else "see `fault doctor`"


def one_line(text: str) -> str:
    """Join the lines of a message of `fault`, without the carets that point into an excerpt."""
    lines = (line.strip() for line in text.splitlines())
    return "; ".join(line for line in lines if line.strip("^ "))
