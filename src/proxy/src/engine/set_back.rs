//! Setting a sequence back for a run of statements, so that it stands where it should again whatever
//! becomes of this proxy.
//!
//! One statement of the server's does all of it (PL/pgSQL): it tells where sequences stand with
//! NOTICEs, sets them back, waits for an advisory lock that a second connection of the proxy holds,
//! the *baton*, sets them forward, and says where they stood. That it waits is seen by that second
//! connection. The baton is given back when the session's statements have run, or when the proxy
//! dies, because its connections end then; and the wait has a limit. The invariant: from the first
//! `setval` on, the server needs nobody to set the sequence forward, and says nothing before it has:
//! a backend that cannot tell its client something ends there and then (`ProcessInterrupts` in
//! `src/backend/tcop/postgres.c`).

use std::time::Duration;

use helios_session::sequences::run::Span;
use helios_session::state::literal;

use super::link::Link;
use super::replay::{ReplayError, describe_error, next_frame, simple};

/// First half of the keys of our advisory locks ("helS"). The second half is 0 for the statement
/// itself, one at a time in a database, and the baton's process id for the baton.
pub(super) const CLASS: i32 = 0x6865_6c53;

/// Second half of the key of who takes values ahead meanwhile: nothing is set forward under its hands.
pub(super) const TAKING: i32 = -1;

/// Values that lie further ahead of a sequence than so many steps were not given by it.
const MAX_AHEAD: u32 = 1 << 16;

/// How often a sequence is read again because somebody took a value in between.
const MAX_READS: u32 = 5;

/// How long a sequence stays set back at most, in milliseconds.
const MAX_WAIT_MS: u32 = 4_000;

/// So often the server is asked without a pause whether its statement waits.
const ASKED_AT_ONCE: u32 = 8;

/// The pause between further questions.
const PAUSE: Duration = Duration::from_millis(1);

/// A sequence whose values can be set: not cached by sessions, not cyclic, not temporary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sequence {
    pub(super) oid: u32,
    pub(super) increment: i64,
    /// Qualified and quoted.
    pub(super) name: String,
}

/// A sequence that is set back, or is about to be.
#[derive(Debug)]
pub(super) struct SetBack {
    pub(super) sequence: Sequence,
    /// Where it stood: `last_value`, `is_called`.
    pub(super) stood: (i64, bool),
    /// Last value that the client saw.
    pub(super) last: i64,
}

/// One that is to be set back: the first and the last value that the client saw.
pub(super) type Wanted = Span<Sequence>;

/// Where a sequence stands: its number among those that were wanted, `last_value`, `is_called`.
pub(super) type Stands = (usize, i64, bool);

/// The connection whose lock the server's statement waits for.
#[derive(Debug)]
pub(super) struct Baton {
    link: Link,
    pid: i32,
}

impl Baton {
    /// Takes the baton.
    ///
    /// # Errors
    /// The connection's, or the server's.
    pub(super) async fn take(mut link: Link) -> Result<Self, ReplayError> {
        let sql = format!(
            "SELECT pg_catalog.pg_backend_pid(), \
             pg_catalog.pg_advisory_lock({CLASS}, pg_catalog.pg_backend_pid())"
        );
        let rows = simple(&mut link, &sql).await?;
        let pid = rows
            .first()
            .and_then(|row| row.first()?.as_deref()?.parse().ok());
        let pid = pid.ok_or_else(|| ReplayError::State("a process without a number".into()))?;
        Ok(Self { link, pid })
    }

    /// Gives it to the server's statement, which may not wait for it yet: it is not taken again
    /// before that has ended, or the two would wait for each other.
    ///
    /// # Errors
    /// The connection's.
    pub(super) async fn give(&mut self) -> Result<(), ReplayError> {
        let sql = format!(
            "SELECT pg_catalog.pg_advisory_unlock({CLASS}, {})",
            self.pid
        );
        simple(&mut self.link, &sql).await.map(|_| ())
    }

    /// Runs a statement of ours on the connection that holds it.
    ///
    /// # Errors
    /// The connection's, or the server's.
    pub(super) async fn run(&mut self, sql: &str) -> Result<Vec<Vec<Option<String>>>, ReplayError> {
        simple(&mut self.link, sql).await
    }

    /// Whether that backend waits for it.
    ///
    /// # Errors
    /// The connection's.
    async fn is_awaited_by(&mut self, pid: i32) -> Result<bool, ReplayError> {
        let own = self.pid;
        let sql =
            format!("SELECT {own} OPERATOR(pg_catalog.=) ANY (pg_catalog.pg_blocking_pids({pid}))");
        let rows = simple(&mut self.link, &sql).await?;
        let first = rows.first().and_then(|row| row.first()?.as_deref());
        Ok(first == Some("t"))
    }

    /// Takes it again, for the next statement.
    ///
    /// # Errors
    /// The connection's.
    pub(super) async fn take_back(&mut self) -> Result<(), ReplayError> {
        let sql = format!("SELECT pg_catalog.pg_advisory_lock({CLASS}, {})", self.pid);
        simple(&mut self.link, &sql).await.map(|_| ())
    }
}

/// Begins to set `wanted` back; returns whether they are, and the statement waits for the baton. What
/// may have been set back is added to `noted` before it is.
///
/// # Errors
/// The connection's.
pub(super) async fn begin(
    link: &mut Link,
    baton: &mut Baton,
    wanted: &[Wanted],
    until: Option<f64>,
    noted: &mut Vec<SetBack>,
) -> Result<bool, ReplayError> {
    let text = format!(
        "DO LANGUAGE plpgsql {}",
        literal(&block(wanted, baton.pid, until))
    );
    let too_long = |e: helios_wire::message::BuildError| ReplayError::State(e.to_string());
    helios_wire::message::front::query(&mut link.output, text.as_bytes()).map_err(too_long)?;
    link.flush().await?;
    let mut setting: Option<i32> = None;
    let mut asked = 0;
    loop {
        let (tag, frame) = if let Some(pid) = setting {
            match tokio::time::timeout(Duration::ZERO, next_frame(link)).await {
                Ok(frame) => frame?,
                Err(_) if baton.is_awaited_by(pid).await? => return Ok(true),
                Err(_) => {
                    asked += 1;
                    if asked > ASKED_AT_ONCE {
                        tokio::time::sleep(PAUSE).await;
                    }
                    continue;
                }
            }
        } else {
            next_frame(link).await?
        };
        match tag {
            helios_wire::backend::NOTICE_RESPONSE => {
                let told = told(&frame).unwrap_or_default();
                match told.strip_prefix("sets ") {
                    Some(pid) => setting = pid.parse().ok(),
                    None => note(stands(&told), wanted, noted),
                }
            }
            helios_wire::backend::ERROR_RESPONSE => {
                let why = describe_error(frame.get(5..).unwrap_or_default());
                tracing::debug!(why, "sequences could not be set back");
            }
            helios_wire::backend::READY_FOR_QUERY => return Ok(false),
            _ => {}
        }
    }
}

/// Waits for the end of the statement, behind the baton; where those sequences stood that were set
/// back, before they were set forward.
///
/// # Errors
/// The connection's; [`ReplayError::State`] when a sequence could not be set forward.
pub(super) async fn end(link: &mut Link) -> Result<Vec<Stands>, ReplayError> {
    let (mut stood, mut error) = (Vec::new(), None);
    loop {
        let (tag, frame) = next_frame(link).await?;
        match tag {
            helios_wire::backend::NOTICE_RESPONSE => {
                stood.extend(told(&frame).as_deref().and_then(stands));
            }
            helios_wire::backend::ERROR_RESPONSE => {
                error = Some(describe_error(frame.get(5..).unwrap_or_default()));
            }
            helios_wire::backend::READY_FOR_QUERY => {
                return error.map_or(Ok(stood), |why| Err(ReplayError::State(why)));
            }
            _ => {}
        }
    }
}

/// Waits until no statement that sets back runs in this database any more.
pub(super) fn wait_for_others() -> String {
    format!("SELECT pg_catalog.pg_advisory_xact_lock({CLASS}, 0)")
}

/// What the statement tells by a NOTICE.
fn told(frame: &[u8]) -> Option<String> {
    let fields = helios_wire::ErrorFields::parse(frame.get(5..).unwrap_or_default()).ok()?;
    fields.message.strip_prefix("helios: ").map(str::to_owned)
}

/// "number last_value is_called".
fn stands(told: &str) -> Option<Stands> {
    let mut words = told.split(' ');
    let mut next = || words.next();
    let (number, value, called) = (next()?, next()?, next()?);
    Some((number.parse().ok()?, value.parse().ok()?, called == "t"))
}

/// Told before the sequence of this number is set back.
fn note(stands: Option<Stands>, wanted: &[Wanted], noted: &mut Vec<SetBack>) {
    let Some((number, value, called)) = stands else {
        return;
    };
    if let Some(Span { sequence, last, .. }) = wanted.get(number) {
        noted.retain(|one| one.sequence != *sequence);
        noted.push(SetBack {
            sequence: sequence.clone(),
            stood: (value, called),
            last: *last,
        });
    }
}

/// What the statement says of each sequence, by place.
#[derive(Default)]
struct Text {
    declared: String,
    read: String,
    back: String,
    /// Whether any was set back.
    done: String,
    /// Whether none can be.
    nothing: String,
    forward: String,
    stood: String,
}

impl Text {
    fn add(&mut self, n: usize, wanted: &Wanted, in_time: &str) {
        use std::fmt::Write as _;
        let Span {
            sequence,
            first,
            last,
        } = wanted;
        let Sequence {
            oid,
            increment,
            name,
        } = sequence;
        let _ = writeln!(
            self.declared,
            "v{n} bigint; c{n} boolean; b{n} boolean := false; t{n} bigint; u{n} boolean;"
        );
        let _ = writeln!(
            self.read,
            "BEGIN SELECT last_value, is_called INTO v{n}, c{n} FROM {name}; \
             IF ({last}::numeric - v{n}) / ({increment}) > {MAX_AHEAD} THEN v{n} := NULL; \
             ELSE RAISE NOTICE 'helios: {n} % %', v{n}, c{n}; END IF; \
             EXCEPTION WHEN OTHERS THEN v{n} := NULL; END;"
        );
        let _ = writeln!(
            self.back,
            "BEGIN PERFORM setval({oid}::oid::regclass, {first}, false) FROM {name} \
             WHERE last_value = v{n} AND is_called = c{n}{in_time}; \
             b{n} := FOUND; EXCEPTION WHEN OTHERS THEN NULL; END;"
        );
        let _ = write!(self.done, " OR b{n}");
        let _ = write!(self.nothing, " AND v{n} IS NULL");
        let set = forward_sql(sequence, &format!("v{n}"), &format!("c{n}"), *last);
        let _ = writeln!(
            self.forward,
            "BEGIN IF v{n} IS NOT NULL THEN SELECT last_value, is_called INTO t{n}, u{n} FROM {name}; \
             PERFORM {set}; END IF; \
             EXCEPTION WHEN OTHERS THEN failed := SQLERRM; END;"
        );
        // Behind all of them: a server that cannot tell anybody ends there and then.
        let _ = writeln!(
            self.stood,
            "IF b{n} THEN RAISE NOTICE 'helios: {n} % %', t{n}, u{n}; END IF;"
        );
    }
}

/// The statement's text. Sequences are read, and told of, again as long as none of them could be set
/// back, because somebody took values in between.
fn block(wanted: &[Wanted], pid: i32, until: Option<f64>) -> String {
    let in_time = until.map_or_else(String::new, |until| {
        format!(" AND clock_timestamp() < to_timestamp({until:.6})")
    });
    let mut text = Text::default();
    for (n, wanted) in wanted.iter().enumerate() {
        text.add(n, wanted, &in_time);
    }
    let Text {
        declared,
        read,
        back,
        done,
        nothing,
        forward,
        stood,
    } = text;
    let wait = until.map_or_else(
        || MAX_WAIT_MS.to_string(),
        |until| {
            format!(
                "greatest(1, least({MAX_WAIT_MS}, \
                 (({until:.6} - extract(epoch FROM clock_timestamp())) * 1000)::integer))"
            )
        },
    );
    format!(
        "DECLARE failed text; {declared}BEGIN \
         IF pg_try_advisory_xact_lock({CLASS}, {pid}) THEN RETURN; END IF; \
         PERFORM pg_advisory_xact_lock({CLASS}, 0); \
         PERFORM set_config('client_connection_check_interval', '0', true);\n\
         FOR i IN 1..{MAX_READS} LOOP\n{read}\
         RAISE NOTICE 'helios: sets %', pg_backend_pid();\n{back}\
         EXIT WHEN false{done} OR (true{nothing}); END LOOP;\n\
         BEGIN PERFORM set_config('lock_timeout', ({wait})::text, true); \
         PERFORM pg_advisory_xact_lock({CLASS}, {pid}); \
         EXCEPTION WHEN lock_not_available OR query_canceled THEN NULL; END;\n\
         BEGIN PERFORM pg_advisory_xact_lock({CLASS}, {TAKING}); \
         EXCEPTION WHEN lock_not_available OR query_canceled THEN NULL; END;\n{forward}{stood}\
         IF failed IS NOT NULL THEN RAISE EXCEPTION '%', failed; END IF; END"
    )
}

/// Sets a sequence behind where it stood, what the client saw and what was taken since; without the
/// SELECT in front.
fn forward_sql(sequence: &Sequence, stood: &str, called: &str, seen: i64) -> String {
    let (best, reached) = if sequence.increment > 0 {
        ("GREATEST", ">=")
    } else {
        ("LEAST", "<=")
    };
    let Sequence { oid, name, .. } = sequence;
    format!(
        "pg_catalog.setval({oid}::pg_catalog.oid::pg_catalog.regclass, \
         {best}(given, {stood}), called) FROM (SELECT given, \
         {called} OR given {reached} {stood} AS called FROM (SELECT {best}({seen}, \
         CASE WHEN is_called THEN last_value ELSE {seen} END) AS given FROM {name}) x) y"
    )
}

impl SetBack {
    /// Sets the sequence forward.
    pub(super) fn forward(&self) -> String {
        let (stood, called) = self.stood;
        let set = forward_sql(
            &self.sequence,
            &stood.to_string(),
            &called.to_string(),
            self.last,
        );
        format!("SELECT {set}")
    }
}
