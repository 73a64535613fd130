//! What is generated from the components' structs is checked in and fresh. `SETU_UPDATE=1` writes it.

use std::path::Path;

use setu_host::config::{ensure_file_contents, example, json_schema, reference};
use setu_host::setup::Setup;

#[test]
fn generated_files_are_fresh() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let setup = Setup::new([]).expect("the built-in components");
    let mut problems = Vec::new();
    let mut check = |path: &Path, text: &str| problems.extend(ensure_file_contents(path, text).err());
    check(&root.join("setu.example.toml"), &example(&setup.layout));
    check(&root.join("docs/setu.schema.json"), &format!("{:#}\n", json_schema(&setup.layout)));
    check(&root.join("docs/reference/requests.md"), &setu_host::server::markdown());
    for (path, page) in reference(&setup.layout) {
        check(&root.join("docs/reference").join(path), &page);
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}
