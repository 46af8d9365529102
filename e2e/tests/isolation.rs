//! The classic anomalies at all isolation levels, with the primary moved between their steps.
//!
//! All schedules run side by side on one cluster. An outcome is allowed when PostgreSQL alone
//! gives it, as it is or with the clients rolled back that were told 40001.

use std::collections::BTreeSet;

use futures_util::future::try_join_all;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use helios_e2e::driver::Target;
use helios_e2e::schedule::{Answer, History, Run, Schedule, Waiting, allowed};
use helios_e2e::subject::{Move, Subject};
use helios_e2e::{Result, Shown};
use helios_testkit::{PgOptions, PgServer};
use tokio::sync::Mutex;
use tokio_postgres::Client;

const LEVELS: [&str; 4] = [
    "read uncommitted",
    "read committed",
    "repeatable read",
    "serializable",
];

/// Histories that are judged at a time: each takes a few connections.
const SIDE_BY_SIDE: usize = 8;

const BEGIN: &str = "begin isolation level LEVEL";
const ONE: &str = "select v from t where id = 1";
const TWO: &str = "select v from t where id = 2";
const BOTH: &str = "select id, v from t where id in (1, 2) order by id";

const SCHEDULES: &[Schedule] = &[
    Schedule {
        name: "dirty_write",
        steps: &[
            (0, BEGIN),
            (1, BEGIN),
            (0, "update t set v = 11 where id = 1"),
            (1, "update t set v = 12 where id = 1"),
            (0, "update t set v = 21 where id = 2"),
            (0, "commit"),
            (1, "update t set v = 22 where id = 2"),
            (1, "commit"),
        ],
    },
    Schedule {
        name: "dirty_read_of_an_aborted_write",
        steps: &[
            (0, BEGIN),
            (1, BEGIN),
            (0, "update t set v = 101 where id = 1"),
            (1, ONE),
            (0, "rollback"),
            (1, ONE),
            (1, "commit"),
        ],
    },
    Schedule {
        name: "dirty_read_of_an_intermediate_write",
        steps: &[
            (0, BEGIN),
            (1, BEGIN),
            (0, "update t set v = 101 where id = 1"),
            (1, ONE),
            (0, "update t set v = 11 where id = 1"),
            (0, "commit"),
            (1, ONE),
            (1, "commit"),
        ],
    },
    Schedule {
        name: "circular_information_flow",
        steps: &[
            (0, BEGIN),
            (1, BEGIN),
            (0, "update t set v = 11 where id = 1"),
            (1, "update t set v = 22 where id = 2"),
            (0, TWO),
            (1, ONE),
            (0, "commit"),
            (1, "commit"),
        ],
    },
    Schedule {
        name: "fuzzy_read",
        steps: &[
            (0, BEGIN),
            (0, ONE),
            (1, BEGIN),
            (1, "update t set v = 12 where id = 1"),
            (1, "commit"),
            (0, ONE),
            (0, "commit"),
        ],
    },
    Schedule {
        name: "phantom",
        steps: &[
            (0, BEGIN),
            (0, "select * from t where v > 15 order by id"),
            (1, BEGIN),
            (1, "insert into t values (3, 30)"),
            (1, "commit"),
            (0, "select * from t where v > 15 order by id"),
            (0, "commit"),
        ],
    },
    Schedule {
        name: "lost_update",
        steps: &[
            (0, BEGIN),
            (1, BEGIN),
            (0, ONE),
            (1, ONE),
            (0, "update t set v = 11 where id = 1"),
            (1, "update t set v = 12 where id = 1"),
            (0, "commit"),
            (1, "commit"),
        ],
    },
    Schedule {
        name: "locked_update",
        steps: &[
            (0, BEGIN),
            (1, BEGIN),
            (0, "select v from t where id = 1 for update"),
            (1, "select v from t where id = 1 for update"),
            (0, "update t set v = v + 1 where id = 1 returning v"),
            (0, "commit"),
            (1, "update t set v = v + 1 where id = 1 returning v"),
            (1, "commit"),
        ],
    },
    Schedule {
        name: "read_skew",
        steps: &[
            (0, BEGIN),
            (1, BEGIN),
            (0, ONE),
            (1, BOTH),
            (1, "update t set v = 12 where id = 1"),
            (1, "update t set v = 18 where id = 2"),
            (1, "commit"),
            (0, TWO),
            (0, "commit"),
        ],
    },
    Schedule {
        name: "write_skew",
        steps: &[
            (0, BEGIN),
            (1, BEGIN),
            (0, BOTH),
            (1, BOTH),
            (0, "update t set v = 11 where id = 1"),
            (1, "update t set v = 21 where id = 2"),
            (0, "commit"),
            (1, "commit"),
        ],
    },
    Schedule {
        name: "serialisation_failure",
        steps: &[
            (0, BEGIN),
            (1, BEGIN),
            (0, "select * from t where v % 3 = 0"),
            (1, "select * from t where v % 3 = 0"),
            (0, "insert into t values (3, 30)"),
            (1, "insert into t values (4, 42)"),
            (0, "commit"),
            (1, "commit"),
        ],
    },
    Schedule {
        name: "read_only_anomaly",
        steps: &[
            (1, BEGIN),
            (1, BOTH),
            (0, BEGIN),
            (0, "update t set v = 40 where id = 2"),
            (0, "commit"),
            (2, BEGIN),
            (2, BOTH),
            (2, "commit"),
            (1, "update t set v = -1 where id = 1"),
            (1, "commit"),
        ],
    },
];

/// Who waits for a lock, asked of whoever is primary now.
struct Locks<'a> {
    subject: Option<&'a Subject>,
    server: &'a PgServer,
    client: Mutex<Option<Client>>,
}

const WAITING: &str = "select application_name from pg_stat_activity \
                       where state = 'active' and wait_event_type = 'Lock'";

impl Waiting for Locks<'_> {
    async fn waiting(&self) -> Result<BTreeSet<String>> {
        let mut client = self.client.lock().await;
        if client.as_ref().is_none_or(Client::is_closed) {
            *client = match self.subject {
                // None while the primary moves: nobody is known to wait.
                Some(subject) => subject.admin().await.ok(),
                None => Some(self.server.connect().await?),
            };
        }
        let Some(asked) = client.as_ref() else {
            return Ok(BTreeSet::new());
        };
        let Ok(rows) = asked.query(WAITING, &[]).await else {
            *client = None;
            return Ok(BTreeSet::new());
        };
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }
}

/// A run with the tick at which it begins.
struct Placed {
    schedule: Schedule,
    level: &'static str,
    begins: usize,
}

struct Bench {
    subject: Subject,
    server: PgServer,
}

impl Bench {
    async fn start() -> Result<Self> {
        let subject = Subject::start_with(|builder| {
            builder
                .parameter("max_connections", "500")
                .parameter("fsync", "off")
        });
        Ok(Self {
            subject: subject.await?,
            server: PgServer::start(PgOptions::default()).await?,
        })
    }

    fn direct(&self) -> Target {
        Target {
            host: "127.0.0.1".to_owned(),
            port: self.server.port(),
            user: "postgres".to_owned(),
            password: String::new(),
            database: "postgres".to_owned(),
        }
    }

    /// Runs everything tick by tick; `between` moves the primary behind a tick, or does nothing.
    async fn run(
        &self,
        runs: &[Placed],
        between: impl AsyncFn(&Subject, usize) -> Result<bool>,
    ) -> Result<Vec<History>> {
        let locks = Locks {
            subject: Some(&self.subject),
            server: &self.server,
            client: Mutex::new(None),
        };
        let target = self.subject.target();
        let start = runs.iter().enumerate().map(async |(number, placed)| {
            let schema = format!("r{number}");
            Run::start(placed.schedule, placed.level, &schema, target).await
        });
        let mut running = try_join_all(start).await?;
        let last = runs.iter().map(|p| p.begins + p.schedule.steps.len());
        for tick in 0..last.max().unwrap_or(0) {
            let mine = |placed: &Placed| tick.checked_sub(placed.begins);
            let step = running
                .iter_mut()
                .zip(runs)
                .map(async |(run, placed)| match mine(placed) {
                    Some(at) => run.step(at, &locks).await,
                    None => Ok(()),
                });
            try_join_all(step).await?;
            if between(&self.subject, tick).await? {
                *locks.client.lock().await = None;
                let settle = running.iter_mut().zip(runs).map(async |(run, placed)| {
                    let at = mine(placed).map_or(0, |at| at + 1);
                    run.settle(at, &locks).await
                });
                try_join_all(settle).await?;
            }
        }
        let finish = running.into_iter().map(|run| run.finish(&locks));
        try_join_all(finish).await
    }

    async fn judge(&self, runs: &[Placed], histories: &[History]) -> Result<Vec<String>> {
        let locks = Locks {
            subject: None,
            server: &self.server,
            client: Mutex::new(None),
        };
        let target = self.direct();
        let judge = runs.iter().zip(histories).map(async |(placed, history)| {
            let Placed {
                schedule,
                level,
                begins,
            } = placed;
            let schema = format!("{}_{begins}", schedule.name);
            let wrong = allowed(*schedule, level, &schema, history, &target, &locks).await?;
            let name = schedule.name;
            Ok::<_, Box<dyn std::error::Error + Send + Sync>>(
                wrong.map(|wrong| format!("{name} at {level}, begun at {begins}: {wrong}")),
            )
        });
        let judged: Vec<_> = stream::iter(judge)
            .buffer_unordered(SIDE_BY_SIDE)
            .try_collect()
            .await?;
        let problems = judged.into_iter().flatten().collect();
        Ok(problems)
    }
}

fn everything(begins: impl Fn(&str, Schedule) -> Option<usize>) -> Vec<Placed> {
    let all = SCHEDULES
        .iter()
        .flat_map(|s| LEVELS.map(|level| (*s, level)));
    let place = |(schedule, level)| {
        Some(Placed {
            schedule,
            level,
            begins: begins(level, schedule)?,
        })
    };
    all.filter_map(place).collect()
}

fn outcome(problems: Vec<String>) -> std::result::Result<(), Shown> {
    if problems.is_empty() {
        return Ok(());
    }
    let problems: Box<dyn std::error::Error + Send + Sync> = problems.join("\n").into();
    Err(problems.into())
}

/// Schedules in which somebody was aborted at the levels where a move hardly shows.
fn aborted(runs: &[Placed], histories: &[History]) -> BTreeSet<&'static str> {
    let weak = runs.iter().zip(histories);
    let weak = weak.filter(|(p, _)| p.level.starts_with("read"));
    let aborted = weak.filter(|(_, h)| h.answers.iter().any(|a| matches!(a, Answer::Error(_))));
    aborted.map(|(placed, _)| placed.schedule.name).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_move() -> std::result::Result<(), Shown> {
    let bench = Bench::start().await?;
    let runs = everything(|_, _| Some(0));
    let histories = bench.run(&runs, async |_, _| Ok(false)).await?;
    let problems = bench.judge(&runs, &histories).await?;
    bench.subject.stop().await;
    outcome(problems)
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_switchover_between_every_two_steps() -> std::result::Result<(), Shown> {
    let bench = Bench::start().await?;
    let runs = everything(|_, _| Some(0));
    let moved = async |subject: &Subject, tick: usize| {
        // Behind the last step there is nothing to move.
        let inside = SCHEDULES.iter().any(|s| tick + 1 < s.steps.len());
        if inside {
            subject.move_primary(Move::Planned).await?;
        }
        Ok(inside)
    };
    let histories = bench.run(&runs, moved).await?;
    let mut problems = bench.judge(&runs, &histories).await?;
    // The number of rows that somebody has seen changed, or what was read behind a write.
    let may = [
        "circular_information_flow",
        "phantom",
        "serialisation_failure",
    ];
    if aborted(&runs, &histories) != BTreeSet::from(may) {
        let names = aborted(&runs, &histories);
        problems.push(format!("aborted under READ COMMITTED: {names:?}"));
    }
    bench.subject.stop().await;
    outcome(problems)
}

/// Every schedule is hit by a crash behind each of its steps, over a few crashes: copies of it
/// begin at different ticks, so that one crash finds them at different steps.
#[tokio::test(flavor = "multi_thread")]
async fn with_a_crash_behind_each_step() -> std::result::Result<(), Shown> {
    const CRASHES: usize = 4;
    const LONGEST: usize = 10;
    let bench = Bench::start().await?;
    let mut problems = Vec::new();
    for round in 0..CRASHES {
        let mut runs = Vec::new();
        for step in (round..LONGEST).step_by(CRASHES) {
            runs.extend(everything(|level, schedule| {
                // PostgreSQL runs READ UNCOMMITTED as READ COMMITTED.
                let wanted = level != LEVELS[0] && step + 1 < schedule.steps.len();
                wanted.then_some(LONGEST - step)
            }));
        }
        let crash = async |subject: &Subject, tick: usize| {
            if tick == LONGEST {
                subject.move_primary(Move::Crash).await?;
            }
            Ok(tick == LONGEST)
        };
        let histories = bench.run(&runs, crash).await?;
        problems.extend(bench.judge(&runs, &histories).await?);
    }
    bench.subject.stop().await;
    outcome(problems)
}
