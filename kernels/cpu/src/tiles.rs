//! The matrix unit of x86-64 processors (AMX): eight tile registers of at most 16 rows of 64 bytes, and products of two
//! of them that are added to a third. Only those of bf16 are used: with bytes, the vectors that scale each block's sums take
//! as long as vectors that multiply them too (measured on Sapphire Rapids). So quantized weights are widened for many rows.
//!
//! The compiler knows nothing of the registers. [`configured`] sets their shapes for the calls in its body, and gives them
//! back; the functions here are only for such a body. Source: Intel's Architecture Instruction Set Extensions Programming
//! Reference, chapter 3.

use std::{
    arch::{asm, x86_64::__cpuid_count},
    sync::OnceLock,
};

/// Rows of a tile at most.
pub const ROWS: usize = 16;
/// Bytes of a tile's row at most.
pub const ROW_BYTES: usize = 64;

/// Whether the processor has tiles for bf16, and the system lets this process use them, which it is asked
/// for here, once.
pub fn are_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| has_instructions() && is_permitted())
}

fn has_instructions() -> bool {
    const BF16: u32 = 1 << 22;
    const TILE: u32 = 1 << 24;
    if __cpuid_count(0, 0).eax < 7 {
        return false;
    }
    __cpuid_count(7, 0).edx & (BF16 | TILE) == BF16 | TILE
}

/// Linux gives a process the tiles' large state only when it asks for it.
#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_ulong = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_ulong = 18;
    // SAFETY: the call has no pointers, and changes nothing but what is asked for.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}

/// Rows, and bytes of a row, of each register; those that are not used have none.
#[derive(Clone, Copy, Default)]
pub struct Shapes([(u8, u16); 8]);

impl Shapes {
    /// # Panics
    /// If the shape is not that of a tile.
    pub fn with(mut self, register: usize, rows: usize, row_bytes: usize) -> Self {
        assert!((1..=ROWS).contains(&rows) && (1..=ROW_BYTES).contains(&row_bytes), "the shape of a tile");
        self.0[register] = (rows as u8, row_bytes as u16);
        self
    }
}

/// Runs `body` with registers of these shapes.
///
/// # Safety
/// Tiles are available, and `body` does not panic.
#[inline(always)]
pub unsafe fn configured(shapes: Shapes, body: impl FnOnce()) {
    #[repr(C, align(64))]
    struct Configuration {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        row_bytes: [u16; 16],
        rows: [u8; 16],
    }
    let mut configuration =
        Configuration { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    for (register, (rows, row_bytes)) in shapes.0.into_iter().enumerate() {
        configuration.rows[register] = rows;
        configuration.row_bytes[register] = row_bytes;
    }
    // SAFETY: the instructions are there, as the caller says, and read a configuration.
    unsafe {
        asm!("ldtilecfg [{}]", in(reg) &configuration, options(nostack, readonly, preserves_flags));
        body();
        asm!("tilerelease", options(nostack, nomem, preserves_flags));
    }
}

/// Fills a register with zeros.
///
/// # Safety
/// It is configured.
#[inline(always)]
pub unsafe fn zero<const TILE: u8>() {
    // SAFETY: as the caller says.
    unsafe { asm!("tilezero tmm{}", const TILE, options(nostack, nomem, preserves_flags)) };
}

/// Loads a register's rows, which lie `stride` bytes apart.
///
/// # Safety
/// It is configured, and its rows are there.
#[inline(always)]
pub unsafe fn load<const TILE: u8>(rows: *const u8, stride: usize) {
    // SAFETY: as the caller says.
    unsafe {
        asm!("tileloadd tmm{}, [{} + {}]", const TILE, in(reg) rows, in(reg) stride,
            options(nostack, readonly, preserves_flags));
    }
}

/// Stores a register's rows, `stride` bytes apart.
///
/// # Safety
/// It is configured, and nobody else uses the memory of its rows.
#[inline(always)]
pub unsafe fn store<const TILE: u8>(rows: *mut u8, stride: usize) {
    // SAFETY: as the caller says.
    unsafe {
        asm!("tilestored [{} + {}], tmm{}", in(reg) rows, in(reg) stride, const TILE,
            options(nostack, preserves_flags));
    }
}

/// `sums += x · w` in f32, for rows of bf16 in `x`, and in `w` a row for each pair of columns.
///
/// # Safety
/// All are configured, for shapes that fit each other.
#[inline(always)]
pub unsafe fn add_bf16<const SUMS: u8, const X: u8, const W: u8>() {
    // SAFETY: as the caller says.
    unsafe {
        asm!("tdpbf16ps tmm{}, tmm{}, tmm{}", const SUMS, const X, const W,
            options(nostack, nomem, preserves_flags));
    }
}
