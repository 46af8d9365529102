//! Takes several proxies through the barrier behind a change of primary.
//!
//! What comes next is decided by [`helios_cluster::barrier`]; here are the calls. Every proxy's
//! action ends once that proxy is open, or has failed, whatever the others do.

use std::collections::BTreeMap;
use std::time::Duration;

use helios_api::control::{ResumeReport, Stage, Topology};
use helios_cluster::barrier::{Answer, Barrier, Order};
use helios_cluster::{Action, Failure, Finished, ProxyCommand, Reply};
use tokio::sync::mpsc;

use super::proxies::{Proxies, Said, Way};
use super::view::now;

/// Proxies that are told to go on together: their actions, and the way to each.
#[derive(Debug)]
pub(super) struct Together {
    topology: Topology,
    of: usize,
    members: BTreeMap<String, (Action, Option<Way>)>,
}

/// What one order came to.
type Told = (String, Order, Result<Said, Failure>);

/// Takes those actions out that belong together.
pub(super) fn split(actions: Vec<Action>, proxies: &Proxies) -> (Option<Together>, Vec<Action>) {
    let mut together: Option<Together> = None;
    let mut rest = Vec::new();
    for action in actions {
        let Action::Proxy {
            proxy,
            command: ProxyCommand::Together { topology, of },
        } = &action
        else {
            rest.push(action);
            continue;
        };
        let group = together.get_or_insert_with(|| Together {
            topology: topology.clone(),
            of: *of,
            members: BTreeMap::new(),
        });
        let way = proxies.way(proxy);
        group.members.insert(proxy.clone(), (action, way));
    }
    (together, rest)
}

impl Together {
    /// Runs until every member is open or has failed.
    pub(super) async fn run(mut self, done: mpsc::Sender<Finished>) {
        let names: Vec<String> = self.members.keys().cloned().collect();
        let all = names.len() == self.of;
        let (mut barrier, orders) = Barrier::begin(names, all, now());
        // As many as there can be answers under way.
        let (told, mut answers) = mpsc::channel(self.members.len().max(1));
        self.tell(orders, &told);
        while !barrier.is_over() {
            let left = Duration::from_micros(barrier.due().micros_since(now()));
            let orders = tokio::select! {
                Some((proxy, order, result)) = answers.recv() => {
                    let answer = answer(order, &result);
                    self.end(&proxy, order, result, &done).await;
                    barrier.answered(&proxy, order, answer, now())
                }
                () = tokio::time::sleep(left.max(Duration::from_millis(1))) => barrier.look(now()),
            };
            self.tell(orders, &told);
        }
    }

    fn tell(&self, orders: Vec<(String, Order)>, told: &mpsc::Sender<Told>) {
        for (proxy, order) in orders {
            tracing::debug!(proxy, ?order, "proxies go on together");
            let way = self.members.get(&proxy).and_then(|(_, way)| way.clone());
            let (topology, told) = (self.topology.clone(), told.clone());
            tokio::spawn(async move {
                let result = match way {
                    Some(way) => way.together(order, topology).await,
                    None => Err(Failure::Failed(format!("proxy \"{proxy}\" is gone"))),
                };
                // Nobody listens any more when the barrier is over.
                let _ = told.send((proxy, order, result)).await;
            });
        }
    }

    /// Ends a member's action, if that is what the answer does.
    async fn end(
        &mut self,
        proxy: &str,
        order: Order,
        result: Result<Said, Failure>,
        done: &mpsc::Sender<Finished>,
    ) {
        let result = match (order, result) {
            (_, Err(failure)) => Err(failure),
            (Order::Advance(Stage::Open), Ok(Said::Report(report)))
            | (Order::Gather, Ok(Said::Report(report))) => Ok(Reply::Resumed(report)),
            (Order::Advance(Stage::Open), Ok(Said::Gathered(_))) => {
                Ok(Reply::Resumed(ResumeReport::default()))
            }
            _ => return,
        };
        if let Some((action, _)) = self.members.remove(proxy) {
            // Nobody listens any more when the conductor has ended.
            let _ = done.send(Finished { action, result }).await;
        }
    }
}

fn answer(order: Order, result: &Result<Said, Failure>) -> Answer {
    match (order, result) {
        (_, Err(_)) => Answer::Failed,
        (Order::Gather, Ok(Said::Gathered(gathered))) => Answer::Gathered(*gathered),
        (Order::Gather, Ok(Said::Report(_))) => Answer::Opened,
        (Order::Advance(_), Ok(_)) => Answer::Done,
    }
}
