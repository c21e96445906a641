//! What a compiled program moves through the device's main memory, counted over its optimized HLO.
//!
//! XLA's own estimate ("bytes accessed") adds up all memories: a weight that is fetched ahead into a TPU's VMEM counts
//! again when it is read there. Here each array counts only where its layout says main memory (memory space 0): operands
//! as far as an instruction reads them, and results. What is updated in place counts as what is updated.
//!
//! Conditionals count as their cheapest branch, loops as often as the compiler knows they run (else once, and that is
//! said), custom calls not at all: only they know what they move.

use std::collections::HashMap;

use pjrt_sys::protos::xla::{
    HloComputationProto, HloInstructionProto, HloModuleProto, HloModuleProtoWithConfig, LayoutProto, PrimitiveType,
    ShapeProto,
};
use prost::Message;

use crate::error::{PjrtError, Result};

/// What one run of a program moves.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Traffic {
    /// Through main memory, custom calls left out.
    pub bytes: u64,
    /// Custom calls by target, with how often they run.
    pub custom_calls: Vec<(String, u64)>,
    /// Results of collectives, such as `all-gather`, with their size in bytes and how often they run.
    pub collectives: Vec<Collective>,
    /// Loops whose length the compiler does not know: they count as one round.
    pub loops_of_unknown_length: u64,
}

/// A collective operation of a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Collective {
    pub operation: String,
    /// Of its results on one device.
    pub bytes: u64,
    pub times: u64,
}

/// The main memory of a device, which on TPUs is HBM.
const MAIN_MEMORY: i64 = 0;

impl Traffic {
    /// Counts over a serialized module, as plugins give it (`hlo` or `hlo_with_config`).
    pub(crate) fn of_program(format: &str, bytes: &[u8]) -> Result<Self> {
        let unreadable = |error| PjrtError::Invalid(format!("the optimized program cannot be read: {error}"));
        let module = match format {
            "hlo" => HloModuleProto::decode(bytes).map_err(unreadable)?,
            "hlo_with_config" => {
                HloModuleProtoWithConfig::decode(bytes).map_err(unreadable)?.hlo_module.unwrap_or_default()
            }
            other => {
                return Err(PjrtError::Invalid(format!("the optimized program comes as '{other}', which is no HLO")));
            }
        };
        Ok(Module::new(&module).traffic(module.entry_computation_id))
    }

    fn add(&mut self, other: Self, times: u64) {
        self.bytes += other.bytes * times;
        self.loops_of_unknown_length += other.loops_of_unknown_length * times;
        for (target, calls) in other.custom_calls {
            match self.custom_calls.iter_mut().find(|(known, _)| *known == target) {
                Some((_, known)) => *known += calls * times,
                None => self.custom_calls.push((target, calls * times)),
            }
        }
        let repeated = |collective: Collective| Collective { times: collective.times * times, ..collective };
        self.collectives.extend(other.collectives.into_iter().map(repeated));
    }
}

struct Module<'a> {
    computations: HashMap<i64, Computation<'a>>,
}

struct Computation<'a> {
    instructions: &'a [HloInstructionProto],
    by_id: HashMap<i64, &'a HloInstructionProto>,
    root: i64,
}

impl<'a> Computation<'a> {
    fn new(computation: &'a HloComputationProto) -> Self {
        let instructions = computation.instructions.as_slice();
        let by_id = instructions.iter().map(|instruction| (instruction.id, instruction)).collect();
        Self { instructions, by_id, root: computation.root_id }
    }

    fn operand(&self, instruction: &HloInstructionProto, index: usize) -> Option<&'a HloInstructionProto> {
        self.by_id.get(instruction.operand_ids.get(index)?).copied()
    }

    fn parameter(&self, number: usize) -> Option<&'a HloInstructionProto> {
        let is_it = |instruction: &&&HloInstructionProto| {
            instruction.opcode == "parameter" && instruction.parameter_number == number as i64
        };
        self.instructions.iter().collect::<Vec<_>>().iter().find(is_it).copied()
    }

    /// Instructions that use one, with the place it has among their operands.
    fn users(&self, id: i64) -> impl Iterator<Item = (&'a HloInstructionProto, usize)> {
        self.instructions.iter().filter_map(move |user| Some((user, user.operand_ids.iter().position(|it| *it == id)?)))
    }
}

impl<'a> Module<'a> {
    fn new(module: &'a HloModuleProto) -> Self {
        let computations = module.computations.iter();
        Self { computations: computations.map(|it| (it.id, Computation::new(it))).collect() }
    }

    fn traffic(&self, computation: i64) -> Traffic {
        let mut sum = Traffic::default();
        if let Some(computation) = self.computations.get(&computation) {
            for instruction in computation.instructions {
                sum.add(self.of_instruction(computation, instruction), 1);
            }
        }
        sum
    }

    fn of_instruction(&self, computation: &Computation<'a>, instruction: &HloInstructionProto) -> Traffic {
        let called = || instruction.called_computation_ids.iter().map(|id| self.traffic(*id));
        let mut traffic = Traffic::default();
        match instruction.opcode.as_str() {
            "parameter"
            | "constant"
            | "tuple"
            | "get-tuple-element"
            | "bitcast"
            | "after-all"
            | "opt-barrier"
            | "partition-id"
            | "replica-id"
            | "copy-done"
            | "async-done"
            | "async-update"
            | "all-reduce-done"
            | "all-gather-done"
            | "collective-permute-done" => {}
            // The first result is the copy.
            "copy-start" => {
                let copy = parts(instruction.shape.as_ref()).first().map_or(0, |copy| size(copy));
                let ends = [computation.operand(instruction, 0).and_then(|it| it.shape.as_ref())];
                let source = ends.into_iter().flatten().filter(|shape| is_in_main_memory(shape)).count() as u64;
                let target =
                    parts(instruction.shape.as_ref()).first().filter(|it| is_in_main_memory(it)).map_or(0, |_| 1);
                traffic.bytes = copy * (source + target);
            }
            "call" | "async-start" => called().for_each(|of_called| traffic.add(of_called, 1)),
            "while" => {
                let rounds = trip_count(&instruction.backend_config);
                traffic.loops_of_unknown_length = u64::from(rounds.is_none());
                called().for_each(|of_called| traffic.add(of_called, rounds.unwrap_or(1)));
            }
            "conditional" => {
                let cheapest = called().min_by_key(|of_branch| of_branch.bytes);
                cheapest.into_iter().for_each(|of_branch| traffic.add(of_branch, 1));
            }
            "custom-call" => traffic.custom_calls.push((instruction.custom_call_target.clone(), 1)),
            "fusion" => {
                let body = instruction.called_computation_ids.first().and_then(|id| self.computations.get(id));
                traffic.bytes = body.map_or(0, |body| of_fusion(computation, instruction, body));
            }
            _ => {
                traffic.bytes = plain(computation, instruction);
                if is_collective(&instruction.opcode) {
                    let bytes = parts(instruction.shape.as_ref()).into_iter().map(size).sum();
                    let operation = instruction.opcode.trim_end_matches("-start").to_owned();
                    traffic.collectives.push(Collective { operation, bytes, times: 1 });
                }
            }
        }
        traffic
    }
}

fn is_collective(opcode: &str) -> bool {
    let operation = opcode.trim_end_matches("-start");
    matches!(operation, "all-reduce" | "all-gather" | "all-to-all" | "reduce-scatter" | "collective-permute")
}

/// How often a loop runs, if its backend configuration says so.
fn trip_count(backend_config: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(backend_config).ok()?;
    let (_, after) = text.split_once("\"known_trip_count\"")?;
    let digits = after.chars().skip_while(|c| !c.is_ascii_digit() && *c != '}').take_while(char::is_ascii_digit);
    digits.collect::<String>().parse().ok()
}

/// Operands as far as they are read, and results.
fn plain(computation: &Computation<'_>, instruction: &HloInstructionProto) -> u64 {
    let mut bytes = written(computation, instruction);
    let place_of = |place: usize| {
        let operand = computation.operand(instruction, place)?;
        let shape = operand.shape.as_ref().filter(|shape| is_in_main_memory(shape))?;
        Some(reads(instruction, place, computation).unwrap_or_else(|| size(shape)))
    };
    bytes += (0..instruction.operand_ids.len()).filter_map(place_of).sum::<u64>();
    bytes
}

/// What an instruction reads of the operand in one place; `None` = all of it.
fn reads(instruction: &HloInstructionProto, place: usize, computation: &Computation<'_>) -> Option<u64> {
    match (instruction.opcode.as_str(), place) {
        ("dynamic-slice" | "slice" | "gather", 0) => instruction.shape.as_ref().map(size),
        // What is there already stays.
        ("dynamic-update-slice", 0) => Some(0),
        ("scatter", 0) => {
            let updates = computation.operand(instruction, 2)?.shape.as_ref()?;
            Some(size(updates))
        }
        ("bitcast" | "get-tuple-element" | "tuple", _) => Some(0),
        _ => None,
    }
}

/// What an instruction writes.
fn written(computation: &Computation<'_>, instruction: &HloInstructionProto) -> u64 {
    let whole = || parts(instruction.shape.as_ref()).into_iter().filter(|it| is_in_main_memory(it)).map(size).sum();
    let updates = match instruction.opcode.as_str() {
        "dynamic-update-slice" => Some(1),
        "scatter" => Some(2),
        _ => None,
    };
    let is_main = parts(instruction.shape.as_ref()).first().is_some_and(|shape| is_in_main_memory(shape));
    match updates.and_then(|place| computation.operand(instruction, place)) {
        Some(updates) if is_main => updates.shape.as_ref().map_or(0, size),
        Some(_) => 0,
        None => whole(),
    }
}

/// A fusion reads each operand as far as its body does, and writes what the body's root does.
fn of_fusion(computation: &Computation<'_>, fusion: &HloInstructionProto, body: &Computation<'_>) -> u64 {
    let mut bytes = 0;
    for place in 0..fusion.operand_ids.len() {
        let shape = computation.operand(fusion, place).and_then(|operand| operand.shape.as_ref());
        let (Some(shape), Some(parameter)) = (shape.filter(|it| is_in_main_memory(it)), body.parameter(place)) else {
            continue;
        };
        bytes += read_in(body, parameter.id).min(size(shape));
    }
    let root = body.by_id.get(&body.root).copied();
    let roots: Vec<_> = match root {
        Some(root) if root.opcode == "tuple" => (0..root.operand_ids.len()).map(|i| body.operand(root, i)).collect(),
        root => vec![root],
    };
    let results = parts(fusion.shape.as_ref());
    for (result, root) in results.into_iter().zip(roots) {
        if is_in_main_memory(result) {
            bytes += root.map_or(0, |root| updated_by(body, root)).min(size(result));
        }
    }
    bytes
}

/// What is written if an instruction is the root of a fusion, which updates in place where it can.
fn updated_by(body: &Computation<'_>, root: &HloInstructionProto) -> u64 {
    let update = match root.opcode.as_str() {
        "dynamic-update-slice" => body.operand(root, 1),
        "scatter" => body.operand(root, 2),
        "bitcast" => return body.operand(root, 0).map_or(u64::MAX, |inner| updated_by(body, inner)),
        _ => return u64::MAX,
    };
    update.and_then(|update| update.shape.as_ref()).map_or(u64::MAX, size)
}

/// What a fusion's body reads of a value that is not its own.
fn read_in(body: &Computation<'_>, id: i64) -> u64 {
    let uses = body.users(id).map(|(user, place)| match user.opcode.as_str() {
        "bitcast" => read_in(body, user.id),
        _ => reads(user, place, body).unwrap_or(u64::MAX),
    });
    uses.fold(0, u64::saturating_add)
}

/// The arrays of a shape.
fn parts(shape: Option<&ShapeProto>) -> Vec<&ShapeProto> {
    match shape {
        Some(shape) if shape.element_type() == PrimitiveType::Tuple => {
            shape.tuple_shapes.iter().flat_map(|part| parts(Some(part))).collect()
        }
        Some(shape) => vec![shape],
        None => Vec::new(),
    }
}

fn is_in_main_memory(shape: &ShapeProto) -> bool {
    shape.layout.as_deref().map_or(MAIN_MEMORY, |layout: &LayoutProto| layout.memory_space) == MAIN_MEMORY
}

/// In bytes, without what a layout pads. Shapes that hold no elements (tokens, contexts) have none.
fn size(shape: &ShapeProto) -> u64 {
    let elements: u64 = shape.dimensions.iter().map(|dim| u64::try_from(*dim).unwrap_or(0)).product();
    (elements * element_bits(shape.element_type())).div_ceil(8)
}

fn element_bits(element: PrimitiveType) -> u64 {
    match element {
        PrimitiveType::S2 | PrimitiveType::U2 => 2,
        PrimitiveType::S4 | PrimitiveType::U4 => 4,
        PrimitiveType::S16 | PrimitiveType::U16 | PrimitiveType::F16 | PrimitiveType::Bf16 => 16,
        PrimitiveType::S32 | PrimitiveType::U32 | PrimitiveType::F32 => 32,
        PrimitiveType::S64 | PrimitiveType::U64 | PrimitiveType::F64 | PrimitiveType::C64 => 64,
        PrimitiveType::C128 => 128,
        PrimitiveType::Tuple | PrimitiveType::Token | PrimitiveType::OpaqueType | PrimitiveType::Invalid => 0,
        // The others have a byte: booleans, bytes and the small floats.
        _ => 8,
    }
}

#[cfg(test)]
mod tests;
