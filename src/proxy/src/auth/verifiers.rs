//! SCRAM verifiers, read from the primary's catalog when a client logs in.
//!
//! The catalog is asked at every login, over a connection that stays open: that is one local round
//! trip, a changed password counts at once, and known and unknown users take the same way. What
//! was read is kept for the times when no primary answers: a failover must not turn logins away.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use helios_api::Endpoint;
use helios_wire::message::{front, read};
use helios_wire::scram::{DEFAULT_ITERATIONS, Verifier};
use helios_wire::{ErrorFields, backend, body};
use tokio::time::Instant;

use crate::backend::{BackendConn, BackendError, Login, connect};
use crate::framed::Framed;
use crate::tls::BackendTls;

/// Users whose verifiers are remembered.
const MAX_REMEMBERED: usize = 10_000;
/// One question may take this long; then what is remembered must do.
const ASK_LIMIT: Duration = Duration::from_secs(2);
/// Pause between two attempts while there is no primary.
const RETRY: Duration = Duration::from_millis(50);
/// Longest answer.
const MAX_ANSWER: usize = 1 << 20;

/// One row for everybody: the verifier, and the iterations of verifiers that the server makes now
/// (PostgreSQL 16 and later). Nothing of it depends on the search path, which another role could
/// have changed.
const QUERY: &[u8] = b"select (select case when rolvaliduntil operator(pg_catalog.<) \
    pg_catalog.now() then null else rolpassword end \
    from pg_catalog.pg_authid where rolname operator(pg_catalog.=) $1), \
    pg_catalog.current_setting('scram_iterations', true)";

/// Where verifiers come from.
pub struct VerifierCache {
    service: Login,
    tls: BackendTls,
    patience: Duration,
    /// Makes up verifiers for users who have none.
    secret: [u8; 32],
    /// Iterations of them: the server's, as it said last.
    iterations: AtomicU32,
    endpoint: Mutex<Option<Endpoint>>,
    /// `None` for a user without a SCRAM password.
    remembered: Mutex<HashMap<String, Option<Verifier>>>,
    connection: tokio::sync::Mutex<Option<(Endpoint, Framed)>>,
}

/// No verifier could be had.
#[derive(Debug, thiserror::Error)]
pub enum LookupError {
    /// There is no primary, and nothing is remembered of this user.
    #[error("no primary is known")]
    NoPrimary,
    /// The service user's connection could not be made.
    #[error(transparent)]
    Connect(#[from] BackendError),
    /// The catalog could not be read.
    #[error("could not read pg_authid: {0}")]
    Query(String),
    /// The server did not answer.
    #[error("the server did not answer within {0:?}")]
    Timeout(Duration),
}

impl VerifierCache {
    /// Reads the catalog as `service`, who must be allowed to read `pg_authid`. While there is no
    /// primary, a user of whom nothing is remembered waits as long as `patience`.
    #[must_use]
    pub fn new(service: Login, tls: BackendTls, patience: Duration) -> Self {
        let mut secret = [0; 32];
        rand::fill(&mut secret);
        Self {
            service,
            tls,
            patience,
            secret,
            iterations: AtomicU32::new(DEFAULT_ITERATIONS),
            endpoint: Mutex::default(),
            remembered: Mutex::default(),
            connection: tokio::sync::Mutex::default(),
        }
    }

    /// Where the primary is now; `None` while there is none.
    pub fn set_endpoint(&self, endpoint: Option<Endpoint>) {
        *lock(&self.endpoint) = endpoint;
    }

    /// The user's verifier, or one that no password fits.
    ///
    /// # Errors
    ///
    /// The catalog cannot be read, and nothing is remembered of this user.
    pub async fn lookup(&self, user: &str) -> Result<Verifier, LookupError> {
        let deadline = Instant::now() + self.patience;
        let found = loop {
            let error = match self.ask_within_limit(user).await {
                Ok(found) => {
                    self.remember(user, found.clone());
                    break found;
                }
                Err(error) => error,
            };
            if let Some(known) = lock(&self.remembered).get(user) {
                break known.clone();
            }
            if Instant::now() + RETRY > deadline || !error.is_transient() {
                return Err(error);
            }
            tokio::time::sleep(RETRY).await;
        };
        let iterations = self.iterations.load(Ordering::Relaxed);
        Ok(found.unwrap_or_else(|| Verifier::mock(user, &self.secret, iterations)))
    }

    async fn ask_within_limit(&self, user: &str) -> Result<Option<Verifier>, LookupError> {
        let Some(endpoint) = lock(&self.endpoint).clone() else {
            return Err(LookupError::NoPrimary);
        };
        tokio::time::timeout(ASK_LIMIT, Box::pin(self.ask(endpoint, user)))
            .await
            .map_err(|_| LookupError::Timeout(ASK_LIMIT))?
    }

    /// Asks over the open connection; over a new one when there is none or it has broken.
    async fn ask(&self, endpoint: Endpoint, user: &str) -> Result<Option<Verifier>, LookupError> {
        let mut place = self.connection.lock().await;
        // Taken out: when this future is dropped halfway, the connection is out of step and goes.
        let open = place.take().filter(|(old, _)| *old == endpoint);
        if let Some((_, mut framed)) = open
            && let Ok(answer) = query(&mut framed, user).await
        {
            *place = Some((endpoint, framed));
            return Ok(self.taken(answer));
        }
        let BackendConn { stream, buf, .. } =
            connect(&endpoint, &self.tls, &self.service, ASK_LIMIT).await?;
        let mut framed = Framed::new(stream);
        framed.buf = buf;
        let answer = query(&mut framed, user).await?;
        *place = Some((endpoint, framed));
        Ok(self.taken(answer))
    }

    fn taken(&self, answer: Answer) -> Option<Verifier> {
        let iterations = answer.iterations.unwrap_or(DEFAULT_ITERATIONS);
        self.iterations.store(iterations, Ordering::Relaxed);
        answer.verifier
    }

    fn remember(&self, user: &str, found: Option<Verifier>) {
        let mut remembered = lock(&self.remembered);
        if remembered.len() >= MAX_REMEMBERED && !remembered.contains_key(user) {
            remembered.retain(|_, verifier| verifier.is_some());
            if remembered.len() >= MAX_REMEMBERED {
                remembered.clear();
            }
        }
        remembered.insert(user.to_owned(), found);
    }
}

impl LookupError {
    fn is_transient(&self) -> bool {
        match self {
            Self::NoPrimary | Self::Timeout(_) => true,
            Self::Connect(error) => error.is_transient(),
            Self::Query(_) => false,
        }
    }
}

impl fmt::Debug for VerifierCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("VerifierCache(..)")
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the catalog said.
#[derive(Default)]
struct Answer {
    verifier: Option<Verifier>,
    iterations: Option<u32>,
}

/// Asks for one user's verifier and reads up to ReadyForQuery.
async fn query(framed: &mut Framed, user: &str) -> Result<Answer, LookupError> {
    let failed = |why: String| LookupError::Query(why);
    let out = &mut framed.out;
    front::parse(out, b"", QUERY, &[25])
        .and_then(|()| front::bind(out, b"", b"", &[], &[Some(user.as_bytes())], &[]))
        .and_then(|()| front::execute(out, b"", 1))
        .map_err(|e| failed(e.to_string()))?;
    front::sync(out);
    framed.flush().await.map_err(|e| failed(e.to_string()))?;
    let mut found = Ok(Answer::default());
    loop {
        let (tag, frame) = framed
            .read(MAX_ANSWER)
            .await
            .map_err(|e| failed(e.to_string()))?;
        match tag {
            backend::DATA_ROW => {
                let row = read::data_row(body(&frame)).map_err(|e| failed(e.to_string()))?;
                let mut texts = row.iter().map(|t| std::str::from_utf8(t?).ok());
                let mut next = || texts.next().flatten();
                found = Ok(Answer {
                    // An MD5 password is none for us: the user is refused as with a wrong one.
                    verifier: next().and_then(|t| t.parse().ok()),
                    iterations: next().and_then(|t| t.parse().ok()),
                });
            }
            backend::ERROR_RESPONSE => {
                let error = ErrorFields::parse(body(&frame));
                let why = error.map_or_else(|e| e.to_string(), |e| e.to_string());
                found = Err(failed(why));
            }
            backend::READY_FOR_QUERY => return found,
            _ => {}
        }
    }
}
