//! What a user sees of a fetch: a bar on a terminal, a line at its start and end anywhere else.

use indicatif::{DecimalBytes, HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// Hears how a fetch goes. One thing is under way at a time.
pub trait Progress {
    /// A thing of `total` bytes begins; `None` where its size isn't known. It replaces one that hadn't ended.
    fn begin(&mut self, what: &str, total: Option<u64>);

    /// So many of its bytes are there.
    fn at(&mut self, n_bytes: u64);

    /// It is done.
    fn end(&mut self);

    /// It came to nothing. Called before the error is returned, also when nothing was under way.
    fn abandon(&mut self);

    /// A sentence for the user that is no error, such as why nothing moves.
    fn note(&mut self, message: &str);
}

/// Says nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn begin(&mut self, _what: &str, _total: Option<u64>) {}
    fn at(&mut self, _n_bytes: u64) {}
    fn end(&mut self) {}
    fn abandon(&mut self) {}
    fn note(&mut self, _message: &str) {}
}

/// Progress for people.
pub struct Console {
    /// Lines go here; `None` draws bars on standard error.
    lines: Option<Box<dyn Write + Send>>,
    current: Option<Task>,
}

struct Task {
    what: String,
    bar: ProgressBar,
    begun: Instant,
    n_bytes: u64,
}

impl Console {
    /// Bars where standard error is a terminal, else lines there.
    pub fn stderr() -> Console {
        let lines: Option<Box<dyn Write + Send>> =
            if std::io::stderr().is_terminal() { None } else { Some(Box::new(std::io::stderr())) };
        Console { lines, current: None }
    }

    /// Lines to `writer`.
    pub fn lines(writer: impl Write + Send + 'static) -> Console {
        Console { lines: Some(Box::new(writer)), current: None }
    }

    fn say(&mut self, line: &str) {
        // A closed standard error must not end a fetch.
        let _ = match &mut self.lines {
            Some(writer) => writeln!(writer, "{line}"),
            None => writeln!(std::io::stderr(), "{line}"),
        };
    }
}

impl Progress for Console {
    fn begin(&mut self, what: &str, total: Option<u64>) {
        self.abandon();
        let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::hidden());
        if self.lines.is_none() {
            bar.set_draw_target(ProgressDrawTarget::stderr());
            bar.set_style(style(total.is_some()));
            bar.set_message(what.to_string());
            bar.enable_steady_tick(Duration::from_millis(200));
        } else {
            let size = total.map(|total| format!(" ({})", DecimalBytes(total))).unwrap_or_default();
            self.say(&format!("{what}{size} …"));
        }
        self.current = Some(Task { what: what.to_string(), bar, begun: Instant::now(), n_bytes: 0 });
    }

    fn at(&mut self, n_bytes: u64) {
        if let Some(task) = &mut self.current {
            task.n_bytes = n_bytes;
            task.bar.set_position(n_bytes);
        }
    }

    fn end(&mut self) {
        let Some(task) = self.current.take() else { return };
        task.bar.finish_and_clear();
        let took = task.begun.elapsed();
        let took =
            if took.as_secs() < 60 { format!("{:.1} s", took.as_secs_f64()) } else { HumanDuration(took).to_string() };
        self.say(&format!("{}: done, {} in {took}", task.what, DecimalBytes(task.n_bytes)));
    }

    fn abandon(&mut self) {
        if let Some(task) = self.current.take() {
            task.bar.finish_and_clear();
        }
    }

    fn note(&mut self, message: &str) {
        match &self.current {
            Some(task) if self.lines.is_none() => task.bar.suspend(|| eprintln!("{message}")),
            _ => self.say(message),
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.abandon();
    }
}

fn style(sized: bool) -> ProgressStyle {
    let template = if sized {
        "{msg} {wide_bar} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} {eta}"
    } else {
        "{msg} {spinner} {decimal_bytes} {decimal_bytes_per_sec}"
    };
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}
