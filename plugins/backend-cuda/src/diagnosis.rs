//! What of CUDA there is on this machine, what is missing, and what that costs: for `setu doctor`.

use std::path::PathBuf;

use crate::gpu::{Device, mib};
use crate::images::Images;
use crate::nvrtc::Nvrtc;
use crate::probe;

/// A library or device that was looked for.
#[derive(Clone, Debug)]
pub struct Finding {
    pub what: String,
    /// What was found and where; or what is missing, what that costs and how to get it.
    pub found: Result<String, String>,
}

fn finding(what: impl Into<String>, found: Result<String, String>) -> Finding {
    Finding { what: what.into(), found }
}

/// Looks for everything that the backend uses.
pub fn findings() -> Vec<Finding> {
    let mut findings = Vec::new();
    match probe::devices() {
        Err(error) => findings.push(finding("NVIDIA driver", Err(error.message().to_owned()))),
        Ok(count) => {
            let (major, minor) = probe::version();
            let place = loaded_from("libcuda.so").map_or(String::new(), |path| format!(", {}", path.display()));
            findings.push(finding("NVIDIA driver", Ok(format!("for CUDA {major}.{minor}{place}"))));
            findings.extend((0..count).map(|ordinal| finding(format!("GPU {ordinal}"), device(ordinal))));
        }
    }
    let nvrtc = Nvrtc::find(None).map(|(nvrtc, path)| {
        let ((major, minor), path) = (nvrtc.version(), loaded_from("libnvrtc.so").unwrap_or(path));
        format!("{major}.{minor}, {}", path.display())
    });
    let without = "without it only kernels run that were compiled before, here or elsewhere by `setu kernels`";
    findings.push(finding("NVRTC", nvrtc.map_err(|error| format!("{}\n{without}", error.message()))));
    findings
}

/// Folders with compiled kernels: the one where they are kept, and the one that came with the program.
pub fn kernel_folders() -> Vec<PathBuf> {
    Images::new(None).folders().map(PathBuf::from).collect()
}

fn device(ordinal: u32) -> Result<String, String> {
    let described = || {
        let device = Device::open(ordinal)?;
        let ((major, minor), (free, total)) = (device.capability()?, device.memory()?);
        let (name, processors) = (device.name()?, device.multiprocessors()?);
        let (free, total) = (mib(free), mib(total));
        let enough = if major < 8 { ": too old, 8.0 (Ampere) is the least that the kernels are for" } else { "" };
        Ok(format!(
            "{name}, {total} MiB ({free} free), {processors} multiprocessors, compute capability {major}.{minor}{enough}"
        ))
    };
    described().map_err(|error: setu_core::Error| error.message().to_owned())
}

/// The file that a loaded library came from, by the beginning of its name.
fn loaded_from(name: &str) -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let mut paths = maps.lines().filter_map(|line| line.find('/').map(|at| PathBuf::from(&line[at..])));
    paths.find(|path| path.file_name().is_some_and(|found| found.to_string_lossy().starts_with(name)))
}
