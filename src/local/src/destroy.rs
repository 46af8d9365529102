//! Removal of a data directory, with whatever a killed supervisor left running in it.

use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::error::LocalError;
use crate::layout::Layout;
use crate::lock::Lock;
use crate::report::postmaster_pid;
use crate::setup;

/// How long left-over servers may take to end.
const LIMIT: Duration = Duration::from_secs(10);

/// Removes a data directory and everything in it; refused while the cluster runs.
///
/// # Errors
/// [`LocalError::InUse`], [`LocalError::NotACluster`] and [`LocalError::Io`].
pub async fn destroy(data_dir: &Path) -> Result<(), LocalError> {
    let dir = data_dir.to_owned();
    match tokio::task::spawn_blocking(move || remove(&dir)).await {
        Ok(result) => result,
        Err(error) => Err(LocalError::Control(error.to_string())),
    }
}

fn remove(data_dir: &Path) -> Result<(), LocalError> {
    let layout = Layout::new(data_dir);
    if !data_dir.exists() {
        return Err(LocalError::NotACluster {
            path: data_dir.to_owned(),
            why: "it does not exist".to_owned(),
        });
    }
    setup::recognise(&layout)?;
    let lock = Lock::take(&layout.lock_file(), data_dir)?;
    let instances = std::fs::read_dir(data_dir.join("instances"))
        .into_iter()
        .flatten();
    for instance in instances.flatten() {
        end_server(&instance.path().join("data"))?;
    }
    if !layout.sockets().starts_with(data_dir) {
        ignore_missing(std::fs::remove_dir_all(layout.sockets()), layout.sockets())?;
    }
    ignore_missing(std::fs::remove_dir_all(data_dir), data_dir)?;
    drop(lock);
    Ok(())
}

fn ignore_missing(result: std::io::Result<()>, path: &Path) -> Result<(), LocalError> {
    match result {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(LocalError::io("remove", path, e))
        }
        _ => Ok(()),
    }
}

/// Ends a server that was left running. Only a process that lives in the directory is taken for
/// one: process ids are used again.
fn end_server(data: &Path) -> Result<(), LocalError> {
    let Some(pid) = postmaster_pid(data) else {
        return Ok(());
    };
    let lives = || std::fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == data);
    let deadline = Instant::now() + LIMIT;
    let mut signal = Signal::SIGQUIT;
    while lives() {
        // Gone in between is as good.
        let _ = kill(Pid::from_raw(pid), signal);
        if Instant::now() > deadline {
            return Err(LocalError::InUse {
                path: data.to_owned(),
                pid: Some(pid),
            });
        }
        std::thread::sleep(Duration::from_millis(20));
        if Instant::now() > deadline - LIMIT / 2 {
            signal = Signal::SIGKILL;
        }
    }
    Ok(())
}
