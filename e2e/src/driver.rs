//! Runs the client programs of `e2e/clients` against an address.
//!
//! A program gets its connection by libpq's environment variables. It prints `SWITCH` where its
//! transaction is to be moved, and goes on when it reads `GO`. It judges by its own data; exit
//! status 0 means that all of it was right.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, Command};
use tokio::time::timeout;

use crate::Result;

/// The longest that a program may run: pgbench, three modes of 4 s and their set-up, on two busy
/// cores with as many switchovers.
const PROGRAM_LIMIT: Duration = Duration::from_secs(150);

/// [`PROGRAM_LIMIT`], and what `HELIOS_LONG_SECONDS` asks a program to take, twice.
fn program_limit() -> Duration {
    let asked = std::env::var("HELIOS_LONG_SECONDS").ok();
    let asked = asked.and_then(|s| s.parse().ok()).unwrap_or(0);
    PROGRAM_LIMIT + Duration::from_secs(asked) * 2
}

/// Where a program is to connect to.
#[derive(Debug, Clone)]
pub struct Target {
    /// Host name or address.
    pub host: String,
    /// Port.
    pub port: u16,
    /// Role.
    pub user: String,
    /// Its password; empty for none.
    pub password: String,
    /// Database.
    pub database: String,
}

impl Target {
    /// The superuser without a password on this machine, as on a bench.
    #[must_use]
    pub fn local(port: u16) -> Self {
        Self {
            host: "127.0.0.1".to_owned(),
            port,
            user: "postgres".to_owned(),
            password: String::new(),
            database: "postgres".to_owned(),
        }
    }

    /// A connection string for tokio-postgres and libpq.
    #[must_use]
    pub fn conninfo(&self) -> String {
        let mut info = format!(
            "host={} port={} user={} dbname={}",
            self.host, self.port, self.user, self.database
        );
        if !self.password.is_empty() {
            let quoted = self.password.replace('\\', "\\\\").replace('\'', "\\'");
            info.push_str(&format!(" password='{quoted}'"));
        }
        info
    }
}

/// What runs a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// A Python file of `e2e/clients`, by its name without `.py`.
    Python(&'static str),
    /// A JavaScript file, by its name without `.js`.
    Node(&'static str),
    /// A Java class, compiled by the set-up.
    Java(&'static str),
}

/// The programs' interpreters and drivers, as `scripts/setup.sh clients` made them.
#[derive(Debug, Clone)]
pub struct Programs {
    sources: PathBuf,
    installed: PathBuf,
    bin_dir: PathBuf,
}

impl Programs {
    /// Runs the set-up, which does nothing when all is there.
    ///
    /// # Errors
    ///
    /// The set-up failed: its message says what is missing.
    pub async fn set_up() -> Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let output = Command::new(root.join("scripts/setup.sh"))
            .arg("clients")
            .output()
            .await?;
        if !output.status.success() {
            let says = String::from_utf8_lossy(&output.stderr).into_owned();
            return Err(format!("scripts/setup.sh clients failed:\n{says}").into());
        }
        Ok(Self {
            sources: root.join("e2e/clients"),
            installed: String::from_utf8(output.stdout)?.trim().into(),
            bin_dir: helios_testkit::pg::bin_dir()?,
        })
    }

    /// Runs a program; `on_switch` is called each time it asks for a switchover. Returns how often
    /// it asked.
    ///
    /// # Errors
    ///
    /// The program failed or overstayed its limit, with what it printed; or `on_switch` failed.
    pub async fn run(
        &self,
        program: Program,
        target: &Target,
        mut on_switch: impl AsyncFnMut() -> Result<()>,
    ) -> Result<usize> {
        let mut child = self.command(program, target)?.spawn()?;
        let mut stderr = child.stderr.take().ok_or("no standard error")?;
        let errors = tokio::spawn(async move {
            let mut text = String::new();
            let _ = stderr.read_to_string(&mut text).await;
            text
        });
        let talked = timeout(program_limit(), converse(&mut child, &mut on_switch)).await;
        if !matches!(talked, Ok(Ok(_))) {
            child.kill().await?;
        }
        let (asked, said) = match talked {
            Ok(Ok(done)) => done,
            Ok(Err(problem)) => {
                return Err(format!("{program:?}: {problem}\n{}", errors.await?).into());
            }
            Err(_) => return Err(format!("{program:?} took too long\n{}", errors.await?).into()),
        };
        let status = child.wait().await?;
        let errors = errors.await?;
        if status.success() {
            return Ok(asked);
        }
        Err(format!("{program:?} failed, {status}\n{said}\n{errors}").into())
    }

    fn command(&self, program: Program, target: &Target) -> Result<Command> {
        let mut command = match program {
            Program::Python(name) => {
                let mut python = Command::new(self.installed.join("python/bin/python"));
                python
                    .arg("-B")
                    .arg(self.sources.join(name).with_extension("py"));
                python
            }
            Program::Node(name) => {
                let mut node = Command::new("node");
                node.arg(self.sources.join(name).with_extension("js"))
                    .env("NODE_PATH", self.installed.join("node/node_modules"));
                node
            }
            Program::Java(class) => {
                let mut java = Command::new("java");
                let classes = self.installed.join("java");
                java.arg("-cp")
                    .arg(format!(
                        "{}:/usr/share/java/postgresql.jar",
                        classes.display()
                    ))
                    .arg(class);
                java
            }
        };
        let path = std::env::var("PATH").unwrap_or_default();
        command
            .env("PATH", format!("{}:{path}", self.bin_dir.display()))
            .env("PGHOST", &target.host)
            .env("PGPORT", target.port.to_string())
            .env("PGUSER", &target.user)
            .env("PGPASSWORD", &target.password)
            .env("PGDATABASE", &target.database)
            .env("PGCONNECT_TIMEOUT", "20")
            .env("LC_ALL", "C.UTF-8")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        Ok(command)
    }
}

/// Answers each `SWITCH` until standard output ends.
async fn converse(
    child: &mut Child,
    on_switch: &mut impl AsyncFnMut() -> Result<()>,
) -> Result<(usize, String)> {
    let mut stdin = child.stdin.take().ok_or("no standard input")?;
    let mut lines = BufReader::new(child.stdout.take().ok_or("no standard output")?).lines();
    let (mut asked, mut said) = (0, String::new());
    while let Some(line) = lines.next_line().await? {
        if line == "SWITCH" {
            asked += 1;
            on_switch().await?;
            stdin.write_all(b"GO\n").await?;
            continue;
        }
        said.push_str(&line);
        said.push('\n');
    }
    Ok((asked, said))
}
