//! What a person sees while the demo runs, on standard error: one moving line in a terminal, plain
//! lines elsewhere.

use std::sync::atomic::Ordering;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use super::record::Live;

/// Progress of a run.
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
}

impl Progress {
    /// `events`: how many there will be.
    pub(crate) fn new(events: usize) -> Self {
        use std::io::IsTerminal as _;
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(events as u64);
            if let Ok(style) = ProgressStyle::with_template(
                "{spinner} [{elapsed_precise}] {bar:30} {pos}/{len} events  {msg}",
            ) {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        Self { bar }
    }

    /// Something happened.
    pub(crate) fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => crate::out::note(text),
        }
    }

    /// What is going on now; shown in terminals only.
    pub(crate) fn now(&self, what: &str, live: &Live) {
        if let Some(bar) = &self.bar {
            bar.set_message(format!("{what}; {}", counts(live)));
        }
    }

    /// An event is over.
    pub(crate) fn event(&self, number: usize, total: usize, text: &str, live: &Live) {
        self.line(&format!("[{number}/{total}] {text}; {}", counts(live)));
        if let Some(bar) = &self.bar {
            bar.set_position(number as u64);
        }
    }

    pub(crate) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn counts(live: &Live) -> String {
    format!(
        "{} transfers acknowledged, {} client errors",
        live.acknowledged.load(Ordering::Relaxed),
        live.errors.load(Ordering::Relaxed)
    )
}
