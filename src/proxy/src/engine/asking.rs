//! What a session's own backend is asked between two exchanges of its client, and the room for what
//! it tells.
//!
//! Touches that backend, and memory or a file without a name for rows. The invariant: whatever it
//! answers, the connection stays usable, or is given up as a whole.

use std::time::Duration;

use bytes::BytesMut;
use helios_journal::{Account, SpillFile};
use helios_session::journal::Spill as _;
use helios_session::temporary::SETTINGS;
use helios_wire::backend;
use helios_wire::message::read;

use super::link::Link;
use super::own;
use super::replay::{ReplayError, describe_error, is_fatal, next_frame, text_row};
use super::shared::Shared;

/// A backend that says nothing for so long is given up. One that goes on sending rows is not, however
/// many they are: its tables would be lost with it.
const SILENCE: Duration = Duration::from_secs(60);

/// Rows up to this size are kept in memory.
pub(super) const SMALL: usize = 256 * 1024;

/// Copy messages, as they came.
#[derive(Debug)]
pub(super) struct Rows {
    memory: Vec<u8>,
    disk: Option<SpillFile>,
    accounts: [Account; 2],
}

/// Why the backend's state could not be read.
pub(super) enum Failure {
    /// The backend is gone, with these last words.
    Gone(Option<BytesMut>),
    /// It goes on, and its state is not kept.
    Not(String),
    /// The same; its state can be read where the backend is left afterwards.
    Later(String),
}

impl From<std::io::Error> for Failure {
    fn from(_: std::io::Error) -> Self {
        Self::Gone(None)
    }
}

impl From<ReplayError> for Failure {
    fn from(_: ReplayError) -> Self {
        Self::Gone(None)
    }
}

impl Rows {
    pub(super) fn new(shared: &Shared) -> Self {
        let disk = shared.options.spill.as_ref().map_or(0, |s| s.max_bytes);
        Self {
            memory: Vec::new(),
            disk: None,
            accounts: [
                shared.pool.account(shared.options.max_journal_bytes),
                shared.disk.account(disk),
            ],
        }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        self.disk.as_ref().map_or(&self.memory, |disk| disk.bytes())
    }

    pub(super) fn append(&mut self, frame: &[u8], shared: &Shared) -> Result<(), String> {
        let size = self.bytes().len() + frame.len();
        let full = |_| format!("no room for {size} bytes of rows");
        if self.disk.is_none()
            && size > SMALL
            && let Some(spill) = &shared.options.spill
        {
            let file = SpillFile::create(&spill.folder, spill.max_bytes);
            let folder = spill.folder.display();
            let mut file = file.map_err(|e| format!("no file for them in \"{folder}\": {e}"))?;
            file.append(&self.memory)?;
            self.memory = Vec::new();
            self.disk = Some(file);
            // Less than before always fits.
            let _ = self.accounts[0].set(0);
        }
        match &mut self.disk {
            None => {
                self.accounts[0].set(size).map_err(full)?;
                self.memory.extend_from_slice(frame);
                Ok(())
            }
            Some(disk) => {
                self.accounts[1].set(size).map_err(full)?;
                disk.append(frame)
            }
        }
    }
}

/// A part of an answer.
pub(super) enum Answer<'a> {
    /// A whole RowDescription.
    Columns(&'a [u8]),
    /// A whole DataRow.
    Row(&'a [u8]),
    /// A whole CopyData.
    Copy(&'a [u8]),
    /// A whole CommandComplete.
    Complete(&'a [u8]),
}

/// The session's own backend, between two exchanges of its client.
pub(super) struct Asking<'a> {
    pub link: &'a mut Link,
    /// What is not ours goes to the client.
    pub client: &'a mut BytesMut,
}

impl Asking<'_> {
    /// Runs statements of ours behind the settings that all have, in one transaction; `on` gets what
    /// they are answered, with the number of the statement. The rest of an answer is read when `on`
    /// refuses a part, too: the connection stays usable.
    ///
    /// Not as a simple query, which would end the client's unnamed statement.
    pub(super) async fn run(
        &mut self,
        statements: &[&str],
        on: impl FnMut(usize, Answer<'_>) -> Result<(), String>,
    ) -> Result<(), Failure> {
        let all: Vec<&str> = [SETTINGS]
            .into_iter()
            .chain(statements.iter().copied())
            .collect();
        own::statements(&mut self.link.output, &all);
        self.answers(on).await
    }

    /// Runs statements of ours in one transaction, with the session's own settings and as its role;
    /// what they answer does not matter.
    pub(super) async fn run_as_client(&mut self, statements: &[&str]) -> Result<(), Failure> {
        own::statements(&mut self.link.output, statements);
        self.answers(|_, _| Ok(())).await
    }

    /// As [`Self::run`] for one statement, whose columns are described and whose rows come in binary.
    pub(super) async fn run_in_binary(
        &mut self,
        statement: &str,
        on: impl FnMut(usize, Answer<'_>) -> Result<(), String>,
    ) -> Result<(), Failure> {
        own::in_binary(&mut self.link.output, SETTINGS, statement);
        self.answers(on).await
    }

    /// The columns of a statement's rows; it is not run.
    pub(super) async fn describe(
        &mut self,
        statement: &str,
        on: impl FnMut(usize, Answer<'_>) -> Result<(), String>,
    ) -> Result<(), Failure> {
        own::describe(&mut self.link.output, SETTINGS, statement);
        self.answers(on).await
    }

    async fn answers(
        &mut self,
        mut on: impl FnMut(usize, Answer<'_>) -> Result<(), String>,
    ) -> Result<(), Failure> {
        self.link.flush().await?;
        let mut refused = Ok(());
        // The settings' come first.
        let mut number: Option<usize> = None;
        loop {
            let next = tokio::time::timeout(SILENCE, next_frame(self.link)).await;
            let (tag, frame) = next.map_err(|_| Failure::Gone(None))??;
            if is_fatal(tag, &frame) {
                return Err(Failure::Gone(Some(frame)));
            }
            let answer = match tag {
                backend::READY_FOR_QUERY => return refused.map_err(Failure::Not),
                backend::ROW_DESCRIPTION => Answer::Columns(&frame),
                backend::DATA_ROW => Answer::Row(&frame),
                backend::COPY_DATA => Answer::Copy(&frame),
                backend::COMMAND_COMPLETE => Answer::Complete(&frame),
                backend::ERROR_RESPONSE => {
                    refused = Err(describe_error(frame.get(5..).unwrap_or_default()));
                    continue;
                }
                backend::NOTIFICATION_RESPONSE => {
                    self.client.extend_from_slice(&frame);
                    continue;
                }
                backend::PARAMETER_STATUS => {
                    // Ours is in force for the time of the question.
                    let ours = read::parameter_status(frame.get(5..).unwrap_or_default())
                        .is_ok_and(|(name, _)| name == b"client_encoding");
                    if !ours {
                        self.client.extend_from_slice(&frame);
                    }
                    continue;
                }
                _ => continue,
            };
            let completes = matches!(answer, Answer::Complete(_));
            if let Some(number) = number {
                refused = refused.and_then(|()| on(number, answer));
            }
            if completes {
                number = Some(number.map_or(0, |n| n + 1));
            }
        }
    }

    /// The rows of all of some statements together.
    pub(super) async fn all_rows(
        &mut self,
        statements: &[&str],
    ) -> Result<Vec<Vec<Option<String>>>, Failure> {
        let mut rows = Vec::new();
        let row = |_, answer: Answer<'_>| {
            if let Answer::Row(frame) = answer {
                rows.push(text_row(frame.get(5..).unwrap_or_default()));
            }
            Ok(())
        };
        self.run(statements, row).await?;
        Ok(rows)
    }

    /// The rows of the last of some statements.
    pub(super) async fn rows_of(
        &mut self,
        statements: &[&str],
    ) -> Result<Vec<Vec<Option<String>>>, Failure> {
        let mut rows = Vec::new();
        let last = statements.len().saturating_sub(1);
        let row = |number, answer: Answer<'_>| {
            if let Answer::Row(frame) = answer
                && number == last
            {
                rows.push(text_row(frame.get(5..).unwrap_or_default()));
            }
            Ok(())
        };
        self.run(statements, row).await?;
        Ok(rows)
    }

    /// The rows of a query.
    pub(super) async fn rows(&mut self, sql: &str) -> Result<Vec<Vec<Option<String>>>, Failure> {
        self.rows_of(&[sql]).await
    }
}
