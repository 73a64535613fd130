//! Tenants by name: the number that the engine accounts them under, and their weight.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Mutex, PoisonError};

use setu_core::TenantId;
use setu_core::config::Config;

/// Whom requests are accounted to.
#[derive(Config, Debug, Clone, PartialEq)]
pub struct TenantsConfig {
    /// Shares under contention by a tenant's name, 1 where none is given; `default` is whoever names no tenant.
    #[config(default, above = 0.0, max = 1e6)]
    pub weights: BTreeMap<String, f64>,
}

/// Gives names their numbers.
#[derive(Debug)]
pub struct Tenants {
    config: TenantsConfig,
    ids: Mutex<HashMap<String, TenantId>>,
}

/// The name of whoever names no tenant.
const DEFAULT: &str = "default";

/// Names beside the configured ones that are told apart; all further ones are accounted together, so that nobody can
/// fill the memory with names.
const MOST_NAMES: usize = 1 << 16;
const OTHERS: &str = "others";

impl Tenants {
    pub fn new(config: TenantsConfig) -> Tenants {
        Tenants { config, ids: Mutex::new(HashMap::from([(DEFAULT.to_owned(), TenantId(0))])) }
    }

    /// The tenant called `name`, or the one without name, and its weight. The same name always has the same id.
    pub fn get(&self, name: Option<&str>) -> (TenantId, f64) {
        let mut name = name.unwrap_or(DEFAULT);
        let mut ids = self.ids.lock().unwrap_or_else(PoisonError::into_inner);
        let configured = self.config.weights.contains_key(name);
        if !configured && !ids.contains_key(name) && ids.len() >= MOST_NAMES {
            name = OTHERS;
        }
        let next = TenantId(ids.len() as u32);
        let id = *ids.entry(name.to_owned()).or_insert(next);
        (id, self.config.weights.get(name).copied().unwrap_or(1.0))
    }

    /// The names of those of `wanted` that are known.
    pub fn names(&self, wanted: &HashSet<TenantId>) -> HashMap<TenantId, String> {
        let ids = self.ids.lock().unwrap_or_else(PoisonError::into_inner);
        ids.iter().filter(|(_, id)| wanted.contains(id)).map(|(name, &id)| (id, name.clone())).collect()
    }

    /// A name to count under, one of few: that of a configured tenant, or what stands for all the others.
    pub fn label(&self, name: Option<&str>) -> &str {
        let Some(name) = name else { return DEFAULT };
        self.config.weights.get_key_value(name).map_or(OTHERS, |(name, _)| name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_keep_their_ids_and_have_their_weights() {
        let weights = BTreeMap::from([("paying".to_owned(), 3.0), ("default".to_owned(), 0.5)]);
        let tenants = Tenants::new(TenantsConfig { weights });
        let asked = [None, Some("paying"), Some("other"), Some("default"), Some("paying")];
        let expected = [(0, 0.5), (1, 3.0), (2, 1.0), (0, 0.5), (1, 3.0)];
        assert_eq!(asked.map(|name| tenants.get(name)), expected.map(|(id, weight)| (TenantId(id), weight)));
        assert_eq!(asked.map(|name| tenants.label(name)), ["default", "paying", "others", "default", "paying"]);
        let names = tenants.names(&HashSet::from([TenantId(1), TenantId(2), TenantId(9)]));
        assert_eq!(names, HashMap::from([(TenantId(1), "paying".to_owned()), (TenantId(2), "other".to_owned())]));
    }

    #[test]
    fn names_without_end_share_one_account() {
        let tenants = Tenants::new(TenantsConfig { weights: BTreeMap::from([("paying".to_owned(), 3.0)]) });
        let ids: std::collections::BTreeSet<TenantId> =
            (0..MOST_NAMES + 100).map(|n| tenants.get(Some(&format!("{n}"))).0).collect();
        assert_eq!(ids.len(), MOST_NAMES);
        assert_eq!(tenants.get(Some("one more")), tenants.get(Some("others")));
        assert_ne!(tenants.get(Some("paying")), tenants.get(Some("others")));
    }
}
