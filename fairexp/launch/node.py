"""This machine's part in a run: which of its nodes it is, where the ranks meet, over which network interface they talk."""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import struct
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fairexp.config.rundir import RunDir, write_atomically
from fairexp.errors import RunError

MEET_WITHIN_S = 600.0  # the first node's task may start minutes before the last one's


@dataclass(frozen=True)
class Node:
    """One machine of a run. `restart` counts how often the scheduler has requeued the job."""

    kind: str
    index: int = 0
    hosts: tuple[str, ...] = field(default_factory=lambda: (socket.gethostname(),))
    job_id: str | None = None
    restart: int = 0
    submission: str | None = None

    @property
    def first(self) -> bool:
        return self.index == 0

    @property
    def host(self) -> str:
        return self.hosts[self.index]


def on_slurm(submission: str | None, environment: Mapping[str, str]) -> Node:
    """The node that Slurm's variables describe: one task a node."""
    array, element = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    return Node(
        kind="slurm",
        index=int(environment.get("SLURM_NODEID", "0")),
        hosts=tuple(expand(environment.get("SLURM_JOB_NODELIST") or socket.gethostname())),
        # of an array's element: the number alone also names the whole array when it is the last element's
        job_id=f"{array}_{element}" if array else environment["SLURM_JOB_ID"],
        restart=int(environment.get("SLURM_RESTART_COUNT", "0")),
        submission=submission,
    )


def expand(node_list: str) -> list[str]:
    """Slurm's `n[1-3,07],gpu5` as names."""
    names: list[str] = []
    for prefix, ranges, suffix in re.findall(r"([^,\[\]]+)(?:\[([^\]]*)\])?([^,\[\]]*)", node_list):
        if not ranges:
            names.append(prefix + suffix)
            continue
        for part in ranges.split(","):
            low, _, high = part.partition("-")
            names += [f"{prefix}{number:0{len(low)}d}{suffix}" for number in range(int(low), int(high or low) + 1)]
    return names


def meet(run_dir: RunDir, node: Node, attempt: int | None) -> tuple[dict[str, Any], socket.socket | None]:
    """Where the ranks of an attempt meet, the same on every node, and on the first one the socket that listens there.

    The first node binds a port that is free and writes it into the run folder; the others read it there. The socket stays
    open until rank 0 takes it over, so nobody else can take the port; the token keeps another job's ranks out. Without an
    attempt on the first node there is none on the others: they find None under "attempt".
    """
    file = run_dir.submit / f"meeting_{node.job_id}.{node.restart}.json"
    if node.first:
        if attempt is None:
            write_atomically(file, json.dumps({"attempt": None}) + "\n")
            return {"attempt": None}, None
        listener = socket.create_server(("", 0), backlog=1024)
        address = address_towards(node.hosts[1])
        place = {
            "address": address,
            "port": listener.getsockname()[1],
            "token": uuid.uuid4().hex,
            "attempt": attempt,
        }
        write_atomically(file, json.dumps(place) + "\n")
        return place, listener
    deadline = time.monotonic() + MEET_WITHIN_S
    while True:
        try:
            return json.loads(file.read_text(encoding="utf-8")), None
        except FileNotFoundError:
            if time.monotonic() > deadline:
                raise RunError(f"{node.hosts[0]} did not say where to meet within {MEET_WITHIN_S:.0f} s") from None
            time.sleep(0.2)


def address_towards(host: str) -> str:
    """This machine's own address on the way to `host`."""
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(host, 9, socket.AF_INET, socket.SOCK_DGRAM)
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # a datagram socket sends nothing
            return probe.getsockname()[0]
    except OSError as error:
        raise RunError(f"the node {host} can't be found from {socket.gethostname()}: {error}") from error


def interface_towards(host: str) -> str | None:
    """The network interface on the way to `host`; gloo would take the one of this machine's own name, which Debian gives to
    the loopback interface."""
    ours = address_towards(host)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                packed = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(packed[20:24]) == ours:
                return name
    return "lo" if ours.startswith("127.") else None


def environment_of(node: Node, place: Mapping[str, Any]) -> dict[str, str]:
    """The variables by which the ranks of several nodes find each other."""
    peer = node.hosts[1] if node.first else node.hosts[0]
    interface = interface_towards(peer)
    found = {
        "MASTER_ADDR": str(place["address"]),
        "MASTER_PORT": str(place["port"]),
        "RENDEZVOUS_TOKEN": str(place["token"]),
    }
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if interface and name not in os.environ:
            found[name] = interface
    return found
