//! Faults of the network between the proxy, the standbys and the primary.

use std::collections::BTreeMap;
use std::time::Duration;

use helios_api::{Host, InstanceName};
use helios_testkit::frames::Unit;
use helios_testkit::interpose::{Class, Cut, Interposed, Order, Rules, Way};
use nix::sys::signal::Signal;
use tokio::time::sleep;

use super::Act;
use crate::Result;
use crate::chaos::cluster::Cluster;
use crate::chaos::processes;

/// How long an order to cut waits for sessions that get so far.
const CUT_WINDOW: Duration = Duration::from_millis(500);

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
    pub async fn act(&self, primary: &InstanceName, act: &Act) -> Result<String> {
        let socket = self.sockets.get(primary).ok_or("no go-between")?;
        match act {
            Act::Cut {
                requests,
                messages,
                after,
                victims,
            } => {
                let cut = Cut {
                    way: if *requests {
                        Way::ToServer
                    } else {
                        Way::FromServer
                    },
                    unit: if *messages {
                        Unit::Messages
                    } else {
                        Unit::Bytes
                    },
                    after: *after,
                };
                let what = format!("cut {victims} sessions of {primary}: {cut:?}");
                let order = Order::new(cut, *victims);
                socket.set(|rules| rules.cut = Some(order));
                sleep(CUT_WINDOW).await;
                socket.set(|rules| rules.cut = None);
                Ok(what)
            }
            Act::Hold {
                sessions,
                service,
                replication,
                millis,
                close,
            } => {
                let classes = [
                    (*sessions, Class::Session),
                    (*service, Class::Service),
                    (*replication, Class::Replication),
                ];
                let held = classes.into_iter().filter(|(held, _)| *held);
                let held: Vec<Class> = held.map(|(_, class)| class).collect();
                let what = format!("held {held:?} of {primary}, broken afterwards: {close}");
                socket.set(|rules| rules.hold = held);
                sleep(Duration::from_millis(*millis)).await;
                if *close {
                    socket.close(Class::Session);
                }
                socket.set(|rules| rules.hold.clear());
                Ok(what)
            }
            Act::Slow { delay, millis } => {
                let late = Duration::from_millis(*delay);
                socket.set(|rules: &mut Rules| rules.delay = late);
                sleep(Duration::from_millis(*millis)).await;
                socket.set(|rules| rules.delay = Duration::ZERO);
                Ok(format!("sessions of {primary} were {delay} ms slower"))
            }
            _ => Err("not an act of the network".into()),
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
