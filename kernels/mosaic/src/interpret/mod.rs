//! Runs kernels on a CPU.
//!
//! # What is exact
//!
//! Integer operations, moves of lanes, conversions, `bf16` and 8-bit float rounding (to nearest, halves to even), bounds,
//! copies, semaphores. `f32` additions, multiplications, divisions and square roots are those of IEEE 754.
//!
//! # What is modelled
//!
//! - `exp`, `exp2`, `log`, `tanh` are the platform's `f32` functions; approximate reciprocals and divisions are exact.
//!   A TPU's differ in the last bits.
//! - The matrix unit multiplies `bf16` exactly and adds in `f32` in the order of the summed axis, and the operand that is
//!   added to comes last. `f32` operands are rounded to `bf16` unless the product is exact. Sums over lanes add eight
//!   partial sums. A TPU's order differs.
//! - Casts that do not fit: see [`crate::Value::cast`].
//!
//! # What is undefined
//!
//! Scratch memory and outputs are undefined until they are written; operands may be so in parts ([`Array::undefine`]).
//! Every lane carries for each of its bytes whether it is undefined. An operation's result is undefined where a lane it
//! depends on is: `select` looks at the chosen side only, `&` and `|` know operands that decide a byte alone, shifts
//! move bytes, and a product's element depends on a whole row and a whole column, even where the other factor is zero (a
//! NaN would, too). It is a fault when control flow, an address, a count or a copy to an output in HBM depends on
//! something undefined, and when something undefined was *stored* to an output in VMEM or SMEM and is still there at
//! the end. (Two 4-bit integers share a byte, and are undefined together.) What was *never* written of an output is reported in the output ([`Array::is_defined`]).
//!
//! # Not here
//!
//! Time, more than one core, remote DMA, whether the compiler accepts a kernel (alignment to tiles: ask libtpu).

mod access;
mod array;
mod compute;
mod counters;
mod dma;
mod fault;
mod memory;
mod number;
mod product;
mod program;
mod races;
mod register;
mod run;
mod shuffle;

pub use array::Array;
pub use counters::Counters;
pub use dma::{Completion, CopyRaces};
pub use fault::{Fault, FaultKind, Place};

use std::convert::Infallible;

use dma::Machine;
use memory::{Memory, View};
use program::Program;
use register::Register;
use run::{Role, Runner};

use crate::{
    Kernel,
    types::{Content, Space, Tensor, Type},
};

/// How a kernel is run.
#[derive(Clone, Debug)]
pub struct RunOptions {
    pub completion: Completion,
    pub copy_races: CopyRaces,
    /// Copies of undefined memory to outputs in HBM are no fault: the outputs tell what of them is undefined.
    pub allow_undefined_outputs: bool,
    /// The kernel is stopped after so many operations.
    pub max_ops: u64,
}

impl Default for RunOptions {
    fn default() -> Self {
        Self {
            completion: Completion::OnWait,
            copy_races: CopyRaces::Fault,
            allow_undefined_outputs: false,
            max_ops: 1_000_000_000,
        }
    }
}

/// What a kernel yields.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub outputs: Vec<Array>,
    pub counters: Counters,
}

/// Why there is no [`Outcome`].
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RunError {
    #[error("'{kernel}' takes {expected} operands, not {found}")]
    Operands { kernel: String, expected: usize, found: usize },
    #[error("operand {index} of '{kernel}' is {expected}, not {found}")]
    Operand { kernel: String, index: usize, expected: Tensor, found: Tensor },
    #[error(transparent)]
    Fault(#[from] Fault),
}

impl RunError {
    /// What the kernel does wrong, if the operands were right.
    pub fn fault(&self) -> Option<&FaultKind> {
        match self {
            Self::Fault(fault) => Some(&fault.kind),
            _ => None,
        }
    }
}

/// A kernel that was compiled to be run on a CPU, as often as wanted.
pub struct Interpreter {
    kernel: Kernel,
    program: Program,
    /// The view of each memory of the kernel, in their order.
    parameters: Vec<usize>,
}

/// The memories of a run.
struct Setting {
    memories: Vec<Memory>,
    /// For each parameter its box.
    views: Vec<View>,
    semaphores: usize,
    /// For each memory what it is for.
    roles: Vec<Role>,
}

impl Interpreter {
    pub fn new(kernel: &Kernel) -> Self {
        let (program, parameters) = program::compile(kernel);
        Self { kernel: kernel.clone(), program, parameters }
    }

    /// Runs the kernel with operands in the order of the call.
    pub fn run(&self, operands: &[Array], options: &RunOptions) -> Result<Outcome, RunError> {
        self.check(operands)?;
        let setting = self.setting(operands);
        let mut views = vec![View::semaphores(0, &[]).0; self.program.views];
        for (slot, view) in self.parameters.iter().zip(&setting.views) {
            views[*slot] = *view;
        }
        let tainted = vec![None; setting.memories.len()];
        let mut runner = Runner {
            program: &self.program,
            machine: Machine::new(setting.memories, setting.semaphores, options.completion, options.copy_races),
            registers: self.program.registers.iter().map(|lanes| Register::new(*lanes)).collect(),
            views,
            roles: setting.roles,
            tainted,
            allow_undefined_outputs: options.allow_undefined_outputs,
            executed: vec![0; self.program.names.len()],
            ops_left: options.max_ops,
            max_ops: options.max_ops,
        };
        runner.block(&self.program.body)?;
        let ended = runner.machine.finish();
        ended.map_err(|(kind, Place(location))| Fault { kind, operation: "end of the kernel", location })?;
        let first_output = self.kernel.operands.len();
        let output_views = &setting.views[first_output..first_output + self.kernel.outputs.len()];
        if !options.allow_undefined_outputs {
            untainted(&runner, output_views)?;
        }
        let outputs = self.kernel.outputs.iter().zip(output_views);
        let outputs = outputs.map(|(output, view)| download(&runner.machine, view, &output.tensor)).collect();
        Ok(Outcome { outputs, counters: self.counters(runner) })
    }

    fn check(&self, operands: &[Array]) -> Result<(), RunError> {
        let kernel = || self.kernel.name.clone();
        let (expected, found) = (self.kernel.operands.len(), operands.len());
        if expected != found {
            return Err(RunError::Operands { kernel: kernel(), expected, found });
        }
        for (index, (operand, array)) in self.kernel.operands.iter().zip(operands).enumerate() {
            if operand.tensor != array.tensor {
                let (expected, found) = (operand.tensor.clone(), array.tensor.clone());
                return Err(RunError::Operand { kernel: kernel(), index, expected, found });
            }
        }
        Ok(())
    }

    fn setting(&self, operands: &[Array]) -> Setting {
        let mut setting = Setting { memories: Vec::new(), views: Vec::new(), semaphores: 0, roles: Vec::new() };
        for (index, (operand, array)) in self.kernel.operands.iter().zip(operands).enumerate() {
            let view = setting.add(operand.space, &operand.tensor, Role::Operand(index));
            upload(&mut setting.memories[view.memory], &view, array);
        }
        for (index, output) in self.kernel.outputs.iter().enumerate() {
            let view = match output.alias {
                Some(operand) => {
                    let view = setting.views[operand];
                    setting.views.push(view);
                    view
                }
                None => setting.add(output.space, &output.tensor, Role::Scratch),
            };
            setting.roles[view.memory] = Role::Output(index);
        }
        for id in &self.kernel.scratch {
            let Type::Ref(reference) = &self.kernel.types[*id] else { continue };
            let dims = reference.static_dims().unwrap_or_default();
            match reference.content {
                Content::Data(elem) => {
                    setting.add(reference.space, &Tensor::new(elem, dims), Role::Scratch);
                }
                Content::Semaphore | Content::DmaSemaphore => {
                    let (view, count) = View::semaphores(setting.semaphores, &dims);
                    setting.semaphores += count;
                    setting.views.push(view);
                }
            }
        }
        setting
    }

    fn counters(&self, runner: Runner<'_>) -> Counters {
        let mut counters = runner.machine.counters;
        let on_chip = |space: Space| !space.is_main();
        let operands = self.kernel.operands.iter().filter(|operand| on_chip(operand.space));
        counters.operand_bytes = operands.map(|operand| operand.tensor.bytes() as u64).sum();
        let outputs = self.kernel.outputs.iter().filter(|output| on_chip(output.space));
        counters.output_bytes = outputs.map(|output| output.tensor.bytes() as u64).sum();
        let executed = self.program.names.iter().copied().zip(runner.executed);
        counters.ops = executed.filter(|(_, count)| *count > 0).collect();
        counters
    }
}

impl Setting {
    /// A memory of which nothing is defined.
    fn add(&mut self, space: Space, tensor: &Tensor, role: Role) -> View {
        let (view, words) = View::whole(self.memories.len(), tensor.elem, &tensor.dims);
        self.memories.push(Memory::undefined(space, words));
        self.roles.push(role);
        self.views.push(view);
        view
    }
}

/// That no output on the chip ends with what was computed from something undefined.
fn untainted(runner: &Runner<'_>, outputs: &[View]) -> Result<(), Fault> {
    for (output, view) in outputs.iter().enumerate() {
        let Some(Place(location)) = runner.tainted[view.memory] else { continue };
        if runner.machine.memories[view.memory].is_tainted(view) {
            return Err(Fault { kind: FaultKind::UndefinedOutput { output }, operation: "store", location });
        }
    }
    Ok(())
}

fn upload(memory: &mut Memory, view: &View, array: &Array) {
    let mut at = 0;
    let elem = array.tensor.elem;
    let all = memory::all_undefined(elem);
    let shadow: Vec<u8> = array.undefined.iter().map(|undefined| if *undefined { all } else { 0 }).collect();
    let Ok(()) = view.for_each_run(|run| {
        let range = at..at + run.count;
        at = range.end;
        let shadow = (!shadow.is_empty()).then(|| &shadow[range.clone()]);
        memory.write(elem, run, &array.lanes[range], shadow);
        Ok::<(), Infallible>(())
    });
}

fn download(machine: &Machine, view: &View, tensor: &Tensor) -> Array {
    let mut register = Register::new(tensor.elements());
    // Nothing is in flight any more, so it cannot fail.
    let loaded = machine.load(view, &mut register);
    debug_assert!(loaded.is_ok());
    let undefined = match register.is_undefined() {
        true => register.shadow.iter().map(|shadow| *shadow != 0).collect(),
        false => Vec::new(),
    };
    Array { tensor: tensor.clone(), lanes: register.lanes, undefined }
}
