"""Applies rules to the traffic of this process and its descendants, by `fault run --pid`."""

import asyncio
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from pytest_fault.errors import FaultError, UnfiredError
from pytest_fault.program import find_command, one_line

_HOLD = "echo ready; read -r line; exit 0"
"""The command of `fault run`: the rules last until it reads a line, or until this process ends."""

_UNFIRED = 120
"""The exit code of `fault run` when a rule never fired."""

_applied: list["Fault"] = []
"""The applied faults of this process, in the order of application."""


@dataclass
class Settings:
    """What all faults of a test have in common."""

    seed: int | None = None
    """The random seed; drawn by `fault` where it is `None`."""
    report: Path | None = None
    """The folder for the report; those of further applications go to `2`, `3`, … below it."""
    summaries: list[str] = field(default_factory=list)
    """What `fault` printed about the faults that have been removed."""
    _reports: int = 0

    def arguments(self) -> list[str]:
        """Return the arguments for the next `fault run`."""
        words = [] if self.seed is None else [f"--seed={self.seed}"]
        if self.report is not None:
            self._reports += 1
            folder = self.report if self._reports == 1 else self.report / str(self._reports)
            folder.mkdir(parents=True, exist_ok=True)
            words.append(f"--report={folder.absolute()}")
        return words


class Fault:
    """Rules that can be applied once: by `with`, by `async with`, or by `apply` and `remove`.

    The rules act on this process and its descendants, as clients and as servers. They are removed
    when this process ends, however it ends.
    """

    def __init__(
        self,
        rules: Sequence[str],
        *,
        allow_unfired: bool = False,
        options: Sequence[str] = (),
        settings: Settings | None = None,
    ) -> None:
        self.rules = check_rules(rules)
        self.summary = ""
        """What `fault` printed, once the rules are removed."""
        self._allow_unfired = allow_unfired
        self._options = list(options)
        self._settings = settings or Settings()
        self._process: subprocess.Popen[str] | None = None

    def apply(self) -> "Fault":
        """Apply the rules; they act when this returns.

        Raises:
            UnavailableError: `fault` is missing or has no rights.
            FaultError: A rule is wrong or can't be applied; nothing is changed.

        """
        __tracebackhide__ = True
        if self._process is not None:
            raise FaultError("this fault was applied before: make a new one")
        words = self._words()
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by _wait)
        self._process = process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            # Ctrl-C is for pytest; the end of pytest ends the rules.
            start_new_session=True,
        )
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            self._wait(process)
            raise FaultError(one_line(self.summary))
        _applied.append(self)
        return self

    def remove(self) -> str:
        """Remove the rules and return the summary of what they did.

        Raises:
            UnfiredError: A rule never fired, and `allow_unfired` is not set.
            FaultError: `fault` ended early, or a fault that was applied later is still applied.

        """
        __tracebackhide__ = True
        process = self._process
        if process is None or self not in _applied:
            return self.summary
        if _applied[-1] is not self:
            last = ", ".join(_applied[-1].rules)
            raise FaultError(f"faults are removed in reverse order: remove `{last}` first")
        _applied.remove(self)
        self._release(process)
        self._wait(process)
        self._settings.summaries.append(self.summary)
        if process.returncode == _UNFIRED:
            raise UnfiredError(self._unfired())
        if process.returncode != 0:
            raise FaultError(f"fault ended early: {one_line(self.summary)}")
        return self.summary

    def __enter__(self) -> "Fault":
        return self.apply()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        __tracebackhide__ = True
        try:
            self.remove()
        except FaultError:
            # The test's own error is the one to show.
            if kind is None:
                raise

    async def __aenter__(self) -> "Fault":
        return await asyncio.to_thread(self.apply)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        __tracebackhide__ = True
        await asyncio.to_thread(self.__exit__, kind, error, trace)

    def _words(self) -> list[str]:
        words = [*find_command(), "run", "--pid", str(os.getpid())]
        words += self._settings.arguments() + self._options
        if self._allow_unfired:
            words.append("--allow-unfired")
        words += [f"--rule={rule}" for rule in self.rules]
        return [*words, "--", "sh", "-c", _HOLD]

    @staticmethod
    def _release(process: subprocess.Popen[str]) -> None:
        # A line, since a child that this process forked may hold the pipe open.
        assert process.stdin is not None
        try:
            process.stdin.write("\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # `fault` has ended already: its exit code says why.

    def _wait(self, process: subprocess.Popen[str]) -> None:
        process.communicate()
        self._errors.seek(0)
        self.summary = self._errors.read()
        self._errors.close()

    def _unfired(self) -> str:
        lines = [
            line for line in self.summary.splitlines() if re.search("rule `.*never fired", line)
        ]
        return "\n".join(lines) or "fault: a rule never fired, so the test did not test it"


class Faults:
    """The faults of one test, as the fixture `fault` gives them."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self._made: list[Fault] = []

    def __call__(
        self, *rules: str, allow_unfired: bool = False, options: Sequence[str] = ()
    ) -> Fault:
        """Return a fault for `with` or `async with`.

        Args:
            rules: Rules such as `"tcp:5432 latency=200ms"`.
            allow_unfired: Whether a rule may never fire.
            options: More options of `fault run`, such as `["--interface", "lo"]`.

        """
        fault = Fault(rules, allow_unfired=allow_unfired, options=options, settings=self.settings)
        self._made.append(fault)
        return fault

    def apply(self, *rules: str, allow_unfired: bool = False, options: Sequence[str] = ()) -> Fault:
        """Apply rules until the end of the test, or until `remove` of the returned fault."""
        __tracebackhide__ = True
        return self(*rules, allow_unfired=allow_unfired, options=options).apply()

    def close(self) -> None:
        """Remove all faults that are still applied, the last one first.

        Raises:
            FaultError: As `Fault.remove`, for the one that was applied first of those that fail;
                all are removed.

        """
        failed: FaultError | None = None
        for fault in reversed(_applied.copy()):
            if fault in self._made:
                try:
                    fault.remove()
                except FaultError as error:
                    failed = error
        if failed is not None:
            raise failed


def check_rules(rules: Sequence[object]) -> tuple[str, ...]:
    """Return the rules.

    Raises:
        FaultError: There is none, or one that is not a string.

    """
    for rule in rules:
        if not isinstance(rule, str):
            raise FaultError(f"fault: a rule is a string, not {rule!r}")
    if not rules:
        raise FaultError('fault: no rule: give at least one, such as "tcp:5432 latency=200ms"')
    return tuple(str(rule) for rule in rules)
