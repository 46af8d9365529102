"""psql: \\copy in both directions, \\watch and a long statement interrupted by ctrl-C."""

import os
import signal
import subprocess
import sys
import tempfile
import time

from hook import check

SCRIPT = r"""
\set ON_ERROR_STOP on
drop table if exists psql_items;
create table psql_items (id int primary key, name text);
begin;
\copy psql_items from 'in.csv' csv
update psql_items set name = upper(name) where id = 1 returning name;
savepoint before_mistake;
\set ON_ERROR_STOP off
insert into psql_items values (1, 'again');
\set ON_ERROR_STOP on
rollback to savepoint before_mistake;
\! echo SWITCH; read answer; test "$answer" = GO
insert into psql_items select g, 'late' from generate_series(1001, 1010) g;
\copy (select id, name from psql_items order by id) to 'out.csv' csv
commit;
select 'rows ' || count(*) || ' ' || sum(id) from psql_items;
drop table psql_items;
"""


def psql(*args, **kwargs):
    return subprocess.Popen(["psql", "-X", "-q", "-At", *args], text=True, **kwargs)


def transaction(folder):
    rows = [f"{i},name {i}" for i in range(1, 1001)]
    with open(f"{folder}/in.csv", "w") as file:
        file.write("\n".join(rows) + "\n")
    with open(f"{folder}/script.sql", "w") as file:
        file.write(SCRIPT)
    # Standard input and output are ours: \! talks to whoever started this program.
    with open(f"{folder}/messages", "w+") as messages:
        run = psql("-f", "script.sql", cwd=folder, stderr=messages)
        code = run.wait(timeout=60)
        messages.seek(0)
        said = messages.read()
    sys.stderr.write(said)
    check("psql's exit status", code, 0)
    check("duplicate key reported", "duplicate key value" in said, True)
    with open(f"{folder}/out.csv") as file:
        lines = file.read().splitlines()
    rows[0] = "1,NAME 1"
    check("rows copied out", lines, rows + [f"{i},late" for i in range(1001, 1011)])


def interrupted(command, seconds, expected_output):
    """ctrl-C ends what psql runs; what it printed before stands."""
    run = psql("-f", "-", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdin.write(command)
    run.stdin.close()
    run.stdin = None
    time.sleep(seconds)  # a person looks at the screen for a while
    started = time.monotonic()
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=20)
    check(f"{command!r} ends at once", time.monotonic() - started < 5, True)
    check(f"{command!r} printed {expected_output!r}", expected_output in out + err, True)


def main():
    with tempfile.TemporaryDirectory() as folder:
        transaction(folder)
    interrupted("select 'tick'\n\\watch 0.2\n", 1.5, "tick\n")
    interrupted("select pg_sleep(300);\n", 1.0, "canceling statement due to user request")
    left = subprocess.run(
        ["psql", "-XAtc", "select count(*) from pg_stat_activity where query ~ '^select pg_sleep'"],
        text=True, capture_output=True, check=True, timeout=20, env=os.environ,
    )
    check("statements left running", left.stdout.strip(), "0")


main()
