//! The real model that tests run.

use std::io::Write;
use std::path::PathBuf;
use std::sync::OnceLock;

use setu_host::models::{Console, Store, StoreOptions};

/// The default model's file, fetched if need be.
///
/// `SETU_TEST_MODEL` names another copy of it. `SETU_TEST_SKIP_MODEL=1` has the tests that need it say that
/// they were skipped; without it, a model that can't be had is a failure.
///
/// # Panics
/// The model can't be fetched.
pub fn default_model() -> Option<PathBuf> {
    static MODEL: OnceLock<Option<PathBuf>> = OnceLock::new();
    MODEL
        .get_or_init(|| {
            if std::env::var_os("SETU_TEST_SKIP_MODEL").is_some() {
                return None;
            }
            if let Some(path) = std::env::var_os("SETU_TEST_MODEL") {
                return Some(path.into());
            }
            let store = Store::open(StoreOptions::from_env().expect("a cache folder")).expect("a store");
            let name = store.parse(&store.catalogue().default_model().name.clone()).expect("the default's name");
            match store.resolve(&name, &mut Console::stderr()) {
                Ok(model) => Some(model.path),
                Err(error) => {
                    panic!("the default model can't be had ({error}); SETU_TEST_SKIP_MODEL=1 skips what needs it")
                }
            }
        })
        .clone()
}

/// The default model's file as text, or a visible note that `test` was skipped.
pub fn default_model_or_skip(test: &str) -> Option<String> {
    let path = default_model();
    if path.is_none() {
        // Past the capture of the test harness, which shows nothing of tests that pass.
        let _ = writeln!(std::io::stderr(), "skipped: {test} (SETU_TEST_SKIP_MODEL is set)");
    }
    path.map(|path| path.to_str().expect("a UTF-8 path").to_owned())
}
