//! Faults of the network between the proxy, the standbys and the primary.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use helios_api::{Host, InstanceName};
use helios_testkit::frames::Unit;
use helios_testkit::interpose::{Class, Cut, Interposed, Order, Rules};
use nix::sys::signal::Signal;
use tokio::time::sleep;

use super::inject::Done;
use super::{Act, Mark};
use crate::Result;
use crate::chaos::cluster::Cluster;
use crate::chaos::processes;

/// How long an order to cut waits for sessions that get so far.
const CUT_WINDOW: Duration = Duration::from_millis(500);
/// How long an order to stop a session waits for one that gets so far.
const STOP_WINDOW: Duration = Duration::from_millis(1500);

/// Go-betweens on the sockets of all servers; none when no fault needs them.
#[derive(Debug, Default)]
pub struct Network {
    sockets: BTreeMap<InstanceName, Interposed>,
}

impl Network {
    /// Takes the place of every server's socket, and has the standbys connect anew.
    ///
    /// # Errors
    /// A socket is not there.
    pub async fn install(cluster: &Cluster) -> Result<Self> {
        let status = cluster.status().await?;
        let mut sockets = BTreeMap::new();
        for instance in &status.instances {
            let Host::Unix(folder) = &instance.endpoint.host else {
                return Err(format!("{} has no Unix socket", instance.name).into());
            };
            let path = folder.join(format!(".s.PGSQL.{}", instance.endpoint.port));
            sockets.insert(instance.name.clone(), Interposed::install(&path)?);
        }
        let (primary, _) = cluster.roles().await?;
        if let Some(postmaster) = primary.postmaster_pid {
            let senders = processes::titled(postmaster, "walsender")?;
            processes::signal_all(&senders, Signal::SIGTERM);
        }
        Ok(Self { sockets })
    }

    /// Does one of the acts that are about connections to this primary.
    ///
    /// # Errors
    /// There is no go-between.
    pub async fn act(&self, primary: &InstanceName, act: &Act) -> Result<Done> {
        let socket = self.sockets.get(primary).ok_or("no go-between")?;
        match act {
            Act::Cut {
                requests,
                messages,
                after,
                victims,
            } => {
                let mark = Mark {
                    requests: *requests,
                    after: *after,
                };
                let unit = match *messages {
                    true => Unit::Messages,
                    false => Unit::Bytes,
                };
                Ok(cut(socket, mark, unit, *victims).await)
            }
            Act::Hold { .. } => self.hold(socket, primary, act).await,
            Act::Slow { delay, millis } => {
                let (late, before) = (Duration::from_millis(*delay), socket.touched());
                socket.set(|rules: &mut Rules| rules.delay = late);
                sleep(Duration::from_millis(*millis)).await;
                socket.set(|rules| rules.delay = Duration::ZERO);
                let pieces = socket.touched() - before;
                let what = format!(
                    "sessions of {primary} were {delay} ms slower, {pieces} pieces of data"
                );
                Ok(Done::new(what, pieces > 0))
            }
            _ => Err("not an act of the network".into()),
        }
    }

    async fn hold(&self, socket: &Interposed, primary: &InstanceName, act: &Act) -> Result<Done> {
        let Act::Hold {
            sessions,
            service,
            replication,
            millis,
            close,
            everywhere,
        } = act
        else {
            return Err("not an act of the network".into());
        };
        let classes = [
            (*sessions, Class::Session),
            (*service, Class::Service),
            (*replication, Class::Replication),
        ];
        let held = classes.into_iter().filter(|(held, _)| *held);
        let held: Vec<Class> = held.map(|(_, class)| class).collect();
        let sockets: Vec<&Interposed> = match *everywhere {
            true => self.sockets.values().collect(),
            false => vec![socket],
        };
        let touched = || sockets.iter().map(|s| s.touched()).sum::<usize>();
        let before = touched();
        for socket in &sockets {
            socket.set(|rules| rules.hold = held.clone());
        }
        sleep(Duration::from_millis(*millis)).await;
        for socket in &sockets {
            if *close {
                socket.close(Class::Session);
            }
            socket.set(|rules| rules.hold.clear());
        }
        let (pieces, of) = (touched() - before, sockets.len());
        let what = format!(
            "held {held:?} of {primary}, {of} servers, broken afterwards: {close}, {pieces} pieces of data waited"
        );
        Ok(Done::new(what, pieces > 0))
    }

    /// Waits until a session of this primary has come to a message, and stops it there; `None`
    /// when none has.
    pub(super) async fn stop_at(
        &self,
        primary: &InstanceName,
        mark: Mark,
    ) -> Result<Option<Arc<Order>>> {
        let socket = self.sockets.get(primary).ok_or("no go-between")?;
        let cut = Cut {
            way: mark.way(),
            unit: Unit::Messages,
            after: mark.after,
        };
        let order = Order::waiting(cut, 1);
        socket.set(|rules| rules.cut = Some(Arc::clone(&order)));
        if tokio::time::timeout(STOP_WINDOW, order.hit()).await.is_ok() {
            return Ok(Some(order));
        }
        order.release();
        self.forget_order(primary);
        Ok(None)
    }

    /// The order holds for nobody any more.
    pub(super) fn forget_order(&self, primary: &InstanceName) {
        if let Some(socket) = self.sockets.get(primary) {
            socket.set(|rules| rules.cut = None);
        }
    }

    /// Cuts standbys off from this primary; what is under way to them waits.
    ///
    /// # Errors
    /// There is no go-between.
    pub fn hold_standbys(&self, primary: &InstanceName) -> Result<()> {
        let socket = self.sockets.get(primary).ok_or("no go-between")?;
        socket.set(|rules| rules.hold = vec![Class::Replication]);
        Ok(())
    }

    /// Drops what waits, and lets standbys in again.
    ///
    /// # Errors
    /// There is no go-between.
    pub fn drop_standbys(&self, primary: &InstanceName) -> Result<()> {
        let socket = self.sockets.get(primary).ok_or("no go-between")?;
        socket.close(Class::Replication);
        socket.set(|rules| rules.hold.clear());
        Ok(())
    }

    /// Gives all sockets back.
    pub fn remove(self) {
        self.sockets.into_values().for_each(Interposed::remove);
    }
}

/// Cuts sessions off; whoever has not come so far within the window goes on.
async fn cut(socket: &Interposed, mark: Mark, unit: Unit, victims: usize) -> Done {
    let cut = Cut {
        way: mark.way(),
        unit,
        after: mark.after,
    };
    let order = Order::new(cut.clone(), victims);
    socket.set(|rules| rules.cut = Some(Arc::clone(&order)));
    sleep(CUT_WINDOW).await;
    socket.set(|rules| rules.cut = None);
    let hits = order.hits();
    let what = format!("cut {} of {victims} sessions: {cut:?}", hits.len());
    let names = hits.iter().map(|tag| mark.name(*tag));
    Done::new(what, !hits.is_empty()).at(names)
}
