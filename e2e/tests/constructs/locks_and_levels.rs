//! Locks of every kind, and isolation levels.

use helios_e2e::lockstep::{Expect, Program, Step, program, q, second};

use Step::{Move, Other};

const ROWS: &str = "create table t (id int primary key, v int); \
                    insert into t select n, n from generate_series(1, 5) n";
const ALL: &str = "select * from t order by id";

pub(crate) fn programs() -> Vec<Program> {
    let mut all = locks();
    all.extend(rows());
    all.extend(levels());
    all
}

fn locks() -> Vec<Program> {
    vec![
        program(
            "advisory_locks",
            "",
            vec![
                q("begin"),
                q("select pg_advisory_xact_lock(77001)"),
                q("select pg_advisory_xact_lock_shared(77002)"),
                q("select pg_try_advisory_xact_lock(7, 7003)"),
                q("savepoint s; select pg_advisory_xact_lock(77004)"),
                q("rollback to s"),
                Move,
                Other(
                    "select pg_try_advisory_xact_lock(77001), pg_try_advisory_xact_lock(77002), \
                     pg_try_advisory_xact_lock_shared(77002), \
                     pg_try_advisory_xact_lock(7, 7003), pg_try_advisory_xact_lock(77004)",
                ),
                q("commit"),
                Other("select pg_try_advisory_xact_lock(77001)"),
            ],
            "select 1",
        ),
        program(
            "lock_table",
            ROWS,
            vec![
                q("begin"),
                q("lock table t in exclusive mode"),
                Move,
                Other("begin; lock table t in share mode nowait"),
                Other("begin; lock table t in access share mode nowait"),
                q("update t set v = 0"),
                q("commit"),
                Other("begin; lock table t in share mode nowait"),
            ],
            ALL,
        ),
    ]
}

fn rows() -> Vec<Program> {
    vec![
        program(
            "select_for_update",
            ROWS,
            vec![
                q("begin"),
                q("select * from t where id = 2 for update"),
                q("select * from t where id = 4 for key share"),
                Move,
                Other("select * from t where id = 2 for update nowait"),
                Other("select id from t order by id for update skip locked"),
                Other("select id from t order by id for share skip locked"),
                q("update t set v = v * 10 where id = 2"),
                q("commit"),
            ],
            ALL,
        ),
        program(
            "skip_locked",
            ROWS,
            vec![
                q("begin"),
                q("select id from t order by id limit 1 for update skip locked"),
                second("begin"),
                second("select id from t order by id limit 1 for update skip locked"),
                Move,
                q("select id from t order by id limit 1 for update skip locked"),
                q("delete from t where id in (1)"),
                second("delete from t where id in (2)"),
                q("commit"),
                second("commit"),
            ],
            ALL,
        )
        .expecting(Expect::Either),
        program(
            "nowait",
            ROWS,
            vec![
                second("begin"),
                second("select * from t where id = 1 for update"),
                q("begin; savepoint s"),
                q("select * from t where id = 1 for update nowait"),
                q("rollback to s"),
                Move,
                q("update t set v = 0 where id = 3"),
                q("commit"),
                second("commit"),
            ],
            ALL,
        )
        .expecting(Expect::Either),
        program(
            "two_sessions_write_side_by_side",
            ROWS,
            vec![
                q("begin"),
                second("begin"),
                q("update t set v = 10 where id = 1 returning *"),
                second("update t set v = 20 where id = 2 returning *"),
                Move,
                q("update t set v = v + 1 where id = 1 returning *"),
                second("update t set v = v + 1 where id = 2 returning *"),
                second("commit"),
                q("select * from t where id < 3 order by id"),
                q("commit"),
            ],
            ALL,
        ),
    ]
}

const SUM: &str = "select sum(v), count(*) from t";

/// Reads, with or without a change by somebody else before the move.
fn reads(name: &'static str, begin: &'static str, disturbed: bool) -> Program {
    let mut steps: Vec<Step> = begin.split(';').map(q).collect();
    steps.push(q(SUM));
    if disturbed {
        steps.push(Other("update t set v = v + 100 where id = 1"));
    }
    steps.extend([Move, q(SUM), q("select * from t order by id"), q("commit")]);
    let program = program(name, ROWS, steps, "select 1");
    if disturbed {
        program.expecting(Expect::Retry("rows of a result differ under"))
    } else {
        program
    }
}

pub(crate) fn deferrable() -> Vec<Program> {
    let deferrable = "begin isolation level serializable, read only, deferrable";
    vec![
        reads("deferrable_read_only", deferrable, false),
        reads("deferrable_read_only_disturbed", deferrable, true),
    ]
}

fn levels() -> Vec<Program> {
    let repeatable = "begin isolation level repeatable read read only";
    let serializable = "begin isolation level serializable, read only";
    let by_statement = "begin; set transaction isolation level repeatable read";
    let by_default = "set default_transaction_isolation = 'serializable'; begin";
    let mut all = vec![
        reads("repeatable_read_only", repeatable, false),
        reads("repeatable_read_only_disturbed", repeatable, true),
        reads("serializable_read_only", serializable, false),
        reads("serializable_read_only_disturbed", serializable, true),
        reads("level_set_by_a_statement", by_statement, true),
        reads("level_by_default", by_default, true),
    ];
    all.push(program(
        "read_only_stays_read_only",
        ROWS,
        vec![
            q("begin read only"),
            q(SUM),
            Move,
            q("show transaction_read_only"),
            q("update t set v = 0"),
            q("rollback"),
        ],
        ALL,
    ));
    all.push(program(
        "repeatable_writes",
        ROWS,
        vec![
            q("begin isolation level repeatable read"),
            q("update t set v = v + 1 where id = 2 returning v"),
            q(SUM),
            Move,
            q("update t set v = v + 1 where id = 2 returning v"),
            q("show transaction_isolation"),
            q("commit"),
        ],
        ALL,
    ));
    all.push(program(
        "serializable_writes",
        ROWS,
        vec![
            q("begin isolation level serializable"),
            q("select * from t where id = 2"),
            q("insert into t select 6, sum(v) from t"),
            Move,
            q("select v from t where id = 6"),
            q("commit"),
        ],
        ALL,
    ));
    all
}
