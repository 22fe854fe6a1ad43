"""A Ray cluster of separate raylets on this machine: a head and workers that come and go, ended by their process ids.

Where the system allows it (root, and a kernel that makes bridges) each worker has a network namespace of its own, so
that what nodes say to each other crosses interfaces; elsewhere they share the host's address.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psutil

RAY = Path(sys.executable).with_name("ray")
WRITTEN_DOWN = Path(tempfile.gettempdir(), "ray", "ray_current_cluster")
START_S = 60


def kill_with_family(process: subprocess.Popen) -> None:
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.kill()
    process.wait(10)
    for one in family:
        if one.is_running():
            one.kill()
    psutil.wait_procs(family, timeout=15)


class Network:
    """A bridge on this host, and namespaces whose only way out is an interface on it."""

    def __init__(self) -> None:
        self._tag = f"t{os.getpid() % 10**6}"
        self._subnet = f"10.{20 + os.getpid() % 200}.77"
        self._spaces: list[str] = []
        self.address = f"{self._subnet}.1"
        _ip("link", "add", self._tag, "type", "bridge")
        _ip("addr", "add", f"{self.address}/24", "dev", self._tag)
        _ip("link", "set", self._tag, "up")

    @staticmethod
    def why_not() -> str | None:
        """Why there can be none here; None where it can be."""
        if not shutil.which("ip"):
            return "no ip command"
        tried = subprocess.run(
            ["ip", "link", "add", f"t{os.getpid()}x", "type", "bridge"], capture_output=True, text=True
        )
        if tried.returncode:
            return f"no network namespaces: {tried.stderr.strip()}"
        _ip("link", "del", f"t{os.getpid()}x")
        return None

    def space(self) -> tuple[str, str]:
        """A new namespace: its name, and its address."""
        number = len(self._spaces) + 2
        name, address, wire = f"{self._tag}n{number}", f"{self._subnet}.{number}", f"{self._tag}v{number}"
        _ip("netns", "add", name)
        self._spaces.append(name)
        _ip("link", "add", wire, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", wire, "master", self._tag, "up")
        for command in (f"addr add {address}/24 dev eth0", "link set eth0 up", "link set lo up"):
            _ip("-n", name, *command.split())
        _ip("-n", name, "route", "add", "default", "via", self.address)
        return name, address

    def sent(self) -> int:
        """Bytes that the namespaces have sent."""
        counters = psutil.net_io_counters(pernic=True)
        return sum(counters[name].bytes_recv for name in counters if name.startswith(f"{self._tag}v"))

    def close(self) -> None:
        for name in self._spaces:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        subprocess.run(["ip", "link", "del", self._tag], capture_output=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Raylets:
    """A running cluster. The head has no CPUs: it coordinates, as the head of a cloud's cluster should."""

    def __init__(self, network: Network | None, environment: Mapping[str, str]):
        self.network = network
        self._host = network.address if network else "127.0.0.1"
        port = free_port()
        self.address = f"{self._host}:{port}"
        self.dashboard = f"http://127.0.0.1:{free_port()}"
        self.environment = {
            **environment,
            "RAY_ADDRESS": f"127.0.0.1:{port}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }
        """Of every driver and node; the address as the head knows it, which leads nowhere on the others."""
        self._nodes: list[subprocess.Popen] = []

    def start_head(self) -> None:
        port = self.address.rpartition(":")[2]
        ports = [f"--port={port}", f"--dashboard-port={self.dashboard.rpartition(':')[2]}"]
        self._start("--head", f"--node-ip-address={self._host}", *ports, "--num-cpus=0")

    def add(self, cpus: int) -> subprocess.Popen:
        """A worker raylet; it has joined the cluster when this returns."""
        options = f"--address={self.address}", f"--num-cpus={cpus}"
        if self.network is None:
            return self._start(*options)
        name, address = self.network.space()
        inside = [
            "ip",
            "netns",
            "exec",
            name,
            "env",
            "GLOO_SOCKET_IFNAME=eth0",
        ]  # the host's name means no address here
        return self._start(*options, f"--node-ip-address={address}", within=inside)

    @property
    def nodes(self) -> list[subprocess.Popen]:
        """Those that are there, the head first."""
        return list(self._nodes)

    def traffic(self) -> int:
        """Bytes that have crossed the interfaces of the nodes; 0 where they share the host's."""
        return self.network.sent() if self.network else 0

    def remove(self, node: subprocess.Popen) -> None:
        """As if its machine was switched off."""
        kill_with_family(node)
        self._nodes.remove(node)

    def close(self) -> None:
        for node in reversed(self._nodes):
            kill_with_family(node)

    def _start(self, *options: str, within: Sequence[str] = ()) -> subprocess.Popen:
        environment = {**os.environ, **self.environment}
        if "--head" in options:
            del environment["RAY_ADDRESS"]
        agent = f"--dashboard-agent-listen-port={free_port()}"  # one that another cluster left behind has the usual one
        command = [*within, str(RAY), "start", "--block", agent, *options]
        with tempfile.TemporaryFile("w+") as said:
            node = subprocess.Popen(command, stdout=said, stderr=said, env=environment, start_new_session=True)
            self._nodes.append(node)
            end = time.monotonic() + START_S
            while "Ray runtime started" not in (text := _read(said)):
                assert node.poll() is None, f"ray start has failed: {text}"
                assert time.monotonic() < end, f"ray start takes too long: {text}"
                time.sleep(0.2)
        return node


def _read(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


@contextmanager
def raylets(*cpus: int, **environment: str) -> Iterator[Raylets]:
    """A head without CPUs, and a worker raylet with each of these numbers of them; all with variables beside ours."""
    network = None if Network.why_not() else Network()
    cluster = Raylets(network, environment)
    try:
        cluster.start_head()
        for count in cpus:
            cluster.add(count)
        yield cluster
    finally:
        cluster.close()
        if network:
            network.close()
        WRITTEN_DOWN.unlink(missing_ok=True)


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]
