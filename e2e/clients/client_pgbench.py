"""pgbench in all its query modes, with --progress; the four sums of TPC-B must agree."""

import re
import subprocess
import sys
import time

from hook import check, switch

SECONDS = 4


def psql(sql):
    done = subprocess.run(["psql", "-XAtc", sql], text=True, capture_output=True, timeout=30)
    check(f"psql -c {sql!r}: {done.stderr}", done.returncode, 0)
    return done.stdout.strip()


def run(mode):
    subprocess.run(["pgbench", "-i", "-q", "-s", "2"], check=True, capture_output=True, timeout=60)
    bench = subprocess.Popen(
        ["pgbench", "-n", "-M", mode, "-c", "4", "-j", "2", "-T", str(SECONDS), "--progress", "1"],
        text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    time.sleep(SECONDS / 3)
    switch()
    out, err = bench.communicate(timeout=60)
    if bench.returncode != 0 or "aborted" in err or "ERROR" in err:
        sys.exit(f"pgbench -M {mode} failed with {bench.returncode}:\n{out}\n{err}")
    check("lines of progress", len(re.findall(r"^progress: ", err, re.M)) >= SECONDS - 2, True)
    done = int(re.search(r"transactions actually processed: (\d+)", out).group(1))
    check("failed transactions", re.search(r"failed transactions: (\d+)", out).group(1), "0")
    sums = psql(
        "select (select count(*) from pgbench_history), (select sum(abalance) from pgbench_accounts),"
        " (select sum(tbalance) from pgbench_tellers), (select sum(bbalance) from pgbench_branches),"
        " (select sum(delta) from pgbench_history)"
    ).split("|")
    check(f"-M {mode}: transactions in the history", int(sums[0]), done)
    check(f"-M {mode}: sums that agree {sums}", len(set(sums[1:])), 1)


for query_mode in ("simple", "extended", "prepared"):
    run(query_mode)
subprocess.run(["pgbench", "-i", "-I", "d"], check=True, capture_output=True, timeout=60)
