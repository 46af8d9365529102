//! Faults between the proxy and a server: a go-between on the server's Unix socket that cuts,
//! holds, slows or refuses connections.
//!
//! The server's socket file is moved aside and a listener of ours takes its place, so that nothing
//! of the product knows of it. When the server starts anew it makes a new file, which is moved
//! aside again; whoever connects in between meets the server itself, unless the file that was moved
//! is a link to the server's own ([`crate::pg::PgServer`]). What a connection is for is read from
//! its start-up packet.

use std::io::Result;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::frames::{Counter, Unit};

/// How often the socket's file is looked at.
const WATCH: Duration = Duration::from_millis(5);
/// Longest start-up packet, as PostgreSQL has it.
const MAX_STARTUP: usize = 10_000;

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// A session of a client's.
    Session,
    /// The proxy's own questions, the controller's, cancel requests.
    Service,
    /// An agent on its own machine.
    Agent,
    /// A standby.
    Replication,
}

/// Way of the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Requests.
    ToServer,
    /// Answers.
    FromServer,
}

/// An order to cut sessions off.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cut {
    /// Counted are the bytes that go this way.
    pub way: Way,
    /// What is counted.
    pub unit: Unit,
    /// So many pass, from now on, then both sides are closed.
    pub after: u64,
}

/// What holds for connections now. The default lets everything through.
#[derive(Debug, Clone, Default)]
pub struct Rules {
    /// Nothing passes, in either way, and nobody is told: half-open.
    pub hold: Vec<Class>,
    /// New ones are closed at once.
    pub refuse: Vec<Class>,
    /// Each piece of data of a session is this late.
    pub delay: Duration,
    /// Sessions are cut off or stopped; counted from when the order was given.
    pub cut: Option<Arc<Order>>,
    /// How many pieces of data were late for one of these rules.
    touched: Arc<AtomicUsize>,
    /// How often connections of a class were closed: those that were opened before the last time
    /// are.
    closings: [usize; 4],
}

impl Rules {
    fn closings(&self, class: Class) -> usize {
        self.closings[class as usize]
    }
}

/// What becomes of a session that an order is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    /// Both sides are closed.
    Close,
    /// What follows waits for [`Order::release`].
    Wait,
}

/// A [`Cut`] with the number of sessions that it is for.
#[derive(Debug)]
pub struct Order {
    cut: Cut,
    victims: AtomicUsize,
    then: Then,
    /// Type of the last message before each hit.
    hits: watch::Sender<Vec<Option<u8>>>,
    released: watch::Sender<bool>,
}

impl Order {
    /// For the first `victims` sessions that get there.
    #[must_use]
    pub fn new(cut: Cut, victims: usize) -> Arc<Self> {
        Self::with(cut, victims, Then::Close)
    }

    /// The same, but sessions are not closed: what they send further on waits until
    /// [`Self::release`], so that something can be done at exactly this message.
    #[must_use]
    pub fn waiting(cut: Cut, victims: usize) -> Arc<Self> {
        Self::with(cut, victims, Then::Wait)
    }

    fn with(cut: Cut, victims: usize, then: Then) -> Arc<Self> {
        Arc::new(Self {
            cut,
            victims: AtomicUsize::new(victims),
            then,
            hits: watch::channel(Vec::new()).0,
            released: watch::channel(false).0,
        })
    }

    /// One entry for each session that got there: the type of the last message that passed.
    #[must_use]
    pub fn hits(&self) -> Vec<Option<u8>> {
        self.hits.borrow().clone()
    }

    /// Waits until a session has got there; cancel it to give up.
    pub async fn hit(&self) {
        // The sender is ours: it does not go away.
        let _ = self
            .hits
            .subscribe()
            .wait_for(|hits| !hits.is_empty())
            .await;
    }

    /// Lets those that wait go on.
    pub fn release(&self) {
        self.released.send_replace(true);
    }

    fn claim(&self) -> bool {
        let one_less = |left: usize| left.checked_sub(1);
        self.victims
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less)
            .is_ok()
    }

    /// A session has got there; whether it may go on now.
    async fn carried_out(&self, last: Option<u8>) -> bool {
        self.hits.send_modify(|hits| hits.push(last));
        match self.then {
            Then::Close => false,
            Then::Wait => self.released.subscribe().wait_for(|r| *r).await.is_ok(),
        }
    }
}

/// A socket with us in between, until [`Self::remove`].
#[derive(Debug)]
pub struct Interposed {
    path: PathBuf,
    rules: watch::Sender<Rules>,
    task: JoinHandle<()>,
    gone: Gone,
}

/// Whether the place has been given back; held while files are moved, so that a task which is being
/// aborted takes it no more.
type Gone = Arc<Mutex<bool>>;

impl Interposed {
    /// Takes the place of the socket at `path`.
    ///
    /// # Errors
    /// There is no socket, or the folder is not ours to change.
    pub fn install(path: &Path) -> Result<Self> {
        let (rules, seen) = watch::channel(Rules::default());
        let (listener, inode) = take_place(path)?;
        let gone = Gone::default();
        let place = (path.to_owned(), Arc::clone(&gone));
        let task = tokio::spawn(serve(place, listener, inode, seen));
        Ok(Self {
            path: path.to_owned(),
            rules,
            task,
            gone,
        })
    }

    /// Changes what holds from now on.
    pub fn set(&self, change: impl FnOnce(&mut Rules)) {
        self.rules.send_modify(change);
    }

    /// Closes all connections of a class that are open now; what they still held is dropped.
    pub fn close(&self, class: Class) {
        self.set(|rules| rules.closings[class as usize] += 1);
    }

    /// How many pieces of data were held or slowed so far.
    #[must_use]
    pub fn touched(&self) -> usize {
        self.rules.borrow().touched.load(Ordering::Relaxed)
    }

    /// Gives the place back. Open connections go on, and nothing holds them any more.
    pub fn remove(self) {
        self.task.abort();
        self.set(|rules| {
            if let Some(order) = &rules.cut {
                order.release();
            }
            *rules = Rules {
                closings: rules.closings,
                ..Rules::default()
            };
        });
        let mut gone = self.gone.lock().unwrap_or_else(PoisonError::into_inner);
        *gone = true;
        let aside = aside(&self.path);
        if inode(&self.path).is_ok_and(|found| Some(found) == ours(&self.path)) {
            // The server's own file; when it has gone, so has the server.
            if std::fs::rename(&aside, &self.path).is_err() {
                let _ = std::fs::remove_file(&self.path);
            }
        } else {
            let _ = std::fs::remove_file(&aside);
        }
        let _ = std::fs::remove_file(mark(&self.path));
    }
}

fn aside(path: &Path) -> PathBuf {
    path.with_extension("aside")
}

/// Remembers which socket file is ours.
fn mark(path: &Path) -> PathBuf {
    path.with_extension("ours")
}

fn ours(path: &Path) -> Option<u64> {
    std::fs::read_to_string(mark(path)).ok()?.parse().ok()
}

fn inode(path: &Path) -> Result<u64> {
    Ok(std::fs::metadata(path)?.ino())
}

/// Whether the server has done with its file: it sets permissions behind the bind, and fails to
/// start when the file has gone by then. Who is let in is decided later: nothing is said here.
fn listens(path: &Path) -> bool {
    std::os::unix::net::UnixStream::connect(path).is_ok()
}

fn take_place(path: &Path) -> Result<(UnixListener, u64)> {
    std::fs::rename(path, aside(path))?;
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777))?;
    let inode = inode(path)?;
    std::fs::write(mark(path), inode.to_string())?;
    Ok((listener, inode))
}

/// Takes the place of a file that is not `own`: the server has started anew.
fn take_again(path: &Path, own: u64, gone: &Gone) -> Option<(UnixListener, u64)> {
    let gone = gone.lock().unwrap_or_else(PoisonError::into_inner);
    let new = |m: std::fs::Metadata| m.file_type().is_socket() && m.ino() != own;
    let socket = !*gone && std::fs::metadata(path).is_ok_and(new);
    (socket && listens(path))
        .then(|| take_place(path).ok())
        .flatten()
}

async fn serve(
    (path, gone): (PathBuf, Gone),
    mut listener: UnixListener,
    mut own: u64,
    rules: watch::Receiver<Rules>,
) {
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                if let Ok((client, _)) = accepted {
                    // Ends with either side.
                    tokio::spawn(connection(client, aside(&path), rules.clone()));
                }
            }
            () = tokio::time::sleep(WATCH) => {
                if let Some(place) = take_again(&path, own, &gone) {
                    (listener, own) = place;
                }
            }
        }
    }
}

/// Carries one connection; errors are ends like any other.
async fn connection(mut client: UnixStream, real: PathBuf, mut rules: watch::Receiver<Rules>) {
    let Ok((packet, class)) = first_packet(&mut client).await else {
        return;
    };
    let born = rules.borrow().closings(class);
    if rules.borrow().refuse.contains(&class) {
        return;
    }
    let Ok(mut server) = UnixStream::connect(real).await else {
        return;
    };
    if !passes(class, &mut rules).await || server.write_all(&packet).await.is_err() {
        return;
    }
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let side = |way| Side {
        class,
        way,
        rules: rules.clone(),
    };
    let requests = side(Way::ToServer).carry(from_client, to_server);
    let answers = side(Way::FromServer).carry(from_server, to_client);
    let mut closing = rules.clone();
    let closed = async {
        let ordered = closing.wait_for(|r| r.closings(class) > born).await.is_ok();
        if !ordered {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        // One side that ends takes the other with it, as a broken connection does; what was read
        // from it has been passed on.
        () = requests => {}
        () = answers => {}
        () = closed => {}
    }
}

/// Waits while connections of this class are held; `false` when nobody decides any more.
async fn passes(class: Class, rules: &mut watch::Receiver<Rules>) -> bool {
    let free = |rules: &Rules| !rules.hold.contains(&class);
    if !free(&rules.borrow()) {
        rules.borrow().touched.fetch_add(1, Ordering::Relaxed);
    }
    let decided = rules.wait_for(free).await.is_ok();
    // Whoever gave the rules has gone: the last ones hold.
    decided || free(&rules.borrow())
}

/// One way of a connection.
struct Side {
    class: Class,
    way: Way,
    rules: watch::Receiver<Rules>,
}

impl Side {
    async fn carry(mut self, mut from: OwnedReadHalf, mut to: OwnedWriteHalf) {
        let mut buffer = vec![0; 16 << 10];
        let mut counter = Counter::default();
        let mut last: Option<Arc<Order>> = None;
        loop {
            let Ok(length) = from.read(&mut buffer).await else {
                return;
            };
            let Some(mut data) = buffer.get(..length).filter(|d| !d.is_empty()) else {
                return;
            };
            if !passes(self.class, &mut self.rules).await {
                return;
            }
            if self.class != Class::Session {
                if to.write_all(data).await.is_err() {
                    return;
                }
                continue;
            }
            let (delay, order) = {
                let rules = self.rules.borrow();
                if rules.delay > Duration::ZERO {
                    rules.touched.fetch_add(1, Ordering::Relaxed);
                }
                (rules.delay, rules.cut.clone())
            };
            tokio::time::sleep(delay).await;
            let same = |a: &Arc<Order>| order.as_ref().is_some_and(|b| Arc::ptr_eq(a, b));
            if !last.as_ref().is_some_and(same) {
                last = order.filter(|o| o.cut.way == self.way && o.claim());
                counter.limit(last.as_ref().map(|o| (o.cut.unit, o.cut.after)));
            }
            let passing = counter.pass(data);
            let over = passing < data.len() || counter.is_used_up();
            let rest = data.get(passing..).unwrap_or_default();
            data = data.get(..passing).unwrap_or_default();
            if to.write_all(data).await.is_err() {
                return;
            }
            if !over {
                continue;
            }
            let go_on = match &last {
                Some(order) => order.carried_out(counter.last()).await,
                None => true,
            };
            counter.limit(None);
            counter.pass(rest);
            if !go_on || to.write_all(rest).await.is_err() {
                return;
            }
        }
    }
}

/// Reads the start-up packet and what it says of the connection.
async fn first_packet(client: &mut UnixStream) -> Result<(Vec<u8>, Class)> {
    let mut header = [0; 4];
    client.read_exact(&mut header).await?;
    let length = usize::try_from(u32::from_be_bytes(header)).unwrap_or(usize::MAX);
    if !(8..=MAX_STARTUP).contains(&length) {
        return Err(std::io::ErrorKind::InvalidData.into());
    }
    let mut packet = header.to_vec();
    packet.resize(length, 0);
    client.read_exact(&mut packet[4..]).await?;
    let class = class(packet.get(8..).unwrap_or_default());
    Ok((packet, class))
}

fn class(parameters: &[u8]) -> Class {
    let texts: Vec<&[u8]> = parameters.split(|b| *b == 0).collect();
    let value = |name: &[u8]| {
        let mut pairs = texts.chunks_exact(2);
        pairs.find(|pair| pair[0] == name).map(|pair| pair[1])
    };
    match (
        value(b"replication"),
        value(b"application_name"),
        value(b"user"),
    ) {
        (Some(_), _, _) => Class::Replication,
        (_, Some(b"helios-agent"), _) => Class::Agent,
        // The service's own user, and a cancel request, which names nobody.
        (_, _, Some(b"helios") | None) => Class::Service,
        _ => Class::Session,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes() {
        assert_eq!(class(b"user\0app\0database\0app\0\0"), Class::Session);
        assert_eq!(
            class(b"user\0helios\0replication\0true\0\0"),
            Class::Replication
        );
        let agent = b"user\0helios\0application_name\0helios-agent\0\0";
        assert_eq!(class(agent), Class::Agent);
        assert_eq!(
            class(b"user\0helios\0application_name\0helios-proxy\0\0"),
            Class::Service
        );
        assert_eq!(class(b"\0\0\x01\x02\0\0\x03\x04"), Class::Service);
    }

    /// A server that repeats what it is sent, behind its start-up packet.
    fn echo(path: &Path) {
        let listener = UnixListener::bind(path).unwrap();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    first_packet(&mut stream).await.unwrap();
                    let (mut from, mut to) = stream.into_split();
                    let _ = tokio::io::copy(&mut from, &mut to).await;
                });
            }
        });
    }

    async fn connect(path: &Path) -> UnixStream {
        let mut stream = UnixStream::connect(path).await.unwrap();
        let mut packet = 20_u32.to_be_bytes().to_vec();
        packet.extend([0, 3, 0, 0]);
        packet.extend(b"user\0app\0\0\0\0");
        packet.truncate(20);
        stream.write_all(&packet).await.unwrap();
        stream
    }

    async fn echoed(stream: &mut UnixStream, bytes: &[u8]) -> Vec<u8> {
        stream.write_all(bytes).await.unwrap();
        let mut answer = Vec::new();
        let mut one = [0; 64];
        while answer.len() < bytes.len() {
            match stream.read(&mut one).await {
                Ok(n) if n > 0 => answer.extend_from_slice(&one[..n]),
                _ => break,
            }
        }
        answer
    }

    #[tokio::test]
    async fn passes_holds_cuts_and_gives_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(".s.PGSQL.1");
        echo(&path);
        let between = Interposed::install(&path).unwrap();
        let message = [b'Q', 0, 0, 0, 6, b'x', 0];
        let mut stream = connect(&path).await;
        assert_eq!(echoed(&mut stream, &message).await, message);
        // Held: nothing comes, and nothing is closed; later it comes.
        between.set(|r| r.hold = vec![Class::Session]);
        let waiting =
            tokio::time::timeout(Duration::from_millis(50), echoed(&mut stream, &message));
        assert!(waiting.await.is_err());
        between.set(|r| r.hold.clear());
        let mut rest = [0; 7];
        stream.read_exact(&mut rest).await.unwrap();
        assert_eq!(rest, message);
        // Cut behind the second message, for one session only.
        let cut = Cut {
            way: Way::ToServer,
            unit: Unit::Messages,
            after: 2,
        };
        between.set(|r| r.cut = Some(Order::new(cut, 1)));
        let three = [message, message, message].concat();
        let mut other = connect(&path).await;
        assert!(echoed(&mut stream, &three).await.len() <= 14);
        assert_eq!(echoed(&mut other, &three).await, three);
        // Stopped behind the first message: the rest comes when it may, and nothing is closed.
        let stop = Cut {
            way: Way::ToServer,
            unit: Unit::Messages,
            after: 1,
        };
        let order = Order::waiting(stop, 1);
        between.set(|r| r.cut = Some(Arc::clone(&order)));
        let waiting = tokio::time::timeout(Duration::from_millis(50), echoed(&mut other, &three));
        assert!(waiting.await.is_err());
        assert_eq!(order.hits(), [Some(b'Q')]);
        order.release();
        let mut rest = [0; 14];
        other.read_exact(&mut rest).await.unwrap();
        assert_eq!(rest, [message, message].concat()[..]);
        assert_eq!(echoed(&mut other, &three).await, three);
        assert!(between.touched() > 0);
        between.close(Class::Session);
        assert_eq!(other.read(&mut [0; 1]).await.unwrap_or(0), 0);
        between.remove();
        let mut direct = connect(&path).await;
        assert_eq!(echoed(&mut direct, &message).await, message);
        assert!(!aside(&path).exists() && !mark(&path).exists());
    }

    /// A look at the socket that began before it was given back, and ends behind that (seed 20261788 of
    /// the experiments: a server that nobody could connect to any more).
    #[tokio::test]
    async fn what_is_given_back_is_not_taken_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(".s.PGSQL.5432");
        echo(&path);
        let between = Interposed::install(&path).unwrap();
        let (own, gone) = (ours(&path).unwrap(), Arc::clone(&between.gone));
        between.remove();
        assert!(take_again(&path, own, &gone).is_none());
        assert!(listens(&path));
        assert!(!aside(&path).exists() && !mark(&path).exists());
        // Before that, what is not ours is the server's, and is taken.
        *gone.lock().unwrap() = false;
        assert!(take_again(&path, own, &gone).is_some());
    }
}
