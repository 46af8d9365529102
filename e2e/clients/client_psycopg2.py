"""psycopg 2: the simple protocol, named cursors, execute_values, COPY, asynchronous notices."""

import io

import psycopg2
import psycopg2.extras

from hook import check, check_rows, switch


def transaction(conn):
    with conn, conn.cursor() as cur:
        cur.execute("insert into p2 (n, v) values (1, %s) returning id", ("first",))
        first = cur.fetchone()[0]
        check("first id", first, 1)
        psycopg2.extras.execute_values(
            cur, "insert into p2 (n, v) values %s", [(2 + i, f"value {i}") for i in range(500)]
        )
        cur.copy_expert(
            "copy p2 (n, v) from stdin",
            io.StringIO("".join(f"{502 + i}\tcopied {i}\n" for i in range(500))),
        )
        cur.execute("do $$ begin raise notice 'heard'; end $$")
        check("notice", "heard" in conn.notices[-1], True)
        walk = conn.cursor("walk")
        walk.itersize = 50
        walk.execute("select n from p2 order by n")
        check("before the move", [r[0] for r in walk.fetchmany(60)], list(range(1, 61)))
        cur.execute("savepoint s")
        try:
            cur.execute("insert into p2 (id, v) values (1, 'again')")
        except psycopg2.errors.UniqueViolation:
            cur.execute("rollback to savepoint s")
        switch()
        check("after the move", [r[0] for r in walk], list(range(61, 1002)))
        walk.close()
        cur.execute("update p2 set v = v || '!' where n <= 10")
        check("updated", cur.rowcount, 10)
    return {1: first}


def main():
    conn = psycopg2.connect("")
    with conn, conn.cursor() as cur:
        cur.execute("drop table if exists p2")
        cur.execute("create table p2 (id serial primary key, n int, v text not null)")
    seen = transaction(conn)
    conn.close()
    conn = psycopg2.connect("")
    with conn, conn.cursor() as cur:
        cur.execute("select count(*), count(*) filter (where v like '%!'), min(id) from p2")
        check("rows", cur.fetchone(), (1001, 10, 1))
        cur.execute("select n, v, id from p2 order by n")
        contents = ["first", *(f"{w} {i}" for w in ("value", "copied") for i in range(500))]
        contents[:10] = [v + "!" for v in contents[:10]]
        check_rows(cur.fetchall(), list(enumerate(contents, 1)), seen)
        out = io.StringIO()
        cur.copy_expert("copy (select v from p2 where v ~ '^copied' order by n) to stdout", out)
        check("copied out", out.getvalue(), "".join(f"copied {i}\n" for i in range(500)))
        cur.execute("drop table p2")
    conn.close()


main()
