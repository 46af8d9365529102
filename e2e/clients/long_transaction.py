"""One transaction of many statements that stays open for long, as psycopg 3 runs it, and ten moves.

HELIOS_LONG_STATEMENTS is how many there are, HELIOS_LONG_SECONDS how long they take at least.
"""

import os
import random
import time

import psycopg

from hook import check, switch

STATEMENTS = int(os.environ.get("HELIOS_LONG_STATEMENTS", "5000"))
SECONDS = float(os.environ.get("HELIOS_LONG_SECONDS", "10"))
MOVES = 10
ACCOUNTS = 200


class Book:
    """What the table must hold."""

    def __init__(self):
        self.balances = dict.fromkeys(range(ACCOUNTS), 0)
        self.entries = {}

    def state(self):
        return (sorted(self.entries.items()), sorted(self.balances.items()))


def transfer(conn, book, draw):
    one, other = draw.sample(range(ACCOUNTS), 2)
    amount = draw.randrange(1, 1000)
    row = conn.execute(
        "update long_accounts set balance = balance - %s where id = %s returning balance",
        (amount, one),
    ).fetchone()
    book.balances[one] -= amount
    check("balance", row, (book.balances[one],))
    conn.execute("update long_accounts set balance = balance + %s where id = %s", (amount, other))
    book.balances[other] += amount


def enter(conn, book, draw):
    amount = draw.randrange(1, 1000)
    (number,) = conn.execute(
        "insert into long_entries (amount) values (%s) returning id", (amount,)
    ).fetchone()
    # A move may leave a gap behind the values that were seen, as a crash of PostgreSQL alone does.
    check("id is new", number > max(book.entries, default=0), True)
    book.entries[number] = amount


def undo(conn, draw):
    conn.execute("savepoint before")
    conn.execute("delete from long_accounts where id < %s", (draw.randrange(ACCOUNTS),))
    conn.execute("rollback to savepoint before")
    conn.execute("release savepoint before")


def look(conn, book):
    sums = "select count(*), coalesce(sum(amount), 0)::int from long_entries"
    check("entries", conn.execute(sums).fetchone(), (len(book.entries), sum(book.entries.values())))


def run(conn, book):
    draw = random.Random(1)
    began, done, moved = time.monotonic(), 0, 0
    while done < STATEMENTS:
        kind = draw.random()
        if kind < 0.6:
            transfer(conn, book, draw)
            done += 2
        elif kind < 0.9:
            enter(conn, book, draw)
            done += 1
        elif kind < 0.95:
            undo(conn, draw)
            done += 4
        else:
            look(conn, book)
            done += 1
        if done * MOVES >= (moved + 1) * STATEMENTS and moved < MOVES:
            moved += 1
            switch()
        ahead = began + SECONDS * done / STATEMENTS - time.monotonic()
        if ahead > 0:
            time.sleep(ahead)


def state(conn):
    entries = conn.execute("select id, amount from long_entries order by id").fetchall()
    balances = conn.execute("select id, balance from long_accounts order by id").fetchall()
    return (entries, balances)


def main():
    book = Book()
    with psycopg.connect("", autocommit=True) as conn:
        conn.execute("drop table if exists long_accounts, long_entries")
        conn.execute("create table long_accounts (id int primary key, balance int not null)")
        conn.execute("create table long_entries (id serial primary key, amount int not null)")
        conn.execute(f"insert into long_accounts select n, 0 from generate_series(0, {ACCOUNTS - 1}) n")
        conn.execute("begin")
        run(conn, book)
        conn.execute("commit")
    with psycopg.connect("") as conn:
        check("what is left", state(conn), book.state())
        conn.execute("drop table long_accounts, long_entries")


main()
