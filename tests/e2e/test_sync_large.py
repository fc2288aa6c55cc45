"""Ten million points of one spool: flat memory, and the last million as quick as the first."""

from __future__ import annotations

import re
import sqlite3
import time
import uuid
from contextlib import closing
from typing import NamedTuple

import psutil
import pytest

from tests.support.lineage import only, show
from tests.support.stores import new_card, start_sync, write_spool

POINTS = 10_000_000
#: What a sync may hold more at its end than at its beginning: the allocator's freedom.
GROWTH_BYTES_MAX = 24 << 20


class Sample(NamedTuple):
    time_s: float
    cpu_s: float
    resident_bytes: int
    points: int


@pytest.mark.torture
@pytest.mark.timeout(3 * 3600)
def test_ten_million_points_take_flat_memory_and_a_steady_rate(tmp_path, mlflow_server):
    run_id = uuid.uuid4().hex
    spool = tmp_path / "spool"
    write_spool(
        spool,
        new_card(run_id),
        points=POINTS,
        segment_bytes_max=16 << 20,
        records_per_frame=500,
        is_counted=True,
    )
    call = start_sync(spool, "--tracking-uri", mlflow_server.uri)
    process, samples = psutil.Process(call.pid), []
    assert call.stderr is not None
    for line in call.stderr:
        told = re.match(r"syncing: ([\d,]+) of", line)
        if told:
            times = process.cpu_times()
            samples.append(
                Sample(
                    time.monotonic(),
                    times.user + times.system,
                    process.memory_info().rss,
                    2 * int(told[1].replace(",", "")),
                )
            )
    assert call.wait(60) == 0
    first = [each for each in samples if each.points <= POINTS // 10]
    last = [each for each in samples if each.points >= POINTS - POINTS // 10]
    for name, part in (("first", first), ("last", last)):
        points = part[-1].points - part[0].points
        seconds, cpu_s = part[-1].time_s - part[0].time_s, part[-1].cpu_s - part[0].cpu_s
        show(f"{name} million: {points / seconds:,.0f} points/s, {cpu_s / points * 1e6:.2f} us CPU")
    peak = max(each.resident_bytes for each in samples)
    show(f"memory: {first[0].resident_bytes:,} at first, {peak:,} at most")
    assert peak - first[-1].resident_bytes < GROWTH_BYTES_MAX
    mlflow_run_id = only(mlflow_server, run_id).info.run_id
    with closing(sqlite3.connect(mlflow_server.database)) as database:
        count = "SELECT count(*) FROM metrics WHERE run_uuid = ?"
        assert database.execute(count, (mlflow_run_id,)).fetchone() == (POINTS,)
