"""Sessions with state: how long a move stops them, what they cost, how fast their tables move.

Every figure is of what the clients saw; afterwards each session's state is read and compared.
"""

import heapq
import json
import random
import selectors
import statistics
import time

from servers import private_bytes, resident_bytes
from sessions import centile, open_sessions, until
from wire import ServerError, Session

STATEMENTS = 10  # prepared by each session
TABLES = 3  # temporary, of each session
ROWS = 100  # of each of them
THINK = 10.0  # seconds, in the mean, between two statements of one session
WATCH = 1.0  # seconds of statements before a move, and behind it

# What a session has, in one number for each table and one for the prepared statements.
PROOF = " union all ".join(
    f"select {n}, count(*)::int, sum(id)::int, md5(string_agg(note, ',' order by id)) from t{n}"
    for n in range(TABLES)
)
PROOF = f"select md5(string_agg(p::text, ';' order by p)) from ({PROOF}) p"


def make_state(session, number):
    for n in range(STATEMENTS):
        session.query(f"prepare p{n} (int) as select $1 + {n} + {number}")
    for n in range(TABLES):
        session.query(f"create temp table t{n} (id int primary key, note text default 'none')")
        session.query(f"insert into t{n} select i, 'note ' || i + {number} from generate_series(1, {ROWS}) i")
    session.proof = session.query(PROOF)


def check_state(session, number):
    """Whether all of it is there as it was."""
    for n in range(STATEMENTS):
        if session.query(f"execute p{n} (1)") != str(1 + n + number):
            raise ServerError(f"session {number}: prepared statement {n} is another one")
    if session.query(PROOF) != session.proof:
        raise ServerError(f"session {number}: its temporary tables are not what they were")


def drive(sessions, moving):
    """A statement over a temporary table on each session, again and again, while `moving()`."""
    ready = selectors.DefaultSelector()
    for session in sessions:
        ready.register(session.socket, selectors.EVENT_READ, session)
        session.started = None
    now = time.monotonic()
    due = [(now + random.uniform(0, THINK), number) for number in range(len(sessions))]
    heapq.heapify(due)
    place = {id(session): number for number, session in enumerate(sessions)}
    waiting = 0
    begun = now
    while waiting or moving():
        now = time.monotonic()
        while due and due[0][0] <= now and moving():
            session = sessions[heapq.heappop(due)[1]]
            session.started = time.monotonic()
            session.send("select count(*) from t1")
            waiting += 1
        pause = min(max(due[0][0] - now, 0), 0.01) if due else 0.01
        for key, _ in ready.select(pause):
            session = key.data
            if session.ready() != str(ROWS):
                raise ServerError("a temporary table has lost rows")
            now = time.monotonic()
            session.worst = max(session.worst, now - session.started)
            session.started = None
            waiting -= 1
            heapq.heappush(due, (now + random.uniform(0.5, 1.5) * THINK, place[id(session)]))
        if now - begun > 120:
            raise ServerError("sessions were stopped for two minutes")
    ready.close()


def one_move(cluster, count):
    """All of `count` sessions speak now and then over one switchover; their pauses, in milliseconds,
    the longest statement before it, which sessions are not what they were, and the move."""
    sessions = open_sessions(cluster.proxy, count)
    for number, session in enumerate(sessions):
        make_state(session, number)
        session.worst = 0.0
    # Tables are read while their session is idle.
    time.sleep(2 + count / 50)
    begun = time.monotonic()
    drive(sessions, lambda: time.monotonic() < begun + WATCH)
    steady = max(session.worst for session in sessions) * 1000
    for session in sessions:
        session.worst = 0.0
    move = cluster.switchover()
    drive(sessions, until(move, WATCH + THINK))
    out, err = move.communicate()
    if move.returncode != 0:
        raise ServerError(f"switchover failed: {out}{err}")
    pauses = [session.worst * 1000 for session in sessions]
    failed = []
    for number, session in enumerate(sessions):
        try:
            check_state(session, number)
        except ServerError as error:
            failed.append(str(error))
    for session in sessions:
        session.close()
    return pauses, steady, failed, json.loads(out)


def moves(cluster, count, repeats, say):
    """The pauses of all sessions over `repeats` switchovers."""
    seen, steady, failed, phases = [], [], [], {}
    for turn in range(repeats):
        cluster.await_redundancy()
        pauses, calm, wrong, result = one_move(cluster, count)
        for phase in result.get("operation", result).get("phases", []):
            phases.setdefault(phase["phase"], []).append(phase["micros"] / 1000)
        seen.extend(pauses)
        steady.append(calm)
        failed.extend(wrong)
        say(
            f"{count} sessions with state, switchover {turn + 1} of {repeats}: median "
            f"{statistics.median(pauses):.0f}, p95 {centile(pauses, 95):.0f}, p99 {centile(pauses, 99):.0f} ms, "
            f"{len(wrong)} failed {wrong[:3]}"
        )
    return {
        "switchovers": repeats,
        "migrations": len(seen),
        "failed": len(failed),
        "p50": centile(seen, 50),
        "p95": centile(seen, 95),
        "p99": centile(seen, 99),
        "steady": statistics.median(steady),
        "phases": {name: statistics.median(times) for name, times in phases.items()},
    }


def memory(cluster, count):
    """Bytes that each session with state adds: to the proxy, and to its server process."""
    sessions = open_sessions(cluster.proxy, 2 * count)
    backends, resident = [], []
    # What the first half needed is there for the second.
    for half in (sessions[:count], sessions[count:]):
        resident.append(resident_bytes(cluster.pid))
        for number, session in enumerate(half):
            make_state(session, number)
            backends.append(int(session.query("select pg_backend_pid()")))
        time.sleep(2 + count / 50)
    proxy = (resident_bytes(cluster.pid) - resident[1]) / count
    backend = statistics.mean(private_bytes(pid) for pid in backends[-50:])
    for session in sessions:
        session.close()
    return {"proxy": proxy, "backend": backend}
