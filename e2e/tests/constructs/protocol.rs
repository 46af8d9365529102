//! What only the extended protocol has: prepared statements, pipelines, Flush.

use helios_e2e::lockstep::{Program, Step, Until, launch, part, program, q, x};
use helios_e2e::raw::{
    bind, close, describe, execute, extended, flush, function_call, parse, query, sync,
};

use Step::Move;

const T: &str = "create table t (id int primary key, v text)";
const ALL: &str = "select * from t order by id";
const INSERT: &str = "insert into t values ($1, $2) returning id";

/// `int4pl(integer, integer)` in `src/include/catalog/pg_proc.dat`.
const INT4PL: u32 = 177;

pub(crate) fn programs() -> Vec<Program> {
    let mut all = statements();
    all.extend(pipelines());
    all
}

fn statements() -> Vec<Program> {
    vec![
        program(
            "statement_made_inside",
            T,
            vec![
                q("begin"),
                x(&[parse("s", INSERT), describe('S', "s"), sync()]),
                x(&[bind("", "s", &["1", "a"]), execute("", 0), sync()]),
                Move,
                x(&[
                    bind("", "s", &["2", "b"]),
                    describe('P', ""),
                    execute("", 0),
                    sync(),
                ]),
                q("rollback"),
                // Statements of the protocol are no part of the transaction.
                Move,
                q("begin"),
                x(&[bind("", "s", &["3", "c"]), execute("", 0), sync()]),
                q("commit"),
            ],
            ALL,
        ),
        program(
            "statement_dropped_inside",
            T,
            vec![
                x(&[parse("s", INSERT), parse("r", "select 1"), sync()]),
                q("begin"),
                x(&[bind("", "s", &["1", "a"]), execute("", 0), sync()]),
                x(&[close('S', "s"), parse("s", "select $1::int * 2"), sync()]),
                x(&[close('S', "r"), sync()]),
                Move,
                x(&[bind("", "s", &["21"]), execute("", 0), sync()]),
                q("savepoint p"),
                x(&[bind("", "r", &[]), execute("", 0), sync()]),
                q("rollback to p"),
                q("commit"),
                x(&[bind("", "s", &["4"]), execute("", 0), sync()]),
            ],
            ALL,
        ),
        program(
            "unnamed_statement_kept",
            T,
            vec![
                q("begin"),
                x(&[
                    parse("", INSERT),
                    bind("", "", &["1", "a"]),
                    execute("", 0),
                    sync(),
                ]),
                Move,
                x(&[bind("", "", &["2", "b"]), execute("", 0), sync()]),
                Move,
                x(&[bind("", "", &["3", "c"]), execute("", 0), sync()]),
                q("commit"),
            ],
            ALL,
        ),
        program(
            "begin_and_commit_by_extended_query",
            T,
            vec![
                x(&[extended("begin", &[]), sync()]),
                x(&[extended(INSERT, &["1", "a"]), sync()]),
                Move,
                x(&[extended(INSERT, &["2", "b"]), sync()]),
                x(&[extended("commit", &[]), sync()]),
            ],
            ALL,
        ),
        program(
            "function_call",
            T,
            vec![
                q("begin; insert into t values (1, 'a')"),
                x(&[function_call(INT4PL, &["40", "2"])]),
                Move,
                x(&[function_call(INT4PL, &["20", "1"])]),
                q("commit"),
            ],
            ALL,
        ),
        program(
            "failed_by_extended_query",
            T,
            vec![
                q("begin"),
                x(&[extended(INSERT, &["1", "a"]), sync()]),
                q("savepoint s"),
                x(&[
                    extended(INSERT, &["1", "again"]),
                    extended(INSERT, &["2", "skipped"]),
                    sync(),
                ]),
                Move,
                x(&[extended(INSERT, &["3", "c"]), sync()]),
                q("rollback to s"),
                x(&[extended(INSERT, &["4", "d"]), sync()]),
                q("commit"),
            ],
            ALL,
        ),
    ]
}

fn pipelines() -> Vec<Program> {
    let three = |from: usize| {
        (from..from + 3)
            .flat_map(|n| extended(INSERT, &[&n.to_string(), "p"]))
            .collect::<Vec<u8>>()
    };
    vec![
        program(
            "pipeline_cut_before_its_sync",
            T,
            vec![
                q("begin"),
                part(&[three(1), flush()], b'C', 3),
                Move,
                x(&[three(4), sync()]),
                q("commit"),
            ],
            ALL,
        ),
        program(
            "pipeline_cut_in_a_statement",
            T,
            vec![
                q("begin"),
                launch(&[
                    three(1),
                    extended("select 'slow' from pg_sleep(0.3)", &[]),
                    three(4),
                    flush(),
                ]),
                Move,
                x(&[three(7), sync()]),
                q("commit"),
            ],
            ALL,
        ),
        program(
            "pipeline_of_several_syncs_cut",
            T,
            vec![
                launch(&[
                    extended("begin", &[]),
                    sync(),
                    three(1),
                    sync(),
                    extended("select 'slow' from pg_sleep(0.3)", &[]),
                    sync(),
                    three(4),
                    sync(),
                ]),
                Move,
                Step::Send(0, three(7), Until::Ready(4)),
                x(&[sync()]),
                q("commit"),
            ],
            ALL,
        ),
        program(
            "pipeline_with_its_commit_cut",
            T,
            vec![
                launch(&[
                    extended("begin", &[]),
                    sync(),
                    three(1),
                    sync(),
                    extended("select 'slow' from pg_sleep(0.3)", &[]),
                    sync(),
                    extended("commit", &[]),
                    sync(),
                ]),
                Move,
                Step::Send(0, Vec::new(), Until::Ready(4)),
            ],
            ALL,
        ),
        program(
            "pipeline_that_fails_before_the_move",
            T,
            vec![
                q("begin; savepoint s"),
                part(
                    &[three(1), extended(INSERT, &["1", "again"]), flush()],
                    b'C',
                    3,
                ),
                Move,
                x(&[three(4), sync()]),
                q("rollback to s"),
                x(&[three(7), sync()]),
                q("commit"),
            ],
            ALL,
        ),
        program(
            "pipeline_parsed_but_not_bound",
            T,
            vec![
                q("begin"),
                part(&[parse("s", INSERT), flush()], b'1', 1),
                Move,
                x(&[bind("", "s", &["1", "a"]), execute("", 0), sync()]),
                q("commit"),
                x(&[bind("", "s", &["2", "b"]), execute("", 0), sync()]),
            ],
            ALL,
        ),
        program(
            "simple_queries_pipelined",
            T,
            vec![
                launch(&[
                    query("begin"),
                    query("insert into t values (1, 'a')"),
                    query("select 'slow' from pg_sleep(0.3)"),
                    query("insert into t values (2, 'b') returning *"),
                ]),
                Move,
                Step::Send(0, query("commit"), Until::Ready(5)),
            ],
            ALL,
        ),
    ]
}
