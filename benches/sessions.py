"""Many sessions: what an idle one costs in memory, and how long a switchover stops them."""

import heapq
import json
import selectors
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


THINK = 0.001  # seconds between two statements of a probe: they must not take the processors
WATCH = 0.3  # seconds of probing before and after a move


def probe(probes, moving):
    """Statement after statement on each of the probes, by itself, while `moving()`."""
    ready = selectors.DefaultSelector()
    for session in probes:
        ready.register(session.socket, selectors.EVENT_READ, session)
        session.started = None
    due = [(0.0, number) for number in range(len(probes))]
    waiting = 0
    while waiting or moving():
        now = time.monotonic()
        while due and due[0][0] <= now and moving():
            session = probes[heapq.heappop(due)[1]]
            session.started = time.monotonic()
            session.send("select 1")
            waiting += 1
        for key, _ in ready.select(THINK):
            session = key.data
            if session.started is None:
                raise ServerError("an answer that nobody asked for, or the end of the connection")
            session.ready()
            now = time.monotonic()
            session.worst = max(session.worst, now - session.started)
            session.started = None
            waiting -= 1
            heapq.heappush(due, (now + THINK, probes.index(session)))
        if waiting and time.monotonic() - min(s.started for s in probes if s.started) > 60:
            raise ServerError("a session was stopped for over a minute")
    ready.close()


def until(move, more):
    """A function that is true until `more` seconds behind the end of a process."""
    ended = None

    def moving():
        nonlocal ended
        if ended is None and move.poll() is not None:
            ended = time.monotonic()
        return ended is None or time.monotonic() < ended + more

    return moving


def centile(values, part):
    return sorted(values)[max(0, -(-len(values) * part // 100) - 1)]


def one_switchover(cluster, count):
    """Holds `count` sessions, every tenth in a transaction, over one switchover.

    Returns the longest time that a statement of each of the probing sessions took, in
    milliseconds. All sessions have to answer afterwards, and the transactions have to commit.
    """
    sessions = open_sessions(cluster.proxy, count)
    busy = sessions[::10] if count >= 10 else sessions
    for number, session in enumerate(busy):
        session.query("begin")
        session.query(f"insert into bench_pause values ({number})")
    # Up to five of either kind work all the while; the others sit in their state.
    idle = [session for session in sessions if session not in busy]
    probes = busy[:5] + idle[:5]
    for session in probes:
        session.query("select 1")
        session.worst = 0.0
    begun = time.monotonic()
    probe(probes, lambda: time.monotonic() < begun + WATCH)
    for session in probes:
        session.worst = 0.0
    move = cluster.switchover()
    probe(probes, until(move, WATCH))
    out, err = move.communicate()
    if move.returncode != 0:
        raise ServerError(f"switchover failed: {out}{err}")
    pauses = [session.worst * 1000 for session in probes]
    for session in busy:
        session.query("commit")
    for session in sessions:
        if session.query("select 42") != "42":
            raise ServerError("a session gave a wrong answer after the switchover")
    kept = int(sessions[0].query("select count(*) from bench_pause"))
    if kept != len(busy):
        raise ServerError(f"{kept} rows of {len(busy)} after the switchover")
    sessions[0].query("truncate bench_pause")
    for session in sessions:
        session.close()
    return pauses, json.loads(out)


def switchover_pause(cluster, count, repeats, say):
    """How long sessions were stopped, over `repeats` switchovers, in milliseconds; and where the
    time went in the middle one."""
    setup = Session(cluster.proxy.raw(), cluster.proxy.user, cluster.proxy.database)
    setup.query("create table if not exists bench_pause (n int)")
    setup.close()
    seen, worst, phases = [], [], {}
    for turn in range(repeats):
        cluster.await_redundancy()
        pauses, move = one_switchover(cluster, count)
        seen.extend(pauses)
        worst.append(max(pauses))
        for phase in move.get("operation", move).get("phases", []):
            phases.setdefault(phase["phase"], []).append(phase["micros"] / 1000)
        say(f"{count} sessions, switchover {turn + 1} of {repeats}: {max(pauses):.0f} ms")
    return {
        "switchovers": repeats,
        "median": statistics.median(seen),
        "p99": centile(seen, 99),
        "worst": statistics.median(worst),
        "phases": {name: statistics.median(times) for name, times in phases.items()},
    }
