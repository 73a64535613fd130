//! The kernels: their sources, how they are compiled, and those that a device has loaded.
//!
//! A unit is a source compiled for one format. It is compiled when a graph first needs it, for the device at
//! hand, unless it was [before](Images).

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use setu_core::{DType, Error, KvDType, Result};
use sha2::{Digest, Sha256};

use crate::config::CudaConfig;
use crate::gpu::{Device, Kernel, Module};
use crate::images::Images;
use crate::nvrtc::{Nvrtc, Source};

macro_rules! files {
    ($($name:literal),* $(,)?) => { &[$(($name, include_str!(concat!("../kernels/", $name)))),*] };
}

/// What the sources include.
const HEADERS: &[(&str, &str)] = files![
    "activation.cuh",
    "attention.cuh",
    "bulk.cuh",
    "cells.cuh",
    "codes.cuh",
    "common.cuh",
    "deferred.cuh",
    "e4m3.cuh",
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

/// Architectures that kernels are tested to compile for: the oldest of each generation.
pub const ARCHITECTURES: [&str; 3] = ["sm_80", HOPPER, "sm_100"];

/// The architecture whose tensor cores `bulk.cu`, `hopper.cu` and `prefill_hopper.cu` are for: with the `a`, what later ones don't have.
const HOPPER: &str = "sm_90a";

/// Formats of K and V that there are kernels for.
pub(crate) const KV_FORMATS: [KvDType; 4] = [KvDType::F32, KvDType::F16, KvDType::BF16, KvDType::F8E4M3];

/// What the emulated driver calls its device. It has the kernels compiled in.
const EMULATED: &str = "cuemu";

/// A source file and the format that it is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Unit {
    /// Without its ending.
    pub file: &'static str,
    /// Its name in `kernels/formats.cuh`.
    pub format: Option<&'static str>,
}

impl Unit {
    /// Every unit that there is.
    pub fn all() -> Vec<Unit> {
        let mut units = Vec::new();
        for (name, _) in SOURCES {
            let file = name.trim_end_matches(".cu");
            let weights = |formats: &[DType]| formats.iter().map(|format| format.name()).collect();
            let kept = |formats: &[KvDType]| formats.iter().map(|format| format.name()).collect();
            let formats: Vec<&'static str> = match file {
                "attention" => kept(&KV_FORMATS),
                // All but F32, which tensor cores don't take.
                "decode" | "prefill" => kept(&KV_FORMATS[1..]),
                "prefill_hopper" => kept(&[KvDType::F16, KvDType::BF16]),
                "bulk" => weights(&[DType::F16, DType::BF16]),
                "embed" | "linear" => weights(&DType::ALL),
                // Tensor cores take all but the first, F32.
                "hopper" | "matmul" => weights(&DType::ALL[1..]),
                "codes" => weights(&DType::ALL[3..]),
                _ => Vec::new(),
            };
            if formats.is_empty() {
                units.push(Unit { file, format: None });
            }
            units.extend(formats.into_iter().map(|format| Unit { file, format: Some(format) }));
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
        options.extend(self.format.map(|format| format!("-D{macro_name}={format}")));
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

    /// A digest of all that the compiled unit depends on, but for the compiler.
    pub(crate) fn digest(self, architecture: &str) -> Result<String> {
        let source = self.source()?;
        let mut digest = Sha256::new();
        for (name, text) in source.headers.iter().chain([&(source.name, source.text)]) {
            digest.update(name.as_bytes());
            digest.update(text.as_bytes());
        }
        digest.update(format!("{:?}", self.options(architecture)).as_bytes());
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
    nvrtc: Option<Result<Nvrtc>>,
    nvrtc_path: Option<PathBuf>,
    images: Images,
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
            images: Images::new(config.kernel_cache.clone()),
            modules: HashMap::new(),
        })
    }

    /// The kernel called `name`, or `name_FORMAT` where its unit is for a format.
    ///
    /// # Errors
    /// There is no compiler, or the device refuses what it made.
    pub fn get(&mut self, unit: Unit, name: &str) -> Result<Kernel> {
        if !self.modules.contains_key(&unit) {
            let image = if self.emulated {
                EMULATED.as_bytes().to_vec()
            } else {
                let nvrtc = compiler(&mut self.nvrtc, self.nvrtc_path.as_deref())?;
                self.images.get(nvrtc, &self.architecture, unit)?
            };
            let module = self.device.load(&image).map_err(|error| error.within(unit))?;
            self.modules.insert(unit, module);
        }
        let full_name = unit.format.map_or_else(|| name.to_owned(), |format| format!("{name}_{format}"));
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
        let nvrtc = compiler(&mut self.nvrtc, self.nvrtc_path.as_deref())?;
        let (images, architecture) = (&self.images, self.architecture.as_str());
        let compile = |unit: Unit| images.get(nvrtc, architecture, unit);
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
}

/// The compiler, looked for once; or why there is none.
///
/// # Errors
/// It isn't at `path`: whoever names a compiler wants that one.
fn compiler<'a>(found: &'a mut Option<Result<Nvrtc>>, path: Option<&Path>) -> Result<&'a Result<Nvrtc>> {
    match found.get_or_insert_with(|| Nvrtc::load(path)) {
        Err(error) if path.is_some() => Err(error.clone()),
        found => Ok(found),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_depends_on_source_format_and_architecture() {
        let unit = Unit { file: "linear", format: Some(DType::Q4K.name()) };
        let digest = unit.digest("sm_90").unwrap();
        assert_eq!(digest, unit.digest("sm_90").unwrap());
        let others = [
            unit.digest("sm_80"),
            Unit { format: Some(DType::Q5K.name()), ..unit }.digest("sm_90"),
            Unit { file: "embed", ..unit }.digest("sm_90"),
        ];
        assert!(others.into_iter().all(|other| other.unwrap() != digest));
    }
}
