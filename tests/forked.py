"""Our programs as processes of their own that need not import torch, transformers, TRL and MLflow again.

A test that starts `align` or a script of ours pays seven seconds of processor time for imports. Here one
server process imports them once and forks for each program, which then runs as any other: with its own
arguments, environment, folder, output, process group, signals and exit code.

    with forked.server() as programs:
        done = programs.run(forked.ALIGN, "check", "recipe", cwd=folder)

One test of each kind should start the real command, because nothing here would notice an import that fails.
"""

import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ALIGN = "align.cli.main"
IMPORTS = ("mlflow", "peft", "trl", "argilla", "scipy.stats", "align.stages.sft", "align.stages.dpo")
HARMLESS = {"python", "python3", "jemalloc_bg_thd"}
"""Threads that may be there at a fork: the main one, and pyarrow's, which comes back by itself."""


class Program:
    """A started program; what `subprocess.Popen` has of it."""

    def __init__(self, server: "Server", pid: int, args: list[str]) -> None:
        self.pid, self.args = pid, args
        self.returncode: int | None = None
        self._server = server

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            self.returncode = self._server.ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        """Wait for the exit code."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.02)
        assert self.returncode is not None
        return self.returncode


class Server:
    """The process that forks."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )

    def ask(self, **request: Any) -> Any:
        """Send one request; returns the reply."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self,
        program: str,
        *arguments: str,
        cwd: Path | None = None,
        env: Mapping[str, str] = os.environ,
        stdout: Path = Path(os.devnull),
        stderr: Path = Path(os.devnull),
    ) -> Program:
        """Start a module (its name) or script (its path) in a process group of its own."""
        words = [program, *map(str, arguments)]
        request = {"words": words, "cwd": str(cwd or Path.cwd()), "env": dict(env)}
        return Program(self, self.ask(**request, stdout=str(stdout), stderr=str(stderr)), words)

    def run(self, program: str, *arguments: str, **how: Any) -> "subprocess.CompletedProcess[str]":
        """Run a program to its end, at most ten minutes; returns its code and output."""
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / "stdout", Path(folder) / "stderr"]
            started = self.start(program, *arguments, stdout=files[0], stderr=files[1], **how)
            code = started.wait()
            return subprocess.CompletedProcess(started.args, code, *(file.read_text() for file in files))

    def run_ranks(self, n: int, program: str, *arguments: str, **changes: str) -> None:
        """Run `n` processes that find each other as those of torchrun do; all have to succeed.

        Args:
            n: how many.
            program: a module's name or a script's path.
            arguments: the same for all.
            changes: what is different in their environment.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n)}
        shared |= {"LOCAL_WORLD_SIZE": str(n), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with tempfile.TemporaryDirectory() as folder:
            logs = [Path(folder) / str(rank) for rank in range(n)]
            started = []
            for rank, log in enumerate(logs):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                env = {**os.environ, **shared, **own, **changes}
                started.append(self.start(program, *arguments, env=env, stdout=log, stderr=log))
            while None in (codes := [process.poll() for process in started]) and not any(codes):
                time.sleep(0.05)
            for process in started:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
            assert not any(codes), [log.read_text()[-3000:] for log in logs]

    def close(self) -> None:
        """End the server; programs that still run go on."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def server() -> Iterator[Server]:
    """A server that ends with the block."""
    programs = Server()
    try:
        yield programs
    finally:
        programs.close()


def _serve() -> dict[str, Any] | None:
    """Answer requests; returns in a forked process, with what it is to run, and None at the end."""
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            reply = os.waitstatus_to_exitcode(status) if pid else None
        else:
            reply = os.fork()
            if not reply:
                return request
        print(json.dumps(reply), flush=True)
    return None


def _become(request: dict[str, Any]) -> None:
    """Turn this forked process into the program."""
    os.setsid()
    for descriptor, path in enumerate((os.devnull, request["stdout"], request["stderr"])):
        opened = os.open(path, os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    program, *arguments = request["words"]
    if program == ALIGN:
        from align.cli.main import main

        sys.argv = ["align", *arguments]
        main()
    else:
        sys.argv = [program, *arguments]
        runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    for name in IMPORTS:
        __import__(name)
    _tasks = Path("/proc/self/task").glob("*/comm")
    _threads = {task.read_text().strip() for task in _tasks} - HARMLESS
    assert not _threads, f"a fork would lose the threads {_threads}"
    gc.freeze()  # what is imported for good is not looked through again by each program
    _request = _serve()
    if _request:
        _become(_request)
