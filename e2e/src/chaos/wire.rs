//! A client by hand: simple and extended queries, pipelines, COPY, strict about every answer.
//!
//! On purpose without the product's codec and without a driver that would hide a command tag or
//! forgive a message too many.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};

use crate::driver::Target;
use crate::raw::{Message, frame, query, startup};

/// Longest message that a client takes for possible.
const MAX_MESSAGE: usize = 64 << 20;

/// What a request got instead of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trouble {
    /// The server's error.
    Sql {
        /// FATAL ends the connection.
        fatal: bool,
        /// SQLSTATE.
        state: String,
        /// Message, detail and hint.
        text: String,
    },
    /// The connection ended without a word.
    Closed(String),
    /// No answer within the limit.
    Timeout(Duration),
    /// An answer that the protocol does not allow, or that the statement cannot have.
    Protocol(String),
}

impl std::fmt::Display for Trouble {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Sql { fatal, state, text } => {
                let severity = if *fatal { "FATAL" } else { "ERROR" };
                write!(f, "{severity} {state}: {text}")
            }
            Self::Closed(why) => write!(f, "connection closed: {why}"),
            Self::Timeout(limit) => write!(f, "no answer within {limit:?}"),
            Self::Protocol(what) => write!(f, "protocol: {what}"),
        }
    }
}

/// What a request was answered with.
#[derive(Debug, Default, Clone)]
pub struct Answer {
    /// Rows of all statements, in text.
    pub rows: Vec<Vec<Option<String>>>,
    /// Command tags in order.
    pub tags: Vec<String>,
    /// Transaction status of the last ReadyForQuery.
    pub status: u8,
}

impl Answer {
    /// A column of the only row.
    ///
    /// # Errors
    /// There is not exactly one row, or the column is no such value.
    pub fn one<T: std::str::FromStr>(&self, column: usize) -> Result<T, Trouble> {
        let wrong = || Trouble::Protocol(format!("unexpected rows {:?}", self.rows));
        let [row] = self.rows.as_slice() else {
            return Err(wrong());
        };
        let text = row.get(column).and_then(Option::as_ref).ok_or_else(wrong)?;
        text.parse().map_err(|_| wrong())
    }
}

/// A statement with its parameters.
#[derive(Debug, Clone)]
pub struct Statement {
    /// The text.
    pub sql: String,
    /// Values for `$1`, `$2`, ...
    pub parameters: Vec<String>,
}

/// A connection.
#[derive(Debug)]
pub struct Conn {
    stream: BufReader<TcpStream>,
    limit: Duration,
    longest: Duration,
    status: u8,
}

impl Conn {
    /// Connects and logs in; for roles that need no password. No answer may take longer than
    /// `limit`.
    ///
    /// # Errors
    /// See [`Trouble`].
    pub async fn open(target: &Target, limit: Duration) -> Result<Self, Trouble> {
        let address = (target.host.as_str(), target.port);
        let opening = tokio::time::timeout(limit, TcpStream::connect(address)).await;
        let stream = match opening {
            Ok(stream) => stream.map_err(|e| Trouble::Closed(e.to_string()))?,
            Err(_) => return Err(Trouble::Timeout(limit)),
        };
        // Delays of Nagle's would only blur the times.
        let _ = stream.set_nodelay(true);
        let mut conn = Self {
            stream: BufReader::new(stream),
            limit,
            longest: Duration::ZERO,
            status: 0,
        };
        let packet = startup(&target.user, &target.database);
        conn.exchange(&packet, 0).await?;
        Ok(conn)
    }

    /// A simple query of one statement or several.
    ///
    /// # Errors
    /// See [`Trouble`].
    pub async fn simple(&mut self, sql: &str, tags: usize) -> Result<Answer, Trouble> {
        self.exchange(&query(sql), tags).await
    }

    /// Statements in one flight with one Sync at its end, by the unnamed statement.
    ///
    /// # Errors
    /// See [`Trouble`].
    pub async fn pipeline(&mut self, statements: &[Statement]) -> Result<Answer, Trouble> {
        let mut bytes = Vec::new();
        for statement in statements {
            parse(&mut bytes, "", &statement.sql);
            execute(&mut bytes, "", &statement.parameters);
        }
        bytes.extend(frame(b'S', &[]));
        self.exchange(&bytes, statements.len()).await
    }

    /// Prepares a statement by name.
    ///
    /// # Errors
    /// See [`Trouble`].
    pub async fn prepare(&mut self, name: &str, sql: &str) -> Result<(), Trouble> {
        let mut bytes = Vec::new();
        parse(&mut bytes, name, sql);
        bytes.extend(frame(b'S', &[]));
        self.exchange(&bytes, 0).await.map(drop)
    }

    /// Executes a prepared statement.
    ///
    /// # Errors
    /// See [`Trouble`].
    pub async fn prepared(&mut self, name: &str, values: &[String]) -> Result<Answer, Trouble> {
        let mut bytes = Vec::new();
        execute(&mut bytes, name, values);
        bytes.extend(frame(b'S', &[]));
        self.exchange(&bytes, 1).await
    }

    /// COPY FROM STDIN: the chunks one by one, with a pause in front of each.
    ///
    /// # Errors
    /// See [`Trouble`].
    pub async fn copy_in(
        &mut self,
        sql: &str,
        chunks: &[String],
        pause: Duration,
    ) -> Result<Answer, Trouble> {
        let deadline = Instant::now() + self.limit;
        self.write(&query(sql), deadline).await?;
        let mut first = self.message(deadline).await?;
        // Parameters and notices may come at any time.
        while matches!(first.tag, b'S' | b'N') {
            first = self.message(deadline).await?;
        }
        if first.tag != b'G' {
            // An error instead: the rest of the answer follows.
            return self.collect(Some(first), 1, deadline).await;
        }
        for chunk in chunks {
            tokio::time::sleep(pause).await;
            // A server that fails in the middle says so before it reads on; the answer tells.
            if self
                .write(&frame(b'd', chunk.as_bytes()), deadline)
                .await
                .is_err()
            {
                break;
            }
        }
        let began = Instant::now();
        let deadline = began + self.limit;
        let _ = self.write(&frame(b'c', &[]), deadline).await;
        let answer = self.collect(None, 1, deadline).await;
        self.longest = self.longest.max(began.elapsed());
        answer
    }

    /// Says goodbye.
    pub async fn close(mut self) {
        let deadline = Instant::now() + self.limit;
        // Whoever is told may have gone.
        let _ = self.write(&frame(b'X', &[]), deadline).await;
    }

    /// The longest that an answer took so far.
    #[must_use]
    pub fn longest(&self) -> Duration {
        self.longest
    }

    /// Whether the last ReadyForQuery left a transaction open, failed or not.
    #[must_use]
    pub fn in_transaction(&self) -> bool {
        matches!(self.status, b'T' | b'E')
    }

    async fn exchange(&mut self, bytes: &[u8], tags: usize) -> Result<Answer, Trouble> {
        let began = Instant::now();
        let deadline = began + self.limit;
        self.write(bytes, deadline).await?;
        let answer = self.collect(None, tags, deadline).await;
        self.longest = self.longest.max(began.elapsed());
        answer
    }

    /// Everything up to ReadyForQuery. `tags`: how many statements must be answered.
    async fn collect(
        &mut self,
        mut first: Option<Message>,
        tags: usize,
        deadline: Instant,
    ) -> Result<Answer, Trouble> {
        let mut answer = Answer::default();
        let mut error: Option<Trouble> = None;
        loop {
            let message = match first.take() {
                Some(message) => message,
                None => match self.message(deadline).await {
                    Ok(message) => message,
                    // FATAL is the last word.
                    Err(Trouble::Closed(why)) => return Err(error.unwrap_or(Trouble::Closed(why))),
                    Err(trouble) => return Err(trouble),
                },
            };
            match message.tag {
                b'Z' => {
                    self.status = message.body.first().copied().unwrap_or_default();
                    answer.status = self.status;
                    break;
                }
                b'E' if error.is_some() => {
                    let text = format!("a second error: {:?}", sql_trouble(&message));
                    return Err(Trouble::Protocol(text));
                }
                b'E' => error = Some(sql_trouble(&message)),
                b'D' => answer.rows.push(row(&message)?),
                b'C' => answer.tags.push(text(&message.body)),
                // Start-up, parameters, notices, and the silent confirmations of the extended
                // protocol.
                b'R' | b'S' | b'K' | b'N' | b'T' | b'1' | b'2' | b'3' | b'n' | b't' | b'I' => {}
                other => {
                    let text = format!("unexpected message '{}'", char::from(other));
                    return Err(Trouble::Protocol(text));
                }
            }
        }
        if let Some(error) = error {
            return Err(error);
        }
        if answer.tags.len() != tags {
            let text = format!("{tags} statements were answered with {:?}", answer.tags);
            return Err(Trouble::Protocol(text));
        }
        Ok(answer)
    }

    async fn write(&mut self, bytes: &[u8], deadline: Instant) -> Result<(), Trouble> {
        match timeout_at(deadline, self.stream.get_mut().write_all(bytes)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(e)) => Err(Trouble::Closed(e.to_string())),
            Err(_) => Err(Trouble::Timeout(self.limit)),
        }
    }

    async fn message(&mut self, deadline: Instant) -> Result<Message, Trouble> {
        let stream = &mut self.stream;
        let read = async {
            let mut header = [0; 5];
            stream.read_exact(&mut header).await?;
            let [tag, length @ ..] = header;
            let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
            if !(4..=MAX_MESSAGE).contains(&length) {
                let text = format!("message of {length} bytes");
                return Ok(Err(Trouble::Protocol(text)));
            }
            let mut body = vec![0; length - 4];
            stream.read_exact(&mut body).await?;
            std::io::Result::Ok(Ok(Message { tag, body }))
        };
        match timeout_at(deadline, read).await {
            Ok(Ok(message)) => message,
            Ok(Err(e)) => Err(Trouble::Closed(e.to_string())),
            Err(_) => Err(Trouble::Timeout(self.limit)),
        }
    }
}

fn text(bytes: &[u8]) -> String {
    let bytes = bytes.strip_suffix(&[0]).unwrap_or(bytes);
    String::from_utf8_lossy(bytes).into_owned()
}

fn sql_trouble(message: &Message) -> Trouble {
    let field = |code| message.field(code).unwrap_or_default();
    let mut text = field(b'M');
    for (label, code) in [("detail", b'D'), ("hint", b'H'), ("context", b'W')] {
        let more = field(code);
        if !more.is_empty() {
            text.push_str(&format!("; {label}: {more}"));
        }
    }
    Trouble::Sql {
        fatal: matches!(field(b'V').as_str(), "FATAL" | "PANIC"),
        state: field(b'C'),
        text,
    }
}

fn row(message: &Message) -> Result<Vec<Option<String>>, Trouble> {
    let short = || Trouble::Protocol("a row that is too short".to_owned());
    let mut rest = message.body.get(2..).ok_or_else(short)?;
    let mut values = Vec::new();
    while !rest.is_empty() {
        let (length, behind) = rest.split_first_chunk::<4>().ok_or_else(short)?;
        rest = behind;
        let Ok(length) = usize::try_from(i32::from_be_bytes(*length)) else {
            values.push(None);
            continue;
        };
        let value = rest.get(..length).ok_or_else(short)?;
        values.push(Some(String::from_utf8_lossy(value).into_owned()));
        rest = rest.get(length..).unwrap_or_default();
    }
    Ok(values)
}

fn parse(bytes: &mut Vec<u8>, name: &str, sql: &str) {
    bytes.extend(frame(b'P', format!("{name}\0{sql}\0\0\0").as_bytes()));
}

/// Bind, Describe and Execute; parameters and results in text.
fn execute(bytes: &mut Vec<u8>, name: &str, values: &[String]) {
    let count = u16::try_from(values.len()).unwrap_or(u16::MAX);
    let mut bind = format!("\0{name}\0\0\0").into_bytes();
    bind.extend(count.to_be_bytes());
    for value in values {
        bind.extend(u32::try_from(value.len()).unwrap_or(0).to_be_bytes());
        bind.extend(value.as_bytes());
    }
    bind.extend([0, 0]);
    bytes.extend(frame(b'B', &bind));
    bytes.extend(frame(b'D', b"P\0"));
    bytes.extend(frame(b'E', &[0, 0, 0, 0, 0]));
}
