//! What a person sees while the demo runs, on standard error: one moving line in a terminal, plain
//! lines elsewhere.

use std::fmt;
use std::io::IsTerminal as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressState, ProgressStyle};

use super::record::Live;

/// Progress of a run.
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
    live: Arc<Live>,
}

impl Progress {
    /// `events`: how many there will be; `live`: what is drawn beside their number.
    pub(crate) fn new(events: usize, live: Arc<Live>) -> Self {
        let bar = std::io::stderr()
            .is_terminal()
            .then(|| moving_line(events, Arc::clone(&live)));
        Self { bar, live }
    }

    pub(crate) fn live(&self) -> &Arc<Live> {
        &self.live
    }

    /// Something happened.
    pub(crate) fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => crate::out::note(text),
        }
    }

    /// What is going on now; shown in terminals only.
    pub(crate) fn now(&self, what: &'static str) {
        if let Some(bar) = &self.bar {
            bar.set_message(what);
        }
    }

    /// An event is over.
    pub(crate) fn event(&self, number: usize, total: usize, text: &str) {
        let mut counts = String::new();
        let _ = write_counts(&self.live, &mut counts);
        self.line(&format!("[{number}/{total}] {text}; {counts}"));
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

fn moving_line(events: usize, live: Arc<Live>) -> ProgressBar {
    let bar = ProgressBar::new(events as u64);
    let template = "{spinner} {elapsed_precise} {bar:24} {pos}/{len} events, {counts}, {msg}";
    // The template is a constant; without it the bar has its default form.
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.with_key(
            "counts",
            move |_: &ProgressState, out: &mut dyn fmt::Write| {
                let _ = write_counts(&live, out);
            },
        ));
    }
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

fn write_counts(live: &Live, out: &mut dyn fmt::Write) -> fmt::Result {
    write!(
        out,
        "{} transfers acknowledged, {} client errors",
        live.acknowledged.load(Ordering::Relaxed),
        live.errors.load(Ordering::Relaxed)
    )
}
