//! TLS on both sides: what the proxy shows its clients, and how it looks at servers.

use std::sync::Arc;

use rustls::ClientConfig;

/// How much TLS towards a server is worth, with libpq's meanings
/// (<https://www.postgresql.org/docs/current/libpq-ssl.html>).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SslMode {
    /// Never.
    #[default]
    Disable,
    /// When the server has it; without any check of who it is.
    Prefer,
    /// Always; its chain is checked when a root certificate is configured.
    Require,
    /// Always; its chain must end at the root certificate.
    VerifyCa,
    /// Always; chain and host name are checked.
    VerifyFull,
}

/// TLS towards servers.
#[derive(Debug, Clone, Default)]
pub struct BackendTls {
    mode: SslMode,
    config: Option<Arc<ClientConfig>>,
}

impl BackendTls {
    /// No TLS.
    #[must_use]
    pub fn disabled() -> Self {
        Self::default()
    }

    /// How much it is worth.
    #[must_use]
    pub fn mode(&self) -> SslMode {
        self.mode
    }

    pub(crate) fn config(&self) -> Option<&Arc<ClientConfig>> {
        self.config.as_ref()
    }
}

/// TLS towards clients.
#[derive(Clone)]
pub struct ServerTls {
    config: Arc<rustls::ServerConfig>,
}

impl std::fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ServerTls(..)")
    }
}
