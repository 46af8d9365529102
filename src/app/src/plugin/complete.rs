//! Completion for `kubectl helios`. kubectl runs a program named `kubectl_complete-helios` with the
//! words typed so far, and reads candidates, a line each, then `:4` (no file names), as
//! `__complete` of cobra prints them (kubectl, `staging/src/k8s.io/kubectl/pkg/cmd/plugin`).
//!
//! Invariant: it says nothing rather than an error: the terminal belongs to somebody who types.

use std::fmt::Write as _;
use std::time::Duration;

use clap::CommandFactory as _;
use helios_api::v1alpha1::HeliosCluster;
use kube::ResourceExt as _;

use super::args::{PlaceArgs, PluginCli};
use super::place::Place;

/// How long the API server may take while somebody waits for a candidate.
const LIMIT: Duration = Duration::from_secs(2);

/// What is wanted in a place.
#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    /// One of these words.
    Words(Vec<String>),
    /// A cluster's name.
    Cluster,
    /// An instance of this cluster.
    Instance(String),
    /// Nothing that can be known.
    Nothing,
}

/// The answer for `words`, the last of which is being typed.
pub(super) async fn run(words: &[String]) -> String {
    let typed = words.last().cloned().unwrap_or_default();
    let candidates = match wanted(words) {
        Wanted::Words(words) => words,
        Wanted::Nothing => Vec::new(),
        wanted => {
            let place = place(words);
            let found = tokio::time::timeout(LIMIT, names(&place, &wanted)).await;
            found.ok().flatten().unwrap_or_default()
        }
    };
    let mut text = String::new();
    for candidate in candidates.iter().filter(|c| c.starts_with(&typed)) {
        let _ = writeln!(text, "{candidate}");
    }
    text.push_str(":4\n");
    text
}

async fn names(place: &PlaceArgs, wanted: &Wanted) -> Option<Vec<String>> {
    let place = Place::find(place).await.ok()?;
    match wanted {
        Wanted::Cluster => {
            let list = place.clusters().list(&Default::default()).await.ok()?;
            Some(list.items.iter().map(HeliosCluster::name_any).collect())
        }
        Wanted::Instance(cluster) => {
            let status = place.cluster(cluster).await.ok()?.status?;
            Some(status.instances.into_iter().map(|i| i.name).collect())
        }
        Wanted::Words(_) | Wanted::Nothing => None,
    }
}

/// The options that say where, as far as they are typed.
fn place(words: &[String]) -> PlaceArgs {
    let mut place = PlaceArgs::default();
    for (at, word) in words.iter().enumerate() {
        let (name, value) = match word.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (word.as_str(), words.get(at + 1).cloned()),
        };
        match name {
            "-n" | "--namespace" => place.namespace = value,
            "--context" => place.context = value,
            "--kubeconfig" => place.kubeconfig = value.map(Into::into),
            _ => {}
        }
    }
    place
}

/// What the last word can be.
fn wanted(words: &[String]) -> Wanted {
    let Some((typed, before)) = words.split_last() else {
        return Wanted::Nothing;
    };
    let command = PluginCli::command();
    let mut sub = None;
    let mut positions: Vec<&str> = Vec::new();
    let mut value_of = None;
    for word in before {
        if value_of.take().is_some() {
            continue;
        }
        if word.starts_with('-') {
            value_of = takes_value(sub.unwrap_or(&command), &command, word);
        } else if sub.is_none() {
            sub = command.find_subcommand(word);
            if sub.is_none() {
                return Wanted::Nothing;
            }
        } else {
            positions.push(word);
        }
    }
    if let Some(option) = value_of {
        let cluster = positions.first().map(ToString::to_string);
        return match (option.as_str(), cluster) {
            ("to", Some(cluster)) => Wanted::Instance(cluster),
            _ => Wanted::Nothing,
        };
    }
    let Some(sub) = sub else {
        return Wanted::Words(if typed.starts_with('-') {
            options(&command)
        } else {
            let names = command.get_subcommands().map(|c| c.get_name().to_owned());
            names.collect()
        });
    };
    if typed.starts_with('-') {
        let mut all = options(sub);
        all.extend(options(&command));
        return Wanted::Words(all);
    }
    match (sub.get_name(), positions.as_slice()) {
        ("completions", _) => Wanted::Words(
            ["bash", "elvish", "fish", "powershell", "zsh"]
                .map(str::to_owned)
                .to_vec(),
        ),
        (_, []) => Wanted::Cluster,
        ("fence" | "unfence", [cluster, ..]) | ("logs", [cluster]) => {
            Wanted::Instance((*cluster).to_owned())
        }
        _ => Wanted::Nothing,
    }
}

fn options(command: &clap::Command) -> Vec<String> {
    let long = command.get_arguments().filter_map(|a| a.get_long());
    long.map(|name| format!("--{name}")).collect()
}

/// The option's name, if a value has to follow it as a word of its own.
fn takes_value(sub: &clap::Command, top: &clap::Command, word: &str) -> Option<String> {
    if word.contains('=') {
        return None;
    }
    let matches = |a: &&clap::Arg| {
        a.get_long()
            .is_some_and(|l| word.strip_prefix("--") == Some(l))
            || a.get_short().is_some_and(|s| word == format!("-{s}"))
    };
    let found = sub
        .get_arguments()
        .chain(top.get_arguments())
        .find(matches)?;
    let name = found.get_long().unwrap_or_default().to_owned();
    found.get_action().takes_values().then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    fn parses(line: &str) -> bool {
        let words = std::iter::once("kubectl-helios").chain(line.split(' '));
        PluginCli::try_parse_from(words).is_ok()
    }

    fn at(line: &str) -> Wanted {
        let words: Vec<String> = line.split(' ').map(ToOwned::to_owned).collect();
        wanted(&words)
    }

    #[test]
    fn commands_options_clusters_and_instances_are_told_apart() {
        let Wanted::Words(commands) = at("") else {
            panic!("no commands")
        };
        for name in [
            "status",
            "switchover",
            "sessions",
            "fence",
            "unfence",
            "logs",
            "psql",
            "report",
        ] {
            assert!(commands.iter().any(|c| c == name), "{name}");
        }
        let Wanted::Words(options) = at("switchover pg --") else {
            panic!("no options")
        };
        for name in ["--to", "--namespace", "--kubeconfig"] {
            assert!(options.iter().any(|c| c == name), "{name}");
        }
        for line in [
            "status ",
            "-n shop status ",
            "status -n shop ",
            "logs --tail 5 ",
        ] {
            assert_eq!(at(line), Wanted::Cluster, "{line}");
        }
        for line in [
            "fence pg ",
            "fence pg pg-1 ",
            "logs -f pg ",
            "switchover pg --to ",
        ] {
            assert_eq!(at(line), Wanted::Instance("pg".to_owned()), "{line}");
        }
        for line in ["status pg ", "status -n ", "nonsense pg "] {
            assert_eq!(at(line), Wanted::Nothing, "{line}");
        }
        assert!(parses("logs -f pg") && parses("fence pg pg-1"));
    }

    #[test]
    fn where_to_ask_is_read_from_what_is_typed() {
        let words: Vec<String> = ["-n", "shop", "status", "--context=c", ""]
            .map(str::to_owned)
            .into();
        let place = place(&words);
        assert_eq!(place.namespace.as_deref(), Some("shop"));
        assert_eq!(place.context.as_deref(), Some("c"));
    }

    #[tokio::test]
    async fn the_answer_is_in_the_form_that_kubectl_reads() {
        assert_eq!(run(&["sw".to_owned()]).await, "switchover\n:4\n");
        assert_eq!(run(&["nonsense".to_owned(), String::new()]).await, ":4\n");
    }
}
