//! What the benches share: threads that spin between calls, memory to stream, and limits to compare with.

use std::{
    ffi::c_void,
    hint::spin_loop,
    sync::atomic::{AtomicPtr, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use torus_abi::{
    kernel::parallel_for,
    table::{HostTable, ParallelBody, RuntimeTable, interface},
};

pub const THREADS: usize = 2;

static HOST: HostTable = HostTable {
    struct_size: size_of::<HostTable>(),
    log: ignore,
    parallel_for: run,
    threads: {
        extern "C" fn count() -> usize {
            THREADS
        }
        count
    },
};
/// The call in progress: its number, how many of its indices are taken and done, and what to call.
static CALL: AtomicUsize = AtomicUsize::new(0);
static NEXT: AtomicUsize = AtomicUsize::new(usize::MAX / 2);
static COUNT: AtomicUsize = AtomicUsize::new(0);
static IDLE: AtomicUsize = AtomicUsize::new(0);
static BODY: AtomicUsize = AtomicUsize::new(0);
static CONTEXT: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());

extern "C" fn ignore(_: u32, _: abi_stable::std_types::RStr<'_>, _: abi_stable::std_types::RStr<'_>) {}

fn take_part(body: ParallelBody, context: *const c_void, count: usize) {
    loop {
        let index = NEXT.fetch_add(1, Ordering::AcqRel);
        if index >= count {
            return;
        }
        // SAFETY: `run` was called with these, and waits for this thread.
        unsafe { body(context, index) };
    }
}

unsafe extern "C" fn run(count: usize, body: ParallelBody, context: *const c_void) {
    BODY.store(body as usize, Ordering::Relaxed);
    CONTEXT.store(context.cast_mut(), Ordering::Relaxed);
    COUNT.store(count, Ordering::Relaxed);
    NEXT.store(0, Ordering::Relaxed);
    IDLE.store(0, Ordering::Relaxed);
    CALL.fetch_add(1, Ordering::Release);
    take_part(body, context, count);
    while IDLE.load(Ordering::Acquire) < THREADS - 1 {
        spin_loop();
    }
}

fn work() {
    let mut seen = 0;
    loop {
        while CALL.load(Ordering::Acquire) == seen {
            spin_loop();
        }
        seen += 1;
        // SAFETY: stored by `run` from such a function.
        let body = unsafe { std::mem::transmute::<usize, ParallelBody>(BODY.load(Ordering::Relaxed)) };
        take_part(body, CONTEXT.load(Ordering::Relaxed), COUNT.load(Ordering::Relaxed));
        IDLE.fetch_add(1, Ordering::Release);
    }
}

/// Starts the threads, and makes `parallel_for` use them. To be called once.
pub fn start_threads() {
    let table = torus_abi::export::common_interface(interface::RUNTIME).cast::<RuntimeTable>();
    // SAFETY: the runtime's table is a static, and so is the host's.
    unsafe { ((*table).attach)(&HOST) };
    (1..THREADS).for_each(|_| drop(std::thread::spawn(work)));
}

/// The limit for streaming: all threads add up the words of their halves.
pub fn sum(bytes: &[u8]) -> u64 {
    let (words, _) = bytes.as_chunks::<256>();
    let total = AtomicUsize::new(0);
    parallel_for(THREADS, |part| {
        let own = &words[words.len() * part / THREADS..words.len() * (part + 1) / THREADS];
        total.fetch_add(sum_part(own) as usize, Ordering::Relaxed);
    });
    total.into_inner() as u64
}

fn sum_part(words: &[[u8; 256]]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if torus_cpu::Level::Avx512.is_available() {
        // SAFETY: the level is available.
        return unsafe { sum_wide(words) };
    }
    let mut sums = [0u64; 32];
    for chunk in words {
        for (sum, word) in sums.iter_mut().zip(chunk.as_chunks().0) {
            *sum = sum.wrapping_add(u64::from_le_bytes(*word));
        }
    }
    sums.iter().fold(0, |sum, word| sum.wrapping_add(*word))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn sum_wide(words: &[[u8; 256]]) -> u64 {
    use std::arch::x86_64::*;
    let mut sums = [_mm512_setzero_si512(); 4];
    for chunk in words {
        for (index, sum) in sums.iter_mut().enumerate() {
            // SAFETY: the chunk has four of these.
            let words = unsafe { _mm512_loadu_si512(chunk.as_ptr().add(index * 64).cast()) };
            *sum = _mm512_add_epi64(*sum, words);
        }
    }
    sums.iter().fold(0, |sum, words| sum.wrapping_add(_mm512_reduce_add_epi64(*words) as u64))
}

pub fn time(body: impl FnOnce()) -> Duration {
    let start = Instant::now();
    body();
    start.elapsed()
}

pub fn median(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

pub fn least(times: &[Duration]) -> Duration {
    times.iter().min().copied().unwrap_or_default()
}

/// Operations a second of all threads when each only multiplies and adds in registers: of pairs of bf16 or of f32.
#[cfg(target_arch = "x86_64")]
pub fn peak(bf16: bool) -> Option<f64> {
    const ROUNDS: usize = 100_000;
    if !torus_cpu::Level::Avx512.is_available() {
        return None;
    }
    let elapsed = time(|| {
        parallel_for(THREADS, |_| {
            // SAFETY: the level is available.
            std::hint::black_box(unsafe { if bf16 { multiply_bf16(ROUNDS) } else { multiply_f32(ROUNDS) } });
        });
    });
    let operations = THREADS * ROUNDS * 16 * 16 * if bf16 { 4 } else { 2 };
    Some(operations as f64 / elapsed.as_secs_f64())
}

#[cfg(not(target_arch = "x86_64"))]
pub fn peak(_bf16: bool) -> Option<f64> {
    None
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
fn multiply_bf16(rounds: usize) -> f32 {
    use std::arch::x86_64::*;
    let (mut sums, one) = ([_mm512_setzero_ps(); 16], _mm512_set1_epi32(std::hint::black_box(0x3f80_3f80)));
    // SAFETY: both are 64 bytes of any value.
    let one = unsafe { std::mem::transmute::<__m512i, __m512bh>(one) };
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_dpbf16_ps(*sum, one, one);
        }
    }
    sums.iter().map(|sum| _mm512_reduce_add_ps(*sum)).sum()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn multiply_f32(rounds: usize) -> f32 {
    use std::arch::x86_64::*;
    let (mut sums, one) = ([_mm512_setzero_ps(); 16], _mm512_set1_ps(std::hint::black_box(0.5)));
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_fmadd_ps(one, one, *sum);
        }
    }
    sums.iter().map(|sum| _mm512_reduce_add_ps(*sum)).sum()
}
