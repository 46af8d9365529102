"""What a move costs by the amount: rows of a temporary table, statements of open transactions.

Every figure is of what the clients saw; afterwards what they have is read and compared.
"""

import json
import statistics
import subprocess
import time

from servers import Address
from sessions import open_sessions
from wire import ServerError

IDLE = 0.5  # seconds without a statement, in which tables are read


def move(cluster):
    """A switchover from its request to its end; its record."""
    cluster.await_redundancy()
    process = cluster.switchover()
    out, err = process.communicate()
    if process.returncode != 0:
        raise ServerError(f"switchover failed: {out}{err}")
    record = json.loads(out)
    return record.get("operation", record)


def address_of(cluster, name):
    endpoint = next(i for i in cluster.status()["instances"] if i["name"] == name)["endpoint"]
    admin = cluster.admin
    return Address(endpoint["host"], endpoint["port"], admin.user, admin.database, admin.password)


def by_hand(cluster, psql, megabytes):
    """Seconds that psql takes to bring such a table to a temporary one of another session, by binary
    COPY through a pipe: the best of three."""
    primary = address_of(cluster, cluster.primary())
    make = f"create table if not exists bench_copy as {rows(megabytes)}"
    subprocess.run([psql, "-X", "-q", "-c", make], env=primary.environment(), check=True)
    best = None
    for _ in range(3):
        begun = time.monotonic()
        source = subprocess.Popen(
            [psql, "-X", "-q", "-c", "copy bench_copy to stdout (format binary)"],
            env=primary.environment(), stdout=subprocess.PIPE,
        )
        target = [psql, "-X", "-q", "-c", "create temp table t (id int, note text)",
                  "-c", "copy t from stdin (format binary)"]
        subprocess.run(target, env=primary.environment(), stdin=source.stdout, check=True)
        source.stdout.close()
        if source.wait() != 0:
            raise ServerError("COPY by hand failed")
        took = time.monotonic() - begun
        best = took if best is None else min(best, took)
    subprocess.run([psql, "-X", "-q", "-c", "drop table bench_copy"], env=primary.environment(), check=True)
    return best


def rows(megabytes):
    """A query of about so many megabytes."""
    return f"select n as id, repeat(md5(n::text), 3) as note from generate_series(1, {megabytes * 8000}) n"


def copy(cluster, psql, megabytes, say):
    """How fast the rows of a temporary table move: what its session's statements waited for, against
    COPY by hand."""
    (session,) = open_sessions(cluster.proxy, 1)
    session.query(f"create temp table t as {rows(megabytes)}")
    size = int(session.query("select pg_table_size('t')"))
    proof = "select count(*) || ' ' || sum(id) || ' ' || md5(string_agg(md5(note), '' order by id)) from t"
    before = session.query(proof)
    time.sleep(IDLE)
    # Whoever speaks while its tables are read waits for that.
    begun = time.monotonic()
    session.query("select 1")
    reading = time.monotonic() - begun
    time.sleep(IDLE)
    move(cluster)
    begun = time.monotonic()
    session.query("select 1 from t limit 1")
    making = time.monotonic() - begun
    if session.query(proof) != before:
        raise ServerError("the table is not what it was")
    session.close()
    hand = by_hand(cluster, psql, megabytes)
    result = {"bytes": size, "reading": reading, "making": making, "hand": hand}
    say(f"temporary table of {size / 2**20:.0f} MiB: {result}")
    return result


def replay(cluster, transactions, statements, say):
    """How fast open transactions run again, beside their clients' own run."""
    sessions = open_sessions(cluster.proxy, transactions)
    sessions[0].query("create table if not exists bench_replay (session int, n int)")
    sessions[0].query("truncate bench_replay")
    begun = time.monotonic()
    for number, session in enumerate(sessions):
        session.query("begin")
        for n in range(statements):
            session.query(f"insert into bench_replay values ({number}, {n})")
    original = time.monotonic() - begun
    record = move(cluster)
    phases = {phase["phase"]: phase["micros"] / 1e6 for phase in record["phases"]}
    if record["resumed"]["replayed"] != transactions or record["resumed"]["failed"]:
        raise ServerError(f"not all were replayed: {record['resumed']}")
    for session in sessions:
        session.query("commit")
    kept = int(sessions[0].query("select count(distinct (session, n)) from bench_replay"))
    every = int(sessions[0].query("select count(*) from bench_replay"))
    if kept != every or kept != transactions * statements:
        raise ServerError(f"{every} rows, {kept} of them different, of {transactions * statements}")
    for session in sessions:
        session.close()
    result = {
        "transactions": transactions, "statements": transactions * statements,
        "original": original, "replay": phases["replay"],
    }
    say(f"{transactions} transactions of {statements} statements: {result}")
    return result


def replays(cluster, cases, repeats, say):
    """The middle one of some runs of each case."""
    found = []
    for transactions, statements in cases:
        runs = [replay(cluster, transactions, statements, say) for _ in range(repeats)]
        middle = statistics.median_low([run["replay"] for run in runs])
        found.append(next(run for run in runs if run["replay"] == middle))
    return found
