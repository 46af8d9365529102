//! Moves of the primary on real servers: promotion and its evidence, every way of rejoining.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)] // a test fails by panicking

mod common;

use common::{At, FIRST, Node, crash, folder, follow, insert, numbers, pair, shows};
use helios_agent::client::ClientError;
use helios_api::agent::{AgentCommand, AgentError, AgentReply, InstanceState, Rejoin, StopMode};
use helios_api::control::Fence;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clean_switchover_and_direct_rejoin_there_and_back() {
    let dir = folder();
    let (a, b) = pair(dir.path()).await;
    insert(&a, 1).await;
    let synchronous = AgentCommand::SetSynchronous {
        standbys: vec!["b".parse().unwrap()],
        number: 1,
    };
    a.command(1, synchronous).await;
    insert(&a, 2).await;
    let state = a
        .reach(|s| matches!(s, InstanceState::Primary { standbys, .. } if standbys.iter().any(|s| s.synchronous)))
        .await;
    assert!(
        matches!(state.instance, InstanceState::Primary { standbys, .. } if standbys[0].name == "b")
    );
    // What the old primary handed out last, for the fence.
    let last: i64 = xid(&a).await;
    a.command(1, AgentCommand::Checkpoint).await;
    let began = std::time::Instant::now();
    let reply = a
        .command(
            1,
            AgentCommand::Fence {
                mode: StopMode::Fast,
            },
        )
        .await;
    println!("fast stop {:?}", began.elapsed());
    let AgentReply::Positions { end, .. } = reply else {
        panic!("{reply:?}")
    };
    assert!(common::processes(&a.config).is_empty());
    let (fence, micros) = b.promote(2).await;
    println!("promoted in {micros} us");
    assert!(fence.fork >= end, "{fence:?} {end}");
    // Every id of the old primary lies below, and new ones start there.
    let first = u64::try_from(xid(&b).await).unwrap();
    let bound = fence.xid.expect("proven").0;
    assert!(
        u64::try_from(last).unwrap() < bound && bound <= first,
        "{last} {bound} {first}"
    );
    insert(&b, 3).await;
    // The same command gets the same answer.
    assert_eq!(b.promote(2).await.0, fence);

    assert_eq!(a.follow(2, &b, &At::from(&fence)).await, Rejoin::Direct);
    shows(&a, &[1, 2, 3]).await;
    insert(&b, 4).await;
    shows(&a, &[1, 2, 3, 4]).await;
    // Again is no harm.
    assert_eq!(a.follow(2, &b, &At::from(&fence)).await, Rejoin::Direct);

    b.command(
        2,
        AgentCommand::Fence {
            mode: StopMode::Fast,
        },
    )
    .await;
    let (back, micros) = a.promote(3).await;
    println!("promoted back in {micros} us");
    assert_eq!(back.timeline.0, 3);
    assert!(back.xid.is_some());
    assert_eq!(b.follow(3, &a, &At::from(&back)).await, Rejoin::Direct);
    insert(&a, 5).await;
    shows(&b, &[1, 2, 3, 4, 5]).await;
    a.stop().await;
    b.stop().await;
}

async fn xid(node: &Node) -> i64 {
    let sql = node.sql().await;
    let row = sql
        .query_one("select pg_current_xact_id()::text::bigint", &[])
        .await
        .unwrap();
    row.get(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crashed_primary_with_commits_of_its_own_is_rewound() {
    let dir = folder();
    let (a, b) = pair(dir.path()).await;
    insert(&a, 1).await;
    shows(&b, &[1]).await;
    let (fence, _) = diverge(&a, &b, 2).await;
    insert(&b, 3).await;
    let how = a.follow(2, &b, &At::from(&fence)).await;
    assert_eq!(how, Rejoin::Rewound);
    shows(&a, &[1, 3]).await;
    insert(&b, 4).await;
    shows(&a, &[1, 3, 4]).await;
    // Whole enough to take over.
    b.command(
        2,
        AgentCommand::Fence {
            mode: StopMode::Fast,
        },
    )
    .await;
    a.promote(3).await;
    insert(&a, 5).await;
    assert_eq!(numbers(&a).await, [1, 3, 4, 5]);
}

/// Cuts `b` off, commits on `a` what nobody else has, kills `a`, promotes `b`.
async fn diverge(a: &Node, b: &Node, epoch: u64) -> (Fence, u64) {
    b.command(epoch, AgentCommand::StopReceiver).await;
    let lost = a.sql().await;
    lost.batch_execute("insert into t select 1000 + i from generate_series(1, 500) i")
        .await
        .unwrap();
    crash(a);
    a.reach(|s| matches!(s, InstanceState::Stopped { crashed: true, .. }))
        .await;
    assert!(common::processes(&a.config).is_empty());
    b.promote(epoch).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_fence_tells_lost_commits_from_new_ones() {
    let dir = folder();
    let (a, b) = pair(dir.path()).await;
    let kept = xid(&a).await;
    insert(&a, 1).await;
    shows(&b, &[1]).await;
    b.command(2, AgentCommand::StopReceiver).await;
    let mut lost = Vec::new();
    for n in 0..20 {
        insert(&a, 100 + n).await;
        lost.push(xid(&a).await);
    }
    a.command(
        2,
        AgentCommand::Fence {
            mode: StopMode::Immediate,
        },
    )
    .await;
    let (fence, _) = b.promote(2).await;
    let bound = i64::try_from(fence.xid.expect("proven").0).unwrap();
    assert!(kept < bound, "{kept} {bound}");
    assert!(lost.iter().all(|xid| *xid >= bound), "{lost:?} {bound}");
    // The ids are handed out again, and "committed" without the fence would be a lie.
    for n in 0..60 {
        insert(&b, n).await;
    }
    let row = b
        .sql()
        .await
        .query_one(
            "select pg_xact_status($1::text::xid8)",
            &[&lost[0].to_string()],
        )
        .await
        .unwrap();
    assert_eq!(row.get::<_, &str>(0), "committed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_rewound_is_cloned() {
    let dir = folder();
    let (a, b) = pair(dir.path()).await;
    insert(&a, 1).await;
    shows(&b, &[1]).await;
    let (fence, _) = diverge(&a, &b, 2).await;
    // The WAL that pg_rewind would read is gone.
    for entry in std::fs::read_dir(a.config.data_dir.join("pg_wal"))
        .unwrap()
        .flatten()
    {
        if entry.file_type().unwrap().is_file() {
            std::fs::write(entry.path(), vec![0; 1 << 20]).unwrap();
        }
    }
    let how = a.follow(2, &b, &At::from(&fence)).await;
    assert_eq!(how, Rejoin::Cloned);
    insert(&b, 2).await;
    shows(&a, &[1, 2]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stale_and_fenced_commands_are_refused() {
    let dir = folder();
    let (a, b) = pair(dir.path()).await;
    let stale = a.try_command(0, AgentCommand::Checkpoint).await;
    assert!(
        matches!(stale, Err(ClientError::Agent(AgentError::Stale { .. }))),
        "{stale:?}"
    );
    a.command(
        1,
        AgentCommand::Fence {
            mode: StopMode::Fast,
        },
    )
    .await;
    assert!(a.state().await.fenced);
    let refused = a.try_command(1, AgentCommand::StartPrimary).await;
    assert!(
        matches!(refused, Err(ClientError::Agent(AgentError::Refused { .. }))),
        "{refused:?}"
    );
    assert!(common::processes(&a.config).is_empty());
    // Of a later epoch it is an order.
    a.command(2, AgentCommand::StartPrimary).await;
    assert!(!a.state().await.fenced);
    let foreign = b
        .try_command(
            2,
            follow(
                &a,
                &At {
                    fork: Some(helios_api::Lsn(1)),
                    ..FIRST
                },
            ),
        )
        .await;
    assert!(foreign.is_err(), "{foreign:?}");
    // A primary does not become one by promotion, and a standby does not start as one.
    assert!(b.try_command(2, AgentCommand::StartPrimary).await.is_err());
    a.stop().await;
    b.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_third_instance_is_repointed_without_a_restart() {
    let dir = folder();
    let (a, b) = pair(dir.path()).await;
    let c = Node::start(dir.path(), "c").await;
    c.follow(1, &a, &FIRST).await;
    insert(&a, 1).await;
    shows(&b, &[1]).await;
    shows(&c, &[1]).await;
    a.command(
        1,
        AgentCommand::Fence {
            mode: StopMode::Immediate,
        },
    )
    .await;
    let (fence, _) = b.promote(2).await;
    let before = c.postmaster();
    assert_eq!(c.follow(2, &b, &At::from(&fence)).await, Rejoin::Direct);
    assert_eq!(c.postmaster(), before);
    insert(&b, 2).await;
    shows(&c, &[1, 2]).await;
    let state = c
        .reach(|s| matches!(s, InstanceState::Standby { timeline, .. } if timeline.0 == 2))
        .await;
    assert!(matches!(
        state.instance,
        InstanceState::Standby {
            heard_ms: Some(_),
            ..
        }
    ));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn how_long_promotions_take() {
    let dir = folder();
    let (mut a, mut b) = pair(dir.path()).await;
    let mut at;
    for epoch in 1..16 {
        insert(&a, i32::try_from(epoch).unwrap()).await;
        a.command(epoch, AgentCommand::Checkpoint).await;
        let began = std::time::Instant::now();
        let mode = match epoch % 2 {
            0 => StopMode::Fast,
            _ => StopMode::Halt,
        };
        a.command(epoch, AgentCommand::Fence { mode }).await;
        let fenced = began.elapsed();
        let (fence, micros) = b.promote(epoch + 1).await;
        let promoted = began.elapsed() - fenced;
        at = At::from(&fence);
        let began = std::time::Instant::now();
        let how = a.follow(epoch + 1, &b, &at).await;
        println!(
            "fence {fenced:?} promote {promoted:?} ({micros} us) proven {} rejoin {how:?} {:?}",
            fence.xid.is_some(),
            began.elapsed()
        );
        std::mem::swap(&mut a, &mut b);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_fence_is_right_for_every_transaction_of_a_crash_under_load() {
    let dir = folder();
    let (a, b) = pair(dir.path()).await;
    let mut writers = Vec::new();
    for writer in 0..8 {
        let sql = a.sql().await;
        writers.push(tokio::spawn(async move {
            let mut made = Vec::new();
            for i in 0.. {
                let n: i32 = writer * 1_000_000 + i;
                let statement = "insert into t values ($1) returning pg_current_xact_id()::text";
                if sql.batch_execute("begin").await.is_err() {
                    break;
                }
                let Ok(row) = sql.query_one(statement, &[&n]).await else {
                    break;
                };
                made.push((n, row.get::<_, String>(0)));
                if sql.batch_execute("commit").await.is_err() {
                    break;
                }
            }
            made
        }));
    }
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    crash(&a);
    let (fence, _) = b.promote(2).await;
    a.command(
        2,
        AgentCommand::Fence {
            mode: StopMode::Immediate,
        },
    )
    .await;
    let bound = fence.xid.expect("proven").0;
    // Ids are handed out again before anybody asks.
    let sql = b.sql().await;
    for _ in 0..200 {
        sql.batch_execute("insert into t values (-1)")
            .await
            .unwrap();
    }
    let held: std::collections::HashSet<i32> = numbers(&b).await.into_iter().collect();
    let (mut committed, mut lost) = (0, 0);
    for writer in writers {
        for (n, xid) in writer.await.unwrap() {
            let ruled = xid.parse::<u64>().unwrap() < bound && {
                let status = "select pg_xact_status($1::text::xid8) = 'committed'";
                let row = sql.query_one(status, &[&xid]).await.unwrap();
                row.get::<_, bool>(0)
            };
            assert_eq!(ruled, held.contains(&n), "{n} {xid} {bound}");
            if ruled { committed += 1 } else { lost += 1 }
        }
    }
    println!("committed {committed}, not {lost}");
    assert!(committed > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_instance_says_how_far_its_wal_goes() {
    let dir = folder();
    let (a, b) = pair(dir.path()).await;
    insert(&a, 1).await;
    shows(&b, &[1]).await;
    let survey =
        async |node: &Node, epoch: u64| match node.command(epoch, AgentCommand::Survey).await {
            AgentReply::Held {
                standby,
                torn: false,
                timeline,
                end,
            } => (standby, timeline.0, end),
            other => panic!("{other:?}"),
        };
    let refused = a.try_command(1, AgentCommand::Survey).await;
    assert!(refused.is_err(), "{refused:?}");
    // A new timeline that nobody has made a checkpoint on.
    let (fence, _) = diverge(&a, &b, 2).await;
    insert(&b, 2).await;
    let sql = b.sql().await;
    let row = sql
        .query_one("select pg_current_wal_flush_lsn()::text", &[])
        .await
        .unwrap();
    let flushed: helios_api::Lsn = row.get::<_, &str>(0).parse().unwrap();
    crash(&b);
    b.reach(|s| matches!(s, InstanceState::Stopped { crashed: true, .. }))
        .await;
    let (old, new) = (survey(&a, 2).await, survey(&b, 2).await);
    assert_eq!((old.0, old.1, new.0, new.1), (false, 1, false, 2));
    // The last record ends there, or is followed by one of the server's own.
    assert!(new.2 > fence.fork, "{new:?} {fence:?}");
    assert!(new.2.0 + 1024 > flushed.0, "{new:?} {flushed}");
    // A standby that is stopped: as far as its primary, on the same timeline.
    b.command(3, AgentCommand::StartPrimary).await;
    let at = At::from(&fence);
    a.follow(3, &b, &at).await;
    insert(&b, 3).await;
    shows(&a, &[1, 2, 3]).await;
    let stop = AgentCommand::Fence {
        mode: StopMode::Immediate,
    };
    b.command(3, stop.clone()).await;
    a.command(3, stop).await;
    let (standby, primary) = (survey(&a, 3).await, survey(&b, 3).await);
    assert_eq!((standby.0, standby.1, primary.0), (true, 2, false));
    // It may be some records short of what nobody was told of.
    assert!(
        standby.2 > new.2 && standby.2 <= primary.2,
        "{standby:?} {primary:?}"
    );
    // Alone it is enough to go on from: it is started and promoted, and holds everything.
    a.command(4, AgentCommand::StartStandby).await;
    a.promote(4).await;
    assert_eq!(numbers(&a).await, [1, 2, 3]);
    a.stop().await;
    b.stop().await;
}
