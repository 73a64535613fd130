//! The one error that crosses the contract.
//!
//! A message names the thing, the place and the next step; the kind says who has to act on it.

/// What went wrong, for those who must decide what to do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A configuration value is missing, mistyped or out of range: the operator's to mend.
    Config = 1,
    /// A file, a checkpoint or a request does not hold what it must.
    InvalidInput = 2,
    /// The thing asked for is valid and not provided here.
    Unsupported = 3,
    /// Memory or another resource ran out.
    Exhausted = 4,
    /// A component panicked; its handle must not be called again.
    Panicked = 5,
    /// A component broke the contract.
    Contract = 6,
    /// A device failed.
    Device = 7,
    /// Anything else.
    Internal = 8,
}

impl ErrorKind {
    /// The kind with this number; unknown numbers, which a newer plugin may send, are `Internal`.
    pub fn from_code(code: u32) -> ErrorKind {
        match code {
            1 => ErrorKind::Config,
            2 => ErrorKind::InvalidInput,
            3 => ErrorKind::Unsupported,
            4 => ErrorKind::Exhausted,
            5 => ErrorKind::Panicked,
            6 => ErrorKind::Contract,
            7 => ErrorKind::Device,
            _ => ErrorKind::Internal,
        }
    }
}

/// An error with its kind and a message for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    kind: ErrorKind,
    message: String,
}

/// A result whose error is [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Error {
        Error { kind, message: message.into() }
    }

    pub fn config(message: impl Into<String>) -> Error {
        Error::new(ErrorKind::Config, message)
    }

    pub fn invalid(message: impl Into<String>) -> Error {
        Error::new(ErrorKind::InvalidInput, message)
    }

    pub fn unsupported(message: impl Into<String>) -> Error {
        Error::new(ErrorKind::Unsupported, message)
    }

    pub fn exhausted(message: impl Into<String>) -> Error {
        Error::new(ErrorKind::Exhausted, message)
    }

    pub fn contract(message: impl Into<String>) -> Error {
        Error::new(ErrorKind::Contract, message)
    }

    pub fn internal(message: impl Into<String>) -> Error {
        Error::new(ErrorKind::Internal, message)
    }

    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    pub fn message(&self) -> &str {
        &self.message
    }

    /// Puts `place` in front of the message: `layers.3.attn: …`.
    #[must_use]
    pub fn within(mut self, place: impl std::fmt::Display) -> Error {
        self.message = format!("{place}: {}", self.message);
        self
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}
