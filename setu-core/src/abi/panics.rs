//! Panics of a plugin, caught on its own side.
//!
//! A library has its own copy of the standard library and so its own panic hook: [`install_hook`] puts
//! one there that keeps place and message for [`catch`] instead of printing them. What panics outside of
//! any call, on a thread of the plugin's own, is logged.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind};

use crate::error::{Error, ErrorKind, Result};

thread_local! {
    static CATCHING: Cell<bool> = const { Cell::new(false) };
    static CAUGHT: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Runs `call`, the component's `entry`; a panic becomes an error of kind `Panicked`.
pub fn catch<T>(entry: &str, call: impl FnOnce() -> Result<T>) -> Result<T> {
    let outer = CATCHING.replace(true);
    let result = catch_unwind(AssertUnwindSafe(call));
    CATCHING.set(outer);
    result.unwrap_or_else(|payload| {
        let seen = CAUGHT.take().unwrap_or_else(|| text_of(&*payload).to_owned());
        let error = Error::new(ErrorKind::Panicked, format!("panicked in {entry}: {seen}"));
        // A payload's drop may panic in turn.
        std::mem::forget(payload);
        Err(error)
    })
}

/// Takes over what this library's panics print.
pub fn install_hook() {
    std::panic::set_hook(Box::new(|info| {
        let seen = describe(info);
        if CATCHING.get() {
            // A panic while unwinding ends the process; until then the first one is what is told.
            CAUGHT.with_borrow_mut(|caught| _ = caught.get_or_insert(seen));
        } else {
            let thread = std::thread::current();
            tracing::error!(thread = thread.name().unwrap_or("unnamed"), "a thread panicked: {seen}");
        }
    }));
}

fn describe(info: &PanicHookInfo<'_>) -> String {
    let text = text_of(info.payload());
    match info.location() {
        Some(place) => format!("{text} ({}:{})", place.file(), place.line()),
        None => text.to_owned(),
    }
}

fn text_of(payload: &dyn Any) -> &str {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("(no message)")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Panics when dropped, as a hostile payload may.
    struct Bomb;

    impl Drop for Bomb {
        fn drop(&mut self) {
            panic!("dropped");
        }
    }

    #[test]
    fn panics_become_errors_that_name_the_entry() {
        type Call = fn() -> Result<u32>;
        let cases: [(Call, &str); 4] = [
            (|| panic!("a {}", "text"), "panicked in schedule: a text"),
            (|| panic!("literal"), "panicked in schedule: literal"),
            (|| std::panic::panic_any(5), "panicked in schedule: (no message)"),
            (|| std::panic::panic_any(Bomb), "panicked in schedule: (no message)"),
        ];
        for (call, expected) in cases {
            let error = catch("schedule", call).unwrap_err();
            assert_eq!((error.kind(), error.message()), (ErrorKind::Panicked, expected));
        }
    }

    #[test]
    fn results_pass_through_and_calls_nest() {
        assert_eq!(catch("a", || catch("b", || Ok(5))), Ok(5));
        let inner = catch("a", || catch("b", || -> Result<u32> { panic!("inner") }));
        assert_eq!(inner.unwrap_err().message(), "panicked in b: inner");
        assert_eq!(catch("a", || -> Result<u32> { Err(Error::config("no")) }).unwrap_err(), Error::config("no"));
    }
}
