"""Many sessions: what an idle one costs in memory, and how long a switchover stops them."""

import json
import statistics
import time

from servers import resident_bytes
from wire import ServerError, Session


def open_sessions(address, count):
    sessions = []
    try:
        for _ in range(count):
            sessions.append(Session(address.raw(), address.user, address.database))
    except (ServerError, OSError) as error:
        for session in sessions:
            session.close()
        raise ServerError(f"only {len(sessions)} of {count} sessions: {error}") from None
    return sessions


def idle_memory(pid, address, count):
    """Bytes of the process that each of `count` idle sessions adds."""
    warm = open_sessions(address, 20)
    for session in warm:
        session.query("select 1")
    before = resident_bytes(pid)
    sessions = open_sessions(address, count)
    for session in sessions:
        session.query("select 1")
    time.sleep(1)
    after = resident_bytes(pid)
    for session in warm + sessions:
        session.close()
    return (after - before) / count


def all_at_once(probes):
    """One statement on each of them, all in flight together."""
    for session in probes:
        session.started = time.monotonic()
        session.send("select 1")
    for session in probes:
        session.ready()
        session.worst = max(session.worst, time.monotonic() - session.started)


def one_switchover(cluster, count):
    """Holds `count` sessions, every tenth in a transaction, over one switchover.

    Returns the longest time that a statement of each of the probing sessions took, in
    milliseconds. All sessions have to answer afterwards, and the transactions have to commit.
    """
    sessions = open_sessions(cluster.proxy, count)
    busy = sessions[:: 10] if count >= 10 else sessions
    for number, session in enumerate(busy):
        session.query("begin")
        session.query(f"insert into bench_pause values ({number})")
    # Up to five of either kind work all the while; the others sit in their state.
    idle = [session for session in sessions if session not in busy]
    probes = busy[:5] + idle[:5]
    for session in probes:
        session.query("select 1")
        session.worst = 0.0
    move = cluster.switchover()
    while move.poll() is None:
        all_at_once(probes)
    out, err = move.communicate()
    if move.returncode != 0:
        raise SystemExit(f"bench: switchover failed: {out}{err}")
    pauses = [session.worst * 1000 for session in probes]
    for session in busy:
        session.query("commit")
    for session in sessions:
        if session.query("select 42") != "42":
            raise SystemExit("bench: a session gave a wrong answer after the switchover")
    kept = int(sessions[0].query("select count(*) from bench_pause"))
    if kept != len(busy):
        raise SystemExit(f"bench: {kept} rows of {len(busy)} after the switchover")
    sessions[0].query("truncate bench_pause")
    for session in sessions:
        session.close()
    return pauses, json.loads(out)


def switchover_pause(cluster, count, repeats):
    """Median and worst pause over `repeats` switchovers, in milliseconds."""
    setup = Session(cluster.proxy.raw(), cluster.proxy.user, cluster.proxy.database)
    setup.query("create table if not exists bench_pause (n int)")
    setup.close()
    seen = []
    for _ in range(repeats):
        pauses, _ = one_switchover(cluster, count)
        seen.extend(pauses)
        time.sleep(3)  # the old primary rejoins
    return {"median": statistics.median(seen), "max": max(seen), "switchovers": repeats}
