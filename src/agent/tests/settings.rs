//! New settings on real servers: reloaded without a restart, refused in PostgreSQL's words, and
//! taken back where a server does not start with them.

#![allow(clippy::unwrap_used, clippy::panic)] // a test fails by panicking

mod common;

use common::{FIRST, Node, folder, pair};
use helios_api::agent::{AgentCommand, InstanceState, ServerSettings, SettingsReport, StopMode};

fn settings(node: &Node, changes: &[(&str, &str)]) -> ServerSettings {
    let mut settings = ServerSettings {
        parameters: node.config.parameters.clone(),
        hba: node.config.hba.clone(),
    };
    for (name, value) in changes {
        let entry = ((*name).to_owned(), (*value).to_owned());
        settings.parameters.extend([entry]);
    }
    settings
}

/// Tells an agent new settings, and what became of them.
async fn tell(node: &Node, settings: &ServerSettings) -> SettingsReport {
    let settings = settings.clone();
    let told = settings.fingerprint();
    node.command(1, AgentCommand::Configure { settings }).await;
    let report = node.state().await.settings;
    assert_eq!(report.told, told);
    report
}

async fn shown(node: &Node, name: &str) -> String {
    let sql = node.sql().await;
    let row = sql.query_one(&format!("show {name}"), &[]).await.unwrap();
    row.get(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_reload_is_enough_for_needs_no_restart() {
    let dir = folder();
    let (a, b) = pair(dir.path()).await;
    let (first, second) = (a.postmaster(), b.postmaster());
    for node in [&a, &b] {
        let report = tell(node, &settings(node, &[("work_mem", "7MB")])).await;
        assert_eq!((report.refused, report.restart), (None, vec![]));
        assert_eq!(shown(node, "work_mem").await, "7MB");
    }
    // What needs a restart is said, and nothing is restarted.
    let more = settings(&b, &[("work_mem", "7MB"), ("shared_buffers", "20MB")]);
    let report = tell(&b, &more).await;
    assert_eq!(report.restart, ["shared_buffers"]);
    assert_eq!(shown(&b, "shared_buffers").await, "16MB");
    assert_eq!((a.postmaster(), b.postmaster()), (first, second));
    // It counts after one.
    let mode = StopMode::Fast;
    b.command(1, AgentCommand::Fence { mode }).await;
    b.follow(1, &a, &FIRST).await;
    assert_eq!(shown(&b, "shared_buffers").await, "20MB");
    assert_eq!(b.state().await.settings.restart, [""; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_postgresql_refuses_is_told_in_its_words_and_touches_nothing() {
    let dir = folder();
    let a = Node::start(dir.path(), "a").await;
    a.command(1, AgentCommand::Bootstrap).await;
    let postmaster = a.postmaster();
    let conf = std::fs::read_to_string(a.config.data_dir.join("helios.conf")).unwrap();
    for (change, says) in [
        (
            ("work_mem", "lots"),
            "invalid value for parameter \"work_mem\": \"lots\"",
        ),
        (
            ("no_such_thing", "1"),
            "unrecognized configuration parameter \"no_such_thing\"",
        ),
    ] {
        let report = tell(&a, &settings(&a, &[change])).await;
        let refused = report.refused.unwrap();
        assert!(refused.starts_with(says), "{refused}");
    }
    let mut wrong = settings(&a, &[("work_mem", "9MB")]);
    wrong.hba.push("local all all no-such-method".to_owned());
    let refused = tell(&a, &wrong).await.refused.unwrap();
    assert!(refused.starts_with("pg_hba.conf: "), "{refused}");
    let now = std::fs::read_to_string(a.config.data_dir.join("helios.conf")).unwrap();
    assert_eq!(now, conf);
    assert_eq!(shown(&a, "work_mem").await, "4MB");
    // Good ones are taken afterwards.
    let report = tell(&a, &settings(&a, &[("work_mem", "9MB")])).await;
    assert_eq!(report.refused, None);
    assert_eq!(shown(&a, "work_mem").await, "9MB");
    assert_eq!(a.postmaster(), postmaster);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_does_not_start_with_them_gets_those_before() {
    let dir = folder();
    let (a, b) = pair(dir.path()).await;
    let library = settings(&b, &[("shared_preload_libraries", "no_such_library")]);
    // PostgreSQL looks for libraries when it starts.
    let report = tell(&b, &library).await;
    assert_eq!(report.restart, ["shared_preload_libraries"]);
    let mode = StopMode::Fast;
    b.command(1, AgentCommand::Fence { mode }).await;
    b.follow(1, &a, &FIRST).await;
    let report = b.state().await.settings;
    let refused = report.refused.unwrap();
    assert!(refused.contains("no_such_library"), "{refused}");
    assert_eq!(report.told, library.fingerprint());
    b.reach(|s| {
        matches!(
            s,
            InstanceState::Standby {
                heard_ms: Some(_),
                ..
            }
        )
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_keeps_what_its_primary_has() {
    let dir = folder();
    let (a, b) = pair(dir.path()).await;
    let less = settings(&b, &[("max_connections", "20")]);
    for node in [&a, &b] {
        let report = tell(node, &less).await;
        assert_eq!(report.kept, ["max_connections"]);
        assert_eq!(report.restart, [""; 0]);
    }
    // It would not start with less ("recovery aborted because of insufficient parameter settings").
    let mode = StopMode::Fast;
    b.command(1, AgentCommand::Fence { mode }).await;
    b.follow(1, &a, &FIRST).await;
    assert_eq!(shown(&b, "max_connections").await, "50");
    let report = b.state().await.settings;
    assert_eq!(
        (report.refused, report.kept),
        (None, vec!["max_connections".to_owned()])
    );
    // A slot that is not in use any more can be forgotten, one that is cannot.
    let standby = b.config.name.clone();
    let drop_slot = || AgentCommand::DropSlot {
        standby: standby.clone(),
    };
    assert!(a.try_command(1, drop_slot()).await.is_err());
    b.command(1, AgentCommand::Fence { mode }).await;
    a.command(1, drop_slot()).await;
    let sql = a.sql().await;
    let slots = sql.query("select 1 from pg_replication_slots", &[]).await;
    assert!(slots.unwrap().is_empty());
}
