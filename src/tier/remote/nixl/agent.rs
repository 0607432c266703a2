//! NIXL's C interface (`libnixl_capi.so`), loaded when it is first needed and kept: its plugins have
//! threads and state that do not end with it. All of the module's `unsafe` is here.
//!
//! The declarations are our own, of the calls that are used, and pass nothing but integers and
//! pointers, so that a newer library serves, too. An [`Agent`] is used by one thread at a time, and a
//! transfer returns when nothing of it is under way any more, however long that takes: memory that it
//! borrows is not written to afterwards. Time limits are kept above.

use alloc::ffi::CString;
use alloc::string::String;
use alloc::vec::Vec;
use core::ffi::{CStr, c_char, c_int, c_void};
use core::ptr::{null, null_mut};
use core::time::Duration;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use libloading::Library;

use crate::error::{Error, Result};

/// What names the library, where the system does not find it by itself.
pub const LIBRARY_VARIABLE: &str = "KVCACHE_NIXL";

type Status = c_int;
/// A pointer to something of the library's.
type Handle = *mut c_void;

const SUCCESS: Status = 0;
const IN_PROGRESS: Status = 1;
const MEMORY: c_int = 0;

/// The kind of memory that an agent moves bytes to and from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Object = 3,
    File = 4,
}

/// Which way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Read = 0,
    Write = 1,
}

macro_rules! calls {
    ($($name:ident($($argument:ty),*);)*) => {
        /// The calls, each by the name that follows `nixl_capi_`.
        struct Calls {
            $($name: unsafe extern "C" fn($($argument),*) -> Status,)*
        }

        impl Calls {
            /// None where one of them is missing.
            fn find(library: &Library) -> Option<Self> {
                // SAFETY: the types are those of the library's header.
                unsafe {
                    Some(Self {
                        $($name: *library
                            .get(concat!("nixl_capi_", stringify!($name), "\0").as_bytes())
                            .ok()?,)*
                    })
                }
            }
        }
    };
}

calls! {
    create_agent(*const c_char, *mut Handle);
    destroy_agent(Handle);
    create_params(*mut Handle);
    params_add(Handle, *const c_char, *const c_char);
    destroy_params(Handle);
    create_backend(Handle, *const c_char, Handle, *mut Handle);
    destroy_backend(Handle);
    create_opt_args(*mut Handle);
    opt_args_add_backend(Handle, Handle);
    destroy_opt_args(Handle);
    create_reg_dlist(c_int, *mut Handle);
    reg_dlist_add_desc(Handle, usize, usize, u64, *const c_void, usize);
    destroy_reg_dlist(Handle);
    register_mem(Handle, Handle, Handle);
    deregister_mem(Handle, Handle, Handle);
    create_xfer_dlist(c_int, *mut Handle);
    xfer_dlist_add_desc(Handle, usize, usize, u64);
    destroy_xfer_dlist(Handle);
    create_xfer_req(Handle, c_int, Handle, Handle, *const c_char, *mut Handle, Handle);
    post_xfer_req(Handle, Handle, Handle);
    get_xfer_status(Handle, Handle);
    release_xfer_req(Handle, Handle);
    destroy_xfer_req(Handle);
    create_query_resp_list(*mut Handle);
    query_mem(Handle, Handle, Handle, Handle);
    query_resp_list_size(Handle, *mut usize);
    query_resp_list_has_value(Handle, usize, *mut bool);
    destroy_query_resp_list(Handle);
}

/// The library's calls. What is loaded stays, for the life of the process.
///
/// # Errors
/// `TierFailed` where there is no such library, or one without the calls that are used.
fn calls() -> Result<&'static Calls> {
    static LOADED: Mutex<Option<&'static Calls>> = Mutex::new(None);
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(calls) = *loaded {
        return Ok(calls);
    }
    let failed = |what| Error::TierFailed { what, os_code: 0 };
    let path = std::env::var_os(LIBRARY_VARIABLE).filter(|path| !path.is_empty());
    let path = path.map_or_else(|| PathBuf::from("libnixl_capi.so"), PathBuf::from);
    // SAFETY: its initialisers run, as those of any library that a program is linked with.
    let library = unsafe { Library::new(path) }
        .map_err(|_| failed("loading NIXL's libnixl_capi.so, which KVCACHE_NIXL names,"))?;
    // The crate's stub answers all calls, with failures.
    // SAFETY: the type is that of the library's header.
    let is_stub = unsafe {
        library
            .get::<unsafe extern "C" fn() -> bool>(b"nixl_capi_is_stub\0")
            .is_ok_and(|is_stub| is_stub())
    };
    let found = Calls::find(&library).filter(|_| !is_stub);
    let found = found.ok_or(failed("finding NIXL's calls in libnixl_capi.so"))?;
    core::mem::forget(library);
    let calls = alloc::boxed::Box::leak(alloc::boxed::Box::new(found));
    *loaded = Some(calls);
    Ok(calls)
}

/// What ends with its scope.
struct Owned {
    handle: Handle,
    end: unsafe extern "C" fn(Handle) -> Status,
}

impl Owned {
    /// None where it is not made.
    fn new(
        make: impl FnOnce(*mut Handle) -> Status,
        end: unsafe extern "C" fn(Handle) -> Status,
    ) -> Option<Self> {
        let mut handle = null_mut();
        (make(&mut handle) == SUCCESS && !handle.is_null()).then_some(Self { handle, end })
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: made by the call that this one undoes, and undone once.
        let _ = unsafe { (self.end)(self.handle) };
    }
}

/// Bytes to move, and what they are moved to or from.
#[derive(Debug)]
pub struct Transfer<'a> {
    /// A descriptor, of a file; a number that no other transfer of the call has, of an object.
    pub device: u64,
    /// The object's name; nothing for a file.
    pub name: &'a str,
    /// The bytes.
    pub bytes: &'a mut [u8],
}

/// An agent with one plugin.
pub struct Agent {
    calls: &'static Calls,
    name: CString,
    // In the order in which they end.
    options: Owned,
    _backend: Owned,
    agent: Owned,
}

// SAFETY: the library ties nothing to the thread that made it.
unsafe impl Send for Agent {}

impl Agent {
    /// One that moves bytes with `plugin`, made with these parameters.
    ///
    /// # Errors
    /// `TierFailed` where there is no library, no such plugin in it, or it does not take them.
    pub fn new(name: &str, plugin: &'static CStr, parameters: &[(&str, String)]) -> Result<Self> {
        let calls = calls()?;
        let failed = Error::TierFailed { what: "making an agent of NIXL's", os_code: 0 };
        let name = CString::new(name).map_err(|_| failed)?;
        // SAFETY: handles are live, texts end with a zero, and outputs are writable; so below.
        unsafe {
            let agent = Owned::new(
                |handle| (calls.create_agent)(name.as_ptr(), handle),
                calls.destroy_agent,
            )
            .ok_or(failed)?;
            let params = Owned::new(|handle| (calls.create_params)(handle), calls.destroy_params)
                .ok_or(failed)?;
            for (key, value) in parameters {
                let invalid = |_| Error::invalid("address", "must not contain a zero byte");
                let key = CString::new(*key).map_err(invalid)?;
                let value = CString::new(value.as_str()).map_err(invalid)?;
                (calls.params_add)(params.handle, key.as_ptr(), value.as_ptr());
            }
            let backend = Owned::new(
                |handle| {
                    (calls.create_backend)(agent.handle, plugin.as_ptr(), params.handle, handle)
                },
                calls.destroy_backend,
            )
            .ok_or(Error::TierFailed { what: "making NIXL's plugin for the store", os_code: 0 })?;
            let options =
                Owned::new(|handle| (calls.create_opt_args)(handle), calls.destroy_opt_args)
                    .ok_or(failed)?;
            if (calls.opt_args_add_backend)(options.handle, backend.handle) != SUCCESS {
                return Err(failed);
            }
            Ok(Self { calls, name, options, _backend: backend, agent })
        }
    }

    /// Which of the files (by path) or objects (by name) there are; None where that cannot be found
    /// out.
    pub fn exist(&mut self, kind: Kind, names: &[String]) -> Option<Vec<bool>> {
        let calls = self.calls;
        let mut found = alloc::vec![false; names.len()];
        // SAFETY: as in `new`; names are readable for their lengths, and copied.
        unsafe {
            let list = Owned::new(
                |handle| (calls.create_reg_dlist)(kind as c_int, handle),
                calls.destroy_reg_dlist,
            )?;
            for (n, name) in names.iter().enumerate() {
                let (text, bytes) = (name.as_ptr().cast(), name.len());
                let add = calls.reg_dlist_add_desc;
                (add(list.handle, 0, 0, n as u64, text, bytes) == SUCCESS).then_some(())?;
            }
            let answer = Owned::new(
                |handle| (calls.create_query_resp_list)(handle),
                calls.destroy_query_resp_list,
            )?;
            let (agent, options) = (self.agent.handle, self.options.handle);
            let mut answers = 0;
            let asked = (calls.query_mem)(agent, list.handle, answer.handle, options) == SUCCESS
                && (calls.query_resp_list_size)(answer.handle, &mut answers) == SUCCESS
                && answers == names.len();
            asked.then_some(())?;
            for (n, found) in found.iter_mut().enumerate() {
                let said = (calls.query_resp_list_has_value)(answer.handle, n, found);
                (said == SUCCESS).then_some(())?;
            }
        }
        Some(found)
    }

    /// Moves bytes, all transfers at once, and waits until none is under way; which were done.
    pub fn transfer(&mut self, way: Way, kind: Kind, transfers: &mut [Transfer]) -> Vec<bool> {
        let mut open: Vec<Option<Request>> =
            transfers.iter_mut().map(|transfer| Request::post(self, way, kind, transfer)).collect();
        let mut done: Vec<bool> = open.iter().map(|_| false).collect();
        let mut turns = 0u32;
        while open.iter().any(Option::is_some) {
            for (request, done) in open.iter_mut().zip(&mut done) {
                match request.as_ref().map(Request::status) {
                    None | Some(IN_PROGRESS) => {}
                    Some(status) => {
                        *done = status == SUCCESS;
                        *request = None;
                    }
                }
            }
            // What a page cache has is there at once; what is not takes a while.
            turns += 1;
            if turns > 16 {
                std::thread::sleep(Duration::from_micros(20 * u64::from(turns.min(50))));
            }
        }
        done
    }
}

/// Memory or a file that an agent was told of; it is told when that ends.
struct Registered<'a> {
    agent: &'a Agent,
    list: Owned,
}

impl<'a> Registered<'a> {
    /// None where the agent does not take it.
    fn new(agent: &'a Agent, kind: c_int, end: &End, bytes: usize, name: &str) -> Option<Self> {
        let calls = agent.calls;
        let (text, length) = match name.len() {
            0 => (null(), 0),
            length => (name.as_ptr().cast(), length),
        };
        // SAFETY: as in `Agent::new`; the name is readable for its length, and copied.
        unsafe {
            let list = Owned::new(
                |handle| (calls.create_reg_dlist)(kind, handle),
                calls.destroy_reg_dlist,
            )?;
            let add = calls.reg_dlist_add_desc;
            let told = add(list.handle, end.address, bytes, end.device, text, length) == SUCCESS
                && (calls.register_mem)(agent.agent.handle, list.handle, agent.options.handle)
                    == SUCCESS;
            told.then_some(Self { agent, list })
        }
    }
}

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        let (agent, calls) = (self.agent, self.agent.calls);
        let (handle, options) = (agent.agent.handle, agent.options.handle);
        // SAFETY: as in `Agent::new`; registered by `new`, and not again.
        let _ = unsafe { (calls.deregister_mem)(handle, self.list.handle, options) };
    }
}

/// One end of a transfer.
struct End {
    address: usize,
    device: u64,
}

/// A transfer under way. It is over before it ends: see [`Agent::transfer`].
struct Request<'a> {
    agent: &'a Agent,
    handle: Handle,
    _registered: [Registered<'a>; 2],
}

impl<'a> Request<'a> {
    /// None where it could not be begun.
    fn post(agent: &'a Agent, way: Way, kind: Kind, what: &mut Transfer) -> Option<Self> {
        let (calls, bytes) = (agent.calls, what.bytes.len());
        // The library takes the address as a number.
        let memory = End { address: what.bytes.as_mut_ptr().expose_provenance(), device: 0 };
        let other = End { address: 0, device: what.device };
        let registered = [
            Registered::new(agent, MEMORY, &memory, bytes, "")?,
            Registered::new(agent, kind as c_int, &other, bytes, what.name)?,
        ];
        let list = |kind, end: &End| {
            // SAFETY: as in `Agent::new`.
            unsafe {
                let list = Owned::new(
                    |handle| (calls.create_xfer_dlist)(kind, handle),
                    calls.destroy_xfer_dlist,
                )?;
                let add = calls.xfer_dlist_add_desc;
                (add(list.handle, end.address, bytes, end.device) == SUCCESS).then_some(list)
            }
        };
        let (from, to) = (list(MEMORY, &memory)?, list(kind as c_int, &other)?);
        let (own, options) = (agent.agent.handle, agent.options.handle);
        let mut handle = null_mut();
        // SAFETY: as in `Agent::new`. The bytes are borrowed until `transfer` returns, which waits
        // for every request.
        unsafe {
            let (way, name) = (way as c_int, agent.name.as_ptr());
            let (from, to) = (from.handle, to.handle);
            let made =
                (calls.create_xfer_req)(own, way, from, to, name, &mut handle, options) == SUCCESS;
            if !made || handle.is_null() {
                return None;
            }
            let request = Self { agent, handle, _registered: registered };
            let posted = (calls.post_xfer_req)(own, handle, null_mut());
            matches!(posted, SUCCESS | IN_PROGRESS).then_some(request)
        }
    }

    fn status(&self) -> Status {
        // SAFETY: as in `Agent::new`.
        unsafe { (self.agent.calls.get_xfer_status)(self.agent.agent.handle, self.handle) }
    }
}

impl Drop for Request<'_> {
    fn drop(&mut self) {
        let calls = self.agent.calls;
        // SAFETY: as in `Agent::new`; nobody has the handle any more.
        unsafe {
            let _ = (calls.release_xfer_req)(self.agent.agent.handle, self.handle);
            let _ = (calls.destroy_xfer_req)(self.handle);
        }
    }
}
