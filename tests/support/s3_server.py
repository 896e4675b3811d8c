"""S3 servers on loopback for tests: Ceph's radosgw, moto's, and a proxy that does them harm."""

import asyncio
import hashlib
import os
import secrets
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

PROGRAMS = ("radosgw", "radosgw-admin", "ceph-mon", "ceph-osd", "ceph-authtool", "ceph")
LEFT_OUT = (
    "no radosgw on this machine: apt-get install -y --no-install-recommends radosgw ceph-mon "
    "ceph-osd ceph-common"
)


class Keys(NamedTuple):
    """What a user signs requests with."""

    id: str
    secret: str

    def environment(self) -> dict[str, str]:
        """The variables that give them to a client."""
        return {"AWS_ACCESS_KEY_ID": self.id, "AWS_SECRET_ACCESS_KEY": self.secret}


class Server(NamedTuple):
    """An S3 server that is up."""

    endpoint: str
    keys: Keys
    reader: Keys  # of a user without rights, as far as no policy gives them

    def environment(self) -> dict[str, str]:
        """All that a client needs to know."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
            # Without keys there is no machine role to ask for.
            "AWS_EC2_METADATA_DISABLED": "true",
            **self.keys.environment(),
        }


def has_radosgw() -> bool:
    """Whether all of its programs are installed."""
    return all(shutil.which(name) for name in PROGRAMS)


@contextmanager
def radosgw(folder: Path) -> Iterator[Server]:
    """Ceph's radosgw with its data in `folder`, until the block ends."""
    port, monitor = free_port(), free_port()
    keys, reader = (Keys(secrets.token_hex(8), secrets.token_hex(20)) for _ in range(2))
    script = Path(__file__).with_name("radosgw.sh")
    command = ["bash", script, folder / "ceph", port, monitor, *keys, *reader]
    with _running([str(word) for word in command], folder / "radosgw.out", port, limit_s=180):
        yield Server(f"http://127.0.0.1:{port}", keys, reader)


@contextmanager
def moto(folder: Path) -> Iterator[Server]:
    """moto's S3 server, which takes any key, until the block ends."""
    port, keys = free_port(), Keys("any", "key")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _running(command, folder / "moto.out", port, limit_s=90):
        yield Server(f"http://127.0.0.1:{port}", keys, keys)


@contextmanager
def _running(command: list[str], output: Path, port: int, *, limit_s: float) -> Iterator[None]:
    with open(output, "w") as log:
        process = subprocess.Popen(
            command, start_new_session=True, stdin=subprocess.PIPE, stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + limit_s
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[:3]} did not start:\n{output.read_text()[-3000:]}")
            time.sleep(0.2)
        yield
    finally:
        # Its own process group: all that it started, and nobody else's.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def free_port() -> int:
    """A TCP port on loopback that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Proxy:
    """Stands between a client and an S3 server and harms a share of the requests.

    Which ones is a function of the seed, the request and how often it came, and not of time.
    """

    FAULTS = ("503", "reset before", "reset after", "cut", "stall")

    def __init__(
        self, upstream: str, *, seed: int = 0, share: float = 0.0, stall_s: float = 0.0
    ) -> None:
        self.upstream = upstream.removeprefix("http://").split(":")
        self.seed, self.share, self.stall_s = seed, share, stall_s
        self.done: Counter[str] = Counter()
        self._seen: Counter[bytes] = Counter()

    def _fault(self, request: bytes) -> str | None:
        line = request.split(b"\r\n", 1)[0]
        self._seen[line] += 1
        text = f"{self.seed} {line!r} {self._seen[line]}".encode()
        drawn = int.from_bytes(hashlib.sha256(text).digest()[:4]) / 2**32
        if drawn >= self.share:
            return None
        return self.FAULTS[int(drawn / self.share * len(self.FAULTS))]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._one(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            pass  # the client went away
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request; the connection is closed after it."""
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head[:-4].split(b"\r\n")
        headers = {n.lower(): v.strip() for n, _, v in (x.partition(b":") for x in lines[1:])}
        fault = self._fault(head)
        self.done[fault or "passed"] += 1
        if headers.pop(b"expect", None):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readexactly(int(headers.get(b"content-length", b"0")))
        if fault == "503":
            text = b"<Error><Code>SlowDown</Code></Error>"
            head = b"HTTP/1.1 503 Slow Down\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
            writer.write(head % len(text) + text)
            return await writer.drain()
        if fault == "stall":
            return await asyncio.sleep(self.stall_s)
        if fault == "reset before":
            return _reset(writer)
        answer = await self._ask(lines, body)
        if fault == "reset after":
            return _reset(writer)
        start = answer.index(b"\r\n\r\n") + 4
        if fault == "cut" and len(answer) > start:
            answer = answer[: (start + len(answer)) // 2]
        writer.write(answer)
        await writer.drain()

    async def _ask(self, lines: list[bytes], body: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(self.upstream[0], int(self.upstream[1]))
        kept = [line for line in lines if not line.lower().startswith((b"expect:", b"connection:"))]
        writer.write(b"\r\n".join([*kept, b"Connection: close", b"", b""]) + body)
        answer = await reader.read()
        writer.close()
        return answer

    @contextmanager
    def running(self, certificate: Path | None = None) -> Iterator[str]:
        """The endpoint of the proxy; with TLS where there is a `certificate` with its key."""
        tls = None
        if certificate is not None:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.load_cert_chain(certificate)
        loop = asyncio.new_event_loop()
        server = loop.run_until_complete(
            asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=tls, limit=2**20)
        )
        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()
        try:
            port = server.sockets[0].getsockname()[1]
            yield f"{'https' if tls else 'http'}://127.0.0.1:{port}"
        finally:
            loop.call_soon_threadsafe(server.close)
            for task in asyncio.all_tasks(loop):
                loop.call_soon_threadsafe(task.cancel)
            time.sleep(0.1)
            loop.call_soon_threadsafe(loop.stop)
            thread.join()


def _reset(writer: asyncio.StreamWriter) -> None:
    # Closing with a linger time of 0 sends RST instead of FIN.
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
