//! Where things live under a data directory.
//!
//! Unix socket paths are limited to 107 bytes, so sockets move to a short runtime folder (named
//! after a hash of the directory) when the data directory's own path is long.

use std::path::{Path, PathBuf};

use helios_api::InstanceName;

/// Longest folder that still leaves room for `/<name>/.s.PGSQL.<port>` or `/<name>.sock`.
const MAX_SOCKET_FOLDER: usize = 60;

/// Paths of one local cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    root: PathBuf,
    sockets: PathBuf,
}

impl Layout {
    /// The layout of `data_dir`.
    #[must_use]
    pub fn new(data_dir: &Path) -> Self {
        let inside = data_dir.join("sockets");
        let sockets = if inside.as_os_str().len() <= MAX_SOCKET_FOLDER {
            inside
        } else {
            PathBuf::from(format!("/tmp/helios-{:016x}", fnv(data_dir)))
        };
        Self {
            root: data_dir.to_owned(),
            sockets,
        }
    }

    /// The data directory itself.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Locked by the supervisor while it runs; holds its process id.
    #[must_use]
    pub fn lock_file(&self) -> PathBuf {
        self.root.join("helios.pid")
    }

    /// The durable cluster state.
    #[must_use]
    pub fn state_file(&self) -> PathBuf {
        self.root.join("cluster.json")
    }

    /// The generated proxy configuration.
    #[must_use]
    pub fn proxy_config(&self) -> PathBuf {
        self.root.join("helios_proxy.toml")
    }

    /// Logs of agents; those of servers are in the instances' folders.
    #[must_use]
    pub fn logs(&self) -> PathBuf {
        self.root.join("logs")
    }

    /// Folder of all sockets; see the module's head.
    #[must_use]
    pub fn sockets(&self) -> &Path {
        &self.sockets
    }

    /// The supervisor's control socket.
    #[must_use]
    pub fn control_socket(&self) -> PathBuf {
        self.sockets.join("control.sock")
    }

    /// Folder of one instance.
    #[must_use]
    pub fn instance(&self, name: &InstanceName) -> PathBuf {
        self.root.join("instances").join(name.as_str())
    }

    /// Its data directory.
    #[must_use]
    pub fn instance_data(&self, name: &InstanceName) -> PathBuf {
        self.instance(name).join("data")
    }

    /// Folder of its server's Unix socket, owned by the server's user.
    #[must_use]
    pub fn instance_sockets(&self, name: &InstanceName) -> PathBuf {
        self.sockets.join(name.as_str())
    }

    /// Its agent's control socket.
    #[must_use]
    pub fn agent_socket(&self, name: &InstanceName) -> PathBuf {
        self.sockets.join(format!("{name}.sock"))
    }

    /// Its server's log.
    #[must_use]
    pub fn postgres_log(&self, name: &InstanceName) -> PathBuf {
        self.instance(name).join("postgres.log")
    }

    /// Its agent's log.
    #[must_use]
    pub fn agent_log(&self, name: &InstanceName) -> PathBuf {
        self.logs().join(format!("{name}.agent.log"))
    }
}

/// FNV-1a: the same in every version of this program, unlike the standard library's hasher.
fn fnv(path: &Path) -> u64 {
    use std::os::unix::ffi::OsStrExt as _;
    path.as_os_str()
        .as_bytes()
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_stay_within_the_kernel_limit() {
        let long = PathBuf::from(format!("/{}", "x".repeat(200)));
        for root in [Path::new("/var/lib/helios"), &long] {
            let layout = Layout::new(root);
            let name: InstanceName = "x".repeat(20).parse().unwrap();
            let socket = layout.instance_sockets(&name).join(".s.PGSQL.65535");
            assert!(socket.as_os_str().len() < 100, "{socket:?}");
            assert!(layout.agent_socket(&name).as_os_str().len() < 100);
        }
    }
}
