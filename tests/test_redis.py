"""Redis under load: logged, copied while it stands still, attached to over and over; and its data is what was written to it."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import pytest

import dirtylog
from dirtylog.linux.process import ProcessMemory
from dirtylog.observe.rounds import rounds
from shadows import Shadow, no_swap
from victims import eventually, needs_victims, tracer_of, watched_mappings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = needs_victims

INTERVAL = 0.05
REQUESTS = 150_000


class Redis:
    """A client of a server on a Unix socket, with Redis's inline commands."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(30.0)
        try:
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise
        self._file = self._socket.makefile("rwb")

    def __call__(self, *lines: str) -> list[str]:
        """Send commands, and return an answer of one line, or of one string, to each."""
        self._file.write("".join(f"{line}\r\n" for line in lines).encode())
        self._file.flush()
        return [self._answer() for _ in lines]

    def _answer(self) -> str:
        line = self._file.readline().decode().strip()
        if line.startswith("$") and line != "$-1":
            return self._file.read(int(line[1:]) + 2)[:-2].decode()
        assert not line.startswith("-"), line
        return line

    def write(self, numbers: range) -> None:
        assert set(self(*(f"SET known:{number} {value(number)}" for number in numbers))) == {"+OK"}

    def verify(self, numbers: range) -> None:
        found = self(*(f"GET known:{number}" for number in numbers))
        assert found == [value(number) for number in numbers]

    def close(self) -> None:
        self._file.close()
        self._socket.close()


def value(number: int) -> str:
    return f"{number * 0x9E3779B97F4A7C15:x}" * (1 + number % 20)


def redis_command(folder: Path) -> list[str]:
    if not all(map(shutil.which, ("redis-server", "redis-benchmark"))):
        pytest.skip("no redis-server and redis-benchmark")
    options = {"port": "0", "unixsocket": str(folder / "socket"), "dir": str(folder), "save": "", "enable-debug-command": "yes"}
    return ["redis-server", *(word for key, chosen in options.items() for word in (f"--{key}", chosen))]


def connected(folder: Path) -> Redis:
    """Return a client as soon as the server listens."""
    clients: list[Redis] = []

    def try_once() -> bool:
        with suppress(OSError):
            clients.append(Redis(folder / "socket"))
        return bool(clients)

    eventually(try_once, "the server listens")
    return clients[0]


@contextmanager
def redis_server(folder: Path) -> Iterator[tuple[int, Redis]]:
    with subprocess.Popen(redis_command(folder), stdout=subprocess.DEVNULL) as server:
        try:
            client = connected(folder)
            yield server.pid, client
            client.close()
        finally:
            server.terminate()


def redis_load(folder: Path, requests: int = REQUESTS) -> subprocess.Popen[bytes]:
    options = (
        "-s",
        str(folder / "socket"),
        "-n",
        str(requests),
        "-r",
        "20000",
        "-d",
        "300",
        "-P",
        "8",
        "-t",
        "set,lpush,sadd,incr",
        "-q",
    )
    return subprocess.Popen(("redis-benchmark", *options), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish_load(load: subprocess.Popen[bytes]) -> None:
    said, _ = load.communicate(timeout=60)
    assert load.returncode == 0, said.decode()


def follow_redis(memory: ProcessMemory, log: dirtylog.DirtyLog, redis: Redis, load: subprocess.Popen[bytes], *, done: int) -> None:
    """Log a server until its load is done; from time to time write to it, and compare while it stands still."""
    shadow = Shadow(memory, log) if no_swap() else None
    number = 0
    while load.poll() is None:
        found = next(rounds(log, 1, INTERVAL)) if shadow is None else shadow.follow()  # type: ignore[func-returns-value]  # as it is
        assert found is None or found.dirty_pages >= 0
        time.sleep(0 if shadow is None else INTERVAL)
        number += 1
        redis.write(range(done, done + 100))
        done += 100
        if number % 10 == 5:
            redis("BGSAVE SCHEDULE")
        if number % 8 == 0 and shadow is not None:
            compare_paused(memory, shadow)
    if shadow is not None:
        compare_paused(memory, shadow)
        assert shadow.reports > 1000
    finish_load(load)
    assert memory.incomplete == ()
    redis.verify(range(done))


def compare_paused(memory: ProcessMemory, shadow: Shadow) -> None:
    memory.pause()
    shadow.follow()
    lost = shadow.compare().lost
    memory.resume()
    assert not lost, "\n".join(map(str, lost[:20]))


def test_a_copy_of_redis_under_load_is_redis(tmp_path: Path) -> None:
    with redis_server(tmp_path) as (pid, redis):
        redis.write(range(5000))
        load = redis_load(tmp_path)
        memory = dirtylog.open(f"pid:{pid}", port="uffd")
        assert isinstance(memory, ProcessMemory)
        with memory, dirtylog.DirtyLog(memory) as log:
            follow_redis(memory, log, redis, load, done=5000)
        assert watched_mappings(pid) == 0
        check_dump(tmp_path, redis)


def test_redis_is_logged_from_its_first_instruction(tmp_path: Path) -> None:
    with dirtylog.open(redis_command(tmp_path), port="uffd") as memory, dirtylog.DirtyLog(memory) as log:
        assert isinstance(memory, ProcessMemory)
        memory.resume()
        redis = connected(tmp_path)
        redis.write(range(1000))
        follow_redis(memory, log, redis, redis_load(tmp_path, REQUESTS // 3), done=1000)
        redis.close()
    assert memory.status == 0, "it ends at SIGTERM, as it should"


def test_redis_is_attached_to_and_left_over_and_over(tmp_path: Path) -> None:
    with redis_server(tmp_path) as (pid, redis):
        redis.write(range(5000))
        digest = redis("DEBUG DIGEST")
        assert redis("DEBUG DIGEST") == digest
        load = redis_load(tmp_path)
        attached = found = 0
        while load.poll() is None:
            with dirtylog.open(f"pid:{pid}", port="uffd") as memory, dirtylog.DirtyLog(memory) as log:
                found += sum(one.dirty_pages for one in rounds(log, 2, 0.01))
                attached += 1
            assert tracer_of(pid) == 0
        finish_load(load)
        assert attached >= 5
        assert found >= 5
        assert watched_mappings(pid) == 0
        redis.verify(range(5000))
        check_dump(tmp_path, redis)


def check_dump(folder: Path, redis: Redis) -> None:
    """What a forked child of it writes is whole: Redis reads it back, and has the same data."""
    eventually(lambda: "rdb_bgsave_in_progress:0" in redis("INFO persistence")[0], "it has saved")
    digest = redis("DEBUG DIGEST")
    assert redis("SAVE") == ["+OK"]
    assert redis("DEBUG RELOAD NOSAVE") == ["+OK"]
    assert redis("DEBUG DIGEST") == digest
    assert (folder / "dump.rdb").stat().st_size > 100_000
