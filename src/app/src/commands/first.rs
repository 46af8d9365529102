//! The first process of a container: runs this program again as its only child, passes signals on,
//! reaps what is left to it, and ends as the child does.
//!
//! Invariant: when the agent ends, however it ends, this process does too, and the kernel then
//! kills whatever else is in the container. "The container has terminated" thus proves that no
//! process of the instance is left.

use std::process::Command;

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::failure::Failure;

/// Signals that the child gets in place of this process.
const PASSED_ON: [Signal; 4] = [
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGHUP,
];

/// Runs until the child has ended. Exits with its status itself.
pub(crate) fn run() -> Result<(), Failure> {
    let failed =
        |what: &str, e: &dyn std::fmt::Display| Failure::failed(format!("could not {what}: {e}"));
    let program = std::env::current_exe().map_err(|e| failed("find this program's file", &e))?;
    let mut signals = SigSet::empty();
    for signal in PASSED_ON.into_iter().chain([Signal::SIGCHLD]) {
        signals.add(signal);
    }
    let mut command = Command::new(program);
    command.args(std::env::args_os().skip(1));
    let child = command.spawn().map_err(|e| failed("run the agent", &e))?;
    // After the child was started, which would inherit it; what came before is seen by `reap`.
    signals
        .thread_block()
        .map_err(|e| failed("block signals", &e))?;
    let child = Pid::from_raw(i32::try_from(child.id()).map_err(|e| failed("run the agent", &e))?);
    loop {
        if let Some(code) = reap(child).map_err(|e| failed("wait for processes", &e))? {
            std::process::exit(code);
        }
        match signals.wait() {
            Ok(Signal::SIGCHLD) | Err(Errno::EINTR) => {}
            Ok(signal) => {
                let _ = kill(child, signal);
            }
            Err(e) => return Err(failed("wait for signals", &e)),
        }
    }
}

/// Reaps all that have ended; the child's exit status when it is among them.
fn reap(child: Pid) -> Result<Option<i32>, Errno> {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) if pid == child => return Ok(Some(code)),
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == child => {
                return Ok(Some(128 + signal as i32));
            }
            Ok(WaitStatus::StillAlive) => return Ok(None),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error),
        }
    }
}
