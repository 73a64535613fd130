//! What a file says of itself without being run: a record of bytes in the section `.setu.plugin`.
//!
//! [`encode`] writes it while the plugin is compiled; [`decode`] reads it from a file that nobody has
//! checked. A section holds one record for each `export_plugin!` that was linked into the file.
//!
//! Little-endian: magic, `u32` format, `u32` bytes of the whole record, `u16` major and minor number of
//! the ABI, `u32` panic strategy; then texts, each a `u32` length and UTF-8: setu-core's version, package,
//! its version, entry symbol; then a `u32` count and for each component its `u32` kind, key and
//! description. What is added goes behind that and is skipped by older readers.

use super::version::{ABI, AbiVersion};
use crate::component::Kind;
use crate::registry::Linked;

/// The section that holds the records.
pub const SECTION: &str = ".setu.plugin";

const MAGIC: [u8; 8] = *b"\x7fSETUPLG";
const FORMAT: u32 = 1;
/// Magic, format, length and ABI version, which no format may move.
const FIXED_BYTES: usize = 20;

/// More than any plugin needs; a file that claims more is broken.
const MAX_RECORD_BYTES: usize = 1 << 20;
const MAX_RECORDS: usize = 64;
const MAX_COMPONENTS: u32 = 256;

/// What a panic does in a plugin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum PanicStrategy {
    Unwind = 0,
    /// Ends the process, so that a host refuses the file.
    Abort = 1,
}

/// One record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PluginMetadata {
    pub abi: AbiVersion,
    pub panic: PanicStrategy,
    /// The version of setu-core that it was built with.
    pub core_version: String,
    pub package: String,
    pub version: String,
    /// The symbol that leads to its code.
    pub symbol: String,
    pub components: Vec<ComponentMetadata>,
}

/// A component that a plugin declares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ComponentMetadata {
    pub kind: Kind,
    pub key: String,
    pub description: String,
}

/// Why a record can't be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetadataError {
    /// It isn't a record, with the reason.
    Corrupt(String),
    /// Built against a boundary that this build doesn't speak.
    OtherAbi(AbiVersion),
}

impl std::fmt::Display for MetadataError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            MetadataError::Corrupt(why) => write!(f, "its description is damaged: {why}"),
            MetadataError::OtherAbi(abi) => write!(f, "it is built for ABI {abi}"),
        }
    }
}

impl std::error::Error for MetadataError {}

/// What `export_plugin!` knows about the crate that it stands in.
#[derive(Clone, Copy)]
pub struct Package {
    pub name: &'static str,
    pub version: &'static str,
    pub symbol: &'static str,
    pub panic: PanicStrategy,
}

/// Bytes of the record about `components`.
pub const fn encoded_len(package: &Package, components: &[Linked]) -> usize {
    let texts = [env!("CARGO_PKG_VERSION"), package.name, package.version, package.symbol];
    let mut len = FIXED_BYTES + 4 + 4;
    let mut i = 0;
    while i < texts.len() {
        len += 4 + texts[i].len();
        i += 1;
    }
    i = 0;
    while i < components.len() {
        len += 4 + 4 + components[i].key.len() + 4 + components[i].description.len();
        i += 1;
    }
    len
}

/// The record about `components`; `N` is their [`encoded_len`].
///
/// # Panics
/// A key isn't made of lower-case letters, digits and `_`; while compiling, as the macro calls it.
pub const fn encode<const N: usize>(package: &Package, components: &[Linked]) -> [u8; N] {
    let mut writer = Writer { bytes: [0; N], at: 0 };
    writer.raw(&MAGIC);
    writer.number(FORMAT);
    writer.number(N as u32);
    writer.raw(&ABI.major.to_le_bytes());
    writer.raw(&ABI.minor.to_le_bytes());
    writer.number(package.panic as u32);
    writer.text(env!("CARGO_PKG_VERSION"));
    writer.text(package.name);
    writer.text(package.version);
    writer.text(package.symbol);
    writer.number(components.len() as u32);
    let mut i = 0;
    while i < components.len() {
        assert!(is_key(components[i].key), "a component's KEY is made of lower-case letters, digits and `_`");
        writer.number(components[i].kind() as u32);
        writer.text(components[i].key);
        writer.text(components[i].description);
        i += 1;
    }
    assert!(writer.at == N, "N is the encoded length");
    writer.bytes
}

struct Writer<const N: usize> {
    bytes: [u8; N],
    at: usize,
}

impl<const N: usize> Writer<N> {
    const fn raw(&mut self, bytes: &[u8]) {
        let mut i = 0;
        while i < bytes.len() {
            self.bytes[self.at] = bytes[i];
            self.at += 1;
            i += 1;
        }
    }

    const fn number(&mut self, number: u32) {
        self.raw(&number.to_le_bytes());
    }

    const fn text(&mut self, text: &str) {
        self.number(text.len() as u32);
        self.raw(text.as_bytes());
    }
}

const fn is_key(key: &str) -> bool {
    let bytes = key.as_bytes();
    let mut i = 0;
    while i < bytes.len() {
        if !(bytes[i].is_ascii_lowercase() || bytes[i].is_ascii_digit() || bytes[i] == b'_') {
            return false;
        }
        i += 1;
    }
    !bytes.is_empty() && bytes.len() <= 64
}

/// The records of a section.
///
/// # Errors
/// The first that can't be used; [`MetadataError::OtherAbi`] where that is known, even if nothing else
/// of its record can be read.
pub fn decode(section: &[u8]) -> Result<Vec<PluginMetadata>, MetadataError> {
    let mut records = Vec::new();
    let mut rest = section;
    loop {
        // Linkers may pad between records.
        let start = rest.iter().position(|&byte| byte != 0).unwrap_or(rest.len());
        rest = &rest[start..];
        if rest.is_empty() {
            break;
        }
        if records.len() == MAX_RECORDS {
            return Err(corrupt(format!("it has more than {MAX_RECORDS} records")));
        }
        let (record, behind) = split_record(rest)?;
        records.push(record_of(record)?);
        rest = behind;
    }
    if records.is_empty() {
        return Err(corrupt("it is empty"));
    }
    Ok(records)
}

fn corrupt(why: impl Into<String>) -> MetadataError {
    MetadataError::Corrupt(why.into())
}

/// The first record and what lies behind it, with the part checked that no format may move.
fn split_record(bytes: &[u8]) -> Result<(&[u8], &[u8]), MetadataError> {
    let mut reader = Reader(bytes);
    if reader.raw(MAGIC.len())? != MAGIC {
        return Err(corrupt("a record does not begin with the mark of one"));
    }
    let format = reader.number()?;
    let len = reader.number()? as usize;
    let version = reader.number()?;
    let abi = AbiVersion { major: version as u16, minor: (version >> 16) as u16 };
    if !abi.is_loadable() {
        return Err(MetadataError::OtherAbi(abi));
    }
    if format != FORMAT {
        return Err(corrupt(format!("a record has format {format}, this build of Setu reads {FORMAT}")));
    }
    if !(FIXED_BYTES..=MAX_RECORD_BYTES).contains(&len) {
        return Err(corrupt(format!("a record claims to be of {len} bytes")));
    }
    bytes.split_at_checked(len).ok_or_else(|| corrupt(format!("a record of {len} bytes is cut off")))
}

fn record_of(record: &[u8]) -> Result<PluginMetadata, MetadataError> {
    let mut reader = Reader(&record[FIXED_BYTES - 4..]);
    let version = reader.number()?;
    let abi = AbiVersion { major: version as u16, minor: (version >> 16) as u16 };
    let panic = match reader.number()? {
        0 => PanicStrategy::Unwind,
        1 => PanicStrategy::Abort,
        other => return Err(corrupt(format!("there is no panic strategy {other}"))),
    };
    let [core_version, package, version, symbol] = [reader.text()?, reader.text()?, reader.text()?, reader.text()?];
    if symbol.is_empty() || !symbol.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
        return Err(corrupt(format!("{symbol:?} is no name of a symbol")));
    }
    let count = reader.number()?;
    if count > MAX_COMPONENTS {
        return Err(corrupt(format!("it claims {count} components")));
    }
    let mut components = Vec::new();
    for _ in 0..count {
        let code = reader.number()?;
        let kind = Kind::ALL.into_iter().find(|&kind| kind as u32 == code);
        let kind = kind.ok_or_else(|| corrupt(format!("there is no kind {code} of components")))?;
        let (key, description) = (reader.text()?, reader.text()?);
        if !is_key(&key) {
            return Err(corrupt(format!("{key:?} is no key of a component")));
        }
        components.push(ComponentMetadata { kind, key, description });
    }
    Ok(PluginMetadata { abi, panic, core_version, package, version, symbol, components })
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn raw(&mut self, len: usize) -> Result<&'a [u8], MetadataError> {
        let (bytes, rest) = self.0.split_at_checked(len).ok_or_else(|| corrupt("a record is cut off"))?;
        self.0 = rest;
        Ok(bytes)
    }

    fn number(&mut self) -> Result<u32, MetadataError> {
        Ok(u32::from_le_bytes(self.raw(4)?.try_into().expect("four bytes")))
    }

    /// A line of text, without what could play tricks on a terminal.
    fn text(&mut self) -> Result<String, MetadataError> {
        let len = self.number()? as usize;
        let text = std::str::from_utf8(self.raw(len)?).map_err(|_| corrupt("a text is not UTF-8"))?;
        Ok(text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, FieldSpec, Values};
    use crate::scheduler::{Decisions, Scheduler};
    use crate::view::StepView;
    use crate::{Component, Result};

    struct Nothing;

    impl Config for Nothing {
        const HELP: &'static str = "";
        const FIELDS: &'static [FieldSpec] = &[];

        fn read(_: &Values<'_>) -> Result<Self> {
            Ok(Nothing)
        }
    }

    struct Idle;

    impl Component for Idle {
        type Config = Nothing;
        const KEY: &'static str = "idle";
        const DESCRIPTION: &'static str = "Runs nobody\u{7}.";

        fn build(_: Nothing) -> Result<Self> {
            Ok(Idle)
        }
    }

    impl Scheduler for Idle {
        fn schedule(&mut self, _: &StepView<'_>, _: &mut Decisions<'_>) -> Result<()> {
            Ok(())
        }
    }

    const COMPONENTS: &[Linked] = &[Linked::scheduler::<Idle>("p", "1"), Linked::scheduler::<Idle>("p", "1")];
    const PACKAGE: Package =
        Package { name: "päckage", version: "1.2.3-rc.4", symbol: "setu_plugin_p", panic: PanicStrategy::Unwind };
    const LEN: usize = encoded_len(&PACKAGE, COMPONENTS);
    static RECORD: [u8; LEN] = encode(&PACKAGE, COMPONENTS);

    /// The record with `patch` at `at`.
    fn patched(at: usize, patch: &[u8]) -> Vec<u8> {
        let mut bytes = RECORD.to_vec();
        bytes[at..at + patch.len()].copy_from_slice(patch);
        bytes
    }

    #[test]
    fn records_read_back_as_they_were_written() {
        let idle = ComponentMetadata {
            kind: Kind::Scheduler,
            key: "idle".to_owned(),
            description: "Runs nobody .".to_owned(),
        };
        let expected = PluginMetadata {
            abi: ABI,
            panic: PanicStrategy::Unwind,
            core_version: env!("CARGO_PKG_VERSION").to_owned(),
            package: "päckage".to_owned(),
            version: "1.2.3-rc.4".to_owned(),
            symbol: "setu_plugin_p".to_owned(),
            components: vec![idle.clone(), idle],
        };
        assert_eq!(decode(&RECORD).unwrap(), std::slice::from_ref(&expected));
        let two = [&[0; 5], &RECORD[..], &[0; 3], &RECORD[..], &[0; 9]].concat();
        assert_eq!(decode(&two).unwrap(), [expected.clone(), expected.clone()]);
        // What a later version adds behind the components is skipped.
        let longer = [&patched(12, &(LEN as u32 + 6).to_le_bytes())[..], b"future"].concat();
        assert_eq!(decode(&longer).unwrap(), [expected]);
    }

    #[test]
    fn another_version_is_told_even_where_nothing_else_can_be_read() {
        let newer = AbiVersion { major: ABI.major, minor: ABI.minor + 1 };
        let foreign = AbiVersion { major: 0xffff, minor: 0 };
        for abi in [newer, foreign] {
            let mut bytes = patched(16, &[abi.major.to_le_bytes(), abi.minor.to_le_bytes()].concat());
            assert_eq!(decode(&bytes), Err(MetadataError::OtherAbi(abi)));
            bytes[8] = 200;
            bytes.truncate(FIXED_BYTES);
            assert_eq!(decode(&bytes), Err(MetadataError::OtherAbi(abi)));
        }
    }

    #[test]
    fn damage_is_named() {
        let cases = [
            (Vec::new(), "it is empty"),
            (vec![0; 100], "it is empty"),
            (RECORD[..10].to_vec(), "a record is cut off"),
            (patched(8, &[2]), "a record has format 2, this build of Setu reads 1"),
            (patched(12, &u32::MAX.to_le_bytes()), "a record claims to be of 4294967295 bytes"),
            (patched(12, &[0; 4]), "a record claims to be of 0 bytes"),
            (patched(20, &[2]), "there is no panic strategy 2"),
            (patched(24, &u32::MAX.to_le_bytes()), "a record is cut off"),
            (patched(LEN - 1, &[0xff]), "a text is not UTF-8"),
            (RECORD.repeat(MAX_RECORDS + 1), "it has more than 64 records"),
        ];
        for (bytes, why) in cases {
            assert_eq!(decode(&bytes), Err(MetadataError::Corrupt(why.to_owned())));
        }
    }

    #[test]
    fn no_damage_to_a_byte_or_to_the_end_is_a_crash() {
        for at in 0..LEN {
            assert!(decode(&RECORD[..at]).is_err(), "cut at {at}");
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                if let Ok(plugins) = decode(&patched(at, &[value])) {
                    assert!(plugins[0].components.len() <= 2, "{value} at {at}");
                }
            }
        }
    }
}
