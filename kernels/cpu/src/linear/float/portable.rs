//! Plain Rust over arrays of lanes, which the compiler vectorizes. On AArch64, whose baseline has vectors and fused
//! multiplication, this is the code for Neon too.

use half::f16;

use super::{Microkernel, Panel};

type Lanes = [f32; 16];

#[inline(always)]
fn multiply_add(sums: Lanes, weights: Lanes, x: f32) -> Lanes {
    std::array::from_fn(|lane| {
        if cfg!(target_arch = "aarch64") {
            weights[lane].mul_add(x, sums[lane])
        } else {
            sums[lane] + weights[lane] * x
        }
    })
}

macro_rules! plain {
    ($(#[$doc:meta])* $name:ident, $weights:ty, $stored:ty, $x:ty, $columns:literal, $bytes:literal, $load:expr, $add:expr) => {
        $(#[$doc])*
        pub struct $name;

        impl Microkernel for $name {
            type Sums = Lanes;
            type Weights = $weights;
            const BF16: bool = false;
            const STEP_COLUMNS: usize = $columns;
            const STEP_BYTES: usize = $bytes;
            const ROWS: usize = 4;
            const GROUPS: usize = 1;

            #[inline(always)]
            unsafe fn zero() -> Lanes {
                [0.0; 16]
            }

            #[inline(always)]
            fn prefetch(_w: *const u8) {}

            #[inline(always)]
            unsafe fn load(w: *const u8) -> $weights {
                // SAFETY: the caller says that there are the weights of a step.
                $load(unsafe { w.cast::<$stored>().read() })
            }

            #[inline(always)]
            unsafe fn add(sums: Lanes, weights: $weights, x: *const u8) -> Lanes {
                // SAFETY: the caller says that there are the activations of a step.
                $add(sums, weights, unsafe { x.cast::<$x>().read() })
            }

            #[inline(always)]
            unsafe fn join(one: Lanes, other: Lanes) -> Lanes {
                std::array::from_fn(|lane| one[lane] + other[lane])
            }

            #[inline(always)]
            unsafe fn store(sums: Lanes, out: *mut f32) {
                // SAFETY: the caller says that there is room.
                unsafe { out.cast::<Lanes>().write(sums) };
            }

            unsafe fn run<const R: usize, const G: usize, const S: usize>(panel: &Panel) {
                // SAFETY: as the caller says.
                unsafe { panel.run::<Self, R, G, S>() };
            }
        }
    };
}

plain!(PlainF32, Lanes, Lanes, f32, 1, 64, |w: Lanes| w, multiply_add);
plain!(PlainF16, Lanes, [f16; 16], f32, 1, 32, |w: [f16; 16]| w.map(f16::to_f32), multiply_add);
plain!(
    /// The first of a pair is the lower half of a word.
    PlainBf16,
    [Lanes; 2],
    [u32; 16],
    [f32; 2],
    2,
    64,
    |w: [u32; 16]| [w.map(|pair| f32::from_bits(pair << 16)), w.map(|pair| f32::from_bits(pair & 0xffff_0000))],
    |sums, [first, second]: [Lanes; 2], x: [f32; 2]| multiply_add(multiply_add(sums, first, x[0]), second, x[1])
);
