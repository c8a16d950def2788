"""The plugin, in a pytest of its own whose traffic the faults act on."""

import json
import os
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from servers import Server

DRAWS = "--fault-seed=7"


def run(inner: pytest.Pytester, text: str, *options: str) -> pytest.RunResult:
    """Run these tests; they may skip nothing."""
    inner.makepyfile(text)
    return inner.runpytest_subprocess("--fault-required", "-rA", *options)


def test_faults_act_while_they_are_applied_and_only_then(inner: pytest.Pytester) -> None:
    result = run(
        inner,
        """
        import asyncio, subprocess, sys, unittest
        import pytest
        from pytest_fault import Fault
        from servers import PATIENCE

        EARLY = 0.55  # What two delays of 300 ms take at the least, less the clock's error.

        @pytest.fixture(scope="module", autouse=True)
        def port(server):
            assert server.round_trip() < 60
            return server.port

        class TestMarked:
            # A port that is known before the server runs: any.
            @pytest.mark.fault("tcp:1024-65535 latency=300ms")
            def test_latency(self, server):
                assert server.round_trip() >= EARLY

            @pytest.mark.fault("tcp:1024-65535 delay=300ms dir=to-client")
            @pytest.mark.fault("tcp:1024-65535 drop nth=1 match=fin", allow_unfired=True)
            def test_two_markers(self, server):
                assert server.round_trip() >= 0.28

        @pytest.mark.fault("tcp:1024-65535 reject")
        class TestRefused(unittest.TestCase):
            def test_one(self):
                import socket
                with self.assertRaises(ConnectionRefusedError):
                    socket.create_connection(("127.0.0.1", 4), PATIENCE)
                with self.assertRaises(ConnectionRefusedError):
                    socket.create_connection(("127.0.0.1", 44444), PATIENCE)

        def test_with(server, port, fault):
            connection = server.connect()
            with fault(f"tcp:{port} delay=300ms") as applied:
                assert server.round_trip(connection) >= EARLY
                with fault(f"tcp:{port} reject"):
                    with pytest.raises(ConnectionRefusedError):
                        server.connect()
                server.connect().close()
            assert "delay=300ms" in applied.summary
            # Not the first one: an ACK of it that was still delayed may have been rejected.
            server.round_trip()

        def test_children(server, port, fault):
            connect = f"import socket; socket.create_connection(('127.0.0.1', {port}), 30)"
            with fault(f"tcp:{port} reject"):
                child = subprocess.run([sys.executable, "-c", connect], stderr=-1, text=True)
            assert "ConnectionRefusedError" in child.stderr

        def test_until_the_end(server, port, fault):
            fault.apply(f"tcp:{port} reject")
            last = fault.apply(f"udp:{port} drop", allow_unfired=True)
            with pytest.raises(ConnectionRefusedError):
                server.connect()
            assert "never fired" in last.remove()

        def test_nothing_is_left(server):
            server.connect().close()

        def test_async(server, port, fault):
            async def exchange():
                async with fault(f"tcp:{port} reject"):
                    with pytest.raises(ConnectionRefusedError):
                        await asyncio.open_connection("127.0.0.1", port)
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
            asyncio.run(asyncio.wait_for(exchange(), PATIENCE))

        def test_forked_children_do_not_keep_the_rules(server, port, fault):
            import os, signal
            with fault(f"tcp:{port} reject"):
                child = os.fork()
                if child == 0:
                    signal.pause()
                with pytest.raises(ConnectionRefusedError):
                    server.connect()
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        """,
    )
    result.assert_outcomes(passed=9)


def test_a_fault_that_never_fired_fails_the_test_with_one_line(inner: pytest.Pytester) -> None:
    result = run(
        inner,
        """
        import pytest

        @pytest.mark.fault("tcp:9 drop")
        def test_marked():
            pass

        @pytest.mark.fault("tcp:9 drop", allow_unfired=True)
        def test_allowed():
            pass

        def test_with(fault):
            with fault("tcp:9 latency=1s"):
                pass

        def test_applied(fault):
            fault.apply("udp:9 drop")

        @pytest.mark.fault("tcp:9 drop")
        def test_own_error():
            raise LookupError("of the test")

        def test_own_error_inside(fault):
            with fault("tcp:9 drop"):
                raise LookupError("of the test")
        """,
    )
    result.assert_outcomes(passed=1, failed=5)
    result.stdout.fnmatch_lines_random(
        [
            "FAILED *::test_marked - *the rule `tcp:9 drop` never fired*",
            "FAILED *::test_with - *the rule `tcp:9 latency=1s` never fired*",
            "FAILED *::test_applied - *the rule `udp:9 drop` never fired*",
            "FAILED *::test_own_error - LookupError: of the test",
            "FAILED *::test_own_error_inside - LookupError: of the test",
            "*tcp:9 drop *0 pkts 0 B*",
        ]
    )
    assert "Traceback" not in result.stdout.str()
    assert "site-packages" not in result.stdout.str()


def test_mistakes_are_one_line(inner: pytest.Pytester) -> None:
    result = run(
        inner,
        """
        import pytest

        @pytest.mark.fault("tcp:9 dropp")
        def test_rule(): pass

        @pytest.mark.fault()
        def test_none(): pass

        @pytest.mark.fault(["tcp:9 drop"])
        def test_list(): pass

        @pytest.mark.fault("tcp:9 drop", alow_unfired=True)
        def test_argument(): pass

        @pytest.mark.fault("tcp:9 drop", options="--interface lo")
        def test_options(): pass

        def test_interface(fault):
            with fault("tcp:9 drop", options=["--interface", "none-such"]):
                pass

        def test_order(fault):
            first = fault.apply("tcp:9 drop", allow_unfired=True)
            fault.apply("tcp:10 drop", allow_unfired=True)
            first.remove()

        def test_twice(fault):
            applied = fault.apply("tcp:9 drop", allow_unfired=True)
            applied.remove()
            assert applied.remove() == applied.summary
            applied.apply()
        """,
    )
    result.assert_outcomes(failed=4, errors=4)
    result.stdout.fnmatch_lines_random(
        [
            "FAILED *::test_rule - *unknown fault `dropp`*tcp:9 dropp*did you mean `drop`?*",
            "ERROR *::test_none - *no rule: give at least one*",
            "ERROR *::test_list - *a rule is a string, not *tcp:9 drop*",
            "ERROR *::test_argument - *unknown argument alow_unfired*",
            "ERROR *::test_options - *a list of words*",
            "FAILED *::test_interface - *none-such*",
            "FAILED *::test_order - *reverse order: remove `tcp:10 drop` first",
            "FAILED *::test_twice - *make a new one",
        ]
    )
    assert "Traceback" not in result.stdout.str()


DRAWING = """
    import pytest

    class TestDraws:
        @pytest.mark.parametrize("number", [1, "a/b"])
        @pytest.mark.fault("tcp:1024-65535 delay=1ms p=50%", allow_unfired=True)
        def test_draws(self, number, server, fault):
            server.round_trip()
            if number == 1:
                with fault("tcp:9 drop", allow_unfired=True):
                    pass
    """


def reports(folder: Path) -> dict[str, dict[str, object]]:
    """Return the reports in a folder by the names of their folders."""
    paths = sorted(folder.rglob("report.json"))
    return {str(path.parent.relative_to(folder)): json.loads(path.read_text()) for path in paths}


def test_reports_and_the_seed(inner: pytest.Pytester) -> None:
    result = run(inner, DRAWING, "--fault-report=out", DRAWS)
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["fault: seed 7 (--fault-seed 7 repeats it)"])
    found = reports(inner.path / "out")
    test = "test_reports_and_the_seed.py/TestDraws/test_draws"
    assert set(found) == {f"{test}[1]", f"{test}[1]/2", f"{test}[a%2Fb]"}
    assert [report["seed"] for report in found.values()] == [7, 7, 7]


def test_a_wrong_seed_is_a_line(inner: pytest.Pytester) -> None:
    result = run(inner, MARKED.replace("(never)", "()"), "--fault-seed=-1")
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(["FAILED *::test_marked - *fault: error: *-1*seed*"])


def test_workers_of_xdist_draw_from_one_seed(inner: pytest.Pytester) -> None:
    pytest.importorskip("xdist")
    result = run(inner, DRAWING, "--fault-report=out", "-n2")
    result.assert_outcomes(passed=2)
    seeds = {str(report["seed"]) for report in reports(inner.path / "out").values()}
    assert len(seeds) == 1


MARKED = """
    import pytest

    @pytest.fixture
    def never():
        raise AssertionError("a skipped test is not set up")

    @pytest.mark.fault("tcp:9 drop")
    def test_marked(never): pass

    def test_fixture(fault): pass
    """


def test_without_the_program_tests_are_skipped_with_a_reason(
    inner: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner.makepyfile(MARKED)
    monkeypatch.setenv("FAULT", "/none/such")
    result = inner.runpytest_subprocess("-rs")
    result.assert_outcomes(skipped=2)
    result.stdout.fnmatch_lines(["SKIPPED *FAULT=/none/such is not a program"])
    monkeypatch.setenv("FAULT", "/bin/true")
    result = inner.runpytest_subprocess("-rs")
    result.assert_outcomes(skipped=2)
    result.stdout.fnmatch_lines(["SKIPPED *`/bin/true doctor --json` printed no result"])
    monkeypatch.delenv("FAULT")
    monkeypatch.setenv("PATH", "/none")
    result = inner.runpytest_subprocess("-rs")
    result.assert_outcomes(skipped=2)
    result.stdout.fnmatch_lines(["SKIPPED *fault is not installed: put it in PATH, *"])
    result = inner.runpytest_subprocess("--fault-required", "-rA")
    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines(["ERROR *::test_marked - *fault is not installed: *"])


def test_without_rights_tests_are_skipped_with_a_reason(inner: pytest.Pytester) -> None:
    setpriv = shutil.which("setpriv")
    if os.geteuid() != 0 or setpriv is None:
        pytest.skip("needs root and setpriv, to give up capabilities")
    inner.makepyfile(MARKED)
    powerless = [setpriv, "--bounding-set=-all", "--inh-caps=-all"]
    result = inner.run(*powerless, sys.executable, "-m", "pytest", "-rs")
    result.assert_outcomes(skipped=2)
    result.stdout.fnmatch_lines(["SKIPPED *fault can't act here: no CAP_BPF*"])


HOLDING = """
    import sys

    def test_holding(fault):
        applied = fault.apply("tcp:{port} reject", allow_unfired=True)
        print("pid", applied._process.pid, flush=True)
        sys.stdin.readline()
    """


def test_other_processes_are_untouched_and_the_rules_end_with_pytest(
    inner: pytest.Pytester, server: Server
) -> None:
    inner.makepyfile(HOLDING.format(port=server.port))
    pytester = [sys.executable, "-m", "pytest", "--fault-required", "-s"]
    with subprocess.Popen(
        pytester, cwd=inner.path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holding:
        assert holding.stdout is not None
        lines = iter(holding.stdout.readline, "")
        words = next(line.split() for line in lines if "pid " in line)
        ended = os.pidfd_open(int(words[-1]))
        server.round_trip()
        holding.kill()
    assert select.select([ended], [], [], 30)[0], "fault ends with pytest"
    os.close(ended)
