"""A settlement, as psycopg 3 runs it: settings, a temporary table made beforehand, one serializable
transaction with another, a statement that SQL has prepared, batches, and a move behind each.

HELIOS_SETTLEMENT_ROWS is the number of trades.
"""

import os

import psycopg

from hook import check, switch

ROWS = int(os.environ.get("HELIOS_SETTLEMENT_ROWS", "100000"))
BATCHES = 10
ACCOUNTS = 500


def amount(n):
    return n * 7919 % 10007


def expected():
    """What is settled, by account: amounts and fees."""
    settled = {a: [0, 0] for a in range(ACCOUNTS)}
    for n in range(1, ROWS + 1):
        one = settled[n % ACCOUNTS]
        one[0] += amount(n)
        one[1] += amount(n) * 3 // 100
    return [(a, *sums) for a, sums in sorted(settled.items())]


def prepare(conn):
    conn.execute("drop table if exists settled")
    conn.execute("create table settled (account int primary key, amount bigint, fees bigint)")
    conn.execute("set work_mem = '32MB'")
    conn.execute("set app.run = 'evening'")
    conn.execute(
        "create temporary table trades as select n as id, n %% %s as account,"
        " n * 7919::bigint %% 10007 as amount from generate_series(1, %s) n",
        (ACCOUNTS, ROWS),
        prepare=False,
    )
    conn.execute("create index on trades (account)")
    conn.execute("analyze trades")


def settle(conn):
    conn.execute("begin isolation level serializable")
    conn.execute("create temporary table fees (id int primary key, fee bigint not null)")
    conn.execute(
        "prepare charge (int) as insert into fees"
        f" select id, amount * 3 / 100 from trades where id % {BATCHES} = $1"
    )
    charged, fees = 0, 0
    for batch in range(BATCHES):
        conn.execute(f"execute charge ({batch})")
        numbers = [n for n in range(1, ROWS + 1) if n % BATCHES == batch]
        charged += len(numbers)
        fees += sum(amount(n) * 3 // 100 for n in numbers)
        switch()
        got = conn.execute("select count(*), sum(fee)::bigint from fees").fetchone()
        check(f"fees behind batch {batch}", got, (charged, fees))
        settings = "select current_setting('work_mem'), current_setting('app.run')"
        check("settings", conn.execute(settings).fetchone(), ("32MB", "evening"))
    conn.execute(
        "insert into settled select account, sum(amount), sum(fee)"
        " from trades join fees using (id) group by account"
    )
    conn.execute("commit")


def main():
    with psycopg.connect("", autocommit=True) as conn:
        prepare(conn)
        settle(conn)
        # Still there behind the transaction.
        left = "select (select count(*) from trades), (select count(*) from fees)"
        check("what is left", conn.execute(left).fetchone(), (ROWS, ROWS))
    with psycopg.connect("") as conn:
        got = conn.execute("select account, amount, fees from settled order by account").fetchall()
        check("settled", got, expected())
        conn.execute("drop table settled")


main()
