//! A supervisor and its agents as processes, which can be killed.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use helios_local::LocalStatus;
use helios_local::client::LocalClient;
use nix::unistd::Pid;
use tokio_postgres::Client;

use super::LIMIT;

/// Cargo builds examples beside the tests, unless it was told to build one test alone.
pub fn example(name: &str) -> PathBuf {
    let mut path = std::env::current_exe().unwrap();
    path.pop();
    path.pop();
    let path = path.join("examples").join(name);
    assert!(
        path.exists(),
        "run \"cargo build -p helios-local --examples\" first"
    );
    path
}

pub struct Supervised {
    pub child: Child,
    pub address: String,
}

impl Supervised {
    pub fn start(dir: &Path) -> Self {
        let mut child = Command::new(example("supervised"))
            .arg("run")
            .arg(dir)
            .arg("fsync=off")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut address = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut address)
            .unwrap();
        assert!(
            address.contains("host="),
            "it did not start: {:?}",
            child.wait()
        );
        Self { child, address }
    }

    pub async fn connect(&self) -> Client {
        super::connect_to(&self.address).await.unwrap()
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().try_into().unwrap())
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Supervised {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub async fn until(
    client: &LocalClient,
    what: &str,
    done: impl Fn(&LocalStatus) -> bool,
) -> LocalStatus {
    let deadline = Instant::now() + LIMIT;
    loop {
        let status = client.status().await.unwrap();
        if done(&status) {
            return status;
        }
        assert!(
            Instant::now() < deadline,
            "no {what} within {LIMIT:?}: {status:#?}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Finds an agent by its arguments.
pub fn agent_pid(dir: &Path, instance: &str) -> Pid {
    let config = dir.join("instances").join(instance).join("config.json");
    let config = config.to_str().unwrap().to_owned();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Ok(line) = std::fs::read(entry.path().join("cmdline")) else {
            continue;
        };
        let mut arguments = line.split(|b| *b == 0);
        if arguments.any(|argument| argument == config.as_bytes()) {
            let pid = entry.file_name().to_str().unwrap().parse().unwrap();
            return Pid::from_raw(pid);
        }
    }
    panic!("no agent of {instance}");
}

/// Postmasters that run on a data directory: processes there whose parent is not one of them.
pub fn postmasters(dir: &Path, instance: &str) -> Vec<Pid> {
    let data = dir.join("instances").join(instance).join("data");
    let data = data.canonicalize().unwrap();
    let lives = |pid: i32| {
        std::fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == data)
            && std::fs::read_to_string(format!("/proc/{pid}/comm"))
                .is_ok_and(|name| name.trim_end() == "postgres")
    };
    let parent = |pid: i32| -> i32 {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let fields = stat.rsplit(") ").next().unwrap_or_default().split(' ');
        fields
            .clone()
            .nth(1)
            .and_then(|p| p.parse().ok())
            .unwrap_or(0)
    };
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    all.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| lives(*pid) && !lives(parent(*pid)))
        .map(Pid::from_raw)
        .collect()
}
