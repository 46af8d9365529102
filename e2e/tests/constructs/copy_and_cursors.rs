//! COPY both ways, partly read results, cursors and portals.

use helios_e2e::lockstep::{Expect, Program, Step, Until, launch, part, program, q, x};
use helios_e2e::raw::{bind, close, describe, execute, flush, frame, parse, query, sync};

use Step::Move;

const T: &str = "create table t (id int primary key, v text)";
const ROWS: &str = "create table t (id int primary key, v text); \
                    insert into t select n, 'row ' || n from generate_series(1, 20) n";
const ALL: &str = "select * from t order by id";
/// More than all buffers between a server and its client hold: the server is still at it.
const LARGE: &str = "select n, repeat(md5(n::text), 40) from generate_series(1, 16000) n";

pub(crate) fn programs() -> Vec<Program> {
    let mut all = copies();
    all.extend(results());
    all.extend(cursors());
    all.extend(portals());
    all
}

fn data(rows: &str) -> Vec<u8> {
    frame(b'd', rows.as_bytes())
}

fn done() -> Vec<u8> {
    frame(b'c', b"")
}

/// Reads on, to the end of the exchange.
fn rest() -> Step {
    Step::Send(0, Vec::new(), Until::Ready(1))
}

fn copies() -> Vec<Program> {
    let many: String = (0..20_000).map(|n| format!("{n}\tcopied\n")).collect();
    vec![
        program(
            "copy_in_finished",
            T,
            vec![
                q("begin; insert into t values (-1, 'first')"),
                part(&[query("copy t from stdin")], b'G', 1),
                x(&[data(&many), data("20000\tlast\n"), done()]),
                Move,
                q("select count(*), sum(id) from t"),
                q("commit"),
            ],
            "select count(*), sum(id), min(v), max(v) from t",
        ),
        program(
            "copy_in_cut",
            T,
            vec![
                q("begin; insert into t values (-1, 'first')"),
                part(&[query("copy t from stdin")], b'G', 1),
                launch(&[data(&many), data("20000\thalf a ro")]),
                Move,
                x(&[data("w\n20001\tlast\n"), done()]),
                q("select count(*) from t"),
                q("commit"),
            ],
            "select count(*), sum(id), min(v), max(v) from t",
        ),
        program(
            "copy_in_cut_then_failed_by_the_client",
            T,
            vec![
                q("begin; insert into t values (-1, 'first'); savepoint s"),
                part(&[query("copy t from stdin")], b'G', 1),
                launch(&[data("1\ta\n")]),
                Move,
                x(&[frame(b'f', b"changed my mind\0")]),
                q("rollback to s"),
                q("commit"),
            ],
            ALL,
        ),
        program(
            "copy_in_cut_with_an_error_in_the_data",
            T,
            vec![
                q("begin; savepoint s"),
                part(&[query("copy t from stdin")], b'G', 1),
                launch(&[data("1\ta\n")]),
                Move,
                x(&[data("not a number\tb\n"), done()]),
                q("rollback to s; insert into t values (5, 'e')"),
                q("commit"),
            ],
            ALL,
        ),
        program(
            "copy_in_extended_cut",
            T,
            vec![
                q("begin"),
                part(
                    &[
                        parse("", "copy t from stdin"),
                        bind("", "", &[]),
                        execute("", 0),
                        flush(),
                    ],
                    b'G',
                    1,
                ),
                launch(&[data("1\ta\n")]),
                Move,
                x(&[data("2\tb\n"), done(), sync()]),
                q("commit"),
            ],
            ALL,
        ),
        program(
            "copy_out",
            ROWS,
            vec![
                q("begin"),
                q("update t set v = upper(v) where id < 3"),
                q("copy t to stdout"),
                Move,
                q("copy (select id, v from t order by id) to stdout with (format csv)"),
                q("commit"),
            ],
            ALL,
        ),
    ]
}

fn results() -> Vec<Program> {
    vec![
        program(
            "large_result_partly_read",
            T,
            vec![
                q("begin; insert into t values (1, 'a')"),
                part(&[query(LARGE)], b'D', 100),
                Move,
                rest(),
                q("insert into t values (2, 'b')"),
                q("commit"),
            ],
            ALL,
        ),
        program(
            "large_copy_out_partly_read",
            T,
            vec![
                q("begin; insert into t values (1, 'a')"),
                part(&[query(&format!("copy ({LARGE}) to stdout"))], b'd', 100),
                Move,
                rest(),
                q("insert into t values (2, 'b')"),
                q("commit"),
            ],
            ALL,
        ),
        program(
            "large_result_that_differs",
            T,
            vec![
                q("begin; insert into t values (1, 'a')"),
                part(
                    &[query(&LARGE.replace("n::text", "random()::text"))],
                    b'D',
                    100,
                ),
                Move,
                rest(),
                q("commit"),
            ],
            ALL,
        )
        .expecting(Expect::Retry("another result")),
        program(
            "statement_in_flight",
            T,
            vec![
                q("begin; insert into t values (1, 'a')"),
                launch(&[query(
                    "insert into t select 2, 'b' from pg_sleep(0.4) returning *",
                )]),
                Move,
                rest(),
                q("commit"),
            ],
            ALL,
        ),
        program(
            "commit_in_flight",
            T,
            vec![
                q("begin; insert into t values (1, 'a')"),
                launch(&[query("commit")]),
                Move,
                rest(),
            ],
            ALL,
        ),
        program(
            "rollback_in_flight",
            T,
            vec![
                q("begin; insert into t values (1, 'a')"),
                launch(&[query("rollback")]),
                Move,
                rest(),
            ],
            ALL,
        ),
    ]
}

fn cursors() -> Vec<Program> {
    vec![
        program(
            "cursor_scroll",
            ROWS,
            vec![
                q("begin"),
                q("declare c scroll cursor for select * from t order by id"),
                q("fetch 5 from c"),
                q("fetch backward 2 from c"),
                Move,
                q("fetch next from c"),
                q("fetch prior from c"),
                q("fetch absolute 3 from c"),
                q("fetch relative -1 from c"),
                q("fetch last from c"),
                Move,
                q("fetch backward all from c"),
                q("fetch first from c"),
                q("close c"),
                q("commit"),
            ],
            "select 1",
        ),
        program(
            "cursor_no_scroll",
            ROWS,
            vec![
                q("begin"),
                q("declare c no scroll cursor for select * from t order by id"),
                q("fetch 3 from c"),
                q("move 2 from c"),
                Move,
                q("fetch 2 from c"),
                q("savepoint s"),
                q("fetch prior from c"),
                q("rollback to s"),
                q("fetch 1 from c"),
                q("commit"),
            ],
            "select 1",
        ),
        program(
            "cursor_updates_where_current",
            ROWS,
            vec![
                q("begin"),
                q("declare c cursor for select * from t where id < 9 for update"),
                q("fetch 2 from c"),
                q("update t set v = 'here' where current of c"),
                Move,
                q("fetch 1 from c"),
                q("delete from t where current of c"),
                q("fetch 1 from c"),
                q("update t set v = 'there' where current of c returning *"),
                q("commit"),
            ],
            ALL,
        ),
        program(
            "cursors_and_savepoints",
            ROWS,
            vec![
                q("begin"),
                q("declare a cursor for select * from t order by id"),
                q("fetch 1 from a"),
                q("savepoint s"),
                q("declare b insensitive cursor for select * from t order by id desc"),
                q("fetch 2 from b"),
                q("fetch 2 from a"),
                q("delete from t where id > 15"),
                Move,
                q("fetch 1 from b"),
                q("rollback to s"),
                q("fetch 1 from a"),
                q("fetch 1 from b"),
                q("rollback"),
            ],
            ALL,
        ),
        program(
            "cursor_with_hold_inside",
            ROWS,
            vec![
                q("begin"),
                q("declare c cursor with hold for select * from t order by id"),
                q("fetch 2 from c"),
                Move,
                q("fetch 2 from c"),
                q("close c"),
                q("commit"),
            ],
            "select 1",
        ),
        program(
            "cursor_of_a_function",
            "create table t (id int); insert into t select generate_series(1, 9); \
             create function f(refcursor) returns refcursor language plpgsql as \
             'begin open $1 for select * from t order by id; return $1; end'",
            vec![
                q("begin"),
                q("select f('mine')"),
                q("fetch 3 from mine"),
                Move,
                q("fetch 3 from mine"),
                q("commit"),
            ],
            "select 1",
        ),
    ]
}

fn portals() -> Vec<Program> {
    let select = "select * from t order by id";
    vec![
        program(
            "portal_suspended",
            ROWS,
            vec![
                q("begin"),
                x(&[
                    parse("s", select),
                    bind("p", "s", &[]),
                    describe('P', "p"),
                    execute("p", 5),
                    sync(),
                ]),
                x(&[execute("p", 3), sync()]),
                Move,
                x(&[execute("p", 4), sync()]),
                q("update t set v = 'changed' where id = 20"),
                Move,
                x(&[execute("p", 0), sync()]),
                x(&[close('P', "p"), sync()]),
                q("commit"),
            ],
            ALL,
        ),
        program(
            "portal_suspended_without_sync",
            ROWS,
            vec![
                q("begin"),
                part(
                    &[
                        parse("", select),
                        bind("", "", &[]),
                        execute("", 5),
                        flush(),
                    ],
                    b's',
                    1,
                ),
                Move,
                part(&[execute("", 5), flush()], b's', 1),
                x(&[execute("", 0), sync()]),
                q("commit"),
            ],
            ALL,
        ),
        program(
            "two_portals_of_one_statement",
            ROWS,
            vec![
                q("begin"),
                x(&[
                    parse("s", "select id from t where id > $1 order by id"),
                    bind("a", "s", &["3"]),
                    bind("b", "s", &["10"]),
                    execute("a", 2),
                    execute("b", 2),
                    execute("a", 2),
                    sync(),
                ]),
                Move,
                x(&[execute("b", 2), execute("a", 2), sync()]),
                q("commit"),
                x(&[execute("a", 2), sync()]),
            ],
            "select 1",
        ),
        program(
            "unnamed_portal_goes_on",
            ROWS,
            vec![
                q("begin"),
                x(&[parse("", select), bind("", "", &[]), execute("", 7), sync()]),
                Move,
                x(&[execute("", 7), sync()]),
                x(&[execute("", 7), sync()]),
                q("commit"),
            ],
            "select 1",
        ),
        program(
            "portal_of_an_update_returning",
            ROWS,
            vec![
                q("begin"),
                x(&[
                    parse("", "update t set v = 'u' returning id"),
                    bind("p", "", &[]),
                    execute("p", 5),
                    sync(),
                ]),
                Move,
                x(&[execute("p", 0), sync()]),
                q("commit"),
            ],
            ALL,
        ),
    ]
}
