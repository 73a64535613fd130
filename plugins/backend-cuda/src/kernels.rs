//! The kernels: their sources, how they are compiled, and where the results are kept.
//!
//! A unit is a source compiled for one format. It is compiled when a graph first needs it, for the device at
//! hand, and kept on disk under a digest of everything that the result depends on.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use setu_core::{DType, Error, Result};
use sha2::{Digest, Sha256};

use crate::config::CudaConfig;
use crate::gpu::{Device, Kernel, Module};
use crate::nvrtc::{Nvrtc, Source};

macro_rules! files {
    ($($name:literal),* $(,)?) => { &[$(($name, include_str!(concat!("../kernels/", $name)))),*] };
}

/// What the sources include.
const HEADERS: &[(&str, &str)] = files![
    "activation.cuh",
    "attention.cuh",
    "bulk.cuh",
    "codes.cuh",
    "common.cuh",
    "formats.cuh",
    "half.cuh",
    "hopper.cuh",
    "linear.cuh",
    "matmul.cuh",
    "product.cuh",
    "rope.cuh",
    "search.cuh",
    "slot.cuh",
    "tensor.cuh",
    "tile.cuh",
    "tma.cuh",
    "wgmma.cuh",
    "work.cuh",
];

const SOURCES: &[(&str, &str)] = files![
    "attention.cu",
    "bulk.cu",
    "codes.cu",
    "combine.cu",
    "decode.cu",
    "elementwise.cu",
    "embed.cu",
    "hopper.cu",
    "linear.cu",
    "matmul.cu",
    "norm.cu",
    "pack.cu",
    "prefill.cu",
    "prefill_hopper.cu",
    "rope.cu",
    "route.cu",
    "sample.cu",
    "slot.cu",
];

/// The architecture whose tensor cores `bulk.cu`, `hopper.cu` and `prefill_hopper.cu` are for: with the `a`, what later ones don't have.
const HOPPER: &str = "sm_90a";

/// What the emulated driver calls its device. It has the kernels compiled in.
const EMULATED: &str = "cuemu";

/// A source file and the format that it is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Unit {
    /// Without its ending.
    pub file: &'static str,
    pub format: Option<DType>,
}

impl Unit {
    /// Every unit that there is.
    pub fn all() -> Vec<Unit> {
        let mut units = Vec::new();
        for (name, _) in SOURCES {
            let file = name.trim_end_matches(".cu");
            let formats: &[DType] = match file {
                "attention" => &[DType::F32, DType::F16, DType::BF16],
                "bulk" | "decode" | "prefill" | "prefill_hopper" => &[DType::F16, DType::BF16],
                "embed" | "linear" => &DType::ALL,
                // Tensor cores take all but the first, F32.
                "hopper" | "matmul" => &DType::ALL[1..],
                "codes" => &DType::ALL[3..],
                _ => &[],
            };
            units.extend(formats.iter().map(|&format| Unit { file, format: Some(format) }));
            if formats.is_empty() {
                units.push(Unit { file, format: None });
            }
        }
        units
    }

    /// Whether it compiles for an architecture: what is for the tensor cores of one does for no other.
    pub fn is_for(self, architecture: &str) -> bool {
        !["bulk", "hopper", "prefill_hopper"].contains(&self.file) || architecture == HOPPER
    }

    fn source(self) -> Result<Source<'static>> {
        let found = SOURCES.iter().find(|(name, _)| name.trim_end_matches(".cu") == self.file);
        let (name, text) =
            found.ok_or_else(|| Error::internal(format!("there are no kernels called {}", self.file)))?;
        Ok(Source { name, text, headers: HEADERS })
    }

    /// What the compiler is told, for an architecture such as `sm_90`.
    fn options(self, architecture: &str) -> Vec<String> {
        // Products and sums are contracted only where the source says so: see `common.cuh`.
        let mut options =
            vec![format!("--gpu-architecture={architecture}"), "--std=c++17".to_owned(), "--fmad=false".to_owned()];
        let has_elements = ["attention", "decode", "prefill", "prefill_hopper"].contains(&self.file);
        let macro_name = if has_elements { "ELEMENT" } else { "FORMAT" };
        options.extend(self.format.map(|format| format!("-D{macro_name}={}", format.name())));
        options
    }

    /// Compiles the unit: the CUBIN, and what the compiler says of the registers and memory that each kernel takes.
    ///
    /// # Errors
    /// The compiler refuses it.
    pub fn compile(self, nvrtc: &Nvrtc, architecture: &str) -> Result<crate::nvrtc::Compiled> {
        let mut options = self.options(architecture);
        options.push("--ptxas-options=-v".to_owned());
        nvrtc.compile(self.source()?, &options)
    }

    /// A digest of all that the compiled unit depends on.
    fn digest(self, architecture: &str, compiler: (i32, i32)) -> Result<String> {
        let source = self.source()?;
        let mut digest = Sha256::new();
        for (name, text) in source.headers.iter().chain([&(source.name, source.text)]) {
            digest.update(name.as_bytes());
            digest.update(text.as_bytes());
        }
        digest.update(format!("{:?} {compiler:?}", self.options(architecture)).as_bytes());
        Ok(digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

impl std::fmt::Display for Unit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.format {
            Some(format) => write!(f, "{} for {format}", self.file),
            None => f.write_str(self.file),
        }
    }
}

/// Loads kernels for a device, compiling what was never compiled before.
#[derive(Debug)]
pub struct Kernels {
    device: Device,
    architecture: String,
    emulated: bool,
    portable: bool,
    nvrtc: Option<Nvrtc>,
    nvrtc_path: Option<PathBuf>,
    cache: Option<PathBuf>,
    modules: HashMap<Unit, Module>,
}

impl Kernels {
    pub fn new(device: &Device, config: &CudaConfig) -> Result<Kernels> {
        let (major, minor) = device.capability()?;
        if major < 8 {
            return Err(Error::unsupported(format!(
                "{} has compute capability {major}.{minor}; 8.0 (Ampere) is the least that the kernels are for",
                device.name()?
            )));
        }
        Ok(Kernels {
            device: device.clone(),
            architecture: if (major, minor) == (9, 0) { HOPPER.to_owned() } else { format!("sm_{major}{minor}") },
            emulated: device.name()?.starts_with(EMULATED),
            portable: config.portable,
            nvrtc: None,
            nvrtc_path: config.nvrtc.clone(),
            cache: config.kernel_cache.clone().or_else(default_cache),
            modules: HashMap::new(),
        })
    }

    /// The kernel called `name`, or `name_FORMAT` where its unit is for a format.
    ///
    /// # Errors
    /// There is no compiler, or the device refuses what it made.
    pub fn get(&mut self, unit: Unit, name: &str) -> Result<Kernel> {
        if !self.modules.contains_key(&unit) {
            let image = if self.emulated { EMULATED.as_bytes().to_vec() } else { self.image(unit)? };
            let module = self.device.load(&image).map_err(|error| error.within(unit))?;
            self.modules.insert(unit, module);
        }
        let full_name = unit.format.map_or_else(|| name.to_owned(), |format| format!("{name}_{}", format.name()));
        self.modules[&unit].kernel(&full_name)
    }

    /// Whether products of many rows are those of `hopper.cu` and `bulk.cu`.
    pub fn is_hopper(&self) -> bool {
        self.architecture == HOPPER && !self.emulated && !self.portable
    }

    /// The modules, which the kernels that were given out need.
    pub fn into_modules(self) -> Vec<Module> {
        self.modules.into_values().collect()
    }

    /// Loads units that a graph will need, those that have to be compiled at the same time.
    ///
    /// # Errors
    /// As for [`get`](Kernels::get).
    pub fn prepare(&mut self, units: &[Unit]) -> Result<()> {
        if self.emulated {
            return Ok(());
        }
        let missing: Vec<Unit> = units.iter().copied().filter(|unit| !self.modules.contains_key(unit)).collect();
        let nvrtc = self.compiler()?;
        let (architecture, cache) = (self.architecture.as_str(), self.cache.as_deref());
        let compile = |unit: Unit| image_by(nvrtc, architecture, cache, unit);
        let images: Vec<Result<Vec<u8>>> = std::thread::scope(|scope| {
            let threads: Vec<_> = missing.iter().map(|&unit| scope.spawn(move || compile(unit))).collect();
            let panicked = || Err(Error::internal("compiling kernels panicked"));
            threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| panicked())).collect()
        });
        for (unit, image) in missing.into_iter().zip(images) {
            let module = self.device.load(&image?).map_err(|error| error.within(unit))?;
            self.modules.insert(unit, module);
        }
        Ok(())
    }

    fn compiler(&mut self) -> Result<Nvrtc> {
        match self.nvrtc {
            Some(nvrtc) => Ok(nvrtc),
            None => Ok(*self.nvrtc.insert(Nvrtc::load(self.nvrtc_path.as_deref())?)),
        }
    }

    fn image(&mut self, unit: Unit) -> Result<Vec<u8>> {
        let nvrtc = self.compiler()?;
        image_by(nvrtc, &self.architecture, self.cache.as_deref(), unit)
    }
}

/// A unit's image as it was kept, or compiled and then kept.
fn image_by(nvrtc: Nvrtc, architecture: &str, cache: Option<&Path>, unit: Unit) -> Result<Vec<u8>> {
    let digest = unit.digest(architecture, nvrtc.version())?;
    let path = cache.map(|cache| cache.join(format!("{digest}.cubin")));
    if let Some(image) = path.as_deref().and_then(read_image) {
        return Ok(image);
    }
    let started = Instant::now();
    let compiled = unit.compile(&nvrtc, architecture).map_err(|error| error.within(unit))?;
    let seconds = started.elapsed().as_secs_f64();
    tracing::info!(kernels = %unit, architecture, seconds, "Compiled kernels.");
    if let Some(Err(error)) = path.as_deref().map(|path| keep(path, &compiled.cubin)) {
        tracing::warn!(%error, "Compiled kernels can't be kept; the next start compiles them again.");
    }
    Ok(compiled.cubin)
}

/// A kept image, if it is whole: a CUBIN is an ELF file, and the last bytes are its own digest.
fn read_image(path: &Path) -> Option<Vec<u8>> {
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

/// `kernels` in the folder that Setu keeps models in.
pub fn default_cache() -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let setu = variable("SETU_CACHE");
    let setu = setu.or_else(|| variable("XDG_CACHE_HOME").map(|cache| cache.join("setu")));
    setu.or_else(|| variable("HOME").map(|home| home.join(".cache/setu"))).map(|cache| cache.join("kernels"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_depends_on_source_format_architecture_and_compiler() {
        let unit = Unit { file: "linear", format: Some(DType::Q4K) };
        let digest = unit.digest("sm_90", (12, 9)).unwrap();
        assert_eq!(digest, unit.digest("sm_90", (12, 9)).unwrap());
        let others = [
            unit.digest("sm_80", (12, 9)),
            unit.digest("sm_90", (13, 0)),
            Unit { format: Some(DType::Q5K), ..unit }.digest("sm_90", (12, 9)),
            Unit { file: "embed", ..unit }.digest("sm_90", (12, 9)),
        ];
        assert!(others.into_iter().all(|other| other.unwrap() != digest));
    }

    #[test]
    fn a_damaged_image_is_not_used() {
        let folder = std::env::temp_dir().join(format!("setu-kernels-{}", std::process::id()));
        let path = folder.join("a.cubin");
        keep(&path, b"\x7fELF and more").unwrap();
        assert_eq!(read_image(&path).as_deref(), Some(&b"\x7fELF and more"[..]));
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[6] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(read_image(&path), None);
        std::fs::write(&path, &bytes[..10]).unwrap();
        assert_eq!(read_image(&path), None);
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
