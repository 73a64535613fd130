//! What a setting allows, in words. Errors, help, reference and schema all say it with these sentences.

use super::field::{FieldKind, Number, Scalar};
use super::size::size_text;
use super::spec::FieldInfo;

/// The numbers that a field allows, its type's range included.
pub(super) struct Bounds {
    pub lower: Option<Number>,
    /// Whether `lower` itself is refused.
    pub exclusive: bool,
    pub upper: Option<Number>,
}

impl FieldInfo {
    /// What the field allows: `a number between 0 and 10 s`, `one of "fast", "slow"`, `a list of integers`.
    pub fn allowed(&self) -> String {
        let scalar = self.kind.scalar();
        match self.kind {
            FieldKind::One(_) => self.one_allowed(),
            FieldKind::List(_) if scalar == Scalar::Choice || !self.choices.is_empty() => {
                format!(
                    "a list {}drawn from {}",
                    if self.non_empty { "of one or more " } else { "" },
                    self.choice_list()
                )
            }
            FieldKind::List(_) => format!("a list of {}{}", self.at_least_one(), self.many_allowed()),
            FieldKind::Map(_) => format!("a table of {}names with {}", self.at_least_one(), self.many_allowed()),
        }
    }

    /// What one value, or one element of a list or map, may be.
    pub(super) fn one_allowed(&self) -> String {
        let scalar = self.kind.scalar();
        if scalar.is_number() {
            return self.number_allowed(false, self.stated_bounds());
        }
        match scalar {
            Scalar::Bool => "true or false".into(),
            _ if !self.choices.is_empty() => format!("one of {}", self.choice_list()),
            Scalar::Path => "a path".into(),
            _ if self.non_empty && matches!(self.kind, FieldKind::One(_)) => "text that is not empty".into(),
            _ => "text".into(),
        }
    }

    /// As [`one_allowed`](FieldInfo::one_allowed), with the type's range written out.
    pub(super) fn range_allowed(&self) -> String {
        self.number_allowed(false, self.bounds())
    }

    pub(super) fn bounds(&self) -> Bounds {
        let range = self.kind.scalar().integer_range();
        let type_lower = range.map(|(low, _)| Number::Int(low));
        let upper = self.max.or(range.map(|(_, high)| Number::Int(high)));
        match (self.above, self.min) {
            (Some(above), min) if min.is_none_or(|min| min <= above) => {
                Bounds { lower: Some(above), exclusive: true, upper }
            }
            (_, min) => Bounds { lower: min.or(type_lower), exclusive: false, upper },
        }
    }

    /// The bounds worth telling before anybody broke them: not those of the type, except that
    /// unsigned integers start at 0 and small ones end early.
    fn stated_bounds(&self) -> Bounds {
        let mut bounds = self.bounds();
        let scalar = self.kind.scalar();
        if self.max.is_none() && !matches!(scalar, Scalar::U8 | Scalar::U16) {
            bounds.upper = None;
        }
        let implied = self.min.is_none() && self.above.is_none();
        let signed = matches!(scalar, Scalar::I32 | Scalar::I64);
        if implied && (signed || scalar == Scalar::Bytes || self.power_of_two || self.multiple_of.is_some()) {
            bounds.lower = None;
        }
        bounds
    }

    fn number_allowed(&self, plural: bool, bounds: Bounds) -> String {
        let scalar = self.kind.scalar();
        let noun = match (self.power_of_two, self.multiple_of, plural) {
            (true, Some(n), false) => format!("a power of two that is a multiple of {}", self.number_text(n)),
            (true, Some(n), true) => format!("powers of two that are multiples of {}", self.number_text(n)),
            (true, None, false) => "a power of two".into(),
            (true, None, true) => "powers of two".into(),
            (false, Some(n), false) => format!("a multiple of {}", self.number_text(n)),
            (false, Some(n), true) => format!("multiples of {}", self.number_text(n)),
            (false, None, _) => match (scalar, plural) {
                (Scalar::Bytes, false) => "a size (such as 2GiB)".into(),
                (Scalar::Bytes, true) => "sizes (such as 2GiB)".into(),
                (_, false) if scalar.is_float() => "a number".into(),
                (_, true) if scalar.is_float() => "numbers".into(),
                (_, false) => "an integer".into(),
                (_, true) => "integers".into(),
            },
        };
        let text = |bound: Number| match bound {
            Number::Int(bytes) if scalar == Scalar::Bytes => u64::try_from(bytes).map_or(bytes.to_string(), size_text),
            bound => bound.to_string(),
        };
        let range = match (bounds.lower, bounds.upper) {
            (None, None) => String::new(),
            (Some(low), None) if bounds.exclusive => format!(" above {}", text(low)),
            (Some(low), None) => format!(" of at least {}", text(low)),
            (None, Some(high)) => format!(" of at most {}", text(high)),
            (Some(low), Some(high)) if bounds.exclusive => format!(" above {} and at most {}", text(low), text(high)),
            (Some(low), Some(high)) => format!(" between {} and {}", text(low), text(high)),
        };
        match &self.unit {
            Some(unit) if range.is_empty() && self.multiple_of.is_none() => format!("{noun} in {unit}"),
            Some(unit) if !range.is_empty() => format!("{noun}{range} {unit}"),
            _ => format!("{noun}{range}"),
        }
    }

    fn many_allowed(&self) -> String {
        let scalar = self.kind.scalar();
        if scalar.is_number() {
            return self.number_allowed(true, self.stated_bounds());
        }
        match scalar {
            Scalar::Bool => "true or false".into(),
            _ if !self.choices.is_empty() => format!("any of {}", self.choice_list()),
            Scalar::Path => "paths".into(),
            _ => "texts".into(),
        }
    }

    fn at_least_one(&self) -> &'static str {
        if self.non_empty { "one or more " } else { "" }
    }

    fn number_text(&self, n: u64) -> String {
        match self.kind.scalar() {
            Scalar::Bytes => size_text(n),
            _ => n.to_string(),
        }
    }

    fn choice_list(&self) -> String {
        let names: Vec<String> = self.choices.iter().map(|choice| format!("{:?}", choice.name)).collect();
        names.join(", ")
    }
}
