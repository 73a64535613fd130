//! SHA-256 digests: what makes a file the one that was asked for.

use super::files::io_error;
use super::progress::Progress;
use sha2::Digest as _;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::str::FromStr;

/// A SHA-256 digest, written as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    pub fn of(bytes: &[u8]) -> Digest {
        Digest(sha2::Sha256::digest(bytes).into())
    }

    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Reads a whole file, so it takes about a second a gigabyte.
    pub(super) fn of_file(path: &Path, progress: &mut dyn Progress) -> setu_core::Result<Digest> {
        let failed = |error| io_error(error, "read", path);
        let mut file = File::open(path).map_err(failed)?;
        let size = file.metadata().map_err(failed)?.len();
        let mut hasher = Hasher::default();
        let mut buffer = vec![0; 1 << 20];
        progress.begin(&format!("checking {}", path.display()), Some(size));
        loop {
            match file.read(&mut buffer).map_err(failed)? {
                0 => break,
                n => hasher.update(&buffer[..n]),
            }
            progress.at(hasher.n_bytes());
        }
        progress.end();
        Ok(hasher.finish())
    }
}

impl FromStr for Digest {
    type Err = setu_core::Error;

    fn from_str(text: &str) -> setu_core::Result<Digest> {
        let malformed = || setu_core::Error::invalid(format!("`{text}` is no SHA-256 digest: 64 hexadecimal digits"));
        if text.len() != 64 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(malformed());
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| malformed())?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| malformed())?;
        }
        Ok(Digest(bytes))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Digests bytes as they pass, and counts them.
#[derive(Default)]
pub(super) struct Hasher {
    sha256: sha2::Sha256,
    n_bytes: u64,
}

impl Hasher {
    pub fn update(&mut self, bytes: &[u8]) {
        self.sha256.update(bytes);
        self.n_bytes += bytes.len() as u64;
    }

    pub fn n_bytes(&self) -> u64 {
        self.n_bytes
    }

    pub fn finish(self) -> Digest {
        Digest(self.sha256.finalize().into())
    }
}
