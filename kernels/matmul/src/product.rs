//! Products: what is computed, and in which pieces.

use std::fmt;

use torus_mosaic::{CallOptions, CostEstimate, Elem, Generation, Kernel, Tensor};

use crate::{MatmulError, Weights, kernel, tuned};

/// What the rows are multiplied as.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Activations {
    /// As they are. Integer weights become `bf16` numbers, which are exact.
    Bf16,
    /// Rounded to signed bytes, with a scale for each row that the kernel finds: for integer weights, on generations
    /// whose matrix unit multiplies bytes.
    Int8,
}

/// `out[row] = x[row] . weights[expert of row] * scales + bias`, with `x` in `bf16 [rows, in]` and the result in
/// `bf16 [rows, out]`. Sums are kept in `f32`, or in `i32` within a group of [`Activations::Int8`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Matmul {
    /// With experts: rows of all of them, sorted by expert.
    pub rows: usize,
    pub weights: Weights,
    pub activations: Activations,
}

/// The pieces in which a product is computed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Tiles {
    /// Rows that are multiplied at once.
    pub rows: usize,
    /// Outputs whose weights are fetched at once.
    pub columns: usize,
    /// Outputs that are computed at once, a part of `columns`.
    pub strip: usize,
    /// Tiles of weights in VMEM: one is used while the others arrive.
    pub ring: usize,
    /// Blocks of `rows` in VMEM. Enough for all of them: each is fetched once. Otherwise they are fetched again for
    /// each part of the outputs.
    pub blocks: usize,
}

impl fmt::Display for Tiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rows, columns, strip, ring, blocks } = self;
        write!(f, "tiles of {rows} rows ({blocks} in VMEM) by {columns} outputs ({ring} in VMEM, {strip} at once)")
    }
}

/// Outputs are whole lanes.
pub(crate) const LANES: usize = 128;
/// VMEM beside the kernel's memories, for what does not fit into registers.
const SPILLS: usize = 4 << 20;

impl Matmul {
    pub fn new(rows: usize, weights: Weights) -> Self {
        Self { rows, weights, activations: Activations::Bf16 }
    }

    /// Rows that are whole tiles of the type they are multiplied as.
    pub(crate) fn row_unit(&self) -> usize {
        match self.activations {
            Activations::Bf16 => 16,
            Activations::Int8 => 32,
        }
    }

    /// Whether the shapes can be had at all.
    pub fn check(&self) -> Result<(), MatmulError> {
        let shape = |field, value, remedy: &str| Err(MatmulError::Shape { field, value, remedy: remedy.to_owned() });
        let Weights { inputs, outputs, experts, format, group, .. } = self.weights;
        let integer = matches!(format, crate::Format::Int8 | crate::Format::Int4);
        match () {
            () if self.rows == 0 => shape("rows", 0, "there is nothing to multiply"),
            () if inputs == 0 || !inputs.is_multiple_of(LANES) => {
                shape("inputs", inputs, "pad weights and rows with zeros to a multiple of 128")
            }
            () if outputs == 0 || !outputs.is_multiple_of(LANES) => {
                shape("outputs", outputs, "pad weights to a multiple of 128, better of 256")
            }
            () if experts == Some(0) => shape("experts", 0, "leave `experts` out for a plain product"),
            () if self.activations == Activations::Int8 && !integer => {
                shape("activations", 8, "bytes are multiplied with integer weights: use `Activations::Bf16`")
            }
            () => match group {
                Some(_) if !format.is_quantized() => shape("group", 0, "weights in bf16 have no scales"),
                Some(group) if group == 0 || !group.is_multiple_of(32) || !inputs.is_multiple_of(group) => {
                    shape("group", group, "use a multiple of 32 that divides `inputs`")
                }
                _ => Ok(()),
            },
        }
    }

    /// Whether a generation's matrix unit takes the operands.
    pub fn supports(&self, generation: Generation) -> Result<(), MatmulError> {
        self.check()?;
        match (self.activations, generation) {
            (Activations::Int8, Generation::Tpu7x) => Err(MatmulError::Unsupported {
                what: "products of bytes".to_owned(),
                generation,
                remedy: "the compiler widens them before they are multiplied, so nothing is won: use `Activations::Bf16`",
            }),
            _ => Ok(()),
        }
    }

    /// Blocks of rows.
    pub(crate) fn blocks(&self, tiles: &Tiles) -> usize {
        self.rows.div_ceil(tiles.rows)
    }

    /// Rows that the kernel takes and gives: whole blocks. Those behind the last that counts may hold anything.
    pub fn padded_rows(&self, tiles: &Tiles) -> usize {
        self.blocks(tiles) * tiles.rows
    }

    /// The rows that the kernel takes.
    pub fn x(&self, tiles: &Tiles) -> Tensor {
        Elem::Bf16.of([self.padded_rows(tiles), self.weights.inputs])
    }

    /// The result.
    pub fn out(&self, tiles: &Tiles) -> Tensor {
        Elem::Bf16.of([self.padded_rows(tiles), self.weights.outputs])
    }

    /// The tiles for a generation: from a table, or by a rule that fits its VMEM.
    pub fn tiles(&self, generation: Generation) -> Result<Tiles, MatmulError> {
        self.supports(generation)?;
        tuned::tiles(self, generation)
    }

    /// The kernel. Its operands: with experts their first rows (`i32 [experts + 1]`, from 0 up to the rows that count),
    /// then [`Matmul::x`], [`Weights::stored`], [`Weights::scales`], [`Weights::biases`].
    pub fn kernel(&self, tiles: &Tiles) -> Result<Kernel, MatmulError> {
        self.check()?;
        self.check_tiles(tiles)?;
        kernel::build(self, tiles)
    }

    fn check_tiles(&self, tiles: &Tiles) -> Result<(), MatmulError> {
        let Tiles { rows, columns, strip, ring, blocks } = *tiles;
        let shape = |field, value, remedy: String| Err(MatmulError::Shape { field, value, remedy });
        let unit = self.row_unit();
        match () {
            () if rows == 0 || !rows.is_multiple_of(unit) => {
                shape("tiles.rows", rows, format!("use a multiple of {unit}"))
            }
            () if columns == 0 || !self.weights.outputs.is_multiple_of(columns) => {
                shape("tiles.columns", columns, format!("use a divisor of the {} outputs", self.weights.outputs))
            }
            () if strip == 0 || !strip.is_multiple_of(LANES) || !columns.is_multiple_of(strip) => {
                shape("tiles.strip", strip, format!("use a multiple of 128 that divides the {columns} columns"))
            }
            () if ring < 2 => shape("tiles.ring", ring, "use 2 or more, so that weights arrive meanwhile".to_owned()),
            () if blocks < self.blocks(tiles) && (blocks < 2 || !blocks.is_power_of_two()) => {
                shape("tiles.blocks", blocks, "use a power of two from 2 on, so that rows arrive meanwhile".to_owned())
            }
            () => Ok(()),
        }
    }

    /// How the kernel is called on a generation. Refused if its VMEM does not suffice.
    pub fn call_options(
        &self,
        kernel: &Kernel,
        tiles: &Tiles,
        generation: Generation,
    ) -> Result<CallOptions, MatmulError> {
        let bytes = kernel.footprint().vmem + SPILLS;
        let available = generation.usable_vmem_bytes();
        if bytes > available {
            return Err(MatmulError::Vmem {
                weights: self.weights.to_string(),
                tiles: tiles.to_string(),
                bytes,
                available,
                generation,
                remedy: "use smaller tiles, or split the inputs over devices",
            });
        }
        let limit = bytes.max(generation.default_vmem_limit_bytes());
        Ok(CallOptions {
            vmem_limit_bytes: Some(limit),
            cost: Some(self.cost(tiles)),
            disable_bounds_checks: true,
            ..CallOptions::new(generation)
        })
    }

    /// What a call costs. Of the experts as many are read as there are rows, if there are fewer.
    pub fn cost(&self, tiles: &Tiles) -> CostEstimate {
        let Weights { inputs, outputs, .. } = self.weights;
        let matrices = self.weights.matrices().min(self.rows);
        let parts = if self.blocks(tiles) <= tiles.blocks { 1 } else { outputs / tiles.columns };
        let rows = self.padded_rows(tiles) * 2 * (inputs * parts + outputs);
        CostEstimate {
            flops: 2 * (self.rows * inputs * outputs) as u64,
            transcendentals: 0,
            bytes_accessed: (matrices * self.weights.matrix_bytes() + rows) as u64,
        }
    }

    /// Bytes of VMEM that the kernel and its spills take.
    pub(crate) fn vmem_bytes(&self, tiles: &Tiles) -> Result<usize, MatmulError> {
        Ok(self.kernel(tiles)?.footprint().vmem + SPILLS)
    }
}
