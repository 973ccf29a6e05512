"""PostgreSQL under load: its processes share memory, and a log of one of them says that it sees only what that one writes there."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

import dirtylog
from dirtylog.linux.process import ProcessMemory
from dirtylog.observe.rounds import rounds
from shadows import Shadow, no_swap
from victims import eventually, needs_root, needs_victims, watched_mappings

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [needs_victims, needs_root]

INTERVAL = 0.05
SECONDS = 6
LONG = "100"
OWNER = "nobody"


class Server(NamedTuple):
    """A running server: its programs, where it is, and its first process."""

    programs: Path
    folder: Path
    pid: int

    def ask(self, statement: str) -> list[str]:
        """Return the rows of a query."""
        told = self._run("psql", "-XAtc", statement)
        return told.stdout.split()

    def bench(self, *options: str) -> subprocess.Popen[str]:
        """Start pgbench; without a vacuum, which would forget the history of earlier runs."""
        words = (self.programs / "pgbench", "-h", self.folder, "-U", OWNER, "-n", *options, "postgres")
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # type: ignore[arg-type]  # it is a process

    def prepare(self) -> bool:
        """Make pgbench's tables; return whether the server could be asked to."""
        made = self.bench("-i", "-q")
        made.communicate()
        return made.returncode == 0

    def _run(self, program: str, *options: str) -> subprocess.CompletedProcess[str]:
        words = (self.programs / program, "-h", self.folder, "-U", OWNER, "-d", "postgres", *options)
        return subprocess.run(words, capture_output=True, text=True, check=True)  # type: ignore[arg-type]  # it is a process

    def check(self) -> None:
        """Every transaction of pgbench adds one number to four sums; and every index is whole."""
        sums = ("sum(abalance) from pgbench_accounts", "sum(tbalance) from pgbench_tellers", "sum(bbalance) from pgbench_branches")
        found = {self.ask(f"select {one}")[0] for one in (*sums, "sum(delta) from pgbench_history")}
        assert len(found) == 1, found
        if (self.programs / "pg_amcheck").exists():
            self._run("pg_amcheck", "--install-missing", "--heapallindexed", "--parent-check")


def programs() -> Path:
    """Return where the server's programs are; skip the test where there are none."""
    found = [
        *sorted(Path("/usr/lib/postgresql").glob("*/bin")),
        *(Path(one).parent for one in filter(None, [shutil.which("initdb")])),
    ]
    for folder in reversed(found):
        if all((folder / name).exists() for name in ("initdb", "postgres", "pgbench", "psql")):
            return folder
    pytest.skip("no PostgreSQL server with pgbench")


@contextmanager
def as_owner(*words: str | Path, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    owner = pwd.getpwnam(OWNER)
    log = folder / "log"
    with (
        log.open("ab") as file,
        subprocess.Popen(
            words, user=owner.pw_uid, group=owner.pw_gid, extra_groups=[], cwd=folder, stdout=file, stderr=file
        ) as process,
    ):
        yield process


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    found = programs()
    with tempfile.TemporaryDirectory(prefix="dirtylog-pg-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        shutil.chown(folder, OWNER)
        data = folder / "data"
        initdb = (
            found / "initdb",
            "-D",
            data,
            "-U",
            OWNER,
            "-A",
            "trust",
            "--no-sync",
            "--data-checksums",
            "--no-locale",
            "-E",
            "UTF8",
        )
        with as_owner(*initdb, folder=folder) as made:
            assert made.wait() == 0, (folder / "log").read_text()
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(folder),
            "shared_buffers": "16MB",
            "huge_pages": "off",
            "checkpoint_timeout": "30s",
            "max_wal_size": "48MB",
            "fsync": "off",
        }
        options = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
        with as_owner(found / "postgres", "-D", data, *options, folder=folder) as running:
            try:
                server = Server(found, folder, running.pid)
                eventually(lambda: list(folder.glob(".s.PGSQL.*[0-9]")) != [], "the server listens")
                eventually(server.prepare, "the server answers")
                yield server
            finally:
                # A fast end: it writes what it has, and leaves.
                running.send_signal(2)
                assert running.wait(60) == 0, (folder / "log").read_text()
        if (found / "pg_checksums").exists():
            with as_owner(found / "pg_checksums", "--check", "-D", data, folder=folder) as checked:
                assert checked.wait() == 0, (folder / "log").read_text()


def backends(server: Server, kind: str) -> list[int]:
    column = "application_name" if kind == "pgbench" else "backend_type"
    return [int(pid) for pid in server.ask(f"select pid from pg_stat_activity where {column} = '{kind}'")]  # noqa: S608 - words of ours


def end(load: subprocess.Popen[str]) -> None:
    """End a load that has gone well so far: what it is in the middle of does not happen."""
    assert load.poll() is None, load.communicate()
    load.terminate()
    load.communicate(timeout=60)


def log_for_a_while(pid: int, seconds: float, found: dict[str, object]) -> None:
    """Log a process in rounds, and note what was reported, how it ended, and what was not seen."""
    count = 0
    with dirtylog.open(f"pid:{pid}", port="uffd") as memory, dirtylog.DirtyLog(memory) as log:
        began = time.monotonic()
        try:
            for one in rounds(log, None, INTERVAL):
                count += one.dirty_pages
                found["incomplete"] = memory.incomplete
                if time.monotonic() - began > seconds:
                    break
            found["ended"] = "we left"
        except dirtylog.TargetGoneError:
            found["ended"] = "gone"
    found["pages"] = count


def test_a_backend_and_the_checkpointer_are_logged_under_load(server: Server) -> None:
    load = server.bench("-c", "4", "-j", "2", "-T", str(SECONDS))
    eventually(lambda: len(backends(server, "pgbench")) >= 4, "the load is on")
    pids = {"backend": backends(server, "pgbench")[0], "checkpointer": backends(server, "checkpointer")[0]}
    found: dict[str, dict[str, object]] = {name: {} for name in pids}
    threads = [
        threading.Thread(target=log_for_a_while, args=(pid, SECONDS + 20 if name == "backend" else SECONDS, found[name]))
        for name, pid in pids.items()
    ]
    for thread in threads:
        thread.start()
    server.ask("checkpoint")
    for thread in threads:
        thread.join()
    said, _ = load.communicate(timeout=60)
    assert load.returncode == 0, said
    for name, one in found.items():
        assert isinstance(one["pages"], int)
        assert one["pages"] > 100, (name, one)
        assert "shared" in str(one["incomplete"]), (name, one)
    assert found["backend"]["ended"] == "gone", "it ends with its connection"
    assert found["checkpointer"]["ended"] == "we left"
    assert watched_mappings(pids["checkpointer"]) == 0
    server.check()


@pytest.mark.skipif(not no_swap(), reason="what is swapped out would be taken for not there")
def test_a_copy_of_a_backend_s_own_memory_is_its_memory(server: Server) -> None:
    load = server.bench("-c", "2", "-T", LONG)
    eventually(lambda: len(backends(server, "pgbench")) >= 2, "the load is on")
    pid = backends(server, "pgbench")[0]
    with dirtylog.open(f"pid:{pid}", port="uffd", maps=["private"]) as memory, dirtylog.DirtyLog(memory) as log:
        assert isinstance(memory, ProcessMemory)
        assert memory.incomplete == (), "what is shared was not chosen"
        memory.pause()
        shadow = Shadow(memory, log)
        memory.resume()
        for _ in range(6):
            for _ in range(5):
                time.sleep(INTERVAL / 2)
                shadow.follow()
            memory.pause()
            shadow.follow()
            lost = shadow.compare().lost
            memory.resume()
            assert not lost, "\n".join(map(str, lost[:20]))
        assert shadow.reports > 100
    end(load)
    server.check()


def test_every_process_of_a_server_is_attached_to_and_left_under_load(server: Server) -> None:
    load = server.bench("-c", "4", "-T", LONG)
    eventually(lambda: len(backends(server, "pgbench")) >= 4, "the load is on")
    children = [int(pid) for pid in Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text(encoding="ascii").split()]
    logged = 0
    for pid in (server.pid, *children):
        try:
            with dirtylog.open(f"pid:{pid}", port="uffd") as memory, dirtylog.DirtyLog(memory) as log:
                assert all(one.dirty_pages >= 0 for one in rounds(log, 2, 0.02))
                logged += 1
        except dirtylog.TargetGoneError:
            continue
    end(load)
    assert logged >= 8
    assert all(watched_mappings(pid) == 0 for pid in (server.pid, *children) if os.path.exists(f"/proc/{pid}"))  # noqa: PTH110
    server.check()
