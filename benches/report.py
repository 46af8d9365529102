"""Turns measurements into docs/benchmarks.md.

Where the time goes is found by hand, with other tools: that section is taken from profile.md.
"""

import datetime
import pathlib
import statistics

PROFILE = pathlib.Path(__file__).with_name("profile.md")

HEAD = """# Benchmarks

Measured by `make bench` on {date}: {cores} cores ({cpu}), kernel {kernel}, PostgreSQL {postgres}. Client, proxy and servers share these cores, so what one of them takes the others lack: trust the ratios, not the figures.

## How to reproduce

```sh
make bench                                                    # everything, about 45 minutes
make bench ARGS=--short                                       # a minute or two, to target/benchmarks.md
make bench ARGS='cases=tpcb/prepared/8 seconds=10'            # one case
make bench ARGS='parts=pause sessions=1,100'                  # the pause alone
```

`benches/run.py` lists all settings. This run: {seconds} s a run, {repeats} runs a case, scale factor {scale}, {instances} server(s) a cluster.
"""

THROUGHPUT = """
## Throughput

pgbench's select-only and TPC-B-like scripts, and (*insert*) one INSERT outside of a transaction block, which modes `transaction` and `select` mark so that its outcome is known after a crash. *PostgreSQL* is the primary itself; *PgBouncer* and the proxy stand in front of a primary with the same settings, on this machine. The subjects run in turn, each round beginning with another. The first figure is the median of transactions a second; the ratio is the median of the ratios to PostgreSQL in the same round. Modes: replay off (`none`), `transaction`, `select`. PgBouncer 1.18 has no prepared statements with transaction pooling: n/a.

| workload | protocol | clients | PostgreSQL | PgBouncer session | PgBouncer transaction | none | transaction | select |
|---|---|---|---|---|---|---|---|---|
"""

RATIOS = """
### Against each other

Median of the ratios within a round.

| workload | protocol | clients | transaction / none | select / none | transaction / PgBouncer session |
|---|---|---|---|---|---|
"""

SUBJECTS = (
    "pgbouncer-session",
    "pgbouncer-transaction",
    "helios-none",
    "helios-transaction",
    "helios-select",
)


def ratio(runs, above, below):
    pairs = list(zip(runs[above], runs[below]))
    return statistics.median(a / b for a, b in pairs) if pairs else None


def shown(value):
    return "n/a" if value is None else f"{value:.2f}"


def throughput(results):
    table, ratios = THROUGHPUT, RATIOS
    for (workload, protocol, clients), runs in results.items():
        cells = [workload, protocol, str(clients), f"{statistics.median(runs['postgres']):,.0f}"]
        for name in SUBJECTS:
            against = ratio(runs, name, "postgres")
            tps = "" if against is None else f"{statistics.median(runs[name]):,.0f} "
            cells.append(f"{tps}({shown(against)})" if tps else "n/a")
        table += f"| {' | '.join(cells)} |\n"
        against = [
            ratio(runs, "helios-transaction", "helios-none"),
            ratio(runs, "helios-select", "helios-none"),
            ratio(runs, "helios-transaction", "pgbouncer-session"),
        ]
        ratios += f"| {workload} | {protocol} | {clients} | {' | '.join(map(shown, against))} |\n"
    return table + ratios


def memory(results, count):
    text = f"""
## Memory of an idle session

Growth of the process's resident memory with {count:,} logged-in sessions that have run one statement, for each of them. The proxy runs inside `helios local`; its sessions have a server connection each, as PgBouncer's have with session pooling.

| | bytes a session |
|---|---|
"""
    for name, value in results.items():
        text += f"| {name} | {value if isinstance(value, str) else f'{value:,.0f}'} |\n"
    return text


def capture(results):
    text = """
## What it costs to keep a session's state

Two proxies in front of one primary: one keeps settings, prepared statements, temporary tables and cursors (the default), the other open transactions only. Eight clients, runs in pairs; the ratio is the median of the pairs'.

"""
    if isinstance(results, str):
        return text + f"failed: {results}\n"
    text += "| script | without, tps | with, tps | ratio (least to most) |\n|---|---|---|---|\n"
    for what, run in results.items():
        ratios = f"{run['ratio']:.3f} ({run['least']:.3f} to {run['most']:.3f})"
        text += f"| {what} | {run['none']:,.0f} | {run['all']:,.0f} | {ratios} |\n"
    return text


def pause(results):
    text = """
## Pause of a switchover

Every tenth session is in an open transaction. Up to ten sessions, half of them in a transaction, run statement after statement all the while, each by itself; a session's pause is the longest that one of its statements took. Afterwards every session has to answer, and every transaction has to commit. The probes and the proxy share the processors with two servers.

| sessions | switchovers | median, ms | p99, ms | longest of a switchover, median, ms | where: medians of the phases, ms |
|---|---|---|---|---|---|
"""
    for count, value in results.items():
        if isinstance(value, str):
            text += f"| {count:,} | 0 | {value} | | | |\n"
            continue
        held = {name: time for name, time in value["phases"].items() if name != "prepare"}
        phases = ", ".join(f"{name} {time:.0f}" for name, time in held.items() if time >= 0.5)
        cells = f"{value['switchovers']} | {value['median']:.0f} | {value['p99']:.0f}"
        text += f"| {count:,} | {cells} | {value['worst']:.0f} | {phases} |\n"
    return text


def state(results):
    text = """
## Sessions with state

Each session has 10 prepared statements and 3 temporary tables with a primary key and 100 rows, and reads one of them about every ten seconds. A session's pause is the longest that one of its statements took between the request of the switchover and ten seconds behind it. Afterwards the rows of all tables and all prepared statements of every session are compared with what they were; one that is not the same has failed.

| sessions | switchovers | migrations, failed | p50, ms | p95, ms | p99, ms | longest before the move, ms | where: medians of the phases, ms |
|---|---|---|---|---|---|---|---|
"""
    for count, value in results["moves"].items():
        if isinstance(value, str):
            text += f"| {count:,} | 0 | {value} | | | | | |\n"
            continue
        phases = ", ".join(f"{name} {time:.0f}" for name, time in value["phases"].items() if time >= 0.5)
        cells = f"{value['switchovers']} | {value['migrations']:,}, {value['failed']}"
        times = " | ".join(f"{value[name]:,.0f}" for name in ("p50", "p95", "p99", "steady"))
        text += f"| {count:,} | {cells} | {times} | {phases} |\n"
    memory = results["memory"]
    return text + f"""
Memory of such a session: {memory['proxy'] / 1024:,.0f} KiB of the proxy, {memory['backend'] / 2**20:.1f} MiB of its server process that it shares with no other.
"""


def moved(results):
    text = """
## What is moved, by the amount

Open transactions run again behind a switchover, beside the time that their clients needed, one statement after the other (an INSERT each, by simple query). The time of the replay is that of its phase, with all sessions in it; afterwards every row is there once. The middle one of some runs.

| transactions | statements | clients' run, s | replay, s | statements a second, clients' run | replay |
|---|---|---|---|---|---|
"""
    replay = results["replay"]
    for run in [] if isinstance(replay, str) else replay:
        rate = [f"{run['statements'] / run[name]:,.0f}" for name in ("original", "replay")]
        times = f"{run['original']:.2f} | {run['replay']:.3f}"
        text += f"| {run['transactions']:,} | {run['statements']:,} | {times} | {' | '.join(rate)} |\n"
    if isinstance(replay, str):
        text += f"| {replay} | | | | | |\n"
    copy = results["copy"]
    if isinstance(copy, str):
        return text + f"\nTemporary table: {copy}\n"
    speed = {name: f"{copy['bytes'] / copy[name] / 1e9:.3f}" for name in ("making", "hand")}
    return text + f"""
A temporary table of {copy['bytes'] / 2**20:,.0f} MiB: its session's first statement behind the switchover waited {copy['making']:.2f} s for it, which is {speed['making']} GB/s; `COPY … TO STDOUT` piped into `COPY … FROM STDIN`, binary, by psql and of the same rows, took {copy['hand']:.2f} s ({speed['hand']} GB/s, the best of three). It had been read beforehand, while its client was idle; a statement that came 0.5 s behind its making waited {copy['reading']:.2f} s.
"""


def render(results):
    facts = {**results["machine"], "date": datetime.date.today().isoformat()}
    for name in ("seconds", "repeats", "scale", "instances"):
        facts[name] = results[name]
    text = HEAD.format(**facts)
    if "throughput" in results:
        text += throughput(results["throughput"])
    text += "\n" + PROFILE.read_text()
    if "memory" in results:
        text += memory(results["memory"], results["idle"])
    if "pause" in results:
        text += pause(results["pause"])
    if "capture" in results:
        text += capture(results["capture"])
    if "state" in results:
        text += state(results["state"])
    if "moved" in results:
        text += moved(results["moved"])
    return text
