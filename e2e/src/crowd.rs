//! Many sessions at several proxies over one move: half of them in a transaction, some of those in
//! the queue for a lock that a session of another proxy holds, the rest about to do new work.
//!
//! Judged by what each client was told and what the table holds. Every session has a row of its own
//! (`crowd`), and takes ids from one sequence (`taken`). In the way of each session in the queue is
//! one of the next proxy: whoever came first has to stay first.

use std::time::{Duration, Instant};

use tokio::task::JoinHandle;
use tokio_postgres::{Client, Config};

use crate::Result;
use crate::ledger::connect;

/// How long one statement may take: far longer than a move.
const LIMIT: Duration = Duration::from_secs(60);

/// Of a proxy's sessions in a transaction, so many have one of another proxy wait for their row.
const QUEUE: usize = 10;

/// Connected sessions, before the move.
#[derive(Debug)]
pub struct Crowd {
    config: Config,
    inside: Vec<Inside>,
    queue: Vec<JoinHandle<Result<i64>>>,
    idle: Vec<Client>,
}

/// A session in a transaction, with what it saw.
#[derive(Debug)]
struct Inside {
    client: Client,
    row: i32,
    ids: Vec<i64>,
}

/// What came of it.
#[derive(Debug)]
pub struct Outcome {
    /// Sessions.
    pub sessions: usize,
    /// How long the statements of sessions that were to do new work took, longest last.
    pub waits: Vec<Duration>,
}

async fn within<T>(
    what: impl Future<Output = std::result::Result<T, tokio_postgres::Error>>,
) -> Result<T> {
    let done = tokio::time::timeout(LIMIT, what).await;
    Ok(done.map_err(|_| format!("no answer within {LIMIT:?}"))??)
}

impl Crowd {
    /// Opens `each` sessions at every proxy, half of them in a transaction.
    pub async fn gather(service: &Config, proxies: &[Config], each: usize) -> Result<Self> {
        connect(service)
            .await?
            .batch_execute(
                "drop table if exists crowd, taken; \
                 create table crowd (row int primary key, log text not null default ''); \
                 create table taken (id bigserial primary key, row int, inside bool)",
            )
            .await?;
        let fill = "insert into crowd select n from generate_series(0, $1::int - 1) n";
        let rows = i32::try_from(each * proxies.len())?;
        connect(service).await?.execute(fill, &[&rows]).await?;
        let (mut inside, mut idle) = (Vec::new(), Vec::new());
        let mut row = 0;
        for proxy in proxies {
            for number in 0..each {
                let client = connect(proxy).await?;
                if number % 2 == 0 {
                    inside.push(begin(client, row).await?);
                    row += 1;
                } else {
                    idle.push(client);
                }
            }
        }
        let queue = queue(&inside, proxies).await?;
        Ok(Self {
            config: service.clone(),
            inside,
            queue,
            idle,
        })
    }

    /// How many wait for a lock must be so many, before the move begins.
    pub async fn waiting(&self) -> Result<i64> {
        let sql = "select count(*) from pg_stat_activity where wait_event_type = 'Lock'";
        let client = connect(&self.config).await?;
        Ok(client.query_one(sql, &[]).await?.get(0))
    }

    /// How many are in the queue.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.queue.len()
    }

    /// New work in every idle session, again and again, while `during` runs; then the transactions
    /// are ended, and everything is compared.
    pub async fn settle(self, during: impl Future<Output = Result<()>>) -> Result<Outcome> {
        let sessions = self.inside.len() + self.queue.len() + self.idle.len();
        let stop = tokio_util::sync::CancellationToken::new();
        let work: Vec<_> = self
            .idle
            .into_iter()
            .map(|client| tokio::spawn(work(client, stop.clone())))
            .collect();
        let moved = during.await;
        stop.cancel();
        moved?;
        let (mut ids, mut waits) = (Vec::new(), Vec::new());
        for task in work {
            let (its, slowest) = task.await??;
            ids.extend(its);
            waits.push(slowest);
        }
        for mut one in self.inside {
            one.go_on().await?;
            ids.extend(one.ids);
        }
        for task in self.queue {
            ids.push(task.await??);
        }
        compare(&self.config, ids).await?;
        waits.sort();
        Ok(Outcome { sessions, waits })
    }
}

async fn take(client: &Client, row: i32, inside: bool) -> Result<i64> {
    let insert = "insert into taken (row, inside) values ($1, $2) returning id";
    let taken = within(client.query_one(insert, &[&row, &inside])).await?;
    Ok(taken.get(0))
}

async fn begin(client: Client, row: i32) -> Result<Inside> {
    within(client.batch_execute("begin")).await?;
    let ids = vec![
        take(&client, row, true).await?,
        take(&client, row, true).await?,
    ];
    let update = "update crowd set log = log || 'a' where row = $1 returning log";
    let log: String = within(client.query_one(update, &[&row])).await?.get(0);
    if log != "a" {
        return Err(format!("row {row} holds \"{log}\" before anybody was there").into());
    }
    Ok(Inside { client, row, ids })
}

impl Inside {
    /// Goes on where it was, and commits.
    async fn go_on(&mut self) -> Result<()> {
        let read = "select log from crowd where row = $1";
        let log: String = within(self.client.query_one(read, &[&self.row]))
            .await?
            .get(0);
        if log != "a" {
            return Err(format!("row {}: \"{log}\" in place of its own", self.row).into());
        }
        self.ids.push(take(&self.client, self.row, true).await?);
        within(self.client.batch_execute("commit")).await?;
        Ok(())
    }
}

/// Sessions that wait for a row of a session at another proxy: in a transaction, too.
async fn queue(inside: &[Inside], proxies: &[Config]) -> Result<Vec<JoinHandle<Result<i64>>>> {
    let mut queue = Vec::new();
    let each = inside.len() / proxies.len();
    for (at, proxy) in proxies.iter().enumerate() {
        let other = (at + 1) % proxies.len();
        for one in inside.iter().skip(other * each).take(QUEUE) {
            let (client, row) = (connect(proxy).await?, one.row);
            within(client.batch_execute("begin")).await?;
            let id = take(&client, row, true).await?;
            queue.push(tokio::spawn(async move {
                let update = "update crowd set log = log || 'b' where row = $1 returning log";
                let log: String = within(client.query_one(update, &[&row])).await?.get(0);
                if log != "ab" {
                    return Err(format!("row {row}: \"{log}\" where \"ab\" belongs").into());
                }
                within(client.batch_execute("commit")).await?;
                Ok(id)
            }));
        }
    }
    Ok(queue)
}

/// Single statements until `stop`; the ids, and the longest wait.
async fn work(
    client: Client,
    stop: tokio_util::sync::CancellationToken,
) -> Result<(Vec<i64>, Duration)> {
    let (mut ids, mut slowest) = (Vec::new(), Duration::ZERO);
    while !stop.is_cancelled() {
        let began = Instant::now();
        ids.push(take(&client, -1, false).await?);
        slowest = slowest.max(began.elapsed());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok((ids, slowest))
}

/// The table holds exactly the ids that clients were told, and every row what was done to it.
async fn compare(config: &Config, mut told: Vec<i64>) -> Result<()> {
    let client = connect(config).await?;
    let mut problems = Vec::new();
    let rows = client
        .query("select id from taken order by id", &[])
        .await?;
    let found: Vec<i64> = rows.iter().map(|row| row.get(0)).collect();
    told.sort_unstable();
    if found != told {
        let missing: Vec<_> = told.iter().filter(|id| !found.contains(id)).collect();
        let untold: Vec<_> = found.iter().filter(|id| !told.contains(id)).collect();
        let twice = told.windows(2).filter(|pair| pair[0] == pair[1]).count();
        problems.push(format!(
            "lost {missing:?}, not told {untold:?}, told twice {twice}"
        ));
    }
    let wrong = "select count(*) from crowd where log not in ('', 'a', 'ab')";
    let wrong: i64 = client.query_one(wrong, &[]).await?.get(0);
    if wrong > 0 {
        problems.push(format!(
            "{wrong} rows hold something else than was done to them"
        ));
    }
    match problems.is_empty() {
        true => Ok(()),
        false => Err(problems.join("; ").into()),
    }
}
