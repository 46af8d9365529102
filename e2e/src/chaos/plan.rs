//! What an experiment does, decided from its seed alone: workload, level, faults and their times.
//!
//! Pure. The same seed and choices give the same plan; consecutive seeds go round all pairs of
//! workload and fault.

use std::path::Path;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::{Deserialize, Serialize};

use super::cluster::Shape;
use super::fault::{Act, FaultKind};
use super::history::Level;
use super::workload::Workload;
use crate::Result;

/// Larger than the number of pairs and prime: steps of it meet every pair.
const STRIDE: u64 = 7919;

/// What may be drawn from.
#[derive(Debug, Clone)]
pub struct Choices {
    /// Workloads.
    pub workloads: Vec<Workload>,
    /// Faults.
    pub faults: Vec<FaultKind>,
    /// Levels.
    pub levels: Vec<Level>,
    /// Clients of an experiment.
    pub clients: usize,
    /// How long they work.
    pub duration: Duration,
}

/// An act and its time since the clients began.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// In milliseconds.
    pub at_ms: u64,
    /// What.
    pub act: Act,
}

/// An experiment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Its seed.
    pub seed: u64,
    /// What clients do.
    pub workload: Workload,
    /// At which level.
    pub level: Level,
    /// What happens to them.
    pub fault: FaultKind,
    /// When and how.
    pub steps: Vec<Step>,
    /// How many clients.
    pub clients: usize,
    /// How long they work.
    pub duration: Duration,
    /// On which cluster.
    pub shape: Shape,
}

impl Plan {
    /// Reads one from a file: a plan, or the report of an experiment.
    ///
    /// # Errors
    /// The file holds neither.
    pub fn read(file: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(file)?;
        let mut json: serde_json::Value = serde_json::from_str(&text)?;
        if let Some(plan) = json.get_mut("plan") {
            json = plan.take();
        }
        let named = |error| format!("{} holds no plan: {error}", file.display());
        Ok(serde_json::from_value(json).map_err(named)?)
    }

    /// The experiment of a seed; `None` when no choice fits together.
    #[must_use]
    pub fn draw(seed: u64, choices: &Choices) -> Option<Self> {
        let pairs: Vec<(Workload, FaultKind)> = choices
            .faults
            .iter()
            .flat_map(|fault| choices.workloads.iter().map(|w| (*w, *fault)))
            .filter(|(workload, fault)| fault.suits(*workload))
            .collect();
        let count = u64::try_from(pairs.len()).ok().filter(|n| *n > 0)?;
        let at = usize::try_from((seed % count) * (STRIDE % count) % count).ok()?;
        let (workload, fault) = *pairs.get(at)?;
        let mut rng = StdRng::seed_from_u64(seed);
        let level = *choices
            .levels
            .get(rng.random_range(0..choices.levels.len().max(1)))?;
        let millis = u64::try_from(choices.duration.as_millis()).ok()?;
        let first = rng.random_range(millis / 6..=millis / 2);
        let steps = fault.steps(first, &mut rng);
        Some(Self {
            seed,
            workload,
            level,
            fault,
            steps,
            clients: choices.clients,
            duration: choices.duration,
            shape: fault.shape(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn choices() -> Choices {
        Choices {
            workloads: Workload::ALL.to_vec(),
            faults: FaultKind::ALL.to_vec(),
            levels: Level::ALL.to_vec(),
            clients: 8,
            duration: Duration::from_secs(5),
        }
    }

    #[test]
    fn a_seed_gives_one_plan() {
        let plan = |seed| Plan::draw(seed, &choices()).unwrap();
        assert_eq!(plan(7), plan(7));
        assert_ne!(plan(7).steps, plan(8).steps);
    }

    #[test]
    fn survives_a_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for seed in 0..100 {
            let plan = Plan::draw(seed, &choices()).unwrap();
            std::fs::write(file.path(), serde_json::to_vec(&plan).unwrap()).unwrap();
            assert_eq!(Plan::read(file.path()).unwrap(), plan);
            let report = serde_json::json!({ "plan": plan });
            std::fs::write(file.path(), serde_json::to_vec(&report).unwrap()).unwrap();
            assert_eq!(Plan::read(file.path()).unwrap(), plan);
        }
    }

    #[test]
    fn consecutive_seeds_meet_every_pair() {
        let pairs = |from: u64, count: u64| -> BTreeSet<_> {
            let plans = (from..from + count).filter_map(|seed| Plan::draw(seed, &choices()));
            plans.map(|p| (p.workload, p.fault)).collect()
        };
        let all = Workload::ALL.iter().flat_map(|w| {
            let suits = FaultKind::ALL.iter().filter(|f| f.suits(*w));
            suits.map(|f| (*w, *f))
        });
        let all: BTreeSet<_> = all.collect();
        let count = u64::try_from(all.len()).unwrap();
        // Any run of so many seeds that does not pass a multiple of it.
        assert_eq!(pairs(count * 3, count), all);
    }

    #[test]
    fn faults_fall_into_the_time_of_work() {
        for seed in 0..200 {
            let plan = Plan::draw(seed, &choices()).unwrap();
            assert!(plan.steps.iter().all(|s| s.at_ms < 5000), "{plan:?}");
            assert_eq!(plan.steps.is_empty(), plan.fault == FaultKind::None);
        }
    }
}
