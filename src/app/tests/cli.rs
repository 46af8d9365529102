//! The command line as a program: what it prints where, and its exit status.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::process::{Command, Output};

fn helios(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_helios"))
        .args(args)
        .env_remove("HELIOS_DATA_DIR")
        .env_remove("HELIOS_LOG")
        .stdin(std::process::Stdio::null())
        .output()
        .unwrap()
}

fn fails(args: &[&str], code: i32, says: &str) {
    let out = helios(args);
    let text = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{args:?}: {text}");
    assert!(text.contains(says), "{args:?}: {text}");
    assert!(out.stdout.is_empty(), "{args:?} printed a result");
}

#[test]
fn every_command_has_help() {
    for command in [
        &["--help"][..],
        &["local", "--help"],
        &["local", "start", "--help"],
        &["local", "psql", "--help"],
        &["demo", "--help"],
        &["agent", "--help"],
        &["switchover", "--help"],
    ] {
        let out = helios(command);
        assert!(out.status.success(), "{command:?}");
        assert!(out.stdout.len() > 200, "{command:?}");
    }
    let help = String::from_utf8(helios(&["--help"]).stdout).unwrap();
    assert!(help.contains("Exit status"), "{help}");
}

#[test]
fn completions_for_the_usual_shells() {
    for shell in ["bash", "zsh", "fish"] {
        let out = helios(&["completions", shell]);
        assert!(out.status.success(), "{shell}");
        let script = String::from_utf8(out.stdout).unwrap();
        assert!(script.contains("switchover"), "{shell}");
    }
}

#[test]
fn mistakes_are_told_apart() {
    let nowhere = tempfile::tempdir().unwrap();
    let dir = nowhere.path().to_str().unwrap();
    fails(&["status", "--data-dir", dir], 3, "no cluster runs on");
    fails(
        &["local", "stop", "--data-dir", dir],
        3,
        "helios local start",
    );
    fails(
        &["status", "--data-dir", dir, "--log-level", "loud"],
        2,
        "\"loud\" is not a level",
    );
    fails(
        &["agent", "--config", "/nonexistent/agent.json"],
        2,
        "/nonexistent/agent.json",
    );
    let config = nowhere.path().join("helios_proxy.toml");
    std::fs::write(&config, "[proxy]\nlisten_adress = \"127.0.0.1:6432\"\n").unwrap();
    let config = config.to_str().unwrap();
    fails(
        &["proxy", "--check", "--config", config],
        2,
        "helios_proxy.toml:2",
    );
    fails(&["local", "destroy", "--data-dir", dir], 2, "--yes");
    fails(&["demo", "--clients", "many"], 2, "--clients");
    fails(&["dmeo"], 2, "demo");
}
