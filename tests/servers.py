"""A real MLflow server, and a proxy before it that spoils requests and answers."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Server:
    """`mlflow server` at one port, over a database that may change."""

    def __init__(self, artifacts: Path) -> None:
        self.artifacts = artifacts
        self.process: subprocess.Popen[bytes] | None = None
        [self.port] = free_ports(1)
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self, database: str) -> Any:
        """Start over the database at that URI; -> a client."""
        from mlflow import MlflowClient

        words = ["--artifacts-destination", str(self.artifacts), "--port", str(self.port), "--workers", "1"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "MLFLOW_BACKEND_STORE_URI": database, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            start_new_session=True,
        )  # fmt: skip
        until(lambda: socket.create_connection(("127.0.0.1", self.port), 1).close() or True)
        client = MlflowClient(self.uri)
        until(lambda: bool(client.search_experiments()))
        return client

    def send(self, number: signal.Signals) -> None:
        if self.process:
            os.killpg(self.process.pid, number)

    def stop(self) -> None:
        if self.process:
            self.send(signal.SIGKILL)
            self.process.wait()
            self.process = None


def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    """Wait until it holds; an error means that it does not yet."""
    deadline = time.monotonic() + seconds
    holds = False
    while not holds:
        assert time.monotonic() < deadline, "it did not happen in time"
        with contextlib.suppress(Exception):
            holds = bool(condition())
        time.sleep(0.1)


class Proxy(threading.Thread):
    """Passes requests on to a port; `spoil` names what goes wrong with a request, by its first line and number."""

    def __init__(self, target: int, spoil: Callable[[bytes, int], str]) -> None:
        super().__init__(daemon=True)
        self.target, self.spoil, self.spoiled = target, spoil, 0
        self.count, self.lock = 0, threading.Lock()
        self.server = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self.server.getsockname()[1]}"

    def run(self) -> None:
        while True:
            try:
                client, _ = self.server.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def serve(self, client: socket.socket) -> None:
        """One request, then the connection ends."""
        with client, contextlib.suppress(OSError):
            request = b""
            while b"\r\n\r\n" not in request:
                request += client.recv(65536) or b"\r\n\r\n"
            head, _, body = request.partition(b"\r\n\r\n")
            lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
            length = int(lengths[0].split(b":")[1]) if lengths else 0
            while len(body) < length:
                body += client.recv(65536)
            first, *lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
            with self.lock:
                self.count += 1
                wrong = self.spoil(first, self.count)
                self.spoiled += bool(wrong)
            if wrong == "refused":
                client.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                return
            with socket.create_connection(("127.0.0.1", self.target)) as target:
                sent = b"\r\n".join([first, *lines, b"Connection: close", b"", b""]) + body
                if wrong == "cut":
                    target.sendall(sent[: len(sent) - len(body) // 2 - 1])
                    return
                target.sendall(sent)
                answer = b""
                while part := target.recv(65536):
                    answer += part
            if wrong == "late":
                time.sleep(4)
            if wrong != "lost":
                client.sendall(answer)
