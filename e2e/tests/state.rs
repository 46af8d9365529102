//! State of a session that others feel: advisory locks and channels, before and after a move, as
//! the database sees them and as clients are told.

use std::time::Duration;

use helios_e2e::driver::Target;
use helios_e2e::raw::{Message, RawClient, bind, execute, parse, query, sync};
use helios_e2e::{Result, Shown};
use helios_proxy::engine::shared::EngineOptions;
use helios_testkit::Bench;
use helios_testkit::interpose::Class;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Move {
    Planned,
    Crash,
    Cut,
}

const MOVES: [Move; 3] = [Move::Planned, Move::Crash, Move::Cut];

async fn bench() -> Result<Bench> {
    let mut bench = Bench::start(EngineOptions::default(), "create table t (a int)").await?;
    bench.known().await?;
    bench.interpose()?;
    Ok(bench)
}

async fn move_it(bench: &mut Bench, how: Move) -> Result<()> {
    match how {
        Move::Planned => Ok(bench.switchover().await?),
        // As a failover is: nothing was prepared, and a barrier stands before new work.
        Move::Crash => {
            bench.crash().await?;
            Ok(bench.resume().await?)
        }
        // One connection breaks. There is no barrier: others go on.
        Move::Cut => {
            let pids = "select pid from pg_stat_activity where application_name = 'holder' \
                        or application_name = 'listener' order by 1";
            let before = bench.column(pids).await?;
            if let Some(between) = &bench.between {
                between.close(Class::Session);
            }
            for _ in 0..1000 {
                let now = bench.column(pids).await?;
                if !now.is_empty() && !now.iter().any(|pid| before.contains(pid)) {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Ok(())
        }
    }
}

/// A client that speaks by hand.
struct Session {
    raw: RawClient,
    name: &'static str,
}

impl Session {
    async fn new(bench: &Bench, name: &'static str) -> Result<Self> {
        let target = Target::local(bench.proxy.port());
        let raw = RawClient::log_in_as(&target, name).await?;
        Ok(Self { raw, name })
    }

    /// Everything that a simple query is answered with.
    async fn all(&mut self, sql: &str) -> Result<Vec<Message>> {
        self.raw.send(&query(sql)).await?;
        let got = self.raw.until(b'Z').await;
        got.map_err(|e| format!("{}: {sql}: {e}", self.name).into())
    }

    /// The columns of all rows, as text.
    async fn ask(&mut self, sql: &str) -> Result<Vec<String>> {
        Ok(values(&self.all(sql).await?))
    }

    async fn expect(&mut self, sql: &str, want: &[&str]) -> Result<()> {
        let got = self.ask(sql).await?;
        same(self.name, sql, &got, want)
    }
}

fn same(who: &str, what: &str, got: &[String], want: &[&str]) -> Result<()> {
    if got == want {
        return Ok(());
    }
    Err(format!("{who}: {what}: {got:?} instead of {want:?}").into())
}

fn values(messages: &[Message]) -> Vec<String> {
    let rows = messages.iter().filter(|m| m.tag == b'D');
    rows.flat_map(|m| columns(&m.body)).collect()
}

fn columns(body: &[u8]) -> Vec<String> {
    let mut rest = body.get(2..).unwrap_or_default();
    let mut out = Vec::new();
    while let Some((length, tail)) = rest.split_first_chunk::<4>() {
        let length = usize::try_from(i32::from_be_bytes(*length)).unwrap_or(0);
        let (value, tail) = tail.split_at(length.min(tail.len()));
        out.push(String::from_utf8_lossy(value).into_owned());
        rest = tail;
    }
    out
}

/// The session advisory locks of a client, past the proxy.
async fn held(bench: &Bench, name: &str) -> Result<Vec<String>> {
    let sql = format!(
        "select concat_ws(' ', classid, objid, objsubid, mode) from pg_locks \
         join pg_stat_activity using (pid) where locktype = 'advisory' and granted \
         and application_name = '{name}' order by 1"
    );
    Ok(bench.column(&sql).await?)
}

async fn until_held(bench: &Bench, name: &str, want: &[String]) -> Result<()> {
    for _ in 0..1000 {
        if held(bench, name).await? == want {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let got = held(bench, name).await?;
    Err(format!("{name} holds {got:?} instead of {want:?}").into())
}

/// Takes locks of all forms; 7 three times and given back once, 9 by statements that tell no count.
async fn take(client: &mut Session) -> Result<()> {
    for _ in 0..3 {
        client.all("select pg_advisory_lock(7)").await?;
    }
    client
        .expect("select pg_advisory_unlock(7)", &["t"])
        .await?;
    client.all("select pg_advisory_lock_shared(-8)").await?;
    client.all("select pg_advisory_lock(3000000000)").await?;
    client
        .expect("select pg_try_advisory_lock(1, -2)", &["t"])
        .await?;
    let many = "select count(*) from (select pg_advisory_lock(9) from generate_series(1, 4)) x";
    client.expect(many, &["4"]).await?;
    let sql = "select pg_advisory_lock_shared($1, 4), pg_advisory_lock($1)";
    let extended = [
        parse("s", sql),
        bind("", "s", &["3"]),
        execute("", 0),
        sync(),
    ];
    client.raw.send(&extended.concat()).await?;
    client.raw.until(b'Z').await?;
    Ok(())
}

/// Gives a lock back until it is not held: how often.
async fn count(client: &mut Session, unlock: &str) -> Result<usize> {
    for n in 0..100 {
        if client.ask(&format!("select {unlock}")).await? == ["f"] {
            return Ok(n);
        }
    }
    Err(format!("{unlock} never ends").into())
}

async fn counts(client: &mut Session) -> Result<()> {
    for (unlock, want) in [
        ("pg_advisory_unlock(7)", 2),
        ("pg_advisory_unlock_shared(-8)", 1),
        ("pg_advisory_unlock(3000000000)", 1),
        ("pg_advisory_unlock(1, -2)", 1),
        ("pg_advisory_unlock(9)", 4),
        ("pg_advisory_unlock_shared(3, 4)", 1),
        ("pg_advisory_unlock(3)", 1),
    ] {
        let got = count(client, unlock).await?;
        if got != want {
            return Err(format!("{unlock} succeeds {got} times instead of {want}").into());
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn advisory_locks_of_an_idle_session_move() -> std::result::Result<(), Shown> {
    Ok(locks_move(false).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn advisory_locks_move_with_a_transaction() -> std::result::Result<(), Shown> {
    Ok(locks_move(true).await?)
}

async fn locks_move(inside: bool) -> Result<()> {
    let mut bench = bench().await?;
    for how in MOVES {
        let mut holder = Session::new(&bench, "holder").await?;
        let mut other = Session::new(&bench, "other").await?;
        take(&mut holder).await?;
        if inside {
            holder.all("begin; insert into t values (1)").await?;
            holder.all("select pg_advisory_lock(55)").await?;
            holder
                .expect("select pg_advisory_unlock(3)", &["t"])
                .await?;
        }
        let before = held(&bench, "holder").await?;
        let protected = bench
            .proxy
            .sessions()
            .iter()
            .all(|s| s.unprotected.is_none());
        if before.len() != 7 || !protected {
            return Err(format!("before {how:?}: {before:?}, protected: {protected}").into());
        }
        move_it(&mut bench, how).await?;
        if how == Move::Cut {
            until_held(&bench, "holder", &before).await?;
        }
        // Not a word of the holder's: nobody else gets them.
        let sql = "select pg_try_advisory_lock(7), pg_try_advisory_lock_shared(7), \
                   pg_try_advisory_lock(-8), pg_try_advisory_lock_shared(1, -2)";
        other.expect(sql, &["f", "f", "f", "f"]).await?;
        other
            .expect("select pg_try_advisory_lock_shared(-8)", &["t"])
            .await?;
        until_held(&bench, "holder", &before).await?;
        if inside {
            holder.all("rollback").await?;
            holder
                .expect("select pg_advisory_unlock(55)", &["t"])
                .await?;
            holder.all("select pg_advisory_lock(3)").await?;
        }
        counts(&mut holder).await?;
        until_held(&bench, "holder", &[]).await?;
    }
    Ok(())
}

/// A server starts anew, and somebody else is there before the holder is; then there is a new primary.
/// That one's connection is whole, but it says nothing: the holder's was lost with all others.
#[tokio::test(flavor = "multi_thread")]
async fn who_finds_a_restarted_server_first_gets_no_lock_of_others()
-> std::result::Result<(), Shown> {
    Ok(found_first().await?)
}

async fn found_first() -> Result<()> {
    let mut bench = bench().await?;
    let mut holder = Session::new(&bench, "holder").await?;
    let mut other = Session::new(&bench, "other").await?;
    holder.all("begin; insert into t values (1)").await?;
    take(&mut holder).await?;
    let before = held(&bench, "holder").await?;
    let refuse = |bench: &Bench, classes: &[Class]| {
        if let Some(between) = &bench.between {
            between.set(|rules| rules.refuse = classes.to_vec());
        }
    };
    // The holder does not find it for a while, and then tries seldom.
    refuse(&bench, &[Class::Session]);
    bench.crash().await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    refuse(&bench, &[]);
    other.expect("select 1", &["1"]).await?;
    bench.resume().await?;
    let sql = "select pg_try_advisory_lock(7), pg_try_advisory_lock(-8)";
    other.expect(sql, &["f", "f"]).await?;
    until_held(&bench, "holder", &before).await?;
    holder.all("commit").await?;
    Ok(())
}

/// Somebody waits for a lock while the primary moves: the holder still has it afterwards.
#[tokio::test(flavor = "multi_thread")]
async fn who_waits_for_a_lock_goes_on_waiting() -> std::result::Result<(), Shown> {
    Ok(waits().await?)
}

async fn waits() -> Result<()> {
    let mut bench = Bench::start(EngineOptions::default(), "").await?;
    bench.known().await?;
    for how in [Move::Planned, Move::Crash] {
        let mut holder = Session::new(&bench, "holder").await?;
        let mut waiter = Session::new(&bench, "waiter").await?;
        holder.all("select pg_advisory_lock(7)").await?;
        waiter
            .raw
            .send(&query("select pg_advisory_lock(7)"))
            .await?;
        let waiting = "select count(*) from pg_locks where locktype = 'advisory' and not granted";
        until(&bench, waiting, "1").await?;
        move_it(&mut bench, how).await?;
        until(&bench, waiting, "1").await?;
        if held(&bench, "holder").await?.len() != 1 {
            return Err(format!("{how:?}: the holder has lost its lock").into());
        }
        holder
            .expect("select pg_advisory_unlock(7)", &["t"])
            .await?;
        waiter.raw.until(b'Z').await?;
        waiter
            .expect("select pg_advisory_unlock(7)", &["t"])
            .await?;
    }
    Ok(())
}

async fn until(bench: &Bench, sql: &str, want: &str) -> Result<()> {
    for _ in 0..1000 {
        if bench.column(sql).await? == [want] {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Err(format!("{sql}: {:?} instead of {want}", bench.column(sql).await?).into())
}

/// Somebody who goes round the proxy has the lock: its holder of before is told, and goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_lock_that_somebody_else_has_is_an_honest_error() -> std::result::Result<(), Shown> {
    Ok(taken().await?)
}

async fn taken() -> Result<()> {
    let mut bench = bench().await?;
    for (inside, crash) in [(false, false), (true, false), (false, true), (true, true)] {
        let mut holder = Session::new(&bench, "holder").await?;
        holder.all("select pg_advisory_lock(7)").await?;
        holder
            .all("select pg_advisory_lock(8); set work_mem = '7MB'")
            .await?;
        if inside {
            holder.all("begin; insert into t values (2)").await?;
        }
        take_meanwhile(&mut bench, crash).await?;
        holder.raw.send(&query("select 1")).await?;
        let error = holder.raw.until(b'E').await?.pop();
        let said = error.map(|e| (e.sqlstate(), e.field(b'D').unwrap_or_default()));
        match said {
            Some((Some(code), detail))
                if code == "40001" && detail.contains("advisory lock 7 is lost") => {}
            other => {
                let when = format!("inside {inside}, crash {crash}");
                return Err(format!("{when}: told {other:?}").into());
            }
        }
        holder.raw.until(b'Z').await?;
        if inside {
            holder.all("rollback").await?;
        }
        holder.expect("show work_mem", &["7MB"]).await?;
        holder
            .expect("select pg_advisory_unlock(8)", &["f"])
            .await?;
        bench.column("select pg_advisory_unlock(7)").await?;
        holder
            .expect("select pg_try_advisory_lock(7)", &["t"])
            .await?;
    }
    let rows = bench.column("select count(*) from t").await?;
    same("the database", "rows", &rows, &["0"])
}

/// A move in which the lock is taken past the proxy before its holder comes back.
async fn take_meanwhile(bench: &mut Bench, crash: bool) -> Result<()> {
    let refuse = |bench: &Bench, classes: &[Class]| {
        if let Some(between) = &bench.between {
            between.set(|rules| rules.refuse = classes.to_vec());
        }
    };
    if crash {
        refuse(bench, &[Class::Session]);
        bench.crash().await?;
    } else {
        bench.drain().await?;
        let kill = "select pg_terminate_backend(pid, 10000) from pg_stat_activity \
                    where application_name = 'holder'";
        bench.column(kill).await?;
    }
    bench.column("select pg_advisory_lock(7)").await?;
    refuse(bench, &[]);
    Ok(bench.resume().await?)
}

/// Channels are listened to again before anybody can notify; a client learns when something may
/// have been lost, and only then.
#[tokio::test(flavor = "multi_thread")]
async fn channels_move() -> std::result::Result<(), Shown> {
    Ok(listen().await?)
}

async fn listen() -> Result<()> {
    let options = EngineOptions {
        lost_notification: Some("look".to_owned()),
        ..EngineOptions::default()
    };
    let mut bench = Bench::start(options, "create table t (a int)").await?;
    bench.known().await?;
    bench.interpose()?;
    for (how, inside) in [
        (Move::Planned, false),
        (Move::Planned, true),
        (Move::Crash, false),
        (Move::Crash, true),
        (Move::Cut, false),
    ] {
        let mut listener = Session::new(&bench, "listener").await?;
        let mut other = Session::new(&bench, "other").await?;
        listener
            .all("listen news; listen \"Other \"\"s\"; listen gone")
            .await?;
        listener.all("unlisten gone").await?;
        if inside {
            listener.all("begin; insert into t values (1)").await?;
        }
        move_it(&mut bench, how).await?;
        if how == Move::Cut {
            let listens = "select count(*) from pg_stat_activity where state = 'idle' \
                           and application_name = 'listener' and query like 'LISTEN%'";
            until(&bench, listens, "1").await?;
        }
        other
            .all("notify news, 'one'; notify \"Other \"\"s\", 'two'")
            .await?;
        let mut got = Vec::new();
        if inside {
            got.extend(listener.all("commit").await?);
        }
        let channels = "select pg_listening_channels() order by 1";
        got.extend(listener.all(channels).await?);
        same(
            "listener",
            "channels",
            &values(&got),
            &["Other \"s", "news"],
        )?;
        // A crash and the move behind it may each tell.
        let notifications = got.iter().filter(|m| m.tag == b'A');
        let mut told: Vec<_> = notifications.map(notification).collect();
        told.sort();
        told.dedup();
        let warned = got.iter().any(|m| m.tag == b'N');
        let lossless = how == Move::Planned && !inside;
        let mut want = vec!["news one", "Other \"s two"];
        if !lossless {
            want.splice(0..0, ["Other \"s look", "news look"]);
        }
        want.sort_unstable();
        if told != want || warned == lossless {
            return Err(format!("{how:?} {inside}: {told:?}, warned: {warned}").into());
        }
    }
    Ok(())
}

fn notification(message: &Message) -> String {
    let text = String::from_utf8_lossy(message.body.get(4..).unwrap_or_default());
    text.trim_end_matches('\0').replace('\0', " ")
}

/// The proxy asks the session's own backend for its temporary tables, and leaves the client's
/// unnamed statement alone, which a simple query would end.
#[tokio::test(flavor = "multi_thread")]
async fn reading_temporary_tables_ends_no_unnamed_statement() -> std::result::Result<(), Shown> {
    Ok(read_beside().await?)
}

async fn read_beside() -> Result<()> {
    let mut bench = bench().await?;
    let mut client = Session::new(&bench, "holder").await?;
    let table = "create temp table w as select 1 as n; listen of_it";
    client.all(table).await?;
    let run = [bind("", "", &["41"]), execute("", 0), sync()].concat();
    for how in MOVES {
        let statement = [parse("", "select n + $1::int from w"), sync()].concat();
        client.raw.send(&statement).await?;
        client.raw.until(b'Z').await?;
        until_protected(&bench).await?;
        for moved in [false, true] {
            if moved {
                move_it(&mut bench, how).await?;
            }
            client.raw.send(&run).await?;
            let got = values(&client.raw.until(b'Z').await?);
            same("holder", &format!("{how:?}, moved {moved}"), &got, &["42"])?;
            until_protected(&bench).await?;
        }
    }
    Ok(())
}

async fn until_protected(bench: &Bench) -> Result<()> {
    for _ in 0..1000 {
        let sessions = bench.proxy.sessions();
        if sessions.iter().all(|s| s.unprotected.is_none()) {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Err(format!("not protected: {:#?}", bench.proxy.sessions()).into())
}
