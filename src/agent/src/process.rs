//! The processes of one instance: found by their working directory, which PostgreSQL makes the
//! data directory in every process, so that orphans and strangers are told apart from our own.
//!
//! Invariant: after [`kill_all`] has returned, no process of the instance runs.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use helios_api::agent::AgentError;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getsid};
use tokio::time::Instant;

use crate::error::{failed, file_failed};
use crate::files::remove_if_exists;

/// How long killed processes may take to vanish (one in uninterruptible sleep stays).
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// Searches for processes that nobody forks any more.
const MAX_SEARCHES: usize = 100;

/// How often to look whether a process has stopped, a tenth of a millisecond apart.
const MAX_LOOKS: usize = 50;

/// Priority of processes that end: the lowest.
const LOWEST: i32 = 19;

/// Processes that end side by side where many are to end and nobody waits for that.
const IN_TURN: usize = 8;

/// All live PostgreSQL processes of a data directory.
pub(crate) fn of_instance(data_dir: &Path) -> Vec<Pid> {
    of_instance_but(data_dir, &HashSet::new())
}

/// The same without those that are known already: looking at each takes some microseconds, and
/// there may be thousands.
fn of_instance_but(data_dir: &Path, known: &HashSet<Pid>) -> Vec<Pid> {
    let Ok(data_dir) = data_dir.canonicalize() else {
        return Vec::new();
    };
    let Ok(processes) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    processes
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .map(Pid::from_raw)
        .filter(|pid| !known.contains(pid) && belongs(*pid, &data_dir))
        .collect()
}

/// The postmaster that `postmaster.pid` names, if it runs on this data directory.
pub(crate) fn postmaster(data_dir: &Path) -> Option<(Pid, PostmasterFile)> {
    let file = PostmasterFile::read(data_dir)?;
    let pid = Pid::from_raw(file.pid);
    is_of_instance(pid, data_dir).then_some((pid, file))
}

/// Whether a process runs (a zombie does not) and belongs to the data directory.
pub(crate) fn is_of_instance(pid: Pid, data_dir: &Path) -> bool {
    data_dir
        .canonicalize()
        .is_ok_and(|data_dir| belongs(pid, &data_dir))
}

fn belongs(pid: Pid, data_dir: &Path) -> bool {
    // The link of a zombie cannot be read. The name can be as long as the link can: that of the
    // executable is gone earlier, while a killed process is still on its way out.
    std::fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == data_dir)
        && std::fs::read_to_string(format!("/proc/{pid}/comm"))
            .is_ok_and(|name| name.trim_end() == "postgres")
}

/// What a running postmaster wrote into `postmaster.pid`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PostmasterFile {
    pid: i32,
    pub(crate) port: u16,
    pub(crate) socket_dir: PathBuf,
}

impl PostmasterFile {
    fn read(data_dir: &Path) -> Option<Self> {
        let text = std::fs::read_to_string(data_dir.join("postmaster.pid")).ok()?;
        let line = |n: usize| text.lines().nth(n).unwrap_or_default();
        Some(Self {
            pid: line(0).parse().ok().filter(|pid| *pid > 1)?,
            port: line(3).parse().unwrap_or_default(),
            socket_dir: line(4).into(),
        })
    }
}

/// Removes the lock files of a postmaster of this instance that has died; only for whoever has
/// proven that none runs. PostgreSQL itself goes by the process id, and takes a zombie or a
/// stranger with the same number for a server.
pub(crate) fn remove_stale_locks(data_dir: &Path, socket: &Path) -> Result<(), AgentError> {
    let pid_file = data_dir.join("postmaster.pid");
    remove_if_exists(&pid_file).map_err(file_failed("could not remove", &pid_file))?;
    let lock = PathBuf::from(format!("{}.lock", socket.display()));
    let ours = std::fs::read_to_string(&lock).is_ok_and(|text| {
        text.lines()
            .nth(1)
            .is_some_and(|dir| Path::new(dir) == data_dir)
    });
    if ours {
        remove_if_exists(&lock).map_err(file_failed("could not remove", &lock))?;
    }
    Ok(())
}

/// Sends a signal; a process that has gone already is no error.
pub(crate) fn signal(pid: Pid, signal: Signal) -> Result<(), AgentError> {
    match kill(pid, signal) {
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(error) => Err(failed(format_args!(
            "could not send {signal} to process {pid}: {error}"
        ))),
    }
}

/// Sends SIGKILL or SIGSTOP (`how`) to whatever of the instance runs, and returns when a search
/// finds nobody that has not been sent it. None of them gets back from the kernel then: what it was
/// writing may still be written, but it answers nobody. The postmaster is stopped first, and killed
/// last: it forks nobody meanwhile, and its children do not all notice its death at the time of the
/// search.
///
/// The kernel itself wakes up nobody who stands still: it sends SIGCONT to process groups that
/// become orphans by the death of a parent in their own session (`kill_orphaned_pgrp` in the
/// kernel's `kernel/exit.c`), and PostgreSQL's processes have a session each.
pub(crate) fn stop_at_once(
    postmaster: Option<Pid>,
    data_dir: &Path,
    how: Signal,
) -> Result<(), AgentError> {
    let mut sent = HashSet::new();
    let mut alone = false;
    if let Some(pid) = postmaster {
        signal(pid, Signal::SIGSTOP)?;
        alone = stands_still(pid);
    }
    for _ in 0..MAX_SEARCHES {
        let mut found = of_instance_but(data_dir, &sent);
        if found.is_empty() {
            return Ok(());
        }
        // Behind its children: nobody is left to notice.
        found.sort_by_key(|pid| Some(*pid) == postmaster);
        for pid in found {
            // It shares its session with whoever started it, and the others come first.
            let is_postmaster = Some(pid) == postmaster;
            if !is_postmaster && how == Signal::SIGKILL {
                give_way(pid);
            }
            signal(pid, if is_postmaster { Signal::SIGKILL } else { how })?;
            sent.insert(pid);
        }
        // Who could fork stood still before the search began.
        if alone && postmaster.is_some_and(|pid| sent.contains(&pid)) {
            return Ok(());
        }
    }
    Err(failed("processes of the instance go on multiplying"))
}

/// Whether a process that was sent SIGSTOP has stopped; it does at its next return to user mode.
fn stands_still(pid: Pid) -> bool {
    let stopped = || {
        // The state follows the name in parentheses (`proc_pid_stat(5)`).
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        Some(stat.rsplit_once(") ")?.1.starts_with('T'))
    };
    (0..MAX_LOOKS).any(|_| {
        stopped().unwrap_or_default() || {
            std::thread::sleep(Duration::from_micros(100));
            false
        }
    })
}

/// The end of a process costs processor time, and hundreds of them end at once: those that take over
/// come first. Without the right to it they end as they would have.
///
/// Where each session has its share of the processors (`sched_autogroup`), the share of a whole
/// session is changed: only of one that is the process's own, as PostgreSQL makes one for each child
/// of the postmaster (`InitPostmasterChild` in `src/backend/utils/init/miscinit.c`).
fn give_way(pid: Pid) {
    if getsid(Some(pid)) == Ok(pid) {
        let _ = std::fs::write(format!("/proc/{pid}/autogroup"), LOWEST.to_string());
    }
    if let Some(pid) = rustix::process::Pid::from_raw(pid.as_raw()) {
        let _ = rustix::process::setpriority_process(Some(pid), LOWEST);
    }
}

/// Puts what is left of the instance behind everybody else, to end when nobody waits for it.
pub(crate) fn let_pass(data_dir: &Path) {
    for pid in of_instance(data_dir) {
        give_way(pid);
    }
}

/// Kills what is left of the instance, a few at a time, behind the end of those before, for as long as
/// `patience`; whether it got to the end. However low the priority of each, a thousand that end at
/// once have a thousand times its share of the processors, and the end of each takes about a
/// millisecond.
pub(crate) async fn kill_in_turn(data_dir: &Path, patience: Duration) -> Result<bool, AgentError> {
    let Ok(home) = data_dir.canonicalize() else {
        return Ok(true);
    };
    let deadline = Instant::now() + patience;
    for few in of_instance(data_dir).chunks(IN_TURN) {
        for pid in few {
            signal(*pid, Signal::SIGKILL)?;
        }
        while few.iter().any(|pid| belongs(*pid, &home)) {
            if Instant::now() > deadline {
                return Ok(false);
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    Ok(true)
}

/// Kills whatever of the instance still runs and waits until it is gone. Says how many there were.
pub(crate) async fn kill_all(data_dir: &Path) -> Result<usize, AgentError> {
    let deadline = Instant::now() + KILL_LIMIT;
    let mut killed = 0;
    loop {
        // Again until none is found: one may have been forked during the search.
        let left = of_instance(data_dir);
        if left.is_empty() {
            return Ok(killed);
        }
        killed = killed.max(left.len());
        for pid in &left {
            signal(*pid, Signal::SIGKILL)?;
        }
        if Instant::now() > deadline {
            return Err(failed(format_args!(
                "{} processes of the instance do not die, the first is {}",
                left.len(),
                left[0]
            )));
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel says of a session's share, `None` where it has none.
    fn share(pid: Pid) -> Option<String> {
        std::fs::read_to_string(format!("/proc/{pid}/autogroup")).ok()
    }

    fn priority(pid: Pid) -> i32 {
        rustix::process::getpriority_process(rustix::process::Pid::from_raw(pid.as_raw())).unwrap()
    }

    /// A postmaster's children have a session each; the postmaster has its starter's, and ours.
    #[test]
    fn whoever_ends_gives_way_and_its_session_does_not() {
        // As an earlier version may have left it.
        let _ = std::fs::write("/proc/self/autogroup", "0");
        let before = (share(Pid::this()), priority(Pid::this()));
        let sleep = |program: &str, arguments: &[&str]| {
            std::process::Command::new(program)
                .args(arguments)
                .spawn()
                .unwrap()
        };
        let ours = sleep("sleep", &["60"]);
        let alone = sleep("setsid", &["sleep", "60"]);
        let pid = |child: &std::process::Child| Pid::from_raw(child.id().try_into().unwrap());
        while getsid(Some(pid(&alone))) != Ok(pid(&alone)) {
            std::thread::sleep(Duration::from_millis(1));
        }
        for child in [&ours, &alone] {
            give_way(pid(child));
            assert_eq!(priority(pid(child)), LOWEST);
        }
        assert_eq!((share(Pid::this()), priority(Pid::this())), before);
        // Others than root may change a share once in a tenth of a second (`sched(7)` does not say
        // so; `proc_sched_autogroup_set_nice` in the kernel's `kernel/sched/autogroup.c`).
        let root = nix::unistd::geteuid().is_root();
        if let Some(share) = share(pid(&alone)).filter(|_| root) {
            assert!(share.trim_end().ends_with("nice 19"), "{share}");
        }
        for mut child in [ours, alone] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Of more than end side by side, none is left.
    #[tokio::test]
    async fn all_are_killed_in_turn() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("postgres");
        std::fs::copy("/bin/sleep", &program).unwrap();
        let start = || {
            let mut sleep = std::process::Command::new(&program);
            sleep.arg("60").current_dir(dir.path()).spawn().unwrap()
        };
        let mut children: Vec<_> = (0..2 * IN_TURN + 1).map(|_| start()).collect();
        let patience = Duration::from_secs(60);
        while of_instance(dir.path()).len() < children.len() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert!(kill_in_turn(dir.path(), patience).await.unwrap());
        assert_eq!(of_instance(dir.path()), []);
        for child in &mut children {
            assert!(!child.wait().unwrap().success());
        }
        assert!(kill_in_turn(dir.path(), patience).await.unwrap());
    }
}
