//! Random JSON schemas, of every kind that answers are asked for, whose texts are bounded in length.

use serde_json::{Map, Value, json};
use setu_testkit::rng::Rng;

/// A schema of an object.
pub fn random_schema(rng: &mut Rng) -> Value {
    let mut schema = object(rng, 3);
    if rng.below(4) == 0 {
        // A definition that several places refer to.
        schema["$defs"] = json!({"shared": any(rng, 1)});
        schema["properties"]["by reference"] = json!({"$ref": "#/$defs/shared"});
        schema["properties"]["many"] = json!({"type": "array", "items": {"$ref": "#/$defs/shared"}, "maxItems": 2});
    }
    schema
}

fn any(rng: &mut Rng, depth: usize) -> Value {
    match rng.below(if depth == 0 { 6 } else { 9 }) {
        0 => string(rng),
        1 => integer(rng),
        2 => number(rng),
        3 => json!({"type": "boolean"}),
        4 => {
            let values = [json!("red"), json!("grün"), json!("a \"quoted\" one"), json!(7), json!(null), json!(true)];
            json!({"enum": values[..1 + rng.below(6)]})
        }
        5 => {
            [json!({"const": "fixed"}), json!({"type": "null"}), json!({"const": {"a": [1, 2]}})][rng.below(3)].clone()
        }
        6 => object(rng, depth - 1),
        7 => array(rng, depth - 1),
        _ => match rng.below(2) {
            0 => json!({"anyOf": [string(rng), integer(rng), object(rng, 0)]}),
            _ => json!({"type": ["integer", "null"], "minimum": 0, "maximum": 50}),
        },
    }
}

fn object(rng: &mut Rng, depth: usize) -> Value {
    const NAMES: [&str; 8] = ["name", "age", "tags", "größe", "is active", "nested.value", "x", "\"odd\""];
    let mut names = NAMES;
    rng.shuffle(&mut names);
    let names = &names[..1 + rng.below(4)];
    let properties: Map<String, Value> = names.iter().map(|name| ((*name).to_owned(), any(rng, depth))).collect();
    let required: Vec<&str> = names.iter().copied().filter(|_| rng.below(3) > 0).collect();
    json!({"type": "object", "properties": properties, "required": required, "additionalProperties": false})
}

fn array(rng: &mut Rng, depth: usize) -> Value {
    let least = rng.below(3);
    match rng.below(4) {
        0 => json!({"type": "array", "prefixItems": [integer(rng), string(rng)], "items": false, "minItems": 2}),
        _ => {
            let most = least + rng.below(3);
            json!({"type": "array", "items": any(rng, depth), "minItems": least, "maxItems": most})
        }
    }
}

fn string(rng: &mut Rng) -> Value {
    let least = rng.below(4);
    match rng.below(6) {
        0 => json!({"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,4}$"}),
        1 => json!({"type": "string", "format": "date"}),
        2 => {
            // Of times the grammar takes a leap second in any minute, which a strict reader of RFC 3339 doesn't.
            let formats = ["uuid", "ipv4"];
            json!({"type": "string", "format": formats[rng.below(2)]})
        }
        _ => json!({"type": "string", "minLength": least, "maxLength": least + rng.below(12)}),
    }
}

fn integer(rng: &mut Rng) -> Value {
    let low = rng.below(2000) as i64 - 1000;
    let high = low + rng.below(100_000) as i64;
    match rng.below(4) {
        0 => json!({"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": high + 2}),
        1 => json!({"type": "integer", "minimum": low, "maximum": high + 7, "multipleOf": 7}),
        _ => json!({"type": "integer", "minimum": low, "maximum": high}),
    }
}

/// Numbers have no longest form but where they are multiples.
fn number(rng: &mut Rng) -> Value {
    let low = rng.below(100) as f64 / 4.0;
    json!({"type": "number", "minimum": low, "maximum": low + 50.0, "multipleOf": 0.25})
}
