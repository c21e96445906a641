//! Hosts as they were: today's plugins must not look past the end of a table that an older host handed over, and must
//! answer an older host's messages through the slots it knows.
//!
//! Offsets and messages are written out here as they were released, not taken from the plugin API, which moves on. A
//! struct of the host stands at the end of a page before one that cannot be read, so that a look past it is a crash.

use std::{
    ffi::c_void,
    path::Path,
    sync::{Mutex, PoisonError},
};

use abi_stable::{
    library::lib_header_from_path,
    std_types::{RSlice, RStr},
};
use serde_json::{Value, json};
use torus_abi::{root::PluginRootRef, table::Reply};

use super::copy;

/// What a host knew: the tables of plugins with their sizes, and its own table, word by word.
struct Host {
    tables: &'static [(&'static str, usize)],
    table: fn() -> Vec<usize>,
    /// Threads that a plugin has with this host.
    threads: usize,
}

/// The hosts of the released layouts, oldest first.
const HOSTS: [Host; 3] = [
    Host {
        tables: &[("runtime", 16), ("model", 48), ("attention", 24)],
        table: || vec![16, log as *const () as usize],
        threads: 1,
    },
    Host {
        tables: &[("runtime", 16), ("model", 48), ("attention", 24), ("speculative", 48)],
        table: || vec![16, log as *const () as usize],
        threads: 1,
    },
    Host {
        tables: &[("runtime", 16), ("model", 48), ("attention", 24), ("speculative", 48), ("kernels", 32)],
        table: || {
            vec![32, log as *const () as usize, parallel_for as *const () as usize, threads as *const () as usize]
        },
        threads: 3,
    },
];

static LOGGED: Mutex<Vec<String>> = Mutex::new(Vec::new());

extern "C" fn log(level: u32, target: RStr<'_>, message: RStr<'_>) {
    LOGGED.lock().unwrap_or_else(PoisonError::into_inner).push(format!("{level} {target} {message}"));
}

unsafe extern "C" fn parallel_for(
    count: usize,
    body: unsafe extern "C" fn(*const c_void, usize),
    context: *const c_void,
) {
    for index in 0..count {
        // SAFETY: the plugin's promise.
        unsafe { body(context, index) }
    }
}

extern "C" fn threads() -> usize {
    3
}

/// Copies words to the end of a page, behind which nothing can be read or written. It stays mapped: a plugin keeps the
/// host's table for good.
fn guarded(words: &[usize]) -> *mut usize {
    const PAGE: usize = 4096;
    // SAFETY: a fresh mapping of two pages, of which the second is closed; the words fit into the first and end with it.
    unsafe {
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let pages = libc::mmap(std::ptr::null_mut(), 2 * PAGE, access, kind, -1, 0);
        assert_ne!(pages, libc::MAP_FAILED);
        assert_eq!(libc::mprotect(pages.byte_add(PAGE), PAGE, libc::PROT_NONE), 0);
        let place = pages.byte_add(PAGE - size_of_val(words)).cast::<usize>();
        place.copy_from_nonoverlapping(words.as_ptr(), words.len());
        place
    }
}

/// A plugin in the hands of an old host.
struct Guest {
    root: PluginRootRef,
    host: &'static Host,
}

/// A table of the plugin.
#[derive(Clone, Copy)]
struct Table {
    address: *const u8,
    bytes: usize,
}

impl Table {
    /// # Safety
    /// The slot at `offset` was released with type `F`, a function pointer.
    unsafe fn slot<F: Copy>(self, offset: usize) -> F {
        assert!(offset + size_of::<F>() <= self.bytes, "this host knows no slot at {offset}");
        // SAFETY: the table is at least that long (checked by `Guest::table`).
        unsafe { self.address.add(offset).cast::<Option<F>>().read() }.unwrap()
    }
}

impl Guest {
    fn new(library: &Path, host: &'static Host) -> Self {
        let (_folder, copied) = copy(library);
        // A mapped file may be removed.
        let root = lib_header_from_path(&copied).unwrap().init_root_module::<PluginRootRef>().unwrap();
        let guest = Self { root, host };
        let runtime = guest.table("runtime").unwrap();
        // SAFETY: released with this type; the host's table is never unmapped.
        unsafe {
            let attach: unsafe extern "C" fn(*const usize) = runtime.slot(8);
            attach(guarded(&(host.table)()));
        }
        guest
    }

    fn manifest(&self) -> Value {
        serde_json::from_slice(&(self.root.describe())()).unwrap()
    }

    /// A table that the host knew and the plugin has. It is at least as long as it was then.
    fn table(&self, kind: &str) -> Option<Table> {
        let (_, bytes) = *self.host.tables.iter().find(|(name, _)| *name == kind)?;
        let address = (self.root.interface())(kind.into()).cast::<u8>();
        if address.is_null() {
            return None;
        }
        // SAFETY: every table begins with its size.
        let size = unsafe { address.cast::<usize>().read() };
        assert!(size >= bytes, "table '{kind}' has shrunk from {bytes} to {size} bytes");
        Some(Table { address, bytes })
    }
}

/// A reply as an old host reads it: a status and a body.
fn answered(reply: Reply) -> Result<Value, (u32, String)> {
    let body = reply.body.as_slice();
    match reply.status {
        0 if body.is_empty() => Ok(Value::Null),
        0 => Ok(serde_json::from_slice(body).unwrap()),
        status => Err((status, String::from_utf8(body.to_vec()).unwrap())),
    }
}

/// # Safety
/// The slot takes a message and answers one.
unsafe fn ask(table: Table, offset: usize, request: Value) -> Result<Value, (u32, String)> {
    // SAFETY: passed on to the caller.
    let slot: extern "C" fn(RSlice<'_, u8>) -> Reply = unsafe { table.slot(offset) };
    answered(slot(request.to_string().as_bytes().into()))
}

/// A handle of a `model` or `speculative` table, both of which open at their own offset and close in their last slot.
struct Opened {
    table: Table,
    handle: *mut c_void,
    close: usize,
}

impl Opened {
    /// # Safety
    /// These are the offsets of the table's `open` and `close`.
    unsafe fn new(table: Table, open: usize, close: usize, request: Value) -> Result<Self, (u32, String)> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: released with this type; `handle` is a valid place.
        let reply = unsafe {
            let open: unsafe extern "C" fn(RSlice<'_, u8>, *mut *mut c_void) -> Reply = table.slot(open);
            open(request.to_string().as_bytes().into(), &mut handle)
        };
        answered(reply)?;
        assert!(!handle.is_null());
        Ok(Self { table, handle, close })
    }

    /// # Safety
    /// The offset is that of the table's `describe`.
    unsafe fn describe(&self, offset: usize) -> Value {
        // SAFETY: released with this type; the handle is open.
        let reply = unsafe {
            let describe: unsafe extern "C" fn(*const c_void) -> Reply = self.table.slot(offset);
            describe(self.handle)
        };
        answered(reply).unwrap()
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        // SAFETY: released with this type; the handle is open and not used again.
        unsafe {
            let close: unsafe extern "C" fn(*mut c_void) = self.table.slot(self.close);
            close(self.handle);
        }
    }
}

fn open_model(table: Table, config: Value) -> Result<Opened, (u32, String)> {
    // SAFETY: offsets of a model's table.
    unsafe { Opened::new(table, 16, 40, json!({ "config": config, "parallel": { "tensor": 1 } })) }
}

fn emit(model: &Opened, part: Value) -> Result<Value, (u32, String)> {
    let request = json!({
        "part": part, "dtype": "f32", "weights": { "embed": { "parts": ["f32[8,4]"], "storage": "plain" } },
        "state": [{ "pool": ["f32[20,1,4]"], "context": ["i32[3]"] }],
    });
    // SAFETY: released with this type; the handle is open.
    let reply = unsafe {
        let emit: unsafe extern "C" fn(*const c_void, RSlice<'_, u8>) -> Reply = model.table.slot(32);
        emit(model.handle, request.to_string().as_bytes().into())
    };
    answered(reply)
}

fn attention_query(kv_heads: u64, window: Option<u64>) -> Value {
    json!({
        "spec": { "q_heads": 1, "kv_heads": kv_heads, "head_dim": 4, "scale": 1.0, "window": window },
        "dtype": "f32", "kv_dtype": "f32", "target": { "platform": "cpu", "device_kind": "cpu" },
        "shape": { "tokens": 3, "seqs": 2, "page_size": 4, "pages": 5, "page_table": 6 },
    })
}

#[test]
fn todays_toy_works_with_hosts_of_released_layouts() {
    for host in &HOSTS {
        let guest = Guest::new(&crate::plugins::library("abi_today"), host);
        assert_eq!((&guest.manifest()["name"], &guest.manifest()["abi"]), (&json!("abi_today"), &json!([0, 1])));

        let table = guest.table("model").unwrap();
        // SAFETY: a model's table.
        let read =
            unsafe { ask(table, 8, json!({ "metadata": { "toy.embedding_length": 4 }, "tensors": {} })) }.unwrap();
        let model = open_model(table, read["config"].clone()).unwrap();
        // SAFETY: a model's table.
        assert_eq!(unsafe { model.describe(24) }["hidden"], 4);
        let shape = json!({ "tokens": 3, "seqs": 2, "page_size": 4, "pages": 5, "page_table": 6 });
        let hidden = emit(&model, json!({ "hidden": { "shape": shape } })).unwrap();
        assert_eq!(hidden["fragment"]["exports"]["hidden"]["symbol"], "abi_today.hidden");
        assert!(emit(&model, json!({ "head": { "rows": 2 } })).is_ok());
        assert_eq!(open_model(table, json!({})).err().unwrap(), (1, "hidden_size is missing".to_owned()));
        let panicked = open_model(table, json!({ "panic": true })).err().unwrap();
        assert_eq!(panicked, (3, "the plugin panicked: the config says so".to_owned()));

        attend(&guest, 0, "nothing to see");
        if let Some(table) = guest.table("speculative") {
            propose(table);
        }
        if let Some(table) = guest.table("kernels") {
            list_kernels(table);
        }
        let said = format!("opening a toy, having counted to 100 on {} threads", host.threads);
        let logged = LOGGED.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(logged.iter().any(|line| line.starts_with("3 ") && line.ends_with(&said)), "{logged:?}");
    }
}

/// Queries and emits; a window of `panicking` tokens panics with `message`.
fn attend(guest: &Guest, panicking: u64, message: &str) {
    let table = guest.table("attention").unwrap();
    // SAFETY: an attention backend's table.
    let ask = |offset, request| unsafe { ask(table, offset, request) };
    assert!(ask(8, attention_query(1, None)).unwrap()["score"].as_u64().unwrap() > 0);
    let fragment = ask(16, json!({ "kind": 0, "query": attention_query(1, None) })).unwrap();
    assert!(fragment["fragment"]["exports"]["attention"].is_object());
    let (status, body) = ask(8, attention_query(1, Some(panicking))).unwrap_err();
    assert!(status == 3 && body.contains(message), "{status} {body}");
    assert_eq!(ask(8, json!({})).unwrap_err().0, 2);
}

fn propose(table: Table) {
    let options = json!({ "vocab": 100, "context_length": 64, "max_sequences": 4, "max_draft_tokens": 4 });
    // SAFETY: offsets of a speculative table.
    let speculator = unsafe { Opened::new(table, 8, 40, options) }.unwrap();
    // SAFETY: as above.
    assert_eq!(unsafe { speculator.describe(16) }["draft_tokens"], 2);
    let propose = |tokens: &[u32]| {
        let (ids, lengths, limits, sequences) = ([7u64], [tokens.len()], [2u32], [tokens.as_ptr()]);
        let (mut drafts, mut counts) = ([0u32; 2], [0u32]);
        let address = |pointer: *const c_void| pointer as usize;
        let input = guarded(&[
            48,
            1,
            address(ids.as_ptr().cast()),
            address(sequences.as_ptr().cast()),
            address(lengths.as_ptr().cast()),
            address(limits.as_ptr().cast()),
        ]);
        let output = guarded(&[32, 2, address(drafts.as_mut_ptr().cast()), address(counts.as_mut_ptr().cast())]);
        // SAFETY: released with this type; all arrays have one row and outlive the call.
        let status = unsafe {
            let propose: unsafe extern "C" fn(*mut c_void, *const usize, *mut usize) -> u32 = table.slot(24);
            propose(speculator.handle, input, output)
        };
        (status, drafts[..counts[0] as usize].to_vec())
    };
    assert_eq!(propose(&[5, 6]), (0, vec![7, 8]));
    assert_eq!(propose(&[12]).0, 2);
    assert_eq!(propose(&[13]).0, 3);
    assert_eq!(propose(&[1]), (0, vec![2, 3]));
    // SAFETY: released with this type; the handle is open.
    unsafe {
        let forget: unsafe extern "C" fn(*mut c_void, u64) = table.slot(32);
        forget(speculator.handle, 7);
    }
}

fn list_kernels(table: Table) {
    type Handler = unsafe extern "C" fn(*mut c_void) -> *mut c_void;
    // SAFETY: released with these types.
    let (count, name, handler) = unsafe {
        let count: extern "C" fn() -> usize = table.slot(8);
        let name: extern "C" fn(usize) -> RStr<'static> = table.slot(16);
        let handler: extern "C" fn(usize) -> Option<Handler> = table.slot(24);
        (count, name, handler)
    };
    assert_eq!((count(), name(0).as_str(), name(1).as_str()), (1, "doubling", ""));
    assert!(handler(0).is_some() && handler(1).is_none());
}

#[test]
fn stock_plugins_work_with_hosts_of_released_layouts() {
    for host in &HOSTS {
        let llama = Guest::new(&crate::plugins::library("torus_model_llama"), host);
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 12, "intermediate_size": 20, "vocab_size": 31,
            "num_hidden_layers": 2, "num_attention_heads": 3,
        });
        let table = llama.table("model").unwrap();
        let model = open_model(table, config).unwrap();
        // SAFETY: a model's table.
        assert_eq!(unsafe { model.describe(24) }["hidden"], 12);
        assert_eq!(open_model(table, json!({})).err().unwrap().0, 2);
        assert!(llama.table("attention").is_none());

        let native = Guest::new(&crate::plugins::library("torus_attention_native"), host);
        assert_eq!(native.manifest()["name"], "native");
        let table = native.table("attention").unwrap();
        // SAFETY: an attention backend's table.
        let ask = |offset, request| unsafe { ask(table, offset, request) };
        assert_eq!(ask(8, attention_query(1, None)).unwrap()["score"], 1);
        assert_eq!(ask(8, attention_query(0, None)).unwrap()["score"], 0);
        let fragment = ask(16, json!({ "kind": 0, "query": attention_query(1, None) })).unwrap();
        assert!(fragment["fragment"]["exports"]["attention"].is_object());
        assert_eq!(ask(16, json!({})).unwrap_err().0, 2);
    }
}
