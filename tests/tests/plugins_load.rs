//! Files in plugin folders: which are loaded, which are refused, and with what words.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

// Referred to, so that the linker keeps both: two crates with an `export_plugin!` each in one binary.
use setu_batcher_fixed_chunk as _;
use setu_core::abi::ABI;
use setu_core::abi::version::OLDEST;
use setu_core::model::{CheckpointFormat, CheckpointInfo, GraphOptions};
use setu_core::registry::Source;
use setu_core::{Kind, Registries};
use setu_engine::plugins::{PluginOptions, PluginReport, RejectionKind, check_linked, discover, inspect};
use setu_scheduler_fcfs as _;
use setu_testkit::views::Scene;
use setu_tests::extensions::{cdylib, extension, extension_of, plugin_folder, try_extension};

fn load(folders: &[&Path], pins: &[&str]) -> (Registries, PluginReport) {
    let mut registries = Registries::default();
    let folders: Vec<PathBuf> = folders.iter().map(|&folder| folder.to_owned()).collect();
    let options = PluginOptions { pins: pins.iter().map(|&pin| pin.to_owned()).collect() };
    let report = discover(&folders, &options, &mut registries).unwrap();
    (registries, report)
}

/// What becomes of one file with these bytes.
fn rejection_of(bytes: &[u8]) -> (RejectionKind, String) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("it.so"), bytes).unwrap();
    let (registries, report) = load(&[folder.path()], &[]);
    assert!(report.loaded.is_empty() && registries.schedulers.list().is_empty());
    let [rejection] = report.rejected.try_into().unwrap();
    assert_eq!(rejection.path, folder.path().join("it.so"));
    (rejection.kind, rejection.reason)
}

/// Where the description begins in a plugin's bytes.
fn description_at(bytes: &[u8]) -> usize {
    find(bytes, b"\x7fSETUPLG\x01\0\0\0")
}

fn find(bytes: &[u8], wanted: &[u8]) -> usize {
    bytes.windows(wanted.len()).position(|window| window == wanted).unwrap()
}

/// `bytes` with every `from` made `to`.
fn replaced(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let places: Vec<usize> = (0..bytes.len() - from.len()).filter(|&at| bytes[at..].starts_with(from)).collect();
    assert!(!places.is_empty());
    for at in places {
        bytes[at..at + to.len()].copy_from_slice(to);
    }
    bytes
}

#[test]
fn a_scheduler_from_outside_the_workspace_is_used() {
    let folder = plugin_folder([("lifo.so", extension("scheduler-lifo"))]);
    let (registries, report) = load(&[folder.path()], &[]);
    let [loaded] = report.loaded.try_into().unwrap();
    assert_eq!((loaded.package.as_str(), loaded.version.as_str(), loaded.abi), ("scheduler-lifo", "0.1.0", ABI));
    assert_eq!(loaded.warnings, [""; 0]);

    let entry = registries.schedulers.get("lifo").unwrap();
    assert_eq!(entry.description, "Runs the latest sessions first.");
    assert_eq!(entry.source, Source::File { path: loaded.path, sha256: loaded.sha256 });
    let setting = entry.config.field("most").unwrap();
    assert_eq!(setting.help, "Most sessions that run at once; 0 sets no limit.");

    let mut scene = Scene::new(1.0);
    (1..=3).for_each(|id| _ = scene.waiting(id, id as f64, 10));
    for (config, expected) in [("{}", &[3, 2, 1][..]), (r#"{"most": 2}"#, &[3, 2])] {
        let mut lifo = (entry.build)(config).unwrap();
        assert_eq!(scene.schedule(&mut *lifo).running(), expected);
    }
}

#[test]
fn a_model_from_outside_the_workspace_gives_its_graph() {
    let folder = plugin_folder([("toy.so", extension("model-toy"))]);
    let (registries, _) = load(&[folder.path()], &[]);
    let toy = (registries.models.get("toy").unwrap().build)("{}").unwrap();
    let mut config = serde_json::json!({
        "toy_vocab": 96, "toy_depth": 2, "toy_width": 32, "toy_heads": 4, "toy_context": 64, "toy_rope_base": 500.5
    });
    let checkpoint = |config: &serde_json::Value, architecture: &str| {
        CheckpointInfo::new(CheckpointFormat::Hf, architecture, config.clone(), Vec::new())
    };
    assert!(toy.supports(&checkpoint(&config, "ToyForCausalLM")));
    assert!(!toy.supports(&checkpoint(&config, "LlamaForCausalLM")));

    let graph = toy.graph(&checkpoint(&config, "ToyForCausalLM"), &GraphOptions::default()).unwrap();
    assert_eq!((graph.vocab_size, graph.kv_layers.len(), graph.weights.len()), (96, 2, 2 + 2 * 5));
    assert_eq!(graph.rope_tables[0].inv_freq[1], 500.5f64.powf(-2.0 / 8.0), "floats cross exactly");
    graph.verify().unwrap();

    config["toy_depth"] = serde_json::json!("two");
    let error = toy.graph(&checkpoint(&config, "ToyForCausalLM"), &GraphOptions::default()).unwrap_err();
    assert_eq!(
        error.message(),
        "the hyper-parameter `toy_depth` must be a whole number from 1 to 4294967295, not \"two\""
    );
}

#[test]
fn several_files_and_several_components_a_file_stand_side_by_side() {
    let folder = plugin_folder([
        ("b.so", extension("two-in-one")),
        ("a.so", extension("scheduler-lifo")),
        ("c.so", cdylib("setu-scheduler-fcfs")),
        ("d.so", cdylib("setu-batcher-fixed-chunk")),
        ("readme.txt", extension("scheduler-lifo")),
    ]);
    let (registries, report) = load(&[folder.path()], &[]);
    assert_eq!(report.rejected, []);
    let packages: Vec<&str> = report.loaded.iter().map(|loaded| loaded.package.as_str()).collect();
    assert_eq!(packages, ["scheduler-lifo", "two-in-one", "setu-scheduler-fcfs", "setu-batcher-fixed-chunk"]);
    let keys: Vec<&str> = registries.schedulers.list().iter().map(|entry| entry.key.as_str()).collect();
    assert_eq!(keys, ["fcfs", "lifo", "talkative"]);
    let keys: Vec<&str> = registries.batchers.list().iter().map(|entry| entry.key.as_str()).collect();
    assert_eq!(keys, ["fixed_chunk", "talkative"]);

    // Each does what it is, though all headers lead to a module of the same type.
    let mut scene = Scene::new(1.0);
    (1..=3).for_each(|id| _ = scene.waiting(id, id as f64, 10));
    for (key, expected) in [("fcfs", [1, 2, 3]), ("lifo", [3, 2, 1]), ("talkative", [1, 2, 3])] {
        let mut scheduler = (registries.schedulers.get(key).unwrap().build)("{}").unwrap();
        assert_eq!(scene.schedule(&mut *scheduler).running(), expected, "{key}");
    }
    for (key, expected) in [("fixed_chunk", 10), ("talkative", 1)] {
        let mut batcher = (registries.batchers.get(key).unwrap().build)("{}").unwrap();
        assert_eq!(scene.batch(&mut *batcher)[0], (1, expected), "{key}");
    }
}

#[test]
fn the_later_of_two_files_with_one_key_is_used_and_both_are_named() {
    let first = plugin_folder([("b.so", extension("scheduler-lifo"))]);
    let second = plugin_folder([("a.so", extension("scheduler-lifo"))]);
    let (registries, report) = load(&[first.path(), second.path()], &[]);
    let (earlier, later) = (first.path().join("b.so"), second.path().join("a.so"));
    let entry = registries.schedulers.get("lifo").unwrap();
    assert!(matches!(&entry.source, Source::File { path, .. } if *path == later));
    let expected =
        format!("the scheduler `lifo` from {} is used in place of the one from {}", later.display(), earlier.display());
    assert_eq!(report.loaded[1].warnings, [expected]);

    let mut registries = Registries::linked_in();
    let folder = plugin_folder([("fcfs.so", cdylib("setu-scheduler-fcfs"))]);
    let report = discover(&[folder.path().to_owned()], &PluginOptions::default(), &mut registries).unwrap();
    assert!(report.loaded[0].warnings[0].ends_with("in place of the one from built in (setu-scheduler-fcfs)"));
}

#[test]
fn both_crates_that_are_linked_in_register() {
    let registries = Registries::linked_in();
    assert!(registries.schedulers.get("fcfs").is_ok() && registries.batchers.get("fixed_chunk").is_ok());
    check_linked(&["setu-scheduler-fcfs", "setu-batcher-fixed-chunk"]).unwrap();
    let error = check_linked(&["setu-scheduler-fcfs", "setu-scheduler-fsfc"]).unwrap_err();
    assert_eq!(
        error.message(),
        "nothing of setu-scheduler-fsfc is linked into this program: each needs a line `use … as _;` in the host and \
         an `export_plugin!` of its own"
    );
}

#[test]
fn files_that_are_no_plugins_are_refused_with_a_sentence() {
    let plugin = std::fs::read(extension("scheduler-lifo")).unwrap();
    let with = |at: usize, patch: &[u8]| {
        let mut bytes = plugin.clone();
        bytes[at..at + patch.len()].copy_from_slice(patch);
        bytes
    };
    let description = description_at(&plugin);
    let key_at = description + find(&plugin[description..], b"lifo\x1f");
    let newer = [ABI.major.to_le_bytes(), (ABI.minor + 1).to_le_bytes()].concat();
    let cases: Vec<(Vec<u8>, RejectionKind, String)> = vec![
        (b"hello".to_vec(), RejectionKind::NotElf, "it is not an ELF file, so no shared library of Linux".into()),
        (Vec::new(), RejectionKind::NotElf, "it is not an ELF file, so no shared library of Linux".into()),
        (
            std::fs::read(extension("not-a-plugin")).unwrap(),
            RejectionKind::NotAPlugin,
            "it is no Setu plugin: it has no section `.setu.plugin`; a plugin is a `cdylib` that calls \
             `setu_core::export_plugin!`"
                .into(),
        ),
        (
            with(16, &1u16.to_le_bytes()),
            RejectionKind::NotAPlugin,
            "it is no Setu plugin: it is an ELF file but not a shared library; a plugin is a `cdylib` that calls \
             `setu_core::export_plugin!`"
                .into(),
        ),
        (
            with(18, &243u16.to_le_bytes()),
            RejectionKind::OtherPlatform,
            format!(
                "it is for 64-bit RISC-V processors, and this Setu runs on 64-bit {}: get the build for that",
                if cfg!(target_arch = "x86_64") { "x86-64" } else { "AArch64" }
            ),
        ),
        (
            with(description + 16, &newer),
            RejectionKind::OtherAbi,
            format!(
                "it is built for ABI 0.{minor}, and this Setu loads plugins for ABI {OLDEST} to {ABI}: build the plugin with the \
                 setu-core of this Setu, 0.1.0, or use a Setu for ABI 0.{minor}",
                minor = ABI.minor + 1
            ),
        ),
        (
            with(description + 20, &[1]),
            RejectionKind::PanicAbort,
            "scheduler-lifo is built with `panic = \"abort\"`, so that a panic in it would end the whole engine: \
             build it with `panic = \"unwind\"`"
                .into(),
        ),
        (
            with(description + 20, &[9]),
            RejectionKind::Corrupt,
            "its description is damaged, there is no panic strategy 9: copy or build it again".into(),
        ),
        (
            with(description, b"X"),
            RejectionKind::Corrupt,
            "its description is damaged, a record does not begin with the mark of one: copy or build it again".into(),
        ),
        (
            with(key_at, b"LIFO"),
            RejectionKind::Corrupt,
            "its description is damaged, \"LIFO\" is no key of a component: copy or build it again".into(),
        ),
        (
            plugin[..plugin.len() - 1].to_vec(),
            RejectionKind::Truncated,
            "its end is missing: copy or build it again".into(),
        ),
    ];
    for (bytes, kind, reason) in cases {
        assert_eq!(rejection_of(&bytes), (kind, reason));
    }
}

#[test]
fn a_plugin_built_with_another_version_of_the_crate_but_not_of_the_boundary_is_loaded() {
    let plugin = std::fs::read(extension("scheduler-lifo")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("it.so"), replaced(&plugin, b"setu-core;0.1.0", b"setu-core;7.8.9")).unwrap();
    let (registries, report) = load(&[folder.path()], &[]);
    assert_eq!(report.rejected, []);
    assert!((registries.schedulers.get("lifo").unwrap().build)("{}").is_ok());
}

#[test]
fn a_plugin_built_by_the_first_commit_of_the_oldest_abi_is_loaded() {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").current_dir(env!("CARGO_MANIFEST_DIR")).args(arguments).output();
        output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
    };
    if git(&["rev-parse", "--is-shallow-repository"]).trim() != "false" {
        // Past the capture of the test harness, which shows nothing of tests that pass.
        let _ = writeln!(std::io::stderr(), "skipped: there is no history to build an older plugin from");
        return;
    }
    let declared = format!("OLDEST: AbiVersion = AbiVersion {{ major: {}, minor: {} }}", OLDEST.major, OLDEST.minor);
    let commits = git(&["log", "--format=%H", "-S", &declared, "--", ":/setu-core/src/abi/version.rs"]);
    let first = commits.lines().last().expect("a commit declared the oldest ABI");
    let folder = plugin_folder([("old.so", extension_of(first, "scheduler-lifo"))]);
    let (registries, report) = load(&[folder.path()], &[]);
    assert_eq!(report.rejected, []);
    assert_eq!(report.loaded[0].abi, OLDEST);
    let mut scene = Scene::new(1.0);
    (1..=3).for_each(|id| _ = scene.waiting(id, id as f64, 10));
    let mut lifo = (registries.schedulers.get("lifo").unwrap().build)(r#"{"most": 2}"#).unwrap();
    assert_eq!(scene.schedule(&mut *lifo).running(), [3, 2]);
}

#[test]
fn what_the_system_or_the_tables_refuse_is_no_crash_either() {
    let plugin = std::fs::read(extension("scheduler-lifo")).unwrap();
    let mut other_symbol = plugin.clone();
    let at = description_at(&plugin);
    let at = at + find(&plugin[at..], b"setu_plugin_scheduler_lifo");
    other_symbol[at] = b'z';
    let cases = [
        (
            replaced(&plugin, b"libc.so.6", b"libx.so.6"),
            RejectionKind::Unloadable,
            "the system's loader refuses it: libx.so.6: cannot open shared object file",
        ),
        (other_symbol, RejectionKind::Contract, "it has no symbol `zetu_plugin_scheduler_lifo`: report it"),
        (
            replaced(&plugin, b"abi stable library for Rust", b"abi stable library for rust"),
            RejectionKind::Contract,
            "its entry symbol is not the header of a plugin: report it to the authors of scheduler-lifo",
        ),
        (
            replaced(&plugin, b"build_batcher", b"build_butcher"),
            RejectionKind::Contract,
            "its tables are not laid out as this build expects: unexpected field, field_name:build_butcher in place of \
             field_name:build_batcher: report it to the authors of scheduler-lifo",
        ),
        (
            std::fs::read(extension("panics-at-load")).unwrap(),
            RejectionKind::Panicked,
            "the scheduler `idle`: panicked in config: nobody knows what can be set (src/lib.rs:17): report it to the \
             authors of panics-at-load",
        ),
    ];
    for (bytes, kind, beginning) in cases {
        let (found, reason) = rejection_of(&bytes);
        assert_eq!(found, kind, "{reason}");
        assert!(reason.starts_with(beginning), "{reason}");
        assert!(!reason.contains('\n') && reason.len() < 400, "{reason}");
    }
}

#[test]
fn a_truncated_file_is_refused_wherever_it_ends() {
    let plugin = std::fs::read(extension("scheduler-lifo")).unwrap();
    let ends = (0..24).chain((24..plugin.len()).step_by(plugin.len() / 97)).chain(plugin.len() - 8..plugin.len());
    for end in ends {
        let (kind, reason) = rejection_of(&plugin[..end]);
        let expected = if end < 4 { RejectionKind::NotElf } else { RejectionKind::Truncated };
        assert_eq!(kind, expected, "at {end}: {reason}");
    }
}

#[test]
fn plugins_that_end_the_process_on_a_panic_do_not_compile() {
    let errors = try_extension("scheduler-abort").unwrap_err();
    assert!(errors.contains("error: a Setu plugin must be built with `panic = \"unwind\"`"), "{errors}");
}

#[test]
fn inspecting_runs_no_code() {
    let file = inspect(&extension("panics-at-load")).unwrap();
    let [plugin] = &file.plugins[..] else { panic!("{file:?}") };
    assert_eq!((plugin.package.as_str(), plugin.core_version.as_str()), ("panics-at-load", "0.1.0"));
    assert_eq!(plugin.symbol, "setu_plugin_panics_at_load");
    assert_eq!((plugin.components[0].kind, plugin.components[0].key.as_str()), (Kind::Scheduler, "idle"));
}

#[test]
fn only_pinned_files_are_loaded_if_any_are() {
    let folder = plugin_folder([("a.so", extension("scheduler-lifo")), ("b.so", extension("two-in-one"))]);
    let digest = inspect(&folder.path().join("b.so")).unwrap().sha256;
    for pin in [digest.clone(), format!("sha256:{}", digest.to_uppercase())] {
        let (_, report) = load(&[folder.path()], &[&pin]);
        assert_eq!(report.loaded[0].sha256, digest);
        let [rejected] = &report.rejected[..] else { panic!("{report:?}") };
        let other = inspect(&folder.path().join("a.so")).unwrap().sha256;
        assert_eq!(rejected.kind, RejectionKind::NotPinned);
        assert_eq!(rejected.reason, format!("its SHA-256, {other}, is not one of the 1 pinned ones"));
    }
    let options = PluginOptions { pins: vec!["beef".into()] };
    let error = discover(&[], &options, &mut Registries::default()).unwrap_err();
    assert_eq!(error.message(), "`beef` is no SHA-256 digest: 64 hexadecimal digits, as `sha256sum` prints");
}

#[test]
fn folders_and_odd_files_are_named() {
    let folder = plugin_folder([("file", extension("not-a-plugin"))]);
    let cases = [
        ("nowhere", "does not exist: create it, or take it out of the configuration"),
        ("file", "is not a folder: name the one that holds the `.so` files"),
    ];
    for (name, why) in cases {
        let path = folder.path().join(name);
        let error =
            discover(std::slice::from_ref(&path), &PluginOptions::default(), &mut Registries::default()).unwrap_err();
        assert_eq!(error.message(), format!("the plugin folder {} {why}", path.display()));
    }
    std::fs::create_dir(folder.path().join("folder.so")).unwrap();
    std::os::unix::fs::symlink("/nowhere", folder.path().join("dangling.so")).unwrap();
    let (_, report) = load(&[folder.path()], &[]);
    let reasons: Vec<&str> = report.rejected.iter().map(|rejection| rejection.reason.as_str()).collect();
    assert_eq!(
        reasons,
        ["it cannot be read: No such file or directory (os error 2)", "it is not a file of a reasonable size"]
    );
}

#[test]
fn a_library_stays_loaded_when_its_components_are_gone() {
    let folder = plugin_folder([("stays.so", extension("scheduler-lifo"))]);
    let (registries, _) = load(&[folder.path()], &[]);
    drop((registries.schedulers.get("lifo").unwrap().build)("{}").unwrap());
    drop(registries);
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    assert!(maps.contains(folder.path().join("stays.so").to_str().unwrap()));
}
