"""What a log in rounds says to Prometheus. Names and units follow its conventions: base units, counters that end in _total."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from dirtylog.errors import InvalidArgumentError, UnsupportedError
from dirtylog.observe.footprint import Footprint

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dirtylog.memory import Memory
    from dirtylog.observe.rounds import Round

_GET_BUCKETS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


class Metrics:
    """The metrics of one target, served over HTTP by :meth:`serving`."""

    def __init__(self, registry: Any, target: str) -> None:  # noqa: ANN401 - of a library that is an extra
        from prometheus_client import Counter, Gauge, Histogram, Info  # noqa: PLC0415 - an extra

        self._target = target
        self._info = Info("dirtylog_target", "The target, and how its writes are logged.", registry=registry)
        self._rounds = Counter("dirtylog_rounds", "Rounds of the log.", registry=registry)
        self._pages = Counter("dirtylog_dirty_pages", "Pages reported dirty, each once a round.", registry=registry)
        self._bytes = Counter("dirtylog_dirty_bytes", "Bytes of the pages reported dirty, each once a round.", registry=registry)
        self._rate = Gauge(
            "dirtylog_dirty_rate_bytes_per_second", "Bytes reported dirty in the last round, by its length.", registry=registry
        )
        self._round = Gauge("dirtylog_round_seconds", "Length of the last round, which the rate depends on.", registry=registry)
        self._working_set = Gauge(
            "dirtylog_working_set_bytes", "Distinct bytes reported dirty since the log began.", registry=registry
        )
        self._get_seconds = Histogram(
            "dirtylog_get_seconds", "Time that the gets of a round took.", buckets=_GET_BUCKETS, registry=registry
        )
        self._lost = Gauge(
            "dirtylog_coverage_lost", "1 when writes may have been missed beyond the known blind spots, else 0.", registry=registry
        )
        self._footprint = Footprint()
        self._memory: Memory | None = None

    @classmethod
    @contextlib.contextmanager
    def serving(cls, port: int | None, address: str, target: str) -> Iterator[Metrics | NoMetrics]:
        """Serve on an address and port until the context is left; without a port serve nothing."""
        if port is None:
            yield NoMetrics()
            return
        try:
            from prometheus_client import CollectorRegistry, start_http_server  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise UnsupportedError(
                "metrics need prometheus-client", remedy="install it: pip install 'dirtylog[metrics]'"
            ) from error
        registry = CollectorRegistry()
        metrics = cls(registry, target)
        try:
            server, thread = start_http_server(port, address, registry)
        except OSError as error:
            raise InvalidArgumentError(
                f"metrics cannot be served on {address} port {port}", errno=error.errno, reason=error.strerror
            ) from error
        try:
            yield metrics
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def listeners(self, memory: Memory) -> list[Metrics]:
        """Return who is to be told of each round of this memory's log."""
        self._memory = memory
        self._info.info({"target": self._target, "port": memory.port.name, "exactness": memory.exactness.value})
        return [self]

    def add(self, found: Round) -> None:
        """Count a round."""
        self._footprint.add(found.seconds, found.dirty)
        self._rounds.inc()
        self._pages.inc(found.dirty_pages)
        self._bytes.inc(found.dirty_bytes)
        self._rate.set(found.dirty_bytes / found.seconds)
        self._round.set(found.seconds)
        self._working_set.set(self._footprint.nbytes)
        self._get_seconds.observe(found.get_seconds)
        self._lost.set(1 if self._memory is not None and self._memory.incomplete else 0)


class NoMetrics:
    """Serves nothing."""

    def listeners(self, _memory: Memory) -> list[Metrics]:
        """Return nobody."""
        return []
