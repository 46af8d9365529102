//! The wire protocol by hand, for clients that misbehave and for tests of what drivers hide.
//!
//! Knows just enough to build messages and to take them apart, on purpose without the product's
//! own codec: a mistake there must not hide itself here.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::Result;
use crate::driver::Target;

/// How long a raw client waits for an answer.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A message of the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Its type.
    pub tag: u8,
    /// What follows the length.
    pub body: Vec<u8>,
}

impl Message {
    /// A field of an ErrorResponse or NoticeResponse, such as `C` for the SQLSTATE.
    #[must_use]
    pub fn field(&self, code: u8) -> Option<String> {
        let mut fields = self.body.split(|&byte| byte == 0);
        let field = fields.find(|field| field.first() == Some(&code))?;
        Some(String::from_utf8_lossy(field.get(1..)?).into_owned())
    }

    /// The SQLSTATE of an ErrorResponse.
    #[must_use]
    pub fn sqlstate(&self) -> Option<String> {
        if self.tag == b'E' {
            self.field(b'C')
        } else {
            None
        }
    }
}

/// A message with a type.
#[must_use]
pub fn frame(tag: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 4).unwrap_or(u32::MAX);
    let mut bytes = vec![tag];
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(body);
    bytes
}

/// A simple query.
#[must_use]
pub fn query(sql: &str) -> Vec<u8> {
    frame(b'Q', format!("{sql}\0").as_bytes())
}

/// A prepared statement; the empty name is the unnamed one.
#[must_use]
pub fn parse(name: &str, sql: &str) -> Vec<u8> {
    frame(b'P', format!("{name}\0{sql}\0\0\0").as_bytes())
}

/// A portal on a prepared statement, with parameters and results as text.
#[must_use]
pub fn bind(portal: &str, statement: &str, parameters: &[&str]) -> Vec<u8> {
    let mut body = format!("{portal}\0{statement}\0\0\0").into_bytes();
    body.extend(u16::try_from(parameters.len()).unwrap_or(0).to_be_bytes());
    for parameter in parameters {
        body.extend(u32::try_from(parameter.len()).unwrap_or(0).to_be_bytes());
        body.extend_from_slice(parameter.as_bytes());
    }
    body.extend_from_slice(&[0, 0]);
    frame(b'B', &body)
}

/// Asks for the columns of a statement (`S`) or portal (`P`).
#[must_use]
pub fn describe(what: char, name: &str) -> Vec<u8> {
    frame(b'D', format!("{what}{name}\0").as_bytes())
}

/// Runs a portal for at most `rows` rows; 0 means all.
#[must_use]
pub fn execute(portal: &str, rows: u32) -> Vec<u8> {
    let mut body = format!("{portal}\0").into_bytes();
    body.extend(rows.to_be_bytes());
    frame(b'E', &body)
}

/// Closes a statement (`S`) or portal (`P`).
#[must_use]
pub fn close(what: char, name: &str) -> Vec<u8> {
    frame(b'C', format!("{what}{name}\0").as_bytes())
}

/// The end of an extended exchange.
#[must_use]
pub fn sync() -> Vec<u8> {
    frame(b'S', b"")
}

/// Asks for the replies so far.
#[must_use]
pub fn flush() -> Vec<u8> {
    frame(b'H', b"")
}

/// Parse, Bind and Execute of an unnamed statement, without Sync.
#[must_use]
pub fn extended(sql: &str, parameters: &[&str]) -> Vec<u8> {
    [parse("", sql), bind("", "", parameters), execute("", 0)].concat()
}

/// A call of a function by its OID, arguments and result as text.
#[must_use]
pub fn function_call(function: u32, arguments: &[&str]) -> Vec<u8> {
    let mut body = function.to_be_bytes().to_vec();
    body.extend_from_slice(&[0, 0]);
    body.extend(u16::try_from(arguments.len()).unwrap_or(0).to_be_bytes());
    for argument in arguments {
        body.extend(u32::try_from(argument.len()).unwrap_or(0).to_be_bytes());
        body.extend_from_slice(argument.as_bytes());
    }
    body.extend_from_slice(&[0, 0]);
    frame(b'F', &body)
}

/// A start-up packet of protocol 3.0.
#[must_use]
pub fn startup(user: &str, database: &str) -> Vec<u8> {
    startup_with(user, database, "")
}

/// A start-up packet that names the application too.
#[must_use]
pub fn startup_with(user: &str, database: &str, application: &str) -> Vec<u8> {
    let mut body = format!("user\0{user}\0database\0{database}\0");
    if !application.is_empty() {
        body.push_str(&format!("application_name\0{application}\0"));
    }
    body.push('\0');
    let length = u32::try_from(body.len() + 8).unwrap_or(u32::MAX);
    let mut bytes = length.to_be_bytes().to_vec();
    bytes.extend_from_slice(&196_608_u32.to_be_bytes());
    bytes.extend_from_slice(body.as_bytes());
    bytes
}

/// A connection that sends what it is told to.
#[derive(Debug)]
pub struct RawClient {
    stream: TcpStream,
}

impl RawClient {
    /// Opens the socket, and sends nothing.
    ///
    /// # Errors
    ///
    /// Nobody listens.
    pub async fn open(target: &Target) -> Result<Self> {
        let address = (target.host.as_str(), target.port);
        Ok(Self {
            stream: timeout(PATIENCE, TcpStream::connect(address)).await??,
        })
    }

    /// Opens the socket and logs in; for roles that need no password.
    ///
    /// # Errors
    ///
    /// The server refused, or asked for a password.
    pub async fn log_in(target: &Target) -> Result<Self> {
        Self::log_in_as(target, "").await
    }

    /// As [`Self::log_in`], with an `application_name`.
    ///
    /// # Errors
    ///
    /// The server refused, or asked for a password.
    pub async fn log_in_as(target: &Target, application: &str) -> Result<Self> {
        let mut client = Self::open(target).await?;
        let packet = startup_with(&target.user, &target.database, application);
        client.send(&packet).await?;
        client.until(b'Z').await?;
        Ok(client)
    }

    /// Sends bytes as they are.
    ///
    /// # Errors
    ///
    /// The other side has closed, or does not read.
    pub async fn send(&mut self, bytes: &[u8]) -> Result<()> {
        Ok(timeout(PATIENCE, self.stream.write_all(bytes)).await??)
    }

    /// The next message; `None` at the end of the stream.
    ///
    /// # Errors
    ///
    /// Nothing came within [`PATIENCE`].
    pub async fn receive(&mut self) -> Result<Option<Message>> {
        let mut header = [0; 5];
        match timeout(PATIENCE, self.stream.read_exact(&mut header)).await? {
            Ok(_) => {}
            Err(_) => return Ok(None),
        }
        let [tag, length @ ..] = header;
        let length = usize::try_from(u32::from_be_bytes(length))?;
        let mut body = vec![0; length.checked_sub(4).ok_or("length below 4")?];
        timeout(PATIENCE, self.stream.read_exact(&mut body)).await??;
        Ok(Some(Message { tag, body }))
    }

    /// Messages up to and with the first one of this type.
    ///
    /// # Errors
    ///
    /// The stream ended before, or an error came that was not asked for.
    pub async fn until(&mut self, tag: u8) -> Result<Vec<Message>> {
        let mut seen = Vec::new();
        while let Some(message) = self.receive().await? {
            if message.tag == b'E' && tag != b'E' {
                let text = message.field(b'M').unwrap_or_default();
                return Err(format!("error {:?}: {text}", message.sqlstate()).into());
            }
            let last = message.tag == tag;
            seen.push(message);
            if last {
                return Ok(seen);
            }
        }
        Err(format!("connection closed before a message {:?}", char::from(tag)).into())
    }

    /// Everything up to the end of the stream, to be judged by its SQLSTATEs.
    ///
    /// # Errors
    ///
    /// The stream did not end within [`PATIENCE`].
    pub async fn sqlstates_until_closed(&mut self) -> Result<Vec<String>> {
        let mut states = Vec::new();
        while let Some(message) = self.receive().await? {
            states.extend(message.sqlstate());
        }
        Ok(states)
    }
}
