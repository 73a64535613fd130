//! Finds stop strings in text that comes in pieces.

use setu_core::{Error, Result};

/// The most stop strings of one session.
pub const MAX_STOP_STRINGS: usize = 32;
/// The longest stop string, in bytes.
pub const MAX_STOP_BYTES: usize = 512;

/// Passes text on, except what may be the beginning of a stop string, and says when one is complete.
///
/// The stop string that is complete first ends the text, and of several that are complete with the same character
/// the longest: however the text is cut, the outcome is the same. It takes time linear in the text.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    stops: Vec<Stop>,
    include_stop: bool,
    /// What was not passed on yet; begins with what was held back, as long as the longest `Stop::matched`.
    text: String,
    /// How much of `text` went out with the last push.
    passed: usize,
    /// The index of the stop string that ended the text.
    stopped: Option<usize>,
}

/// Text to pass on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Passed<'a> {
    pub text: &'a str,
    /// A stop string was complete: no text follows.
    pub stopped: bool,
}

/// One stop string, with how much of it the text ends with.
#[derive(Clone, Debug)]
struct Stop {
    string: Vec<u8>,
    /// For each of its beginnings, the longest shorter one that this ends with.
    borders: Vec<u16>,
    matched: usize,
}

impl StopMatcher {
    /// Watches for `stops`; `include_stop` passes the one found on too.
    ///
    /// # Errors
    /// If a stop string is empty or too long, or if there are too many.
    pub fn new<S: AsRef<str>>(stops: &[S], include_stop: bool) -> Result<StopMatcher> {
        if stops.len() > MAX_STOP_STRINGS {
            return Err(Error::invalid(format!(
                "{} stop strings; at most {MAX_STOP_STRINGS} are allowed",
                stops.len()
            )));
        }
        let stops = (1..).zip(stops).map(|(number, stop)| Stop::new(number, stop.as_ref())).collect::<Result<_>>()?;
        Ok(StopMatcher { stops, include_stop, text: String::new(), passed: 0, stopped: None })
    }

    /// Takes the next piece of text. After a stop there is no more text.
    pub fn push(&mut self, text: &str) -> Passed<'_> {
        self.text.drain(..self.passed);
        self.passed = 0;
        if self.stopped.is_some() {
            self.text.clear();
            return Passed { text: "", stopped: true };
        }
        let held = self.text.len();
        self.text.push_str(text);
        for (at, byte) in text.bytes().enumerate() {
            // Each must see the byte, though one may have ended the text.
            let advanced = self.stops.iter_mut().map(|stop| stop.advance(byte)).enumerate();
            let completed = advanced.filter_map(|(index, length)| Some((length?, index))).max();
            if let Some((length, index)) = completed {
                self.stopped = Some(index);
                let end = held + at + 1;
                self.passed = if self.include_stop { end } else { end - length };
                return Passed { text: &self.text[..self.passed], stopped: true };
            }
        }
        let matched = self.stops.iter().map(|stop| stop.matched).max().unwrap_or(0);
        self.passed = self.text.len() - matched;
        Passed { text: &self.text[..self.passed], stopped: false }
    }

    /// The stop string that ended the text.
    pub fn stop(&self) -> Option<&str> {
        // It was made of a string, and is UTF-8 for that.
        self.stopped.and_then(|index| std::str::from_utf8(&self.stops[index].string).ok())
    }

    /// Ends the text: returns what was held back, unless a stop string ended it.
    pub fn finish(&mut self) -> &str {
        self.text.drain(..self.passed);
        self.passed = self.text.len();
        if self.stopped.is_some() {
            return "";
        }
        self.stops.iter_mut().for_each(|stop| stop.matched = 0);
        &self.text
    }
}

impl Stop {
    fn new(number: usize, string: &str) -> Result<Stop> {
        if string.is_empty() {
            return Err(Error::invalid(format!("stop string {number} is empty: it would stop every answer")));
        }
        if string.len() > MAX_STOP_BYTES {
            return Err(Error::invalid(format!(
                "stop string {number} has {} bytes; at most {MAX_STOP_BYTES} are allowed",
                string.len()
            )));
        }
        let mut stop = Stop { string: string.as_bytes().to_vec(), borders: vec![0; string.len() + 1], matched: 0 };
        for length in 1..string.len() {
            stop.step(stop.string[length]);
            stop.borders[length + 1] = stop.matched as u16;
        }
        stop.matched = 0;
        Ok(stop)
    }

    /// Takes a byte; returns the stop string's length if it is complete.
    fn advance(&mut self, byte: u8) -> Option<usize> {
        self.step(byte);
        (self.matched == self.string.len()).then_some(self.matched)
    }

    fn step(&mut self, byte: u8) {
        while self.string[self.matched] != byte {
            if self.matched == 0 {
                return;
            }
            self.matched = usize::from(self.borders[self.matched]);
        }
        self.matched += 1;
    }
}
