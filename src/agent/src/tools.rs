//! Runs PostgreSQL's programs: as its user, with a clean environment, in a process group that dies
//! when the caller loses interest, the end of what they say kept for error messages.

use std::process::Stdio;
use std::time::Duration;

use helios_api::agent::AgentError;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::Command;

use crate::AgentConfig;
use crate::error::failed;

/// How much of a program's words is kept.
const TAIL: usize = 2000;
/// How long a small program (`pg_controldata`, `pg_waldump`) may take.
const SMALL_LIMIT: Duration = Duration::from_secs(60);
/// How long a server alone may take for what it is given: it recovers first.
const FEED_LIMIT: Duration = Duration::from_secs(3600);
/// How long a large one (`initdb`, `pg_rewind`, `pg_basebackup`) may say nothing.
const SILENCE_LIMIT: Duration = Duration::from_secs(300);

/// A command that runs one of PostgreSQL's programs.
pub(crate) fn command(config: &AgentConfig, program: &str) -> Command {
    let mut command = Command::new(config.program(program));
    command
        .env_clear()
        .env("LC_ALL", "C")
        .env("PATH", &config.bin_dir)
        .current_dir("/")
        .stdin(Stdio::null());
    for name in ["LD_LIBRARY_PATH", "TZ"] {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    if let Some(user) = &config.run_as {
        command.uid(user.uid).gid(user.gid);
    }
    command
}

/// What a program said.
#[derive(Debug)]
pub(crate) struct Captured {
    pub(crate) success: bool,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs a small program to its end.
pub(crate) async fn capture(mut command: Command, name: &str) -> Result<Captured, AgentError> {
    let output = command.kill_on_drop(true).output();
    let output = tokio::time::timeout(SMALL_LIMIT, output)
        .await
        .map_err(|_| failed(format_args!("{name} did not end within {SMALL_LIMIT:?}")))?
        .map_err(|e| no_start(name, &command, &e))?;
    Ok(Captured {
        success: output.status.success(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// Runs a small program and returns what it printed.
pub(crate) async fn output(command: Command, name: &str) -> Result<String, AgentError> {
    let done = capture(command, name).await?;
    if done.success {
        return Ok(done.stdout);
    }
    Err(failed(format_args!(
        "{name} failed: {}",
        tail(&done.stderr)
    )))
}

/// Runs a program that reads `input` and may take as long as a large one; returns what it said.
pub(crate) async fn feed(
    mut command: Command,
    name: &str,
    input: &str,
) -> Result<Captured, AgentError> {
    use tokio::io::AsyncWriteExt as _;
    let mut child = command
        .kill_on_drop(true)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| no_start(name, &command, &e))?;
    let stdin = child.stdin.take();
    let whole = async {
        if let Some(mut stdin) = stdin {
            // One that ends early says why.
            let _ = stdin.write_all(input.as_bytes()).await;
        }
        child.wait_with_output().await
    };
    let output = tokio::time::timeout(FEED_LIMIT, whole)
        .await
        .map_err(|_| failed(format_args!("{name} did not end within {FEED_LIMIT:?}")))?
        .map_err(|e| failed(format_args!("could not run {name}: {e}")))?;
    Ok(Captured {
        success: output.status.success(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

fn no_start(name: &str, command: &Command, error: &std::io::Error) -> AgentError {
    failed(format_args!(
        "could not run {name} as \"{}\": {error}; is bin_dir right?",
        command.as_std().get_program().to_string_lossy()
    ))
}

/// Kills a program with everything it has started, unless it has ended.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(pid) = self.0 {
            let _ = killpg(pid, Signal::SIGKILL);
        }
    }
}

/// Runs a program that may take long; `line` gets each line it says, progress lines included. When
/// the future is dropped, the program dies.
pub(crate) async fn run_long(
    mut command: Command,
    name: &str,
    mut line: impl FnMut(&str),
) -> Result<(), AgentError> {
    let mut child = command
        .process_group(0)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| no_start(name, &command, &e))?;
    let mut group = Group(
        child
            .id()
            .and_then(|id| i32::try_from(id).ok())
            .map(Pid::from_raw),
    );
    let mut said = String::new();
    if let Some(stderr) = child.stderr.take() {
        read_lines(stderr, name, &mut said, &mut line).await?;
    }
    let status = tokio::time::timeout(SILENCE_LIMIT, child.wait())
        .await
        .map_err(|_| failed(format_args!("{name} does not end")))?
        .map_err(|e| failed(format_args!("could not wait for {name}: {e}")))?;
    group.0 = None;
    if status.success() {
        return Ok(());
    }
    Err(failed(format_args!(
        "{name} failed ({status}): {}",
        tail(&said)
    )))
}

async fn read_lines(
    mut from: impl AsyncRead + Unpin,
    name: &str,
    said: &mut String,
    line: &mut impl FnMut(&str),
) -> Result<(), AgentError> {
    let mut buffer = [0; 4096];
    loop {
        let n = tokio::time::timeout(SILENCE_LIMIT, from.read(&mut buffer))
            .await
            .map_err(|_| failed(format_args!("{name} said nothing for {SILENCE_LIMIT:?}")))?
            .map_err(|e| failed(format_args!("could not read from {name}: {e}")))?;
        if n == 0 {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&buffer[..n]).replace('\r', "\n");
        text.lines()
            .filter(|l| !l.trim().is_empty())
            .for_each(&mut *line);
        said.push_str(&text);
        if said.len() > 4 * TAIL {
            *said = tail(said);
        }
    }
}

/// The end of a text, cut at a line.
pub(crate) fn tail(text: &str) -> String {
    let text = text.trim();
    let start = (text.len().saturating_sub(TAIL)..=text.len())
        .find(|i| text.is_char_boundary(*i))
        .unwrap_or(0);
    let end = &text[start..];
    match end.split_once('\n') {
        Some((_, rest)) if start > 0 => rest.to_owned(),
        _ => end.to_owned(),
    }
}
