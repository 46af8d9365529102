//! The proxy of a local cluster: its generated configuration, its start, its place as
//! [`MoveSessions`].

use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use helios_api::control::{
    Backend, DrainReport, DrainRequest, MigrationEvent, ProxyStatus, ResumeReport, SessionInfo,
    Topology,
};
use helios_api::protection::ProtectionReport;
use helios_api::{Epoch, InstanceName};
use helios_proxy::config::ProxyConfig;
use helios_proxy::{Proxy, ProxyHandle, ProxyOptions};
use tokio::net::TcpListener;
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

use crate::credentials::SERVICE_USER;
use crate::error::LocalError;
use crate::files;
use crate::layout::Layout;
use crate::options::{LocalOptions, ProxyAuth};
use crate::sessions::{BoxFuture, MoveSessions};

/// Writes the configuration that follows from the options; returns its path.
pub(crate) fn write_config(
    options: &LocalOptions,
    layout: &Layout,
    names: &[InstanceName],
    port: u16,
) -> Result<std::path::PathBuf, LocalError> {
    if let Some(path) = &options.proxy_config {
        return Ok(path.clone());
    }
    let quoted = |path: &Path| toml_string(&path.display().to_string());
    let mut text = String::from("# Generated at every start of the local cluster.\n\n[proxy]\n");
    let auth = match options.auth {
        ProxyAuth::Trust => "trust",
        ProxyAuth::Scram => "scram-sha-256",
    };
    let listen = toml_string(&options.listen);
    let _ = writeln!(text, "listen_address = {listen}\nauth = \"{auth}\"");
    if let Some(dir) = &options.unix_socket_dir {
        let _ = writeln!(text, "unix_socket_dir = {}", quoted(dir));
    }
    let drain = options.drain_timeout.as_secs();
    let mode = toml_string(&options.replay_mode);
    let _ = writeln!(
        text,
        "\n[transaction_replay]\nmode = {mode}\nswitchover_drain_timeout_secs = {drain}"
    );
    let folder = quoted(layout.root());
    let _ = writeln!(
        text,
        "\n[session_migration]\ntransaction_buffer_path = {folder}"
    );
    let _ = writeln!(text, "\n[backends]\nservice_user = \"{SERVICE_USER}\"");
    let _ = writeln!(text, "service_database = \"postgres\"");
    for name in names {
        let host = quoted(&layout.instance_sockets(name));
        let _ = writeln!(
            text,
            "\n[[backends.instances]]\nname = \"{name}\"\nhost = {host}\nport = {port}"
        );
    }
    let path = layout.proxy_config();
    files::write(&path, text.as_bytes(), 0o600)?;
    Ok(path)
}

/// A TOML basic string.
fn toml_string(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            c if c.is_control() => {
                let _ = write!(quoted, "\\u{:04X}", u32::from(c));
            }
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

/// Reads the configuration; errors name file and line.
pub(crate) fn load(path: &Path) -> Result<ProxyConfig, LocalError> {
    ProxyConfig::load(path).map_err(|e| LocalError::Proxy(e.to_string()))
}

/// The proxy in this process.
#[derive(Debug)]
pub(crate) struct LocalProxy {
    handle: ProxyHandle,
    address: String,
    http: Option<String>,
    stop_http: CancellationToken,
}

impl LocalProxy {
    /// Starts it in front of `topology.primary`.
    pub(crate) async fn start(
        config: ProxyConfig,
        http: Option<&str>,
        topology: Topology,
    ) -> Result<Arc<Self>, LocalError> {
        let host = config.proxy.listen.host.clone();
        let listen = format!("{host}:{}", config.proxy.listen.port);
        let options =
            ProxyOptions::from_config(&config).map_err(|e| LocalError::Proxy(e.to_string()))?;
        let handle =
            Proxy::start(options.led(), topology)
                .await
                .map_err(|e| LocalError::Listen {
                    address: listen,
                    why: e.to_string(),
                })?;
        let host = match host.as_str() {
            "*" | "0.0.0.0" | "::" => "127.0.0.1",
            host => host,
        };
        let address = format!("{host}:{}", handle.port());
        let stop_http = CancellationToken::new();
        let http = match http {
            Some(listen) => Some(serve_http(&handle, listen, stop_http.clone()).await?),
            None => None,
        };
        Ok(Arc::new(Self {
            handle,
            address,
            http,
            stop_http,
        }))
    }
}

/// Serves `/metrics`, `/healthz` and the like; returns the address.
async fn serve_http(
    handle: &ProxyHandle,
    listen: &str,
    stop: CancellationToken,
) -> Result<String, LocalError> {
    let failed = |e: std::io::Error| LocalError::Listen {
        address: listen.to_owned(),
        why: e.to_string(),
    };
    let listener = TcpListener::bind(listen).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?.to_string();
    let router = helios_proxy::control::router(handle.clone());
    tokio::spawn(async move {
        let stopped = stop.cancelled_owned();
        if let Err(error) = axum::serve(listener, router)
            .with_graceful_shutdown(stopped)
            .await
        {
            tracing::error!(%error, "HTTP endpoints of the proxy ended");
        }
    });
    Ok(address)
}

impl MoveSessions for LocalProxy {
    fn prepare(&self, _epoch: Epoch, candidate: Backend) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(async move {
            self.handle.prepare(&candidate).await;
            Ok(())
        })
    }

    fn set_heir(&self, heir: Option<Backend>) {
        self.handle.set_heir(heir);
    }

    fn drain(&self, request: DrainRequest) -> BoxFuture<'_, Result<DrainReport, String>> {
        Box::pin(async move { self.handle.drain(&request).await.map_err(|e| e.to_string()) })
    }

    fn resume(&self, topology: Topology) -> BoxFuture<'_, Result<ResumeReport, String>> {
        Box::pin(async move {
            self.handle
                .resume(topology)
                .await
                .map_err(|e| e.to_string())
        })
    }

    fn abort(&self, epoch: Epoch) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(async move { self.handle.abort(epoch).await.map_err(|e| e.to_string()) })
    }

    fn status(&self) -> BoxFuture<'_, ProxyStatus> {
        Box::pin(async move { self.handle.status() })
    }

    fn sessions(&self) -> BoxFuture<'_, Vec<SessionInfo>> {
        Box::pin(async move { self.handle.sessions() })
    }

    fn protection(&self) -> BoxFuture<'_, ProtectionReport> {
        Box::pin(async move { self.handle.protection(None) })
    }

    fn subscribe(&self) -> broadcast::Receiver<MigrationEvent> {
        self.handle.subscribe()
    }

    fn shutdown(&self, grace: Duration) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            self.handle.shutdown(grace).await;
            self.stop_http.cancel();
        })
    }

    fn address(&self) -> String {
        self.address.clone()
    }

    fn http_address(&self) -> Option<String> {
        self.http.clone()
    }
}
