//! Large objects, temporary tables, NOTIFY.

use helios_e2e::lockstep::{Program, Step, Until, program, q, second, x};
use helios_e2e::raw::{function_call, query};

use Step::Move;

/// `lo_open(oid, integer)`, `loread(integer, integer)`, `lowrite(integer, bytea)`,
/// `lo_lseek(integer, integer, integer)` in `src/include/catalog/pg_proc.dat`.
const LO_OPEN: u32 = 952;
const LOREAD: u32 = 954;
const LOWRITE: u32 = 955;
const LO_LSEEK: u32 = 956;

pub(crate) fn programs() -> Vec<Program> {
    let mut all = large_objects();
    all.extend(temporary());
    all.extend(notify());
    all
}

fn large_objects() -> Vec<Program> {
    vec![
        program(
            "large_object",
            "select lo_unlink(oid) from pg_largeobject_metadata where oid = 47110",
            vec![
                q("begin"),
                q("select lo_create(47110)"),
                q("select lo_open(47110, 393216)"),
                q("select lowrite(0, 'hello world')"),
                q("select lo_lseek(0, 3, 0)"),
                Move,
                q("select loread(0, 4)"),
                q("select lo_tell(0)"),
                q("select lowrite(0, 'W')"),
                Move,
                q("select lo_truncate(0, 9)"),
                q("select lo_close(0)"),
                q("commit"),
            ],
            "select lo_get(47110)",
        ),
        program(
            "large_object_by_function_calls",
            "select lo_unlink(oid) from pg_largeobject_metadata where oid = 47111; \
             select lo_from_bytea(47111, 'some bytes')",
            vec![
                q("begin"),
                x(&[function_call(LO_OPEN, &["47111", "393216"])]),
                x(&[function_call(LOREAD, &["0", "4"])]),
                x(&[function_call(LO_LSEEK, &["0", "5", "0"])]),
                Move,
                x(&[function_call(LOREAD, &["0", "3"])]),
                x(&[function_call(LOWRITE, &["0", "ES"])]),
                q("commit"),
            ],
            "select lo_get(47111)",
        ),
        program(
            "large_object_undone",
            "select lo_unlink(oid) from pg_largeobject_metadata where oid = 47112",
            vec![
                q("begin"),
                q("select lo_from_bytea(47112, 'gone')"),
                q("savepoint s; select lo_unlink(47112)"),
                q("rollback to s"),
                Move,
                q("select lo_get(47112)"),
                q("rollback"),
            ],
            "select count(*) from pg_largeobject_metadata where oid = 47112",
        ),
    ]
}

fn temporary() -> Vec<Program> {
    vec![
        program(
            "temporary_table_dropped_on_commit",
            "create table t (id int)",
            vec![
                q("begin"),
                q("create temp table w (id int) on commit drop"),
                q("insert into w select generate_series(1, 10)"),
                Move,
                q("insert into w values (11)"),
                q("insert into t select * from w where id > 8"),
                q("commit"),
                q("select to_regclass('w')"),
            ],
            "select * from t order by id",
        ),
        program(
            "temporary_table_made_inside",
            "create table t (id int)",
            vec![
                q("begin"),
                q("create temporary table w as select generate_series(1, 10) as id"),
                q("create index on w (id)"),
                Move,
                q("delete from w where id < 9 returning id"),
                q("insert into t select * from w"),
                q("commit"),
                q("select * from w order by id"),
            ],
            "select * from t order by id",
        ),
        program(
            "temporary_table_alone",
            "",
            vec![
                q("begin"),
                q("create temp table w (id int) on commit delete rows"),
                q("insert into w values (1), (2)"),
                Move,
                q("select * from w"),
                q("commit"),
                q("select * from w"),
            ],
            "select 1",
        ),
    ]
}

fn notify() -> Vec<Program> {
    vec![
        program(
            "notify",
            "",
            vec![
                q("begin"),
                q("notify of_notify, 'before'"),
                q("select pg_notify('of_notify', 'function')"),
                q("savepoint s; notify of_notify, 'undone'"),
                q("rollback to s"),
                Move,
                second("listen of_notify"),
                q("notify of_notify, 'after'"),
                q("commit"),
                Step::Send(1, Vec::new(), Until::Tag(b'A', 3)),
                second("select 1"),
            ],
            "select 1",
        ),
        program(
            "notify_undone",
            "",
            vec![
                q("begin"),
                q("notify of_notify_undone, 'never'"),
                Move,
                second("listen of_notify_undone"),
                q("rollback"),
                q("notify of_notify_undone, 'now'"),
                Step::Send(1, query("select 1"), Until::Tag(b'A', 1)),
            ],
            "select 1",
        ),
    ]
}
