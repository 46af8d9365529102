#!/usr/bin/env python3
"""make bench: measures, and writes docs/benchmarks.md. All of it takes about 45 minutes.

make bench ARGS=--short              a few cases, a minute or two: does it work?
make bench ARGS='seconds=10 cases=tpcb/prepared/8 parts=throughput'

Settings, from the environment as below or as arguments in lower case:

BENCH_SECONDS  length of one run of pgbench            (3)
BENCH_REPEATS  runs of each case, in turn              (3)
BENCH_CASES    workload/protocol/clients, with *       (*/*/*)   e.g. tpcb/prepared/8,insert/*/8
BENCH_SCALE    pgbench's scale factor                  (10)
BENCH_INSTANCES  servers of a cluster                  (2)
BENCH_MOVES    switchovers for each number of sessions (5)
BENCH_SESSIONS numbers of sessions for the pause       (1,100,1000)
BENCH_STATE    numbers of sessions with state          (100,1000)
BENCH_COPY     megabytes of a temporary table         (100)
BENCH_REPLAY   transactions x statements to replay    (1x10000,100x100,1000x10)
BENCH_IDLE     idle sessions for the memory            (1000)
BENCH_PARTS    which parts to run                      (throughput,memory,capture,pause,state,moved)
BENCH_OUT      where to write                          (docs/benchmarks.md)
BENCH_HELIOS   the program                             (target/release/helios)
"""

import atexit
import fnmatch
import functools
import itertools
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import capture
import moved
import report
import state
from servers import HELIOS, ROOT, Cluster, PgBouncer
from sessions import ServerError, idle_memory, switchover_pause

WORKLOADS = ("select", "tpcb", "insert")
PROTOCOLS = ("simple", "extended", "prepared")
CLIENTS = (1, 8, 64)
MODES = ("none", "transaction", "select")
# A statement by itself, which the proxy marks so that its outcome is known after a crash. Run with
# few cases: what it shows is the cost of the mark.
INSERT = "insert into inserted values (:client_id, 'something to keep');"
INSERT_TABLE = "create table inserted (client int, note text)"
INSERT_CASES = (("simple", 8), ("prepared", 8))


DEFAULTS = {
    "SECONDS": "3", "REPEATS": "3", "CASES": "*/*/*", "SCALE": "10", "INSTANCES": "2", "MOVES": "5",
    "SESSIONS": "1,100,1000", "IDLE": "1000", "STATE": "100,1000",
    "COPY": "100", "REPLAY": "1x10000,100x100,1000x10",
    "PARTS": "throughput,memory,capture,pause,state,moved",
    "OUT": "docs/benchmarks.md",
}
SHORT = {
    "SECONDS": "1", "REPEATS": "2", "CASES": "*/prepared/8", "SCALE": "1", "MOVES": "2",
    "SESSIONS": "1,100", "STATE": "20", "IDLE": "200", "COPY": "10", "REPLAY": "1x1000,20x50", "OUT": "target/benchmarks.md",
}
BEGUN = time.monotonic()
chosen = {}


def read_arguments(arguments):
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if argument == "--short":
            chosen.update({**SHORT, **chosen})
        elif equals and name.upper() in DEFAULTS:
            chosen[name.upper()] = value
        else:
            names = ", ".join(DEFAULTS).lower()
            raise SystemExit(f"bench: unknown argument {argument!r}: --short, or NAME=VALUE of {names}")


def setting(name):
    return chosen.get(name) or os.environ.get(f"BENCH_{name}") or DEFAULTS[name]


def say(text):
    minutes, seconds = divmod(int(time.monotonic() - BEGUN), 60)
    print(f"bench: {minutes:3}:{seconds:02}  {text}", file=sys.stderr, flush=True)


def pg_bindir():
    """Where pgbench is: PG_BINDIR, PATH, Debian's layout."""
    if "PG_BINDIR" in os.environ:
        return os.environ["PG_BINDIR"]
    for version in (18, 17, 16, 15):
        if os.access(f"/usr/lib/postgresql/{version}/bin/pgbench", os.X_OK):
            return f"/usr/lib/postgresql/{version}/bin"
    return os.path.dirname(shutil.which("pgbench") or "/usr/bin/pgbench")


TPS = r"tps = ([\d.]+) \(without initial"
PGBENCH = f"{pg_bindir()}/pgbench"


def pgbench(address, *options):
    done = subprocess.run(
        [PGBENCH, *options], env=address.environment(), text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=600,
    )
    if done.returncode != 0:
        raise SystemExit(f"bench: pgbench {' '.join(options)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def psql(address, sql):
    command = [f"{pg_bindir()}/psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-c", sql]
    subprocess.run(command, env=address.environment(), stdin=subprocess.DEVNULL, check=True, timeout=60)


def measure(address, workload, protocol, clients, seconds):
    """Transactions a second, connecting left out."""
    options = ["-n", "-M", protocol, "-c", str(clients), "-j", str(min(clients, 2)), "-T", str(seconds)]
    if workload == "select":
        options.append("-S")
    if workload == "insert":
        options += ["-f", script_file(INSERT)]
    out = pgbench(address, *options)
    return float(re.search(TPS, out).group(1))


@functools.cache
def script_file(text):
    with tempfile.NamedTemporaryFile("w", suffix=".sql", delete=False) as file:
        file.write(text)
    atexit.register(os.unlink, file.name)
    return file.name


def scripted(address, script, clients):
    """Transactions a second of a script of ours, or of pgbench's own with prepared statements."""
    options = ["-n", "-c", str(clients), "-j", "2", "-T", setting("SECONDS")]
    options += ["-M", "prepared"] if script is None else ["-f", script_file(script)]
    return float(re.search(TPS, pgbench(address, *options)).group(1))


def cases():
    patterns = setting("CASES").split(",")
    for workload, protocol, clients in itertools.product(WORKLOADS, PROTOCOLS, CLIENTS):
        name = f"{workload}/{protocol}/{clients}"
        if workload == "insert" and (protocol, clients) not in INSERT_CASES:
            continue
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            yield workload, protocol, clients


def throughput(clusters, bouncers):
    """For each case the subjects in turn, again and again: what disturbs one disturbs all."""
    seconds, repeats = int(setting("SECONDS")), int(setting("REPEATS"))
    subjects = {
        "postgres": clusters["transaction"].direct,
        "pgbouncer-session": bouncers["session"].address,
        "pgbouncer-transaction": bouncers["transaction"].address,
        **{f"helios-{mode}": clusters[mode].proxy for mode in MODES},
    }
    results = {}
    todo = list(cases())
    for number, case in enumerate(todo, 1):
        runs = {name: [] for name in subjects}
        for turn in range(repeats):
            # Each round begins with another subject: nobody always follows the same one.
            names = list(subjects)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                if name == "pgbouncer-transaction" and case[1] == "prepared":
                    continue  # version 1.18 has no prepared statements in this mode
                runs[name].append(measure(subjects[name], *case, seconds))
        results[case] = runs
        middle = {name: round(statistics.median(tps)) for name, tps in runs.items() if tps}
        say(f"{number} of {len(todo)}: {'/'.join(map(str, case))}: {middle}")
    return results


def memory(clusters, bouncers, count):
    found = {}
    for name, server, address in (
        ("helios", clusters["transaction"], clusters["transaction"].proxy),
        ("pgbouncer-session", bouncers["session"], bouncers["session"].address),
    ):
        try:
            found[name] = idle_memory(server.pid, address, count)
            say(f"{name}: {found[name]:.0f} bytes for each of {count} idle sessions")
        except (ServerError, OSError) as error:
            found[name] = str(error)
            say(f"{name}: {error}")
    return found


def pause(cluster, repeats):
    found = {}
    for count in map(int, setting("SESSIONS").split(",")):
        try:
            found[count] = switchover_pause(cluster, count, repeats, say)
        except (ServerError, OSError) as error:
            found[count] = str(error)
        say(f"pause with {count} sessions: {found[count]}")
    return found


def with_state(cluster, repeats):
    found = {"moves": {}}
    for count in map(int, setting("STATE").split(",")):
        try:
            found["moves"][count] = state.moves(cluster, count, repeats, say)
        except (ServerError, OSError) as error:
            found["moves"][count] = str(error)
        say(f"{count} sessions with state: {found['moves'][count]}")
    cluster.await_redundancy()
    found["memory"] = state.memory(cluster, min(map(int, setting("STATE").split(","))))
    return found


def by_amount(cluster, repeats):
    """What fails is told in the place of its figure."""
    cases = [tuple(map(int, case.split("x"))) for case in setting("REPLAY").split(",")]
    found = {}
    try:
        found["replay"] = moved.replays(cluster, cases, repeats, say)
    except (ServerError, OSError) as error:
        found["replay"] = str(error)
    try:
        found["copy"] = moved.copy(cluster, f"{pg_bindir()}/psql", int(setting("COPY")), say)
    except (ServerError, OSError, subprocess.SubprocessError) as error:
        found["copy"] = str(error)
    say(f"moved by amount: {found}")
    return found


def machine():
    with open("/proc/cpuinfo") as file:
        model = re.search(r"model name\s*: (.*)", file.read())
    version = subprocess.run([PGBENCH, "--version"], text=True, capture_output=True).stdout.split()
    return {
        "cores": os.cpu_count(),
        "cpu": model.group(1) if model else platform.machine(),
        "kernel": platform.release(),
        "postgres": version[2] if len(version) > 2 else "?",
    }


def main():
    read_arguments(sys.argv[1:])
    parts = setting("PARTS").split(",")
    instances = int(setting("INSTANCES"))
    if not HELIOS.exists():
        raise SystemExit(f"bench: {HELIOS} is missing: run make bench")
    # A thousand sessions are a thousand sockets, here and in what is started here.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    results = {"machine": machine(), "instances": instances, "scale": setting("SCALE")}
    results["seconds"], results["repeats"] = setting("SECONDS"), setting("REPEATS")
    folder = tempfile.mkdtemp(prefix="helios-bench-")
    os.chmod(folder, 0o755)
    running = []
    try:
        clusters = {}
        for mode in MODES if "throughput" in parts else ("transaction",):
            say(f"starting a cluster, mode {mode}")
            clusters[mode] = Cluster(folder, mode, instances)
            running.append(clusters[mode])
            pgbench(clusters[mode].direct, "-i", "-q", "-s", results["scale"])
            psql(clusters[mode].direct, INSERT_TABLE)
        bouncers = {}
        for pool_mode in ("session", "transaction") if {"throughput", "memory"} & set(parts) else ():
            bouncers[pool_mode] = PgBouncer(folder, pool_mode, clusters["transaction"].direct, 1100)
            running.append(bouncers[pool_mode])
        if "throughput" in parts:
            results["throughput"] = throughput(clusters, bouncers)
        if "memory" in parts:
            results["idle"] = int(setting("IDLE"))
            results["memory"] = memory(clusters, bouncers, results["idle"])
        if "capture" in parts:
            what = (folder, clusters["transaction"], int(setting("REPEATS")))
            try:
                results["capture"] = capture.cost(*what, scripted, functools.partial(psql, sql="select 1"), say)
            except (ServerError, SystemExit) as error:
                results["capture"] = str(error)
        for bouncer in bouncers.values():
            bouncer.stop()  # they keep server connections that sessions need now
            running.remove(bouncer)
        if "pause" in parts and instances > 1:
            results["pause"] = pause(clusters["transaction"], int(setting("MOVES")))
        if "state" in parts and instances > 1:
            results["state"] = with_state(clusters["transaction"], int(setting("MOVES")))
        if "moved" in parts and instances > 1:
            results["moved"] = by_amount(clusters["transaction"], int(setting("REPEATS")))
    finally:
        for server in reversed(running):
            try:
                server.stop()
            except (SystemExit, subprocess.SubprocessError) as error:
                say(f"could not stop: {error}")
        shutil.rmtree(folder, ignore_errors=True)
    out = ROOT / setting("OUT")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(report.render(results))
    say(f"wrote {out}")


main()
