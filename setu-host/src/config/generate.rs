//! Files that are written from the layout: the example configuration, the reference and the JSON Schema.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use setu_core::config::{ConfigSpec, FieldInfo, comment, toml_text};

use super::flags::title;
use super::layers::MODELS;
use super::layout::{ComponentInfo, Components, Layout, ModelTables, Section, TypeChoice};
use super::resolve::TYPE;

const GENERATED: &str = "<!-- Generated from the doc comments of the config structs; edit those. -->\n\n";

/// `setu.example.toml`: every setting with its meaning and default, commented out.
///
/// Where a section chooses a component, the default's settings stand in the table and those of the
/// others below it, so that one reads what else there is.
pub fn example(layout: &Layout) -> String {
    let mut text = comment(
        "Every setting of Setu with its default. A line that opens with `#` and no space is a setting: \
         take away the `#` to change it.",
    );
    if !layout.root.fields.is_empty() {
        let _ = write!(text, "\n{}", layout.root.example());
    }
    for section in &layout.sections {
        let _ = write!(text, "\n\n{}[{}]\n", comment(&section.help), section.name);
        let default = section.components.as_ref().and_then(|components| example_type(components, &mut text));
        push_example(&mut text, &section.own);
        if let Some((_, component)) = default {
            push_example(&mut text, &component.spec);
        }
        for (key, component) in section.components.iter().flat_map(|components| &components.known) {
            if default.is_none_or(|(default, _)| default != key) {
                let _ = write!(text, "\n{}", comment(&format!("{key}: {}", component.description)));
                text += &aside(&format!("{TYPE} = {}\n{}", toml_text(&key.as_str().into()), component.spec.example()));
            }
        }
    }
    if let Some(tables) = &layout.models {
        let _ = write!(text, "\n\n{}", comment(&tables.own.help));
        let ModelTables { identity, required, .. } = tables;
        let table = format!("[{MODELS}.big]\n{}\n[{MODELS}.big.{identity}]\n{required} = …", tables.own.example());
        text += &aside(&table);
    }
    text
}

fn example_type<'a>(components: &'a Components, text: &mut String) -> Option<(&'a str, &'a ComponentInfo)> {
    let keys: Vec<&str> = components.known.keys().map(String::as_str).collect();
    let _ = write!(text, "{}", comment(&format!("One of: {}.", keys.join(", "))));
    match &components.choice {
        TypeChoice::Default(key) => {
            let (key, component) = components.known.get_key_value(key)?;
            let _ = writeln!(text, "#{TYPE} = {}", toml_text(&key.as_str().into()));
            Some((key, component))
        }
        _ => {
            let _ = writeln!(text, "# {TYPE} = …");
            None
        }
    }
}

/// The table of another component, set off inside the comment, where its settings need no mark of their own.
fn aside(table: &str) -> String {
    let line = |line: &str| match line.strip_prefix('#') {
        Some(setting) if setting.starts_with(|first: char| first.is_ascii_lowercase()) => format!("#     {setting}\n"),
        _ => format!("{}\n", format!("#     {line}").trim_end()),
    };
    table.lines().map(line).collect()
}

fn push_example(text: &mut String, spec: &ConfigSpec) {
    if !spec.fields.is_empty() {
        let _ = write!(text, "\n{}", spec.example());
    }
}

/// The reference as Markdown pages by path: `index.md`, `<section>.md`, `<section>/<key>.md`.
pub fn reference(layout: &Layout) -> BTreeMap<PathBuf, String> {
    let mut pages = BTreeMap::new();
    let mut index = format!("{GENERATED}# Configuration reference\n\n");
    index += "Every setting may stand in `setu.toml`, in the environment, or among the flags; a flag wins over the \
              environment, which wins over the file.\n\n";
    if !layout.root.fields.is_empty() {
        let _ = write!(index, "## At the top of the file\n\n{}", layout.root.reference("", 3));
    }
    index += "## Sections\n\n";
    for section in &layout.sections {
        let name = &section.name;
        let _ = writeln!(index, "- [`[{name}]`]({name}.md): {}", first_sentence(&section.help));
        let mut page = format!("{GENERATED}# `[{name}]`\n\n{}\n\n", section.help);
        if let Some(components) = &section.components {
            page += &components_list(section, components);
        }
        page += &section.own.reference(name, 2);
        pages.insert(format!("{name}.md").into(), with_one_newline(page));
        for (key, component) in section.components.iter().flat_map(|components| &components.known) {
            let _ = writeln!(index, "  - [`{key}`]({name}/{key}.md): {}", first_sentence(&component.description));
            pages.insert(Path::new(name).join(format!("{key}.md")), component_page(name, key, component));
        }
    }
    if let Some(tables) = &layout.models {
        let _ = writeln!(index, "- [`[{MODELS}.<name>]`]({MODELS}.md): {}", first_sentence(&tables.own.help));
        pages.insert(format!("{MODELS}.md").into(), models_page(tables));
    }
    pages.insert("index.md".into(), with_one_newline(index));
    pages
}

fn models_page(tables: &ModelTables) -> String {
    let ModelTables { own, identity, required, overlaid } = tables;
    let mut page = format!("{GENERATED}# `[{MODELS}.<name>]`\n\n{}\n\n", own.help);
    let _ = write!(page, "`[{MODELS}.<name>.{identity}]` says which model it is, and must give `{required}`; of ");
    let _ =
        write!(page, "[`[{identity}]`]({identity}.md) nothing is taken over. Of other sections a model takes what is ");
    let _ = write!(page, "said of all, with what its own table says laid over it, flags and environment included:\n\n");
    for section in overlaid {
        let _ = writeln!(page, "- `[{MODELS}.<name>.{section}]`: see [`[{section}]`]({section}.md)");
    }
    let _ = write!(page, "\n```toml\n[{MODELS}.big]\n");
    for field in &own.fields {
        let value = field.choices.last().map(|choice| Value::from(choice.name.as_str())).or(field.default.clone());
        let _ = writeln!(page, "{} = {}", field.name, value.map_or_else(|| "…".to_owned(), |value| toml_text(&value)));
    }
    let _ = write!(page, "\n[{MODELS}.big.{identity}]\n{required} = \"./big.gguf\"\n```\n\n");
    page += "Such a table stands in the file alone: there are neither flags nor variables for it.\n\n";
    let is_of_other_layers = |line: &str| line.starts_with("- Flag: ") || line.starts_with("- Environment: ");
    for line in own.reference(MODELS, 2).lines().filter(|line| !is_of_other_layers(line)) {
        let _ = writeln!(page, "{line}");
    }
    with_one_newline(page)
}

fn components_list(section: &Section, components: &Components) -> String {
    let name = &section.name;
    let mut text = format!("`{TYPE}` chooses the component:\n\n");
    for (key, component) in &components.known {
        let default = if components.choice == TypeChoice::Default(key.clone()) { " (default)" } else { "" };
        let _ = writeln!(text, "- [`{key}`]({name}/{key}.md){default}: {}", component.description);
    }
    text.push('\n');
    text
}

fn component_page(section: &str, key: &str, component: &ComponentInfo) -> String {
    let (description, help) = (&component.description, &component.spec.help);
    let mut page = format!("{GENERATED}# {} `{key}`\n\n", title(section));
    if !help.starts_with(description) {
        let _ = write!(page, "{description}\n\n");
    }
    if !help.is_empty() {
        let _ = write!(page, "{help}\n\n");
    }
    let _ = write!(page, "```toml\n[{section}]\n{TYPE} = {}\n```\n\n", toml_text(&key.into()));
    if component.spec.fields.is_empty() {
        page += "It has no settings.\n";
    }
    page += &component.spec.reference(section, 2);
    with_one_newline(page)
}

fn first_sentence(text: &str) -> &str {
    let paragraph = text.split("\n\n").next().unwrap_or_default();
    paragraph.find(". ").map_or(paragraph, |end| &paragraph[..end + 1])
}

fn with_one_newline(text: String) -> String {
    format!("{}\n", text.trim_end())
}

/// The JSON Schema (draft 2020-12) of `setu.toml`.
pub fn json_schema(layout: &Layout) -> Value {
    let mut properties = layout.root.schema_properties();
    for section in &layout.sections {
        properties.insert(section.name.clone(), section_schema(section, false));
    }
    if let Some(tables) = &layout.models {
        properties.insert(MODELS.to_owned(), models_schema(layout, tables));
    }
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "setu.toml",
        "type": "object",
        "properties": properties,
        "additionalProperties": false,
    })
}

fn models_schema(layout: &Layout, tables: &ModelTables) -> Value {
    let mut properties = tables.own.schema_properties();
    for section in layout.model_sections() {
        let mut schema = section_schema(section, section.name != tables.identity);
        if section.name == tables.identity {
            for table in schema["oneOf"].as_array_mut().into_iter().flatten() {
                let mut required = table["required"].as_array().cloned().unwrap_or_default();
                required.push(tables.required.as_str().into());
                table["required"] = required.into();
            }
        }
        properties.insert(section.name.clone(), schema);
    }
    let mut table = table_schema(&tables.own.help, properties, false);
    table["required"] = json!([tables.identity]);
    json!({"type": "object", "description": tables.own.help, "additionalProperties": table})
}

/// `inherits`: a table without `type` may be of any component, since another table may have chosen it.
fn section_schema(section: &Section, inherits: bool) -> Value {
    let Some(components) = &section.components else {
        return table_schema(&section.help, section.own.schema_properties(), false);
    };
    let mut variants: Vec<Value> = components
        .known
        .iter()
        .map(|(key, component)| {
            let mut properties = Map::new();
            properties.insert(TYPE.into(), json!({"const": key, "description": component.description}));
            properties.extend(section.own.schema_properties());
            properties.extend(component.spec.schema_properties());
            let default = components.choice == TypeChoice::Default(key.clone());
            table_schema(&component.description, properties, inherits || !default)
        })
        .collect();
    if inherits || components.choice == TypeChoice::Later {
        variants.push(undecided_schema(section));
    }
    json!({"description": section.help, "oneOf": variants})
}

/// The table without `type`, of which only the program will know whose settings it holds.
fn undecided_schema(section: &Section) -> Value {
    let mut properties = section.own.schema_properties();
    let fields = section.components.iter().flat_map(|components| components.known.values());
    for field in fields.flat_map(|component| &component.spec.fields) {
        let schemas: Vec<Value> =
            section.components_with(&field.name).map(|(_, field): (&str, &FieldInfo)| field.schema()).collect();
        let schema = if schemas.iter().all(|schema| *schema == schemas[0]) {
            schemas[0].clone()
        } else {
            json!({"anyOf": schemas})
        };
        properties.insert(field.name.clone(), schema);
    }
    table_schema(&section.help, properties, false)
}

fn table_schema(help: &str, properties: Map<String, Value>, with_type: bool) -> Value {
    let mut schema = json!({
        "type": "object",
        "description": help,
        "properties": properties,
        "additionalProperties": false,
    });
    if with_type {
        schema["required"] = json!([TYPE]);
    }
    schema
}
