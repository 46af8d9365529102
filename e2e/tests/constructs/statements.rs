//! Statements by simple query: savepoints, failures, DDL, settings, values.

use helios_e2e::lockstep::{Expect, Program, Step, program, q};

use Step::{Move, Other};

const T: &str = "create table t (id int primary key, v text)";
const ALL: &str = "select * from t order by id";

pub(crate) fn programs() -> Vec<Program> {
    let mut all = savepoints();
    all.extend(failures());
    all.extend(settings());
    all.extend(values());
    all.extend(others());
    all
}

fn savepoints() -> Vec<Program> {
    vec![
        program(
            "savepoints",
            T,
            vec![
                q("begin"),
                q("insert into t values (1, 'a')"),
                q("savepoint a"),
                q("insert into t values (2, 'b')"),
                q("savepoint b"),
                q("insert into t values (3, 'c')"),
                q("rollback to b"),
                Move,
                q("insert into t values (4, 'd') returning *"),
                q("rollback to savepoint a"),
                q("insert into t values (5, 'e')"),
                Move,
                q("release a"),
                q(ALL),
                q("commit"),
            ],
            ALL,
        ),
        program(
            "savepoint_names_nest",
            T,
            vec![
                q("begin; savepoint s; insert into t values (1, 'a')"),
                q("savepoint s"),
                q("insert into t values (2, 'b')"),
                Move,
                q("rollback to s"),
                q("release s"),
                q(ALL),
                q("rollback work to savepoint s"),
                q(ALL),
                q("insert into t values (3, 'c')"),
                q("end"),
            ],
            ALL,
        ),
        program(
            "rolled_back",
            T,
            vec![
                q("start transaction"),
                q("insert into t values (1, 'a')"),
                Move,
                q(ALL),
                q("abort"),
                q(ALL),
            ],
            ALL,
        ),
    ]
}

fn failures() -> Vec<Program> {
    vec![
        program(
            "failed_transaction",
            T,
            vec![
                q("begin"),
                q("insert into t values (1, 'a')"),
                q("select 1 / 0"),
                Move,
                q("select 1"),
                q("insert into t values (2, 'b')"),
                Move,
                q("commit"),
                q("insert into t values (3, 'c')"),
            ],
            ALL,
        ),
        program(
            "failed_and_back_to_a_savepoint",
            T,
            vec![
                q("begin"),
                q("insert into t values (1, 'a')"),
                q("savepoint s"),
                q("insert into t values (1, 'again')"),
                Move,
                q("select 1"),
                q("rollback to s"),
                q("insert into t values (2, 'b')"),
                q("commit"),
            ],
            ALL,
        ),
        program(
            "several_statements_of_which_one_fails",
            T,
            vec![
                q("begin; insert into t values (1, 'a'); savepoint s"),
                q("insert into t values (2, 'b'); select * from nowhere; select 3"),
                Move,
                q("rollback to s; select * from t; insert into t values (3, 'c')"),
                q("commit"),
            ],
            ALL,
        ),
        program(
            "deferred_constraint_mended",
            "create table t (id int primary key, v text); insert into t values (1, 'a'), (2, 'b'); \
             create table f (t int references t deferrable initially deferred)",
            vec![
                q("begin"),
                q("insert into f values (7)"),
                Move,
                q("update t set id = 7 where v = 'b'"),
                q("set constraints all immediate"),
                q("commit"),
            ],
            "select * from t, f order by id",
        ),
        program(
            "deferred_constraint_broken",
            "create table t (id int primary key deferrable initially deferred, v text)",
            vec![
                q("begin"),
                q("insert into t values (1, 'a'), (1, 'b')"),
                Move,
                q(ALL),
                q("commit"),
                q("select 1"),
            ],
            ALL,
        ),
        program(
            "constraints_set_deferred",
            "create table t (id int primary key deferrable, v text)",
            vec![
                q("begin; set constraints all deferred"),
                q("insert into t values (1, 'a'), (1, 'b')"),
                Move,
                q("savepoint s; set constraints all immediate"),
                q("rollback to s; delete from t where v = 'a'"),
                q("commit"),
            ],
            ALL,
        ),
    ]
}

fn settings() -> Vec<Program> {
    let show = "select current_setting('work_mem'), current_setting('my.thing', true), \
                current_setting('application_name')";
    vec![
        program(
            "set_local",
            "set work_mem = '5MB'; set my.thing = 'before'",
            vec![
                q("begin"),
                q("set local work_mem = '9MB'"),
                q("select set_config('my.thing', 'within', true)"),
                q("savepoint s; set local work_mem = '11MB'"),
                q("rollback to s"),
                Move,
                q(show),
                q("set local work_mem = '13MB'"),
                Move,
                q(show),
                q("commit"),
                q(show),
            ],
            "select 1",
        ),
        program(
            "set_inside_kept",
            "set work_mem = '5MB'",
            vec![
                q("begin"),
                q("set work_mem = '9MB'"),
                q("select set_config('my.thing', 'set', false)"),
                Move,
                q(show),
                q("commit"),
                Move,
                q("begin"),
                q(show),
                q("commit"),
            ],
            "select 1",
        ),
        program(
            "set_inside_undone",
            "set work_mem = '5MB'",
            vec![
                q("begin"),
                q("set work_mem = '9MB'; set role pg_monitor"),
                Move,
                q("select current_user"),
                q(show),
                q("rollback"),
                Move,
                q("begin"),
                q("select current_user = session_user"),
                q(show),
                q("commit"),
            ],
            "select 1",
        ),
        program(
            "time_zone_and_date_style",
            "set timezone = 'Asia/Tokyo'; set datestyle = 'SQL, DMY'",
            vec![
                q("begin; set local timezone = 'America/New_York'"),
                q("select timestamptz '2026-01-02 03:04:05+00'"),
                Move,
                q("select timestamptz '2026-01-02 03:04:05+00'"),
                q("commit"),
                q("select timestamptz '2026-01-02 03:04:05+00'"),
            ],
            "select 1",
        ),
        program(
            "prepared_by_sql",
            "create table t (id int primary key, v text); \
             prepare old (int) as select $1 + 1; prepare other as select 'other'",
            vec![
                q("begin"),
                q("prepare new (int, text) as insert into t values ($1, $2) returning *"),
                q("execute new (1, 'a')"),
                q("deallocate other"),
                Move,
                q("execute new (2, 'b')"),
                q("execute old (41)"),
                q("savepoint s"),
                q("execute other"),
                q("rollback to s"),
                q("rollback"),
                Move,
                q("begin"),
                q("execute new (3, 'c')"),
                q("savepoint s"),
                q("execute other"),
                q("rollback to s"),
                q("commit"),
            ],
            ALL,
        ),
    ]
}

fn values() -> Vec<Program> {
    let serial = "create table t (id serial primary key, v text)";
    vec![
        program(
            "serial_ids",
            serial,
            vec![
                q("begin"),
                q("insert into t (v) values ('a'), ('b') returning id"),
                Move,
                // The next value jumps after a promotion, as it does on PostgreSQL alone.
                q("insert into t (v) values ('c') returning id > 2 and id = lastval()"),
                q("select currval('t_id_seq') = max(id) from t"),
                q("commit"),
            ],
            "select id from t where v <> 'c' order by id",
        ),
        program(
            "uuid_seen",
            "create table t (id int, u uuid)",
            vec![
                q("begin"),
                q("insert into t values (1, gen_random_uuid())"),
                q("update t set u = gen_random_uuid() returning length(u::text)"),
                q("insert into t values (2, gen_random_uuid()) returning u is null, u"),
                Move,
                q("select count(*) from t"),
                q("commit"),
            ],
            "select id from t",
        )
        .expecting(Expect::Retry("RETURNING")),
        program(
            "random_written_and_read",
            "create table t (id int, r float8)",
            vec![
                q("begin"),
                q("insert into t values (1, random())"),
                q("select r from t"),
                Move,
                q("select 1"),
                q("commit"),
            ],
            "select id from t",
        )
        .expecting(Expect::Retry("rows of a result")),
        program(
            "now_written_and_read",
            "create table t (id int, at timestamptz default now())",
            vec![
                q("begin"),
                q("insert into t values (1)"),
                q("select at from t"),
                Move,
                q("commit"),
            ],
            "select id from t",
        )
        .expecting(Expect::Retry("rows of a result")),
        program(
            "now_unseen",
            "create table t (id int, at timestamptz default now())",
            vec![
                q("begin"),
                q("insert into t values (1)"),
                Move,
                q("select at = now(), at <= clock_timestamp() from t"),
                q("commit"),
            ],
            "select id from t",
        ),
    ]
}

fn others() -> Vec<Program> {
    vec![
        program(
            "ddl",
            "create table old (a int)",
            vec![
                q("begin"),
                q("create table t (id int primary key, v text)"),
                q("alter table t add column w int default 3"),
                q("create index on t (w)"),
                q("insert into t values (1, 'a')"),
                q("drop table old"),
                q("create type mood as enum ('sad', 'ok')"),
                q("create function f(int) returns int language sql as 'select $1 * 2'"),
                Move,
                q("insert into t values (2, 'b', f(21)) returning *"),
                q("comment on table t is 'new'"),
                q("create view w as select * from t where w > 3"),
                q("truncate t; insert into t values (3, 'ok'::mood::text, 4)"),
                q("commit"),
                q("table w"),
            ],
            "select * from t, (select to_regclass('old')) o",
        ),
        program(
            "ddl_undone",
            "create table t (id int primary key, v text); insert into t values (1, 'a')",
            vec![
                q("begin"),
                q("alter table t rename to u; truncate u; create table t (x int)"),
                Move,
                q("select * from t, u"),
                q("rollback"),
            ],
            ALL,
        ),
        program(
            "several_statements_in_one_query",
            T,
            vec![
                q("begin; insert into t values (1, 'a'); insert into t values (2, 'b')"),
                q("update t set v = 'c' where id = 1; select * from t order by id; select 7"),
                Move,
                q("update t set v = v || id; select * from t order by id; delete from t where id = 2"),
                q("select 1; commit"),
            ],
            ALL,
        ),
        program(
            "procedural",
            "create table t (id int primary key, v text); \
             create procedure p(n int) language plpgsql as \
             'begin insert into t values (n, ''p''); end'; \
             create function g(n int) returns int language plpgsql as \
             'begin insert into t values (n, ''g''); return n; \
              exception when unique_violation then return -n; end'",
            vec![
                q("begin"),
                q("call p(1)"),
                q("select g(1)"),
                q("do $$ begin insert into t values (2, 'do'); end $$"),
                Move,
                q("select g(3), g(2)"),
                q("do $$ begin perform g(4); call p(5); end $$"),
                q("commit"),
            ],
            ALL,
        ),
        program(
            "merge_upsert_and_writing_cte",
            "create table t (id int primary key, v text); insert into t values (1, 'a')",
            vec![
                q("begin"),
                q("insert into t values (1, 'b') on conflict (id) do update set v = 'u' returning *"),
                q("merge into t using (values (1), (2)) s (id) on t.id = s.id \
                   when matched then update set v = 'm' when not matched then insert values (s.id, 'n')"),
                q("with d as (delete from t where id = 2 returning *) insert into t select id + 10, v from d returning *"),
                Move,
                q("merge into t using (values (1)) s (id) on t.id = s.id when matched then delete"),
                q("select * from t"),
                q("commit"),
            ],
            ALL,
        ),
        program(
            "changed_by_others_and_read_again",
            "create table t (id int primary key, v text); insert into t values (1, 'a')",
            vec![
                q("begin"),
                q("select v from t"),
                Other("update t set v = 'b'"),
                q("select v from t"),
                Move,
                q("update t set v = v || 'c' returning v"),
                q("commit"),
            ],
            ALL,
        ),
        program(
            "changed_by_others_and_returned",
            "create table t (id int primary key, v text); insert into t values (1, 'a'); create table log (v text)",
            vec![
                q("begin"),
                q("insert into log select v from t returning v"),
                Other("update t set v = 'b'"),
                Move,
                q("select v from log"),
                q("commit"),
            ],
            "select * from t, log",
        )
        .expecting(Expect::Retry("RETURNING")),
        program(
            "changed_by_others_copied_and_read_back",
            "create table t (id int primary key, v text); insert into t values (1, 'a'); create table log (v text)",
            vec![
                q("begin"),
                q("insert into log select v from t"),
                q("select v from log"),
                Other("update t set v = 'b'"),
                Move,
                q("select v from log"),
                q("commit"),
            ],
            "select * from log",
        )
        .expecting(Expect::Retry("rows of a result")),
        program(
            "added_by_others",
            "create table t (id int primary key, v text); insert into t values (1, 'a')",
            vec![
                q("begin"),
                q("select * from t"),
                Other("insert into t values (2, 'b')"),
                Move,
                q("select 1"),
                q("commit"),
            ],
            ALL,
        )
        .expecting(Expect::Retry("SELECT 2")),
        program(
            "taken_by_others",
            "create table t (id int primary key, v int); insert into t values (1, 1), (2, 1)",
            vec![
                q("begin"),
                q("update t set v = v + 1 where v = 1 and id = 1"),
                Other("delete from t where id = 2"),
                Move,
                q("update t set v = v + 1"),
                q("commit"),
            ],
            ALL,
        ),
    ]
}
