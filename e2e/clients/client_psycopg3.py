"""psycopg 3: server-side binding, prepared statements, pipeline, cursors, COPY, savepoints."""

import uuid
from datetime import datetime, timezone
from decimal import Decimal

import psycopg

from hook import check, check_rows, switch

KEY = uuid.uuid4()
WHEN = datetime(2026, 2, 3, 4, 5, 6, tzinfo=timezone.utc)


def transaction(conn):
    with conn.transaction():
        conn.execute("set local statement_timeout = '50s'")
        row = conn.execute(
            "insert into p3 (pos, v, k, t, n) values (1, %s, %s, %s, %s) returning id",
            ("first", KEY, WHEN, Decimal("1.25")),
            prepare=True,
        ).fetchone()
        check("first id", row, (1,))
        with conn.pipeline():
            for i in range(20):
                add = "insert into p3 (pos, v, n) values (%s, %s, %s)"
                conn.execute(add, (2 + i, f"piped {i}", i), prepare=True)
        with conn.cursor().copy("copy p3 (pos, v, n) from stdin") as copy:
            for i in range(100):
                copy.write_row((22 + i, f"copied {i}", i))
        cursor = conn.cursor(name="walk")
        cursor.execute("select pos from p3 order by pos")
        check("before the move", [r[0] for r in cursor.fetchmany(10)], list(range(1, 11)))
        try:
            with conn.transaction():
                conn.execute("select 1 / 0")
        except psycopg.errors.DivisionByZero:
            pass
        switch()
        check("after the move", [r[0] for r in cursor.fetchmany(10)], list(range(11, 21)))
        cursor.close()
        check("setting", conn.execute("show statement_timeout").fetchone(), ("50s",))
        check(
            "what was written",
            conn.execute("select v, k, t, n from p3 where id = %s", row, binary=True).fetchone(),
            ("first", KEY, WHEN, Decimal("1.25")),
        )
        with conn.pipeline():
            for i in range(20):
                conn.execute("update p3 set n = n + 1 where pos = %s", (i + 2,), prepare=True)
    return {1: row[0]}


def main():
    with psycopg.connect("", autocommit=True) as conn:
        conn.execute("drop table if exists p3")
        conn.execute(
            "create table p3 (id bigint generated always as identity primary key,"
            " pos int, v text, k uuid, t timestamptz, n numeric)"
        )
        seen = transaction(conn)
        add = "insert into p3 (pos, v, n) values (%s, %s, %s)"
        conn.execute(add, (122, "afterwards", 7), prepare=True)
    with psycopg.connect("") as conn:
        got = conn.execute("select count(*), count(distinct v), sum(n) from p3").fetchone()
        check("rows", got, (122, 122, Decimal("1.25") + 190 + 20 + 4950 + 7))
        piped, copied = ([f"{w} {i}" for i in range(c)] for w, c in (("piped", 20), ("copied", 100)))
        contents = list(enumerate(["first", *piped, *copied, "afterwards"], 1))
        check_rows(conn.execute("select pos, v, id from p3 order by pos").fetchall(), contents, seen)
        with conn.cursor().copy("copy (select v from p3 where v ~ '^copied' order by pos) to stdout") as copy:
            check("copied out", [r[0] for r in copy.rows()], copied)
        conn.execute("drop table p3")


main()
