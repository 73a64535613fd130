pub mod dtype;
pub mod error;
pub use dtype::DType;
pub use error::{Error, ErrorKind, Result};
