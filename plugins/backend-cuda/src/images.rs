//! Compiled kernels on disk: found there, or compiled and kept.
//!
//! A file's name has a digest of everything that the CUBIN in it depends on, and the compiler's version. Where there is
//! no compiler, what any version made will do: so a program with a folder of kernels beside it, which `setu kernels`
//! fills on another machine, runs where there is the driver and nothing else of CUDA.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use setu_core::{Error, Result};
use sha2::{Digest, Sha256};

use crate::kernels::Unit;
use crate::nvrtc::Nvrtc;

/// Folders with compiled kernels.
#[derive(Clone, Debug)]
pub struct Images {
    /// Where new ones are kept.
    cache: Option<PathBuf>,
    /// Where others may be.
    shipped: Option<PathBuf>,
}

impl Images {
    /// Those of `cache`, or of the folder that is usual, and those that came with the program.
    pub fn new(cache: Option<PathBuf>) -> Images {
        Images { cache: cache.or_else(default_cache), shipped: shipped() }
    }

    /// Those of one folder.
    pub fn of(folder: PathBuf) -> Images {
        Images { cache: Some(folder), shipped: None }
    }

    /// The folders, in the order in which they are looked through.
    pub fn folders(&self) -> impl Iterator<Item = &Path> {
        self.cache.iter().chain(&self.shipped).map(PathBuf::as_path)
    }

    /// A unit's image for an architecture such as `sm_90a`: as it was kept, or compiled and then kept. Without a compiler,
    /// one that any compiler made, for this architecture or for an older one of its generation.
    ///
    /// # Errors
    /// The compiler refuses the unit; or there is none, and no image.
    pub fn get(&self, nvrtc: &Result<Nvrtc>, architecture: &str, unit: Unit) -> Result<Vec<u8>> {
        let nvrtc = match nvrtc {
            Ok(nvrtc) => nvrtc,
            Err(error) => return self.of_any_compiler(error, architecture, unit),
        };
        let digest = unit.digest(architecture)?;
        let name = name(&digest, nvrtc);
        let same = self.folders().find_map(|folder| read(&folder.join(&name)));
        // Those that came with the program are for it, whatever compiler there is now.
        if let Some(image) = same.or_else(|| newest(self.shipped.as_deref(), &digest)) {
            return Ok(image);
        }
        let cubin = compile(nvrtc, architecture, unit)?;
        if let Some(Err(error)) = self.cache.as_ref().map(|cache| keep(&cache.join(name), &cubin)) {
            tracing::warn!(%error, "Compiled kernels can't be kept; the next start compiles them again.");
        }
        Ok(cubin)
    }

    fn of_any_compiler(&self, missing: &Error, architecture: &str, unit: Unit) -> Result<Vec<u8>> {
        for architecture in compatible(architecture).into_iter().filter(|architecture| unit.is_for(architecture)) {
            if let Some(image) = newest(self.folders(), &unit.digest(&architecture)?) {
                return Ok(image);
            }
        }
        let folders: Vec<String> = self.folders().map(|folder| folder.display().to_string()).collect();
        let folders = if folders.is_empty() { "any folder".to_owned() } else { folders.join(" or ") };
        Err(Error::unsupported(format!(
            "{}\nNor are there compiled kernels ({unit}, {architecture}) in {folders}; `setu kernels` makes them where \
             NVRTC is",
            missing.message()
        )))
    }
}

/// Compiles all units for `architecture` that `folder` doesn't have yet, on all cores, and tells of each that is done how
/// many are and how many there are to be. Returns that number.
///
/// # Errors
/// The compiler refuses one, or it can't be kept.
pub fn fill(folder: &Path, nvrtc: &Nvrtc, architecture: &str, told: &(dyn Fn(usize, usize) + Sync)) -> Result<usize> {
    let fill_one = |unit: Unit| -> Result<()> {
        let path = folder.join(name(&unit.digest(architecture)?, nvrtc));
        if read(&path).is_none() {
            let cubin = compile(nvrtc, architecture, unit)?;
            keep(&path, &cubin).map_err(|error| Error::config(format!("{} can't be kept: {error}", path.display())))?;
        }
        Ok(())
    };
    let units: Vec<Unit> = Unit::all().into_iter().filter(|unit| unit.is_for(architecture)).collect();
    let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let work = || -> Result<()> {
        while let Some(&unit) = units.get(next.fetch_add(1, Ordering::Relaxed)) {
            // Nobody has to begin with another where one failed.
            fill_one(unit).inspect_err(|_| next.store(units.len(), Ordering::Relaxed))?;
            told(done.fetch_add(1, Ordering::Relaxed) + 1, units.len());
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads: Vec<_> = (0..cores).map(|_| scope.spawn(work)).collect();
        let panicked = |_| Err(Error::internal("compiling kernels panicked"));
        let ended: Vec<Result<()>> = threads.into_iter().map(|thread| thread.join().unwrap_or_else(panicked)).collect();
        ended.into_iter().collect::<Result<()>>()
    })?;
    Ok(units.len())
}

/// The name of a file, which [`newest`] takes apart.
fn name(digest: &str, nvrtc: &Nvrtc) -> String {
    let (major, minor) = nvrtc.version();
    format!("{digest}-{major}.{minor}.cubin")
}

fn compile(nvrtc: &Nvrtc, architecture: &str, unit: Unit) -> Result<Vec<u8>> {
    let started = Instant::now();
    let compiled = unit.compile(nvrtc, architecture).map_err(|error| error.within(unit))?;
    let seconds = started.elapsed().as_secs_f64();
    tracing::info!(kernels = %unit, architecture, seconds, "Compiled kernels.");
    Ok(compiled.cubin)
}

/// `kernels` in the folder that Setu keeps models in.
pub fn default_cache() -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let setu = variable("SETU_CACHE");
    let setu = setu.or_else(|| variable("XDG_CACHE_HOME").map(|cache| cache.join("setu")));
    setu.or_else(|| variable("HOME").map(|home| home.join(".cache/setu"))).map(|cache| cache.join("kernels"))
}

/// `kernels` beside the program, if it is there.
fn shipped() -> Option<PathBuf> {
    let folder = std::env::current_exe().ok()?.parent()?.join("kernels");
    folder.is_dir().then_some(folder)
}

/// The architectures whose machine code a device of `architecture` runs: its own, and those of its generation with a
/// smaller minor version. The code of one with a letter runs nowhere else.
fn compatible(architecture: &str) -> Vec<String> {
    let number = architecture.strip_prefix("sm_").and_then(|number| number.parse::<u32>().ok());
    match number {
        Some(number) => (number / 10 * 10..=number).rev().map(|number| format!("sm_{number}")).collect(),
        None => vec![architecture.to_owned()],
    }
}

/// The image of a digest that the newest compiler made.
fn newest<'a>(folders: impl IntoIterator<Item = &'a Path>, digest: &str) -> Option<Vec<u8>> {
    let version = |path: &Path| -> Option<(u32, u32)> {
        let name = path.file_name()?.to_str()?;
        let (major, minor) = name.strip_prefix(digest)?.strip_prefix('-')?.strip_suffix(".cubin")?.split_once('.')?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    };
    let entries = folders.into_iter().flat_map(|folder| folder.read_dir().into_iter().flatten().flatten());
    let mut found: Vec<((u32, u32), PathBuf)> =
        entries.map(|entry| entry.path()).filter_map(|path| Some((version(&path)?, path))).collect();
    found.sort();
    found.iter().rev().find_map(|(_, path)| read(path))
}

/// A kept image, if it is whole: a CUBIN is an ELF file, and the last bytes are its own digest.
fn read(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = std::fs::read(path).ok()?;
    let digest = bytes.split_off(bytes.len().checked_sub(32)?);
    (bytes.starts_with(b"\x7fELF") && Sha256::digest(&bytes)[..] == digest[..]).then_some(bytes)
}

/// Keeps an image. Written beside its place and moved there, so that nobody reads half a file.
fn keep(path: &Path, image: &[u8]) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let partial = path.with_extension(format!("{}.partial", std::process::id()));
    std::fs::write(&partial, [image, &Sha256::digest(image)].concat())?;
    std::fs::rename(&partial, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder of its own, gone with it.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Folder {
            Folder(std::env::temp_dir().join(format!("setu-images-{name}-{}", std::process::id())))
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn no_compiler() -> Result<Nvrtc> {
        Err(Error::unsupported("NVRTC was not found"))
    }

    #[test]
    fn a_damaged_image_is_not_used() {
        let folder = Folder::new("damaged");
        let path = folder.0.join("a.cubin");
        keep(&path, b"\x7fELF and more").unwrap();
        assert_eq!(read(&path).as_deref(), Some(&b"\x7fELF and more"[..]));
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[6] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(read(&path), None);
        std::fs::write(&path, &bytes[..10]).unwrap();
        assert_eq!(read(&path), None);
    }

    #[test]
    fn without_a_compiler_the_newest_that_was_kept_is_used() {
        let folder = Folder::new("versions");
        let images = Images::of(folder.0.clone());
        let unit = Unit { file: "norm", format: None };
        let error = images.get(&no_compiler(), "sm_86", unit).unwrap_err();
        for part in ["NVRTC was not found", "norm", "sm_86", "setu kernels", &folder.0.display().to_string()] {
            assert!(error.message().contains(part), "{part} is missing in {error}");
        }
        // Of its generation, by two compilers; the newer one's is damaged in a third.
        let digest = unit.digest("sm_80").unwrap();
        for (version, content) in [("12.9", "old"), ("12.10", "new")] {
            keep(&folder.0.join(format!("{digest}-{version}.cubin")), format!("\x7fELF {content}").as_bytes()).unwrap();
        }
        std::fs::write(folder.0.join(format!("{digest}-13.0.cubin")), b"\x7fELF").unwrap();
        assert_eq!(images.get(&no_compiler(), "sm_86", unit).unwrap(), b"\x7fELF new");
        assert!(images.get(&no_compiler(), "sm_90a", unit).is_err(), "of another generation");
        // Its own before that.
        let digest = unit.digest("sm_86").unwrap();
        keep(&folder.0.join(format!("{digest}-12.0.cubin")), b"\x7fELF own").unwrap();
        assert_eq!(images.get(&no_compiler(), "sm_86", unit).unwrap(), b"\x7fELF own");
    }

    #[test]
    fn what_came_with_the_program_is_used() {
        let (cache, shipped) = (Folder::new("cache"), Folder::new("shipped"));
        let images = Images { cache: Some(cache.0.clone()), shipped: Some(shipped.0.clone()) };
        let unit = Unit { file: "norm", format: None };
        let digest = unit.digest("sm_80").unwrap();
        keep(&shipped.0.join(format!("{digest}-12.9.cubin")), b"\x7fELF shipped").unwrap();
        assert_eq!(images.get(&no_compiler(), "sm_80", unit).unwrap(), b"\x7fELF shipped");
        assert!(!cache.0.exists(), "nothing was compiled");
    }

    #[test]
    fn code_of_one_architecture_runs_on_later_ones_of_its_generation() {
        assert_eq!(compatible("sm_89")[..2], ["sm_89", "sm_88"]);
        assert_eq!(compatible("sm_89").last().map(String::as_str), Some("sm_80"));
        assert_eq!(compatible("sm_90a"), ["sm_90a"]);
        assert_eq!(compatible("sm_120"), ["sm_120"]);
    }
}
