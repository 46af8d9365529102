//! Programs of raw messages that run side by side and stop together where the primary moves.
//!
//! A program runs once on PostgreSQL alone and once through the proxy, with the primary moved at
//! its marks. What its sessions received must be the same, message by message, and so must the
//! data at the end; or the program ends in the one honest error, and nothing of it is in the data.

use std::time::Duration;

use std::sync::Arc;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::Result;
use crate::driver::Target;
use crate::raw::{Message, RawClient, query, sync};
use crate::subject::{Move, Subject};

/// Before a crash: values of sequences that were seen before a client was let in less than 0.1 s ahead
/// of it do not come again (docs/guarantees.md, ids from sequences), and the programs log in just now.
const LAST_LOGIN: Duration = Duration::from_millis(300);

/// Where the reading of replies stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// So many ReadyForQuery.
    Ready(usize),
    /// So many messages of this type; an error stops it too, and is followed by a Sync.
    Tag(u8, usize),
    /// Nothing is read.
    Nothing,
}

/// A step of a program.
#[derive(Debug, Clone)]
pub enum Step {
    /// A session (0 or 1) sends bytes and reads replies.
    Send(usize, Vec<u8>, Until),
    /// Somebody new runs a simple query, and leaves.
    Other(&'static str),
    /// The primary moves.
    Move,
}

/// A simple query of the first session.
#[must_use]
pub fn q(sql: &str) -> Step {
    Step::Send(0, query(sql), Until::Ready(1))
}

/// A simple query of the second session.
#[must_use]
pub fn second(sql: &str) -> Step {
    Step::Send(1, query(sql), Until::Ready(1))
}

/// Messages of the first session, and all replies up to ReadyForQuery.
#[must_use]
pub fn x(messages: &[Vec<u8>]) -> Step {
    Step::Send(0, messages.concat(), Until::Ready(1))
}

/// Messages of the first session whose replies are not awaited.
#[must_use]
pub fn launch(messages: &[Vec<u8>]) -> Step {
    Step::Send(0, messages.concat(), Until::Nothing)
}

/// Messages of the first session, and replies up to the n-th of a type.
#[must_use]
pub fn part(messages: &[Vec<u8>], tag: u8, count: usize) -> Step {
    Step::Send(0, messages.concat(), Until::Tag(tag, count))
}

/// What a move may do to a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// Nothing that can be seen.
    Same,
    /// The transaction ends in 40001, and the detail holds these words.
    Retry(&'static str),
    /// Either: which of two sessions is replayed first decides.
    Either,
}

/// A program. Its tables live in a schema of its name; all its steps are one transaction, what it
/// needs is made in `setup`.
#[derive(Debug, Clone)]
pub struct Program {
    /// Its name, unique and an identifier.
    pub name: &'static str,
    /// Run by its first session before its steps.
    pub setup: &'static str,
    /// The steps.
    pub steps: Vec<Step>,
    /// What is asked at the end, by somebody else.
    pub check: &'static str,
    /// At a planned switchover.
    pub planned: Expect,
    /// At a crash.
    pub crash: Expect,
}

/// A program that a move must not show in.
#[must_use]
pub fn program(
    name: &'static str,
    setup: &'static str,
    steps: Vec<Step>,
    check: &'static str,
) -> Program {
    Program {
        name,
        setup,
        steps,
        check,
        planned: Expect::Same,
        crash: Expect::Same,
    }
}

impl Program {
    /// The same with another expectation, whatever the move.
    #[must_use]
    pub fn expecting(mut self, expect: Expect) -> Self {
        (self.planned, self.crash) = (expect, expect);
        self
    }

    fn moves(&self) -> usize {
        let is_move = |step: &&Step| matches!(step, Step::Move);
        self.steps.iter().filter(is_move).count()
    }

    /// The first `steps` of it, without what its own sessions do.
    fn only_others(&self, steps: usize) -> Self {
        let mut alone = self.clone();
        alone.steps.truncate(steps);
        alone.steps.retain(|step| matches!(step, Step::Other(_)));
        alone
    }
}

/// What a run gave.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ran {
    /// Replies, step by step, written so that they can be compared.
    pub replies: Vec<Vec<String>>,
    /// Detail of the 40001 that ended it.
    pub retry: Option<String>,
    /// The answer to the check.
    pub check: Vec<String>,
}

/// A program's part in stopping together.
struct Marks {
    arrive: mpsc::UnboundedSender<()>,
    left: usize,
    passed: usize,
    moved: watch::Receiver<usize>,
}

impl Marks {
    async fn stop(&mut self) -> Result<()> {
        self.left -= 1;
        self.passed += 1;
        self.arrive.send(())?;
        let passed = self.passed;
        self.moved.wait_for(|moved| *moved >= passed).await?;
        Ok(())
    }
}

impl Drop for Marks {
    /// A program that has ended holds nobody up; before, no further move disturbs its end.
    fn drop(&mut self) {
        for _ in 0..self.left {
            let _ = self.arrive.send(());
        }
    }
}

/// Runs one program by itself on PostgreSQL alone: moves do nothing.
///
/// # Errors
///
/// The program cannot run.
pub async fn run_alone(program: &Program, target: &Target) -> Result<Ran> {
    run(program, target, None).await
}

/// Runs programs side by side through the proxy; the primary moves where all have stopped.
///
/// # Errors
///
/// The primary did not move.
pub async fn run_together(
    programs: &[Program],
    subject: &Subject,
    moves: &[Move],
) -> Result<Vec<(&'static str, Result<Ran>)>> {
    let (moved, watching) = watch::channel(0);
    let rounds = programs.iter().map(Program::moves).max().unwrap_or(0);
    let mut tasks = JoinSet::new();
    let mut inboxes = Vec::new();
    for program in programs {
        let (arrive, arrived) = mpsc::unbounded_channel();
        inboxes.push(arrived);
        let marks = Marks {
            arrive,
            left: rounds,
            passed: 0,
            moved: watching.clone(),
        };
        let (program, target) = (program.clone(), subject.target().clone());
        let run = async move { (program.name, run(&program, &target, Some(marks)).await) };
        tasks.spawn(run);
    }
    for round in 0..rounds {
        for arrived in &mut inboxes {
            arrived.recv().await;
        }
        let how = moves.get(round).ok_or("more marks than moves")?;
        if *how == Move::Crash {
            tokio::time::sleep(LAST_LOGIN).await;
        }
        subject.move_primary(*how).await?;
        moved.send_replace(round + 1);
    }
    Ok(tasks.join_all().await)
}

async fn run(program: &Program, target: &Target, mut marks: Option<Marks>) -> Result<Ran> {
    let mut sessions = vec![RawClient::log_in_as(target, program.name).await?];
    let schema = program.name;
    let path = format!("set search_path = {schema}, public");
    simple(
        &mut sessions[0],
        &format!("drop schema if exists {schema} cascade"),
    )
    .await?;
    simple(&mut sessions[0], &format!("create schema {schema}; {path}")).await?;
    if !program.setup.is_empty() {
        simple(&mut sessions[0], program.setup).await?;
    }
    let mut ran = Ran::default();
    for step in &program.steps {
        let replies = match step {
            Step::Move => {
                if let Some(marks) = &mut marks {
                    marks.stop().await?;
                }
                Vec::new()
            }
            Step::Other(sql) => elsewhere(target, &path, sql).await?,
            Step::Send(on, bytes, until) => {
                while sessions.len() <= *on {
                    let mut session = RawClient::log_in_as(target, program.name).await?;
                    simple(&mut session, &path).await?;
                    sessions.push(session);
                }
                let session = &mut sessions[*on];
                session.send(bytes).await?;
                let (replies, retry) = read(session, *until).await?;
                ran.retry = ran.retry.or(retry);
                replies
            }
        };
        ran.replies.push(replies);
        if ran.retry.is_some() {
            break;
        }
    }
    if ran.retry.is_some() {
        for session in &mut sessions {
            give_up(session).await?;
        }
    }
    drop(sessions);
    ran.check = elsewhere(target, &path, program.check).await?;
    Ok(ran)
}

/// What a client does with an error that says "try again": the session lives on.
async fn give_up(session: &mut RawClient) -> Result<()> {
    simple(session, "rollback").await?;
    session.send(&query("select 42")).await?;
    let (replies, _) = read(session, Until::Ready(1)).await?;
    let wanted = ["T ?column?:23", "D 42", "C SELECT 1", "Z I"];
    if replies == wanted {
        return Ok(());
    }
    Err(format!("the session does not live on: {replies:?}").into())
}

async fn simple(session: &mut RawClient, sql: &str) -> Result<()> {
    session.send(&query(sql)).await?;
    let (replies, _) = read(session, Until::Ready(1)).await?;
    match replies.iter().find(|r| r.starts_with('E')) {
        Some(error) => Err(format!("{error}: {sql}").into()),
        None => Ok(()),
    }
}

async fn elsewhere(target: &Target, path: &str, sql: &str) -> Result<Vec<String>> {
    let mut session = RawClient::log_in(target).await?;
    simple(&mut session, path).await?;
    session.send(&query(sql)).await?;
    Ok(read(&mut session, Until::Ready(1)).await?.0)
}

async fn read(session: &mut RawClient, until: Until) -> Result<(Vec<String>, Option<String>)> {
    let (mut replies, mut retry) = (Vec::new(), None);
    let (mut tag, mut left) = match until {
        Until::Nothing => return Ok((replies, retry)),
        Until::Ready(count) => (b'Z', count),
        Until::Tag(tag, count) => (tag, count),
    };
    while left > 0 {
        let Some(message) = session.receive().await? else {
            replies.push("closed".to_owned());
            return Err(format!("the connection was closed after {replies:?}").into());
        };
        if message.tag == b'E' {
            if message.sqlstate().as_deref() == Some("40001") {
                retry = Some(message.field(b'D').unwrap_or_default());
            }
            if tag != b'Z' {
                session.send(&sync()).await?;
                (tag, left) = (b'Z', 1);
            }
        }
        left -= usize::from(message.tag == tag);
        replies.extend(written(&message));
    }
    Ok((replies, retry))
}

/// A message as a text that is the same wherever it comes from; `None` for what may differ.
fn written(message: &Message) -> Option<String> {
    let text = String::from_utf8_lossy(&message.body).into_owned();
    Some(match message.tag {
        b'S' | b'N' => return None,
        b'E' => format!("E {}", message.sqlstate().unwrap_or_default()),
        b'T' => format!("T {}", columns(&message.body)),
        b'D' => format!("D {}", values(&message.body)),
        // Without the sender's process id.
        b'A' => {
            let named = message.body.get(4..).unwrap_or_default();
            format!("A {}", String::from_utf8_lossy(named).replace('\0', " "))
        }
        tag => format!("{} {}", char::from(tag), text.trim_end_matches('\0')),
    })
}

/// Names and types of a RowDescription.
fn columns(body: &[u8]) -> String {
    let mut rest = body.get(2..).unwrap_or_default();
    let mut columns = Vec::new();
    while let Some(end) = rest.iter().position(|byte| *byte == 0) {
        let name = String::from_utf8_lossy(&rest[..end]).into_owned();
        let kind = rest.get(end + 7..end + 11).map_or(0, |oid| {
            oid.iter().fold(0_u32, |all, b| all << 8 | u32::from(*b))
        });
        columns.push(format!("{name}:{kind}"));
        rest = rest.get(end + 19..).unwrap_or_default();
    }
    columns.join(" ")
}

/// Values of a DataRow.
fn values(body: &[u8]) -> String {
    let mut rest = body.get(2..).unwrap_or_default();
    let mut values = Vec::new();
    while let Some((length, tail)) = rest.split_first_chunk() {
        let length = i32::from_be_bytes(*length);
        let (value, tail) = match usize::try_from(length) {
            Ok(length) => tail.split_at_checked(length).unwrap_or((tail, &[])),
            Err(_) => (b"null".as_slice(), tail),
        };
        values.push(String::from_utf8_lossy(value).into_owned());
        rest = tail;
    }
    values.join("|")
}

/// What is wrong with a run, beside the one on PostgreSQL alone.
///
/// # Errors
///
/// The program cannot run on PostgreSQL alone.
pub async fn judge(
    program: &Program,
    expect: Expect,
    ran: &Ran,
    alone: &Ran,
    direct: &Target,
) -> Result<Option<String>> {
    let Some(detail) = &ran.retry else {
        if matches!(expect, Expect::Retry(_)) {
            return Ok(Some("no 40001 came".to_owned()));
        }
        return Ok((ran != alone).then(|| difference(ran, alone)));
    };
    match expect {
        Expect::Same => return Ok(Some(format!("40001: {detail}"))),
        Expect::Retry(words) if !detail.contains(words) => {
            return Ok(Some(format!("the detail is {detail:?}, not {words:?}")));
        }
        _ => {}
    }
    let untouched = run_alone(&program.only_others(ran.replies.len()), direct).await?;
    Ok((ran.check != untouched.check).then(|| {
        let (is, was) = (&ran.check, &untouched.check);
        format!("something of an aborted transaction is there: {is:?} instead of {was:?}")
    }))
}

fn difference(ran: &Ran, alone: &Ran) -> String {
    for (step, (is, was)) in ran.replies.iter().zip(&alone.replies).enumerate() {
        if is != was {
            let at = is.iter().zip(was).position(|(a, b)| a != b);
            let at = at.unwrap_or(is.len().min(was.len()));
            let near = |all: &[String]| all.iter().skip(at).take(4).cloned().collect::<Vec<_>>();
            let (is, was) = (near(is), near(was));
            return format!("step {step}, message {at}: {is:?} instead of {was:?}");
        }
    }
    format!("check: {:?} instead of {:?}", ran.check, alone.check)
}

/// Programs by name, for a test of one: `HELIOS_PROGRAM`.
#[must_use]
pub fn wanted(programs: Vec<Program>) -> Arc<[Program]> {
    let only = std::env::var("HELIOS_PROGRAM").unwrap_or_default();
    let wanted = |p: &Program| only.is_empty() || only.split(',').any(|name| name == p.name);
    programs.into_iter().filter(wanted).collect()
}
