//! Bugs of peers about what is trusted and what is kept secret, on a whole cluster. Each test has
//! the name of the bug that it is about.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use helios_e2e::chaos::cluster::{Cluster, Shape, redundant};
use helios_e2e::chaos::experiment::RECOVERY_LIMIT;
use helios_e2e::chaos::processes;
use helios_e2e::{Result, Shown};
use helios_local::Credentials;
use tokio_postgres::{Client, Config, NoTls};

const SHAPE: Shape = Shape {
    instances: 2,
    synchronous: true,
    small_disks: false,
};

/// The product, built beside this test.
fn helios() -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let path = own.ancestors().nth(2).ok_or("no folder")?.join("helios");
    match path.is_file() {
        true => Ok(path),
        false => Err(format!("there is no program \"{}\"", path.display()).into()),
    }
}

async fn connect(config: &Config) -> Result<Client> {
    let (client, connection) = config.connect(NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// All regular files under a folder.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let (mut found, mut folders) = (Vec::new(), vec![folder.to_owned()]);
    while let Some(folder) = folders.pop() {
        // A server removes files at any time.
        let Ok(entries) = std::fs::read_dir(&folder) else {
            continue;
        };
        for entry in entries {
            let path = entry?.path();
            match std::fs::symlink_metadata(&path) {
                Ok(meta) if meta.is_dir() => folders.push(path),
                Ok(meta) if meta.is_file() => found.push(path),
                _ => {}
            }
        }
    }
    Ok(found)
}

/// The files that hold a text.
fn holding(folder: &Path, text: &str) -> Result<Vec<PathBuf>> {
    let finder = |bytes: &[u8]| bytes.windows(text.len()).any(|w| w == text.as_bytes());
    let holds = |path: &PathBuf| std::fs::read(path).is_ok_and(|bytes| finder(&bytes));
    Ok(files(folder)?.into_iter().filter(holds).collect())
}

/// A switchover, then a crash.
async fn moves(cluster: &Cluster) -> Result<()> {
    let (_, moved) = cluster.switchover(RECOVERY_LIMIT).await?;
    if !moved {
        return Err("the switchover moved nobody".into());
    }
    cluster.wait("redundant", RECOVERY_LIMIT, redundant).await?;
    let (primary, _) = cluster.roles().await?;
    let postmaster = primary.postmaster_pid.ok_or("no postmaster")?;
    processes::kill_server(postmaster)?;
    let other = move |s: &helios_local::LocalStatus, shape| {
        s.primary.as_ref() != Some(&primary.name) && redundant(s, shape)
    };
    cluster.wait("moved", RECOVERY_LIMIT, other).await?;
    Ok(())
}

/// Passwords are given to the servers as SCRAM verifiers, and stand in the clear in one file that
/// only its owner may read, although the servers log every statement.
#[tokio::test(flavor = "multi_thread")]
async fn cve_2026_55765_no_password_stands_in_the_clear() -> std::result::Result<(), Shown> {
    let extra = ["--auth", "scram", "--set", "log_statement=all"];
    let cluster = Cluster::start(&helios()?, SHAPE, &extra).await?;
    let judged = Box::pin(passwords(&cluster)).await;
    Box::pin(cluster.stop(judged.is_err())).await;
    Ok(judged?)
}

async fn passwords(cluster: &Cluster) -> Result<()> {
    let data = cluster.dir().join("data");
    let secrets = Credentials::load(&data)?.ok_or("no credentials")?;
    let mut config: Config = cluster.target().conninfo().parse()?;
    config.password(&secrets.password);
    let client = connect(&config).await?;
    client.batch_execute("create table t (id serial)").await?;
    config.password("wrong password");
    if connect(&config).await.is_ok() {
        return Err("a wrong password is let in".into());
    }
    moves(cluster).await?;
    client.batch_execute("insert into t default values").await?;
    for (what, secret) in [
        ("application", &secrets.password),
        ("service", &secrets.service_password),
    ] {
        let mut found = holding(cluster.dir(), secret)?;
        let own = found
            .iter()
            .position(|path| path.ends_with("data/credentials.json"));
        let own = found.swap_remove(own.ok_or("the credentials are not where they should be")?);
        let mode = std::fs::metadata(&own)?.permissions().mode() & 0o777;
        if mode != 0o600 {
            return Err(format!("\"{}\" has mode {mode:o}", own.display()).into());
        }
        if !found.is_empty() {
            return Err(format!("the {what}'s password stands in {found:?}").into());
        }
    }
    let (primary, _) = cluster.roles().await?;
    let direct = cluster.connect(&primary).await?;
    let sql = "select rolname::text, rolpassword from pg_authid where rolpassword is not null";
    let rows = direct.query(sql, &[]).await?;
    let verifier =
        |row: &tokio_postgres::Row| row.get::<_, String>(1).starts_with("SCRAM-SHA-256$");
    if rows.len() < 2 || !rows.iter().all(verifier) {
        return Err(format!("{} roles with passwords, not all SCRAM", rows.len()).into());
    }
    // The servers have logged what they were sent.
    let logged = holding(cluster.dir(), "login password 'SCRAM-SHA-256$")?;
    match logged.is_empty() {
        false => Ok(()),
        true => Err("nothing was logged: this test shows nothing".into()),
    }
}

/// Functions and views of a schema that a database's own search_path puts first; each says in the
/// server's log that it was used.
const TRAPS: &str = r"
create schema evil;
grant usage on schema evil to public;
create function evil.trap(what text) returns boolean language plpgsql as
  $$begin raise warning 'evil trap: % in %', what, pg_catalog.current_query(); return true; end$$;
do $$
declare f record;
begin
  for f in select proname, pg_catalog.pg_get_function_identity_arguments(oid) as args,
      pg_catalog.format_type(prorettype, null) as result from pg_catalog.pg_proc
    where pronamespace = 'pg_catalog'::regnamespace and prokind = 'f' and not proretset
      and prorettype <> 'record'::regtype and proname in ('pg_is_in_recovery',
      'pg_current_wal_lsn', 'pg_current_wal_flush_lsn', 'pg_current_wal_insert_lsn',
      'pg_last_wal_receive_lsn', 'pg_last_wal_replay_lsn', 'pg_wal_lsn_diff',
      'pg_terminate_backend', 'pg_cancel_backend', 'current_setting', 'set_config', 'pg_promote',
      'pg_logical_emit_message', 'pg_postmaster_start_time', 'pg_reload_conf', 'pg_xact_status',
      'pg_current_xact_id_if_assigned', 'pg_current_snapshot', 'pg_snapshot_xmax', 'quote_ident',
      'has_function_privilege', 'setval', 'pg_backend_pid', 'pg_switch_wal', 'pg_my_temp_schema',
      'pg_create_physical_replication_slot', 'pg_drop_replication_slot', 'concat_ws', 'txid_current')
      and proargmodes is null
  loop
    execute pg_catalog.format('create function evil.%I(%s) returns %s language plpgsql as %L',
      f.proname, f.args, f.result,
      pg_catalog.format('begin perform evil.trap(%L); %s; end', f.proname,
        case f.result when 'void' then 'return' else 'return null' end));
  end loop;
  for f in select relname from pg_catalog.pg_class
    where relnamespace = 'pg_catalog'::regnamespace and relname in ('pg_stat_activity',
      'pg_stat_replication', 'pg_stat_wal_receiver', 'pg_settings', 'pg_locks',
      'pg_prepared_xacts', 'pg_prepared_statements', 'pg_cursors', 'pg_extension', 'pg_roles',
      'pg_namespace', 'pg_database', 'pg_class', 'pg_proc', 'pg_replication_slots', 'pg_sequence')
  loop
    execute pg_catalog.format(
      'create view evil.%I as select * from pg_catalog.%I where evil.trap(%L)',
      f.relname, f.relname, f.relname);
    execute pg_catalog.format('grant select on evil.%I to public', f.relname);
  end loop;
end $$;
create function evil.same(text, text) returns boolean language plpgsql as
  $$begin perform evil.trap('operator'); return $1 operator(pg_catalog.=) $2; end$$;
create operator evil.= (leftarg = text, rightarg = text, function = evil.same);
";

/// Whoever owns a database can set its search_path: the product's own connections to it, and its
/// own questions in sessions of clients, use nothing of what stands there.
#[tokio::test(flavor = "multi_thread")]
async fn cve_2026_55769_a_databases_search_path_redirects_nothing_of_ours()
-> std::result::Result<(), Shown> {
    let cluster = Cluster::start(&helios()?, SHAPE, &[]).await?;
    let judged = Box::pin(redirects_nothing(&cluster)).await;
    Box::pin(cluster.stop(judged.is_err())).await;
    Ok(judged?)
}

async fn redirects_nothing(cluster: &Cluster) -> Result<()> {
    let database = cluster.target().database.clone();
    let (primary, _) = cluster.roles().await?;
    let admin = cluster.connect(&primary).await?;
    let mut config: Config = cluster.target().conninfo().parse()?;
    let user = &cluster.target().user;
    admin.batch_execute(TRAPS).await?;
    admin
        .batch_execute(&format!(
            "alter database \"{database}\" set search_path = evil, pg_catalog, public; \
             create table public.t (id serial primary key, v text); \
             grant all on all tables in schema public to \"{user}\"; \
             grant all on all sequences in schema public to \"{user}\""
        ))
        .await?;
    // The trap works, for those who fall into it.
    let control = cluster.connect(&primary).await?;
    control
        .batch_execute("select /* control */ pg_is_in_recovery()")
        .await?;
    config.application_name("victim");
    let client = connect(&config).await?;
    client
        .batch_execute("set work_mem = '7MB'; set my.x = 'y'; prepare p as select 1")
        .await?;
    let insert = "insert into public.t (v) values ('x') returning id";
    client.batch_execute("begin").await?;
    let id: i32 = client.query_one(insert, &[]).await?.get(0);
    moves(cluster).await?;
    let next: i32 = client.query_one(insert, &[]).await?.get(0);
    client.batch_execute("commit").await?;
    client.batch_execute(insert).await?;
    let (primary, _) = cluster.roles().await?;
    let direct = cluster.connect(&primary).await?;
    let ids = "select id from public.t order by id";
    let ids: Vec<i32> = direct
        .query(ids, &[])
        .await?
        .iter()
        .map(|row| row.get(0))
        .collect();
    if ids.len() != 3 || !ids.starts_with(&[id, next]) {
        return Err(format!("told {id} and {next}, there are {ids:?}").into());
    }
    let mut lines = Vec::new();
    for file in holding(cluster.dir(), "evil trap: ")? {
        let text = String::from_utf8_lossy(&std::fs::read(&file)?).into_owned();
        let warnings = text.lines().filter(|l| l.contains("WARNING:  evil trap: "));
        lines.extend(warnings.map(str::to_owned));
    }
    let (control, ours): (Vec<_>, Vec<_>) = lines
        .into_iter()
        .partition(|line| line.contains("/* control */"));
    if control.is_empty() {
        return Err("the trap does not work: this test shows nothing".into());
    }
    match ours.first() {
        None => Ok(()),
        Some(first) => Err(format!("{} times, first: {first}", ours.len()).into()),
    }
}
