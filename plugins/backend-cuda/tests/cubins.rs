//! Every kernel compiles to machine code for the GPUs that are supported, and spills no register.
//!
//! The compiler comes from its Python package, pinned, by way of pip; nothing else of CUDA is needed.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use setu_backend_cuda::images::{self, Images};
use setu_backend_cuda::kernels::{ARCHITECTURES, Unit};
use setu_backend_cuda::nvrtc::Nvrtc;

const PACKAGE: &str = "nvidia-cuda-nvrtc-cu12==12.9.86";
const LIBRARY: &str = "nvidia/cuda_nvrtc/lib/libnvrtc.so.12";

/// The library, installed below the target folder; without it, says that `what` is skipped.
fn library(what: &str) -> Option<&'static Path> {
    static LIBRARY: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let reason = match LIBRARY.get_or_init(install) {
        Ok(library) => return Some(library),
        Err(reason) => reason,
    };
    // Past the harness, which keeps what passing tests print.
    let _ = writeln!(std::io::stdout(), "skipped: {what}: {reason}");
    None
}

fn install() -> Result<PathBuf, String> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(PACKAGE);
    let library = folder.join(LIBRARY);
    if library.exists() {
        return Ok(library);
    }
    let configured = std::env::var("SETU_PIP").ok();
    let candidates = configured.map_or_else(|| vec!["pip3".into(), "python3 -m pip".into()], |pip| vec![pip]);
    let mut reasons = Vec::new();
    for pip in candidates {
        let mut words = pip.split_whitespace();
        let mut command = Command::new(words.next().unwrap_or_default());
        command.args(words).args(["install", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]);
        command.args(["--disable-pip-version-check", "--upgrade", "--target"]).arg(&folder).arg(PACKAGE);
        match command.output() {
            Ok(output) if output.status.success() && library.exists() => return Ok(library),
            Ok(output) => {
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                let last = said.lines().last().unwrap_or("it says nothing").to_owned();
                reasons.push(format!("{pip}: {last}"));
            }
            Err(error) => reasons.push(format!("{pip}: {error}")),
        }
    }
    Err(format!("{PACKAGE} can't be installed: {}", reasons.join("; ")))
}

/// The compiler's line on each kernel's registers: `8 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads`.
fn spills(log: &str) -> (usize, Vec<&str>) {
    let lines: Vec<&str> = log.lines().map(str::trim).filter(|line| line.contains("bytes spill stores")).collect();
    let clean = |line: &&&str| line.contains(" 0 bytes spill stores") && line.contains(" 0 bytes spill loads");
    (lines.len(), lines.iter().filter(|line| !clean(line)).copied().collect())
}

/// Compiles all units for an architecture: the number of kernels, and what is wrong with which.
fn compile_all(nvrtc: &Nvrtc, architecture: &str) -> (usize, Vec<String>) {
    let (mut kernels, mut wrong) = (0, Vec::new());
    for unit in Unit::all().into_iter().filter(|unit| unit.is_for(architecture)) {
        let compiled = match unit.compile(nvrtc, architecture) {
            Ok(compiled) => compiled,
            Err(error) => {
                wrong.push(format!("{architecture}: {error}"));
                continue;
            }
        };
        assert!(compiled.cubin.starts_with(b"\x7fELF"), "{unit} for {architecture} is no CUBIN");
        let (found, spilling) = spills(&compiled.log);
        assert!(found > 0, "{unit} for {architecture}: the compiler tells nothing of registers\n{}", compiled.log);
        if !spilling.is_empty() {
            wrong.push(format!("{unit} for {architecture} spills: {spilling:?}\n{}", compiled.log));
        }
        kernels += found;
    }
    (kernels, wrong)
}

/// What is compiled where there is NVRTC is found where there is none.
#[test]
fn kernels_compiled_ahead_need_no_compiler() {
    let Some(library) = library("kernels compiled ahead") else { return };
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("images-{}", std::process::id()));
    let images = Images::of(folder.clone());
    let unit = Unit { file: "norm", format: None };
    let compiled = images.get(&Nvrtc::load(Some(library)), "sm_80", unit).unwrap();
    let none = || Nvrtc::load(Some(Path::new("/nowhere/libnvrtc.so")));
    assert!(none().is_err());
    assert!(images.get(&none(), "sm_80", unit).unwrap() == compiled);
    assert!(images.get(&none(), "sm_86", unit).unwrap() == compiled, "by the machine code of sm_80");
    assert!(images.get(&none(), "sm_100", unit).is_err());
    std::fs::remove_dir_all(folder).unwrap();
    // Where nothing can be kept, filling a folder fails.
    let nvrtc = Nvrtc::load(Some(library)).unwrap();
    let error = images::fill(Path::new("/dev/null/kernels"), &nvrtc, "sm_80", &|_, _| ()).unwrap_err();
    assert!(error.message().contains("/dev/null/kernels"), "{error}");
}

#[test]
fn every_kernel_compiles_to_machine_code_and_spills_nothing() {
    let Some(library) = library("compiling kernels for GPUs") else { return };
    let nvrtc = Nvrtc::load(Some(library)).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(nvrtc.version(), (12, 9));
    // One thread for each architecture: there is a lot to compile.
    let compiled = std::thread::scope(|scope| {
        let threads = ARCHITECTURES.map(|architecture| scope.spawn(move || compile_all(&nvrtc, architecture)));
        threads.map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    });
    let wrong: Vec<&str> = compiled.iter().flat_map(|(_, wrong)| wrong).map(String::as_str).collect();
    assert!(wrong.is_empty(), "{} of the units are wrong:\n{}", wrong.len(), wrong.join("\n\n"));
    let kernels: usize = compiled.iter().map(|(kernels, _)| kernels).sum();
    // Each format has its four kernels, all but one three more on tensor cores and four for Hopper's, halves
    // one more; each element type of K and V its two, all but F32 four more; and there are a dozen others.
    assert!(kernels >= 3 * (13 * 4 + 12 * 3 + 4 * 2 + 3 * 4 + 12) + 12 * 4 + 2, "{kernels} kernels");
}
