//! Configuration of components from one derived description.
//!
//! A component declares an ordinary struct. `derive(Config)` turns its fields and doc comments into
//! data, a slice of [`FieldSpec`], because that is what can come out of a `.so`: the host, which was
//! not compiled with the struct, builds flags, help, errors, reference pages and a JSON Schema from
//! the owned form, [`ConfigSpec`]. The component's table reaches it as JSON text and is read strictly
//! once more, so that a struct of this kind never holds a value that its description forbids.
//!
//! ```
//! use setu_core::config::Config;
//!
//! /// First come, first served.
//! #[derive(Config, Debug, Clone, PartialEq)]
//! pub struct FcfsConfig {
//!     /// Longest time a session may wait without ever running; 0 turns it off.
//!     #[config(default = 30.0, min = 0.0, unit = "s")]
//!     pub queue_timeout_s: f64,
//! }
//!
//! assert_eq!(FcfsConfig::default().queue_timeout_s, 30.0);
//! let error = FcfsConfig::from_json(r#"{"queue_timeout_s": -1, "chunk": 5}"#).unwrap_err();
//! assert_eq!(
//!     error.message(),
//!     "queue_timeout_s must be a number of at least 0 s, found -1\n\
//!      there is no setting chunk; known: queue_timeout_s"
//! );
//! ```
//!
//! # Attributes
//! On a field, in `#[config(…)]`:
//!
//! | attribute | meaning |
//! | --- | --- |
//! | `default = 30.0` | value where nobody sets one; a literal, a list of them, or a variant's path |
//! | `default` | an empty list or map |
//! | `min = 1`, `max = 10`, `above = 0.0` | bounds: inclusive, inclusive, exclusive |
//! | `power_of_two`, `multiple_of = 16` | for integers |
//! | `non_empty` | for text, lists and maps |
//! | `choices = ["a", "b"]` | the only texts allowed; an enum with `derive(ConfigEnum)` brings its own |
//! | `bytes` | a `u64` or `usize` that is written as a size: `default = "2GiB"` |
//! | `unit = "s"` | what the number counts |
//! | `example = 5.0` | a value worth showing |
//! | `deprecated = "use x instead"` | the field still works and warns |
//!
//! Bounds on a list or map hold for each element. A field of `Option<T>` may stay unset and takes no
//! default; any other field without a default must be set, and then the struct has no `Default`.
//! On the struct, `#[config(validate = path)]` names a `fn(&Self) -> setu_core::Result<()>` for rules
//! that span fields. It must be pure, as a configuration may be checked without being used.
//!
//! A field without doc comment doesn't compile, since nobody could tell what it is for:
//!
//! ```compile_fail
//! #[derive(setu_core::config::Config)]
//! /// Documented as a whole.
//! struct Silent {
//!     #[config(default = 1)]
//!     field: u32,
//! }
//! ```

mod allowed;
mod check;
mod docs;
mod field;
mod nearest;
mod read;
mod schema;
mod size;
mod spec;

pub use check::{Fault, Item, Problem, check_value, shown};
pub use docs::{comment, dotted, environment_name, toml_text};
pub use field::{Choice, FieldKind, FieldSpec, Literal, Number, Scalar};
pub use nearest::nearest;
pub use read::{FieldType, ScalarType, Values};
pub use serde_json::Value;
pub use setu_macros::{Config, ConfigEnum};
pub use size::{parse_size, size_text};
pub use spec::{ChoiceInfo, ConfigSpec, FieldInfo};

use serde_json::Map;

use crate::{Error, Result};

/// A struct of settings. Implemented by `derive(Config)`, never by hand.
pub trait Config: Sized {
    /// The struct's doc comment.
    const HELP: &'static str;
    const FIELDS: &'static [FieldSpec];

    /// Builds the struct from values that have been checked.
    #[doc(hidden)]
    fn read(values: &Values<'_>) -> Result<Self>;

    /// Checks the rules that span fields.
    ///
    /// # Errors
    /// Names the fields that contradict each other.
    fn validate(&self) -> Result<()> {
        Ok(())
    }

    /// The description in owned form.
    fn spec() -> ConfigSpec {
        ConfigSpec::new(Self::HELP, Self::FIELDS)
    }

    /// Reads a JSON object strictly.
    ///
    /// # Errors
    /// The text is no JSON object, or the table is refused by [`from_table`](Config::from_table).
    fn from_json(text: &str) -> Result<Self> {
        match serde_json::from_str(text) {
            Ok(Value::Object(table)) => Self::from_table(&table),
            Ok(other) => {
                Err(Error::config(format!("a configuration is a JSON object, not {}", shown(&other.to_string()))))
            }
            Err(error) => Err(Error::config(format!("the configuration is not JSON: {error}"))),
        }
    }

    /// Reads a table strictly: unknown keys, wrong types, values out of range and missing ones are refused.
    ///
    /// # Errors
    /// One line for each problem, naming the setting, what is allowed and the nearest known name.
    fn from_table(table: &Map<String, Value>) -> Result<Self> {
        let spec = Self::spec();
        let problems = spec.check(table);
        if !problems.is_empty() {
            let lines: Vec<String> = problems.iter().map(Problem::to_string).collect();
            return Err(Error::config(lines.join("\n")));
        }
        let config = Self::read(&Values::new(&spec, table))?;
        config.validate()?;
        Ok(config)
    }
}
