//! Rate limits of a key: requests and tokens a minute, and requests at once.
//!
//! What a request will generate is known only once it has, so tokens are charged as they come: those of the prompt when
//! it is let in, those of the answer as they are generated. A bucket may so go below nothing, and lets nobody in until
//! time has filled it again. That is why the buckets are our own: those of the rate-limiting crates can refuse in
//! advance, and not charge afterwards.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use serde::{Deserialize, Serialize};

/// What is allowed, what is left and when all is back: of requests, and of tokens.
pub const HEADERS: [[HeaderName; 3]; 2] = [
    [
        HeaderName::from_static("x-ratelimit-limit-requests"),
        HeaderName::from_static("x-ratelimit-remaining-requests"),
        HeaderName::from_static("x-ratelimit-reset-requests"),
    ],
    [
        HeaderName::from_static("x-ratelimit-limit-tokens"),
        HeaderName::from_static("x-ratelimit-remaining-tokens"),
        HeaderName::from_static("x-ratelimit-reset-tokens"),
    ],
];

/// What a key may use; `None` is without limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    pub requests_per_minute: Option<u32>,
    pub tokens_per_minute: Option<u32>,
    pub max_concurrent: Option<u32>,
}

/// What it has used.
#[derive(Debug)]
pub struct Meter {
    pub limits: Limits,
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
    running: AtomicU32,
}

/// A limit that is reached.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Exceeded {
    Requests { retry_after_s: f64 },
    Tokens { retry_after_s: f64 },
    Concurrent,
}

/// Counts as one that runs until it is dropped.
#[derive(Debug)]
pub struct Running(Arc<Meter>);

/// As much as a minute allows, filling up evenly.
#[derive(Debug)]
struct Bucket {
    per_minute: f64,
    /// What is left, below 0 where more was used, and when that was so.
    state: Mutex<(f64, Instant)>,
}

impl Bucket {
    fn new(per_minute: u32) -> Bucket {
        Bucket { per_minute: per_minute.into(), state: Mutex::new((per_minute.into(), Instant::now())) }
    }

    /// Works on what is left now.
    fn with<T>(&self, now: Instant, work: impl FnOnce(&mut f64) -> T) -> T {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (left, since) = &mut *state;
        let passed_s = now.saturating_duration_since(*since).as_secs_f64();
        *left = (*left + passed_s * self.per_minute / 60.0).min(self.per_minute);
        *since = now.max(*since);
        work(left)
    }

    /// Takes `amount` where there is at least `floor`; otherwise the seconds until there is.
    fn take(&self, now: Instant, amount: f64, floor: f64) -> Result<(), f64> {
        self.with(now, |left| {
            if *left < floor {
                return Err((floor - *left) * 60.0 / self.per_minute);
            }
            *left -= amount;
            Ok(())
        })
    }
}

impl Meter {
    pub fn new(limits: Limits) -> Meter {
        Meter {
            limits,
            requests: limits.requests_per_minute.map(Bucket::new),
            tokens: limits.tokens_per_minute.map(Bucket::new),
            running: AtomicU32::new(0),
        }
    }

    /// Counts a request.
    pub fn request(&self, now: Instant) -> Result<(), Exceeded> {
        let Some(bucket) = &self.requests else { return Ok(()) };
        bucket.take(now, 1.0, 1.0).map_err(|retry_after_s| Exceeded::Requests { retry_after_s })
    }

    /// Lets a request with so many prompt tokens in: at once it takes what all its prompts have, and then a place among
    /// those that run.
    ///
    /// A prompt that is longer than a minute's tokens needs a full bucket, and pays for the rest afterwards.
    pub fn admit(self: &Arc<Meter>, now: Instant, prompt_tokens: u32) -> Result<Running, Exceeded> {
        let most = self.limits.max_concurrent.unwrap_or(u32::MAX);
        let place = self
            .running
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |running| (running < most).then_some(running + 1));
        place.map_err(|_| Exceeded::Concurrent)?;
        let running = Running(self.clone());
        if let Some(bucket) = &self.tokens {
            let amount = f64::from(prompt_tokens);
            let floor = amount.clamp(1.0, bucket.per_minute);
            bucket.take(now, amount, floor).map_err(|retry_after_s| Exceeded::Tokens { retry_after_s })?;
        }
        Ok(running)
    }

    /// Charges tokens that were generated.
    pub fn generated(&self, now: Instant, tokens: u32) {
        if let Some(bucket) = &self.tokens {
            bucket.with(now, |left| *left -= f64::from(tokens));
        }
    }

    /// Tells where the limits stand, as OpenAI does.
    pub fn tell(&self, now: Instant, headers: &mut HeaderMap) {
        for (bucket, names) in [&self.requests, &self.tokens].into_iter().zip(HEADERS) {
            let Some(bucket) = bucket else { continue };
            let left = bucket.with(now, |left| *left);
            let full_s = (bucket.per_minute - left) * 60.0 / bucket.per_minute;
            let values = [bucket.per_minute.to_string(), left.max(0.0).floor().to_string(), duration(full_s)];
            for (name, value) in names.into_iter().zip(values) {
                if let Ok(value) = HeaderValue::from_str(&value) {
                    headers.insert(name, value);
                }
            }
        }
    }
}

/// A time as OpenAI's headers have it, such as `6m0s` or `20ms`.
fn duration(seconds: f64) -> String {
    let time = Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or_default();
    let (minutes, seconds, ms) = (time.as_secs() / 60, time.as_secs() % 60, time.subsec_millis());
    match (minutes, seconds, ms) {
        (0, 0, ms) => format!("{ms}ms"),
        (0, seconds, ms) => format!("{}s", f64::from(seconds as u32) + f64::from(ms) * 1e-3),
        (minutes, seconds, _) => format!("{minutes}m{seconds}s"),
    }
}

impl Exceeded {
    /// The name by which it is counted.
    pub fn name(&self) -> &'static str {
        match self {
            Exceeded::Requests { .. } => "requests",
            Exceeded::Tokens { .. } => "tokens",
            Exceeded::Concurrent => "concurrent",
        }
    }
}

impl Running {
    pub fn meter(&self) -> &Arc<Meter> {
        &self.0
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meter(requests: Option<u32>, tokens: Option<u32>, concurrent: Option<u32>) -> Arc<Meter> {
        Arc::new(Meter::new(Limits {
            requests_per_minute: requests,
            tokens_per_minute: tokens,
            max_concurrent: concurrent,
        }))
    }

    #[test]
    fn requests_come_back_evenly() {
        let meter = meter(Some(3), None, None);
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        assert!((0..3).all(|_| meter.request(at(0)).is_ok()));
        let Err(Exceeded::Requests { retry_after_s }) = meter.request(at(0)) else { panic!("a fourth") };
        assert!((retry_after_s - 20.0).abs() < 0.1, "{retry_after_s}");
        assert!(meter.request(at(19)).is_err());
        assert!(meter.request(at(21)).is_ok());
        assert!(meter.request(at(22)).is_err());
        // No more than a minute's worth is saved up.
        assert_eq!((0..10).filter(|_| meter.request(at(3600)).is_ok()).count(), 3);
    }

    #[test]
    fn tokens_are_charged_once_they_are_known() {
        let meter = meter(None, Some(600), None);
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let refused = |at: Instant, tokens: u32| match meter.admit(at, tokens) {
            Err(Exceeded::Tokens { retry_after_s }) => retry_after_s,
            other => panic!("{other:?}"),
        };
        let running = meter.admit(at(0), 100).expect("there are 600");
        running.meter().generated(at(0), 700);
        // 200 too many were used, and 10 come back a second.
        assert!((refused(at(0), 1) - 20.1).abs() < 0.1);
        assert!(refused(at(20), 1) < 0.2);
        drop(meter.admit(at(21), 10).expect("10 are back"));
        // What a minute doesn't hold needs a full bucket, and is paid for afterwards.
        assert!(refused(at(21), 5000) > 59.0);
        drop(meter.admit(at(200), 5000).expect("it is full"));
        assert!(refused(at(200), 1) > 400.0);
    }

    #[test]
    fn those_that_run_are_counted_until_they_end() {
        let meter = meter(None, Some(60), Some(2));
        let now = Instant::now();
        let (first, second) = (meter.admit(now, 1).unwrap(), meter.admit(now, 1).unwrap());
        assert_eq!(meter.admit(now, 1).err(), Some(Exceeded::Concurrent));
        drop(first);
        // Who is refused for another reason holds no place.
        assert!(matches!(meter.admit(now, 60), Err(Exceeded::Tokens { .. })));
        let third = meter.admit(now, 1).unwrap();
        assert_eq!(meter.admit(now, 1).err(), Some(Exceeded::Concurrent));
        drop((second, third));
        assert_eq!(meter.running.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn headers_tell_what_is_left() {
        let meter = meter(Some(60), Some(6000), None);
        let now = Instant::now();
        meter.request(now).unwrap();
        let _running = meter.admit(now, 1500).unwrap();
        let mut headers = HeaderMap::new();
        meter.tell(now, &mut headers);
        let expected = [
            ("limit-requests", "60"),
            ("remaining-requests", "59"),
            ("reset-requests", "1s"),
            ("limit-tokens", "6000"),
            ("remaining-tokens", "4500"),
            ("reset-tokens", "15s"),
        ];
        for (name, value) in expected {
            assert_eq!(headers[format!("x-ratelimit-{name}").as_str()], value, "{name}");
        }
        assert_eq!([0.0, 0.0201, 1.5, 61.0, 360.0].map(duration), ["0ms", "20ms", "1.5s", "1m1s", "6m0s"]);
        let mut none = HeaderMap::new();
        Meter::new(Limits::default()).tell(now, &mut none);
        assert!(none.is_empty());
    }
}
