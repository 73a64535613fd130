//! What people read about a setting: help, reference pages and example files, all from its description.

use std::fmt::Write;

use serde_json::Value;

use super::field::{FieldKind, Scalar};
use super::spec::{ConfigSpec, FieldInfo};

impl FieldInfo {
    /// The value's place in a usage line: `SECONDS`, `SIZE`, `fast|slow`, `ITEM,…`.
    pub fn value_name(&self) -> String {
        let scalar = self.kind.scalar();
        let one = match (&self.unit, scalar) {
            (Some(unit), _) => match unit.as_str() {
                "s" => "SECONDS".into(),
                "ms" => "MILLISECONDS".into(),
                "us" => "MICROSECONDS".into(),
                unit => unit.to_uppercase().replace(' ', "_"),
            },
            (None, _) if !self.choices.is_empty() => {
                self.choices.iter().map(|choice| choice.name.as_str()).collect::<Vec<&str>>().join("|")
            }
            (None, Scalar::Bool) => "true|false".into(),
            (None, Scalar::Bytes) => "SIZE".into(),
            (None, Scalar::Path) => "PATH".into(),
            (None, _) if scalar.is_float() => "NUMBER".into(),
            (None, _) if scalar.is_number() => "N".into(),
            (None, _) => "TEXT".into(),
        };
        match self.kind {
            FieldKind::One(_) => one,
            FieldKind::List(_) => format!("{one},…"),
            FieldKind::Map(_) => format!("NAME={one},…"),
        }
    }

    /// The help of a command-line flag.
    pub fn flag_help(&self) -> String {
        let mut text = self.help.clone();
        for choice in self.choices.iter().filter(|choice| !choice.help.is_empty()) {
            let _ = write!(text, "\n- {}: {}", choice.name, choice.help);
        }
        text.push(if text.contains('\n') { '\n' } else { ' ' });
        let _ = write!(text, "[{}]", self.allowed());
        if let Some(default) = &self.default {
            let _ = write!(text, " [default: {}]", toml_text(default));
        }
        if let Some(instead) = &self.deprecated {
            let _ = write!(text, " [deprecated: {instead}]");
        }
        text
    }

    fn default_text(&self) -> String {
        match &self.default {
            Some(default) => format!("`{}`", toml_text(default)),
            None if self.optional => "unset".into(),
            None => "none: it must be set".into(),
        }
    }
}

impl ConfigSpec {
    /// A Markdown section for each setting of `[section]`, whose headings have `level` hashes.
    pub fn reference(&self, section: &str, level: usize) -> String {
        let hashes = "#".repeat(level);
        let mut text = String::new();
        for field in &self.fields {
            let _ = write!(text, "{hashes} `{}`\n\n", field.name);
            if let Some(instead) = &field.deprecated {
                let _ = write!(text, "**Deprecated:** {instead}\n\n");
            }
            let _ = write!(text, "{}\n\n", field.help);
            let _ = writeln!(text, "- Value: {}", field.allowed());
            for choice in field.choices.iter().filter(|choice| !choice.help.is_empty()) {
                let _ = writeln!(text, "  - `{}`: {}", choice.name, choice.help);
            }
            let _ = writeln!(text, "- Default: {}", field.default_text());
            if let Some(example) = &field.example {
                let _ = writeln!(text, "- Example: `{} = {}`", field.name, toml_text(example));
            }
            let _ = writeln!(text, "- Flag: `--{} {}`", dotted(section, &field.name), field.value_name());
            let _ = write!(text, "- Environment: `{}`\n\n", environment_name(section, &field.name));
        }
        text
    }

    /// The settings as commented TOML lines, to stand below the header of their table.
    ///
    /// Prose opens with `# ` and a setting with `#`, so that taking away the `#` of a line sets it.
    pub fn example(&self) -> String {
        let mut text = String::new();
        for (n, field) in self.fields.iter().enumerate() {
            if n > 0 {
                text.push('\n');
            }
            text += &comment(&field.help);
            for choice in field.choices.iter().filter(|choice| !choice.help.is_empty()) {
                text += &comment(&format!("- {}: {}", choice.name, choice.help));
            }
            let mut allowed = field.allowed();
            if let Some(first) = allowed.get_mut(..1) {
                first.make_ascii_uppercase();
            }
            text += &comment(&match (&field.default, field.optional) {
                (Some(_), _) => format!("{allowed}."),
                (None, true) => format!("{allowed}. Not set by default."),
                (None, false) => format!("{allowed}. It must be set."),
            });
            if let Some(instead) = &field.deprecated {
                text += &comment(&format!("Deprecated: {instead}"));
            }
            let _ = match (&field.default, &field.example) {
                (Some(default), _) => writeln!(text, "#{} = {}", field.name, toml_text(default)),
                (None, Some(example)) => writeln!(text, "# {} = {}", field.name, toml_text(example)),
                (None, None) => writeln!(text, "# {} = …", field.name),
            };
        }
        text
    }
}

/// `section.name`, or the name alone at the top of a file.
pub fn dotted(section: &str, name: &str) -> String {
    if section.is_empty() { name.to_owned() } else { format!("{section}.{name}") }
}

/// The environment variable of a setting: `SETU_SCHEDULER__QUEUE_TIMEOUT_S`.
pub fn environment_name(section: &str, name: &str) -> String {
    let separator = if section.is_empty() { "" } else { "__" };
    format!("SETU_{}{separator}{}", section.to_uppercase(), name.to_uppercase())
}

/// A value as TOML; `null`, which TOML lacks, as nothing.
pub fn toml_text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::Bool(value) => value.to_string(),
        Value::Number(number) => number.to_string(),
        Value::String(text) => toml_string(text),
        Value::Array(items) => {
            format!("[{}]", items.iter().map(toml_text).collect::<Vec<String>>().join(", "))
        }
        Value::Object(entries) if entries.is_empty() => "{}".into(),
        Value::Object(entries) => {
            let bare = |key: &str| {
                !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-')
            };
            let key = |key: &str| if bare(key) { key.to_owned() } else { toml_string(key) };
            let entries = entries.iter().map(|(name, value)| format!("{} = {}", key(name), toml_text(value)));
            format!("{{ {} }}", entries.collect::<Vec<String>>().join(", "))
        }
    }
}

fn toml_string(text: &str) -> String {
    let mut quoted = String::from("\"");
    for char in text.chars() {
        match char {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            '\n' => quoted.push_str("\\n"),
            '\t' => quoted.push_str("\\t"),
            char if char.is_control() => {
                let _ = write!(quoted, "\\u{:04X}", char as u32);
            }
            char => quoted.push(char),
        }
    }
    quoted.push('"');
    quoted
}

/// `text` as TOML comment lines, wrapped at 100 columns.
pub fn comment(text: &str) -> String {
    const WIDTH: usize = 98;
    let mut lines = String::new();
    for paragraph in text.lines() {
        let mut line = String::new();
        for word in paragraph.split_whitespace() {
            if !line.is_empty() && line.chars().count() + 1 + word.chars().count() > WIDTH {
                let _ = writeln!(lines, "# {line}");
                line.clear();
            }
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
        let _ = writeln!(lines, "{}", format!("# {line}").trim_end());
    }
    lines
}
