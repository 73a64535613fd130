//! How many KV pages an executable has: what backends decide alike.

use super::CompileOptions;
use crate::error::{Error, Result};
use crate::graph::Graph;

impl CompileOptions {
    /// Checks what every backend needs of its options.
    ///
    /// # Errors
    /// One is out of range, and which.
    pub fn check(&self, graph: &Graph) -> Result<()> {
        if self.max_model_len > graph.max_model_len {
            let (asked, most) = (self.max_model_len, graph.max_model_len);
            return Err(Error::config(format!("sessions of {asked} tokens are longer than the graph's {most}")));
        }
        if self.max_tokens == 0 || self.max_rows == 0 {
            return Err(Error::config("max_tokens and max_rows must be over 0"));
        }
        if self.page_tokens == 0 || self.page_tokens > 1 << 16 {
            return Err(Error::config(format!("page_tokens must be from 1 to 65536, not {}", self.page_tokens)));
        }
        Ok(())
    }

    /// Pages of each KV group that the longest session can use at once: a window's also hold a step's tokens. Of
    /// [checked](CompileOptions::check) options.
    pub fn session_pages(&self, graph: &Graph) -> Vec<u32> {
        let held = |window: u32| window.saturating_add(self.max_tokens).min(self.max_model_len);
        let tokens = graph.kv_groups.iter().map(|group| group.kind.window().map_or(self.max_model_len, held));
        tokens.map(|tokens| tokens.div_ceil(self.page_tokens).saturating_add(1)).collect()
    }

    /// Pages of each KV group, of `page_bytes` bytes: those that are asked for; else as many as `max_rows` of the longest
    /// sessions can use; else, in the same proportions, as many as fit into `kv_bytes`, or into `budget` where that is 0. Of
    /// [checked](CompileOptions::check) options.
    ///
    /// # Errors
    /// They don't fit; the message has the sum, and `advice` on what to do where the budget is too small for a page of each.
    pub fn page_counts(&self, graph: &Graph, page_bytes: &[u64], budget: u64, advice: &str) -> Result<Vec<u32>> {
        let names = || graph.kv_groups.iter().map(|group| group.name.as_str()).collect::<Vec<_>>().join(", ");
        let sum = |pages: &[u32]| sum_of_pages(pages, page_bytes);
        let mib = |bytes: u128| bytes.div_ceil(1 << 20);
        if !self.kv_pages.is_empty() {
            let (asked, given, wanted) = (&self.kv_pages, self.kv_pages.len(), page_bytes.len());
            if given != wanted {
                let names = names();
                return Err(Error::config(format!(
                    "kv_pages has {given} entries, the model {wanted} KV groups ({names})"
                )));
            }
            if self.kv_bytes > 0 && sum(asked) > self.kv_bytes.into() {
                let (needed, most) = (mib(sum(asked)), self.kv_bytes >> 20);
                return Err(Error::exhausted(format!(
                    "{asked:?} KV pages need {needed} MiB, [kv] memory allows {most} MiB: raise it or ask for fewer pages"
                )));
            }
            return Ok(asked.clone());
        }
        let budget = u128::from(if self.kv_bytes == 0 { budget } else { self.kv_bytes });
        let most: Vec<u32> =
            self.session_pages(graph).into_iter().map(|pages| pages.saturating_mul(self.max_rows)).collect();
        let needed = sum(&most);
        if needed <= budget {
            return Ok(most);
        }
        let pages: Vec<u32> = most.iter().map(|&pages| (u128::from(pages) * budget / needed) as u32).collect();
        if pages.contains(&0) {
            let (needed, names) = (mib(sum(&vec![1; pages.len()])), names());
            return Err(Error::exhausted(format!(
                "one KV page of each group ({names}) needs {needed} MiB, there are {} MiB for them: {advice}",
                budget >> 20
            )));
        }
        Ok(pages)
    }
}

/// Bytes of so many pages of each KV group.
pub fn sum_of_pages(pages: &[u32], page_bytes: &[u64]) -> u128 {
    pages.iter().zip(page_bytes).map(|(&pages, &bytes)| u128::from(pages) * u128::from(bytes)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::graph::{GraphBuilder, KvGroupKind, KvLayer, Shard};

    /// A layer that sees all and one with a window of 32 tokens.
    fn graph() -> Graph {
        let mut g = GraphBuilder::new("two groups", 8, 128);
        let table = g.weight("embed", "t", &[8, 4], Shard::Replicated);
        let x = g.embed("embed", table).unwrap();
        let mut attended = Vec::new();
        for (name, kind) in [("full", KvGroupKind::Full), ("window", KvGroupKind::SlidingWindow { tokens: 32 })] {
            let group = g.kv_group(name, kind);
            let layer = g.kv_layer(KvLayer { group, heads: 1, k_dim: 4, v_dim: 4 });
            attended.push(g.attention(name, [x, x, x], layer, 1, 1.0).unwrap());
        }
        let x = g.add("add", attended[0], attended[1]).unwrap();
        let x = g.select("select", x).unwrap();
        let logits = g.linear("head", x, table, None).unwrap();
        g.output("logits", logits);
        g.finish().unwrap()
    }

    fn options() -> CompileOptions {
        CompileOptions::new(16, 3, 128)
    }

    #[test]
    fn pages_are_what_is_asked_for_or_what_sessions_can_use_or_what_fits() {
        let (graph, bytes) = (graph(), [100, 50]);
        let count = |options: &CompileOptions, budget| options.page_counts(&graph, &bytes, budget, "buy more");
        // 128 tokens and a page; a window of 32 and a step of 16, and a page.
        assert_eq!(count(&options(), u64::MAX).unwrap(), [3 * 9, 3 * 4]);
        assert_eq!(count(&options(), (2700 + 600) / 3).unwrap(), [9, 4]);
        let limited = CompileOptions { kv_bytes: 1100, ..options() };
        assert_eq!(count(&limited, u64::MAX).unwrap(), [9, 4]);
        let asked = CompileOptions { kv_pages: vec![5, 6], ..options() };
        assert_eq!(count(&asked, 0).unwrap(), [5, 6]);

        for (options, budget, kind, part) in [
            (
                CompileOptions { kv_pages: vec![5], ..options() },
                0,
                ErrorKind::Config,
                "1 entries, the model 2 KV groups (full, window)",
            ),
            (
                CompileOptions { kv_pages: vec![5, 6], kv_bytes: 700, ..options() },
                0,
                ErrorKind::Exhausted,
                "[5, 6] KV pages need 1 MiB, [kv] memory allows 0 MiB",
            ),
            (options(), 200, ErrorKind::Exhausted, "(full, window) needs 1 MiB, there are 0 MiB for them: buy more"),
        ] {
            let error = count(&options, budget).unwrap_err();
            assert!(error.kind() == kind && error.message().contains(part), "{error}");
        }
    }

    #[test]
    fn options_out_of_range_are_refused() {
        let graph = graph();
        options().check(&graph).unwrap();
        for (options, part) in [
            (CompileOptions { max_model_len: 129, ..options() }, "longer than the graph's 128"),
            (CompileOptions { max_rows: 0, ..options() }, "over 0"),
            (CompileOptions { max_tokens: 0, ..options() }, "over 0"),
            (CompileOptions { page_tokens: 0, ..options() }, "from 1 to 65536, not 0"),
            (CompileOptions { page_tokens: 65537, ..options() }, "not 65537"),
        ] {
            let error = options.check(&graph).unwrap_err();
            assert!(error.kind() == ErrorKind::Config && error.message().contains(part), "{error}");
        }
    }
}
