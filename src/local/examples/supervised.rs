//! A program that runs its agents as child processes of itself, so that a server and its agent
//! outlive a fault in the application: `supervised run <data directory> [parameter=value]...`.

#![allow(clippy::print_stdout)] // it is an example of a program

use std::error::Error;
use std::path::PathBuf;

use helios_local::{AgentMode, LocalCluster};
use tokio_util::sync::CancellationToken;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments
        .iter()
        .map(String::as_str)
        .collect::<Vec<_>>()
        .as_slice()
    {
        // How the supervisor starts each agent.
        ["agent", "--config", file] => {
            let config = serde_json::from_slice(&std::fs::read(file)?)?;
            helios_agent::run(config, CancellationToken::new()).await?;
        }
        ["run", data_dir, parameters @ ..] => {
            let mut cluster = LocalCluster::builder()
                .data_dir(PathBuf::from(data_dir))
                .listen("127.0.0.1:0")
                .parameter("shared_buffers", "16MB")
                .agents(AgentMode::Process(std::env::current_exe()?));
            for (name, value) in parameters.iter().filter_map(|p| p.split_once('=')) {
                cluster = cluster.parameter(name, value);
            }
            let cluster = cluster.start().await?;
            println!("{}", cluster.connection_string());
            cluster.stop_requested().await;
            cluster.shutdown().await;
        }
        _ => return Err("usage: supervised run <data directory> [parameter=value]...".into()),
    }
    Ok(())
}
