//! A CUDA driver without a GPU, for tests.
//!
//! [`build`] compiles the C++ sources beside this crate, and with them the backend's kernels, into a `libcuda.so`. A
//! program finds it by `LD_LIBRARY_PATH`; this process by [`load`].

use std::ffi::{CStr, CString};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

/// Floating point as written: products and sums are contracted only where a kernel says so.
const FLAGS: [&str; 11] = [
    "-std=c++17",
    "-O2",
    "-march=native",
    "-ffp-contract=off",
    "-fPIC",
    "-shared",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-Wl,-soname,libcuda.so",
];

/// With this variable in the environment the driver is built with AddressSanitizer, whose library must be loaded first.
pub const SANITIZE: &str = "CUEMU_SANITIZE";
const SANITIZER_FLAGS: [&str; 3] = ["-fsanitize=address", "-O1", "-g1"];

fn flags() -> Vec<&'static str> {
    let sanitizer: &[&str] = if std::env::var_os(SANITIZE).is_some() { &SANITIZER_FLAGS } else { &[] };
    FLAGS.iter().chain(sanitizer).copied().collect()
}

/// Builds the driver in a folder of its own below `folder`, unless it is there: the folder that holds `libcuda.so`.
///
/// # Panics
/// There is no g++, or it refuses the sources.
pub fn build(folder: &Path) -> PathBuf {
    static BUILDING: Mutex<()> = Mutex::new(());
    let _one_at_a_time = BUILDING.lock().unwrap_or_else(PoisonError::into_inner);
    let sources = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = folder.join(format!("cuemu-{:016x}", digest(&[sources, &sources.join("../kernels")])));
    let library = folder.join("libcuda.so");
    if library.exists() {
        return folder;
    }
    std::fs::create_dir_all(&folder).expect("the target folder can be written");
    // Another process may be at it as well: each moves a whole library to its place.
    let partial = folder.join(format!("partial-{}", std::process::id()));
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "g++".into());
    let mut command = Command::new(&compiler);
    command.args(flags()).arg("-o").arg(&partial).args(["kernels.cpp", "scheduler.cpp", "driver.cpp"]);
    let output = command.current_dir(sources).output().unwrap_or_else(|error| {
        panic!("the emulated CUDA driver needs a C++ compiler ({}: {error}): install g++", compiler.display())
    });
    assert!(output.status.success(), "{command:?}\n{}", String::from_utf8_lossy(&output.stderr));
    std::fs::rename(&partial, &library).expect("the target folder can be written");
    folder
}

/// Has the CUDA driver of this process be the emulated one, which is built below `folder`.
///
/// The library calls itself `libcuda.so`: whoever asks for that from now on gets this one, even where there is
/// another in the library path.
///
/// # Panics
/// It doesn't build or load.
pub fn load(folder: &Path) {
    let library = build(folder).join("libcuda.so");
    let name = CString::new(library.as_os_str().as_bytes()).expect("a path without NUL");
    // SAFETY: the emulator's initialisers do nothing but fill its table of kernels.
    let loaded = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    if loaded.is_null() {
        // SAFETY: dlerror gives a string, valid until this thread's next call, or null.
        let reason = unsafe { libc::dlerror() };
        // SAFETY: as above.
        let reason = if reason.is_null() { c"no reason given" } else { unsafe { CStr::from_ptr(reason) } };
        panic!("{} doesn't load: {}", library.display(), reason.to_string_lossy());
    }
}

/// A number that changes with the files in `folders` and with how they are compiled.
fn digest(folders: &[&Path]) -> u64 {
    let mut hasher = DefaultHasher::new();
    flags().hash(&mut hasher);
    for folder in folders {
        let entries = std::fs::read_dir(folder).expect("the sources can be read").flatten();
        let mut files: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(|path| path.is_file()).collect();
        files.sort();
        for file in files {
            (file.file_name(), std::fs::read(&file).expect("a source can be read")).hash(&mut hasher);
        }
    }
    hasher.finish()
}
