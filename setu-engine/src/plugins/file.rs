//! Reads what a file says of itself. None of its code runs.

use std::io::Read;
use std::path::{Path, PathBuf};

use object::Endianness;
use object::elf::{self, FileHeader64};
use object::read::elf::{FileHeader, ProgramHeader, SectionHeader};
use setu_core::abi::metadata::{self, MetadataError, PanicStrategy};
use setu_core::abi::{PluginMetadata, version};
use sha2::{Digest, Sha256};

use super::report::{Rejection, RejectionKind};

/// Larger than any plugin; what is larger is no plugin.
const MAX_FILE_BYTES: u64 = 4 << 30;

/// A file that may be loaded.
#[derive(Clone, Debug)]
pub struct Inspected {
    pub path: PathBuf,
    pub sha256: String,
    /// One for each `export_plugin!` that was linked into the file.
    pub plugins: Vec<PluginMetadata>,
}

/// Reads `path` and checks that it can be loaded, without running any of its code.
///
/// # Errors
/// The reason why it would be rejected.
pub fn inspect(path: &Path) -> Result<Inspected, Rejection> {
    let refuse = |(kind, reason)| Rejection { path: path.to_owned(), kind, reason };
    let bytes = read(path).map_err(refuse)?;
    let sha256 = hex(&Sha256::digest(&bytes));
    let plugins = plugins_of(&bytes).map_err(refuse)?;
    Ok(Inspected { path: path.to_owned(), sha256, plugins })
}

type Refusal = (RejectionKind, String);

fn read(path: &Path) -> Result<Vec<u8>, Refusal> {
    let unreadable = |error: std::io::Error| (RejectionKind::Unreadable, format!("it cannot be read: {error}"));
    // Asked before it is opened, for opening a pipe would wait for its other end.
    let about = std::fs::metadata(path).map_err(unreadable)?;
    if !about.is_file() || about.len() > MAX_FILE_BYTES {
        return Err((RejectionKind::Unreadable, "it is not a file of a reasonable size".to_owned()));
    }
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(unreadable)?;
    file.take(MAX_FILE_BYTES).read_to_end(&mut bytes).map_err(unreadable)?;
    Ok(bytes)
}

fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn plugins_of(bytes: &[u8]) -> Result<Vec<PluginMetadata>, Refusal> {
    let section = section_of(bytes)?;
    let plugins = metadata::decode(section).map_err(|error| match error {
        MetadataError::OtherAbi(abi) => (
            RejectionKind::OtherAbi,
            format!(
                "it is built for ABI {abi}, and this Setu loads plugins for ABI {}: build the plugin with the \
                 setu-core of this Setu, {}, or use a Setu for ABI {abi}",
                version::loadable(),
                env!("CARGO_PKG_VERSION"),
            ),
        ),
        MetadataError::Corrupt(why) => {
            (RejectionKind::Corrupt, format!("its description is damaged, {why}: copy or build it again"))
        }
    })?;
    if let Some(plugin) = plugins.iter().find(|plugin| plugin.panic == PanicStrategy::Abort) {
        return Err((
            RejectionKind::PanicAbort,
            format!(
                "{} is built with `panic = \"abort\"`, so that a panic in it would end the whole engine: build it \
                 with `panic = \"unwind\"`",
                plugin.package
            ),
        ));
    }
    Ok(plugins)
}

/// The section with the records of a library that the system's loader can map without running into its end.
fn section_of(bytes: &[u8]) -> Result<&[u8], Refusal> {
    if !bytes.starts_with(&elf::ELFMAG) {
        return Err((RejectionKind::NotElf, "it is not an ELF file, so no shared library of Linux".to_owned()));
    }
    let truncated = || (RejectionKind::Truncated, "its end is missing: copy or build it again".to_owned());
    check_platform(bytes).ok_or_else(truncated)??;
    let header = FileHeader64::<Endianness>::parse(bytes).map_err(|_| truncated())?;
    let endian = header.endian().map_err(|_| truncated())?;
    let no_plugin = |what: &str| {
        let advice = "a plugin is a `cdylib` that calls `setu_core::export_plugin!`";
        (RejectionKind::NotAPlugin, format!("it is no Setu plugin: it {what}; {advice}"))
    };
    if header.e_type(endian) != elf::ET_DYN {
        return Err(no_plugin("is an ELF file but not a shared library"));
    }
    for segment in header.program_headers(endian, bytes).map_err(|_| truncated())? {
        segment.data(endian, bytes).map_err(|()| truncated())?;
    }
    let sections = header.sections(endian, bytes).map_err(|_| truncated())?;
    let found = sections.section_by_name(endian, metadata::SECTION.as_bytes());
    let (_, section) = found.ok_or_else(|| no_plugin(&format!("has no section `{}`", metadata::SECTION)))?;
    section.data(endian, bytes).map_err(|_| truncated())
}

/// `None` where the file ends before it says what it is for.
fn check_platform(bytes: &[u8]) -> Option<Result<(), Refusal>> {
    const HOST: u16 = match () {
        () if cfg!(target_arch = "x86_64") => elf::EM_X86_64.0,
        () if cfg!(target_arch = "aarch64") => elf::EM_AARCH64.0,
        () if cfg!(target_arch = "riscv64") => elf::EM_RISCV.0,
        () => elf::EM_NONE.0,
    };
    let class = *bytes.get(4)?;
    let little = *bytes.get(5)? == 1;
    let machine: [u8; 2] = bytes.get(18..20)?.try_into().ok()?;
    let machine = if little { u16::from_le_bytes(machine) } else { u16::from_be_bytes(machine) };
    if class == 2 && little == cfg!(target_endian = "little") && machine == HOST {
        return Some(Ok(()));
    }
    let bits = if class == 2 { "64-bit" } else { "32-bit" };
    let name = |machine| match machine {
        3 => "x86".to_owned(),
        40 => "Arm".to_owned(),
        62 => "x86-64".to_owned(),
        183 => "AArch64".to_owned(),
        243 => "RISC-V".to_owned(),
        other => format!("machine {other}"),
    };
    let (file, host) = (name(machine), name(HOST));
    let reason =
        format!("it is for {bits} {file} processors, and this Setu runs on 64-bit {host}: get the build for that");
    Some(Err((RejectionKind::OtherPlatform, reason)))
}
