//! From settings to what they configure: reads the files that they name.

use std::sync::Arc;

use super::{BackendsConfig, EdgeConfig};
use crate::backend::{Credentials, Login};
use crate::listener::Limits;
use crate::tls::{BackendTls, ServerTls, TlsError};

impl EdgeConfig {
    /// TLS towards clients; `None` without a certificate.
    ///
    /// # Errors
    ///
    /// A file cannot be used.
    pub fn server_tls(&self) -> Result<Option<ServerTls>, TlsError> {
        let authority = self.tls_client_ca.as_deref();
        let tls = self.tls.as_ref();
        tls.map(|files| ServerTls::new(files, authority))
            .transpose()
    }

    /// The limits of connections, with nothing taken.
    #[must_use]
    pub fn limits(&self) -> Arc<Limits> {
        Limits::new(self.max_connections, self.max_connections_per_user)
    }
}

impl BackendsConfig {
    /// TLS towards instances.
    ///
    /// # Errors
    ///
    /// A file cannot be used.
    pub fn tls(&self) -> Result<BackendTls, TlsError> {
        let client = self.client_certificate.as_ref();
        BackendTls::new(self.sslmode, self.sslrootcert.as_deref(), client)
    }

    /// The login of the proxy's own role.
    ///
    /// # Errors
    ///
    /// The password file cannot be read.
    pub fn service_login(&self) -> std::io::Result<Login> {
        let credentials = match &self.service_password_file {
            None => Credentials::None,
            Some(path) => {
                let text = std::fs::read_to_string(path)?;
                // An editor's last line feed is no part of a password.
                let password = text.strip_suffix('\n').unwrap_or(&text);
                Credentials::Password(password.into())
            }
        };
        let own = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        Ok(Login {
            user: self.service_user.clone(),
            database: self.service_database.clone(),
            params: vec![
                own("application_name", "helios-proxy"),
                own("client_encoding", "UTF8"),
                // Nobody's objects may stand in for the catalog's.
                own("search_path", ""),
            ],
            credentials,
        })
    }
}
