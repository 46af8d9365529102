//! Statements that commit by themselves, in flight when the primary dies.
//!
//! Judged by what each client received and by the rows in the database: what is marked in the log
//! has its true outcome, once; what ends transactions itself may be unknown, and is never there
//! twice.

use std::time::Duration;

use helios_e2e::Result;
use helios_e2e::raw::{Message, RawClient, bind, describe, execute, extended, parse, query, sync};
use helios_e2e::subject::{Move, Subject};

/// Long enough to be in flight when the primary dies, on a slow machine too.
const SLEEP: &str = "pg_sleep(1.5)";

/// From sending the statements to the primary's end.
const IN_FLIGHT: Duration = Duration::from_millis(600);

/// What a client must have received.
#[derive(Debug, Clone, Copy)]
enum Wanted {
    /// These messages, and its row once.
    Exactly(&'static str),
    /// The same, or 08007 and its row at most once.
    OrUnknown(&'static str),
    /// The same, or 08007 that says that the first of its transactions was committed, and that
    /// one's row.
    OrFirst(&'static str),
    /// This error, and no row.
    Error(&'static str),
}

struct Form {
    id: &'static str,
    messages: Vec<u8>,
    /// ReadyForQuery messages that end it.
    syncs: usize,
    /// Rows that it leaves.
    rows: i64,
    wanted: Wanted,
}

fn simple(id: &'static str, sql: String, rows: i64, wanted: Wanted) -> Form {
    Form {
        id,
        messages: query(&sql),
        syncs: 1,
        rows,
        wanted,
    }
}

fn insert(id: &str) -> String {
    format!("insert into auto select '{id}' from {SLEEP}")
}

fn block_of(id: &str, between: &str) -> String {
    format!(
        "do $$begin insert into auto values ('{id}'); {between} {}; end$$",
        insert(id)
    )
}

fn forms() -> Vec<Form> {
    use Wanted::{Error, Exactly, OrFirst, OrUnknown};
    let pipeline = [
        extended(&insert("pipeline"), &[]),
        sync(),
        extended("insert into auto values ('pipeline')", &[]),
        sync(),
    ];
    let implicit = [
        parse("", "insert into auto values ($1)"),
        bind("", "", &["implicit"]),
        execute("", 0),
        parse("", &insert("implicit")),
        bind("", "", &[]),
        describe('P', ""),
        execute("", 0),
        sync(),
    ];
    let returning = format!("{} returning id", insert("returning"));
    let with = format!("with w as ({} returning id) table w", insert("with"));
    let several = format!("insert into auto values ('several'); {}", insert("several"));
    let parts = format!(
        "insert into auto values ('parts'); commit; {}",
        insert("parts")
    );
    let block = format!("begin; {}; commit", insert("block"));
    let into = format!("create table auto_made as select 1 as a from {SLEEP}");
    let duplicate = format!("insert into auto_unique select 1 from {SLEEP}");
    vec![
        simple("simple", insert("simple"), 1, Exactly("CZ")),
        simple("returning", returning, 1, Exactly("TDCZ")),
        simple("with", with, 1, Exactly("TDCZ")),
        Form {
            id: "extended",
            messages: [extended(&insert("extended"), &[]), sync()].concat(),
            syncs: 1,
            rows: 1,
            wanted: Exactly("12CZ"),
        },
        Form {
            id: "pipeline",
            messages: pipeline.concat(),
            syncs: 2,
            rows: 2,
            wanted: Exactly("12CZ12CZ"),
        },
        Form {
            id: "implicit",
            messages: implicit.concat(),
            syncs: 1,
            rows: 2,
            wanted: Exactly("12C12nCZ"),
        },
        simple("read", format!("select 7 from {SLEEP}"), 0, Exactly("TDCZ")),
        simple("view", "table auto_view".to_owned(), 0, Exactly("TDCZ")),
        simple("ddl", into, 0, Exactly("CZ")),
        simple("duplicate", duplicate, 0, Error("23505")),
        simple("several", several, 2, Exactly("CCZ")),
        simple("block", block, 1, Exactly("CCCZ")),
        simple("parts", parts, 2, OrFirst("CCCZ")),
        simple(
            "function",
            "select auto_write('function')".to_owned(),
            1,
            OrUnknown("TDCZ"),
        ),
        simple(
            "call",
            "call auto_commits('call')".to_owned(),
            2,
            OrFirst("CZ"),
        ),
        simple(
            "call whole",
            "call auto_whole('call whole')".to_owned(),
            2,
            Exactly("CZ"),
        ),
        Form {
            id: "call, extended",
            messages: [extended("call auto_whole('call, extended')", &[]), sync()].concat(),
            syncs: 1,
            rows: 2,
            wanted: Exactly("12CZ"),
        },
        simple("code", block_of("code", ""), 2, Exactly("CZ")),
        simple(
            "do parts",
            block_of("do parts", "commit;"),
            2,
            OrFirst("CZ"),
        ),
    ]
}

async fn prepare(subject: &Subject) -> Result<()> {
    let user = &subject.target().user;
    let sql = format!(
        "create table auto (id text);
         create table auto_unique (a int primary key);
         insert into auto_unique values (1);
         create view auto_view as select 7 from {SLEEP};
         create table auto_slow (id text);
         create function auto_wait() returns trigger language plpgsql as
           $$begin perform {SLEEP}; return null; end$$;
         create trigger wait after insert on auto_slow
           for each statement execute function auto_wait();
         create function auto_write(id text) returns int language plpgsql as
           $$begin insert into auto values (id); perform {SLEEP}; return 1; end$$;
         create procedure auto_commits(id text) language plpgsql as
           $$begin insert into auto values (id); commit;
             insert into auto select id from {SLEEP}; commit; end$$;
         create procedure auto_whole(id text) language plpgsql as
           $$begin insert into auto values (id);
             insert into auto select id from {SLEEP}; end$$;
         grant all on all tables in schema public to \"{user}\";
         grant create on schema public to \"{user}\""
    );
    Ok(subject.admin().await?.batch_execute(&sql).await?)
}

/// The messages of all replies, without those that may come at any time.
async fn replies(client: &mut RawClient, syncs: usize) -> Result<Vec<Message>> {
    let mut seen = Vec::new();
    let mut ready = 0;
    while ready < syncs {
        let message = client.receive().await?.ok_or("the connection was closed")?;
        ready += usize::from(message.tag == b'Z');
        if !matches!(message.tag, b'N' | b'S' | b'A') {
            seen.push(message);
        }
    }
    Ok(seen)
}

fn tags(messages: &[Message]) -> String {
    messages.iter().map(|m| char::from(m.tag)).collect()
}

fn judge(form: &Form, messages: &[Message], found: i64) -> Option<String> {
    let got = tags(messages);
    let state = messages.iter().find_map(Message::sqlstate);
    let fine = match form.wanted {
        Wanted::Exactly(want) => got == want && found == form.rows,
        Wanted::OrUnknown(want) => {
            let unknown = state.as_deref() == Some("08007") && found <= form.rows;
            unknown || (got == want && found == form.rows)
        }
        Wanted::OrFirst(want) => {
            let first = "the first transaction of the request was committed";
            let is_told = |m: &Message| m.field(b'M').is_some_and(|text| text.starts_with(first));
            let told = state.as_deref() == Some("08007") && messages.iter().any(is_told);
            (told && found == 1) || (got == want && found == form.rows)
        }
        Wanted::Error(want) => state.as_deref() == Some(want) && found == 0,
    };
    (!fine).then(|| {
        let error = messages.iter().find(|m| m.tag == b'E');
        let text = error.map(|m| (m.field(b'M'), m.field(b'D')));
        format!(
            "{}: got {got} {state:?} {text:?} and {found} rows, wanted {:?} and {}",
            form.id, form.wanted, form.rows
        )
    })
}

/// A COPY alone: half its data before the move, half behind it; and one whose end is in flight.
async fn copies(subject: &Subject) -> Result<(RawClient, RawClient)> {
    let mut open = RawClient::log_in(subject.target()).await?;
    open.send(&query("copy auto from stdin")).await?;
    open.until(b'G').await?;
    open.send(&data("copy\n")).await?;
    let mut ended = RawClient::log_in(subject.target()).await?;
    ended.send(&query("copy auto_slow from stdin")).await?;
    ended.until(b'G').await?;
    ended.send(&data("copy\n")).await?;
    ended.send(&[b'c', 0, 0, 0, 4]).await?;
    Ok((open, ended))
}

fn data(row: &str) -> Vec<u8> {
    helios_e2e::raw::frame(b'd', row.as_bytes())
}

async fn with_move(how: Move) -> Result<()> {
    let subject = Subject::start_with(|b| b.parameter("fsync", "off")).await?;
    prepare(&subject).await?;
    subject.whole().await?;
    let mut clients = Vec::new();
    for form in forms() {
        let mut client = RawClient::log_in(subject.target()).await?;
        client.send(&form.messages).await?;
        clients.push((form, client));
    }
    let (mut open, mut ended) = copies(&subject).await?;
    tokio::time::sleep(IN_FLIGHT).await;
    subject.move_primary(how).await?;
    open.send(&data("copy\n")).await?;
    open.send(&[b'c', 0, 0, 0, 4]).await?;
    let mut answers = Vec::new();
    for (form, client) in &mut clients {
        let answer = replies(client, form.syncs).await;
        answers.push(answer.map_err(|e| format!("{}: {e}", form.id))?);
    }
    let copied = [replies(&mut open, 1).await?, replies(&mut ended, 1).await?];
    subject.whole().await?;
    let admin = subject.admin().await?;
    let count = "select count(*) from auto where id = $1";
    let mut problems = Vec::new();
    for ((form, client), messages) in clients.iter_mut().zip(&answers) {
        let found: i64 = admin.query_one(count, &[&form.id]).await?.get(0);
        problems.extend(judge(form, messages, found));
        // the session lives on
        client.send(&query("select 1")).await?;
        let after = replies(client, 1).await?;
        if tags(&after) != "TDCZ" {
            problems.push(format!("{}: afterwards {}", form.id, tags(&after)));
        }
    }
    for (table, messages, want) in [("auto", &copied[0], 2_i64), ("auto_slow", &copied[1], 1)] {
        let sql = format!("select count(*) from {table} where id = 'copy'");
        let found: i64 = admin.query_one(&sql, &[]).await?.get(0);
        if tags(messages) != "CZ" || found != want {
            let error = messages.iter().find_map(|m| m.field(b'M'));
            let got = tags(messages);
            problems.push(format!("COPY {table}: {got} {error:?} and {found} rows"));
        }
    }
    let made: i64 = admin
        .query_one("select count(*) from auto_made", &[])
        .await?
        .get(0);
    subject.stop().await;
    assert_eq!(made, 1, "rows of the table that was made");
    assert!(problems.is_empty(), "{}", problems.join("\n"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_commits_by_itself_has_its_true_outcome_after_a_crash() -> Result<()> {
    Box::pin(with_move(Move::Crash)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_commits_by_itself_survives_a_switchover() -> Result<()> {
    Box::pin(with_move(Move::Planned)).await
}
