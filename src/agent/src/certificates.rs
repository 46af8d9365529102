//! PostgreSQL's own certificate files, which somebody else replaces: the server reads them when it
//! starts and when it is told to reload.
//!
//! Reads the files, and signals the postmaster. Invariant: the server is told only of files that fit
//! together; with others it goes on with what it has. Sessions that run are not touched: PostgreSQL
//! uses new files for new connections.

use helios_control::{FileSet, LOOK_EVERY, Live, Material, TlsError, TlsFiles};
use tokio::time::Instant;

use crate::AgentConfig;
use crate::instance::Instance;
use crate::postmaster::Postmaster;

/// The files, and when they were last looked at.
#[derive(Debug)]
pub(crate) struct Certificates {
    files: Option<(TlsFiles, FileSet)>,
    looked: Option<Instant>,
}

impl Certificates {
    /// Those of a configuration. As long as nobody has said what the server has, what they hold is
    /// new: one that was left running by an earlier agent may have older ones.
    pub(crate) fn of(config: &AgentConfig) -> Self {
        let files = config.tls.as_ref().map(|tls| {
            let files = TlsFiles {
                // Without an authority there is nothing more to look at.
                ca: tls.client_ca.clone().unwrap_or(tls.certificate.clone()),
                certificate: tls.certificate.clone(),
                key: tls.key.clone(),
            };
            let set = FileSet::new(files.paths());
            (files, set)
        });
        Self {
            files,
            looked: None,
        }
    }

    /// A server is about to start with what they hold.
    pub(crate) fn start(&mut self) {
        if let Some((_, set)) = &mut self.files {
            // What is wrong with them is the server's to say.
            let _ = set.read();
        }
    }

    /// Whether there is something new that can be used.
    fn changed(&mut self) -> bool {
        let due = self.looked.is_none_or(|at| at.elapsed() >= LOOK_EVERY);
        let Some((files, set)) = self.files.as_mut().filter(|_| due) else {
            return false;
        };
        self.looked = Some(Instant::now());
        set.look(|new| usable(files, new))
    }
}

fn usable(files: &TlsFiles, contents: &[Vec<u8>]) -> Result<(), TlsError> {
    Live::new(&Material::of_files(files, contents)?).map(drop)
}

impl Instance {
    /// Has PostgreSQL read its certificate files again when they hold something new.
    pub(crate) fn renew_certificates(&mut self) {
        // One that does not run reads them when it starts.
        if self.running().is_err() || !self.certificates.changed() {
            return;
        }
        let told = self.running().and_then(Postmaster::reload);
        match told {
            Ok(()) => tracing::info!("PostgreSQL reads its certificates again"),
            Err(error) => {
                tracing::warn!(%error, "PostgreSQL could not be told of new certificates")
            }
        }
    }
}
