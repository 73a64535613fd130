//! NVRTC, the compiler for kernels, as far as it is needed: source in, CUBIN out.
//!
//! Loaded by hand, because it is often not in the library path but in a toolkit or a Python package, under a
//! name with its version in it, and because a missing symbol must be an error and not a panic.

use std::ffi::{CStr, CString, OsStr, c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use setu_core::{Error, Result};

/// Names of the library, the newest first.
const NAMES: [&str; 3] = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];

/// What compiling gives where an option, such as the architecture, isn't known.
const INVALID_OPTION: c_int = 5;

type Program = *mut c_void;
type Create = unsafe extern "C" fn(
    *mut Program,
    *const c_char,
    *const c_char,
    c_int,
    *const *const c_char,
    *const *const c_char,
) -> c_int;

type Destroy = unsafe extern "C" fn(*mut Program) -> c_int;
type Compile = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int;
type Version = unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int;
type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Read = unsafe extern "C" fn(Program, *mut c_char) -> c_int;

/// The loaded library. It stays loaded as long as the process lives.
#[derive(Clone, Copy, Debug)]
pub struct Nvrtc {
    version: Version,
    create: Create,
    destroy: Destroy,
    compile: Compile,
    log_size: Size,
    log: Read,
    cubin_size: Size,
    cubin: Read,
}

/// A source with the files that it includes.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    pub name: &'a str,
    pub text: &'a str,
    pub headers: &'a [(&'static str, &'static str)],
}

/// What became of a source.
#[derive(Clone, Debug)]
pub struct Compiled {
    pub cubin: Vec<u8>,
    /// What the compiler had to say.
    pub log: String,
}

impl Nvrtc {
    /// Loads the library from `path`, or from where it usually is.
    ///
    /// # Errors
    /// It isn't there, or lacks a function; the message lists what was tried.
    pub fn load(path: Option<&Path>) -> Result<Nvrtc> {
        Nvrtc::find(path).map(|(nvrtc, _)| nvrtc)
    }

    /// As [`load`](Nvrtc::load), with the name that it was found by.
    ///
    /// # Errors
    /// As [`load`](Nvrtc::load).
    pub fn find(path: Option<&Path>) -> Result<(Nvrtc, PathBuf)> {
        let usual = path.is_none().then(|| candidates().into_iter().chain(std::iter::once_with(of_python).flatten()));
        let candidates = path.map(Path::to_owned).into_iter().chain(usual.into_iter().flatten());
        let mut reasons = Vec::new();
        for candidate in candidates {
            match Nvrtc::open(&candidate) {
                Ok(found) => return Ok((found, candidate)),
                Err(reason) => reasons.push(reason),
            }
        }
        let remedy = "install it (`pip install nvidia-cuda-nvrtc-cu12`, or the CUDA toolkit), or name the file in \
                      [backend] nvrtc";
        Err(Error::unsupported(format!(
            "NVRTC, which compiles the kernels for the device, was not found: {remedy}. Tried:\n  {}",
            reasons.join("\n  ")
        )))
    }

    fn open(path: &Path) -> Result<Nvrtc, String> {
        let name = CString::new(path.as_os_str().as_bytes()).map_err(|_| format!("{} has a NUL", path.display()))?;
        // SAFETY: loading the library runs its initialisers; it is NVIDIA's, or what the operator named.
        let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if library.is_null() {
            // SAFETY: dlerror gives a string, valid until this thread's next call, or null.
            let reason = unsafe { libc::dlerror() };
            // SAFETY: as above.
            let reason = if reason.is_null() { c"it can't be loaded" } else { unsafe { CStr::from_ptr(reason) } };
            let reason = reason.to_string_lossy().into_owned();
            let shown = path.display().to_string();
            return Err(if reason.contains(&shown) { reason } else { format!("{shown}: {reason}") });
        }
        let symbol = |name: &CStr| {
            // SAFETY: the library is loaded and stays so.
            let found = unsafe { libc::dlsym(library, name.as_ptr()) };
            if found.is_null() {
                return Err(format!("{} has no {}", path.display(), name.to_string_lossy()));
            }
            Ok(found)
        };
        // SAFETY: the fields have the types of NVRTC's functions in all versions from 11.1 on.
        unsafe {
            Ok(Nvrtc {
                version: std::mem::transmute::<*mut c_void, Version>(symbol(c"nvrtcVersion")?),
                create: std::mem::transmute::<*mut c_void, Create>(symbol(c"nvrtcCreateProgram")?),
                destroy: std::mem::transmute::<*mut c_void, Destroy>(symbol(c"nvrtcDestroyProgram")?),
                compile: std::mem::transmute::<*mut c_void, Compile>(symbol(c"nvrtcCompileProgram")?),
                log_size: std::mem::transmute::<*mut c_void, Size>(symbol(c"nvrtcGetProgramLogSize")?),
                log: std::mem::transmute::<*mut c_void, Read>(symbol(c"nvrtcGetProgramLog")?),
                cubin_size: std::mem::transmute::<*mut c_void, Size>(symbol(c"nvrtcGetCUBINSize")?),
                cubin: std::mem::transmute::<*mut c_void, Read>(symbol(c"nvrtcGetCUBIN")?),
            })
        }
    }

    /// The library's version, such as (12, 9).
    pub fn version(&self) -> (i32, i32) {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: the function writes two integers.
        unsafe { (self.version)(&mut major, &mut minor) };
        (major, minor)
    }

    /// Compiles `source` with `options`, which must name a real architecture (`sm_90`).
    ///
    /// # Errors
    /// The compiler refuses it; the message has its log.
    pub fn compile(&self, source: Source<'_>, options: &[String]) -> Result<Compiled> {
        let text = |text: &str| CString::new(text).map_err(|_| Error::internal(format!("{} has a NUL", source.name)));
        let (name, code) = (text(source.name)?, text(source.text)?);
        let names = source.headers.iter().map(|(name, _)| text(name)).collect::<Result<Vec<_>>>()?;
        let headers = source.headers.iter().map(|(_, header)| text(header)).collect::<Result<Vec<_>>>()?;
        let options = options.iter().map(|option| text(option)).collect::<Result<Vec<_>>>()?;
        let pointers = |texts: &[CString]| texts.iter().map(|text| text.as_ptr()).collect::<Vec<_>>();
        let (names, headers, options) = (pointers(&names), pointers(&headers), pointers(&options));
        let mut program: Program = std::ptr::null_mut();
        let count = headers.len() as c_int;
        // SAFETY: all strings live until the program was destroyed.
        let created = unsafe {
            (self.create)(&mut program, code.as_ptr(), name.as_ptr(), count, headers.as_ptr(), names.as_ptr())
        };
        if created != 0 {
            return Err(Error::internal(format!("NVRTC takes no program for {} (error {created})", source.name)));
        }
        // SAFETY: the program was created and is destroyed below, once.
        let compiled = unsafe { (self.compile)(program, options.len() as c_int, options.as_ptr()) };
        let log = String::from_utf8_lossy(&self.output(program, self.log_size, self.log)).replace('\0', "");
        let cubin = self.output(program, self.cubin_size, self.cubin);
        // SAFETY: as above.
        unsafe { (self.destroy)(&mut program) };
        if compiled == INVALID_OPTION {
            let (major, minor) = self.version();
            return Err(Error::unsupported(format!(
                "NVRTC {major}.{minor} is too old or too new for this device, install another: {}",
                log.trim()
            )));
        }
        if compiled != 0 {
            let name = source.name;
            return Err(Error::internal(format!(
                "the kernels in {name} don't compile (NVRTC error {compiled}):\n{log}"
            )));
        }
        if cubin.is_empty() {
            return Err(Error::internal(format!("NVRTC gives no CUBIN for {}", source.name)));
        }
        Ok(Compiled { cubin, log })
    }

    /// One of a program's outputs; empty where there is none.
    fn output(&self, program: Program, size: Size, read: Read) -> Vec<u8> {
        let mut bytes = 0;
        // SAFETY: the program lives; the function writes one number.
        if unsafe { size(program, &mut bytes) } != 0 {
            return Vec::new();
        }
        let mut output = vec![0_u8; bytes];
        // SAFETY: there is room for as many bytes as the library said.
        if unsafe { read(program, output.as_mut_ptr().cast()) } != 0 {
            return Vec::new();
        }
        output
    }
}

/// Where the library may be: the library path, toolkits, and Python packages of the environment that is active.
fn candidates() -> Vec<PathBuf> {
    let mut folders = Vec::new();
    for variable in ["CUDA_HOME", "CUDA_PATH"] {
        folders.extend(std::env::var_os(variable).map(|home| PathBuf::from(home).join("lib64")));
    }
    folders.push("/usr/local/cuda/lib64".into());
    let home = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/lib"));
    let environments = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(std::env::var_os);
    let roots = environments.map(|root| PathBuf::from(root).join("lib")).chain(home);
    for root in roots {
        folders.extend(python_folders(&root));
    }
    NAMES.iter().map(PathBuf::from).chain(existing(folders)).collect()
}

/// Where the library is among the packages of the `python3` in the path. Asking takes a moment, so that it comes last.
fn of_python() -> Vec<PathBuf> {
    let script = "import sysconfig; print(sysconfig.get_paths()['purelib'])";
    let Ok(output) = Command::new("python3").args(["-c", script]).stdin(Stdio::null()).output() else {
        return Vec::new();
    };
    let packages = PathBuf::from(OsStr::from_bytes(output.stdout.trim_ascii()));
    existing(package_folders(&packages).to_vec())
}

fn existing(folders: Vec<PathBuf>) -> Vec<PathBuf> {
    let paths = folders.iter().flat_map(|folder| NAMES.iter().map(move |name| folder.join(name)));
    paths.filter(|path| path.exists()).collect()
}

/// The folders of NVIDIA's packages below `lib`, for every Python in it.
fn python_folders(lib: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(lib) else { return Vec::new() };
    let is_python =
        |path: &PathBuf| path.file_name().map(OsStr::as_bytes).is_some_and(|name| name.starts_with(b"python"));
    let pythons = entries.flatten().map(|entry| entry.path()).filter(is_python);
    pythons.flat_map(|python| package_folders(&python.join("site-packages"))).collect()
}

/// Where NVIDIA's packages for CUDA 13 and 12 put the library.
fn package_folders(packages: &Path) -> [PathBuf; 2] {
    ["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"].map(|folder| packages.join(folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_says_what_was_tried_and_what_to_do() {
        let error = Nvrtc::load(Some(Path::new("/nowhere/libnvrtc.so.12"))).unwrap_err();
        for part in ["/nowhere/libnvrtc.so.12", "pip install nvidia-cuda-nvrtc-cu12", "[backend] nvrtc"] {
            assert!(error.message().contains(part), "{part:?} is missing in {error}");
        }
    }
}
