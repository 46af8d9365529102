//! `kill -9` of a whole PostgreSQL server: the postmaster and every process under it.
//!
//! Reads `/proc` and sends signals to nothing but a process named `postgres` and its descendants.

use std::collections::HashMap;
use std::fs;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Kills the postmaster `pid` and all its descendants; returns how many processes got the signal.
///
/// # Errors
/// When `pid` is not a running `postgres`.
pub(crate) fn kill_server(pid: i32) -> Result<usize, String> {
    let name = fs::read_to_string(format!("/proc/{pid}/comm"))
        .map_err(|e| format!("could not find postmaster {pid}: {e}"))?;
    if pid <= 1 || name.trim() != "postgres" {
        return Err(format!(
            "process {pid} is \"{}\", not a postmaster",
            name.trim()
        ));
    }
    // Backends lead process groups of their own (the postmaster calls setsid for each), so the
    // tree is walked; the postmaster stands still meanwhile, or a child that it forks would escape.
    let postmaster = Pid::from_raw(pid);
    kill(postmaster, Signal::SIGSTOP).map_err(|e| format!("could not stop postmaster: {e}"))?;
    let mut victims = vec![pid];
    victims.extend(descendants(pid, &parents()));
    let mut killed = 0;
    for victim in victims {
        // An error means that it is gone already, which is what was wanted.
        if kill(Pid::from_raw(victim), Signal::SIGKILL).is_ok() {
            killed += 1;
        }
    }
    Ok(killed)
}

/// Parent of every process.
fn parents() -> HashMap<i32, i32> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return HashMap::new();
    };
    entries
        .filter_map(|entry| {
            let pid: i32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            Some((pid, parent(&stat)?))
        })
        .collect()
}

/// The parent in a line of `/proc/<pid>/stat`; the name before it may contain anything.
fn parent(stat: &str) -> Option<i32> {
    stat.rsplit_once(')')?
        .1
        .split_whitespace()
        .nth(1)?
        .parse()
        .ok()
}

fn descendants(root: i32, parents: &HashMap<i32, i32>) -> Vec<i32> {
    let mut found = vec![root];
    let mut next = 0;
    while let Some(&above) = found.get(next) {
        found.extend(
            parents
                .iter()
                .filter(|(_, p)| **p == above)
                .map(|(pid, _)| pid),
        );
        next += 1;
    }
    found.remove(0);
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_are_read_behind_the_name() {
        assert_eq!(parent("12 (a) b (c)) S 7 12 12 0"), Some(7));
        assert_eq!(parent("12 (postgres"), None);
    }

    #[test]
    fn descendants_are_found_at_every_depth() {
        let parents = HashMap::from([(2, 1), (3, 2), (4, 3), (5, 1), (6, 5), (7, 2)]);
        let mut found = descendants(2, &parents);
        found.sort_unstable();
        assert_eq!(found, [3, 4, 7]);
    }

    #[test]
    fn only_a_postmaster_is_killed() {
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(kill_server(own).is_err());
        assert!(kill_server(1).is_err());
    }
}
