//! A real PostgreSQL server for one test.
//!
//! Makes a data directory in a temporary place, starts the postmaster in a process group of its
//! own, and kills that group when the value is dropped. Root may not run PostgreSQL: then the
//! processes belong to the user `postgres`.

use std::io::{Error, Result};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::{Pid, User, chown, geteuid};
use tokio_postgres::{Client, Config, NoTls};

use crate::net::free_port;

/// How long a server may take to accept its first connection.
const START_LIMIT: Duration = Duration::from_secs(60);
/// How long a server may take to stop before its processes are killed.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// What a test's server is to look like.
#[derive(Debug, Clone, Default)]
pub struct PgOptions {
    /// Directory of the binaries; found by [`bin_dir`] when `None`.
    pub bin_dir: Option<PathBuf>,
    /// Lines for `postgresql.conf`, after the ones made here (the last one wins).
    pub config: Vec<String>,
    /// Lines of `pg_hba.conf`; empty means trust for everybody, local and on 127.0.0.1.
    pub hba: Vec<String>,
    /// Password of the superuser `postgres`.
    pub password: Option<String>,
    /// Arguments for initdb, after the ones made here.
    pub initdb_args: Vec<String>,
}

impl PgOptions {
    /// Adds a line of `postgresql.conf`.
    #[must_use]
    pub fn config(mut self, line: impl Into<String>) -> Self {
        self.config.push(line.into());
        self
    }

    /// Adds a line of `pg_hba.conf`; the first one takes the place of the default.
    #[must_use]
    pub fn hba(mut self, line: impl Into<String>) -> Self {
        self.hba.push(line.into());
        self
    }

    /// Gives the superuser a password.
    #[must_use]
    pub fn password(mut self, password: impl Into<String>) -> Self {
        self.password = Some(password.into());
        self
    }
}

/// A running server, killed on drop.
#[derive(Debug)]
pub struct PgServer {
    dir: tempfile::TempDir,
    bin: PathBuf,
    port: u16,
    password: Option<String>,
    child: Option<Child>,
}

impl PgServer {
    /// Makes a data directory, starts a server on it and waits until it answers.
    ///
    /// # Errors
    ///
    /// No binaries, initdb failed, or the server did not answer within its limit; the message
    /// holds the end of its log.
    pub async fn start(options: PgOptions) -> Result<Self> {
        let bin = match &options.bin_dir {
            Some(dir) => dir.clone(),
            None => bin_dir()?,
        };
        let dir = server_dir("helios-pg-")?;
        let mut server = Self {
            dir,
            bin,
            port: free_port()?,
            password: options.password.clone(),
            child: None,
        };
        server.initdb(&options)?;
        server.configure(&options)?;
        server.link_socket()?;
        server.boot().await?;
        Ok(server)
    }

    /// The data directory.
    #[must_use]
    pub fn data_dir(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// The directory of its Unix socket, as clients are to use it: a link to the server's own file,
    /// so that a go-between keeps this place when the server starts anew.
    #[must_use]
    pub fn socket_dir(&self) -> &Path {
        self.dir.path()
    }

    /// Its port, on 127.0.0.1 and in the name of the Unix socket.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Directory of the binaries that it runs on.
    #[must_use]
    pub fn bin_dir(&self) -> &Path {
        &self.bin
    }

    /// Process id of the postmaster, while it runs; also its process group.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// What its log says.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// A connection string for user and database `postgres` over TCP.
    #[must_use]
    pub fn conninfo(&self) -> String {
        let mut info = format!(
            "host=127.0.0.1 port={} user=postgres dbname=postgres",
            self.port
        );
        if let Some(password) = &self.password {
            let quoted = password.replace('\\', "\\\\").replace('\'', "\\'");
            info.push_str(&format!(" password='{quoted}'"));
        }
        info
    }

    /// Connects over TCP as `postgres`; the connection lives as long as the client.
    ///
    /// # Errors
    ///
    /// Whatever the connection fails with.
    pub async fn connect(&self) -> std::result::Result<Client, tokio_postgres::Error> {
        self.connect_as(&self.conninfo()).await
    }

    /// Connects with a connection string of the caller's.
    ///
    /// # Errors
    ///
    /// Whatever the connection fails with.
    pub async fn connect_as(
        &self,
        conninfo: &str,
    ) -> std::result::Result<Client, tokio_postgres::Error> {
        let config: Config = conninfo.parse()?;
        let (client, connection) = config.connect(NoTls).await?;
        tokio::spawn(connection);
        Ok(client)
    }

    /// A command that runs one of PostgreSQL's programs as the user the server runs as.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        as_server_user(Command::new(self.bin.join(program)))
    }

    /// Stops the server (fast) and starts it again on the same directory and port.
    ///
    /// # Errors
    ///
    /// The server did not answer within its limit.
    pub async fn restart(&mut self) -> Result<()> {
        self.stop(Signal::SIGINT);
        self.boot().await
    }

    /// Kills the server with all its processes at once, as a crash would.
    pub fn crash(&mut self) {
        if let Some(Ok(pid)) = self.pid().map(i32::try_from) {
            // The signal below is what there is when `/proc` cannot be read.
            let _ = kill_all(pid);
        }
        self.stop(Signal::SIGKILL);
    }

    /// Starts a server that was stopped.
    ///
    /// # Errors
    ///
    /// The server did not answer within its limit.
    pub async fn boot(&mut self) -> Result<()> {
        let log = std::fs::File::create(self.dir.path().join("log"))?;
        let child = self
            .command("postgres")
            .arg("-D")
            .arg(self.data_dir())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()?;
        self.child = Some(child);
        let deadline = Instant::now() + START_LIMIT;
        loop {
            let refused = match self.connect().await {
                Ok(client) => {
                    return client
                        .simple_query("select")
                        .await
                        .map(drop)
                        .map_err(Error::other);
                }
                Err(refused) => refused,
            };
            let gone = self
                .child
                .as_mut()
                .is_none_or(|c| !matches!(c.try_wait(), Ok(None)));
            // An answer with another SQLSTATE (a password demanded, say) is an answer.
            let answered = refused.code().is_some_and(|code| code.code() != "57P03");
            if answered {
                return Ok(());
            }
            if gone || Instant::now() > deadline {
                return Err(Error::other(format!(
                    "server did not start: {refused}\n{}",
                    self.log()
                )));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn initdb(&self, options: &PgOptions) -> Result<()> {
        let mut initdb = self.command("initdb");
        initdb.arg("-D").arg(self.data_dir()).args([
            "--no-sync",
            "--no-instructions",
            "--username=postgres",
            "--encoding=UTF8",
            "--locale=C.UTF-8",
            "--wal-segsize=1",
            "--auth=trust",
        ]);
        if let Some(password) = &options.password {
            let file = self.dir.path().join("password");
            std::fs::write(&file, password)?;
            give_to_server_user(&file)?;
            initdb.arg("--pwfile").arg(file);
        }
        let done = initdb
            .args(&options.initdb_args)
            .stdin(Stdio::null())
            .output()?;
        if done.status.success() {
            return Ok(());
        }
        let says = String::from_utf8_lossy(&done.stderr).into_owned();
        Err(Error::other(format!("initdb failed: {says}")))
    }

    fn configure(&self, options: &PgOptions) -> Result<()> {
        let conf = self.data_dir().join("postgresql.conf");
        let mut text = std::fs::read_to_string(&conf)?;
        text.push_str(&format!(
            "\nlisten_addresses = '127.0.0.1'\nport = {}\nunix_socket_directories = '{}'\n\
             fsync = off\nmax_connections = 100\nshared_buffers = 32MB\nmin_wal_size = 8MB\n",
            self.port,
            self.own_sockets().display(),
        ));
        for line in &options.config {
            text.push_str(line);
            text.push('\n');
        }
        std::fs::write(&conf, text)?;
        if !options.hba.is_empty() {
            let hba = options.hba.join("\n") + "\n";
            std::fs::write(self.data_dir().join("pg_hba.conf"), hba)?;
        }
        Ok(())
    }

    /// Where the server itself puts its Unix socket.
    fn own_sockets(&self) -> PathBuf {
        self.dir.path().join("own")
    }

    fn link_socket(&self) -> Result<()> {
        let own = self.own_sockets();
        std::fs::create_dir(&own)?;
        give_to_server_user(&own)?;
        let name = format!(".s.PGSQL.{}", self.port);
        std::os::unix::fs::symlink(own.join(&name), self.socket_dir().join(name))
    }

    fn stop(&mut self, signal: Signal) {
        let Some(mut child) = self.child.take() else {
            return;
        };
        let Ok(pid) = i32::try_from(child.id()).map(Pid::from_raw) else {
            return;
        };
        let group = signal == Signal::SIGKILL;
        // Errors mean that the process has gone already, which is what is wanted.
        let _ = if group {
            killpg(pid, signal)
        } else {
            kill(pid, signal)
        };
        let deadline = Instant::now() + STOP_LIMIT;
        while matches!(child.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                let _ = killpg(pid, Signal::SIGKILL);
                let _ = child.wait();
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for PgServer {
    fn drop(&mut self) {
        // Immediate shutdown: nothing of it is needed any more.
        self.stop(Signal::SIGQUIT);
    }
}

/// Directory of PostgreSQL's server binaries: `PG_BINDIR`, else the one on `PATH`, else the
/// highest version of Debian's layout.
///
/// # Errors
///
/// None was found.
pub fn bin_dir() -> Result<PathBuf> {
    let named = std::env::var_os("PG_BINDIR").map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let debian = (12..=19)
        .rev()
        .map(|v| PathBuf::from(format!("/usr/lib/postgresql/{v}/bin")));
    named
        .into_iter()
        .chain(std::env::split_paths(&path))
        .chain(debian)
        .find(|dir| dir.join("initdb").is_file() && dir.join("postgres").is_file())
        .ok_or_else(|| {
            Error::other("no PostgreSQL server binaries found: set PG_BINDIR or install postgresql")
        })
}

/// A temporary directory that the server's user owns and may reach.
///
/// # Errors
///
/// Whatever the file system says.
pub fn server_dir(prefix: &str) -> Result<tempfile::TempDir> {
    let dir = tempfile::Builder::new().prefix(prefix).tempdir()?;
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755))?;
    give_to_server_user(dir.path())?;
    Ok(dir)
}

/// Makes a command run as the user that servers run as: `postgres` for root, else nobody else.
#[must_use]
pub fn as_server_user(mut command: Command) -> Command {
    if let Some(user) = server_user() {
        command
            .uid(user.uid.as_raw())
            .gid(user.gid.as_raw())
            .current_dir("/");
    }
    command
}

/// `kill -9` of a postmaster and all its children at once, as a crash of the machine would.
///
/// # Errors
///
/// `/proc` cannot be read.
pub fn kill_all(postmaster: i32) -> Result<()> {
    // It must not start another while the ones it has are looked up.
    let _ = kill(Pid::from_raw(postmaster), Signal::SIGSTOP);
    let deadline = Instant::now() + STOP_LIMIT;
    while state_of(postmaster).is_some_and(|s| s != 'T' && s != 'Z') && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
    let mut victims = vec![postmaster];
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else {
            continue;
        };
        // Behind the name in parentheses: state, parent.
        let parent = stat
            .rsplit(") ")
            .next()
            .and_then(|rest| rest.split(' ').nth(1));
        let pid = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        if let (Some(parent), Some(pid)) = (parent, pid)
            && parent == postmaster.to_string()
        {
            victims.push(pid);
        }
    }
    for pid in &victims {
        // One that has gone already is what is wanted.
        let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
    }
    // A server that is started while one of them still dies finds its memory in use.
    let running = |pid: &i32| state_of(*pid).is_some_and(|state| state != 'Z');
    while victims.iter().any(running) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// State of a process as `/proc` has it (`T` is stopped, `Z` a zombie); `None` when it has gone.
fn state_of(pid: i32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(") ").next()?.chars().next()
}

/// The user that servers run as, when that is not the current one.
fn server_user() -> Option<User> {
    if geteuid().is_root() {
        User::from_name("postgres").ok().flatten()
    } else {
        None
    }
}

fn give_to_server_user(path: &Path) -> Result<()> {
    match server_user() {
        Some(user) => chown(path, Some(user.uid), Some(user.gid)).map_err(Error::from),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn starts_answers_crashes_and_comes_back() {
        let options = PgOptions::default()
            .config("work_mem = '7MB'")
            .password("it's \\ secret");
        let mut server = PgServer::start(options).await.unwrap();
        let client = server.connect().await.unwrap();
        let row = client.query_one("show work_mem", &[]).await.unwrap();
        assert_eq!(row.get::<_, &str>(0), "7MB");
        server.crash();
        assert!(client.simple_query("select 1").await.is_err());
        server.boot().await.unwrap();
        server
            .connect()
            .await
            .unwrap()
            .simple_query("select 1")
            .await
            .unwrap();
        let pid = server.pid().unwrap();
        drop(server);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }
}
