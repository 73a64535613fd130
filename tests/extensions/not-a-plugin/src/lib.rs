//! A shared library that has nothing to do with Setu.

#[unsafe(no_mangle)]
pub extern "C" fn answer() -> u32 {
    42
}
