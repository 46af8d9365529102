//! `kubectl helios`, run by kubectl itself from a folder in PATH.

use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use helios_e2e::kube::Namespace;
use helios_e2e::ledger::connect;
use helios_e2e::{Result, Shown};
use serde_json::Value;
use tokio::process::Command;

use crate::{MOVED, client, cluster, confirms, text};

/// How long one command of the plugin may take.
const LIMIT: Duration = Duration::from_secs(180);

/// The plugin in a folder of its own.
struct Plugin {
    folder: tempfile::TempDir,
    namespace: String,
}

/// What a command said.
struct Said {
    status: i32,
    out: String,
    err: String,
}

impl Plugin {
    fn install(namespace: &str) -> Result<Self> {
        let own = std::env::current_exe()?;
        let program = own.ancestors().nth(2).ok_or("no folder")?.join("helios");
        if !program.is_file() {
            return Err(format!("there is no program {}", program.display()).into());
        }
        let folder = tempfile::tempdir()?;
        for name in ["kubectl-helios", "kubectl_complete-helios"] {
            std::os::unix::fs::symlink(&program, folder.path().join(name))?;
        }
        Ok(Self {
            folder,
            namespace: namespace.to_owned(),
        })
    }

    fn path(&self) -> String {
        let path = std::env::var("PATH").unwrap_or_default();
        format!("{}:{path}", self.folder.path().display())
    }

    async fn run(&self, program: &str, args: &[&str]) -> Result<Said> {
        let mut command = Command::new(program);
        command
            .args(args)
            .env("PATH", self.path())
            .kill_on_drop(true);
        let Output {
            status,
            stdout,
            stderr,
        } = tokio::time::timeout(LIMIT, command.output()).await??;
        Ok(Said {
            status: status.code().unwrap_or(-1),
            out: String::from_utf8_lossy(&stdout).into_owned(),
            err: String::from_utf8_lossy(&stderr).into_owned(),
        })
    }

    /// `kubectl helios …` in the namespace.
    async fn says(&self, args: &[&str]) -> Result<Said> {
        let mut all = vec!["helios", "--namespace", &self.namespace];
        all.extend(args);
        self.run("kubectl", &all).await
    }

    async fn done(&self, args: &[&str]) -> Result<String> {
        let said = self.says(args).await?;
        if said.status != 0 {
            return Err(format!("{args:?}: status {}: {}", said.status, said.err).into());
        }
        Ok(said.out)
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a Kubernetes: make e2e"]
async fn the_plugin_shows_moves_and_reports() -> std::result::Result<(), Shown> {
    Ok(everything().await?)
}

async fn everything() -> Result<()> {
    let space = Namespace::create("plugin").await?;
    cluster(&space).await?;
    let plugin = Plugin::install(&space.name)?;
    shows(&plugin, &space).await?;
    moves(&plugin, &space).await?;
    asks_proxies(&plugin, &space).await?;
    reports(&plugin, &space).await?;
    says_what_is_wrong(&plugin).await?;
    space.delete().await
}

async fn shows(plugin: &Plugin, space: &Namespace) -> Result<()> {
    let page = plugin.done(&["status", "pg"]).await?;
    for word in ["pg-1", "pg-2", "primary", "replica", "Ready", "running"] {
        assert!(page.contains(word), "{word}: {page}");
    }
    let status: Value = serde_json::from_str(&plugin.done(&["status", "pg", "--json"]).await?)?;
    assert_eq!(text(&status, "/currentPrimary"), "pg-1");
    assert!(status.get("state").is_none(), "{status}");
    let answer = plugin
        .done(&["psql", "pg", "--", "-XAtc", "select 41 + 1, current_user"])
        .await?;
    assert_eq!(answer, "42|app\n");
    // psql's own status is the command's.
    let failed = plugin
        .says(&["psql", "pg", "--", "-Xc", "select nonsense"])
        .await?;
    assert_eq!(failed.status, 1, "{}", failed.err);
    let logs = plugin.done(&["logs", "pg", "pg-1", "--tail", "50"]).await?;
    assert!(logs.lines().count() > 3, "{logs}");
    let both = plugin.done(&["logs", "pg", "--proxies"]).await?;
    assert!(both.lines().all(|l| l.starts_with("pg-proxy-")), "{both}");
    let words = ["--namespace", &space.name, "status", ""];
    let program = plugin.folder.path().join("kubectl_complete-helios");
    let next = plugin.run(&program.display().to_string(), &words).await?;
    assert_eq!(next.out, "pg\n:4\n");
    Ok(())
}

async fn moves(plugin: &Plugin, space: &Namespace) -> Result<()> {
    space
        .until("hc", "pg", MOVED, |o| confirms(o, "pg-2"))
        .await?;
    let moved = plugin.says(&["switchover", "pg", "--to", "pg-2"]).await?;
    println!("{}{}", moved.err, moved.out);
    assert_eq!(moved.status, 0, "{}", moved.err);
    assert!(
        moved.out.contains("from \"pg-1\" to \"pg-2\""),
        "{}",
        moved.out
    );
    let object = space.get("hc", "pg").await?;
    assert_eq!(text(&object, "/status/currentPrimary"), "pg-2");
    // To where it is already, twice: the second refusal is the same as the first.
    for _ in 0..2 {
        let refused = plugin.says(&["switchover", "pg", "--to", "pg-2"]).await?;
        assert_eq!(refused.status, 1, "{}", refused.out);
        assert!(refused.err.contains("refused"), "{}", refused.err);
    }
    let unknown = plugin.says(&["switchover", "pg", "--to", "pg-9"]).await?;
    assert_eq!(unknown.status, 1);
    assert!(
        unknown.err.contains("no instance \"pg-9\""),
        "{}",
        unknown.err
    );
    Ok(())
}

async fn asks_proxies(plugin: &Plugin, space: &Namespace) -> Result<()> {
    let mut config = client(space).await?;
    config.application_name("till");
    let session = connect(&config).await?;
    session
        .batch_execute("create table if not exists t (a int); begin; insert into t values (1)")
        .await?;
    let list: Value = serde_json::from_str(&plugin.done(&["sessions", "pg", "--json"]).await?)?;
    let ours = list
        .as_array()
        .and_then(|all| all.iter().find(|s| s["application"] == "till"))
        .ok_or_else(|| format!("our session is not in {list}"))?;
    assert_eq!(ours["state"], "in transaction", "{ours}");
    assert!(text(ours, "/proxy").starts_with("pg-proxy-"), "{ours}");
    let table = plugin.done(&["sessions", "pg"]).await?;
    assert!(
        table.contains("till") && table.contains("in transaction"),
        "{table}"
    );
    session.batch_execute("commit").await?;
    let report = plugin.done(&["sessions", "pg", "--protection"]).await?;
    assert!(report.contains("till"), "{report}");
    // What is shown there is shown to whoever may forward ports, and to no other Pod.
    let pods = space
        .kubectl(&[
            "get",
            "pods",
            "-l",
            "heliosdb.io/component=proxy",
            "-o",
            "json",
        ])
        .await?;
    let pods: Value = serde_json::from_str(&pods)?;
    let address = format!("{}:9188", text(&pods, "/items/0/status/podIP"));
    let open = tokio::net::TcpStream::connect(&address).await;
    assert!(open.is_err(), "{address} is open to others");
    Ok(())
}

async fn reports(plugin: &Plugin, space: &Namespace) -> Result<()> {
    let folder = plugin.folder.path().join("report");
    let to = folder.display().to_string();
    plugin.done(&["report", "pg", "--to", &to]).await?;
    let names: Vec<String> = std::fs::read_dir(&folder)?
        .map(|e| Ok(e?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    for name in [
        "heliosclusters.yaml",
        "events.yaml",
        "statefulsets.yaml",
        "configmaps.yaml",
        "secrets.yaml",
        "pg-1-0.log",
        "pod-pg-2-0.yaml",
    ] {
        assert!(names.iter().any(|n| n == name), "{name}: {names:?}");
    }
    assert!(
        names.iter().any(|n| n.starts_with("helios-operator-")),
        "{names:?}"
    );
    let whole = read_all(&folder)?;
    assert!(whole.contains("pg-app"), "Secrets are listed");
    let secrets: Value =
        serde_json::from_str(&space.kubectl(&["get", "secrets", "-o", "json"]).await?)?;
    let mut looked = 0;
    for secret in secrets["items"].as_array().ok_or("no Secrets")? {
        for (key, value) in secret["data"].as_object().into_iter().flatten() {
            // Names and addresses are no secrets; what they are made of is.
            let private = ["password", "uri", "jdbc-uri", "tls.key", "ca.key", "token"];
            let value = value.as_str().unwrap_or_default();
            if private.contains(&key.as_str()) && !value.is_empty() {
                looked += 1;
                assert!(!whole.contains(value), "{key} is in the report");
            }
        }
    }
    assert!(looked > 5, "only {looked} values were looked for");
    let password = space.secret("pg-app", "password").await?;
    assert!(!whole.contains(&password), "the password is in the report");
    Ok(())
}

fn read_all(folder: &Path) -> Result<String> {
    let mut whole = String::new();
    for entry in std::fs::read_dir(folder)? {
        let path: PathBuf = entry?.path();
        whole.push_str(&String::from_utf8_lossy(&std::fs::read(path)?));
    }
    Ok(whole)
}

async fn says_what_is_wrong(plugin: &Plugin) -> Result<()> {
    let missing = plugin.says(&["status", "nothing"]).await?;
    assert_eq!(missing.status, 1);
    assert!(
        missing.err.contains("\"nothing\" not found"),
        "{}",
        missing.err
    );
    let context = plugin
        .says(&["status", "pg", "--context", "elsewhere"])
        .await?;
    assert_eq!(context.status, 2, "{}", context.err);
    let nowhere = plugin.folder.path().join("nowhere");
    std::fs::write(
        &nowhere,
        "apiVersion: v1\nkind: Config\ncurrent-context: c\n\
         clusters: [{name: c, cluster: {server: \"http://127.0.0.1:1\"}}]\n\
         users: [{name: c, user: {}}]\ncontexts: [{name: c, context: {cluster: c, user: c}}]\n",
    )?;
    let nowhere = nowhere.display().to_string();
    let program = plugin.folder.path().join("kubectl-helios");
    let program = program.display().to_string();
    let away = plugin
        .run(&program, &["status", "pg", "--kubeconfig", &nowhere])
        .await?;
    assert_eq!(away.status, 3, "{}", away.err);
    assert!(away.err.contains("does not answer"), "{}", away.err);
    Ok(())
}
