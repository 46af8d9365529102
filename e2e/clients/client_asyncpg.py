"""asyncpg: binary protocol, prepared statements, cursors on portals, executemany, COPY."""

import asyncio
import json
import os

import asyncpg

from hook import check, check_rows, switch


def connect():
    return asyncpg.connect(database=os.environ.get("PGDATABASE"), timeout=20, command_timeout=60)


async def transaction(conn):
    add = await conn.prepare("insert into ap (n, v, doc, tags) values ($1, $2, $3, $4) returning id")
    async with conn.transaction():
        first = await add.fetchval(1, "first", json.dumps({"a": 1}), ["x", "y"])
        check("first id", first, 1)
        await conn.executemany(
            "insert into ap (n, v) values ($1, $2)", [(2 + i, f"many {i}") for i in range(300)]
        )
        await conn.copy_records_to_table(
            "ap", records=[(302 + i, f"copied {i}") for i in range(300)], columns=["n", "v"]
        )
        walk = await conn.cursor("select n from ap order by n", prefetch=None)
        check("before the move", [r[0] for r in await walk.fetch(50)], list(range(1, 51)))
        try:
            async with conn.transaction():
                await conn.execute("insert into ap (id, v) values (1, 'again')")
        except asyncpg.UniqueViolationError:
            pass
        await asyncio.to_thread(switch)
        check("after the move", [r[0] for r in await walk.fetch(50)], list(range(51, 101)))
        second = await add.fetchval(602, "second", None, [])
        row = await conn.fetchrow("select v, doc, tags from ap where id = $1", first)
        check("what was written", (row[0], json.loads(row[1]), row[2]), ("first", {"a": 1}, ["x", "y"]))
    return {1: first, 602: second}


async def main():
    conn = await connect()
    await conn.execute("drop table if exists ap")
    await conn.execute("create table ap (id serial primary key, n int, v text, doc jsonb, tags text[])")
    seen = await transaction(conn)
    await conn.close()
    conn = await connect()
    check("rows", tuple(await conn.fetchrow("select count(*), count(distinct v) from ap")), (602, 602))
    rows = [tuple(r) for r in await conn.fetch("select n, v, id from ap order by n")]
    middle = [f"{w} {i}" for w in ("many", "copied") for i in range(300)]
    check_rows(rows, list(enumerate(["first", *middle, "second"], 1)), seen)
    await conn.execute("drop table ap")
    await conn.close()


asyncio.run(main())
