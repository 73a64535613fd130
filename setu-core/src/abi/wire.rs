//! The few types that cross by value, and how the others are pointed to.

use abi_stable::StableAbi;
use abi_stable::std_types::{RErr, ROk, RResult, RSlice, RVec};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::backend::RawWeight;
use super::log::HostServices;
use crate::backend::{Masks, Step, StepOutputs};
use crate::batcher::Chunks;
use crate::error::{Error, ErrorKind, Result};
use crate::rows::{Column, Rows};
use crate::scheduler::{Decisions, SessionEvent};
use crate::view::{StepOutcome, StepView};

/// An error on its way. The text is bytes, for the other side's word that it is UTF-8 isn't taken.
#[repr(C)]
#[derive(StableAbi)]
pub struct WireError {
    kind: u32,
    message: RVec<u8>,
}

pub type WireResult<T> = RResult<T, WireError>;

/// JSON on its way.
pub type Json = RVec<u8>;

impl From<Error> for WireError {
    fn from(error: Error) -> WireError {
        WireError { kind: error.kind() as u32, message: error.message().as_bytes().to_vec().into() }
    }
}

impl From<WireError> for Error {
    fn from(error: WireError) -> Error {
        Error::new(ErrorKind::from_code(error.kind), String::from_utf8_lossy(&error.message))
    }
}

/// `result` as it crosses.
pub fn sent<T, U>(result: Result<T>, wrap: impl FnOnce(T) -> U) -> WireResult<U> {
    match result {
        Ok(value) => ROk(wrap(value)),
        Err(error) => RErr(error.into()),
    }
}

/// What has crossed as a result again.
pub fn received<T>(result: WireResult<T>) -> Result<T> {
    match result {
        ROk(value) => Ok(value),
        RErr(error) => Err(error.into()),
    }
}

/// `value` as JSON.
pub fn to_json(value: &impl Serialize) -> Result<Json> {
    let bytes = serde_json::to_vec(value);
    bytes.map(Json::from).map_err(|error| Error::contract(format!("what cannot be written as JSON: {error}")))
}

/// The value that `bytes`, named `what` in errors, hold.
pub fn from_json<T: DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|error| Error::contract(format!("{what} cannot be read: {error}")))
}

/// Text that came across.
pub fn text(bytes: RSlice<'_, u8>) -> Result<&str> {
    std::str::from_utf8(bytes.as_slice()).map_err(|_| Error::contract("a text is not UTF-8"))
}

/// A component's instance in the memory of its own side.
#[repr(transparent)]
#[derive(StableAbi, Clone, Copy)]
#[sabi(unsafe_opaque_fields)]
pub struct Handle(*mut ());

// SAFETY: only made from boxes of values that are Send, and used by one owner at a time.
unsafe impl Send for Handle {}

impl Handle {
    pub fn new<T: Send>(value: T) -> Handle {
        Handle(Box::into_raw(Box::new(value)).cast())
    }

    /// # Safety
    /// The handle was made by [`Handle::new`] of the same `T` in this library, was not taken, and nothing
    /// else refers to its value for `'a`.
    pub unsafe fn get<'a, T: Send>(self) -> &'a mut T {
        // SAFETY: as the caller promises.
        unsafe { &mut *self.0.cast() }
    }

    /// # Safety
    /// As for [`Handle::get`]; the handle is not used any more.
    pub unsafe fn take<T: Send>(self) -> Box<T> {
        // SAFETY: as the caller promises.
        unsafe { Box::from_raw(self.0.cast()) }
    }
}

/// Pointers to types of the contract that guarantee their own layout, see [`crate::rows`]. To abi_stable
/// they are a name and an address; the other side sees them at a lifetime that ends with the call.
macro_rules! pointers {
    ($($name:ident($borrowed:ty, $erased:ty);)*) => {$(
        #[repr(transparent)]
        #[derive(StableAbi, Clone, Copy)]
        #[sabi(unsafe_opaque_fields)]
        pub struct $name(*const $erased);

        impl $name {
            pub fn new(target: &$borrowed) -> $name {
                $name(std::ptr::from_ref(target).cast())
            }

            /// # Safety
            /// It points to a live value that nobody changes for `'a`, and no borrow in it is kept for longer.
            pub unsafe fn get<'a>(self) -> &'a $erased {
                // SAFETY: as the caller promises.
                unsafe { &*self.0 }
            }
        }
    )*};
}

/// As `pointers`, to what the callee writes.
macro_rules! pointers_mut {
    ($($name:ident($borrowed:ty, $erased:ty);)*) => {$(
        #[repr(transparent)]
        #[derive(StableAbi, Clone, Copy)]
        #[sabi(unsafe_opaque_fields)]
        pub struct $name(*mut $erased);

        impl $name {
            pub fn new(target: &mut $borrowed) -> $name {
                $name(std::ptr::from_mut(target).cast())
            }

            /// # Safety
            /// It points to a live value that nothing else refers to for `'a`, and no borrow in it is kept for longer.
            pub unsafe fn get<'a>(self) -> &'a mut $erased {
                // SAFETY: as the caller promises.
                unsafe { &mut *self.0 }
            }
        }
    )*};
}

pointers! {
    StepViewPtr(StepView<'_>, StepView<'static>);
    EventsPtr(Rows<'_, SessionEvent>, Rows<'static, SessionEvent>);
    ReadyPtr(Column<'_, u32>, Column<'static, u32>);
    OutcomePtr(StepOutcome, StepOutcome);
    WeightsPtr(Rows<'_, RawWeight<'_>>, Rows<'static, RawWeight<'static>>);
    StepPtr(Step<'_>, Step<'static>);
    MasksPtr(Masks<'_>, Masks<'static>);
    HostPtr(HostServices, HostServices);
}

pointers_mut! {
    DecisionsPtr(Decisions<'_>, Decisions<'static>);
    ChunksPtr(Chunks<'_>, Chunks<'static>);
    OutputsPtr(StepOutputs<'_>, StepOutputs<'static>);
}
