//! What was measured, as a table for people and as JSON for programs.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use setu_core::KvDType;
use setu_core::backend::DeviceInfo;

use super::cost::Cost;
use super::measure::Sample;
use super::plan::{BATCH_ANSWER, BATCH_PROMPT, Item, SERVE_ANSWER, SERVE_PROMPT};
use crate::commands::human_bytes;
use crate::components::ComponentInUse;
use crate::linked::Ceilings;

/// All that there is to tell.
pub struct Report {
    pub model: String,
    pub backend: String,
    pub device: Option<DeviceInfo>,
    /// Bytes of the checkpoint's weights in each format.
    pub formats: BTreeMap<&'static str, u64>,
    pub kv_dtype: KvDType,
    pub components: Vec<ComponentInUse>,
    pub rounds: u32,
    pub ceilings: Option<Ceilings>,
    pub rows: Vec<Row>,
}

/// An item and what was found of it, round by round.
pub struct Row {
    pub item: Item,
    pub cost: Cost,
    pub samples: Vec<Sample>,
    /// Why there are no more samples.
    pub error: Option<String>,
}

impl Report {
    pub fn json(&self) -> Value {
        let ceilings = self.ceilings.as_ref().map(|most| {
            json!({ "bytes_per_s": most.bytes_per_s, "operations_per_s": most.operations_per_s, "operations": most.operations })
        });
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "model": self.model,
            "weights": { "bytes": self.formats.values().sum::<u64>(), "formats": self.formats },
            "kv_dtype": self.kv_dtype.name(),
            "backend": self.backend,
            "device": self.device,
            "threads": self.ceilings.as_ref().and_then(|most| most.threads),
            "isa": self.ceilings.as_ref().and_then(|most| most.isa),
            "settings": self.settings(),
            "rounds": self.rounds,
            "ceilings": ceilings,
            "measurements": self.rows.iter().map(|row| row.json(self.ceilings.as_ref())).collect::<Vec<_>>(),
        })
    }

    /// The settings of all components in use, as they would stand in a file.
    fn settings(&self) -> Value {
        let of = |component: &ComponentInUse| {
            let settings = component.settings.iter().map(|setting| (setting.name.clone(), json!(setting.value)));
            let kind = component.key.iter().map(|key| ("type".to_owned(), json!(key)));
            (component.kind.clone(), Value::Object(kind.chain(settings).collect()))
        };
        Value::Object(self.components.iter().map(of).collect())
    }

    /// At most 100 columns wide, unless names are very long.
    pub fn table(&self) -> String {
        let formats: Vec<String> =
            self.formats.iter().map(|(name, bytes)| format!("{name} {}", human_bytes(*bytes))).collect();
        let mut text = format!("model     {}: {}\n", self.model, formats.join(", "));
        let device = self.device.as_ref().map(|device| format!(": {}, {}", device.name, device.features));
        text +=
            &format!("backend   {}{}, setu {}\n", self.backend, device.unwrap_or_default(), env!("CARGO_PKG_VERSION"));
        text += &match &self.ceilings {
            None => format!("at most   -: how much a backend `{}` could do is not known here\n", self.backend),
            Some(most) => {
                let operations =
                    most.operations_per_s.map_or("-".to_owned(), |rate| format!("{:.0} Gop/s", rate * 1e-9));
                format!("at most   reads {:.1} GB/s; {operations} ({})\n", most.bytes_per_s * 1e-9, most.operations)
            }
        };
        text += &format!("\n{:<34}{:>12}  {:<24}{}\n", "", "tokens/s", "min to max", "of what is possible");
        for row in &self.rows {
            text += &row.line(self.ceilings.as_ref());
        }
        text += &format!("\nmedians of {} rounds\n", self.rounds);
        text
    }
}

impl Row {
    fn rates(&self) -> Option<[f64; 3]> {
        let mut rates: Vec<f64> = self.samples.iter().map(|sample| sample.tokens_per_s).collect();
        rates.sort_by(f64::total_cmp);
        Some([median(&rates)?, *rates.first()?, *rates.last()?])
    }

    /// Bytes and operations in a second, and each as a share of what is possible.
    fn used(&self, most: Option<&Ceilings>) -> Option<[Option<f64>; 4]> {
        let [rate, ..] = self.rates()?;
        let (bytes, operations) = (self.cost.bytes.map(|bytes| bytes * rate), self.cost.operations * rate);
        let of_bytes = most.and_then(|most| Some(bytes? / most.bytes_per_s));
        let of_operations = most.and_then(|most| Some(operations / most.operations_per_s?));
        Some([bytes, Some(operations), of_bytes, of_operations])
    }

    fn times(&self, of: impl Fn(&Sample) -> &[f64]) -> Vec<f64> {
        let mut times: Vec<f64> = self.samples.iter().flat_map(|sample| of(sample).iter().copied()).collect();
        times.sort_by(f64::total_cmp);
        times
    }

    fn json(&self, most: Option<&Ceilings>) -> Value {
        let mut row = match self.item {
            Item::Prefill { tokens } => json!({ "part": "prefill", "prompt": tokens }),
            Item::Decode { context, tokens } => json!({ "part": "decode", "context": context, "generate": tokens }),
            Item::Batch { sessions } => {
                json!({ "part": "batch", "sessions": sessions, "prompt": BATCH_PROMPT, "generate": BATCH_ANSWER })
            }
            Item::Serve { streams, requests } => json!({
                "part": "serve", "streams": streams, "requests": requests,
                "prompt": SERVE_PROMPT, "generate": SERVE_ANSWER,
            }),
        };
        if let Some([median, min, max]) = self.rates() {
            let rounds: Vec<f64> = self.samples.iter().map(|sample| sample.tokens_per_s).collect();
            row["tokens_per_s"] = json!({ "median": median, "min": min, "max": max, "rounds": rounds });
        }
        if let Some([bytes, operations, of_bytes, of_operations]) = self.used(most) {
            row["bytes_per_s"] = json!(bytes);
            row["operations_per_s"] = json!(operations);
            row["share_of_bytes"] = json!(of_bytes);
            row["share_of_operations"] = json!(of_operations);
        }
        for (name, times) in [("ttft_s", self.times(|s| &s.ttft_s)), ("itl_s", self.times(|s| &s.gaps_s))] {
            if !times.is_empty() {
                row[name] = json!({ "p50": percentile(&times, 0.5), "p99": percentile(&times, 0.99) });
            }
        }
        if let Some(error) = &self.error {
            row["error"] = json!(error);
        }
        row
    }

    fn line(&self, most: Option<&Ceilings>) -> String {
        let what = match self.item {
            Item::Prefill { tokens } => format!("prefill {tokens}"),
            Item::Decode { context: 0, tokens } => format!("decode {tokens}"),
            Item::Decode { context, tokens } => format!("decode {tokens} at {context}"),
            Item::Batch { sessions } => format!("decode {BATCH_ANSWER} in a batch of {sessions}"),
            Item::Serve { streams, requests } => format!("serve {requests} requests, {streams} at once"),
        };
        let mut line = match self.rates() {
            Some([median, min, max]) => {
                format!("{what:<34}{median:>12.1}  {:<24}{}\n", format!("{min:.1} to {max:.1}"), self.share(most))
            }
            None => format!("{what:<34}{:>12}\n", "-"),
        };
        if let Item::Serve { .. } = self.item {
            let (first, between) = (self.times(|sample| &sample.ttft_s), self.times(|sample| &sample.gaps_s));
            for (name, times) in [("first token", first), ("between tokens", between)] {
                if let (Some(p50), Some(p99)) = (percentile(&times, 0.5), percentile(&times, 0.99)) {
                    line += &format!("  {name:<16}p50 {:.1} ms, p99 {:.1} ms\n", p50 * 1e3, p99 * 1e3);
                }
            }
        }
        if let Some(error) = &self.error {
            line += &format!("  fails: {error}\n");
        }
        line
    }

    /// The share of whichever limit is closer.
    fn share(&self, most: Option<&Ceilings>) -> String {
        let [_, _, of_bytes, of_operations] = self.used(most).unwrap_or_default();
        let shares = [(of_bytes, "reading"), (of_operations, "operations")];
        let shares = shares.into_iter().filter_map(|(share, name)| Some((share?, name)));
        let closer = shares.max_by(|a, b| a.0.total_cmp(&b.0));
        closer.map_or("-".to_owned(), |(share, name)| format!("{:.0} % of {name}", 100.0 * share))
    }
}

/// The middle of `sorted`.
fn median(sorted: &[f64]) -> Option<f64> {
    let (low, high) = (sorted.get(sorted.len().saturating_sub(1) / 2)?, sorted.get(sorted.len() / 2)?);
    Some((low + high) / 2.0)
}

fn percentile(sorted: &[f64], share: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    Some(sorted[((sorted.len() as f64 * share) as usize).min(last)])
}
