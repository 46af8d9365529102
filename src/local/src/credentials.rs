//! Names and passwords of a local cluster, `credentials.json` in its data directory, mode 0600.
//!
//! Written once, before the first `initdb`, and never changed by a start: what is on disk wins.

use std::path::Path;

use helios_wire::scram::{DEFAULT_ITERATIONS, build_verifier};
use serde::{Deserialize, Serialize};

use crate::error::LocalError;
use crate::files;

/// The superuser that agents and proxy log in with.
pub const SERVICE_USER: &str = "helios";

/// File name in the data directory.
pub const FILE: &str = "credentials.json";

/// What `credentials.json` holds.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    /// Password of [`SERVICE_USER`].
    pub service_password: String,
    /// Application user.
    pub user: String,
    /// Its password.
    pub password: String,
    /// Application database.
    pub database: String,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials")
            .field("user", &self.user)
            .field("database", &self.database)
            .finish_non_exhaustive()
    }
}

impl Credentials {
    /// Reads them, or makes and stores them when there are none.
    ///
    /// # Errors
    /// [`LocalError::Io`] and [`LocalError::Corrupt`].
    pub fn load_or_create(
        data_dir: &Path,
        user: &str,
        database: &str,
        password: Option<&str>,
    ) -> Result<Self, LocalError> {
        if let Some(found) = Self::load(data_dir)? {
            return Ok(found);
        }
        let made = Self {
            service_password: random_password(),
            user: user.to_owned(),
            password: password.map_or_else(random_password, str::to_owned),
            database: database.to_owned(),
        };
        files::write_json(&data_dir.join(FILE), &made, 0o600)?;
        Ok(made)
    }

    /// Reads them; `None` when there are none.
    ///
    /// # Errors
    /// [`LocalError::Io`] and [`LocalError::Corrupt`].
    pub fn load(data_dir: &Path) -> Result<Option<Self>, LocalError> {
        files::read_json(&data_dir.join(FILE))
    }
}

/// What a server is given of a password: what is sent to it is seen by its log, by statistics, and
/// by whoever looks on.
pub(crate) fn verifier(password: &str) -> String {
    let salt: [u8; 16] = rand::random();
    build_verifier(password, &salt, DEFAULT_ITERATIONS)
}

/// 32 letters and digits: 190 bits.
fn random_password() -> String {
    use rand::RngExt as _;
    rand::rng()
        .sample_iter(rand::distr::Alphanumeric)
        .take(32)
        .map(char::from)
        .collect()
}
