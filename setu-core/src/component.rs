//! What every replaceable part has in common: a kind, a key, a description, a configuration.

use crate::backend::Backend;
use crate::batcher::Batcher;
use crate::config::Config;
use crate::error::Result;
use crate::model::Model;
use crate::scheduler::Scheduler;

/// The kinds of components. The list is open: more can follow without breaking what exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
#[non_exhaustive]
pub enum Kind {
    Scheduler = 0,
    Batcher = 1,
    Model = 2,
    Backend = 3,
}

impl Kind {
    pub const ALL: [Kind; 4] = [Kind::Scheduler, Kind::Batcher, Kind::Model, Kind::Backend];

    /// As in folder names, TOML tables and errors.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Scheduler => "scheduler",
            Kind::Batcher => "batcher",
            Kind::Model => "model",
            Kind::Backend => "backend",
        }
    }

    pub fn from_name(name: &str) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// The trait objects that a registry can hold.
pub trait ComponentKind: 'static {
    const KIND: Kind;
}

impl ComponentKind for dyn Scheduler {
    const KIND: Kind = Kind::Scheduler;
}

impl ComponentKind for dyn Batcher {
    const KIND: Kind = Kind::Batcher;
}

impl ComponentKind for dyn Model {
    const KIND: Kind = Kind::Model;
}

impl ComponentKind for dyn Backend {
    const KIND: Kind = Kind::Backend;
}

/// A part that an author exports; it also implements the trait of its kind.
///
/// ```
/// use setu_core::prelude::*;
///
/// /// Runs everybody in order of arrival.
/// #[derive(Config, Debug, Clone)]
/// pub struct EverybodyConfig {
///     /// Most sessions to run at once.
///     #[config(default = 64, min = 1)]
///     pub most: u32,
/// }
///
/// pub struct Everybody(EverybodyConfig);
///
/// impl Component for Everybody {
///     type Config = EverybodyConfig;
///     const KEY: &'static str = "everybody";
///     const DESCRIPTION: &'static str = "Runs everybody in order of arrival.";
///
///     fn build(config: EverybodyConfig) -> Result<Self> {
///         Ok(Everybody(config))
///     }
/// }
///
/// impl Scheduler for Everybody {
///     fn schedule(&mut self, view: &StepView<'_>, decisions: &mut Decisions<'_>) -> Result<()> {
///         for session in view.sessions.iter().take(self.0.most as usize) {
///             decisions.run(session.id);
///         }
///         Ok(())
///     }
/// }
///
/// setu_core::export_plugin!(scheduler: Everybody);
/// # fn main() {}
/// ```
pub trait Component: Sized + Send + 'static {
    type Config: Config;

    /// What `type = "…"` selects it by: lower case, digits and `_`.
    const KEY: &'static str;

    /// One line for listings.
    const DESCRIPTION: &'static str;

    /// Builds it from a configuration that has been checked field by field.
    ///
    /// # Errors
    /// What only this component can tell about its configuration or its surroundings.
    fn build(config: Self::Config) -> Result<Self>;
}
