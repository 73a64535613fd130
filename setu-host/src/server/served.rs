//! The models that are served, each an engine of its own: loaded from the start, or once a request names them.
//!
//! A load runs on a thread of its own, so that it holds up neither the threads of HTTP nor other models. Whoever names
//! the model meanwhile waits for the same load, and none of them ends it by going away.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use axum::http::StatusCode;
use tokio::sync::watch;

use super::error::ApiError;
use super::keys::Caller;
use super::metrics;
use crate::serving::Serving;

/// Loads a model.
pub type Loader = Box<dyn Fn() -> Result<Serving, String> + Send + Sync>;

/// Where a model comes from.
pub enum Source {
    Loaded(Box<Serving>),
    FirstUse(Loader),
}

/// A model to serve: the name that requests call it by, and where it comes from.
pub struct ModelSource {
    pub name: String,
    pub source: Source,
}

/// All models; the first is for requests that name none.
pub struct Models(Vec<Arc<Model>>);

/// One model.
pub struct Model {
    /// What it is called by in metrics, and first of all by requests.
    pub name: Arc<str>,
    /// Further names.
    pub aliases: Vec<String>,
    state: watch::Sender<State>,
    /// `None` where it was loaded from the start.
    load: Option<Loader>,
}

#[derive(Clone)]
pub enum State {
    Unloaded,
    Loading,
    Loaded(Arc<Serving>),
    Failed(Arc<str>),
}

/// The model that a request chose, ready to run.
#[derive(Clone)]
pub struct Served {
    /// As the request calls it.
    pub name: String,
    /// The model's first name.
    pub model: Arc<str>,
    pub serving: Arc<Serving>,
    /// Who chose it.
    pub caller: Caller,
    /// Most tokens of an answer that wait for its reader.
    pub max_backlog: u32,
}

impl Models {
    /// `aliases` are further names of the first.
    pub fn new(sources: Vec<ModelSource>, aliases: &[String]) -> Models {
        let model = |(index, ModelSource { name, source }): (usize, ModelSource)| {
            let (state, load) = match source {
                Source::Loaded(serving) => (State::Loaded(Arc::from(serving)), None),
                Source::FirstUse(load) => (State::Unloaded, Some(load)),
            };
            let aliases = if index == 0 { aliases.to_vec() } else { Vec::new() };
            Arc::new(Model { name: name.into(), aliases, state: watch::Sender::new(state), load })
        };
        Models(sources.into_iter().enumerate().map(model).collect())
    }

    pub fn iter(&self) -> impl Iterator<Item = &Arc<Model>> {
        self.0.iter()
    }

    /// The model called `asked`, or the first; it need not be loaded.
    ///
    /// # Errors
    /// There is none of this name.
    pub fn find(&self, asked: Option<&str>) -> Result<&Arc<Model>, ApiError> {
        let is_called = |model: &Model, name: &str| &*model.name == name || model.aliases.iter().any(|own| own == name);
        let found = match asked {
            Some(asked) => self.0.iter().find(|model| is_called(model, asked)),
            None => self.0.first(),
        };
        found.ok_or_else(|| {
            let names: Vec<&str> = self.names().map(|(name, _)| name).collect();
            let (asked, names) = (asked.unwrap_or_default(), names.join(", "));
            let message = format!("the model `{asked}` isn't served here; there is {names}");
            let error = ApiError { status: StatusCode::NOT_FOUND, ..ApiError::invalid("model", message) };
            error.with_code("model_not_found")
        })
    }

    /// Every name that requests may call a model by.
    pub fn names(&self) -> impl Iterator<Item = (&str, &Arc<Model>)> {
        self.0.iter().flat_map(move |model| {
            let own = std::iter::once(&*model.name).chain(model.aliases.iter().map(String::as_str));
            own.map(move |name| (name, model))
        })
    }

    /// Those that are loaded, by name.
    pub fn loaded(&self) -> Vec<(Arc<str>, Arc<Serving>)> {
        let loaded = |model: &Arc<Model>| match model.state() {
            State::Loaded(serving) => Some((model.name.clone(), serving)),
            _ => None,
        };
        self.0.iter().filter_map(loaded).collect()
    }

    /// The model called `asked`, or the first, loaded if need be.
    ///
    /// # Errors
    /// There is none of this name, or it can't be loaded.
    pub async fn load(&self, asked: Option<&str>) -> Result<(Arc<str>, Arc<Serving>), ApiError> {
        let model = self.find(asked)?;
        Ok((model.name.clone(), model.serving().await?))
    }
}

impl Model {
    pub fn state(&self) -> State {
        self.state.borrow().clone()
    }

    async fn serving(self: &Arc<Model>) -> Result<Arc<Serving>, ApiError> {
        let mut state = self.state.subscribe();
        self.begin();
        let settled = state.wait_for(|state| !matches!(state, State::Loading)).await;
        match settled.as_deref() {
            Ok(State::Loaded(serving)) => Ok(serving.clone()),
            Ok(State::Failed(why)) => Err(self.unavailable(why)),
            _ => Err(self.unavailable("the server is about to stop")),
        }
    }

    fn unavailable(&self, why: &str) -> ApiError {
        let message = format!("the model `{}` can't be loaded: {why}; the next request tries again", self.name);
        let error = ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message).with_code("model_unavailable");
        ApiError { retry_after_s: Some(1.0), ..error }
    }

    /// Has the model loaded, unless it is or somebody does already.
    fn begin(self: &Arc<Model>) {
        let begins = self.state.send_if_modified(|state| {
            let begins = matches!(state, State::Unloaded | State::Failed(_));
            if begins {
                *state = State::Loading;
            }
            begins
        });
        if !begins {
            return;
        }
        let model = self.clone();
        let work = move || {
            let load = || model.load.as_ref().map_or_else(|| Err("it has no source".to_owned()), |load| load());
            let loaded = catch_unwind(AssertUnwindSafe(load)).unwrap_or_else(|_| Err("the load panicked".to_owned()));
            let (state, outcome) = match loaded {
                Ok(serving) => (State::Loaded(Arc::new(serving)), "loaded"),
                Err(why) => {
                    tracing::error!(model = &*model.name, why, "a model can't be loaded");
                    (State::Failed(why.into()), "failed")
                }
            };
            metrics::count_load(&model.name, outcome);
            model.state.send_replace(state);
        };
        if let Err(error) = std::thread::Builder::new().name("setu-load".to_owned()).spawn(work) {
            self.state.send_replace(State::Failed(format!("no thread can be started: {error}").into()));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    /// A model whose loads wait for a word, fail with it, and are counted.
    fn failing() -> (Models, mpsc::Sender<&'static str>, Arc<AtomicU32>) {
        let (sender, words) = mpsc::channel::<&str>();
        let (words, count) = (Mutex::new(words), Arc::new(AtomicU32::new(0)));
        let counted = count.clone();
        let load: Loader = Box::new(move || {
            counted.fetch_add(1, Ordering::SeqCst);
            let word = words.lock().expect("one load at a time").recv().expect("a word");
            assert_ne!(word, "panic", "as it was told");
            Err(word.to_owned())
        });
        let source = ModelSource { name: "late".to_owned(), source: Source::FirstUse(load) };
        (Models::new(vec![source], &[]), sender, count)
    }

    #[tokio::test]
    async fn those_who_wait_share_a_load_and_none_of_them_ends_it() {
        let (models, words, count) = failing();
        let models = Arc::new(models);
        let ask = || {
            let models = models.clone();
            tokio::spawn(async move { models.load(None).await.map(|_| ()).expect_err("it fails").message })
        };
        let (first, second, third) = (ask(), ask(), ask());
        while !matches!(models.find(None).unwrap().state(), State::Loading) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        first.abort();
        assert!(first.await.unwrap_err().is_cancelled());
        words.send("no such file").unwrap();
        for waiting in [second, third] {
            assert!(waiting.await.unwrap().contains("`late` can't be loaded: no such file"));
        }
        assert_eq!(count.load(Ordering::SeqCst), 1);
        // The next one tries again, and a panic is a failure like any other.
        words.send("panic").unwrap();
        assert!(ask().await.unwrap().contains("the load panicked"));
        words.send("still none").unwrap();
        assert!(ask().await.unwrap().contains("still none"));
        assert_eq!(count.load(Ordering::SeqCst), 3);
    }
}
