//! A config struct's description in owned form: what the host works on, and what crosses the ABI as JSON.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::check::check_value;
use super::field::{FieldKind, FieldSpec, Literal, Number, Scalar};
use crate::{Error, Result};

/// Raised when a reader of the old form would misunderstand the new one; added attributes don't count.
const FORMAT: u32 = 1;

/// No component needs more; a plugin that claims it is broken.
const MAX_FIELDS: usize = 512;
const MAX_JSON_BYTES: usize = 1 << 20;

/// The settings of one component or section.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ConfigSpec {
    /// The config struct's doc comment.
    #[serde(default)]
    pub help: String,
    pub fields: Vec<FieldInfo>,
}

/// One setting; the owned form of [`FieldSpec`], whose documentation holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FieldInfo {
    pub name: String,
    pub kind: FieldKind,
    pub help: String,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub optional: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min: Option<Number>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<Number>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub above: Option<Number>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub multiple_of: Option<u64>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub power_of_two: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub non_empty: bool,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub choices: Vec<ChoiceInfo>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unit: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub example: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deprecated: Option<String>,
}

/// One allowed text of a field.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChoiceInfo {
    pub name: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub help: String,
}

#[derive(Serialize)]
struct Envelope<'a> {
    format: u32,
    #[serde(flatten)]
    spec: &'a ConfigSpec,
}

impl ConfigSpec {
    pub fn new(help: &str, fields: &[FieldSpec]) -> ConfigSpec {
        ConfigSpec { help: help.to_owned(), fields: fields.iter().map(FieldInfo::from).collect() }
    }

    /// A component without settings.
    pub fn empty() -> ConfigSpec {
        ConfigSpec { help: String::new(), fields: Vec::new() }
    }

    pub fn field(&self, name: &str) -> Option<&FieldInfo> {
        self.fields.iter().find(|field| field.name == name)
    }

    /// The description as it crosses the ABI.
    ///
    /// # Errors
    /// A bound is no JSON number, which [`verify`](ConfigSpec::verify) would have refused too.
    pub fn to_json(&self) -> Result<String> {
        serde_json::to_string(&Envelope { format: FORMAT, spec: self })
            .map_err(|error| Error::contract(format!("a configuration that cannot be described: {error}")))
    }

    /// Reads what [`to_json`](ConfigSpec::to_json) wrote, perhaps in a newer version, and verifies it.
    ///
    /// Attributes that this version doesn't know are ignored, since the plugin checks its values itself
    /// too. A field of an unknown kind is refused: nobody could write or show its value.
    ///
    /// # Errors
    /// The text is no such description, is of another format, or fails [`verify`](ConfigSpec::verify).
    pub fn from_json(text: &str) -> Result<ConfigSpec> {
        let refuse = |why: String| Error::contract(format!("description of the configuration: {why}"));
        if text.len() > MAX_JSON_BYTES {
            return Err(refuse(format!("{} bytes are more than the {MAX_JSON_BYTES} allowed", text.len())));
        }
        let value: Value = serde_json::from_str(text).map_err(|error| refuse(error.to_string()))?;
        match value.get("format").and_then(Value::as_u64) {
            Some(format) if format == u64::from(FORMAT) => {}
            Some(format) => {
                return Err(refuse(format!(
                    "format {format} is not {FORMAT}, the one that this version of Setu reads"
                )));
            }
            None => return Err(refuse("it names no format".into())),
        }
        for field in value.get("fields").and_then(Value::as_array).into_iter().flatten() {
            let name = field.get("name").and_then(Value::as_str).unwrap_or("?");
            if let Some(kind) = field.get("kind").and_then(Value::as_str)
                && FieldKind::from_name(kind).is_none()
            {
                return Err(Error::unsupported(format!(
                    "the setting {name:?} is of the kind {kind:?}, which this version of Setu does not know: \
                     use a newer Setu, or the plugin's build for this one"
                )));
            }
        }
        let spec = ConfigSpec::deserialize(value).map_err(|error| refuse(error.to_string()))?;
        spec.verify()?;
        Ok(spec)
    }

    /// Checks the description itself: names, bounds, and defaults and examples against their own rules.
    ///
    /// # Errors
    /// Names the first field that is described wrongly.
    pub fn verify(&self) -> Result<()> {
        if self.fields.len() > MAX_FIELDS {
            return Err(Error::contract(format!("{} settings are more than {MAX_FIELDS}", self.fields.len())));
        }
        let mut names = BTreeSet::new();
        for field in &self.fields {
            field.verify().map_err(|why| Error::contract(format!("the setting {:?} {why}", field.name)))?;
            if !names.insert(&field.name) {
                return Err(Error::contract(format!("the setting {:?} is declared twice", field.name)));
            }
        }
        Ok(())
    }
}

impl FieldInfo {
    /// Whether a value must be given.
    pub fn is_required(&self) -> bool {
        self.default.is_none() && !self.optional
    }

    fn verify(&self) -> Result<(), String> {
        let scalar = self.kind.scalar();
        if !is_setting_name(&self.name) {
            return Err("is not named in snake_case (a to z, 0 to 9, single underscores)".into());
        }
        if self.name == "type" {
            return Err("has the name that chooses the component".into());
        }
        if self.help.trim().is_empty() {
            return Err("has no help text".into());
        }
        let bounds = [self.min, self.max, self.above];
        if bounds.iter().flatten().any(|bound| bound.to_json().is_none()) {
            return Err("has a bound that is not a finite 64-bit number".into());
        }
        let numeric = bounds.iter().any(Option::is_some) || self.power_of_two || self.multiple_of.is_some();
        if numeric && !scalar.is_number() {
            return Err(format!("has bounds, which a {} cannot have", self.kind));
        }
        if (self.power_of_two || self.multiple_of.is_some()) && scalar.integer_range().is_none() {
            return Err(format!("asks for a power or a multiple, which a {} cannot be", self.kind));
        }
        if self.multiple_of == Some(0) {
            return Err("must be a multiple of 0".into());
        }
        if let (Some(low), Some(high)) = (self.min.or(self.above), self.max)
            && low > high
        {
            return Err(format!("is bounded by {low} and {high}, between which nothing lies"));
        }
        if scalar == Scalar::Choice && self.choices.is_empty() {
            return Err("is a choice of nothing".into());
        }
        if !self.choices.is_empty() && !scalar.is_text() {
            return Err(format!("has choices, which a {} cannot have", self.kind));
        }
        if self.optional && self.default.is_some() {
            return Err("is optional and has a default".into());
        }
        for (what, value) in [("default", &self.default), ("example", &self.example)] {
            if let Some(value) = value {
                check_value(self, value).map_err(|problem| format!("has a wrong {what}: {problem}"))?;
            }
        }
        Ok(())
    }
}

impl From<&FieldSpec> for FieldInfo {
    fn from(spec: &FieldSpec) -> FieldInfo {
        FieldInfo {
            name: spec.name.to_owned(),
            kind: spec.kind,
            help: spec.help.to_owned(),
            optional: spec.optional,
            default: spec.default.map(|literal| literal.to_json(spec.kind)),
            min: spec.min,
            max: spec.max,
            above: spec.above,
            multiple_of: spec.multiple_of,
            power_of_two: spec.power_of_two,
            non_empty: spec.non_empty,
            choices: spec
                .choices
                .iter()
                .map(|choice| ChoiceInfo { name: choice.name.to_owned(), help: choice.help.to_owned() })
                .collect(),
            unit: spec.unit.map(str::to_owned),
            example: spec.example.map(|literal| literal.to_json(spec.kind)),
            deprecated: spec.deprecated.map(str::to_owned),
        }
    }
}

impl Literal {
    /// The literal as JSON; `null`, which no check passes, where JSON has no such number.
    fn to_json(self, kind: FieldKind) -> Value {
        let number = |number: Number| number.to_json().map_or(Value::Null, Value::Number);
        match self {
            Literal::Bool(value) => Value::Bool(value),
            Literal::Int(value) => number(Number::Int(value)),
            Literal::Float(value) => number(Number::Float(value)),
            Literal::Str(value) => Value::String(value.to_owned()),
            Literal::List(items) => Value::Array(items.iter().map(|item| item.to_json(kind)).collect()),
            Literal::Empty if matches!(kind, FieldKind::Map(_)) => Value::Object(Default::default()),
            Literal::Empty => Value::Array(Vec::new()),
        }
    }
}

/// Single underscores only, because two of them separate section and setting in the environment.
fn is_setting_name(name: &str) -> bool {
    name.len() <= 64
        && name.starts_with(|first: char| first.is_ascii_lowercase())
        && !name.ends_with('_')
        && !name.contains("__")
        && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
}
