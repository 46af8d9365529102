"""pg_dump into pg_restore: a dump that is moved while it reads, a restore while it writes."""

import subprocess
import sys
import time

from hook import check, switch

ROWS = 20000
PIECE = 64 * 1024


def psql(sql, database=None):
    where = ["-d", database] if database else []
    done = subprocess.run(
        ["psql", "-XAt", *where, "-c", sql], text=True, capture_output=True, timeout=60
    )
    check(f"psql -c {sql!r}: {done.stderr}", done.returncode, 0)
    return done.stdout.strip()


def dump():
    """Reads the dump in pieces, and asks for the move after the first one with data in it."""
    run = subprocess.Popen(
        ["pg_dump", "-Fc", "-Z0", "-t", "dump_*"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    pieces = []
    size, asked = 0, False
    while piece := run.stdout.read(PIECE):
        pieces.append(piece)
        size += len(piece)
        if size > 4 * PIECE and not asked:
            asked = True
            switch()
    errors = run.stderr.read().decode()
    check(f"pg_dump's exit status ({errors})", run.wait(timeout=60), 0)
    check("asked for a switchover", asked, True)
    return b"".join(pieces)


def restore(archive):
    run = subprocess.Popen(
        ["pg_restore", "--single-transaction", "--no-owner", "-d", "dump_copy"],
        stdin=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    half = len(archive) // 2
    run.stdin.write(archive[:half])
    run.stdin.flush()
    time.sleep(0.3)  # what was read is on its way to the server
    switch()
    run.stdin.write(archive[half:])
    run.stdin.close()
    errors = run.stderr.read().decode()
    check(f"pg_restore's exit status ({errors})", run.wait(timeout=60), 0)


DIGEST = "select count(*), md5(string_agg(i::text, '|' order by id)) from dump_items i"

psql("drop table if exists dump_items; drop sequence if exists dump_seq")
psql("drop database if exists dump_copy")
psql("create sequence dump_seq start 42")
psql(
    "create table dump_items as select g as id, repeat(md5(g::text), 4) as text,"
    f" g * 1.5 as number from generate_series(1, {ROWS}) g;"
    " alter table dump_items add primary key (id)"
)
psql("create database dump_copy")
restore(dump())
check("restored rows", psql(DIGEST, "dump_copy"), psql(DIGEST))
check("restored sequence", psql("select nextval('dump_seq')", "dump_copy"), "42")
psql("drop database dump_copy")
psql("drop table dump_items; drop sequence dump_seq")
sys.exit(0)
