"""asyncpg: binary protocol, prepared statements, cursors on portals, executemany, COPY."""

import asyncio
import json
import os

import asyncpg

from hook import check, switch


def connect():
    return asyncpg.connect(database=os.environ.get("PGDATABASE"), timeout=20, command_timeout=60)


async def transaction(conn):
    add = await conn.prepare("insert into ap (v, doc, tags) values ($1, $2, $3) returning id")
    async with conn.transaction():
        check("first id", await add.fetchval("first", json.dumps({"a": 1}), ["x", "y"]), 1)
        await conn.executemany(
            "insert into ap (v) values ($1)", [(f"many {i}",) for i in range(300)]
        )
        await conn.copy_records_to_table(
            "ap", records=[(f"copied {i}",) for i in range(300)], columns=["v"]
        )
        walk = await conn.cursor("select id from ap order by id", prefetch=None)
        check("before the move", [r[0] for r in await walk.fetch(50)], list(range(1, 51)))
        try:
            async with conn.transaction():
                await conn.execute("insert into ap (id, v) values (1, 'again')")
        except asyncpg.UniqueViolationError:
            pass
        await asyncio.to_thread(switch)
        check("after the move", [r[0] for r in await walk.fetch(50)], list(range(51, 101)))
        check("second id", await add.fetchval("second", None, []), 602)
        row = await conn.fetchrow("select v, doc, tags from ap where id = $1", 1)
        check("what was written", (row[0], json.loads(row[1]), row[2]), ("first", {"a": 1}, ["x", "y"]))


async def main():
    conn = await connect()
    await conn.execute("drop table if exists ap")
    await conn.execute("create table ap (id serial primary key, v text, doc jsonb, tags text[])")
    await transaction(conn)
    await conn.close()
    conn = await connect()
    check("rows", tuple(await conn.fetchrow("select count(*), count(distinct v) from ap")), (602, 602))
    await conn.execute("drop table ap")
    await conn.close()


asyncio.run(main())
