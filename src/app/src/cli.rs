//! The command line: commands, options, help. Nothing here does anything.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use helios_api::InstanceName;

use crate::plugin::PluginArgs;

/// What `--help` says of the exit status.
pub(crate) const EXIT_CODES: &str = "\
Exit status:
  0    done
  1    it was tried, or checked, and failed (helios demo: an error, a lost or doubled transaction)
  2    an option or a configuration file is wrong
  3    no cluster runs there, or it does not answer
  130  interrupted";

/// Keeps PostgreSQL sessions and open transactions alive while the primary moves.
#[derive(Debug, Parser)]
#[command(name = "helios", version, after_help = EXIT_CODES, propagate_version = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) log: LogArgs,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options of every command.
#[derive(Debug, Args)]
pub(crate) struct LogArgs {
    /// What to log: error, warn, info, debug, trace, or target=level,...
    ///
    /// Default: info for what keeps running, warn for the rest.
    #[arg(
        long,
        global = true,
        value_name = "LEVEL",
        env = "HELIOS_LOG",
        help_heading = "Log"
    )]
    pub(crate) log_level: Option<String>,
    /// How log lines look.
    #[arg(
        long,
        global = true,
        value_name = "FORMAT",
        value_enum,
        default_value_t = LogFormatArg::Text,
        help_heading = "Log"
    )]
    pub(crate) log_format: LogFormatArg,
}

/// Form of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormatArg {
    /// For people
    Text,
    /// One JSON object a line
    Json,
}

/// All commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a primary, its standbys and a proxy on this machine
    #[command(subcommand, after_help = EXIT_CODES)]
    Local(LocalCommand),
    /// Show open transactions surviving switchovers and crashes, and count what it costs
    ///
    /// Starts a throw-away cluster, lets clients transfer money through its proxy, moves and kills
    /// the primary under them, and compares the databases with what the clients were told. Takes
    /// a few seconds an event.
    #[command(after_help = EXIT_CODES)]
    Demo(DemoArgs),
    /// Check a proxy's configuration file
    Proxy(ProxyArgs),
    /// Run the agent of one instance (started by "helios local" and in Pods)
    #[command(hide = true)]
    Agent(AgentArgs),
    /// Keep HeliosClusters on Kubernetes as they are described
    Operator(OperatorArgs),
    /// Look after HeliosClusters on Kubernetes; as kubectl-helios in PATH: "kubectl helios"
    Kubectl(PluginArgs),
    /// Print the CustomResourceDefinitions
    Crds {
        /// Print the schema of the values of charts/helios-cluster instead
        #[arg(long, hide = true)]
        values_schema: bool,
    },
    /// Copy this program to a file (init containers put the agent into PostgreSQL's images)
    #[command(hide = true)]
    CopyTo {
        /// The file
        path: PathBuf,
    },
    /// Show instances, primary and last moves of a local cluster
    Status(ShowArgs),
    /// List the client sessions of a local cluster: what they do, and what protects them
    Sessions(SessionsArgs),
    /// Move the primary of a local cluster without its clients noticing
    Switchover(SwitchoverArgs),
    /// Print the completions of a shell
    ///
    /// bash: source <(helios completions bash)
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// `helios local`.
#[derive(Debug, Subcommand)]
pub(crate) enum LocalCommand {
    /// Create the cluster, or start it again, and keep it running
    ///
    /// Runs in the foreground until ctrl-C, SIGTERM or "helios local stop".
    Start(StartArgs),
    /// Show instances, primary and last moves
    Status(ShowArgs),
    /// Move the primary without its clients noticing
    Switchover(SwitchoverArgs),
    /// Replace a primary that does not come back, although commits may be lost
    ///
    /// For a primary whose data are gone while no standby is known to hold every acknowledged
    /// commit: then nothing happens by itself. The most advanced standby becomes primary.
    Failover(FailoverArgs),
    /// Stop an instance and keep it stopped
    Fence(InstanceArgs),
    /// Let a fenced instance come back
    Unfence(InstanceArgs),
    /// Stop proxy and servers; the data stays
    Stop(DirArgs),
    /// Remove a stopped cluster with all its data
    Destroy(DestroyArgs),
    /// Open psql through the proxy
    Psql(PsqlArgs),
    /// List the client sessions
    Sessions(SessionsArgs),
}

/// Which cluster.
#[derive(Debug, Clone, Args)]
pub(crate) struct DirArgs {
    /// Folder of the cluster
    #[arg(
        long,
        value_name = "DIR",
        env = "HELIOS_DATA_DIR",
        default_value = "./helios-data"
    )]
    pub(crate) data_dir: PathBuf,
}

/// A command that shows something.
#[derive(Debug, Args)]
pub(crate) struct ShowArgs {
    #[command(flatten)]
    pub(crate) dir: DirArgs,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// `sessions`.
#[derive(Debug, Args)]
pub(crate) struct SessionsArgs {
    #[command(flatten)]
    pub(crate) show: ShowArgs,
    /// Show what would not have survived a failover since the proxy started, and why
    ///
    /// Transactions, statements outside of one, and time: how much of it was protected, and the
    /// reasons of the rest by database, user and application name.
    #[arg(long)]
    pub(crate) protection: bool,
}

/// A command about one instance.
#[derive(Debug, Args)]
pub(crate) struct InstanceArgs {
    #[command(flatten)]
    pub(crate) dir: DirArgs,
    /// Name of the instance, as "helios status" shows it
    #[arg(value_name = "INSTANCE")]
    pub(crate) instance: InstanceName,
}

/// `switchover`.
#[derive(Debug, Args)]
pub(crate) struct SwitchoverArgs {
    #[command(flatten)]
    pub(crate) dir: DirArgs,
    /// Standby to move to; the one closest to the primary by default
    #[arg(long, value_name = "INSTANCE")]
    pub(crate) to: Option<InstanceName>,
    /// Print the operation as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// `failover`.
#[derive(Debug, Args)]
pub(crate) struct FailoverArgs {
    #[command(flatten)]
    pub(crate) dir: DirArgs,
    /// I know that commits which clients were told of may be lost for good
    #[arg(long, required = true)]
    pub(crate) accept_data_loss: bool,
    /// Print the operation as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// `destroy`.
#[derive(Debug, Args)]
pub(crate) struct DestroyArgs {
    #[command(flatten)]
    pub(crate) dir: DirArgs,
    /// Do not ask
    #[arg(long, short)]
    pub(crate) yes: bool,
}

/// `psql`.
#[derive(Debug, Args)]
pub(crate) struct PsqlArgs {
    #[command(flatten)]
    pub(crate) dir: DirArgs,
    /// Arguments for psql, after "--"
    #[arg(last = true, value_name = "ARG")]
    pub(crate) args: Vec<String>,
}

/// `start`.
#[derive(Debug, Args)]
pub(crate) struct StartArgs {
    #[command(flatten)]
    pub(crate) dir: DirArgs,
    /// PostgreSQL servers
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=9))]
    pub(crate) instances: u32,
    /// Where the proxy listens
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:6432")]
    pub(crate) listen: String,
    /// Where /metrics, /healthz and /readyz are served; nowhere by default
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) http: Option<String>,
    /// Folder for a Unix socket of the proxy
    #[arg(long, value_name = "DIR")]
    pub(crate) socket_dir: Option<PathBuf>,
    /// What a move does with open transactions
    #[arg(long, value_enum, default_value_t = Mode::Transaction)]
    pub(crate) mode: Mode,
    /// How clients log in
    #[arg(long, value_enum, default_value_t = Auth::Trust)]
    pub(crate) auth: Auth,
    /// Application database, made with the cluster
    #[arg(long, value_name = "NAME", default_value = "app")]
    pub(crate) database: String,
    /// Application user, owner of the database
    #[arg(long, value_name = "NAME", default_value = "app")]
    pub(crate) user: String,
    /// Password of that user; generated by default
    #[arg(
        long,
        value_name = "PASSWORD",
        env = "HELIOS_PASSWORD",
        hide_env_values = true
    )]
    pub(crate) password: Option<String>,
    /// Let commits not wait for a standby: faster, and a crash may lose the last ones
    #[arg(long)]
    pub(crate) asynchronous: bool,
    /// What commits do when no standby is left to wait for
    #[arg(long, value_enum, default_value_t = DurabilityArg::Preferred)]
    pub(crate) durability: DurabilityArg,
    /// A PostgreSQL setting for all servers; may be given several times
    #[arg(long = "set", value_name = "NAME=VALUE", value_parser = setting)]
    pub(crate) settings: Vec<(String, String)>,
    /// A helios_proxy.toml instead of the generated one
    #[arg(long, value_name = "FILE")]
    pub(crate) proxy_config: Option<PathBuf>,
    /// Run in the background
    #[arg(long)]
    pub(crate) detach: bool,
}

/// `[transaction_replay] mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Mode {
    /// A failover returns errors
    None,
    /// Session state is rebuilt, an open transaction gets an error
    Session,
    /// Open transactions are replayed and verified
    Transaction,
    /// As transaction, and every result set is compared
    Select,
}

impl Mode {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Session => "session",
            Self::Transaction => "transaction",
            Self::Select => "select",
        }
    }
}

/// What commits do without a standby.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DurabilityArg {
    /// They go on; only the primary can be primary until a standby has caught up
    Preferred,
    /// They wait
    Required,
}

/// How clients log in at the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Auth {
    /// Anybody who reaches the listener
    Trust,
    /// SCRAM-SHA-256 with the password
    Scram,
}

/// `demo`.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Clients, of all kinds (plain, prepared, pipelined, slow, repeatable read, serializable,
    /// cursor)
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = count(1, 1000))]
    pub(crate) clients: usize,
    /// Planned moves of the primary
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = count(0, 10_000))]
    pub(crate) switchovers: usize,
    /// kill -9 of the primary and all its processes
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = count(0, 10_000))]
    pub(crate) crashes: usize,
    /// Order of the events, and what the clients do
    #[arg(long, value_name = "S", default_value_t = 1)]
    pub(crate) seed: u64,
    /// PostgreSQL servers
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(2..=9))]
    pub(crate) instances: u32,
    /// What a move does with open transactions
    #[arg(long, value_enum, default_value_t = Mode::Transaction)]
    pub(crate) mode: Mode,
    /// Print the result as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
    /// Keep data and logs
    #[arg(long)]
    pub(crate) keep: bool,
}

/// A number within limits, as `usize`.
fn count(min: u64, max: u64) -> impl clap::builder::TypedValueParser<Value = usize> {
    use clap::builder::TypedValueParser as _;
    clap::value_parser!(u64)
        .range(min..=max)
        .try_map(usize::try_from)
}

/// `proxy`.
#[derive(Debug, Args)]
pub(crate) struct ProxyArgs {
    /// The configuration
    #[arg(long, value_name = "FILE", default_value = "helios_proxy.toml")]
    pub(crate) config: PathBuf,
    /// Say all that is wrong with it, each with its line, and end
    #[arg(long)]
    pub(crate) check: bool,
    /// Learn the primary from the operator, which commands this proxy over this port
    #[arg(long, value_name = "ADDRESS:PORT", requires = "tls_dir")]
    pub(crate) control: Option<std::net::SocketAddr>,
    /// Folder with ca.crt, tls.crt and tls.key for that port
    #[arg(long, value_name = "DIR")]
    pub(crate) tls_dir: Option<PathBuf>,
    /// Show sessions on this address too, to whoever reaches it: a loopback one
    #[arg(long, value_name = "ADDRESS:PORT", requires = "control", value_parser = loopback)]
    pub(crate) inspect: Option<std::net::SocketAddr>,
    /// Keep what the operator says of the primary in this file, for the next start
    #[arg(long, value_name = "FILE", requires = "control")]
    pub(crate) topology_file: Option<PathBuf>,
    /// Take over clients and sessions from the proxy that listens on this Unix socket, if one does;
    /// then listen there for the next one
    #[arg(long, value_name = "SOCKET", conflicts_with = "control")]
    pub(crate) take_over: Option<PathBuf>,
    /// How long, once it is taken over from, it keeps clients that cannot go (over TLS, in a
    /// transaction, with temporary objects); then they are disconnected
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 3600,
        requires = "take_over"
    )]
    pub(crate) hand_over_limit: u64,
}

/// An address that nobody reaches from outside of the machine, or of the Pod.
fn loopback(text: &str) -> Result<std::net::SocketAddr, String> {
    let address: std::net::SocketAddr = text.parse().map_err(|e| format!("{e}"))?;
    if address.ip().is_loopback() {
        return Ok(address);
    }
    Err("only a loopback address: what is shown there is shown to anybody".to_owned())
}

/// `NAME=VALUE`.
fn setting(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("expected NAME=VALUE")?;
    let name = name.trim();
    if name.is_empty() {
        return Err("the setting has no name".to_owned());
    }
    Ok((name.to_owned(), value.trim().to_owned()))
}

/// `agent`.
#[derive(Debug, Args)]
pub(crate) struct AgentArgs {
    /// Log what PostgreSQL logs, too
    #[arg(long)]
    pub(crate) forward_log: bool,
    /// The configuration (JSON)
    #[arg(long, value_name = "FILE")]
    pub(crate) config: PathBuf,
}

/// `operator`.
#[derive(Debug, Args)]
pub(crate) struct OperatorArgs {
    /// The only namespace to look after; all of them by default
    #[arg(long, value_name = "NAME", env = "HELIOS_WATCH_NAMESPACE")]
    pub(crate) namespace: Option<String>,
    /// Namespace of this operator's own lease
    #[arg(
        long,
        value_name = "NAME",
        env = "POD_NAMESPACE",
        default_value = "default"
    )]
    pub(crate) lease_namespace: String,
    /// Name of this replica
    #[arg(
        long,
        value_name = "NAME",
        env = "POD_NAME",
        default_value = "helios-operator"
    )]
    pub(crate) identity: String,
    /// This program's image, which agents and proxies run from
    #[arg(long, value_name = "IMAGE", env = "HELIOS_IMAGE")]
    pub(crate) image: String,
    /// Where /healthz, /readyz and /metrics are served
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "0.0.0.0:9187")]
    pub(crate) http: std::net::SocketAddr,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn options_have_limits() {
        let parse = |line: &str| Cli::try_parse_from(line.split(' '));
        assert!(parse("helios demo --clients 8 --seed 3 --json").is_ok());
        assert!(parse("helios local switchover --to pg-2 --log-level debug").is_ok());
        for bad in [
            "helios demo --clients 0",
            "helios demo --instances 1",
            "helios local start --instances 10",
            "helios local start --mode all",
            "helios local fence PG_1",
            "helios proxy --control 0.0.0.0:1 --tls-dir . --inspect 0.0.0.0:2",
            "helios kubectl",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
