//! The plugin's command line. Nothing here does anything.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use helios_api::InstanceName;

use crate::cli::LogArgs;

/// What `--help` says of the exit status.
pub(crate) const EXIT_CODES: &str = "\
Exit status:
  0    done
  1    it was tried, or asked for, and failed
  2    an option is wrong
  3    the API server does not answer
  130  interrupted";

/// Looks after HeliosClusters on Kubernetes.
#[derive(Debug, Parser)]
#[command(
    name = "kubectl-helios",
    bin_name = "kubectl helios",
    version,
    after_help = EXIT_CODES,
    propagate_version = true
)]
pub(crate) struct PluginCli {
    #[command(flatten)]
    pub(crate) log: LogArgs,
    #[command(flatten)]
    pub(crate) plugin: PluginArgs,
}

/// `helios kubectl`, and all of `kubectl helios`.
#[derive(Debug, Args)]
pub(crate) struct PluginArgs {
    #[command(flatten)]
    pub(crate) place: PlaceArgs,
    #[command(subcommand)]
    pub(crate) command: PluginCommand,
}

/// Which API server, and where on it.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct PlaceArgs {
    /// Namespace of the cluster; that of the context by default
    #[arg(
        long,
        short,
        global = true,
        value_name = "NAME",
        help_heading = "Kubernetes"
    )]
    pub(crate) namespace: Option<String>,
    /// Context of the kubeconfig; its current one by default
    #[arg(long, global = true, value_name = "NAME", help_heading = "Kubernetes")]
    pub(crate) context: Option<String>,
    /// A kubeconfig instead of that of KUBECONFIG or ~/.kube/config
    #[arg(long, global = true, value_name = "FILE", help_heading = "Kubernetes")]
    pub(crate) kubeconfig: Option<PathBuf>,
}

/// All commands.
#[derive(Debug, Subcommand)]
pub(crate) enum PluginCommand {
    /// Show instances, proxies, conditions and the last operations of a cluster
    #[command(after_help = EXIT_CODES)]
    Status(StatusArgs),
    /// Move the primary without its clients noticing, and follow it to its end
    #[command(after_help = EXIT_CODES)]
    Switchover(MoveArgs),
    /// List the client sessions of all proxies: what they do, and what protects them
    ///
    /// Needs the right to forward ports of Pods (pods/portforward).
    #[command(after_help = EXIT_CODES)]
    Sessions(ProxySessionsArgs),
    /// Stop instances and keep them stopped
    #[command(after_help = EXIT_CODES)]
    Fence(FenceArgs),
    /// Let fenced instances come back
    #[command(after_help = EXIT_CODES)]
    Unfence(FenceArgs),
    /// Print the logs of instances, or of proxies
    #[command(after_help = EXIT_CODES)]
    Logs(LogsArgs),
    /// Open psql on the application's database, through a proxy
    ///
    /// Runs the psql of this machine through a forwarded port, with the user and the password of
    /// the Secret CLUSTER-app. Needs the rights to read it and to forward ports of Pods.
    Psql(ConnectArgs),
    /// Write objects, Events and logs of a cluster into a folder, without Secrets
    #[command(after_help = EXIT_CODES)]
    Report(ReportArgs),
    /// Print the completions of a shell for kubectl-helios
    ///
    /// For "kubectl helios" itself: a link named kubectl_complete-helios beside kubectl-helios.
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// A cluster by name.
#[derive(Debug, Clone, Args)]
pub(crate) struct ClusterArg {
    /// Name of the HeliosCluster
    #[arg(value_name = "CLUSTER")]
    pub(crate) cluster: String,
}

/// `status`.
#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    pub(crate) cluster: ClusterArg,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// `switchover`.
#[derive(Debug, Args)]
pub(crate) struct MoveArgs {
    #[command(flatten)]
    pub(crate) cluster: ClusterArg,
    /// Standby to move to; the one closest to the primary by default
    #[arg(long, value_name = "INSTANCE")]
    pub(crate) to: Option<InstanceName>,
    /// How long its end is waited for
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) timeout: u64,
    /// Print the operation as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// `sessions`.
#[derive(Debug, Args)]
pub(crate) struct ProxySessionsArgs {
    #[command(flatten)]
    pub(crate) cluster: ClusterArg,
    /// Show what would not have survived a failover since the proxies started, and why
    #[arg(long)]
    pub(crate) protection: bool,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// `fence` and `unfence`.
#[derive(Debug, Args)]
pub(crate) struct FenceArgs {
    #[command(flatten)]
    pub(crate) cluster: ClusterArg,
    /// Instances
    #[arg(value_name = "INSTANCE", required = true)]
    pub(crate) instances: Vec<InstanceName>,
}

/// `logs`.
#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    #[command(flatten)]
    pub(crate) cluster: ClusterArg,
    /// One instance; all of them by default
    #[arg(value_name = "INSTANCE", conflicts_with = "proxies")]
    pub(crate) instance: Option<InstanceName>,
    /// Those of the proxies instead
    #[arg(long)]
    pub(crate) proxies: bool,
    /// Go on with what is logged from now on
    #[arg(long, short, conflicts_with = "previous")]
    pub(crate) follow: bool,
    /// Those of the containers that ran before
    #[arg(long)]
    pub(crate) previous: bool,
    /// Lines from the end of each log; all by default
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i64).range(0..=1_000_000))]
    pub(crate) tail: Option<i64>,
}

/// `psql`.
#[derive(Debug, Args)]
pub(crate) struct ConnectArgs {
    #[command(flatten)]
    pub(crate) cluster: ClusterArg,
    /// Arguments for psql, after "--"
    #[arg(last = true, value_name = "ARG")]
    pub(crate) args: Vec<String>,
}

/// `report`.
#[derive(Debug, Args)]
pub(crate) struct ReportArgs {
    #[command(flatten)]
    pub(crate) cluster: ClusterArg,
    /// Folder to make; "helios-report-CLUSTER" by default
    #[arg(long, value_name = "DIR")]
    pub(crate) to: Option<PathBuf>,
    /// Lines from the end of each log
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(i64).range(0..=1_000_000))]
    pub(crate) tail: i64,
    /// Namespace of the operator, whose logs belong to it
    #[arg(long, value_name = "NAME", default_value = "helios-system")]
    pub(crate) operator_namespace: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    fn parse(line: &str) -> Result<PluginCli, clap::Error> {
        PluginCli::try_parse_from(line.split(' '))
    }

    #[test]
    fn the_definition_is_consistent() {
        PluginCli::command().debug_assert();
    }

    #[test]
    fn options_stand_before_and_behind_the_command() {
        for line in [
            "kubectl-helios -n shop --context c status pg",
            "kubectl-helios status pg -n shop --context c",
        ] {
            let place = parse(line).unwrap().plugin.place;
            assert_eq!(place.namespace.as_deref(), Some("shop"));
            assert_eq!(place.context.as_deref(), Some("c"));
        }
    }

    #[test]
    fn what_is_missing_or_impossible_is_refused() {
        for good in [
            "kubectl-helios switchover pg --to pg-2 --timeout 5",
            "kubectl-helios fence pg pg-1 pg-2",
            "kubectl-helios logs pg pg-1 --follow --tail 5",
            "kubectl-helios psql pg -- -c select",
            "kubectl-helios sessions pg --protection --json",
        ] {
            assert!(parse(good).is_ok(), "{good}");
        }
        for bad in [
            "kubectl-helios status",
            "kubectl-helios switchover pg --to PG_2",
            "kubectl-helios switchover pg --timeout 0",
            "kubectl-helios fence pg",
            "kubectl-helios logs pg pg-1 --proxies",
            "kubectl-helios logs pg --follow --previous",
            "kubectl-helios promote pg",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
