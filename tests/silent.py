"""Servers that take a connection up and then leave whoever asked without an answer."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread


@contextmanager
def silent(drip: bytes = b"") -> Iterator[int]:
    """A server that takes every connection and says nothing, or begins with `drip` and then sends a byte at a time.

    Yields its port.
    """
    taken: list[socket.socket] = []

    def serve(connection: socket.socket) -> None:
        try:
            connection.recv(65536)
            connection.sendall(drip)
            while drip:
                time.sleep(0.1)
                connection.sendall(b" ")
        except OSError:  # closed, there or here
            return

    def take() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            taken.append(connection)
            Thread(target=serve, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        Thread(target=take, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)  # a thread that waits for the next connection keeps a closed one open
        for connection in taken:
            connection.close()
