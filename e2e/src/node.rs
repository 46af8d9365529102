//! The node that Pods run on, from outside of them: what no `kubectl` does. Only where that node is
//! this machine, and for root: containers are found by the name of their control group.
//!
//! Invariant: what is cut or frozen is whole again when its value is dropped.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;

use crate::Result;
use crate::kube::Namespace;

/// Folder of the cluster that `e2e/kubernetes/cluster.sh` builds.
fn folder() -> String {
    std::env::var("HELIOS_KUBERNETES_DIR").unwrap_or("/var/lib/helios-kubernetes".to_owned())
}

/// By when the kubelet has told the API server of a container that it has started.
const TOLD: Duration = Duration::from_secs(60);

/// A running container.
#[derive(Debug, Clone)]
pub struct Container {
    id: String,
}

impl Container {
    /// The container of a Pod as it runs now. The API server may still tell of the one before it, so
    /// it is asked until it tells of one that has processes.
    pub async fn of(space: &Namespace, pod: &str, name: &str) -> Result<Self> {
        let deadline = Instant::now() + TOLD;
        loop {
            let found = Self::told(&space.get("pod", pod).await?, name);
            match found {
                Some(container) if container.first().is_ok() => return Ok(container),
                _ if Instant::now() > deadline => {
                    return Err(format!("container {name} of {pod} does not run").into());
                }
                _ => tokio::time::sleep(Duration::from_millis(200)).await,
            }
        }
    }

    fn told(pod: &Value, name: &str) -> Option<Self> {
        let all = pod["status"]["containerStatuses"].as_array()?;
        let ours = all.iter().find(|c| c["name"] == name)?;
        let id = ours["containerID"]
            .as_str()?
            .strip_prefix("containerd://")?;
        Some(Self { id: id.to_owned() })
    }

    /// Its processes, by their numbers on the node.
    fn processes(&self) -> BTreeSet<u32> {
        let Ok(all) = std::fs::read_dir("/proc") else {
            return BTreeSet::new();
        };
        all.flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter(|pid| {
                std::fs::read_to_string(format!("/proc/{pid}/cgroup"))
                    .is_ok_and(|text| text.contains(&self.id))
            })
            .collect()
    }

    /// The first of them, with which all others end.
    fn first(&self) -> Result<u32> {
        let is_first = |pid: &u32| {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status"));
            status.is_ok_and(|text| {
                let numbers = text.lines().find_map(|line| line.strip_prefix("NSpid:"));
                numbers.is_some_and(|n| n.split_whitespace().last() == Some("1"))
            })
        };
        let found = self.processes().into_iter().find(is_first);
        found.ok_or_else(|| "container has no first process".into())
    }

    /// Kills it, as the kernel does when memory runs out.
    pub fn kill(&self) -> Result<()> {
        signal("KILL", [self.first()?])
    }

    /// Kills its postmaster alone.
    pub fn kill_postmaster(&self) -> Result<()> {
        let parent = |pid: u32| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
        };
        let postgres = |pid: &u32| {
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm"));
            name.is_ok_and(|name| name.trim_end() == "postgres")
        };
        let all: BTreeSet<u32> = self.processes().into_iter().filter(postgres).collect();
        let is_root = |pid: &u32| parent(*pid).is_some_and(|p: u32| !all.contains(&p));
        let root = all.iter().copied().find(is_root);
        signal("KILL", root)
    }

    /// Stops all its processes where they are.
    pub fn freeze(&self) -> Result<Frozen> {
        let mut known = BTreeSet::new();
        loop {
            let new: BTreeSet<u32> = self.processes().difference(&known).copied().collect();
            if new.is_empty() {
                return Ok(Frozen(known));
            }
            signal("STOP", new.iter().copied())?;
            known.extend(new);
        }
    }

    /// Drops whatever goes between the container's Pod and these addresses; with none, everybody
    /// else.
    pub fn cut(&self, from: &[&str]) -> Result<Cut> {
        let pid = self.first()?;
        let mut rules = Vec::new();
        if from.is_empty() {
            rules.push(vec!["INPUT", "!", "-i", "lo"]);
            rules.push(vec!["OUTPUT", "!", "-o", "lo"]);
        }
        for address in from {
            rules.push(vec!["INPUT", "-s", address]);
            rules.push(vec!["OUTPUT", "-d", address]);
        }
        let namespace = std::fs::File::open(format!("/proc/{pid}/ns/net"))?;
        let mut cut = Cut {
            namespace,
            rules: Vec::new(),
        };
        for rule in rules {
            let rule: Vec<String> = rule.into_iter().map(str::to_owned).collect();
            cut.iptables("-I", &rule)?;
            cut.rules.push(rule);
        }
        Ok(cut)
    }
}

/// Processes that stand still.
#[derive(Debug)]
pub struct Frozen(BTreeSet<u32>);

impl Drop for Frozen {
    fn drop(&mut self) {
        // Some may have been killed meanwhile.
        for pid in &self.0 {
            let _ = signal("CONT", [*pid]);
        }
    }
}

/// Rules in a Pod's network namespace, which is kept by this.
#[derive(Debug)]
pub struct Cut {
    namespace: std::fs::File,
    rules: Vec<Vec<String>>,
}

impl Cut {
    fn iptables(&self, how: &str, rule: &[String]) -> Result<()> {
        use std::os::fd::AsRawFd as _;
        let own = std::process::id();
        let namespace = format!("--net=/proc/{own}/fd/{}", self.namespace.as_raw_fd());
        run(Command::new("nsenter")
            .args([&namespace, "iptables", "-w", how])
            .args(rule)
            .args(["-j", "DROP"]))
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        for rule in &self.rules {
            // What follows waits for the Pod, and tells.
            let _ = self.iptables("-D", rule);
        }
    }
}

/// Stops the API server's process where it is: connections to it stay open and nothing answers.
pub fn freeze_api_server() -> Result<Frozen> {
    let file = Path::new(&folder()).join("run/kube-apiserver.pid");
    let pid: u32 = std::fs::read_to_string(&file)?.trim().parse()?;
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm"))?;
    if !name.starts_with("kube-apiserver") {
        return Err(format!("process {pid} is \"{}\"", name.trim()).into());
    }
    signal("STOP", [pid])?;
    Ok(Frozen([pid].into()))
}

/// Gives volumes whose claim has gone to whoever claims one next, emptied: nobody provisions new
/// ones.
pub async fn recycle_volumes() -> Result<()> {
    let text = crate::kube::run(&["get", "pv", "-o", "json"], None).await?;
    let all: Value = serde_json::from_str(&text)?;
    for volume in all["items"].as_array().into_iter().flatten() {
        let path = volume["spec"]["hostPath"]["path"].as_str();
        let name = volume["metadata"]["name"].as_str();
        let (Some(path), Some(name)) = (path, name) else {
            continue;
        };
        if volume["status"]["phase"] != "Released" || !path.starts_with(&folder()) {
            continue;
        }
        for entry in std::fs::read_dir(path)?.flatten() {
            // A file is none of these tests'.
            std::fs::remove_dir_all(entry.path())?;
        }
        let free = r#"{"spec": {"claimRef": null}}"#;
        crate::kube::run(&["patch", "pv", name, "--type=merge", "-p", free], None).await?;
    }
    Ok(())
}

fn signal(name: &str, to: impl IntoIterator<Item = u32>) -> Result<()> {
    let pids: Vec<String> = to.into_iter().map(|pid| pid.to_string()).collect();
    if pids.is_empty() {
        return Err(format!("nobody to send SIG{name} to").into());
    }
    run(Command::new("kill").args(["-s", name]).args(pids))
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output()?;
    if output.status.success() {
        return Ok(());
    }
    let error = String::from_utf8_lossy(&output.stderr);
    Err(format!("{command:?}: {}", error.trim()).into())
}
