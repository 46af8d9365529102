//! Processes of a cluster's servers, by what `/proc` says of them, and signals to them.
//!
//! Signals go to nothing but a process named `postgres`, its descendants, and agents that were
//! found by the path of their configuration.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::Result;

/// A postmaster and all its processes, the postmaster first.
///
/// # Errors
/// `postmaster` is no running `postgres`.
pub fn tree(postmaster: i32) -> Result<Vec<i32>> {
    if postmaster <= 1 || !is_postgres(postmaster) {
        return Err(format!("process {postmaster} is not a postmaster").into());
    }
    let parents = parents();
    let mut found = vec![postmaster];
    let mut next = 0;
    while let Some(&above) = found.get(next) {
        found.extend(parents.iter().filter(|(_, p)| **p == above).map(|(c, _)| c));
        next += 1;
    }
    Ok(found)
}

/// `kill -9` of a whole server at once. It stands still meanwhile: a child that it forks would
/// escape, and children would notice their postmaster's end and have last words.
///
/// # Errors
/// As [`tree`].
pub fn kill_server(postmaster: i32) -> Result<usize> {
    tree(postmaster)?;
    signal_all(&[postmaster], Signal::SIGSTOP);
    let all = tree(postmaster)?;
    signal_all(&all, Signal::SIGSTOP);
    Ok(signal_all(&all, Signal::SIGKILL))
}

/// Signals those that still are `postgres`; returns how many.
pub fn signal_all(pids: &[i32], signal: Signal) -> usize {
    let alive = pids.iter().filter(|pid| is_postgres(**pid));
    // An error means that it has gone, which for every use here is as good.
    alive
        .filter(|pid| kill(Pid::from_raw(**pid), signal).is_ok())
        .count()
}

/// Those of the server's processes whose title holds `part` (`postgres: walreceiver`, ...).
///
/// # Errors
/// As [`tree`].
pub fn titled(postmaster: i32, part: &str) -> Result<Vec<i32>> {
    let mut found = tree(postmaster)?;
    found.retain(|pid| command_line(*pid).contains(part));
    found.sort_unstable();
    Ok(found)
}

/// The process that runs an agent with this configuration.
#[must_use]
pub fn agent(config: &Path) -> Option<i32> {
    let path = config.display().to_string();
    let is_agent = |pid: &i32| {
        let line = command_line(*pid);
        line.contains(" agent ") && line.contains(&path)
    };
    parents().into_keys().find(is_agent)
}

/// Kills one process that was found here.
pub fn kill_one(pid: i32) {
    // Gone already is as good.
    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
}

/// Whether it is a running `postgres`; a zombie's command line is empty.
#[must_use]
pub fn is_postgres(pid: i32) -> bool {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    name.trim() == "postgres" && !command_line(pid).is_empty()
}

fn command_line(pid: i32) -> String {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&bytes).replace('\0', " ")
}

/// Parent of every process.
fn parents() -> HashMap<i32, i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let parent = |entry: fs::DirEntry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let behind_name = stat.rsplit_once(')')?.1;
        Some((pid, behind_name.split_whitespace().nth(1)?.parse().ok()?))
    };
    entries.filter_map(parent).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_postmaster_is_one() {
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(tree(own).is_err() && tree(1).is_err());
        assert_eq!(signal_all(&[own, 1], Signal::SIGKILL), 0);
        assert!(command_line(own).len() > 1);
    }
}
