//! The plugin's side: what `export_plugin!` expands to, and the entries that are the same for all kinds.

use abi_stable::library::{CheckTypeLayout, LibHeader};
use abi_stable::prefix_type::{PrefixRefTrait, PrefixTypeTrait};
use abi_stable::std_types::{ROk, RSlice};

pub use abi_stable::library::{LibHeader as Header, RootModuleResult as Opened};

use super::module::{Exports, Module, ModuleRef};
use super::panics::{catch, install_hook};
use super::wire::{Handle, HostPtr, Json, WireResult, sent, text};
use super::{backend, batcher, log, model, scheduler};
use crate::error::{Error, Result};
use crate::registry::Linked;

/// The header that a host finds at the symbol of the plugin.
///
/// # Safety
/// `opened` returns what [`open`] returns.
pub const unsafe fn header(opened: extern "C" fn() -> Opened) -> Header {
    // SAFETY: as the caller promises, the result is that of a ModuleRef.
    unsafe { LibHeader::from_constructor::<ModuleRef>(opened, CheckTypeLayout::Yes) }
}

/// The module of `components`. Refers to `metadata`, which the linker would drop as unused otherwise.
pub fn open(components: &'static [Linked], metadata: &'static [u8]) -> Opened {
    std::hint::black_box(metadata.as_ptr());
    let module = Module {
        exports: Exports::new(components),
        start,
        count,
        config,
        build_scheduler: scheduler::build,
        build_batcher: batcher::build,
        build_model: model::build,
        build_backend: backend::build,
    };
    // SAFETY: a prefix may be erased; who calls says of which type it was.
    ROk(unsafe { module.leak_into_prefix().to_prefix_ref().cast() })
}

unsafe extern "C" fn start(host: HostPtr) -> WireResult<()> {
    install_hook();
    // SAFETY: a host's services live as long as the process.
    sent(catch("start", || log::connect(unsafe { host.get() })), |()| ())
}

unsafe extern "C" fn count(exports: Exports) -> WireResult<u32> {
    // SAFETY: the host passes the module's own exports.
    ROk(unsafe { exports.get() }.len() as u32)
}

unsafe extern "C" fn config(exports: Exports, index: u32) -> WireResult<Json> {
    let json = catch("config", || (component(exports, index)?.config)().to_json());
    sent(json, |json| json.into_bytes().into())
}

/// The component at `index` of the module's own exports.
fn component(exports: Exports, index: u32) -> Result<&'static Linked> {
    // SAFETY: the host passes the module's own exports.
    let components = unsafe { exports.get() };
    components.get(index as usize).ok_or_else(|| Error::contract(format!("there is no component {index}")))
}

/// Builds the component at `index` with the constructor that `pick` takes from it.
pub(super) fn build<C: ?Sized + Send>(
    exports: Exports,
    index: u32,
    config: RSlice<'_, u8>,
    pick: impl FnOnce(&'static Linked) -> Option<fn(&str) -> Result<Box<C>>>,
) -> Result<Handle> {
    catch("build", || {
        let linked = component(exports, index)?;
        let build = pick(linked).ok_or_else(|| Error::contract(format!("`{}` is a {}", linked.key, linked.kind())))?;
        Ok(Handle::new(build(text(config)?)?))
    })
}

/// Calls `entry` of the value behind `handle`.
///
/// # Safety
/// As for [`Handle::get`].
pub(super) unsafe fn call<T: Send, R, U>(
    handle: Handle,
    entry: &str,
    call: impl FnOnce(&mut T) -> Result<R>,
    wrap: impl FnOnce(R) -> U,
) -> WireResult<U> {
    // SAFETY: as the caller promises.
    sent(catch(entry, || call(unsafe { handle.get() })), wrap)
}

/// Drops the value behind `handle`, the `drop` of every table.
///
/// # Safety
/// As for [`Handle::take`].
pub(super) unsafe extern "C" fn drop_handle<T: Send>(handle: Handle) -> WireResult<()> {
    let dropped = catch("drop", || {
        // SAFETY: as the caller promises.
        drop(unsafe { handle.take::<T>() });
        Ok(())
    });
    sent(dropped, |()| ())
}
