//! Certificates that are replaced while they are used.
//!
//! May read the files that it is told of. Invariant: what is in use fits together; what does not is
//! refused, and what was in use before stays. A connection goes on with what it began with.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use rustls::{ClientConfig, ServerConfig};
use tokio_util::sync::CancellationToken;

use crate::files::FileSet;
use crate::{Material, TlsError, TlsFiles};

/// Certificates in use. Cheap to clone; what replaces them counts for all clones, from their next
/// connection on.
#[derive(Debug, Clone)]
pub struct Live(Arc<RwLock<Configs>>);

#[derive(Debug, Clone)]
struct Configs {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
}

impl Configs {
    fn new(material: &Material) -> Result<Self, TlsError> {
        Ok(Self {
            server: material.server()?,
            client: material.client()?,
        })
    }
}

impl Live {
    /// Begins with these.
    ///
    /// # Errors
    /// They do not fit together.
    pub fn new(material: &Material) -> Result<Self, TlsError> {
        let configs = Configs::new(material)?;
        Ok(Self(Arc::new(RwLock::new(configs))))
    }

    /// Reads files, and looks at them so often until cancelled.
    ///
    /// # Errors
    /// They cannot be read or do not fit together now. Later that is only warned about.
    pub fn follow(
        files: &TlsFiles,
        every: Duration,
        stop: CancellationToken,
    ) -> Result<Self, TlsError> {
        let mut set = FileSet::new(files.paths());
        let live = Self::new(&Material::of_files(files, &set.read()?)?)?;
        let (files, this) = (files.clone(), live.clone());
        tokio::spawn(async move {
            let looking = async {
                loop {
                    tokio::time::sleep(every).await;
                    set.look(|new| this.replace(&Material::of_files(&files, new)?));
                }
            };
            tokio::select! {
                () = looking => {}
                () = stop.cancelled() => {}
            }
        });
        Ok(live)
    }

    /// Uses these from now on.
    ///
    /// # Errors
    /// They do not fit together; nothing has changed then.
    pub fn replace(&self, material: &Material) -> Result<(), TlsError> {
        self.set(Configs::new(material)?);
        Ok(())
    }

    /// Uses what another one uses now.
    pub fn take_over(&self, other: &Self) {
        let configs = other.get();
        self.set(configs);
    }

    pub(crate) fn server(&self) -> Arc<ServerConfig> {
        self.get().server
    }

    pub(crate) fn client(&self) -> Arc<ClientConfig> {
        self.get().client
    }

    fn get(&self) -> Configs {
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn set(&self, configs: Configs) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = configs;
    }
}
