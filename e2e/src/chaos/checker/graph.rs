//! The dependency graph of transactions and its shortest forbidden cycles.
//!
//! Nodes are numbers; who they are is known to the caller. Edges: `ww` (the next version), `wr`
//! (read what the other wrote), `rw` (read what the other overwrote).

use std::collections::{BTreeMap, VecDeque};

use super::Anomaly;
use crate::chaos::history::Key;

/// Kind of a dependency.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Dependency {
    /// The target wrote the version behind the source's.
    WriteWrite,
    /// The target read what the source wrote.
    WriteRead,
    /// The target overwrote what the source read.
    ReadWrite,
}

/// An edge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Edge {
    /// Comes first.
    pub from: usize,
    /// Comes later.
    pub to: usize,
    /// Why.
    pub kind: Dependency,
    /// On which object.
    pub key: Key,
}

impl Edge {
    fn is_rw(&self) -> bool {
        self.kind == Dependency::ReadWrite
    }
}

/// A cycle, edge by edge; the last one ends where the first begins.
pub type Cycle = Vec<Edge>;

/// Where a search stands, and, where it matters, whether it came there over an anti-dependency.
type State = (usize, bool);
/// From where, and over which edge, a state was first reached.
type Reached = BTreeMap<State, (State, Edge)>;

/// The graph.
#[derive(Debug, Default)]
pub struct Graph {
    edges: BTreeMap<usize, Vec<Edge>>,
}

impl Graph {
    /// Adds a dependency between two different transactions.
    pub fn add(&mut self, edge: Edge) {
        if edge.from != edge.to {
            let list = self.edges.entry(edge.from).or_default();
            if !list.contains(&edge) {
                list.push(edge);
            }
        }
    }

    fn all(&self) -> impl Iterator<Item = &Edge> {
        self.edges.values().flatten()
    }

    fn out(&self, node: usize) -> &[Edge] {
        self.edges.get(&node).map_or(&[], Vec::as_slice)
    }

    /// The shortest cycle of each kind that exists: at most one a kind.
    #[must_use]
    pub fn cycles(&self) -> Vec<(Anomaly, Cycle)> {
        let ww = |e: &Edge| e.kind == Dependency::WriteWrite;
        let information = |e: &Edge| !e.is_rw();
        let mut found = Vec::new();
        if let Some(cycle) = self.shortest(ww, ww, false) {
            found.push((Anomaly::G0, cycle));
        }
        let wr = |e: &Edge| e.kind == Dependency::WriteRead;
        if let Some(cycle) = self.shortest(wr, information, false) {
            found.push((Anomaly::G1c, cycle));
        }
        if let Some(cycle) = self.shortest(Edge::is_rw, information, false) {
            found.push((single_kind(&cycle), cycle));
        } else if let Some(cycle) = self.shortest(Edge::is_rw, |_| true, true) {
            found.push((Anomaly::GNonadjacent, cycle));
        }
        if let Some(cycle) = self.shortest(Edge::is_rw, |_| true, false)
            && cycle.iter().filter(|e| e.is_rw()).count() > 1
        {
            found.push((Anomaly::G2Item, cycle));
        }
        found
    }

    /// The shortest cycle that begins with an edge that `first` takes and goes on over edges that
    /// `rest` takes; `apart`: no two anti-dependencies follow each other.
    fn shortest(
        &self,
        first: impl Fn(&Edge) -> bool,
        rest: impl Fn(&Edge) -> bool,
        apart: bool,
    ) -> Option<Cycle> {
        let mut best: Option<Cycle> = None;
        for start in self.all().filter(|e| first(e)) {
            let limit = best.as_ref().map_or(usize::MAX, Vec::len);
            if let Some(path) = self.path(start, &rest, apart, limit) {
                best = Some(path);
            }
        }
        best
    }

    /// The shortest way back to where `start` begins, if the cycle has fewer than `limit` edges.
    fn path(
        &self,
        start: &Edge,
        rest: &impl Fn(&Edge) -> bool,
        apart: bool,
        limit: usize,
    ) -> Option<Cycle> {
        let state = |e: &Edge| -> State { (e.to, apart && e.is_rw()) };
        let mut before = Reached::new();
        let mut queue = VecDeque::from([(state(start), 1_usize)]);
        while let Some((at, length)) = queue.pop_front() {
            if length + 1 >= limit {
                return None;
            }
            for edge in self.out(at.0).iter().filter(|e| rest(e)) {
                if apart && at.1 && edge.is_rw() {
                    continue;
                }
                let next = state(edge);
                if edge.to == start.from {
                    if apart && edge.is_rw() {
                        continue;
                    }
                    return Some(walk_back(start, state(start), at, edge, &before));
                }
                if next != state(start) && !before.contains_key(&next) {
                    before.insert(next, (at, *edge));
                    queue.push_back((next, length + 1));
                }
            }
        }
        None
    }
}

fn walk_back(start: &Edge, first: State, mut at: State, last: &Edge, before: &Reached) -> Cycle {
    let mut cycle = vec![*last];
    while at != first {
        let Some((previous, edge)) = before.get(&at) else {
            break;
        };
        cycle.push(*edge);
        at = *previous;
    }
    cycle.push(*start);
    cycle.reverse();
    cycle
}

/// Two transactions over one object are the special case that everybody knows by name.
fn single_kind(cycle: &Cycle) -> Anomaly {
    match cycle.as_slice() {
        [a, b] if a.key == b.key && b.kind == Dependency::WriteWrite => Anomaly::LostUpdate,
        _ => Anomaly::GSingle,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Dependency::{ReadWrite as Rw, WriteRead as Wr, WriteWrite as Ww};

    fn kinds(edges: &[(usize, usize, Dependency, Key)]) -> Vec<(Anomaly, usize)> {
        let mut graph = Graph::default();
        for &(from, to, kind, key) in edges {
            graph.add(Edge {
                from,
                to,
                kind,
                key,
            });
        }
        let named = graph.cycles().into_iter();
        named.map(|(kind, cycle)| (kind, cycle.len())).collect()
    }

    #[test]
    fn chains_have_no_cycle() {
        assert_eq!(kinds(&[(1, 2, Ww, 1), (2, 3, Wr, 1), (1, 3, Rw, 2)]), []);
    }

    #[test]
    fn each_cycle_has_its_name() {
        use Anomaly::{G0, G1c, G2Item, GNonadjacent, GSingle, LostUpdate};
        assert_eq!(kinds(&[(1, 2, Ww, 1), (2, 1, Ww, 2)]), [(G0, 2)]);
        assert_eq!(kinds(&[(1, 2, Ww, 1), (2, 1, Wr, 2)]), [(G1c, 2)]);
        assert_eq!(kinds(&[(1, 2, Rw, 1), (2, 1, Wr, 2)]), [(GSingle, 2)]);
        assert_eq!(kinds(&[(1, 2, Rw, 1), (2, 1, Ww, 1)]), [(LostUpdate, 2)]);
        assert_eq!(kinds(&[(1, 2, Rw, 1), (2, 1, Rw, 2)]), [(G2Item, 2)]);
        let apart = [(1, 2, Rw, 1), (2, 3, Wr, 1), (3, 4, Rw, 1), (4, 1, Wr, 1)];
        assert_eq!(kinds(&apart), [(GNonadjacent, 4), (G2Item, 4)]);
    }

    #[test]
    fn the_shortest_one_is_shown() {
        let edges = [
            (1, 2, Rw, 1),
            (2, 3, Wr, 1),
            (3, 1, Wr, 1),
            (7, 8, Rw, 1),
            (8, 7, Wr, 1),
        ];
        assert_eq!(kinds(&edges), [(Anomaly::GSingle, 2)]);
    }
}
